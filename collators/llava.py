"""`LlavaDataCollator`: rows with messages and pictures → a training batch in which what trains is what was meant.

This file imports libraries only, so that it can be pasted into a notebook cell whole.
"""

import io
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
TRAIN_ON = ("assistant", "last_assistant", "all")
PLACEMENT = ("front", "keep")
OVERLONG = ("raise", "drop")
# Renders text that is already rendered, and marks what is trained of it (see LlavaDataCollator._as_segments).
SEGMENTS_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def load_image(source: Any) -> Image.Image:
    """Decode one picture, once, to 8-bit RGB as a person would see it.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float pictures are scaled to 8 bits, LAB and
    CMYK are converted, an animation gives its first frame. The image processors of transformers 5.23 do none of this:
    they turn 16-bit grey white, float black, and ignore the orientation.

    Args:
        source: A path, encoded bytes, a `datasets.Image(decode=False)` dict (`{"bytes", "path"}`) or a `PIL.Image`.

    Returns:
        A loaded RGB `PIL.Image`.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The picture is broken, too large for Pillow's decompression-bomb limit, of a value range that no
            rule covers, or a URL (nothing is fetched). The message names the path.
        TypeError: `source` is none of the accepted types.
    """
    data, name = source, "picture in memory"
    if isinstance(source, Mapping):
        data, name = source.get("bytes") or source.get("path"), source.get("path") or name
    if isinstance(data, str | Path):
        name = str(data)
        if re.match(r"[a-z][a-z0-9+.-]+://", name):
            raise ValueError(f"{name}: a URL; nothing is fetched while training. Download it and give the local path.")
    elif isinstance(data, bytes):
        data = io.BytesIO(data)
    elif not isinstance(data, Image.Image):
        raise TypeError(
            f"{name}: expected a path, bytes, a PIL image or a bytes/path dict, found {type(data).__name__}"
        )
    try:
        image = data if isinstance(data, Image.Image) else Image.open(data)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _scale_to_8_bits(np.asarray(image, dtype=np.float64))
        if image.mode == "LAB":
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture; check the path and --image_folder") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow may decode the same broken object to black at the second try, so it is never tried again.
        raise ValueError(f"{name}: the picture cannot be decoded ({error}). Repair or remove it.") from error


def _scale_to_8_bits(values: np.ndarray) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"values from {low:g} to {high:g}; known ranges are 0…1, 0…255 and 0…65535")
    factor = 255 if high <= 1 else 1 if high <= 255 else 1 / 257
    return Image.fromarray((values * factor).round().astype(np.uint8)).convert("RGB")


