"""A mixture file, checked, and the streaming run of its sources through their steps.

Here because reading the file, a bounded pool of processes and the account of every row do not fit in a recipe of 120
lines, and because benchmarks and tests run mixtures without the command line. docs/mixture.md is the user's page.
"""

import hashlib
import inspect
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import get_origin

import yaml
from rich.progress import track

import _mixture_steps
from _mixture_steps import (
    IMAGE,
    KEYS,
    POSITION,
    ROW_STEPS,
    STEPS,
    STREAM_STEPS,
    BadRow,
    Context,
    count_tokens,
    decode_row,
    draw,
    encode_row,
    load_tokenizer,
    read_row,
    sort_lines,
    write_row,
)
from collators.llava_json import read_records

BAD_ROWS_SHOWN = 5
# 1000 rows at once grow old enough for Python's garbage collector to look through them again and again: 15 % slower.
CHUNK_ROWS = 100
CHUNKS_AHEAD = 8  # a process: enough to keep it busy, few enough to hold memory constant
ROWS_IN, ROWS_OUT = "rows_in", "rows_out"


@dataclass
class Source:
    """One entry of `sources` in a mixture file."""

    name: str
    path: str
    image_folder: str
    drop_invalid: bool = False
    steps: list[tuple[str, dict]] = field(default_factory=list)


@dataclass
class Mixture:
    """A mixture file, checked."""

    sources: list[Source]
    shuffle: bool = False


def load_mixture(path: str | os.PathLike) -> Mixture:
    """Read and check a mixture file.

    Args:
        path: YAML with `sources` and, if wanted, `shuffle: true`. Paths in it start at the working directory.

    Raises:
        ValueError: An unknown key, step or option (the known ones are listed), or a value of the wrong type.
        FileNotFoundError: The file or a source's `path` or `image_folder` does not exist.
    """
    content = yaml.safe_load(Path(path).read_text("utf-8"))
    _check_keys(f"{path}", content, Mixture)
    sources = []
    for number, entry in enumerate(content["sources"]):
        where = f"{path}, sources[{number}]"
        entry = _check_keys(where, entry, Source, defaults=("name", "image_folder"))
        entry["steps"] = [_check_step(f"{where}, steps[{at}]", step) for at, step in enumerate(entry.get("steps", []))]
        entry.setdefault("name", Path(entry["path"]).stem)
        entry.setdefault("image_folder", os.path.dirname(entry["path"]) or ".")
        if not entry["path"].lower().endswith((".json", ".jsonl")) or not os.path.isfile(entry["path"]):
            raise FileNotFoundError(f"{where}: no .json or .jsonl file at {entry['path']}")
        if not os.path.isdir(entry["image_folder"]):
            raise FileNotFoundError(f"{where}: no folder at {entry['image_folder']}")
        sources.append(Source(**entry))
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: found the names {names}; expected one or more sources, each with its own name")
    return Mixture(sources, content.get("shuffle", False))


def _check_keys(where: str, found: object, kind: type, defaults: tuple[str, ...] = ()) -> dict:
    known = {key.name: key for key in fields(kind)}
    required = {name for name, key in known.items() if key.default is key.default_factory is MISSING} - {*defaults}
    if not isinstance(found, dict) or found.keys() - known or required - found.keys():
        keys = list(found) if isinstance(found, dict) else repr(found)[:80]
        needed = f"{', '.join(known)}, at least {', '.join(required)}"
        raise ValueError(f"{where}: found {keys}; expected some of the keys {needed}")
    for name, value in found.items():
        wanted = get_origin(known[name].type) or known[name].type
        if not isinstance(value, wanted):
            raise ValueError(f"{where}: found {name}: {value!r}; expected {wanted.__name__}")
    return dict(found)


