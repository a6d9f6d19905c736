"""The doctor's examination: a data set and a checkpoint → findings and a report. `inspect_data.py` is the recipe.

Every row is read, checked and counted as the collator would count it, without decoding pictures; a sample of rows goes
through the very collator that trains, and its ids are held against the inference prompt's.
"""

import os
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import CONFIG_NAME, cached_file

from _findings import Findings, Place
from _label_checks import LabelChecks
from _lengths import LengthCounter, histogram, padding_shares, percentiles
from _memory import predict_memory, quantise_on_paper
from _model_checks import check_config, check_model
from _parts import adapter_config, add_adapters, list_parts, train_only
from _processor import prepare_processor
from _row_checks import HIDDEN, PictureChecks, RowChecks, hidden_by_crop, template_words
from collators import LlavaDataCollator, fetch_image, load_image, load_rows, read_row
from collators.llava_json import MAX_BAD_SHARE, BrokenList, PictureFolder, _numbers_in, parse_row, read_records
from collators.row_shapes import BadRow, RowReader

ROWS_AT_ONCE = 256  # whose text is rendered and tokenised together


@dataclass
class Examination:
    """What `examine` returns.

    Attributes:
        report: JSON-able; docs/doctor.md has its keys.
        findings: the same findings, to ask by row.
        usable: numbers of the rows of the training file that a run could train on.
    """

    report: dict
    findings: Findings
    usable: set[int]


@dataclass
class Rows:
    """One file, or a split of it, while it is read. In findings it is called `name`."""

    path: str
    split: str
    name: str
    skips: bool  # leaves bad rows out
    read: int = 0
    usable: set[int] = field(default_factory=set)
    text_only: int = 0
    tokens: list[np.ndarray] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    kept: list[tuple[int, bool]] = field(default_factory=list)  # tokens under the limits, and whether with a picture
    shortened: int = 0
    left_out: int = 0
    sample: list[tuple[Place, dict]] = field(default_factory=list)


