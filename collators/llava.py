"""`LlavaDataCollator`: rows with messages and pictures → a training batch in which what trains is what was meant.

This file imports libraries only, so that it can be pasted into a notebook cell whole.
"""

import io
import json
import logging
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
TRAIN_ON = ("assistant", "last_assistant", "all")
PLACEMENT = ("front", "keep")
OVERLONG = ("raise", "drop")
ON_BAD_ROW = ("raise", "skip")
BAD_ROW = (ValueError, FileNotFoundError, TypeError)  # what a row or picture that cannot be used raises
TEMPLATE_FLAGS = "(chat_template=, in recipes --chat_template_path; see collators/chat_templates/)"
# A question whose picture stands between its words, which occur in no template: it shows where a template puts it.
AHEAD, BEHIND = "words-ahead-of-it", "words-behind-it"
INTERLEAVED = [
    {
        "role": "user",
        "content": [{"type": "text", "text": AHEAD}, {"type": "image"}, {"type": "text", "text": BEHIND}],
    }
]
# Renders text that is already rendered, and marks what is trained of it (see LlavaDataCollator._as_segments).
SEGMENTS_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


# What cameras, scanners and the web write. Pillow knows more, but rows may come from strangers: EPS runs Ghostscript.
Image.init()
FORMATS = [
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN  # AVIF depends on how Pillow was built
]
# Pillow 13 answers damaged bytes with each of these: AVIF with RuntimeError, EXIF with struct.error and TypeError.
UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, EOFError),
    *(struct.error, Image.DecompressionBombError),
)
UPRIGHT = {  # by EXIF orientation, as in `PIL.ImageOps.exif_transpose`
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: Any, fetch: Callable[[str], bytes] | None = None) -> Image.Image:
    """Decode one picture, once, to 8-bit RGB as a person would see it.

    EXIF orientation is applied, transparency is laid on white, 16-bit pictures are scaled to 8 bits, 32-bit integers
    and floats from the smallest of 0…1, 0…255 and 0…65535 that holds their values; LAB and CMYK are converted, an
    animation gives its first frame. The image processors of transformers 5.23 do none of this:
    they turn 16-bit grey white, float black, and ignore the orientation. A picture whose EXIF block cannot be read is
    taken as upright, with a warning: its pixels are whole.

    Args:
        source: A path, encoded bytes, a `datasets.Image(decode=False)` dict (`{"bytes", "path"}`) or a `PIL.Image`.
        fetch: Gets a picture's bytes by its URL (`collators.fetch_image`). None: a URL is an error.

    Returns:
        A loaded RGB `PIL.Image`.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The picture is broken, of a format outside `FORMATS`, larger than twice `Image.MAX_IMAGE_PIXELS`
            (Pillow's limit for decompression bombs), of a value range that no rule covers, or a URL that may not or
            cannot be fetched. The message names the path. A `PIL.Image` that could not be decoded is closed, since
            Pillow may decode the same object to black at the second try.
        TypeError: `source` is none of the accepted types.
        OSError: The machine cannot read the file (permissions, too many open files, a disk error): no fault of a row.
    """
    data, name = source, "picture in memory"
    if isinstance(source, Mapping):
        data, name = source.get("bytes") or source.get("path"), source.get("path") or name
        if source.get("bytes") and not isinstance(data, bytes):  # a string there would be opened as a path
            raise TypeError(f"{name}: expected bytes in 'bytes', found {type(data).__name__}")
    if isinstance(data, str | Path):
        name = str(data)
        if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
            if fetch is None:
                raise ValueError(
                    f"{name}: a URL; nothing is fetched while training. Download it and give the local path, or pass "
                    "--allow_remote_images."
                )
            data = io.BytesIO(fetch(name))
    elif isinstance(data, bytes):
        data = io.BytesIO(data)
    elif not isinstance(data, Image.Image):
        raise TypeError(
            f"{name}: expected a path, bytes, a PIL image or a bytes/path dict, found {type(data).__name__}"
        )
    try:
        if isinstance(data, str | Path):
            data = _read_whole(name)
        image = data if isinstance(data, Image.Image) else Image.open(data, formats=FORMATS)
        image.load()
        image = _turn_upright(image, name)
        if image.mode.startswith("I;16"):
            return _grey(np.asarray(image) / 257)
        if image.mode in ("I", "F"):
            return _grey(_scale_to_8_bits(np.asarray(image, dtype=np.float64)))
        if image.mode == "LAB":
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture; check the path and --image_folder") from None
    except UNDECODABLE as error:
        # Pillow's own have no number, except of an open image, which asks its file for what a damaged header says.
        if isinstance(error, OSError) and error.errno is not None and not isinstance(data, Image.Image):
            raise OSError(error.errno, f"{error.strerror}: the picture cannot be read", name) from error
        if isinstance(data, Image.Image):
            data.close()
        raise ValueError(f"{name}: the picture cannot be decoded ({error}). Repair or remove it.") from error


