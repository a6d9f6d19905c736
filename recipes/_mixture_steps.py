"""The steps of a mixture: functions from rows to rows, found by name, and what they stand on.

Here because `_mixture.py` runs them and does not care what they do; a new step is one function and a word in the
registry at the end of this file. docs/mixture.md is the user's page.
"""

import hashlib
import heapq
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from string import ascii_uppercase
from typing import IO

from transformers import AutoTokenizer

from collators.llava_json import PICTURE_TYPOS

IMAGE = "<image>"
IMAGE_COLUMNS = PICTURE_TYPOS | {"image", "images"}
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
TURN_KEYS = {"from", "value"}
MARKER = re.compile(r"<image>\n?|\n<image>")
LEADING_MARKERS = re.compile(r"(?:<image>\n?)*")
RUN_BYTES = 128 << 20  # lines that a sort holds in memory at once
RUNS_OPEN = 100  # sorted runs on disk before they become one: systems allow 256 open files or more
POSITION, DIGEST = 12, 32  # width of the hexadecimal sort keys in front of a line
ALONE = b"-" * DIGEST

_encode = json.JSONEncoder(ensure_ascii=False).encode
_decode = json.JSONDecoder().decode


class BadRow(ValueError):
    """A row that cannot be used: `BadRow(reason, message)`. Rows are counted by the reason."""


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


def read_row(record: object, image_prefix: str, source: str) -> dict:
    """Check a row by the rules of `collators.load_rows` and bring it into the form that the steps take.

    Args:
        record: A row of LLaVA JSON.
        image_prefix: The way from the output's folder to the source's pictures, put in front of relative paths.
        source: Name for the column `source`.

    Returns:
        The row with `images` (a list of paths, empty for text) in place of `image`, speakers human, gpt and system,
        and `source`; other columns stay.

    Raises:
        BadRow: `load_rows` would refuse the row.
    """
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow("not an object", f"found a row of type {type(record).__name__}; expected an object.")
    turns = record.get("conversations")
    if not isinstance(turns, list) or "messages" in record:
        found = f"found the keys {list(record)} with 'conversations' of type {type(turns).__name__}"
        raise BadRow("no conversations", f"{found}; expected a list 'conversations', and no 'messages'.")
    turns = [_read_turn(number, turn) for number, turn in enumerate(turns)]
    speakers = [turn["from"] for turn in turns]
    talk = speakers[1:] if speakers[:1] == ["system"] else speakers
    if not talk or talk != ["human", "gpt"] * (len(talk) // 2):
        raise BadRow(
            "turns out of order",
            f"found the order {', '.join(speakers)[:200] or 'of no turns'}; expected an optional system turn, then "
            "human and gpt in alternation, human first and gpt last.",
        )
    images = _read_images(record)
    markers = sum(turn["value"].count(IMAGE) for turn in turns if turn["from"] == "human")
    if markers != len(images) or any(IMAGE in turn["value"] for turn in turns if turn["from"] != "human"):
        raise BadRow(
            "<image> and pictures differ",
            f"found {markers} <image> in the human turns and {len(images)} pictures; expected as many <image> as "
            "pictures, and none in another turn.",
        )
    images = [os.path.join(image_prefix, image) for image in images]
    row = {name: value for name, value in record.items() if name not in ("image", "images", "conversations")}
    return {**row, "source": source, "images": images, "conversations": turns}


def _read_turn(number: int, turn: object) -> dict:
    if not isinstance(turn, dict) or {key for key in turn if turn[key] is not None} != TURN_KEYS:
        found = f"found turn {number}: {repr(turn)[:80]}"
        raise BadRow("a malformed turn", f"{found}; expected 'from' and 'value' alone.")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        found = f"found turn {number} from {speaker!r}"
        raise BadRow("an unknown speaker", f"{found}; expected one of {', '.join(SPEAKERS)}.")
    if not isinstance(value, str):
        found = f"found turn {number} with a value of type {type(value).__name__}"
        raise BadRow("a malformed turn", f"{found}; expected a string.")
    return {"from": SPEAKERS[speaker], "value": value}


def _read_images(record: dict) -> list[str]:
    image, images = record.get("image"), record.get("images")
    given = images if image is None else image
    if given is None and not any(record[key] for key in record if key.lower() in IMAGE_COLUMNS):
        return []  # a text-only row
    paths = [given] if isinstance(given, str) else given
    both = image is not None and images is not None
    if both or not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        columns = {key: value for key, value in record.items() if key.lower() in IMAGE_COLUMNS}
        raise BadRow(
            "unclear pictures",
            f"found {repr(columns)[:120]}; expected a path or a list of paths in either 'image' or 'images', null or "
            "neither in a text-only row.",
        )
    return paths


def write_row(row: dict) -> dict:
    """The reverse of `read_row`: one picture goes into `image`, several into `images`, none into neither."""
    columns = {name: value for name, value in row.items() if name not in ("images", "conversations")}
    images = row["images"]
    pictures = {} if not images else {"image": images[0]} if len(images) == 1 else {"images": images}
    return {**columns, **pictures, "conversations": row["conversations"]}


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
            markers = LEADING_MARKERS.match(question["value"]).group()
            text = question["value"].removeprefix(markers)
            if "{question}" in chosen:
                text = chosen.replace("{question}", text)
            elif text:
                text = f"{text}\n{chosen}"
            else:  # a picture alone, as in captions
                text = f"\n{chosen}" if markers and not markers.endswith("\n") else chosen
            question = {"from": "human", "value": f"{markers}{text}"}
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
            "unusable choices",
            f"found 'choices': {repr(choices)[:80]} with {len(turns)} turns; expected one question, a list of 2 to 26 "
            "texts and an answer that is one of them.",
        )
    question, answer = turns
    rest = {name: value for name, value in row.items() if name != "choices"}
    for start in range(len(choices)):
        options = choices[start:] + choices[:start]
        lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
        text = "\n".join([question["value"], *lines])
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


