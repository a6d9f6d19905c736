"""What a training recipe prints before step 0, and in full for `--dry_run`.

A file of its own beside `_trainer.py`: this is what a person reads, that is what trains.
"""

import copy
from itertools import groupby, islice

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from _distributed import sharding_of
from _memory import predict_memory
from _parts import part_of, part_table
from collators import IGNORE_INDEX

FIRST_ROWS = 256  # of a stream: they stand for all of it
ROWS = 16  # whose share of trained tokens is shown before every run
DRY_RUN_ROWS = 256  # whose lengths are measured for --dry_run: about a second on a CPU


class Stop(Exception):
    """Raised where the first step would begin, for `--dry_run`."""


class StartReport(TrainerCallback):
    """Print on the main process, before step 0, what is about to train; for `--dry_run` stop there."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.is_world_process_zero:
            self._print(args, state, optimizer, Console())
        self.trainer._first_rows = None  # whose pictures take memory
        if args.dry_run:
            raise Stop

    def _print(self, args, state, optimizer, console: Console) -> None:
        trainer = self.trainer
        rates = {part: args.learning_rate if rate is None else rate for part, rate in trainer._rates.items()}
        # A resumed run goes on at the rates of its checkpoint, whatever the command line says now.
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        for group in optimizer.param_groups:
            for name in {names.get(id(parameter)) for parameter in group["params"]} - {None}:
                rates[part_of(name)] = group.get("initial_lr", group["lr"])
        console.print(part_table(trainer.model, rates))
        world, accumulation = args.world_size, args.gradient_accumulation_steps
        console.print(
            f"global batch {args.train_batch_size * world * accumulation} rows = {args.train_batch_size} a device × "
            f"{accumulation} accumulated × {world} process(es); {state.max_steps} steps"
        )
        rows = list(islice(iter(first_rows(trainer)), ROWS))
        batch = _quiet_collator(trainer)(rows)
        tokens, trained = int(batch["attention_mask"].sum()), int((batch["labels"] != IGNORE_INDEX).sum())
        console.print(f"{trained / tokens:.1%} of the tokens of the first {len(rows)} rows carry loss; the first row:")
        kept = batch["attention_mask"][0].bool()
        console.print(mark_trained(trainer.processing_class, batch["input_ids"][0][kept], batch["labels"][0][kept]))


def plan_memory(trainer) -> list:
    """Measure rows and predict the peak memory of the longest batch; to be called before the launcher wraps the model.

    Returns:
        What to print.
    """
    args, image_token = trainer.args, trainer.processing_class.image_token_id
    lengths, image_tokens, pictures, left_out = [], 0, 0, 0
    collator = _quiet_collator(trainer)
    for row in sample_rows(first_rows(trainer), DRY_RUN_ROWS):
        batch = collator([row])
        if not (batch["labels"] != IGNORE_INDEX).any():
            left_out += 1  # --overlong drop; what came back is a made-up row
            continue
        lengths.append(int(batch["attention_mask"].sum()))
        image_tokens = max(image_tokens, int((batch["input_ids"] == image_token).sum()))
        if "pixel_values" in batch:
            # A picture is (channels, height, width), LlavaNext's and OneVision's several of these.
            pictures = max(pictures, batch["pixel_values"].shape[:-3].numel())
    if not lengths:
        return [f"none of {left_out:,} sampled rows trains a token (--max_length, --overlong, --train_on?)"]
    median, most, longest = (int(np.quantile(lengths, share, method="higher")) for share in (0.5, 0.95, 1))
    limit = "no --max_length" if args.max_length is None else f"--max_length {args.max_length:,}"
    lines = [
        f"tokens of a row, over {len(lengths):,} rows: median {median:,}, 95 % up to {most:,}, longest {longest:,}; "
        f"at most {image_tokens:,} image tokens; {limit}; {left_out} rows left out"
    ]
    try:
        plan = predict_memory(
            trainer.model,
            args,
            batch_size=args.train_batch_size,
            tokens=longest,
            pictures=pictures * args.train_batch_size,
            sharding=sharding_of(trainer),
            world_size=args.world_size,
        )
    except ValueError as error:
        return [*lines, f"predicted memory: unknown ({error})"]
    return [
        *lines,
        plan.table(),
        f"for a batch of {args.train_batch_size} rows as long as the longest of these (docs/memory.md)",
    ]


def _quiet_collator(trainer):
    """The run's collator, which names no row as skipped before the run has begun."""
    collator = copy.copy(trainer.data_collator)
    if getattr(collator, "skipped_rows", None) is not None:
        collator.skipped_rows = None
    return collator


def first_rows(trainer) -> Dataset | list[dict]:
    """What to look at before step 0: the training data, or the first 256 rows of a stream, kept until step 0.

    Each time that a stream is opened its shuffle buffer of 10,000 rows is filled anew.
    """
    if not isinstance(trainer.train_dataset, IterableDataset):
        return trainer.train_dataset
    if trainer._first_rows is None:
        trainer._first_rows = list(islice(iter(trainer.train_dataset), FIRST_ROWS))
    return trainer._first_rows


def sample_rows(dataset: Dataset | list[dict], count: int) -> list[dict]:
    """`count` rows at even distances."""
    places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    return [dataset[int(place)] for place in places]


def token_spans(processor, input_ids: torch.Tensor, labels: torch.Tensor) -> list[tuple[str, str, int]]:
    """Cut one row where it changes from prompt to trained to image tokens.

    Args:
        processor: The processor the ids come from.
        input_ids: `(seq,)`.
        labels: `(seq,)`, -100 where nothing trains.

    Returns:
        `("prompt" | "trained" | "image", decoded text, number of tokens)`; a run of image tokens has the text
        `<image>` once.
    """
    kinds = []
    for token, label in zip(input_ids.tolist(), labels.tolist(), strict=True):
        kind = "trained" if label != IGNORE_INDEX else "prompt"
        kinds.append("image" if token == processor.image_token_id else kind)
    spans, start = [], 0
    for kind, run in groupby(kinds):
        end = start + len(list(run))
        decoded = processor.tokenizer.decode(input_ids[start:end], skip_special_tokens=False)
        spans.append((kind, processor.image_token if kind == "image" else decoded, end - start))
        start = end
    return spans


def mark_trained(processor, input_ids: torch.Tensor, labels: torch.Tensor) -> Text:
    """`token_spans` for a terminal: trained spans in green brackets, a run of image tokens as `<image>×576`."""
    text = Text()
    for kind, decoded, tokens in token_spans(processor, input_ids, labels):
        if kind == "image":
            text.append(f"{decoded}×{tokens}", style="cyan")
        elif kind == "trained":
            text.append(f"[{decoded}]", style="bold green")
        else:
            text.append(decoded, style="dim")
    return text
