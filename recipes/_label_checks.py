"""Checks of what rows train, through the very collator that trains, against the prompts that inference makes.

A file of its own beside `_doctor.py`, which reads whole files: this decodes pictures and so looks at a sample.
"""

import base64
import io
import os

import torch
from PIL import Image

from _findings import UNUSABLE, Findings, Place
from _lengths import LengthCounter
from _row_checks import refuse_picture
from _start_report import token_spans
from collators import IGNORE_INDEX, LlavaDataCollator, load_image, read_row
from collators.llava import BAD_ROW, _runs

ROWS_SHOWN = 24  # on the page
THUMBNAIL = 320  # pixels, the longer side


class LabelChecks:
    """Puts rows through a collator and looks at what came out.

    Args:
        findings: where what is found goes.
        collator: the run's own.
        strict: the same with `train_on="assistant"`, by which turns are told apart; may be `collator` itself.
        counter: whose lengths are held against the collator's.
        show: fill `shown` and `exact`, which costs time that the pre-flight need not spend.

    Attributes:
        refused: numbers of the rows that the collator refused.
        shown: what the page shows of some rows.
        exact: whether every row was as long as `counter` had said.
        pictures: the most pictures (tiles where the processor makes some) of a row.
    """

    def __init__(
        self,
        findings: Findings,
        collator: LlavaDataCollator,
        strict: LlavaDataCollator,
        counter: LengthCounter,
        *,
        show: bool = True,
    ):
        self.findings, self.collator, self.strict, self.counter = findings, collator, strict, counter
        self.processor, self.show = collator.processor, show
        self.refused: set[int] = set()
        self.shown: list[dict] = []
        self.exact = True
        self.pictures = 0

    def __call__(self, sample: list[tuple[Place, dict]]) -> dict | None:
        """Check rows one by one.

        Returns:
            The report's `labels`; None if no row could be used.
        """
        strict = self.strict
        stops = strict.stop_token_ids
        tokenizer = self.processor.tokenizer
        totals = dict.fromkeys(("tokens", "trained", "prompt", "image"), 0)
        counts = dict.fromkeys(
            ("rows", "turns", "turns_with_stop", "rows_with_bos", "rows_without_trained", "rows_equal_to_inference"), 0
        )
        flagged = [place.row for place, _ in sample if self.findings.rows.get((place.file, place.row))]
        plain = [place.row for place, _ in sample if place.row not in flagged]
        shown = {*flagged[: ROWS_SHOWN // 2], *plain[:: max(1, len(plain) // ROWS_SHOWN + 1)]}
        for place, row in sample:
            if self.findings.rows.get((place.file, place.row), set()) & UNUSABLE:
                continue
            images = self._load(place, row["images"])
            if images is None:
                continue
            names, row = [_name(source) for source in row["images"]], {**row, "images": images}
            try:
                dropped = strict.dropped
                batch = strict([row])
                if strict.dropped > dropped:
                    continue  # counted with the lengths
                trained = batch if strict is self.collator else self.collator([row])
            except BAD_ROW as error:
                self.refused.add(place.row)
                found = str(error).partition(": ")[2] or str(error)
                self.findings.add(
                    "error", "unusable-row", place, found, "a row that the collator takes", "Correct the row"
                )
                continue
            ids, labels = batch["input_ids"][0], batch["labels"][0]
            runs = _runs((labels != IGNORE_INDEX).tolist())
            counts["rows"] += 1
            counts["turns"] += len(runs)
            counts["turns_with_stop"] += sum(int(ids[end - 1]) in stops for _, end in runs)
            counts["rows_with_bos"] += int(ids[0]) == tokenizer.bos_token_id
            differs = self._differs_from_inference(place, row, ids, runs)
            counts["rows_equal_to_inference"] += not differs
            kept = trained["labels"][0] != IGNORE_INDEX
            image = trained["input_ids"][0] == self.processor.image_token_id
            totals["tokens"] += len(kept)
            totals["trained"] += int(kept.sum())
            totals["image"] += int((image & ~kept).sum())
            if not kept.any():
                counts["rows_without_trained"] += 1
                self.findings.add(
                    "error",
                    "nothing-trained",
                    place,
                    "no token that carries loss",
                    "rows with at least one trained token",
                    "Look at the row, --train_on and --max_length",
                )
            if self.show:
                self.exact = self.exact and self._is_counted_right(row, ids)
            if "pixel_values" in batch:
                self.pictures = max(self.pictures, batch["pixel_values"].shape[:-3].numel())
            if self.show and place.row in shown:
                self.shown.append(self._show(place, names, images, trained))
        totals["prompt"] = totals["tokens"] - totals["trained"] - totals["image"]
        if not totals["tokens"]:
            return None
        shares = {kind: totals[kind] / totals["tokens"] for kind in ("trained", "prompt", "image")}
        return {
            **counts,
            "tokens": totals["tokens"],
            **shares,
            "pad": 0.0,
            "stop_tokens": tokenizer.convert_ids_to_tokens(sorted(stops)),
            "bos_token": tokenizer.bos_token,
        }

    def _load(self, place: Place, sources: list) -> list[Image.Image] | None:
        images = []
        for source in sources:
            try:
                images.append(load_image(source, self.strict.fetch_image))
            except BAD_ROW as error:
                self.refused.add(place.row)
                return refuse_picture(self.findings, place, source, str(error.__cause__ or error))
        return images

    def _differs_from_inference(self, place: Place, row: dict, ids: torch.Tensor, runs: list[tuple[int, int]]) -> bool:
        """Hold the ids up to each answer against the prompt that inference makes of the same turns.

        A run of image tokens counts as one: how long it is depends on the pictures alone, which need not be prepared.
        """
        conversation = read_row(row, self.processor.image_token, placement=self.strict.placement)
        ends = [turn for turn, message in enumerate(conversation["messages"]) if message["role"] == "assistant"]
        ids = ids.tolist()
        for turn, (start, _) in zip(ends, runs, strict=False):
            prompt = self.processor.apply_chat_template(
                conversation["messages"][:turn], chat_template=self.strict.chat_template, add_generation_prompt=True
            )
            (asked,) = self.counter.encode([prompt])
            if self._with_one_image_token(asked) != self._with_one_image_token(ids[:start]):
                self.findings.add(
                    "error",
                    "prompt-differs",
                    place,
                    f"other ids ahead of the answer in turn {turn} than inference feeds",
                    "the inference prompt ahead of each answer",
                    "Look at the row's first and last characters, or pass another --chat_template_path",
                )
                return True
        return False

    def _with_one_image_token(self, ids: list[int]) -> list[int]:
        image = self.processor.image_token_id
        return [token for at, token in enumerate(ids) if token != image or at == 0 or ids[at - 1] != image]

    def _is_counted_right(self, row: dict, ids: torch.Tensor) -> bool:
        conversation = read_row(row, self.processor.image_token, placement=self.strict.placement)
        counted, _ = self.counter.count([conversation["messages"]], [[image.size for image in row["images"]]])
        limit, most = self.strict.max_length, self.strict.max_images
        is_cut = (limit is not None and counted[0] > limit) or (most is not None and len(row["images"]) > most)
        return is_cut or int(counted[0]) == len(ids)

    def _show(self, place: Place, names: list[str], images: list[Image.Image], batch: dict) -> dict:
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        spans = token_spans(self.processor, ids, labels)
        return {
            "row": place.row,
            "id": place.id,
            "tokens": len(ids),
            "trained": int((labels != IGNORE_INDEX).sum()),
            "codes": sorted(self.findings.rows.get((place.file, place.row), ())),
            "pictures": [_thumbnail(name, image) for name, image in zip(names, images, strict=True)],
            "spans": [{"kind": kind, "text": text, "tokens": tokens} for kind, text, tokens in spans],
        }


def _name(source: object) -> str:
    path = source.get("path") if isinstance(source, dict) else source
    return os.path.basename(path) if isinstance(path, str) else "picture in the row"


def _thumbnail(name: str, image: Image.Image) -> dict:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"name": name, "width": image.width, "height": image.height, "jpeg": encoded}