class Doctor:
    """Examines a data set for the run that a recipe's flags describe.

    Args:
        script_args, training_args, model_args: what the recipe's parser made of its flags.
        parts: that would train whole, if no adapters do.
        pictures: `"headers"`, `"decode"` or `"none"`.
        sample_rows: how many rows go through the collator.
    """

    def __init__(
        self,
        script_args,
        training_args,
        model_args,
        *,
        parts: list[str],
        pictures: str = "headers",
        sample_rows: int = 200,
    ):
        self.script_args, self.training_args, self.model_args = script_args, training_args, model_args
        self.parts, self.pictures, self.sample_rows = parts, pictures, sample_rows
        self.findings = Findings(skips_rows=script_args.on_bad_row == "skip")
        self.checkpoint = Place(model_args.model_name_or_path)
        self.fetch = fetch_image if script_args.allow_remote_images else None
        # Where none may be fetched, `load_image` says so of a URL.
        fetch = self.fetch or load_image
        self.picture_checks = PictureChecks(self.findings, decode=pictures == "decode", fetch=fetch)
        self._pictures: dict[int, dict[str | bytes, Place]] = defaultdict(dict)  # by the bytes that their files have
        path, skips = script_args.dataset_name, self.findings.skips_rows
        self.train = Rows(path, script_args.dataset_train_split, path, skips)
        self.evaluation = self._find_evaluation()
        self._load_checkpoint()

    def _load_checkpoint(self) -> None:
        source = {
            "revision": self.model_args.model_revision,
            "trust_remote_code": self.training_args.trust_remote_code,
        }
        name = self.model_args.model_name_or_path
        self.processor = AutoProcessor.from_pretrained(name, **source)
        try:
            self.config = AutoConfig.from_pretrained(name, **source)
        except (OSError, ValueError) as error:
            self.config = None
            file = cached_file(
                name, CONFIG_NAME, revision=source["revision"], _raise_exceptions_for_missing_entries=False
            )
            if file is not None:  # else it is only a processor
                self.findings.add(
                    "error",
                    "config",
                    self.checkpoint,
                    f"a {CONFIG_NAME} that cannot be loaded: {error}",
                    "the configuration of a Llava model",
                    "Correct the file, or copy it from the checkpoint again",
                )
        self.counter = self.collator = None
        try:
            prepare_processor(self.processor, self.script_args, self.training_args)
            self.collator = self._make_collator(self.script_args.train_on)
        except (ValueError, TemplateError) as error:
            self.findings.add(
                "error",
                "chat-template",
                self.checkpoint,
                str(error),
                "a chat template that can train",
                "Pass --chat_template_path with one of collators/chat_templates/",
            )
        if self.collator is not None:
            self.counter = LengthCounter(self.processor, self.processor.chat_template)
            if self.config is not None:
                check_config(self.findings, self.checkpoint, self.config, self.processor)

    def _find_evaluation(self) -> Rows | None:
        """The rows that a run would evaluate on, as `load_datasets` chooses them."""
        path, split = self.script_args.eval_dataset_name, self.script_args.dataset_test_split
        skips = False
        if not path:
            path = self.train.path
            is_file = path.lower().endswith((".json", ".jsonl", ".parquet"))
            is_single = (is_file and "[" not in split) or Path(path, "state.json").is_file()
            if self.training_args.eval_strategy == "no" or is_single or split == self.train.split:
                return None
            of_the_same_rows = is_file or split.partition("[")[0] == self.train.split.partition("[")[0]
            skips = self.train.skips and of_the_same_rows
        # Of one file with the training rows they need another name: rows of both have the same numbers.
        return Rows(path, split, f"{path}:{split}" if path == self.train.path else path, skips)

    def _make_collator(self, train_on: str) -> LlavaDataCollator:
        try:
            generation = GenerationConfig.from_pretrained(
                self.checkpoint.file, revision=self.model_args.model_revision
            )
        except OSError:  # the model makes one of its configuration
            generation = GenerationConfig.from_model_config(self.config) if self.config else GenerationConfig()
        return LlavaDataCollator(
            self.processor,
            train_on=train_on,
            max_length=self.training_args.max_length,
            max_images=self.script_args.max_images,
            placement=self.script_args.placement,
            overlong=self.script_args.overlong,
            fetch_image=self.fetch,
            stop_token_ids=generation.eos_token_id,
        )

    # Every row

    def examine(self) -> Examination:
        """Read all rows, then a sample of them through the collator, then the model's configuration."""
        words = template_words(self.processor, self.processor.chat_template) if self.collator else ()
        checks = RowChecks(self.findings, words)
        train, evaluation = self.train, self.evaluation
        self._read(train, checks)
        pictures = self._picture_section(train)
        if evaluation:
            self.findings.skips_rows = evaluation.skips
            self._read(evaluation, checks)
            self.findings.skips_rows = train.skips
        lengths = self._length_section(train)
        labels = checked = None
        if self.collator and train.sample:
            train_on = self.script_args.train_on
            strict = self.collator if train_on == "assistant" else self._make_collator("assistant")
            checked = LabelChecks(self.findings, self.collator, strict, self.counter)
            labels = checked(train.sample)
            train.usable -= checked.refused
        skipped = train.read - len(train.usable)
        if self.findings.skips_rows and skipped > MAX_BAD_SHARE * train.read:
            self.findings.add(
                "error",
                "unusable-row",
                Place(train.path),
                f"{skipped} of {train.read} rows that would be skipped",
                f"at most {MAX_BAD_SHARE:.0%}, with more of which --on_bad_row skip stops a run",
                "Correct them",
            )
        if lengths and checked:
            lengths["exact"] = checked.exact
            if labels:
                labels |= _with_padding(labels, lengths["padding"]["random"])
        parts, memory = self._examine_model(lengths, checked.pictures if checked else 1)
        report = {
            "data": {
                "path": train.path,
                "rows": train.read,
                "usable": len(train.usable),
                "eval_path": evaluation and evaluation.name,
            },
            "model": {
                "name": self.checkpoint.file,
                "class": self.config and (self.config.architectures or [type(self.config).__name__])[0],
            },
            "settings": {
                "max_length": self.training_args.max_length,
                "max_images": self.script_args.max_images,
                "overlong": self.script_args.overlong,
                "train_on": self.script_args.train_on,
                "placement": self.script_args.placement,
                "batch_size": self.training_args.per_device_train_batch_size,
            },
            "findings": self.findings.to_list(),
            "labels": labels,
            "lengths": lengths,
            "pictures": pictures,
            "parts": parts,
            "memory": memory,
            "samples": checked.shown if checked else [],
        }
        return Examination(report, self.findings, train.usable)

    def _iterate(self, path: str, split: str) -> Iterator[tuple[int, object, dict | BadRow]]:
        """Row number, its id, and the row or why it cannot be used."""
        script_args = self.script_args
        if not path.lower().endswith((".json", ".jsonl")):
            rows = load_rows(
                path,
                name=script_args.dataset_config,
                split=split,
                streaming=script_args.dataset_streaming,
                placement=script_args.placement,
                image_folder=script_args.image_folder,
                allow_external_images=script_args.allow_external_images,
                allow_remote_images=script_args.allow_remote_images,
                number_rows=True,
            )
            for number, row in enumerate(rows):
                yield row.get("_row", number), row.get("id"), row  # a stream of several files has no numbers
            return
        yield from self._slice(path, split) if "[" in split else self._parse(path)

    def _slice(self, path: str, split: str) -> Iterator[tuple[int, object, dict | BadRow]]:
        """The rows of a slice of a JSON file, counted as `load_rows` does: without those that are skipped.

        Where none is skipped, a bad row stops the run wherever it stands, and so belongs to every slice.
        """
        skips = self.findings.skips_rows
        total = sum(not (skips and isinstance(row, BadRow)) for _, _, row in self._parse(path))
        chosen = set(_numbers_in(split, {split.partition("[")[0]: total}))
        at = 0
        for number, identity, row in self._parse(path):
            is_bad = isinstance(row, BadRow)
            if min(at, total - 1) in chosen or (is_bad and not (skips and total)):
                yield number, identity, row
            at += not (is_bad and skips)

    def _parse(self, path: str) -> Iterator[tuple[int, object, dict | BadRow]]:
        script_args = self.script_args
        folder = os.path.abspath(script_args.image_folder or os.path.dirname(os.path.abspath(path)))
        find = PictureFolder(folder, script_args.allow_external_images, script_args.allow_remote_images)
        reader = RowReader(script_args.placement)
        for number, record in enumerate(read_records(path)):
            if isinstance(record, BrokenList):  # which a run refuses even where it skips rows
                raise ValueError(f"row {number}: {record} What stands behind it in the list cannot be read.")
            identity = record.get("id") if isinstance(record, dict) else None
            try:
                messages, images = parse_row(record, reader, find)
            except BadRow as error:
                yield number, identity, error
                continue
            others = {name: value for name, value in record.items() if name not in reader.shape.columns}
            yield number, identity, {**others, "messages": messages, "images": images, "_row": number}

    def _read(self, rows: Rows, checks: RowChecks) -> None:
        chance, trains = random.Random(0), rows is self.train
        # Bad rows that stop a run were named when the training rows of the same file were read.
        is_known = not trains and rows.path == self.train.path and not self.train.skips
        waiting: list[tuple[Place, list[dict], list]] = []
        try:
            for number, identity, row in self._iterate(rows.path, rows.split):
                if is_known and isinstance(row, BadRow):
                    continue
                rows.read += 1
                place = Place(rows.name, number, identity)
                conversation = self._check_form(place, row)
                if conversation is None:
                    continue
                checks(place, row)
                sizes = []
                if self.pictures != "none":
                    sizes = self.picture_checks(place, row["images"])
                elif self.counter and not self.counter.needs_sizes:
                    sizes = [(1, 1)] * len(row["images"])
                self._note_pictures(place, row["images"], trains)
                rows.text_only += not row["images"]
                if None in sizes:
                    continue
                rows.usable.add(number)
                if trains and self.counter and len(sizes) == len(row["images"]):
                    waiting.append((place, conversation["messages"], sizes))
                    if len(waiting) == ROWS_AT_ONCE:
                        self._count_lengths(rows, waiting)
                        waiting = []
                # Reservoir sampling: each row has the same chance, and memory does not grow with the file.
                if len(rows.sample) < self.sample_rows:
                    rows.sample.append((place, row))
                elif (at := chance.randrange(len(rows.usable))) < self.sample_rows:
                    rows.sample[at] = (place, row)
        except ValueError as error:  # of the file or data set as a whole
            self.findings.add("error", "unusable-row", Place(rows.name), str(error), "rows that load", "Correct them")
        if waiting:
            self._count_lengths(rows, waiting)
        rows.sample.sort(key=lambda entry: entry[0].row)

    def _check_form(self, place: Place, row: dict | BadRow) -> dict | None:
        try:
            if isinstance(row, BadRow):
                raise row
            return read_row(row, self.processor.image_token, placement=self.script_args.placement)
        except BadRow as error:
            found, expected, remedy = error.args
        except ValueError as error:
            found = str(error).partition(": ")[2] or str(error)  # without the row's name
            expected, remedy = "a row that the collator takes", "Correct the row"
        self.findings.add("error", "unusable-row", place, found, expected, remedy)
        return None

    def _note_pictures(self, place: Place, sources: list, trains: bool) -> None:
        """Remember the pictures that are trained on, or look those of an evaluation file up among them.

        Files are read where two are of one size, and pictures in the row are kept as digests: memory stays small.
        """
        if not self.evaluation:
            return
        for source in sources:
            path = source if isinstance(source, str) else source.get("path") if isinstance(source, dict) else None
            data = source.get("bytes") if isinstance(source, dict) else source
            try:
                key = _digest(data) if isinstance(data, bytes) else os.path.realpath(path)
                known = self._pictures[len(data) if isinstance(data, bytes) else os.stat(path).st_size]
                if trains:
                    known.setdefault(key, place)
                    continue
                first = known.get(key) or next((known[k] for k in known if _content(k) == _content(key)), None)
            except (OSError, TypeError):  # no file: said by the checks of pictures
                continue
            if first:
                self.findings.add(
                    "warning",
                    "picture-in-eval",
                    place,
                    f"{path or 'a picture'}, which stands in row {first.row} of {first.file}",
                    "held-out pictures that are not trained on",
                    "Split by picture, not by row",
                )

    # Lengths

    def _count_lengths(self, rows: Rows, waiting: list[tuple[Place, list[dict], list]]) -> None:
        try:
            tokens, images = self.counter.count([messages for _, messages, _ in waiting], [s for _, _, s in waiting])
        except (TemplateError, TypeError) as error:
            if len(waiting) > 1:
                for one in waiting:
                    self._count_lengths(rows, [one])
                return
            place = waiting[0][0]
            rows.usable.discard(place.row)
            self.findings.add(
                "error",
                "unusable-row",
                place,
                f"a row that the chat template cannot render ({error})",
                "rows that the chat template renders",
                "Correct the row, or pass another --chat_template_path",
            )
            return
        rows.tokens.append(tokens)
        rows.images.append(images)
        limit, most = self.training_args.max_length, self.script_args.max_images
        for (place, messages, sizes), count in zip(waiting, tokens.tolist(), strict=True):
            too_long = limit is not None and count > limit
            if too_long or (most is not None and len(sizes) > most):
                count = self._cut(rows, place, messages, sizes, count, too_long)
            if count:
                rows.kept.append((count, bool(sizes)))

    def _cut(self, rows: Rows, place: Place, messages: list[dict], sizes: list, count: int, too_long: bool) -> int:
        """Say what the limits leave of a row; returns its tokens then."""
        limit, most = self.training_args.max_length, self.script_args.max_images
        ends = [turn + 1 for turn, message in enumerate(messages) if message["role"] == "assistant"]
        found = f"{count:,} tokens" if too_long else f"{len(sizes)} pictures"
        expected = f"--max_length {limit:,} or less" if too_long else f"--max_images {most} or fewer"
        for exchanges in range(len(ends), 0, -1):
            kept = messages[: ends[exchanges - 1]]
            pictures = sizes[: sum(part["type"] == "image" for message in kept for part in message["content"])]
            left = int(self.counter.count([kept], [pictures])[0][0])
            if (limit is None or left <= limit) and (most is None or len(pictures) <= most):
                rows.shortened += 1
                self.findings.add(
                    "warning",
                    "shortened",
                    place,
                    f"{found}; the first {exchanges} of {len(ends)} exchanges are kept",
                    expected,
                    "Raise the limit, or split the row",
                )
                return left
        rows.left_out += 1
        raises = self.script_args.overlong == "raise"
        if raises:
            rows.usable.discard(place.row)
        self.findings.add(
            "error" if raises else "warning",
            "too-long" if too_long else "too-many-pictures",
            place,
            f"{found}, and not even the first exchange fits",
            expected,
            "Raise the limit, shorten the row, or leave such rows out with --overlong drop",
        )
        return 0

    def _length_section(self, rows: Rows) -> dict | None:
        if not rows.tokens:
            return None
        tokens, images = np.concatenate(rows.tokens), np.concatenate(rows.images)
        limit = self.training_args.max_length
        section = {
            "rows": len(tokens),
            "exact": True,
            "tokens": percentiles(tokens),
            "text_tokens": percentiles(tokens - images),
            "image_tokens": percentiles(images),
            "max_length": limit,
            "kept": len(tokens) - rows.shortened - rows.left_out,
            "shortened": rows.shortened,
            "left_out": rows.left_out,
            "batch_size": self.training_args.per_device_train_batch_size,
            "histogram": histogram(tokens),
            "padding": {},
        }
        positions = getattr(self.config and self.config.get_text_config(), "max_position_embeddings", None)
        longest = max((count for count, _ in rows.kept), default=0)
        if positions is not None and longest > positions:
            self.findings.add(
                "warning",
                "context",
                Place(rows.path),
                f"rows of up to {longest:,} tokens",
                f"at most the {positions:,} positions that the model was made for",
                "Lower --max_length",
            )
        if rows.kept:
            kept, has_picture = np.array(rows.kept).T
            section["padding"] = padding_shares(
                kept,
                has_picture.astype(bool),
                section["batch_size"],
                limit or longest,
                self.training_args.gradient_accumulation_steps,
            )
        return section

    def _picture_section(self, rows: Rows) -> dict | None:
        checks = self.picture_checks
        if self.pictures == "none" or not checks.sizes:
            return None
        sizes = np.array(checks.sizes)
        hidden = np.array([hidden_by_crop(self.processor, *size) for size in checks.sizes])
        if hidden.mean() > HIDDEN:
            self.findings.add(
                "warning",
                "centre-crop",
                Place(rows.path),
                f"{hidden.mean():.0%} of the pictures' area cut off on average, {hidden.max():.0%} at most",
                "whole pictures",
                "Pass --image_aspect_ratio pad, as LLaVA-1.5 was trained",
            )
        return {
            "checked": self.pictures,
            "pictures": len(sizes),
            "files": checks.files,
            "text_only_rows": rows.text_only,
            "formats": dict(checks.formats),
            "modes": dict(checks.modes),
            "width": percentiles(sizes[:, 0]),
            "height": percentiles(sizes[:, 1]),
            "hidden_by_crop": {"mean": float(hidden.mean()), "max": float(hidden.max())} if hidden.any() else None,
        }

    # The model

    def _examine_model(self, lengths: dict | None, pictures: int) -> tuple[list[dict] | None, dict | None]:
        """What would train, and the predicted memory, from the configuration alone: no weight is loaded."""
        if self.config is None:
            return None, None
        script_args, training_args, model_args = self.script_args, self.training_args, self.model_args
        dtype = model_args.dtype if model_args.dtype not in (None, "auto") else self.config.dtype or "float32"
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(self.config).to(dtype)
            if model_args.use_peft:
                model = add_adapters(
                    model,
                    adapter_config(model_args),
                    freeze_projector=getattr(script_args, "freeze_projector", False),
                    lora_vision_tower=getattr(script_args, "lora_vision_tower", False),
                )
                if model_args.load_in_4bit:
                    quantise_on_paper(model)
            else:
                train_only(model, self.parts)
        check_model(self.findings, self.checkpoint, model)
        rate = training_args.learning_rate
        rates = {
            "vision_tower": training_args.vision_tower_learning_rate or rate,
            "multi_modal_projector": training_args.projector_learning_rate or rate,
            "language_model": rate,
        }
        parts = list_parts(model, rates)
        if lengths is None or not lengths["padding"]:
            return parts, None
        batch_size = training_args.per_device_train_batch_size
        longest = min(lengths["tokens"]["max"], training_args.max_length or lengths["tokens"]["max"])
        try:
            plan = predict_memory(
                model, training_args, batch_size=batch_size, tokens=longest, pictures=pictures * batch_size
            )
        except ValueError:  # layers of another kind than the prediction knows
            return parts, None
        items = ("parameters", "gradients", "optimizer", "activations", "communication", "allowance", "total")
        return parts, {item: getattr(plan, item) for item in items}


def _with_padding(labels: dict, pad: float) -> dict:
    return {"pad": pad, **{kind: labels[kind] * (1 - pad) for kind in ("trained", "prompt", "image")}}


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


@cache
def _content(key: str | bytes) -> bytes:
    """The digest of a picture that is known by its path, or by that digest."""
    return key if isinstance(key, bytes) else _digest(Path(key).read_bytes())
