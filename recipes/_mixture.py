"""A mixture file, checked, and the streaming run of its sources through their steps.

Here because reading the file, a bounded pool of processes and the account of every row do not fit in a recipe of 120
lines, and because benchmarks and tests run mixtures without the command line. docs/mixture.md is the user's page.
"""

import hashlib
import inspect
import json
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields
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
    ROW_STEPS,
    STEPS,
    STREAM_STEPS,
    Context,
    count_tokens,
    draw,
    encode_row,
    load_tokenizer,
    pack_row,
    read_row,
    sort_records,
    unpack_row,
)
from collators import llava_json, row_shapes
from collators.llava_json import read_records
from collators.row_shapes import BadRow

BAD_ROWS_SHOWN = 5
# 1000 rows at once grow old enough for Python's garbage collector to look through them again and again: 15 % slower.
CHUNK_ROWS = 100
CHUNKS_AHEAD = 8  # a process: enough to keep it busy, few enough to hold memory constant
READ = -1  # the number of the step that checks a row, before those of the mixture file
ROWS_IN, ROWS_OUT, INVALID = "rows_in", "rows_out", "invalid rows: expected "


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
        ValueError: No YAML, a key that stands twice, an unknown key, step or option (the known ones are listed), or a
            value of the wrong type.
        FileNotFoundError: The file or a source's `path` or `image_folder` does not exist.
    """
    try:
        content = yaml.load(Path(path).read_text("utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from None
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


class _Loader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence, and the first list of steps would be gone."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"found the key {twice[0]!r} twice", problem_mark=node.start_mark)
        return node


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
            fits = fits and (isinstance(value, bool) or 0 < value < math.inf)
        elif fits:
            texts = value if isinstance(value, list) else [value]
            fits = texts and all(isinstance(text, str) and IMAGE not in text for text in texts)
        if not fits:
            kind = inspect.formatannotation(wanted)
            expected = f"{kind}; finite numbers above 0, texts without {IMAGE}, lists that are not empty"
            raise ValueError(f"{where}: found {name}: {option}: {value!r}; expected {expected}")
    if name == "sample" and len(options) != 1:
        raise ValueError(f"{where}: found sample: {options!r}; expected either rows or share")
    return name, options


@dataclass
class Account:
    """What became of the rows of a source, or of one chunk of them."""

    steps: defaultdict[int, Counter] = field(default_factory=lambda: defaultdict(Counter))  # by number; see READ
    named: list[str] = field(default_factory=list)  # the first rows that could not be used
    totals: Counter = field(default_factory=Counter)


@dataclass
class Segment:
    """Neighbouring row steps of a source, and what a process needs to run them."""

    source: Source
    steps: list[tuple[int, Callable, dict]]  # number in the source, function, options
    folder: str
    seed: int
    tokenizer: str | None
    place: str  # what its rows are called in errors
    key: Callable[[dict], str] | None = None  # what goes beside each row
    last: bool = False

    def __call__(self, chunk: tuple[int, list]) -> tuple[Account, list]:
        """Run the steps on a chunk: the position of its first row, and records or packed rows."""
        first, items = chunk
        account, made, texts = Account(), [], []
        contexts = [
            Context(self.seed, self.source.name, number, self.folder, self.tokenizer, account.steps[number])
            for number, _, _ in self.steps
        ]
        for position, item in enumerate(items, first):
            record = unpack_row(item) if isinstance(item, bytes) else item
            for row in self._run(record, position, contexts, account):
                if self.last:
                    account.totals["rows"] += 1
                    account.totals["turns"] += len(row["conversations"])
                    account.totals["pictures"] += len(row["images"])
                    texts += [turn["value"] for turn in row["conversations"]] if self.tokenizer else []
                    made.append(encode_row(row))
                else:
                    made.append((self.key(row), pack_row(row)) if self.key else pack_row(row))
        if texts:
            account.totals["tokens"] += sum(count_tokens(self.tokenizer, texts))
        return account, made

    def _run(self, row: object, position: int, contexts: list[Context], account: Account) -> list[dict]:
        rows = [row]
        for (_, step, options), context in zip(self.steps, contexts, strict=True):
            context.counts[ROWS_IN] += len(rows)
            before, rows = rows, []
            for copy, row in enumerate(before):
                context.row = (position, copy)
                try:
                    rows += [*step(row, context, **options)]
                except BadRow as error:
                    known = isinstance(row, dict) and row.get("id") is not None
                    which = f"{position} (id {row['id']!r})" if known else f"{position}"
                    account.named.append(f"{self.source.path}, {self.place} {which}: {error}")
                    context.counts[f"{INVALID}{error.expected}"] += 1
            context.counts[ROWS_OUT] += len(rows)
        return rows


def write_mixture(
    mixture: Mixture,
    output: str | os.PathLike,
    *,
    seed: int = 42,
    tokenizer: str | None = None,
    num_workers: int = 1,
) -> dict:
    """Run every source through its steps and write the rows as one JSONL file.

    The file has the same bytes for any `num_workers`.

    Args:
        mixture: From `load_mixture`.
        output: The file; relative picture paths in it start at its folder, as `load_rows` expects.
        seed: Of all draws, together with a source's name and a row's position.
        tokenizer: Folder or hub id; counts tokens, and `truncate` needs it.
        num_workers: Processes that check rows and run the steps on single rows; 1 means this process alone.

    Returns:
        The summary: `sources` (for each its name, rows read, the first invalid ones, `steps`, reading the first of
        them, with rows in, rows out and what was left out, then rows, turns, pictures and tokens written; tokens is
        None without a tokenizer) and `total`.

    Raises:
        ValueError: Rows that cannot be used in a source without `drop_invalid` (the first five named), a `sample` of
            more rows than there are, `truncate` without a tokenizer, or no row left.
    """
    truncates = [source.name for source in mixture.sources if any(name == "truncate" for name, _ in source.steps)]
    if truncates and tokenizer is None:
        raise ValueError(f"source {truncates[0]}: truncate counts tokens; pass --tokenizer")
    if tokenizer is not None:
        load_tokenizer(tokenizer)  # a wrong name shows now, not after the first sort
    folder = os.path.realpath(Path(output).parent)
    accounts = [Account() for _ in mixture.sources]
    pool = ProcessPoolExecutor(num_workers) if num_workers > 1 else nullcontext()
    with pool as executor, open(output, "wb") as file:
        run = partial(_run_segment, executor, num_workers * CHUNKS_AHEAD)
        lines = chain.from_iterable(
            _run_source(source, account, run, folder, seed, tokenizer)
            for source, account in zip(mixture.sources, accounts, strict=True)
        )
        file.writelines(_shuffle(lines, seed, folder) if mixture.shuffle else lines)
    summary = _summarise(mixture, accounts, tokenizer)
    if not summary["total"]["rows"]:
        raise ValueError(f"no row is left of {summary['total']['rows_read']}; nothing was written")
    return summary


def _run_source(
    source: Source, account: Account, run: Callable, folder: str, seed: int, tokenizer: str | None
) -> Iterator[bytes]:
    make = partial(Segment, source, folder=folder, seed=seed, tokenizer=tokenizer)
    segments = [make([(READ, read_row, {"image_prefix": _image_prefix(source, folder)})], place="row")]
    stream_steps = []
    for number, (name, options) in enumerate(source.steps):
        if name in ROW_STEPS:
            segments[-1].steps.append((number, ROW_STEPS[name], options))
        else:
            stream_steps.append((number, name, options))
            segments[-1].key = KEYS.get(name)
            segments.append(make([], place=f"row behind {name}"))
    segments[-1].last = True

    rows = run(segments[0], track(_read(source), description=source.name), account)
    for (number, name, options), segment in zip(stream_steps, segments[1:], strict=True):
        counts = account.steps[number]
        context = Context(seed, source.name, number, folder, tokenizer, counts)
        rows = STREAM_STEPS[name](_count(rows, counts, ROWS_IN), context, **options)
        rows = run(segment, _count(rows, counts, ROWS_OUT), account)
    yield from rows


def _image_prefix(source: Source, folder: str) -> str:
    # `folder` is a real path: the system follows a link before it takes the ".." behind it. So in `image_folder`.
    start = source.image_folder
    prefix = os.path.relpath(os.path.realpath(start) if os.pardir in Path(start).parts else start, folder)
    return "" if prefix == "." else prefix


def _read(source: Source) -> Iterator:
    for record in read_records(source.path):
        if isinstance(record, BadRow) and source.path.lower().endswith(".json") and "broken JSON" in str(record):
            raise ValueError(f"{source.path}: {record} What stands behind it in the list cannot be read.")
        yield record


def _run_segment(
    executor: ProcessPoolExecutor | None, ahead: int, segment: Segment, items: Iterable, account: Account
) -> Iterator:
    """Run a segment over chunks of rows, in the rows' order, with at most `ahead` chunks in other processes."""
    for part, made in _map_ahead(executor, ahead, segment, _chunks(items)):
        for number, counts in part.steps.items():
            account.steps[number].update(counts)
        account.totals.update(part.totals)
        account.named += part.named[: BAD_ROWS_SHOWN - len(account.named)]
        yield from made
    if account.named and not segment.source.drop_invalid:
        bad = Counter()
        for counts in account.steps.values():
            bad.update({why: count for why, count in counts.items() if why.startswith(INVALID)})
        counted = "; ".join(f"{count} {why.removeprefix('invalid rows: ')}" for why, count in bad.most_common())
        raise ValueError(
            f"source {segment.source.name}: {bad.total()} rows cannot be used ({counted}). Correct them, or set "
            "drop_invalid: true. The first:\n" + "\n".join(account.named)
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


def _count(rows: Iterable, counts: Counter, name: str) -> Iterator:
    for row in rows:
        counts[name] += 1
        yield row


def _shuffle(lines: Iterable[bytes], seed: int, folder: str) -> Iterator[bytes]:
    keyed = ((draw(seed, "shuffle", position), position, line) for position, line in enumerate(lines))
    return (line for _, _, line in sort_records(keyed, folder))


def _summarise(mixture: Mixture, accounts: list[Account], tokenizer: str | None) -> dict:
    sources = []
    for source, account in zip(mixture.sources, accounts, strict=True):
        steps = []
        for number, (name, _) in enumerate([("read", {}), *source.steps], READ):
            left_out = dict(account.steps[number])
            flow = {count: left_out.pop(count, 0) for count in (ROWS_IN, ROWS_OUT)}
            steps.append({"step": name, **flow, "left_out": left_out})
        sources.append(
            {
                "name": source.name,
                "rows_read": steps[0][ROWS_IN],
                "first_invalid": account.named,
                "steps": steps,
                **{name: account.totals[name] for name in ("rows", "turns", "pictures")},
                "tokens": account.totals["tokens"] if tokenizer else None,
            }
        )
    names = ("rows_read", "rows", "turns", "pictures", *(["tokens"] if tokenizer else []))
    total = {name: sum(source[name] for source in sources) for name in names}
    return {"sources": sources, "total": {"tokens": None, **total}}


def stamp(mixture: Mixture, output: str | os.PathLike, *, seed: int, tokenizer: str | None) -> dict:
    """All that the output depends on: settings, and the contents of sources, tokenizer folder and code.

    Two things are not in it: what a hub id stands for, and which pictures exist.
    """
    folder = os.path.realpath(Path(output).parent)
    code = [__file__, *(module.__file__ for module in (_mixture_steps, llava_json, row_shapes))]
    vocabulary = sorted(file for file in Path(tokenizer or os.devnull).rglob("*") if file.is_file())
    return {
        "mixture": json.loads(json.dumps(asdict(mixture))),
        "seed": seed,
        "tokenizer": tokenizer,
        "inputs": [digest(file) for file in (*code, *vocabulary, *(source.path for source in mixture.sources))],
        "image_prefixes": [_image_prefix(source, folder) for source in mixture.sources],
    }


def digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