class LlavaDataCollator:
    """Turn rows into a padded batch whose labels hold the assistant's answers and their stop tokens, nothing else.

    A row is `{"messages": [{"role", "content"}], "images": [...]}`: roles are an optional `system`, then `user` and
    `assistant` in turn; `content` is a string or a list of `{"type": "text", "text"}` and `{"type": "image"}` parts
    (None-valued keys are ignored); `images` are sources for `load_image` in the order of the image parts. Every
    `<image>` in a string content is a placeholder; pictures of a row whose contents are strings without any
    placeholder go in front of its first user turn, as in TRL. Other columns are ignored; `id` names the row in errors.

    The batch holds `input_ids`, `attention_mask` and `labels`, int64 `(batch, seq)`, and every other key the processor
    returns (`pixel_values`, `image_sizes`, …), unchanged.

    Labels come from the template's `{% generation %}` blocks, mapped to tokens by
    `processor.apply_chat_template(..., return_assistant_tokens_mask=True)`; a template without them is rendered turn
    by turn, and each render must be a prefix of the next. Padding is masked by `attention_mask`, not by id, since the
    pad token may be EOS. Nothing is set on the processor, no row is changed, and a row's labels do not depend on the
    other rows of its batch.

    Args:
        processor: A Llava-family processor (image processor + tokenizer with `<image>`, fast tokenizer).
        train_on: `"assistant"`: every answer and its stop token. `"last_assistant"`: the last answer of each row only.
            `"all"`: all text; still no image token, padding or leading BOS.
        max_length: Most tokens a row may have, image tokens included. A longer row loses whole exchanges (a user turn
            and its answer, with their pictures) from its end; an image block or an answer is never cut. Each such row
            is logged. None: no limit.
        placement: `"front"`: the pictures of a turn stand before its text, which is joined and stripped (LLaVA-1.5's
            habit and what the released templates render); a turn whose several pictures stood between texts is
            logged. `"keep"`: pictures stay where they are in the text; a template that would move them is an error.
        overlong: A row whose first answer does not fit into `max_length` is an error (`"raise"`), or is left out of
            its batch and logged (`"drop"`).
        chat_template: Rendered instead of the processor's own template.
        stop_token_ids: Ids at which `generate` stops; defaults to the tokenizer's EOS. Every trained answer must end
            in one of them.
        padding_side: `"right"` or `"left"`.
        pad_to_multiple_of: Round the batch's length up to a multiple of this many tokens.

    Raises:
        ValueError: On construction, if an option is outside its set, the template does not end an answer in a stop
            token, or does not accept a picture. On a call, for a row that breaks the form above; the message names
            the row.

    Example (a picture is 4 tokens here, id 4; `USER: <image>\\nHi ASSISTANT: Yes</s>`):
        >>> batch = LlavaDataCollator(processor)([{
        ...     "messages": [{"role": "user", "content": "<image>\\nHi"}, {"role": "assistant", "content": "Yes"}],
        ...     "images": ["red.png"],
        ... }])
        >>> processor.decode(batch["labels"][0][batch["labels"][0] != -100])
        ' Yes</s>'
    """

    def __init__(
        self,
        processor,
        *,
        train_on: str = "assistant",
        max_length: int | None = None,
        placement: str = "front",
        overlong: str = "raise",
        chat_template: str | None = None,
        stop_token_ids: Iterable[int] | None = None,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ):
        for name, value, known in (
            ("train_on", train_on, TRAIN_ON),
            ("placement", placement, PLACEMENT),
            ("overlong", overlong, OVERLONG),
            ("padding_side", padding_side, ("left", "right")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: expected a positive number of tokens, or None for no limit")
        self.processor = processor
        self.train_on = train_on
        self.max_length = max_length
        self.placement = placement
        self.overlong = overlong
        self.chat_template = chat_template or processor.chat_template
        if isinstance(self.chat_template, dict):
            self.chat_template = self.chat_template["default"]
        if not self.chat_template:
            raise ValueError("the processor has no chat template: pass chat_template= (see collators/chat_templates/)")
        self.stop_token_ids = frozenset(stop_token_ids or [processor.tokenizer.eos_token_id])
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.shortened = self.dropped = self.moved = 0
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template) is not None
        self._check_template()

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `rows`; see the class for what a row and the batch hold."""
        if len(rows) > 1 and self.processor.tokenizer.pad_token is None:
            raise ValueError(
                "the tokenizer has no pad token: set processor.tokenizer.pad_token, to its EOS for example"
            )
        conversations = [self._read(row, index) for index, row in enumerate(rows)]
        batch, answers = self._encode(conversations)
        while self.max_length is not None and (batch["attention_mask"].sum(1) > self.max_length).any():
            conversations = self._shorten(conversations, batch["attention_mask"], answers)
            batch, answers = self._encode(conversations)
        batch["labels"] = self._label(batch, answers)
        return batch

    def _read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Check a row and bring it to list contents, decoded pictures and the asked placement."""
        name = f"row {row['id']!r}" if row.get("id") is not None else f"row {index} of the batch"
        if not isinstance(row.get("messages"), list) or not row["messages"]:
            found = ", ".join(row)
            raise ValueError(f"{name}: expected `messages`, a list with at least one turn; found the columns {found}")
        sources = row.get("images") or []
        roles = [message.get("role") for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        if (
            turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2)
            or "assistant" not in turns
        ):
            raise ValueError(
                f"{name}: roles are {', '.join(map(str, roles))}; expected an optional system turn, then user and "
                "assistant in turn, with at least one answer"
            )
        image_token = self.processor.image_token
        messages = [
            {"role": message["role"], "content": self._parts(message.get("content"), message["role"], name)}
            for message in row["messages"]
        ]
        strings = all(isinstance(message["content"], str) for message in row["messages"])
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        if sources and not count and strings:
            first = messages[roles.index("user")]
            first["content"] = [{"type": "image"}] * len(sources) + first["content"]
            count = len(sources)
        if count != len(sources):
            raise ValueError(
                f"{name}: {count} image placeholder(s) for {len(sources)} picture(s); expected one "
                f"{image_token} or image part for each entry of `images`"
            )
        if self.placement == "front":
            if any(_has_text_before_picture(m) and m["content"].count({"type": "image"}) > 1 for m in messages):
                self.moved += 1
                self._log(self.moved, f"{name}: pictures between texts were moved to the front of their turn")
            messages = [_pictures_first(message) for message in messages]
        elif self._moves_pictures and any(map(_has_text_before_picture, messages)):
            raise ValueError(
                f"{name}: the chat template renders the pictures of a turn before its text, but placement='keep' was "
                "asked for. Pass a template that renders the parts in order, or placement='front'."
            )
        try:
            images = [load_image(source) for source in sources]
        except (ValueError, FileNotFoundError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error
        return {"name": name, "messages": messages, "images": images}

    def _parts(self, content: Any, role: str, name: str) -> list[dict[str, str]]:
        image_token = self.processor.image_token
        if isinstance(content, str) and role == "user":
            # One newline that touches a placeholder belongs to it; the templates put it back.
            marker = re.escape(image_token)
            texts = re.split(rf"{marker}\n|\n{marker}(?!\n)|{marker}", content)
            parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
            return [part for part in parts if part["type"] == "image" or part["text"] or len(parts) == 1]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise ValueError(
                f"{name}: a {role} turn's content is {type(content).__name__}; expected a string or parts"
            )
        parts = []
        for part in content:
            if part.get("type") == "image" and role != "assistant":
                parts.append({"type": "image"})
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                if image_token in part["text"]:
                    raise ValueError(
                        f"{name}: {image_token} is typed inside a {role} text; expected an image part in a user turn. "
                        "Split the text there, or spell the word otherwise."
                    )
                parts.append({"type": "text", "text": part["text"]})
            else:
                found = {key: value for key, value in part.items() if value is not None}
                raise ValueError(
                    f"{name}: a {role} turn holds {found}; expected a text part or, for users, an image part"
                )
        return parts

    def _encode(self, conversations: list[dict[str, Any]]) -> tuple[dict[str, Any], list[list[tuple[int, int]]]]:
        """Tokenise; returns the batch and, per row, the `(start, end)` positions of each answer in `input_ids`."""
        for conversation in conversations:
            self._render(conversation, conversation["messages"])  # a template's complaint then names its row
        images = [conversation["images"] for conversation in conversations if conversation["images"]]
        batch = self.processor.apply_chat_template(
            [
                conversation["messages"] if self._marks_answers else self._as_segments(conversation)
                for conversation in conversations
            ],
            chat_template=self.chat_template if self._marks_answers else SEGMENTS_TEMPLATE,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # Lists first: the mask's arithmetic runs over single offsets, which is slow on tensors.
            return_tensors=None,
            processor_kwargs={
                "padding": len(conversations) > 1 or self.pad_to_multiple_of is not None,
                "padding_side": self.padding_side,
                "pad_to_multiple_of": self.pad_to_multiple_of,
                **({"images": images} if images else {}),
            },
        )
        masks = batch.pop("assistant_masks")
        answers = [_runs(mask) for mask in masks]
        for conversation, ids, spans in zip(conversations, batch["input_ids"], answers, strict=True):
            self._check_answers(conversation, ids, spans)
        return dict(batch.convert_to_tensors("pt")), answers

    def _render(self, conversation: dict[str, Any], messages: list[dict[str, Any]], **kwargs) -> str:
        try:
            return self.processor.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{conversation['name']}: the chat template cannot render it: {error}") from error

    def _as_segments(self, conversation: dict[str, Any]) -> list[dict[str, str]]:
        """Split a rendered conversation at its answers, for templates without `{% generation %}`.

        An answer is what the render up to and with it adds to the render up to it (generation prompt included); all
        renders must be prefixes of the whole, or the template is not understood.
        """
        messages = conversation["messages"]
        whole = self._render(conversation, messages)
        stops = self.processor.tokenizer.convert_ids_to_tokens(sorted(self.stop_token_ids))
        segments, done = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(conversation, messages[:index], add_generation_prompt=True)
            answered = self._render(conversation, messages[: index + 1])
            if not (whole.startswith(answered) and answered.startswith(prompt) and len(prompt) >= done):
                raise ValueError(
                    f"{conversation['name']}: the chat template has no generation block, and its render up to turn "
                    f"{index} is no prefix of the whole, so the answers cannot be found. Pass a training template "
                    "(chat_template=, in recipes --chat_template_path; see collators/chat_templates/)."
                )
            # A template may put a newline behind the stop token: it belongs to the next turn's header.
            body = answered.rstrip()
            end = len(body) if len(body) > len(prompt) and body.endswith(tuple(stops)) else len(answered)
            segments += [
                {"role": "prompt", "content": whole[done : len(prompt)]},
                {"role": "assistant", "content": whole[len(prompt) : end]},
            ]
            done = end
        return [*segments, {"role": "prompt", "content": whole[done:]}]

    def _check_answers(self, conversation: dict[str, Any], ids: list[int], spans: list[tuple[int, int]]) -> None:
        expected = sum(message["role"] == "assistant" for message in conversation["messages"])
        tokenizer = self.processor.tokenizer
        untrained = next((ids[end - 1] for _, end in spans if ids[end - 1] not in self.stop_token_ids), None)
        if len(spans) == expected and untrained is None:
            return
        if untrained is not None:
            stops = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(self.stop_token_ids))))
            found = f"trains an answer that ends in {tokenizer.decode([untrained])!r}, not in a stop token ({stops})"
        else:
            found = f"marks {len(spans)} answers where the row has {expected}"
        raise ValueError(
            f"{conversation['name']}: the chat template {found}; a model trained so never learns to stop. Pass a "
            "training template (chat_template=, in recipes --chat_template_path; see collators/chat_templates/), or "
            "stop_token_ids= if generate stops at another token."
        )

    def _shorten(self, conversations, attention_mask: torch.Tensor, answers) -> list[dict[str, Any]]:
        """Drop as many exchanges from the end of each overlong conversation as it takes."""
        kept = []
        for conversation, mask, spans in zip(conversations, attention_mask, answers, strict=True):
            length, first = int(mask.sum()), int(mask.argmax())
            if length <= self.max_length:
                kept.append(conversation)
                continue
            fitting = sum(end - first <= self.max_length for _, end in spans)
            if conversation["messages"][-1]["role"] == "assistant":
                fitting = min(fitting, len(spans) - 1)
            if fitting:
                self.shortened += 1
                self._log(
                    self.shortened,
                    f"{conversation['name']}: {length} tokens for max_length={self.max_length}; kept the first "
                    f"{fitting} of {len(spans)} exchanges",
                )
                kept.append(_first_exchanges(conversation, fitting))
                continue
            found = (
                f"{conversation['name']}: {length} tokens, and not one answer fits into max_length={self.max_length}"
            )
            if self.overlong == "raise":
                raise ValueError(
                    f"{found}. Raise --max_length, shorten the row, or pass overlong='drop' to leave it out."
                )
            self.dropped += 1
            self._log(self.dropped, f"{found}; left out of its batch")
        if not kept:
            raise ValueError(
                f"no row of this batch fits into max_length={self.max_length}: raise it, or remove such rows"
            )
        return kept

    def _label(self, batch: dict[str, Any], answers: list[list[tuple[int, int]]]) -> torch.Tensor:
        ids = batch["input_ids"]
        labels = torch.full_like(ids, IGNORE_INDEX)
        if self.train_on == "all":
            trained = batch["attention_mask"].bool()
            trained &= ~torch.isin(ids, torch.tensor([i for i in self.processor.image_token_ids if i is not None]))
            first = batch["attention_mask"].argmax(1)
            is_bos = ids.gather(1, first[:, None])[:, 0] == (self.processor.tokenizer.bos_token_id or -1)
            trained[is_bos.nonzero()[:, 0], first[is_bos]] = False
            return torch.where(trained, ids, labels)
        for row, spans in enumerate(answers):
            for start, end in spans if self.train_on == "assistant" else spans[-1:]:
                labels[row, start:end] = ids[row, start:end]
        return labels

    def _check_template(self) -> None:
        """Push one made-up exchange with a picture through the template, and see whether it would move a picture."""
        parts = [{"type": "text", "text": "before"}, {"type": "image"}, {"type": "text", "text": "behind"}]
        made_up = {"name": "a made-up row"}
        rendered = self._render(made_up, [{"role": "user", "content": parts}], add_generation_prompt=True)
        self._moves_pictures = rendered.find(self.processor.image_token) < rendered.find("before")
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        ]
        self._encode([{**made_up, "messages": messages, "images": [Image.new("RGB", (64, 48))]}])

    @staticmethod
    def _log(count: int, message: str) -> None:
        """Each of the first five, then every power of ten, so that a long run's log stays readable."""
        if count <= 5 or str(count).strip("0") == "1":
            logger.warning("%s (no. %d of this kind in this process)", message, count)


def _pictures_first(message: dict[str, Any]) -> dict[str, Any]:
    pictures = [part for part in message["content"] if part["type"] == "image"]
    if not pictures:
        return message
    text = "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
    return {**message, "content": pictures + ([{"type": "text", "text": text}] if text else [])}


def _has_text_before_picture(message: dict[str, Any]) -> bool:
    kinds = [part["type"] for part in message["content"]]
    return "image" in kinds and "text" in kinds[: len(kinds) - kinds[::-1].index("image")]


def _first_exchanges(conversation: dict[str, Any], count: int) -> dict[str, Any]:
    ends = [i for i, message in enumerate(conversation["messages"]) if message["role"] == "assistant"]
    messages = conversation["messages"][: ends[count - 1] + 1]
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    return {**conversation, "messages": messages, "images": conversation["images"][:pictures]}


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """`(start, end)` of each run of ones."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