def _read_whole(path: str) -> io.BytesIO:
    """Read a file before Pillow does, which would ask it for as many bytes as a damaged header says, and from where.

    That is a MemoryError, or an OSError that looks like one of the disk.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a device may have no end
        raise ValueError("not a file")
    with open(path, "rb") as file:
        return io.BytesIO(file.read())


def _turn_upright(image: Image.Image, name: str) -> Image.Image:
    """As `ImageOps.exif_transpose`, which also writes the EXIF block anew, and fails on what it cannot write."""
    method = None
    try:
        method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except UNDECODABLE as error:
        warnings.warn(f"{name}: its EXIF block cannot be read ({error}), so it is taken as upright", stacklevel=3)
    # A copy has a palette where its mode needs one; what a file was opened as may have none.
    return image.copy() if method is None else image.transpose(method)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")


def _scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """32-bit integers and floats do not say what white is: the smallest usual range that holds them all is taken."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"values from {low:g} to {high:g}; known ranges are 0…1, 0…255 and 0…65535")
    return values * (255 if high <= 1 else 1 if high <= 255 else 1 / 257)


class LlavaDataCollator:
    """Turn rows into a padded batch whose labels hold the assistant's answers and their stop tokens, nothing else.

    A row is `{"messages": [{"role", "content"}], "images": [...]}`: roles are an optional `system`, then `user` and
    `assistant` in turn; `content` is a string or a list of `{"type": "text", "text"}` and `{"type": "image"}` parts
    (None-valued keys are ignored); `images` are sources for `load_image` in the order of the image parts (or `image`
    is the only one). Every image token (`<image>`) in a string content is a placeholder; pictures of a row whose
    contents are strings without any placeholder go in front of its first user turn, as in TRL. Other columns, and
    other keys of a turn, are ignored; `id` and `_row` (a number in the data) name the row in errors.

    The batch holds `input_ids`, `attention_mask` and `labels`, int64 `(batch, seq)`, and every other key the processor
    returns (`pixel_values`, `image_sizes`, …), unchanged.

    Labels come from the template's `{% generation %}` blocks, mapped to tokens by
    `processor.apply_chat_template(..., return_assistant_tokens_mask=True)`; a template without them is rendered turn
    by turn, and each render must be a prefix of the next. The ids up to an answer are those of the inference prompt
    (`add_generation_prompt=True`), which is checked once, on a made-up row. Padding is masked by `attention_mask`, not
    by id, since the pad token may be EOS. Nothing is set on the processor, no row is changed, and a row's labels do
    not depend on the other rows of its batch.

    Args:
        processor: A Llava-family processor (image processor + tokenizer with `<image>`, fast tokenizer).
        train_on: `"assistant"`: every answer and its stop token. `"last_assistant"`: the last answer of each row only.
            `"all"`: all text; still no image token, padding or BOS.
        max_length: Most tokens a row may have, image tokens included. A longer row loses whole exchanges (a user turn
            and its answer, with their pictures) from its end; an image block or an answer is never cut. None: no
            limit.
        max_images: Most pictures a row may have; a row with more loses whole exchanges in the same way, before any
            picture is opened. None: no limit.
        placement: `"front"`: the pictures of a turn stand before its text (LLaVA-1.5's habit and what the released
            templates render). `"keep"`: pictures stay where they are in the text; a template that would move them is
            an error.
        overlong: A row whose first exchange exceeds `max_length` or `max_images` is an error (`"raise"`), or is left
            out of its batch (`"drop"`); a batch of such rows alone becomes one made-up row of which nothing trains.
        chat_template: Rendered instead of the processor's own template.
        stop_token_ids: Ids at which `generate` stops; defaults to the tokenizer's EOS. Every trained answer must end
            in one of them.
        on_bad_row: A row that breaks the form above, has a picture that cannot be decoded, or is too long for
            `overlong="raise"`, is an error (`"raise"`), or is skipped (`"skip"`): its place in the batch goes to a
            made-up row of which nothing trains, so that every batch of every process keeps its size, and it is named
            in `skipped_rows`.
        skipped_rows: File that gets a JSON line for each row skipped: `row`, `id`, `reason`.
        fetch_image: As `fetch` of `load_image`.
        padding_side: `"right"` or `"left"`.
        pad_to_multiple_of: Round the batch's length up to a multiple of this many tokens.

    Attributes:
        shortened, dropped, skipped, moved, merged: Rows that lost exchanges, overlong rows left out, bad rows left
            out, rows with several pictures that were taken from between texts, and answers whose leading newline
            became one token with the header's, so far in this process. The first of each kind are named in the log.
        marks_answers: Whether the template has `{% generation %}` blocks.

    Raises:
        ValueError: On construction, if an option is outside its set, or the template does not end an answer in a stop
            token, does not accept a picture, or renders another prompt at inference than in training. On a call, for a
            row that breaks the form above; the message names the row.

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
        max_images: int | None = None,
        placement: str = "front",
        overlong: str = "raise",
        on_bad_row: str = "raise",
        skipped_rows: str | Path | None = None,
        fetch_image: Callable[[str], bytes] | None = None,
        chat_template: str | None = None,
        stop_token_ids: Iterable[int] | None = None,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ):
        for name, value, known in (
            ("train_on", train_on, TRAIN_ON),
            ("placement", placement, PLACEMENT),
            ("overlong", overlong, OVERLONG),
            ("on_bad_row", on_bad_row, ON_BAD_ROW),
            ("padding_side", padding_side, ("left", "right")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")
        for name, value, unit in (("max_length", max_length, "tokens"), ("max_images", max_images, "pictures")):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected a positive number of {unit}, or None for no limit")
        tokenizer = processor.tokenizer
        if stop_token_ids is None and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: pass stop_token_ids=, the ids at which generate stops")
        stop_token_ids = tokenizer.eos_token_id if stop_token_ids is None else stop_token_ids
        self.processor = processor
        self.train_on = train_on
        self.max_length = max_length
        self.max_images = max_images
        self.placement = placement
        self.overlong = overlong
        self.on_bad_row = on_bad_row
        self.skipped_rows = skipped_rows
        self.fetch_image = fetch_image
        self.chat_template = chat_template or processor.chat_template
        if not isinstance(self.chat_template, str):
            found = "several chat templates" if self.chat_template else "no chat template"
            raise ValueError(f"the processor has {found}: pass chat_template= (see collators/chat_templates/)")
        self.stop_token_ids = frozenset([stop_token_ids] if isinstance(stop_token_ids, int) else stop_token_ids)
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.shortened = self.dropped = self.skipped = self.moved = self.merged = 0
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template) is not None
        self._check_template()

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `rows`; see the class for what a row and the batch hold."""
        pads = len(rows) > 1 or self.pad_to_multiple_of is not None
        if pads and self.processor.tokenizer.pad_token is None:
            raise ValueError(
                "the tokenizer has no pad token: set processor.tokenizer.pad_token, to its EOS for example"
            )
        conversations = [kept for index, row in enumerate(rows) for kept in self._read(row, index)] or [self._idle]
        batch, answers = self._encode_usable(conversations, pads)
        while self.max_length is not None and (batch["attention_mask"].sum(1) > self.max_length).any():
            conversations = self._shorten(conversations, batch["attention_mask"], answers)
            batch, answers = self._encode_usable(conversations, pads)
        batch["labels"] = self._label(batch, answers)
        for place, conversation in enumerate(conversations):
            if conversation is self._idle:
                batch["labels"][place] = IGNORE_INDEX
        return batch

    def _read(self, row: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
        """Check a row and bring it to list contents, decoded pictures and the asked placement; empty if it drops."""
        try:
            return self._read_usable(row, index)
        except BAD_ROW as error:
            return [self._skip(row, error)]

    def _read_usable(self, row: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
        conversation = read_row(row, self.processor.image_token, placement=self.placement, index=index)
        conversation["row"], name = row, conversation["name"]
        if self._moves_pictures and any(map(_has_text_before_picture, conversation["messages"])):
            raise ValueError(
                f"{name}: the chat template renders the pictures of a turn before its text, but placement='keep' was "
                "asked for. Pass a template that renders the parts in order (collators/chat_templates/*_keep.jinja), "
                "or placement='front'."
            )
        pictures = len(conversation["images"])
        if self.max_images is not None and pictures > self.max_images:
            fitting = _exchanges_within(conversation, self.max_images)
            kept = self._cut(conversation, fitting, f"{pictures} pictures", f"max_images={self.max_images}")
            if kept is None or kept is self._idle:
                return [kept] if kept else []
            conversation = kept
        if conversation.pop("moved"):
            self.moved += 1
            self._log(self.moved, f"{name}: pictures between texts were moved to the front of their turn")
        try:
            conversation["images"] = [load_image(source, self.fetch_image) for source in conversation["images"]]
        except BAD_ROW as error:
            raise type(error)(f"{name}: {error}") from error
        return [conversation]

    def _skip(self, row: Any, error: Exception) -> dict[str, Any]:
        """Name a bad row and return the made-up one that takes its place; raise `error` if bad rows are errors."""
        if self.on_bad_row == "raise":
            raise error
        self.skipped += 1
        self._log(self.skipped, f"{error}; skipped")
        if self.skipped_rows is not None:
            known = row if isinstance(row, Mapping) else {}
            record = {"row": known.get("_row"), "id": known.get("id"), "reason": str(error)}
            append_line(self.skipped_rows, record)
        return self._idle

    def _encode_usable(self, conversations: list[dict[str, Any]], pads: bool) -> tuple[dict[str, Any], list]:
        """As `_encode`; where that fails each row is encoded alone, and those that fail are bad rows."""
        try:
            return self._encode(conversations, pads)
        except BAD_ROW:
            if self.on_bad_row == "raise":
                raise
        for place, conversation in enumerate(conversations):
            try:
                self._encode([conversation], pads=False)
            except BAD_ROW as error:
                if conversation is self._idle:
                    raise
                conversations[place] = self._skip(conversation["row"], error)
        return self._encode(conversations, pads)

    def _encode(self, conversations: list[dict[str, Any]], pads: bool) -> tuple[dict[str, Any], list]:
        """Tokenise; returns the batch and, per row, the `(start, end)` positions of each answer in `input_ids`."""
        bos = self.processor.tokenizer.bos_token
        for conversation in conversations:
            rendered = self._render(conversation, conversation["messages"])  # a template's complaint names its row
            if bos and rendered.startswith(bos) and not self._writes_bos:
                raise ValueError(f"{conversation['name']}: its first text begins with {bos}, so BOS would be left out")
        images = [conversation["images"] for conversation in conversations if conversation["images"]]
        batch = self.processor.apply_chat_template(
            [
                conversation["messages"] if self.marks_answers else self._as_segments(conversation)
                for conversation in conversations
            ],
            chat_template=self.chat_template if self.marks_answers else SEGMENTS_TEMPLATE,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # Lists first: the mask's arithmetic runs over single offsets, which is slow on tensors.
            return_tensors=None,
            processor_kwargs={
                "padding": pads,
                "padding_side": self.padding_side,
                "pad_to_multiple_of": self.pad_to_multiple_of if pads else None,
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
                    f"{TEMPLATE_FLAGS}."
                )
            # A template may put a newline behind the stop token: it belongs to the next turn's header.
            body = answered.rstrip()
            end = len(body) if len(body) > len(prompt) and body.endswith(tuple(stops)) else len(answered)
            segments += [
                {"role": "prompt", "content": whole[done : len(prompt)]},
                {"role": "assistant", "content": whole[len(prompt) : end]},
            ]
            done = end
        # Behind the last answer there may be a newline, which no token follows, or a question without an answer.
        dangling = [{"role": "prompt", "content": whole[done:]}] if messages[-1]["role"] == "user" else []
        return [segment for segment in segments + dangling if segment["content"]]

    def _check_answers(self, conversation: dict[str, Any], ids: list[int], spans: list[tuple[int, int]]) -> None:
        expected = sum(message["role"] == "assistant" for message in conversation["messages"])
        tokenizer = self.processor.tokenizer
        untrained = next((ids[end - 1] for _, end in spans if ids[end - 1] not in self.stop_token_ids), None)
        if len(spans) == expected and untrained is None:
            answers = [message["content"] for message in conversation["messages"] if message["role"] == "assistant"]
            for parts, (start, end) in zip(answers, spans, strict=True):
                if parts and _newlines_ahead(tokenizer.decode(ids[start:end])) > _newlines_ahead(parts[0]["text"]) > 0:
                    self.merged += 1
                    self._log(
                        self.merged,
                        f"{conversation['name']}: an answer begins with a newline, which the tokenizer merges with "
                        "the header's own: the model trains on another prompt than it gets at inference",
                    )
            return
        if len(spans) == expected:
            stops = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(self.stop_token_ids))))
            last = tokenizer.decode([untrained])
            found = f"trains an answer that ends in {last!r}, not in a stop token ({stops}): it never learns to stop"
        else:
            found = f"marks {len(spans)} answers where the row has {expected}"
        raise ValueError(
            f"{conversation['name']}: the chat template {found}. Pass a training template {TEMPLATE_FLAGS}, or "
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
            if conversation is self._idle:
                raise ValueError(f"max_length={self.max_length}: not even a made-up exchange of {length} tokens fits")
            fitting = sum(end - first <= self.max_length for _, end in spans)
            if conversation["messages"][-1]["role"] == "assistant":
                fitting = min(fitting, len(spans) - 1)
            if cut := self._cut(conversation, fitting, f"{length} tokens", f"max_length={self.max_length}"):
                kept.append(cut)
        return kept or [self._idle]

    def _cut(self, conversation: dict[str, Any], fitting: int, found: str, limit: str) -> dict[str, Any] | None:
        """Keep the first `fitting` exchanges; without one, None where `overlong` drops the row, else as `_skip`."""
        count = sum(message["role"] == "assistant" for message in conversation["messages"])
        found = f"{conversation['name']}: {found} for {limit}"
        if fitting:
            self.shortened += not conversation.get("cut")
            self._log(self.shortened, f"{found}; kept the first {fitting} of {count} exchanges")
            return _first_exchanges(conversation, fitting) | {"cut": True}
        found = f"{found}, and not even the first exchange fits"
        self.shortened -= conversation.get("cut", False)
        if self.overlong == "raise":
            flag = limit.partition("=")[0]
            advice = f"Raise --{flag}, shorten the row, or pass overlong='drop' to leave it out."
            return self._skip(conversation["row"], ValueError(f"{found}. {advice}"))
        self.dropped += 1
        self._log(self.dropped, f"{found}; left out of its batch")
        return None

    def _label(self, batch: dict[str, Any], answers: list[list[tuple[int, int]]]) -> torch.Tensor:
        ids = batch["input_ids"]
        labels = torch.full_like(ids, IGNORE_INDEX)
        if self.train_on == "all":
            trained = batch["attention_mask"].bool()
            trained &= ~torch.isin(ids, torch.tensor([i for i in self.processor.image_token_ids if i is not None]))
            bos = self.processor.tokenizer.bos_token_id
            if bos in self.stop_token_ids:  # then only the first one of a row is no stop token
                first = batch["attention_mask"].argmax(1, keepdim=True)
                trained.scatter_(1, first, trained.gather(1, first) & (ids.gather(1, first) != bos))
            elif bos is not None:
                trained &= ids != bos
            return torch.where(trained, ids, labels)
        for row, spans in enumerate(answers):
            for start, end in spans if self.train_on == "assistant" else spans[-1:]:
                labels[row, start:end] = ids[row, start:end]
        return labels

    def _check_template(self) -> None:
        """Push one made-up exchange with a picture through the template, as training and as inference do."""
        made_up = {"name": "a made-up row", "images": [Image.new("RGB", (64, 48))]}
        rendered = self._render(made_up, INTERLEAVED, add_generation_prompt=True)
        self._moves_pictures = rendered_placement(self.processor, self.chat_template) == "front"
        bos = self.processor.tokenizer.bos_token
        self._writes_bos = bos is not None and rendered.startswith(bos)

        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
        self._idle = {**made_up, "messages": [question, answer]}
        batch, [[(start, _)]] = self._encode([self._idle], pads=False)
        prompt = self.processor.apply_chat_template(
            [[question]],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images": [made_up["images"]]},
        )["input_ids"][0]
        if prompt != batch["input_ids"][0, :start].tolist():
            decode = self.processor.tokenizer.decode
            raise ValueError(
                f"the chat template and tokenizer feed {decode(prompt)[-40:]!r} up to an answer at inference, but "
                f"{decode(batch['input_ids'][0, :start])[-40:]!r} in training. Pass a training template "
                f"{TEMPLATE_FLAGS}; a tokenizer must not add EOS by itself."
            )

    @staticmethod
    def _log(count: int, message: str) -> None:
        """Each of the first five, then every power of ten, so that a long run's log stays readable."""
        if count <= 5 or str(count).strip("0") == "1":
            logger.warning("%s (no. %d of this kind in this process)", message, count)


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append a JSON line to a file that other processes append to as well; the file and its folder are made."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")  # at once: no other comes between