def merge_same_image(lines: Iterable[bytes], context: Context) -> Iterator[bytes]:
    """Join the conversations of all rows that have one picture, the same one, and the same system turn.

    The joined row has the first row's columns and stands in the first row's place; only the first question that had
    the picture keeps its `<image>`. Rows with no picture or several pass through.
    """
    numbered = (line[:DIGEST] + b"%0*x" % (POSITION, position) + line[DIGEST:] for position, line in enumerate(lines))
    merged = _merge_groups(sort_lines(numbered, context.folder), context.counts)
    return (line[POSITION:] for line in sort_lines(merged, context.folder))


def image_key(row: dict) -> bytes:
    """What `merge_same_image` wants in front of a line: equal for rows that belong together, `ALONE` for others."""
    if len(row["images"]) != 1:
        return ALONE
    system, _ = _exchanges(row)
    identity = "\0".join([*row["images"], *(turn["value"] for turn in system)])
    return hashlib.blake2b(identity.encode(), digest_size=DIGEST // 2).hexdigest().encode()


def _merge_groups(lines: Iterable[bytes], counts: Counter) -> Iterator[bytes]:
    for digest, group in groupby(lines, key=lambda line: line[:DIGEST]):
        group = (line[DIGEST:] for line in group)
        if digest == ALONE:
            yield from group
        else:
            yield _merge(list(group), counts)


def _merge(lines: list[bytes], counts: Counter) -> bytes:
    if len(lines) == 1:
        return lines[0]
    first, *others = (decode_row(line[POSITION:]) for line in lines)
    for row in others:
        _, exchanges = _exchanges(row)
        for question, answer in exchanges:
            text = MARKER.sub("", question["value"])
            first["conversations"] += [{"from": "human", "value": text}, answer]
    counts["rows joined to one of the same picture"] += len(others)
    return lines[0][:POSITION] + encode_row(first)


def sample(
    lines: Iterable[bytes], context: Context, *, rows: int | None = None, share: int | float | None = None
) -> Iterator[bytes]:
    """Draw exactly `rows` rows, or `share` × the number of rows; the order stays.

    A share over 1 repeats: 2.5 gives every row twice and half of them a third time. Selection sampling (Knuth, The Art
    of Computer Programming, volume 2, algorithm 3.4.2S): two passes over a spooled copy, nothing held in memory.
    """
    with tempfile.TemporaryFile(dir=context.folder) as spool:
        spool.writelines(lines)
        spool.seek(0)
        count = sum(1 for _ in spool)
        if rows is not None and rows > count:
            raise ValueError(
                f"source {context.source}: sample found {count} rows; expected at least {rows}. Ask for fewer, or "
                f"for a share over 1 ({rows / max(count, 1):.4g})."
            )
        wanted = round(share * count) if rows is None else rows
        copies, left = divmod(wanted, count) if count else (0, 0)
        if not copies:
            context.counts["rows not drawn"] += count - left
        spool.seek(0)
        for position, line in enumerate(spool):
            drawn = context.draw(position) * (count - position) < left << 64
            left -= drawn
            for _ in range(copies + drawn):
                yield line


def sort_lines(lines: Iterable[bytes], folder: str) -> Iterator[bytes]:
    """Sort lines of bytes, `RUN_BYTES` in memory at a time, the rest in unnamed files in `folder`."""
    lines, runs = iter(lines), []
    while True:
        run, size = [], 0
        for line in lines:
            run.append(line)
            size += len(line)
            if size >= RUN_BYTES:
                break
        run.sort()
        if size < RUN_BYTES:
            yield from heapq.merge(*runs, run) if runs else run
            return
        runs.append(_spill(run, folder))
        if len(runs) == RUNS_OPEN:
            runs = [_spill(heapq.merge(*runs), folder)]


def _spill(lines: Iterable[bytes], folder: str) -> IO[bytes]:
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as it is read, then it is gone)
    file.writelines(lines)
    file.seek(0)
    return file


def encode_row(row: dict) -> bytes:
    """A row as a line of JSON, in UTF-8."""
    return _encode(row).encode() + b"\n"


def decode_row(line: bytes) -> dict:
    """The reverse of `encode_row`."""
    return _decode(line.decode())


@cache
def load_tokenizer(name: str):
    """The tokenizer in a folder or of a hub id, loaded once a process."""
    return AutoTokenizer.from_pretrained(name)


def count_tokens(tokenizer: str, texts: list[str]) -> list[int]:
    """Tokens of each text without `<image>` and without special tokens; `tokenizer` is a folder or hub id."""
    texts = [MARKER.sub("", text) for text in texts]
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
KEYS = {"merge_same_image": image_key}  # what a stream step wants in front of its lines
STEPS = ROW_STEPS | STREAM_STEPS
