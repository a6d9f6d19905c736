"""Writes the rows of a file that can train: repaired where there is one right way, left out otherwise.

A file of its own beside `_doctor.py`: it changes rows, that only looks at them.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from _findings import Findings
from _row_checks import IMAGE_SPELLINGS
from collators import fetch_image, load_image
from collators.llava import BAD_ROW
from collators.llava_json import BrokenList, PictureFolder, parse_row, read_records
from collators.row_shapes import LLAVA, BadRow, RowReader, find_shape

KEY_TYPO = re.compile(r"the key '([^']+)'(?: or '([^']+)')?")


def rename_key(record: dict, error: BadRow) -> str | None:
    """`conversation` → `conversations`, `imgs` → `images`: where the reader itself says which key is meant."""
    found, expected, _ = error.args
    wrong, right = KEY_TYPO.fullmatch(found), KEY_TYPO.fullmatch(expected)
    if not wrong or not right:
        return None
    name = (right[2] or right[1]) if isinstance(record[wrong[1]], list) else right[1]
    record[name] = record.pop(wrong[1])
    return f"renamed {wrong[1]!r} to {name!r}"


def name_speakers(record: dict, error: BadRow) -> str | None:
    """`Human`, ` GPT ` → `human`, `gpt`."""
    changed = []
    turns = record.get(LLAVA.turns)
    for turn in turns if isinstance(turns, list) else []:
        speaker = turn.get(LLAVA.role) if isinstance(turn, dict) else None
        if isinstance(speaker, str) and speaker not in LLAVA.roles and speaker.strip().lower() in LLAVA.roles:
            turn[LLAVA.role] = speaker.strip().lower()
            changed.append(speaker)
    return f"renamed the speakers {sorted(set(changed))}" if changed else None


def drop_last_question(record: dict, error: BadRow) -> str | None:
    """A question at the end that nobody answers trains nothing; one with a picture stays, as a fault."""
    turns = record.get(LLAVA.turns)
    if not (isinstance(turns, list) and len(turns) > 2 and isinstance(turns[-1], dict)):
        return None
    last = turns[-1]
    if last.get(LLAVA.role) not in ("human", "user") or "<image>" in str(last.get(LLAVA.content)):
        return None
    turns.pop()
    return "dropped the last question, which has no answer"


def mark_pictures(record: dict, error: BadRow) -> str | None:
    """`<Image>`, `[image]` → `<image>` in questions, if each picture then has one (which the reader checks)."""
    turns, changed = record.get(LLAVA.turns), []
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict) or turn.get(LLAVA.role) not in ("human", "user"):
            continue
        if isinstance(text := turn.get(LLAVA.content), str):
            changed += [typo for typo in IMAGE_SPELLINGS.findall(text) if typo != "<image>"]
            turn[LLAVA.content] = IMAGE_SPELLINGS.sub("<image>", text)
    return f"wrote <image> for {sorted(set(changed))}" if changed else None


def clear_empty_picture(record: dict, error: BadRow) -> str | None:
    """`"image": ""` → `null`."""
    empty = [name for name in ("image", "images") if record.get(name) == ""]
    for name in empty:
        record[name] = None
    return f"wrote null for the empty {empty[0]!r}" if empty else None


REPAIRS: tuple[Callable[[dict, BadRow], str | None], ...] = (
    rename_key,
    name_speakers,
    drop_last_question,
    mark_pictures,
    clear_empty_picture,
)


def repair(record: object, read: Callable[[dict], object]) -> tuple[object, list[str]]:
    """Repair a row until it can be read.

    Args:
        record: as it stands in the file; not changed.
        read: raises `BadRow` as long as it cannot be.

    Returns:
        The row, and what was done to it.

    Raises:
        BadRow: no repair is known; what is wrong with the row as it stands.
    """
    done: list[str] = []
    candidate = copy.deepcopy(record)
    for _ in range(len(REPAIRS) + 1):
        try:
            read(candidate)
            return candidate, done
        except BadRow as error:
            first = first if done else error  # noqa: F821  (bound by the first round)
            if not isinstance(candidate, dict):
                raise
            step = next((text for change in REPAIRS if (text := change(candidate, error))), None)
            if step is None:
                raise first from None
            done.append(step)
    raise first


def write_fixed(
    source: str, output: Path, find: PictureFolder, placement: str, findings: Findings, usable: set[int]
) -> tuple[int, int, int]:
    """Write the rows of a JSON file that can train, and beside it what was done to the others.

    A row is kept as it stands, repaired where there is one right way (`REPAIRS`), or left out: it cannot be read, a
    picture of it cannot be decoded, it does not fit the limits, or it repeats an earlier row. Nothing is put in its
    place.

    Args:
        source: the JSON or JSONL file that was examined.
        output: a new `.jsonl` file; `<output>.changes.jsonl` gets a line (`row`, `id`, `action`, `reason`) for each
            row that is not as it was.
        find: as of `parse_row`.
        placement: as of `load_rows`.
        findings: of the examination.
        usable: the rows that can train.

    Returns:
        How many rows were kept as they stood, repaired, left out.

    Raises:
        ValueError: `output` is no `.jsonl` file, or is `source`; or `source` is a `.json` list that breaks off.
        FileExistsError: `output` exists.

    Nothing is left behind by an error, a full disk among them.
    """
    if output.suffix != ".jsonl" or output.resolve() == Path(source).resolve():
        raise ValueError(f"--fix {output}: expected the name of a new .jsonl file")
    changes = output.with_name(f"{output.name}.changes.jsonl")
    for path in (output, changes):
        if path.exists():
            raise FileExistsError(f"--fix: {path} exists; pass another name")
    counts = {"kept": 0, "repaired": 0, "left out": 0}
    output.parent.mkdir(parents=True, exist_ok=True)
    # Under other names until they are whole, the rows last.
    partial = {path: path.with_name(f"{path.name}.partial") for path in (changes, output)}
    try:
        with (
            partial[output].open("w", encoding="utf-8") as kept,
            partial[changes].open("w", encoding="utf-8") as changed,
        ):
            for row, record, action, reason in _judge(source, find, placement, findings, usable):
                counts[action] += 1
                if action != "left out":
                    kept.write(json.dumps(record, ensure_ascii=False) + "\n")
                if action != "kept":
                    identity = record.get("id") if isinstance(record, dict) else None
                    line = {"row": row, "id": identity, "action": action, "reason": reason}
                    changed.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        for path, file in partial.items():
            os.replace(file, path)
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)
    return counts["kept"], counts["repaired"], counts["left out"]


def _judge(source, find, placement, findings, usable) -> Iterator[tuple[int, object, str, str]]:
    reader = RowReader(placement)
    # A repaired row must not bring another shape into the file, not even as its first row.
    good = (record for row, record in enumerate(read_records(source)) if row in usable)
    reader.shape = next(map(find_shape, good), None)

    def read(candidate):
        return parse_row(candidate, reader, find)

    for row, record in enumerate(read_records(source)):
        if isinstance(record, BrokenList):
            raise ValueError(f"--fix: {source}, row {row}: {record} What stands behind it would be lost.")
        codes = findings.rows.get((source, row), set())
        if "duplicate-row" in codes:
            yield row, record, "left out", "repeats an earlier row"
        elif row in usable:
            yield row, record, "kept", ""
        elif "unusable-row" not in codes:
            yield row, record, "left out", ", ".join(sorted(codes))
        else:
            try:
                if isinstance(record, BadRow):
                    raise record
                repaired, steps = repair(record, read)
                for picture in read(repaired)[1]:  # no check has looked at it yet
                    load_image(picture, fetch_image if find.allow_remote else None)
            except BAD_ROW as error:
                yield row, record, "left out", str(error)
                continue
            if steps:
                yield row, repaired, "repaired", "; ".join(steps)
            else:  # it reads, but the collator refused it
                yield row, record, "left out", "the collator cannot use it"