def rendered_placement(processor, chat_template: str | None = None) -> str | None:
    """Say where a chat template renders a picture that stands between a turn's words.

    Args:
        processor: A Llava-family processor.
        chat_template: Rendered instead of the processor's own.

    Returns:
        `"keep"`: there; `"front"`: elsewhere, as the released templates do; None: the words are not rendered at all,
        as by stage 1's template of captions.
    """
    rendered = processor.apply_chat_template(INTERLEAVED, chat_template=chat_template, add_generation_prompt=True)
    places = [rendered.find(text) for text in (AHEAD, processor.image_token, BEHIND)]
    if places[0] < 0 and places[2] < 0:
        return None
    return "keep" if places == sorted(places) else "front"


def read_row(row: Mapping[str, Any], image_token: str, *, placement: str = "front", index: int = 0) -> dict[str, Any]:
    """Check a row's form and bring it to list contents, without opening a picture.

    Training and evaluation both read through here, so that they render the same prompts.

    Args:
        row: As `LlavaDataCollator` takes it.
        image_token: The processor's, `<image>`.
        placement: `"front"` puts the pictures of a turn before its text and takes one newline that touches an image
            token of a string content away with it; `"keep"` leaves pictures and text as they are.
        index: Names a row without `id` and `_row` in errors.

    Returns:
        `name` of the row, `messages` with list contents, `images` as they were given, and `moved`: whether one of
        several pictures of a turn was taken from behind a text.

    Raises:
        ValueError: The row is not of that form; the message names it.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row {index} of the batch is {type(row).__name__}; expected a mapping with `messages`")
    identity, number = row.get("id"), row.get("_row")
    if number is not None:
        name = f"row {number}" if identity is None else f"row {number} (id {identity!r})"
    else:
        name = f"row {index} of the batch" if identity is None else f"row {identity!r}"
    turns, sources = row.get("messages"), row.get("images")
    if not (isinstance(turns, list | tuple) and turns and all(isinstance(turn, Mapping) for turn in turns)):
        raise ValueError(
            f"{name}: expected `messages`, a list of turns with role and content; found the columns "
            f"{', '.join(row)} and messages of type {type(turns).__name__}"
        )
    if sources is None:
        sources = [] if row.get("image") is None else [row["image"]]
    if not isinstance(sources, list | tuple):
        raise ValueError(f"{name}: `images` is {type(sources).__name__}; expected a list of pictures")
    roles = [turn.get("role") for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if talk != ["user", "assistant"] * (len(talk) // 2) + ["user"] * (len(talk) % 2) or "assistant" not in talk:
        raise ValueError(
            f"{name}: roles are {', '.join(map(str, roles))}; expected an optional system turn, then user and "
            "assistant in turn, with at least one answer"
        )
    messages = [
        {"role": turn["role"], "content": _read_parts(turn.get("content"), turn["role"], name, image_token, placement)}
        for turn in turns
    ]
    strings = all(isinstance(turn["content"], str) for turn in turns)
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    if sources and not count and strings:
        first = messages[roles.index("user")]
        texts = [part for part in first["content"] if part["text"]]
        first["content"] = [{"type": "image"}] * len(sources) + texts
        count = len(sources)
    if count != len(sources):
        raise ValueError(
            f"{name}: {count} image placeholder(s) for {len(sources)} picture(s); expected one "
            f"{image_token} or image part for each entry of `images`"
        )
    moved = placement == "front" and any(
        _has_text_before_picture(message) and message["content"].count({"type": "image"}) > 1 for message in messages
    )
    if placement == "front":
        messages = [_pictures_first(message) for message in messages]
    return {"name": name, "messages": messages, "images": list(sources), "moved": moved}


def _read_parts(content: Any, role: str, name: str, image_token: str, placement: str) -> list[dict[str, str]]:
    if isinstance(content, str) and role == "user":
        marker = re.escape(image_token)
        if placement == "front":
            # One newline that touches a placeholder belongs to it; the templates put it back.
            marker = rf"{marker}\n|\n{marker}(?!\n)|{marker}"
        texts = re.split(marker, content)
        parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
        return [part for part in parts if part["type"] == "image" or part["text"] or len(parts) == 1]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not (isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content)):
        raise ValueError(f"{name}: a {role} turn's content is {type(content).__name__}; expected a string or parts")
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
            raise ValueError(f"{name}: a {role} turn holds {found}; expected a text part or, for users, an image part")
    return parts


def _pictures_first(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": sorted(message["content"], key=lambda part: part["type"] != "image")}


def _newlines_ahead(text: str) -> int:
    return text[: len(text) - len(text.lstrip())].count("\n")


def _has_text_before_picture(message: dict[str, Any]) -> bool:
    kinds = [part["type"] for part in message["content"]]
    return "image" in kinds and "text" in kinds[: len(kinds) - kinds[::-1].index("image")]


def _first_exchanges(conversation: dict[str, Any], count: int) -> dict[str, Any]:
    ends = [i for i, message in enumerate(conversation["messages"]) if message["role"] == "assistant"]
    messages = conversation["messages"][: ends[count - 1] + 1]
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    return {**conversation, "messages": messages, "images": conversation["images"][:pictures]}


def _exchanges_within(conversation: dict[str, Any], max_images: int) -> int:
    """How many whole exchanges from the start have at most `max_images` pictures."""
    pictures = fitting = 0
    for message in conversation["messages"]:
        pictures += sum(part["type"] == "image" for part in message["content"])
        fitting += message["role"] == "assistant" and pictures <= max_images
    return fitting


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """`(start, end)` of each run of ones."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
