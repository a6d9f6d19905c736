"""Rows for a collator, from JSON and JSONL files in LLaVA's or another trainer's shape, and from datasets.

A file is checked row by row when it is first read, then kept as an Arrow file in the cache of `datasets`. Pictures
stay paths (or undecoded bytes) until a collator opens them. What a row's keys mean is in `row_shapes.py`;
docs/data_format.md has the formats and every error.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Json,
    LargeList,
    List,
    NamedSplit,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from filelock import FileLock

from collators.row_shapes import MARKERS, BadRow, RowReader, Shape, find_shape

# Columns that people write instead of `image`; without this list a row would pass as text-only.
PICTURE_TYPOS = {
    *("img", "imgs", "iamge", "imag", "imge", "imges", "pic", "pics", "picture", "pictures", "photo", "photos"),
    *("image_path", "image_paths", "image_file", "image_files", "img_path", "img_paths", "imagepath", "imagepaths"),
}
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
BLANKS = re.compile(r"[ \t\r\n]*")

CACHE_FORMAT = 3  # part of the cache key: raise it whenever the same file must give other rows than before
ERRORS_SHOWN = 5
ROWS_PEEKED = 1000  # that tell a stream its columns, and a file their types unless a later row has others
# Rows are turned into Arrow before Python's garbage collector counts them as old: 1000 at once take 1.6 times as long.
ROWS_AT_ONCE = 100
ROWS_PER_CHUNK = 1000  # as `datasets` writes; opening a file maps some of each chunk into memory
ROWS_OF_PICTURES = 100  # of a Parquet file at once: a row group of 1000 photographs is a gigabyte
BLOCK = 1 << 20  # characters


def load_rows(
    path: str | os.PathLike,
    *,
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    placement: str = "front",
) -> Dataset | IterableDataset:
    """Load training rows with the columns `messages`, `images` and whatever other columns the data has.

    A `.json` file (a list of objects) or a `.jsonl` file (an object a line) holds LLaVA's rows: `conversations` of
    `from`/`value` turns and `image` or `images`, each a path or a list of paths; neither in a text-only row. A row

        {"id": 7, "image": "7.png", "conversations": [{"from": "human", "value": "<image>\\nWhich digit?"},
                                                      {"from": "gpt", "value": "Seven."}]}

    in /data/train.json comes out as

        messages  [{"role": "user", "content": [{"type": "image", "text": None},
                                                {"type": "text", "text": "Which digit?"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "Seven."}]}]
        images    ["/data/7.png"]
        id        7

    The rows may have the shape of another trainer instead, told by their keys, the same in the whole file: `messages`
    with `images` (LLaMA-Factory, ms-swift, TRL), `prompt` and `completion` (TRL), or `query`, `response` and `history`
    (ms-swift). In each, a string in `system` is the system turn. docs/from_other_trainers.md shows them all.

    An image part stands where `<image>` stood; empty text parts are dropped. With `placement="front"` one newline that
    touches a marker belongs to it (the one behind, else the one in front: templates that render pictures first put it
    back); all other text is kept as it is. With `placement="keep"` all text is, so the question above becomes an image
    part and "\\nWhich digit?".

    Other columns keep their values: a column of strings, of integers, of floats or of booleans is stored as that type,
    any other (mixed types, lists, objects) as `datasets.Json`, so that the number 7 and the string "7" stay apart.
    `datasets` reads floats inside a `Json` column to about 15 digits. A key that a row lacks holds None there.

    Without `streaming` all rows of the file are checked and written to the cache of `datasets`, in constant memory,
    and from then on opened from there; it is read twice where a row behind the first 1000 has other columns or types.
    The cache knows the file by path, size and times, so a changed file is read again. Each call looks up whether the
    pictures exist. Of several processes that call at once the first one writes.

    With `streaming` a file, a `.json` list too, is read lazily, in constant memory, as one shard (one loader worker).
    The first 1000 rows give the names of the columns, all of type `datasets.Json`; a column that comes later is left
    out with a warning. A bad row raises when the stream reaches it.

    Anything else is a dataset: a `.parquet` file, a hub id, a folder that `datasets.load_dataset` reads, or one that
    `save_to_disk` wrote. With `messages`, of string or list contents, it passes through; with the columns of another
    shape, or a `system` column, `messages` takes their place, and without `streaming` is kept in the cache. Pictures
    of the type `datasets.Image` arrive undecoded, as {"bytes", "path"}, so that whoever opens a broken one can name
    it, and raw bytes as bytes. A single `image` becomes `images` of one, and a dataset without pictures gets empty
    `images`; without `streaming` both write a copy to the cache.

    Args:
        path: the file, folder or hub id.
        image_folder: for a JSON file; where relative picture paths start. Default: the folder of the file.
        split: the split of a dataset, or a slice such as "train[:90%]". A file is one split under any name and can be
            sliced unless it is streamed; so is a folder saved from a single `Dataset`, which cannot be sliced.
        name: the configuration of a hub dataset.
        streaming: return an `IterableDataset`.
        placement: what the collator is given: `"front"` if pictures go before a turn's text, `"keep"` if they stay
            where they stand in it. Datasets that have `messages` already pass through unchanged with both.

    Raises:
        ValueError: rows that cannot be used (five of them with file, row, found, expected and remedy, and how many
            more; of a dataset up to the thousand rows with the first one); a file that is empty, not UTF-8 or not
            Parquet; a dataset of no known shape, or of paths; an option that `path` cannot have, or a `placement`
            outside its set.
        FileNotFoundError: there is no such file.
    """
    if placement not in MARKERS:
        raise ValueError(f"placement={placement!r}: expected one of {', '.join(map(repr, MARKERS))}")
    path = os.fspath(path)
    is_json = path.lower().endswith((".json", ".jsonl"))
    if is_json or path.lower().endswith(".parquet"):
        if name is not None:
            raise ValueError(f"{path}: found name={name!r}; a file has no configurations. Leave it out.")
        if streaming and "[" in split:
            raise ValueError(f"{path}: found split={split!r}; a stream has no slices. Load it without streaming.")
    elif os.path.isfile(path):
        raise ValueError(
            f"{path}: found a file; expected .json, .jsonl, .parquet, a folder or a hub id. Convert or rename it."
        )
    if is_json:
        path = os.path.abspath(path)
        folder = os.path.abspath(image_folder or os.path.dirname(path))
        return (_stream_file if streaming else _load_file)(path, folder, placement, split)
    if image_folder is not None:
        raise ValueError(
            f"{path}: found image_folder={os.fspath(image_folder)!r}; expected it with a .json or .jsonl file alone, "
            "since a dataset holds its own pictures. Leave it out, or pass the path of the JSON file."
        )
    return _load_dataset(path, name, split, streaming, placement)


def _load_file(path: str, folder: str, placement: str, split: str) -> Dataset:
    stamp = _stamp(path)
    key = Hasher.hash((CACHE_FORMAT, path, folder, placement, stamp))
    cache = _cache_file(key)
    with FileLock(f"{cache}.lock"):
        cached = cache.exists()
        if not cached:
            partial_file = cache.with_suffix(".partial")
            try:
                _convert(path, folder, placement, partial_file)
                if _stamp(path) != stamp:
                    raise ValueError(f"{path}: found that the file changed while it was read. Load it again.")
                os.replace(partial_file, cache)
            finally:
                partial_file.unlink(missing_ok=True)
    split_name = split.partition("[")[0]
    rows = Dataset.from_file(str(cache), split=NamedSplit(split_name))
    if cached:
        is_file = _file_finder()
        if not all(map(is_file, pc.unique(pc.list_flatten(rows.data["images"])).to_pylist())):
            for _ in _check(path, folder, placement, {}, rows.features):  # a picture has gone since: raises
                pass
    if split == split_name:
        return rows
    spans = ReadInstruction.from_spec(split).to_absolute({split_name: len(rows)})
    return rows.select([row for span in spans for row in range(span.from_, span.to)])


def _cache_file(key: str) -> Path:
    file = Path(datasets.config.HF_DATASETS_CACHE, "llava_json", f"{key}.arrow")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _stamp(path: str) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _write(rows: Iterator[dict], features: Features, target: Path) -> None:
    schema = features.arrow_schema
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        tables = (
            pa.Table.from_pylist(batch, schema=schema) for batch in iter(lambda: list(islice(rows, ROWS_AT_ONCE)), [])
        )
        while chunk := list(islice(tables, ROWS_PER_CHUNK // ROWS_AT_ONCE)):
            writer.write_table(pa.concat_tables(chunk).combine_chunks())


def _stream_file(path: str, folder: str, placement: str, split: str) -> IterableDataset:
    features = _features({name: Json() for name, _ in _peek(path)})
    kwargs = {"path": path, "folder": folder, "placement": placement, "features": features}
    return IterableDataset.from_generator(_rows, features=features, gen_kwargs=kwargs, split=NamedSplit(split))


def _convert(path: str, folder: str, placement: str, target: Path) -> None:
    """Check all rows of a file and write them, in one pass if the first rows tell the types of the columns."""
    types: dict[str, set[type]] = {}
    for name, value in _peek(path):
        types.setdefault(name, set()).add(type(value))
    features = _features_of(types)
    _write(_check(path, folder, placement, types, features), features, target)
    if _features_of(types) != features:
        features = _features_of(types)
        _write(_rows(path, folder, placement, features, is_file=bool), features, target)  # bool: all were found


def _check(path: str, folder: str, placement: str, types: dict[str, set[type]], features: Features) -> Iterator[dict]:
    """Parse the whole file and raise one error for its bad rows.

    Yields rows for as long as there is no bad one and `features` has the columns and types met, which go into `types`.
    """
    reader, is_file = RowReader(placement), _file_finder()
    errors, bad, fits = [], 0, True
    for row, record in enumerate(read_records(path)):
        try:
            messages, images = parse_row(record, folder, reader, is_file)
        except BadRow as error:
            bad += 1
            if bad <= ERRORS_SHOWN:
                errors.append(_describe(path, row, record, error))
            continue
        columns = {name: record[name] for name in record if name not in reader.shape.columns}
        for name, value in columns.items():
            seen = types.setdefault(name, set())
            if type(value) not in seen:
                seen.add(type(value))
                fits = fits and _column_feature(seen) == features.get(name)
        if fits and not bad:
            yield {"messages": messages, "images": images, **_as_stored(columns, features)}
    if bad:
        raise _cannot_use(bad, f"{row + 1}", errors)


def _peek(path: str) -> Iterator[tuple[str, object]]:
    """Names and values of the other columns in the first rows. What is wrong with a row is raised when it is read."""
    for record in islice(read_records(path), ROWS_PEEKED):
        if isinstance(record, dict):
            with suppress(BadRow):
                columns = find_shape(record).columns
                yield from ((name, value) for name, value in record.items() if name not in columns)


def _as_stored(columns: dict, features: Features) -> dict:
    # `datasets.Json` would take the string "7" for the number 7: hand it JSON text.
    return {
        name: json.dumps(value, allow_nan=False) if value is not None and isinstance(features[name], Json) else value
        for name, value in columns.items()
    }


def _features_of(types: dict[str, set[type]]) -> Features:
    return _features({name: _column_feature(seen) for name, seen in types.items()})


def _features(columns: dict) -> Features:
    return Features({"messages": MESSAGES, "images": List(Value("string")), **columns})


def _column_feature(types: set[type]):
    types = types - {type(None)}
    simple = {str: "string", int: "int64", float: "float64", bool: "bool"}
    if not types:
        return Value("null")
    return Value(simple[types.pop()]) if len(types) == 1 and types <= simple.keys() else Json()


def _cannot_use(bad: int, rows: str, errors: list[str]) -> ValueError:
    more = [f"and {bad - len(errors)} more"] if bad > len(errors) else []
    return ValueError("\n".join([f"{bad} of {rows} rows cannot be used:", *errors, *more]))


def _describe(path: str, row: int, record: object, error: BadRow) -> str:
    known = isinstance(record, dict) and record.get("id") is not None
    return f"{path}, row {row}" + (f" (id {record['id']!r})" if known else "") + f": {error}"


def _file_finder() -> Callable[[str], bool]:
    """`os.path.isfile` that lists a folder once: on a network disk a lookup a picture would take minutes."""
    listed: dict[str, set[str]] = {}

    def is_file(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = {entry.name for entry in os.scandir(folder) if entry.is_file()}
            except (OSError, ValueError):
                listed[folder] = set()
        return name in listed[folder] or os.path.isfile(path)  # the disk may ignore case where names differ in it

    return is_file


def _rows(path: str, folder: str, placement: str, features: Features, is_file: Callable[[str], bool] = os.path.isfile):
    reader = RowReader(placement)
    for row, record in enumerate(read_records(path)):
        try:
            messages, images = parse_row(record, folder, reader, is_file)
        except BadRow as error:
            raise ValueError(_describe(path, row, record, error)) from None
        columns = {name: record[name] for name in record if name not in reader.shape.columns}
        for name in columns.keys() - features.keys():
            warnings.warn(f"{path}: column {name!r} is left out: no row up to {ROWS_PEEKED} has it", stacklevel=2)
            del columns[name]
        yield {"messages": messages, "images": images, **_as_stored(columns, features)}


def read_records(path: str) -> Iterator:
    """Yield the JSON value of each row, or a `BadRow` where there is none, holding one block of text at a time."""
    read = _read_lines if path.lower().endswith(".jsonl") else _read_list
    # Not a global: `datasets` pickles the globals of a pasted cell, and a decoder cannot be pickled.
    hooks = {"parse_int": _int64, "parse_float": _float64, "parse_constant": _refuse_constant}
    decoder = json.JSONDecoder(**hooks, object_pairs_hook=_refuse_duplicates)
    rows = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for record in read(file, partial(_decode, decoder)):
                rows += 1
                yield record
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, near row {rows}: found {error}; expected UTF-8. Save the file as UTF-8.") from None
    if not rows:
        raise ValueError(f"{path}: found no rows; expected a list of objects (.json) or an object a line (.jsonl).")


def _read_lines(file: TextIO, decode: Callable) -> Iterator:
    for number, line in enumerate(file, 1):
        text = line.strip()
        if not text:
            continue
        try:
            record, end = decode(text, 0)
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
        except ValueError as error:
            record = _broken_json(number, error)
        yield record


def _read_list(file: TextIO, decode: Callable) -> Iterator:
    """Read a list value by value: a file of 1 GB would take several as Python objects."""
    text, at, line, opening = file.read(BLOCK), 0, 1, "["
    while True:
        try:
            found = _next_value(text, at, opening, decode)
        except ValueError as error:
            # The text may just end too early. Reading twice as much each time keeps a long row linear.
            more = isinstance(error, json.JSONDecodeError) and file.read(max(BLOCK, len(text) - at))
            if not more and not text.strip() and opening == "[":
                return
            if not more:
                yield _broken_json(line + text.count("\n", 0, getattr(error, "pos", at)), error)
                return
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
            continue
        if found is None:
            end = text.index("]", at) + 1
            if (text[end:] + file.read(BLOCK)).strip():
                yield _broken_json(line + text.count("\n", 0, end), ValueError("text behind the end of the list"))
            return
        record, at = found
        yield record
        opening = ","


def _next_value(text: str, at: int, opening: str, decode: Callable) -> tuple[object, int] | None:
    """The value behind `opening` ("[" or ",") and where it ends, or None where the list ends instead."""
    at = BLANKS.match(text, at).end()
    if text.startswith(opening, at):
        at = BLANKS.match(text, at + 1).end()
        if opening == "," or not text.startswith("]", at):
            return decode(text, at)
    elif opening == "[" or not text.startswith("]", at):
        raise json.JSONDecodeError(f"Expecting {opening!r}", text, at)
    return None


def _decode(decoder: json.JSONDecoder, text: str, at: int) -> tuple[object, int]:
    record, end = decoder.raw_decode(text, at)
    if text.find("\\ud", at, end) >= 0 or text.find("\\uD", at, end) >= 0:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            record = BadRow(f"half a character, {half}", "whole Unicode characters", "Remove it from the text")
    return record, end


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"one of the keys {[key for key, _ in pairs]} stands twice")
    return record


def _refuse_constant(constant: str):
    raise ValueError(f"{constant} is not JSON (write null)")


def _int64(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"the number {digits} does not fit in 64 bits (write it as a string)")
    return number


def _float64(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits} does not fit in 64 bits (write it as a string)")
    return number


def _broken_json(line: int, error: ValueError) -> BadRow:
    return BadRow(
        f"broken JSON in line {line}: {getattr(error, 'msg', error)}",
        "a list of objects in a .json file, one object a line in a .jsonl file",
        "Correct the line, or the suffix of the file",
    )


def parse_row(
    record: object, folder: str, reader: RowReader, is_file: Callable[[str], bool]
) -> tuple[list[dict], list[str]]:
    """Check a row of a JSON file.

    Args:
        record: what `read_records` gave.
        folder: goes in front of relative picture paths.
        reader: of this file; it knows the shape of the rows before.
        is_file: tells whether a picture is there; `bool` looks none up.

    Returns:
        Its messages and the paths of its pictures.

    Raises:
        BadRow: `load_rows` would refuse the row.
    """
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow(
            f"a row of type {type(record).__name__}",
            "an object",
            "Write one object a row; a file that is one list ends in .json",
        )
    pictures = [os.path.join(folder, picture) for picture in _parse_pictures(record)]
    messages = reader(record, len(pictures))
    for picture in pictures:
        if not is_file(picture):
            raise BadRow(
                f"no picture file at {picture}", "an existing file", f"Correct the path or --image_folder ({folder})"
            )
    return messages, pictures


def _parse_pictures(record: dict) -> list[str]:
    image, images = record.get("image"), record.get("images")
    if image is not None and images is not None:
        raise BadRow("both 'image' and 'images'", "one of them", "Put all pictures of the row in 'images'")
    given = images if image is None else image
    if given is None:
        typos = [key for key in record if key.lower() in PICTURE_TYPOS | {"image", "images"} and record[key]]
        if typos:
            raise BadRow(f"the key {typos[0]!r}", "the key 'image' or 'images'", "Rename the key")
        return []
    pictures = [given] if isinstance(given, str) else given
    if not isinstance(pictures, list) or not all(isinstance(picture, str) and picture for picture in pictures):
        raise BadRow(
            f"{'images' if image is None else 'image'!r}: {repr(given)[:80]}",
            "the path of a picture or a list of paths",
            "Write paths as strings, and null or nothing in a text-only row",
        )
    return pictures


def _load_dataset(path: str, name: str | None, split: str, streaming: bool, placement: str):
    rows = _open_dataset(path, name, split, streaming)
    features = rows.features.copy()
    try:
        shape = find_shape(features)
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from None
    if _is_plain(features, shape):
        shape = None
    column = next((name for name in ("images", "image") if name in features), None)
    if column is not None:
        leaf = getattr(features[column], "feature", features[column])
        if shape is not None and leaf in (Value("string"), Value("large_string")):
            raise ValueError(
                f"{path}: found paths in {column!r}; expected the pictures themselves, as bytes. Pass the path of the "
                ".json or .jsonl file, whose folder or --image_folder says where relative paths start."
            )
        features[column] = _undecoded(features[column])
        if streaming:
            rows = rows.cast_column(column, features[column])
        else:
            # `cast_column` would write a copy of all pictures to the cache: only the type of the same bytes changes.
            info = rows.info.copy()
            info.features = features
            rows = Dataset(rows.data, info=info, split=rows.split)
    if column != "images" or not isinstance(features["images"], List | LargeList):
        images = features.pop(column, Value("string"))
        features["images"] = images if isinstance(images, List | LargeList) else List(images)
        rows = rows.map(partial(_wrap_images, column), remove_columns=column, features=features)
    return rows if shape is None else _read_messages(rows, shape, path, streaming, placement)


def _is_plain(features: Features, shape: Shape) -> bool:
    """Whether the rows are `messages` of roles and contents alone, which need no reading: they are what comes out."""
    turn = getattr(features.get("messages"), "feature", None)
    beside = {"system", *shape.unread} & features.keys()
    return isinstance(turn, dict) and turn.keys() <= {"role", "content"} and not beside


def _open_dataset(path: str, name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    if path.lower().endswith(".parquet"):
        try:
            pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: found no Parquet file ({error}). Write or download it again.") from None
        files = {split.partition("[")[0]: os.path.abspath(path)}
        return load_dataset(
            "parquet",
            data_files=files,
            split=split,
            streaming=streaming,
            batch_size=ROWS_OF_PICTURES,
            # Arrow's read-ahead, on by default, keeps what it read until the file is closed: 2.5 GB of a 2 GB file.
            fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False),
        )
    if not any(os.path.isfile(os.path.join(path, marker)) for marker in ("state.json", "dataset_dict.json")):
        return load_dataset(path, name, split=split, streaming=streaming)
    rows = load_from_disk(path)
    if "[" in split:
        raise ValueError(f"{path}: found split={split!r}; a saved dataset has no slices. Use `Dataset.select`.")
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(f"{path}: found the splits {list(rows)}; expected {split!r} to be one. Pass its name.")
        rows = rows[split]
    return rows.to_iterable_dataset() if streaming else rows


def _read_messages(rows, shape: Shape, path: str, streaming: bool, placement: str) -> Dataset | IterableDataset:
    """Put `messages` in place of the columns of another shape. Pictures are neither decoded nor copied."""
    taken = [name for name in rows.features if name in shape.columns - {"image", "images"}]
    reader = RowReader(placement)
    if streaming:
        features = {"messages": MESSAGES, **{name: rows.features[name] for name in rows.features if name not in taken}}
        read = partial(_read_row, path, reader)
        return rows.map(read, with_indices=True, remove_columns=taken, features=Features(features))
    # Their number is all that is needed of the pictures; the rest of the row is not read, nor written once more.
    pictures = pc.fill_null(pc.list_value_length(rows.data["images"]), 0).to_numpy()
    beside = rows.remove_columns(taken)
    texts = rows.select_columns([name for name in rows.features if name in (*taken, "id", *shape.unread)])
    key = Hasher.hash((CACHE_FORMAT, rows._fingerprint, placement))
    messages = texts.map(
        partial(_read_batch, path, reader, pictures),
        batched=True,
        with_indices=True,
        remove_columns=texts.column_names,
        features=Features({"messages": MESSAGES}),
        new_fingerprint=key,
        cache_file_name=str(_cache_file(key)),
    )
    return concatenate_datasets([messages, beside], axis=1, split=rows.split)


def _read_row(path: str, reader: RowReader, record: dict, row: int) -> dict:
    try:
        return {"messages": reader(record, len(record["images"] or []))}
    except BadRow as error:
        raise ValueError(_describe(path, row, record, error)) from None


def _read_batch(path: str, reader: RowReader, pictures: np.ndarray, batch: dict, rows: list[int]) -> dict:
    messages, errors = [], []
    for row, values in zip(rows, zip(*batch.values(), strict=True), strict=True):
        record = dict(zip(batch, values, strict=True))
        try:
            messages.append(reader(record, int(pictures[row])))
        except BadRow as error:
            errors.append(_describe(path, row, record, error))
    if errors:
        raise _cannot_use(len(errors), f"the first {rows[-1] + 1}", errors[:ERRORS_SHOWN])
    return {"messages": messages}


def _undecoded(feature):
    if isinstance(feature, Image):
        return replace(feature, decode=False)
    return replace(feature, feature=_undecoded(feature.feature)) if isinstance(feature, List | LargeList) else feature


def _wrap_images(column: str | None, row: dict) -> dict:
    images = row[column] if column else None
    return {"images": images if isinstance(images, list) else [] if images is None else [images]}
