"""The steps of a mixture: functions from rows to rows, found by name, and what they stand on.

Here because `_mixture.py` runs them and does not care what they do; a new step is one function and a word in the
registry at the end of this file. docs/mixture.md is the user's page.
"""

import hashlib
import heapq
import json
import os
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, groupby
from pathlib import Path
from string import ascii_uppercase
from sys import getsizeof
from typing import IO

from transformers import AutoTokenizer

from collators.llava_json import URL, parse_row
from collators.row_shapes import MARKERS, BadRow, RowReader

IMAGE = "<image>"
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
LEADING_MARKERS = re.compile(r"(?:<image>\n?)*")
FRONT = MARKERS["front"]  # a marker with the newline that belongs to it where pictures stand in front
RUN_BYTES = 128 << 20  # of records that a sort holds in memory at once
RUNS_OPEN = 100  # sorted runs on disk before they become one: systems allow 256 open files or more

_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass
class Context:
    """What a step may use besides its rows and options."""

    seed: int
    source: str
    step: int
    folder: str  # where the output's relative picture paths start
    tokenizer: str | None
    counts: Counter  # what the step left out, by reason
    row: tuple[int, ...] = ()  # position in the stream that the step's segment began with, number of the copy

    def draw(self, *key: int) -> int:
        return draw(self.seed, self.source, self.step, *self.row, *key)


def draw(*key: int | str) -> int:
    """A number in [0, 2**64) that depends on `key` alone: on no order of calls, no process, no version of Python."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())


def _place(image_prefix: str, picture: str) -> str:
    return picture if URL.match(picture) else os.path.join(image_prefix, picture)


def read_row(record: object, context: Context, *, image_prefix: str) -> Iterator[dict]:
    """Check a row as `collators.load_rows` does and bring it into the form that the steps take.

    That form has `images` (a list of paths, empty for text) in place of `image`, the speakers human, gpt and system,
    a system turn in place of a column `system`, and `source`; other columns stay. `image_prefix` is the way from the
    output's folder to the source's pictures, put in front of relative paths.

    Raises:
        BadRow: `load_rows` would refuse the row, or it has another trainer's shape.
    """
    reader = RowReader("keep")  # one a row: which rows share a chunk must not matter
    messages, images = parse_row(record, reader, partial(_place, image_prefix))
    if "conversations" not in reader.shape.keys:
        found = " and ".join(map(repr, reader.shape.keys))
        raise BadRow(f"the keys {found}", "'conversations'", "Rewrite the row in LLaVA's shape: no other is mixed")
    turns = record["conversations"]
    if len(messages) > len(turns):
        turns = [{"value": record["system"]}, *turns]
    turns = [
        {"from": SPEAKERS[message["role"]], "value": turn["value"]}
        for message, turn in zip(messages, turns, strict=True)
    ]
    row = {name: value for name, value in record.items() if name not in reader.shape.columns}
    yield {**row, "source": context.source, "images": images, "conversations": turns}


def _exchanges(row: dict) -> tuple[list[dict], list[list[dict]]]:
    """The system turn, if any, and the pairs of question and answer."""
    turns = row["conversations"]
    start = len(turns) % 2
    return turns[:start], [turns[at : at + 2] for at in range(start, len(turns), 2)]


def _keep_exchanges(row: dict, kept: Iterable[int]) -> dict:
    """The row with the exchanges `kept` (ascending); a picture first shown in one left out opens the next one kept."""
    turns, exchanges = _exchanges(row)
    kept, images, seen, waiting = set(kept), [], 0, []
    for number, (question, answer) in enumerate(exchanges):
        count = question["value"].count(IMAGE)
        own, seen = row["images"][seen : seen + count], seen + count
        if number not in kept:
            waiting += own
            continue
        turns += [{"from": "human", "value": f"{IMAGE}\n" * len(waiting) + question["value"]}, answer]
        images, waiting = images + waiting + own, []
    return {**row, "images": images, "conversations": turns}


def _end_line(question: str) -> str:
    """The question and a line break that is still there when a picture at its end has gone to the front."""
    if not FRONT.sub("", question):  # pictures alone, as in captions
        return question and question.removesuffix("\n") + "\n"
    return question + ("\n" if FRONT.sub("", question + "\n").endswith("\n") else "\n\n")


def add_prompt(row: dict, context: Context, *, prompt: str | list, every_turn: bool = False) -> Iterator[dict]:
    """Append a response-format prompt to the first question, or to every question.

    A `prompt` with `{question}` in it is a template around the question; any other goes on a line behind it. Of a list
    of prompts each question draws one.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    system, exchanges = _exchanges(row)
    turns = list(system)
    for number, (question, answer) in enumerate(exchanges):
        if every_turn or number == 0:
            chosen = prompts[context.draw(number) % len(prompts)] if len(prompts) > 1 else prompts[0]
            text = question["value"]
            if "{question}" in chosen:
                markers = LEADING_MARKERS.match(text).group()
                asked = text.removeprefix(markers)
                text = markers + chosen.replace("{question}\n", _end_line(asked)).replace("{question}", asked)
            else:
                text = _end_line(text) + chosen
            question = {"from": "human", "value": text}
        turns += [question, answer]
    yield {**row, "conversations": turns}