def _check_step(where: str, step: object) -> tuple[str, dict]:
    named = {step: {}} if isinstance(step, str) else step
    if not isinstance(named, dict) or len(named) != 1 or not named.keys() <= STEPS.keys():
        raise ValueError(f"{where}: found {step!r}; expected one of the steps {', '.join(STEPS)}")
    ((name, options),) = named.items()
    options = {} if options is None else options
    known = {
        option: parameter
        for option, parameter in inspect.signature(STEPS[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    required = {option for option, parameter in known.items() if parameter.default is parameter.empty}
    if not isinstance(options, dict) or options.keys() - known or required - options.keys():
        raise ValueError(f"{where}: found {name}: {options!r}; expected the options {', '.join(known) or 'none'}")
    for option, value in options.items():
        wanted = known[option].annotation
        fits = isinstance(value, wanted) and (isinstance(value, bool) == (wanted is bool))
        if isinstance(value, int | float):
            fits = fits and (isinstance(value, bool) or value > 0)
        elif fits:
            texts = value if isinstance(value, list) else [value]
            fits = texts and all(isinstance(text, str) and IMAGE not in text for text in texts)
        if not fits:
            kind = inspect.formatannotation(wanted)
            expected = f"{kind}; numbers above 0, texts without {IMAGE}, lists that are not empty"
            raise ValueError(f"{where}: found {name}: {option}: {value!r}; expected {expected}")
    if name == "sample" and len(options) != 1:
        raise ValueError(f"{where}: found sample: {options!r}; expected either rows or share")
    return name, options


@dataclass
class Part:
    """What a segment made of one chunk."""

    steps: list[Counter]
    lines: list[bytes] = field(default_factory=list)
    bad: list[tuple[str, str, str]] = field(default_factory=list)  # reason, position and id, message
    totals: Counter = field(default_factory=Counter)


@dataclass
class Segment:
    """Neighbouring row steps of a source, and what a process needs to run them."""

    source: Source
    steps: list[tuple[int, str, dict]]  # number in the source, name, options
    image_prefix: str
    folder: str
    seed: int
    tokenizer: str | None
    key: Callable[[dict], bytes] | None = None  # what goes in front of each line
    last: bool = False

    def __call__(self, chunk: tuple[int, list]) -> Part:
        """Run the steps on a chunk: the position of its first row, and records (not yet read) or encoded rows."""
        first, items = chunk
        part = Part(steps=[Counter() for _ in self.steps])
        contexts = [
            Context(self.seed, self.source.name, number, self.folder, self.tokenizer, counts)
            for (number, _, _), counts in zip(self.steps, part.steps, strict=True)
        ]
        texts = []
        for position, item in enumerate(items, first):
            row = decode_row(item) if isinstance(item, bytes) else item
            try:
                if row is item:
                    row = read_row(item, self.image_prefix, self.source.name)
                rows = self._run(row, position, contexts)
            except BadRow as error:
                known = isinstance(row, dict) and row.get("id") is not None
                reason, message = error.args
                part.bad.append((reason, f"{position} (id {row['id']!r})" if known else f"{position}", message))
                continue
            for row in rows:
                if self.last:
                    part.totals["rows"] += 1
                    part.totals["turns"] += len(row["conversations"])
                    part.totals["pictures"] += len(row["images"])
                    texts += [turn["value"] for turn in row["conversations"]] if self.tokenizer else []
                    row = write_row(row)
                line = encode_row(row)
                part.lines.append(self.key(row) + line if self.key else line)
        if texts:
            part.totals["tokens"] += sum(count_tokens(self.tokenizer, texts))
        return part

    def _run(self, row: dict, position: int, contexts: list[Context]) -> list[dict]:
        rows = [row]
        for (_, name, options), context in zip(self.steps, contexts, strict=True):
            context.counts[ROWS_IN] += len(rows)
            before, rows = rows, []
            for copy, row in enumerate(before):
                context.row = (position, copy)
                rows += STEPS[name](row, context, **options)
            context.counts[ROWS_OUT] += len(rows)
        return rows


@dataclass
class Report:
    """What became of a source."""

    steps: list[Counter]
    invalid: Counter = field(default_factory=Counter)  # rows by reason
    named: list[str] = field(default_factory=list)  # the first of them
    totals: Counter = field(default_factory=Counter)


def write_mixture(
    mixture: Mixture,
    output: str | os.PathLike,
    *,
    seed: int = 42,
    tokenizer: str | None = None,
    num_workers: int = 1,
) -> dict:
    """Run every source through its steps and write the rows as one JSONL file.

    The file has the same bytes for any `num_workers`. It appears under its name when it is complete.

    Args:
        mixture: From `load_mixture`.
        output: The file; relative picture paths in it start at its folder, as `load_rows` expects.
        seed: Of all draws, together with a source's name and a row's position.
        tokenizer: Folder or hub id; counts tokens, and `truncate` needs it.
        num_workers: Processes that check rows and run the steps on single rows; 1 means this process alone.

    Returns:
        The summary: `sources` (for each its name, rows read, `invalid` by reason, `steps` with rows in, rows out and
        what was left out, then rows, turns, pictures and tokens written; tokens is None without a tokenizer) and
        `total`.

    Raises:
        ValueError: Rows that cannot be used in a source without `drop_invalid` (the first five named), a `sample` of
            more rows than there are, `truncate` without a tokenizer, no row left, or the output is a source.
    """
    truncates = [source.name for source in mixture.sources if any(name == "truncate" for name, _ in source.steps)]
    if truncates and tokenizer is None:
        raise ValueError(f"source {truncates[0]}: truncate counts tokens; pass --tokenizer")
    if tokenizer is not None:
        load_tokenizer(tokenizer)  # a wrong name shows now, not after the first sort
    output = Path(output)
    if os.path.realpath(output) in {os.path.realpath(source.path) for source in mixture.sources}:
        raise ValueError(f"{output}: found that the output is also a source; pass another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = os.path.realpath(output.parent)
    partial_file = output.with_name(f"{output.name}.partial")
    reports = [Report([Counter() for _ in source.steps]) for source in mixture.sources]
    pool = ProcessPoolExecutor(num_workers) if num_workers > 1 else nullcontext()
    try:
        with pool as executor, partial_file.open("wb") as file:
            run = partial(_run_segment, executor, num_workers * CHUNKS_AHEAD)
            lines = chain.from_iterable(
                _run_source(source, report, run, folder, seed, tokenizer)
                for source, report in zip(mixture.sources, reports, strict=True)
            )
            file.writelines(_shuffle(lines, seed, folder) if mixture.shuffle else lines)
        summary = _summarise(mixture, reports, tokenizer)
        if not summary["total"]["rows"]:
            raise ValueError(f"{output}: no row is left of {summary['total']['rows_read']}; nothing was written")
        os.replace(partial_file, output)
    finally:
        partial_file.unlink(missing_ok=True)
    return summary


def _run_source(
    source: Source, report: Report, run: Callable, folder: str, seed: int, tokenizer: str | None
) -> Iterator[bytes]:
    segments = [Segment(source, [], _image_prefix(source, folder), folder, seed, tokenizer)]
    stream_steps = []
    for number, (name, options) in enumerate(source.steps):
        if name in ROW_STEPS:
            segments[-1].steps.append((number, name, options))
        else:
            stream_steps.append((number, name, options))
            segments[-1].key = KEYS.get(name)
            segments.append(replace(segments[0], steps=[], key=None))
    segments[-1].last = True

    lines = run(segments[0], track(_read(source, report), description=source.name), report, "row")
    for (number, name, options), segment in zip(stream_steps, segments[1:], strict=True):
        counts = report.steps[number]
        context = Context(seed, source.name, number, folder, tokenizer, counts)
        lines = STREAM_STEPS[name](_count(lines, counts, ROWS_IN), context, **options)
        lines = run(segment, _count(lines, counts, ROWS_OUT), report, f"row behind {name}")
    yield from lines


def _image_prefix(source: Source, folder: str) -> str:
    # `folder` is a real path: the system follows a link before it takes the ".." behind it.
    prefix = os.path.relpath(source.image_folder, folder)
    return "" if prefix == "." else prefix


def _read(source: Source, report: Report) -> Iterator:
    for record in read_records(source.path):
        report.totals["rows_read"] += 1
        if isinstance(record, ValueError):
            if source.path.lower().endswith(".json") and "broken JSON" in str(record):
                raise ValueError(f"{source.path}: {record} What stands behind it in the list cannot be read.")
            record = BadRow("unreadable JSON", str(record))
        yield record


def _run_segment(
    executor: ProcessPoolExecutor | None, ahead: int, segment: Segment, items: Iterable, report: Report, place: str
) -> Iterator[bytes]:
    """Run a segment over chunks of rows, in the rows' order, with at most `ahead` chunks in other processes."""
    source = segment.source
    invalid = 0
    for part in _map_ahead(executor, ahead, segment, _chunks(items)):
        for (number, _, _), counts in zip(segment.steps, part.steps, strict=True):
            report.steps[number].update(counts)
        report.totals.update(part.totals)
        for reason, which, message in part.bad:
            report.invalid[reason] += 1
            if len(report.named) < BAD_ROWS_SHOWN:
                report.named.append(f"{source.path}, {place} {which}: {message}")
        invalid += len(part.bad)
        yield from part.lines
    if invalid and not source.drop_invalid:
        counted = ", ".join(f"{count} {reason}" for reason, count in report.invalid.most_common())
        raise ValueError(
            f"source {source.name}: {invalid} rows cannot be used ({counted}). Correct them, or set "
            "drop_invalid: true. The first:\n" + "\n".join(report.named)
        )


def _chunks(items: Iterable) -> Iterator[tuple[int, list]]:
    items, position = iter(items), 0
    while chunk := list(islice(items, CHUNK_ROWS)):
        yield position, chunk
        position += len(chunk)


def _map_ahead(executor: ProcessPoolExecutor | None, ahead: int, function: Callable, items: Iterable) -> Iterator:
    """`executor.map` takes all of its input at once; this takes `ahead` items more than it has given results."""
    if executor is None:
        yield from map(function, items)
        return
    waiting = deque()
    for item in items:
        waiting.append(executor.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _count(lines: Iterable[bytes], counts: Counter, name: str) -> Iterator[bytes]:
    for line in lines:
        counts[name] += 1
        yield line


def _shuffle(lines: Iterable[bytes], seed: int, folder: str) -> Iterator[bytes]:
    width = 16 + POSITION
    keyed = (
        b"%016x%0*x" % (draw(seed, "shuffle", position), POSITION, position) + line
        for position, line in enumerate(lines)
    )
    return (line[width:] for line in sort_lines(keyed, folder))


def _summarise(mixture: Mixture, reports: list[Report], tokenizer: str | None) -> dict:
    sources = []
    for source, report in zip(mixture.sources, reports, strict=True):
        steps = []
        for (name, _), counts in zip(source.steps, report.steps, strict=True):
            left_out = {reason: count for reason, count in counts.items() if reason not in (ROWS_IN, ROWS_OUT)}
            steps.append({"step": name, ROWS_IN: counts[ROWS_IN], ROWS_OUT: counts[ROWS_OUT], "left_out": left_out})
        sources.append(
            {
                "name": source.name,
                "rows_read": report.totals["rows_read"],
                "invalid": dict(report.invalid),
                "first_invalid": report.named,
                "steps": steps,
                **{name: report.totals[name] for name in ("rows", "turns", "pictures")},
                "tokens": report.totals["tokens"] if tokenizer else None,
            }
        )
    names = ("rows_read", "rows", "turns", "pictures", *(["tokens"] if tokenizer else []))
    total = {name: sum(source[name] for source in sources) for name in names}
    return {"sources": sources, "total": {"tokens": None, **total}}


def stamp(mixture: Mixture, output: str | os.PathLike, *, seed: int, tokenizer: str | None) -> dict:
    """All that the output depends on: settings, code, and path, size, time and both ends of every input."""
    code = b"".join(Path(file).read_bytes() for file in (__file__, _mixture_steps.__file__))
    folder = os.path.realpath(Path(output).parent)
    return {
        "mixture": json.loads(json.dumps(asdict(mixture))),
        "seed": seed,
        "tokenizer": tokenizer,
        "code": hashlib.blake2b(code, digest_size=8).hexdigest(),
        "inputs": [
            [os.path.realpath(source.path), os.stat(source.path).st_mtime_ns, *stamp_content(source.path)]
            for source in mixture.sources
        ],
        "image_prefixes": [_image_prefix(source, folder) for source in mixture.sources],
    }


def stamp_content(path: str | os.PathLike) -> list:
    """The size of a file in bytes and a digest of its first and last MiB."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        ends = file.read(1 << 20)
        file.seek(max(size - (1 << 20), 0))
        ends += file.read()
    return [size, hashlib.blake2b(ends, digest_size=8).hexdigest()]
