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
from typing import NamedTuple, TextIO

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
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
BLANKS = re.compile(r"[ \t\r\n]*")

CACHE_FORMAT = 4  # part of the cache key: raise it whenever the same file must give other rows than before
ERRORS_SHOWN = 5
MAX_BAD_SHARE = 0.01  # of a dataset's rows, for on_bad_row="skip": with more the data is wrong, not a few rows of it
ROWS_PEEKED = 1000  # that tell a stream its columns, and a file their types unless a later row has others
# Rows are turned into Arrow before Python's garbage collector counts them as old: 1000 at once take 1.6 times as long.
ROWS_AT_ONCE = 100
ROWS_PER_CHUNK = 1000  # as `datasets` writes; opening a file maps some of each chunk into memory
ROWS_OF_PICTURES = 100  # of a Parquet file at once: a row group of 1000 photographs is a gigabyte
BLOCK = 1 << 20  # characters
NUMBER = set("0123456789+-.eE")
MAX_DEPTH = 100  # of lists and objects in a row: Python's stack ends at about 1000, in whatever handles the row later


def load_rows(
    path: str | os.PathLike,
    *,
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    placement: str = "front",
    on_bad_row: str = "raise",
    skipped_rows: str | os.PathLike | None = None,
    allow_external_images: bool = False,
    allow_remote_images: bool = False,
    number_rows: bool = False,
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
        on_bad_row: `"raise"`: rows that cannot be used are an error. `"skip"`: they are left out, unless they are more
            than one in a hundred, and a warning says how many. Of a dataset that passes through the collator judges;
            of a stream nobody knows how many rows there are, so it has no such limit.
        skipped_rows: a file that gets a JSON line (`row`, `id`, `reason`) for each row left out.
        allow_external_images: accept pictures of a JSON file outside of `image_folder` (absolute paths, `..`, symbolic
            links out of it), and datasets that hold paths. Rows from elsewhere could name any file of this machine.
        allow_remote_images: accept URLs in a JSON file, which are fetched when a batch is built.
        number_rows: add the column `_row`, each row's number in the file or split, by which a collator names it. A
            stream of several files has none: several loader workers would each count from 0.

    Raises:
        ValueError: rows that cannot be used (five of them with file, row, found, expected and remedy, and how many
            more; of a dataset up to the thousand rows with the first one); with either `on_bad_row` a list that breaks
            off, since what stands behind is lost; a file that is empty, not UTF-8 or not Parquet; a dataset of no
            known shape, or of paths; an option that `path` cannot have, or a `placement` outside its set.
        FileNotFoundError: there is no such file.
    """
    if placement not in MARKERS:
        raise ValueError(f"placement={placement!r}: expected one of {', '.join(map(repr, MARKERS))}")
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row={on_bad_row!r}: expected 'raise' or 'skip'")
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
        find = PictureFolder(folder, allow_external_images, allow_remote_images)
        source = Source(path, find, placement, on_bad_row == "skip", skipped_rows, number_rows)
        return (_stream_file if streaming else _load_file)(source, split)
    if image_folder is not None:
        raise ValueError(
            f"{path}: found image_folder={os.fspath(image_folder)!r}; expected it with a .json or .jsonl file alone, "
            "since a dataset holds its own pictures. Leave it out, or pass the path of the JSON file."
        )
    source = Source(path, None, placement, on_bad_row == "skip", skipped_rows, number_rows)
    return _load_dataset(source, name, split, streaming, allow_external_images)


class BrokenList(BadRow):
    """A list in a `.json` file that breaks off: what stands behind it, how much nobody knows, cannot be read."""


class PictureFolder:
    """Finds the pictures of a file's rows, in a folder and below, nowhere else unless told.

    Lists each folder once: on a network disk a lookup a picture would take minutes.

    Args:
        folder: where relative paths start.
        allow_external: accept pictures outside of it.
        allow_remote: accept URLs.
    """

    def __init__(self, folder: str, allow_external: bool = False, allow_remote: bool = False):
        self.folder = folder
        self.allow_external = allow_external
        self.allow_remote = allow_remote
        self._listed: dict[str, tuple[dict[str, bool], bool]] = {}
        self._root = os.path.realpath(folder)

    def __call__(self, picture: str) -> str:
        """Return the path (or URL) of a picture that is there.

        Raises:
            BadRow: it is not there, or where it may not be.
        """
        if URL.match(picture):
            if not (self.allow_remote and picture.lower().startswith(("http://", "https://"))):
                raise BadRow(
                    f"the URL {picture[:200]}",
                    "the path of a picture",
                    "Download it and name the file, or pass --allow_remote_images for http and https",
                )
            return picture
        path = os.path.join(self.folder, picture)
        folder, name = os.path.split(path)
        if folder not in self._listed:
            self._listed[folder] = self._list(folder), self._is_inside(folder)
        files, inside = self._listed[folder]
        is_link = files.get(name, True)  # what is not listed may be there: a disk can ignore case
        if name not in files and ("\0" in path or not os.path.isfile(path)):
            raise BadRow(
                f"no picture file at {path}",
                "an existing file",
                f"Correct the path or --image_folder ({self.folder})",
            )
        if not (self.allow_external or (self._is_inside(path) if is_link else inside)):
            raise BadRow(
                f"the picture {path} outside of {self.folder}",
                "pictures in --image_folder",
                "Move it there, name a folder above both, or pass --allow_external_images if you trust the rows",
            )
        return path

    def _list(self, folder: str) -> dict[str, bool]:
        """Names of the files in a folder, and whether each is a link."""
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
        except (OSError, ValueError):
            return {}

    def _is_inside(self, path: str) -> bool:
        if "\0" in path:
            return False
        return os.path.join(os.path.realpath(path), "").startswith(os.path.join(self._root, ""))


class Source(NamedTuple):
    """Rows on disk, and how they are read."""

    path: str
    find: Callable[[str], str] | None  # of a JSON file: looks a picture up, or raises BadRow
    placement: str
    skip: bool
    skipped_rows: str | os.PathLike | None
    number_rows: bool


def _load_file(source: Source, split: str) -> Dataset:
    path, find = source.path, source.find
    stamp = _stamp(path)
    # What is left out depends on what is allowed; where nothing is, what is allowed now is checked below.
    policy = source.skip and (find.allow_external, find.allow_remote)
    cache = _cache_file(Hasher.hash((CACHE_FORMAT, path, find.folder, source.placement, policy, stamp)))
    skipped = cache.with_suffix(".skipped.jsonl")
    with FileLock(f"{cache}.lock"):
        cached = cache.exists()
        if cached and source.skip and not _are_there(cache, find):
            cached = False  # a picture has gone since, so rows have to go
        if not cached:
            partial_file = cache.with_suffix(".partial")
            try:
                left_out = _convert(source, partial_file)
                if source.skip:
                    _write_lines(skipped, left_out)
                if _stamp(path) != stamp:
                    raise ValueError(f"{path}: found that the file changed while it was read. Load it again.")
                os.replace(partial_file, cache)
            finally:
                partial_file.unlink(missing_ok=True)
    split_name = split.partition("[")[0]
    rows = Dataset.from_file(str(cache), split=NamedSplit(split_name))
    if not source.number_rows:
        rows = rows.remove_columns("_row")
    if cached and not source.skip and not _are_there(cache, find):
        for _ in _check(source, {}, rows.features, []):  # a picture has gone since: raises
            pass
    if source.skip:
        _name_skipped(source, skipped.read_text("utf-8").split("\n")[:-1])
    return rows if split == split_name else rows.select(_numbers_in(split, {split_name: len(rows)}))


def _numbers_in(split: str, lengths: dict[str, int]) -> list[int]:
    """Numbers of the rows in a slice such as "train[90%:]"."""
    spans = ReadInstruction.from_spec(split).to_absolute(lengths)
    return [row for span in spans for row in range(span.from_, span.to)]


def _cache_file(key: str) -> Path:
    file = Path(datasets.config.HF_DATASETS_CACHE, "llava_json", f"{key}.arrow")
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _are_there(cache: Path, find: PictureFolder) -> bool:
    """Whether all pictures of a cached file are where they were."""
    images = Dataset.from_file(str(cache)).data["images"]
    try:
        for picture in pc.unique(pc.list_flatten(images)).to_pylist():
            find(picture)
    except BadRow:
        return False
    return True


def _write_lines(path: str | os.PathLike, lines: list[str], mode: str = "w") -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, mode, encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{line}\n" for line in lines)


def _name_skipped(source: Source, lines: list[str]) -> None:
    """Add what `skipped_rows` does not say yet: each slice of a file, and each pass, leaves out the same rows."""
    file = source.skipped_rows
    if file is not None:
        known = set(Path(file).read_text("utf-8").split("\n")) if os.path.exists(file) else set()
        _write_lines(file, [line for line in lines if line not in known], "a")


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


def _stream_file(source: Source, split: str) -> IterableDataset:
    features = _features({name: Json() for name, _ in _peek(source.path)})
    if not source.number_rows:
        del features["_row"]  # here, since removing a column of a stream would change how its `Json` columns read
    kwargs = {"source": source, "features": features}
    return IterableDataset.from_generator(_rows, features=features, gen_kwargs=kwargs, split=NamedSplit(split))


def _convert(source: Source, target: Path) -> list[str]:
    """Check all rows of a file and write them, in one pass if the first rows tell the types of the columns.

    Returns:
        JSON lines of the rows left out.
    """
    types: dict[str, set[type]] = {}
    for name, value in _peek(source.path):
        types.setdefault(name, set()).add(type(value))
    features, skipped = _features_of(types), []
    _write(_check(source, types, features, skipped), features, target)
    if _features_of(types) != features:
        features = _features_of(types)
        _write(_rows(source._replace(skipped_rows=None), features), features, target)
    return skipped


def _check(source: Source, types: dict[str, set[type]], features: Features, skipped: list[str]) -> Iterator[dict]:
    """Parse the whole file and raise one error for its bad rows, or name them in `skipped`.

    Yields rows for as long as there is no bad one (but for those to skip) and `features` has the columns and types
    met, which go into `types`.
    """
    reader = RowReader(source.placement)
    errors, bad, fits = [], 0, True
    for row, record in enumerate(_records(source)):
        try:
            messages, images = parse_row(record, reader, source.find)
        except BadRow as error:
            bad += 1
            if bad <= ERRORS_SHOWN:
                errors.append(_describe(source.path, row, record, error))
            if source.skip:
                skipped.append(_skipped(source.path, row, record, error))
            continue
        columns = {name: record[name] for name in record if name not in reader.shape.columns}
        for name, value in columns.items():
            seen = types.setdefault(name, set())
            if type(value) not in seen:
                seen.add(type(value))
                fits = fits and _column_feature(seen) == features.get(name)
        if fits and (source.skip or not bad):
            yield {"messages": messages, "images": images, "_row": row, **_as_stored(columns, features)}
    if bad and not source.skip:
        raise _cannot_use(bad, f"{row + 1}", errors)
    _refuse_many(bad, row + 1, errors)


def _refuse_many(bad: int, rows: int, errors: list[str]) -> None:
    """Raise if there are too many rows to skip; else say how many are left out."""
    if bad > MAX_BAD_SHARE * rows:
        most = f"That is more than {MAX_BAD_SHARE:.0%} of the rows, the most that on_bad_row='skip' leaves out."
        raise ValueError(f"{_cannot_use(bad, f'{rows}', errors)}\n{most}")
    if bad:
        warnings.warn(f"{bad} of {rows} rows are left out (on_bad_row='skip'): {'; '.join(errors)}", stacklevel=2)


def _skipped(path: str, row: int, record: object, error: BadRow) -> str:
    identity = record.get("id") if isinstance(record, dict) else None
    reason = {"row": row, "id": identity, "reason": f"{path}: {error}"}
    return json.dumps(reason, ensure_ascii=False, default=str)


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
    return Features({"messages": MESSAGES, "images": List(Value("string")), "_row": Value("int64"), **columns})


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


def _rows(source: Source, features: Features):
    path, reader = source.path, RowReader(source.placement)
    for row, record in enumerate(_records(source)):
        try:
            messages, images = parse_row(record, reader, source.find)
        except BadRow as error:
            if not source.skip:
                raise ValueError(_describe(path, row, record, error)) from None
            _name_skipped(source, [_skipped(path, row, record, error)])
            continue
        columns = {name: record[name] for name in record if name not in reader.shape.columns}
        for name in columns.keys() - features.keys():
            warnings.warn(f"{path}: column {name!r} is left out: no row up to {ROWS_PEEKED} has it", stacklevel=2)
            del columns[name]
        number = {"_row": row} if "_row" in features else {}
        yield {"messages": messages, "images": images, **number, **_as_stored(columns, features)}


def _records(source: Source) -> Iterator:
    for record in read_records(source.path):
        if source.skip and isinstance(record, BrokenList):  # skipping it would skip rows that nobody counts
            raise ValueError(f"{source.path}: {record} What stands behind it in the list cannot be read.")
        yield record


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
    text, at, line, opening = _read_block(file, BLOCK), 0, 1, "["
    while True:
        try:
            found = _next_value(text, at, opening, decode)
        except ValueError as error:
            # The text may just end too early. Reading twice as much each time keeps a long row linear.
            more = isinstance(error, json.JSONDecodeError) and _read_block(file, max(BLOCK, len(text) - at))
            if not more and not text.strip() and opening == "[":
                return
            if not more:
                yield _broken_json(line + text.count("\n", 0, getattr(error, "pos", at)), error, BrokenList)
                return
            line += text.count("\n", 0, at)
            text, at = text[at:] + more, 0
            continue
        if found is None:
            end = text.index("]", at) + 1
            if (text[end:] + file.read(BLOCK)).strip():
                error = ValueError("text behind the end of the list")
                yield _broken_json(line + text.count("\n", 0, end), error, BrokenList)
            return
        record, at = found
        yield record
        opening = ","


def _read_block(file: TextIO, size: int) -> str:
    """Text that does not end inside a number, whose first digits would be taken for all of it."""
    text = file.read(size)
    while text[-1:] in NUMBER and (more := file.read(len(text))):
        text += more
    return text


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
    try:
        record, end = decoder.raw_decode(text, at)
        opened = text.count("[", at, end) + text.count("{", at, end)
        too_deep = opened > MAX_DEPTH and _depth(record) > MAX_DEPTH
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"lists or objects nested more than {MAX_DEPTH} deep")
    if text.find("\\ud", at, end) >= 0 or text.find("\\uD", at, end) >= 0:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            record = BadRow(f"half a character, {half}", "whole Unicode characters", "Remove it from the text")
    if isinstance(record, dict) and "\0" in "".join(record):  # Arrow would cut the name there, and lose the values
        record = BadRow(f"the keys {list(record)}", "keys without a NUL character", "Rename the key")
    return record, end


def _depth(record: object) -> int:
    depth, level = 0, [record]
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    return depth


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


def _broken_json(line: int, error: ValueError, kind: type[BadRow] = BadRow) -> BadRow:
    return kind(
        f"broken JSON in line {line}: {getattr(error, 'msg', error)}",
        "a list of objects in a .json file, one object a line in a .jsonl file",
        "Correct the line, or the suffix of the file",
    )


def parse_row(record: object, reader: RowReader, find: Callable[[str], str]) -> tuple[list[dict], list[str]]:
    """Check a row of a JSON file.

    Args:
        record: what `read_records` gave.
        reader: of this file; it knows the shape of the rows before.
        find: makes a picture's path of what the row calls it; raises BadRow (`PictureFolder`).

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
    if "_row" in record:
        raise BadRow("the key '_row'", "keys of your own", "Rename the key: the number of the row gets this name")
    pictures = _parse_pictures(record)
    messages = reader(record, len(pictures))
    return messages, [find(picture) for picture in pictures]


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


def _load_dataset(
    source: Source, name: str | None, split: str, streaming: bool, allow_paths: bool
) -> Dataset | IterableDataset:
    path = source.path
    rows = _open_dataset(path, name, split, streaming)
    features = rows.features.copy()
    try:
        shape = find_shape(features)
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from None
    if _is_plain(features, shape):
        shape = None
    columns = [name for name in ("images", "image") if name in features]
    column = columns[0] if columns else None
    undecoded = _undecoded(dict(features))
    if undecoded != dict(features):
        features.update(undecoded)
        if streaming:
            rows = rows.cast(features)
        else:
            # `cast_column` would write a copy of all pictures to the cache: only the type of the same bytes changes.
            info = rows.info.copy()
            info.features = features
            rows = Dataset(rows.data, info=info, split=rows.split)
    if not allow_paths:
        rows = _without_paths(rows, path, columns)
    if column != "images" or not isinstance(features["images"], List | LargeList):
        images = features.pop(column, Value("string"))
        features["images"] = images if isinstance(images, List | LargeList) else List(images)
        rows = rows.map(partial(_wrap_images, column), remove_columns=column, features=features)
    if source.number_rows:
        rows = _number(rows, path, split)
    return rows if shape is None else _read_messages(rows, shape, source, streaming)


def _without_paths(rows: Dataset | IterableDataset, path: str, columns: list[str]) -> Dataset | IterableDataset:
    """Refuse pictures that are paths, or that have a path in place of bytes.

    The files that `datasets` itself found for an image folder, in its column `image`, have to lie in that folder, or
    come from the hub. A saved dataset could just say that it was one.
    """
    find = None
    if rows.info.builder_name == "imagefolder" and "image" in columns and not _is_saved(path):
        columns = [name for name in columns if name != "image"]
        find = PictureFolder(os.path.abspath(path)) if os.path.isdir(path) else None
    if not isinstance(rows, Dataset):
        return rows.map(partial(_refuse_paths, path, columns, find), features=rows.features)
    for column in columns:
        if any(map(_has_path, rows.data[column].chunks)):
            raise _found_paths(path, column)
    if find is not None:
        for image in rows.data["image"].combine_chunks().field("path").to_pylist():
            _refuse_outside(path, find, image)
    return rows


def _refuse_paths(path: str, columns: list[str], find: Callable[[str], str] | None, row: dict) -> dict:
    for column in columns:
        images = row[column] if isinstance(row[column], list) else [row[column]]
        for image in images:
            if isinstance(image, str) or (isinstance(image, dict) and image.get("path") and not image.get("bytes")):
                raise _found_paths(path, column)
    if find is not None and not row["image"].get("bytes"):
        _refuse_outside(path, find, row["image"]["path"])
    return row


def _refuse_outside(path: str, find: Callable[[str], str], picture: str | None) -> None:
    try:
        if picture is not None:
            find(picture)
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from None


def _has_path(pictures: pa.Array) -> bool:
    """As `_refuse_paths`, without reading a picture."""
    while any(kind(pictures.type) for kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        pictures = pc.list_flatten(pictures)
    if not pa.types.is_struct(pictures.type):
        return not _is_binary(pictures.type) and pictures.null_count < len(pictures)
    fields = {field.name: field.type for field in pictures.type}
    if "path" not in fields:
        return False
    paths = pc.struct_field(pictures, "path")
    if _is_binary(fields.get("bytes")):
        sizes = pc.binary_length(pc.struct_field(pictures, "bytes"))
        paths = paths.filter(pc.fill_null(pc.equal(sizes, 0), True))
    return paths.null_count < len(paths)


def _is_binary(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _found_paths(path: str, column: str) -> ValueError:
    return ValueError(
        f"{path}: found paths in {column!r}; expected the pictures themselves, as bytes. Pass the path of the .json "
        "or .jsonl file, whose folder or --image_folder says where relative paths start, or --allow_external_images "
        "if you trust the rows: their paths then start at the working directory."
    )


def _number(rows: Dataset | IterableDataset, path: str, split: str) -> Dataset | IterableDataset:
    """Add the column `_row`, unless the rows were saved with theirs."""
    if "_row" in rows.features:
        if rows.features["_row"] != Value("int64"):
            raise ValueError(f"{path}: found the column '_row'; expected columns of your own. Rename the column.")
        return rows
    if isinstance(rows, Dataset):
        lengths = {name: info.num_examples for name, info in (rows.info.splits or {}).items()}
        numbers = _numbers_in(split, lengths) if "[" in split else np.arange(len(rows))
        return concatenate_datasets([rows, Dataset.from_dict({"_row": numbers})], axis=1, split=rows.split)
    if rows.num_shards > 1:
        return rows
    features = Features({**rows.features, "_row": Value("int64")})
    return rows.map(_add_number, with_indices=True, features=features)


def _add_number(record: dict, row: int) -> dict:
    return record | {"_row": row}


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
    if not _is_saved(path):
        return load_dataset(path, name, split=split, streaming=streaming)
    rows = load_from_disk(path)
    if "[" in split:
        raise ValueError(f"{path}: found split={split!r}; a saved dataset has no slices. Use `Dataset.select`.")
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(f"{path}: found the splits {list(rows)}; expected {split!r} to be one. Pass its name.")
        rows = rows[split]
    return rows.to_iterable_dataset() if streaming else rows


def _is_saved(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, marker)) for marker in ("state.json", "dataset_dict.json"))


def _read_messages(rows, shape: Shape, source: Source, streaming: bool) -> Dataset | IterableDataset:
    """Put `messages` in place of the columns of another shape. Pictures are neither decoded nor copied."""
    taken = [name for name in rows.features if name in shape.columns - {"image", "images"}]
    reader = RowReader(source.placement)
    if streaming:
        features = {"messages": MESSAGES, **{name: rows.features[name] for name in rows.features if name not in taken}}
        read = partial(_read_row, source, reader)
        rows = rows.map(read, with_indices=True, remove_columns=taken, features=Features(features))
        return rows.filter(_has_messages) if source.skip else rows
    # Their number is all that is needed of the pictures; the rest of the row is not read, nor written once more.
    pictures = pc.fill_null(pc.list_value_length(rows.data["images"]), 0).to_numpy()
    beside = rows.remove_columns(taken)
    texts = rows.select_columns([name for name in rows.features if name in (*taken, "id", *shape.unread)])
    key = Hasher.hash((CACHE_FORMAT, rows._fingerprint, source.placement, source.skip))
    read = texts.map(
        partial(_read_batch, source, reader, pictures),
        batched=True,
        with_indices=True,
        remove_columns=texts.column_names,
        features=Features({"messages": MESSAGES, "skipped": Value("string")}),
        new_fingerprint=key,
        cache_file_name=str(_cache_file(key)),
    )
    usable = pc.is_null(read.data["skipped"]).to_numpy()
    rows = concatenate_datasets([read.remove_columns("skipped"), beside], axis=1, split=rows.split)
    if usable.all():
        return rows
    skipped = pc.drop_null(read.data["skipped"]).to_pylist()
    _refuse_many(len(skipped), len(rows), [json.loads(line)["reason"] for line in skipped[:ERRORS_SHOWN]])
    _name_skipped(source, skipped)
    return rows.select(np.flatnonzero(usable))


def _has_messages(record: dict) -> bool:
    return record["messages"] is not None


def _read_row(source: Source, reader: RowReader, record: dict, row: int) -> dict:
    try:
        return {"messages": reader(record, len(record["images"] or []))}
    except BadRow as error:
        if not source.skip:
            raise ValueError(_describe(source.path, row, record, error)) from None
        _name_skipped(source, [_skipped(source.path, row, record, error)])
        return {"messages": None}


def _read_batch(source: Source, reader: RowReader, pictures: np.ndarray, batch: dict, rows: list[int]) -> dict:
    messages, skipped, errors = [], [], []
    for row, values in zip(rows, zip(*batch.values(), strict=True), strict=True):
        record = dict(zip(batch, values, strict=True))
        try:
            messages.append(reader(record, int(pictures[row])))
            skipped.append(None)
        except BadRow as error:
            messages.append(None)
            skipped.append(_skipped(source.path, row, record, error))
            errors.append(_describe(source.path, row, record, error))
    if errors and not source.skip:
        raise _cannot_use(len(errors), f"the first {rows[-1] + 1}", errors[:ERRORS_SHOWN])
    return {"messages": messages, "skipped": skipped}


def _undecoded(feature):
    """Pictures anywhere in a row stay bytes and path: `datasets` would open each as the row is read."""
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, Image):
        return replace(feature, decode=False)
    return replace(feature, feature=_undecoded(feature.feature)) if isinstance(feature, List | LargeList) else feature


def _wrap_images(column: str | None, row: dict) -> dict:
    images = row[column] if column else None
    return {"images": images if isinstance(images, list) else [] if images is None else [images]}