def rotate_choices(row: dict, context: Context) -> Iterator[dict]:
    """Turn a question with `choices` into one row a rotation of them, answered by a letter (A-OKVQA in LLaVA-1.5).

    The row has one exchange, a column `choices` (strings), and the text of the right one as its answer. Each of the k
    rows lists the choices as lines "A. …" behind the question; the right one stands at each letter once.
    """
    choices, turns = row.get("choices"), row["conversations"]
    usable = isinstance(choices, list) and 2 <= len(choices) <= len(ascii_uppercase)
    usable = usable and all(isinstance(choice, str) and IMAGE not in choice for choice in choices)
    if not usable or len(turns) % 2 or len(turns) > 2 or choices.count(turns[1]["value"]) != 1:
        raise BadRow(
            f"'choices': {repr(choices)[:80]} with {len(turns)} turns",
            "one question, a list of 2 to 26 texts and an answer that is one of them",
            "Correct the row, or leave it out",
        )
    question, answer = turns
    rest = {name: value for name, value in row.items() if name != "choices"}
    for start in range(len(choices)):
        options = choices[start:] + choices[:start]
        lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
        text = _end_line(question["value"]) + "\n".join(lines)
        letter = ascii_uppercase[options.index(answer["value"])]
        yield {**rest, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": letter}]}


def sample_exchanges(row: dict, context: Context, *, at_most: int) -> Iterator[dict]:
    """Draw `at_most` exchanges of a longer conversation and keep their order."""
    count = len(row["conversations"]) // 2
    if count <= at_most:
        yield row
        return
    context.counts["exchanges not drawn"] += count - at_most
    yield _keep_exchanges(row, sorted(range(count), key=context.draw)[:at_most])


def split_exchanges(row: dict, context: Context, *, at_most: int) -> Iterator[dict]:
    """Cut a longer conversation into rows of `at_most` exchanges, each with system turn and pictures so far."""
    count = len(row["conversations"]) // 2
    if count <= at_most:
        yield row
        return
    for start in range(0, count, at_most):
        yield _keep_exchanges(row, range(start, min(start + at_most, count)))


def truncate(row: dict, context: Context, *, tokens: int) -> Iterator[dict]:
    """Leave out the last exchanges of a row whose texts have more than `tokens` tokens.

    The chat template's tokens and those of pictures are not counted.
    """
    lengths = count_tokens(context.tokenizer, [turn["value"] for turn in row["conversations"]])
    start, kept = len(lengths) % 2, 0
    total = sum(lengths[:start])
    for at in range(start, len(lengths), 2):
        total += sum(lengths[at : at + 2])
        if total > tokens:
            break
        kept += 1
    count = len(lengths) // 2
    if kept == count:
        yield row
    elif kept:
        context.counts[f"exchanges beyond {tokens} tokens"] += count - kept
        yield _keep_exchanges(row, range(kept))
    else:
        context.counts[f"rows with more than {tokens} tokens in the first exchange"] += 1


def drop_empty(row: dict, context: Context) -> Iterator[dict]:
    """Leave out a row with an empty answer, or a question without text and picture."""
    if all(turn["value"].strip() for turn in row["conversations"]):
        yield row
    else:
        context.counts["rows with an empty turn"] += 1


def drop_missing_images(row: dict, context: Context) -> Iterator[dict]:
    """Leave out a row with a picture that is not on the disk: `load_rows` would refuse it."""
    if all(os.path.isfile(os.path.join(context.folder, image)) for image in row["images"]):
        yield row
    else:
        context.counts["rows with a missing picture"] += 1


def repeat(row: dict, context: Context, *, times: int) -> Iterator[dict]:
    """Give the row `times` times."""
    yield from [row] * times


def merge_same_image(records: Iterable[tuple[str, bytes]], context: Context) -> Iterator[bytes]:
    """Join the conversations of all rows that have one picture, the same one, and the same system turn.

    The joined row has the first row's columns, but not its `choices`, and stands in the first row's place; only the
    first question that had the picture keeps its `<image>`. Rows with no picture or several pass through.
    """
    numbered = ((key, position, packed) for position, (key, packed) in enumerate(records))
    merged = _merge_groups(sort_records(numbered, context.folder), context.counts)
    return (packed for _, packed in sort_records(merged, context.folder))


def image_key(row: dict) -> str:
    """What `merge_same_image` wants beside a row: equal for rows that belong together, empty for others."""
    if len(row["images"]) != 1:
        return ""
    system, _ = _exchanges(row)
    return "\0".join([str(Path(*row["images"])), *(turn["value"] for turn in system)])  # a Path drops "./" and "//"


def _merge_groups(records: Iterable[tuple], counts: Counter) -> Iterator[tuple]:
    for key, group in groupby(records, key=lambda record: record[0]):
        group = ((position, packed) for _, position, packed in group)
        if key:
            yield _merge(*next(group), group, counts)
        else:
            yield from group


def _merge(position: int, packed: bytes, others: Iterator[tuple], counts: Counter) -> tuple[int, bytes]:
    second = next(others, None)
    if second is None:
        return position, packed
    row = unpack_row(packed)
    row.pop("choices", None)  # of the first question alone
    for _, other in chain([second], others):
        counts["rows joined to one of the same picture"] += 1
        _, exchanges = _exchanges(unpack_row(other))
        for question, answer in exchanges:
            text = FRONT.sub("", question["value"])
            if question["value"] and not text:
                counts["<image> that were a whole question, now an empty one"] += 1
            row["conversations"] += [{"from": "human", "value": text}, answer]
    return position, pack_row(row)


def sample(
    rows_in: Iterable[bytes], context: Context, *, rows: int | None = None, share: int | float | None = None
) -> Iterator[bytes]:
    """Draw exactly `rows` rows, or `share` × the number of rows; the order stays.

    A share over 1 repeats: 2.5 gives every row twice and half of them a third time. Selection sampling (Knuth, The Art
    of Computer Programming, volume 2, algorithm 3.4.2S): two passes over a spooled copy, nothing held in memory.
    """
    count, spooled = _spool(rows_in, context.folder)
    if rows is not None and rows > count:
        raise ValueError(
            f"source {context.source}: sample found {count} rows; expected at least {rows}. Ask for fewer, or "
            f"for a share over 1 ({rows / max(count, 1):.4g})."
        )
    wanted = round(share * count) if rows is None else rows
    copies, left = divmod(wanted, count) if count else (0, 0)
    if not copies:
        context.counts["rows not drawn"] += count - left
    for position, row in enumerate(spooled):
        drawn = context.draw(position) * (count - position) < left << 64
        left -= drawn
        for _ in range(copies + drawn):
            yield row


def sort_records(records: Iterable[tuple], folder: str) -> Iterator[tuple]:
    """Sort tuples, `RUN_BYTES` of them in memory at a time, the rest in unnamed files in `folder`."""
    records, runs = iter(records), []
    while True:
        run, size = [], 0
        for record in records:
            run.append(record)
            size += getsizeof(record) + sum(map(getsizeof, record))
            if size >= RUN_BYTES:
                break
        run.sort()
        if size < RUN_BYTES:
            yield from heapq.merge(*runs, run) if runs else run
            return
        runs.append(_spool(run, folder)[1])
        if len(runs) == RUNS_OPEN:
            runs = [_spool(heapq.merge(*runs), folder)[1]]


def _spool(records: Iterable, folder: str) -> tuple[int, Iterator]:
    """Write records to an unnamed file; their number, and a way to read them once."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as it is read, then it is gone)
    count = 0
    for record in records:
        pickle.dump(record, file, pickle.HIGHEST_PROTOCOL)
        count += 1
    file.seek(0)
    return count, _unspool(file, count)


def _unspool(file: IO[bytes], count: int) -> Iterator:
    with file:
        for _ in range(count):
            yield pickle.load(file)


def pack_row(row: dict) -> bytes:
    """A row as bytes, between two steps: several times as fast as JSON."""
    return pickle.dumps(row, pickle.HIGHEST_PROTOCOL)


unpack_row = pickle.loads


def encode_row(row: dict) -> bytes:
    """A row as a line of JSON, in UTF-8: one picture in `image`, several in `images`, none in neither."""
    columns = {name: value for name, value in row.items() if name not in ("images", "conversations")}
    images = row["images"]
    pictures = {} if not images else {"image": images[0]} if len(images) == 1 else {"images": images}
    return _encode({**columns, **pictures, "conversations": row["conversations"]}).encode() + b"\n"


@cache
def load_tokenizer(name: str):
    """The tokenizer in a folder or of a hub id, loaded once a process."""
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def count_tokens(tokenizer: str, texts: list[str]) -> list[int]:
    """Tokens of each text without `<image>` and without special tokens; `tokenizer` is a folder or hub id."""
    texts = [FRONT.sub("", text) for text in texts]
    ids = load_tokenizer(tokenizer)(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [len(text_ids) for text_ids in ids]


ROW_STEPS = {
    step.__name__: step
    for step in (
        *(add_prompt, rotate_choices, sample_exchanges, split_exchanges),
        *(truncate, drop_empty, drop_missing_images, repeat),
    )
}
STREAM_STEPS = {step.__name__: step for step in (merge_same_image, sample)}
KEYS = {"merge_same_image": image_key}  # what a stream step wants beside its rows
STEPS = ROW_STEPS | STREAM_STEPS
