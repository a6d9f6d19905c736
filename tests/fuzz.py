"""Feeds damaged bytes to the two places that read other people's: `load_rows` of a JSON file, and `load_image`.

    python tests/fuzz.py json --seconds 600
    python tests/fuzz.py picture --seconds 600

The inputs are mutations of small valid ones, all from `--seed`. With `--atheris` (`pip install atheris`; nothing else
requires it) libFuzzer makes half of them and keeps those that reach new code. The first input that raises anything but
ValueError, gives other rows when it is read another way, or takes over 10 seconds or 1 GiB ends the run with code 1
and stays in the folder `--found`; `--input FILE` runs it again. tests/collators/test_fuzz.py does the same in short.
"""

import argparse
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--atheris" in sys.argv:  # it must be there before what it watches is imported
    import atheris

    watched = atheris.instrument_imports(include=["PIL", "collators"])
else:
    watched = nullcontext()
with watched:
    import datasets
    import numpy as np
    from PIL import Image, ImageCms

    from collators import llava_json, load_image, load_rows
    from collators.llava import FORMATS
    from collators.llava_json import PictureFolder, parse_row, read_records
    from collators.row_shapes import BadRow, RowReader

SECONDS = 10  # an input may take
MEMORY = 1 << 30  # bytes all of them may take, beside what the libraries and the valid ones took
PIXELS = 1 << 21  # in place of Pillow's 89 million, so that MEMORY holds what may be decoded
MOST_BYTES = 1 << 16  # of an input
LOADED = 16  # one input in so many goes through `load_rows`, which takes a hundred times as long as its reader

# JSON


def try_json(data: bytes, folder: Path) -> None:
    """Read bytes as a `.json` and as a `.jsonl` file in `folder`, in each way.

    Raises:
        AssertionError: Two ways of reading differ. Any other error is one that no caller expects.
    """
    for suffix in (".json", ".jsonl"):
        path = folder / f"rows{suffix}"
        path.write_bytes(data)
        records = _list(lambda path=path: read_records(str(path)))
        with mock.patch.object(llava_json, "BLOCK", 3):
            again = _list(lambda path=path: read_records(str(path)))
        if records is None or again is None:
            continue
        assert [str(record) for record in records] == [str(record) for record in again]
        if suffix == ".json" and not any(isinstance(record, BadRow) for record in records):
            assert records == json.loads(data.decode("utf-8-sig"))
        for placement in ("front", "keep"):
            reader, find = RowReader(placement), PictureFolder(str(folder))
            for record in records:
                with suppress(BadRow):
                    parse_row(record, reader, find)
        if zlib.crc32(data) % LOADED == 0:
            _load(path)


def _list(read: Callable[[], Iterable]) -> list | None:
    try:
        return list(read())
    except ValueError:
        return None


def _load(path: Path) -> None:
    for policy in ("raise", "skip"):
        whole = _list(lambda policy=policy: load_rows(path, on_bad_row=policy))
        shutil.rmtree(datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
        stream = _list(lambda policy=policy: load_rows(path, on_bad_row=policy, streaming=True))
        if policy == "raise" or whole is not None:  # a stream skips more bad rows: it does not know their share
            rows = [
                found and [(row["messages"], row["images"], set(row)) for row in found] for found in (whole, stream)
            ]
            assert rows[0] == rows[1]


def json_seeds() -> list[bytes]:
    """Small valid files with rows of every shape."""
    said = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "Séven. \U0001f642"}]
    parts = [{"type": "image", "index": 0}, {"type": "text", "text": "Which?", "index": None}]
    asked, answered = {"role": "user", "content": parts}, {"role": "assistant", "content": "Seven."}
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"id": 7, "image": "a.png", "conversations": said},
        {"id": "b", "images": ["a.png", "b.png"], "conversations": [said[0] | {"value": "<image><image>"}, said[1]]},
        {"system": "Hi", "messages": [asked | {"content": ""}, answered], "score": 0.5, "tags": ["x", {"y": None}]},
        {"messages": [system, asked, answered], "images": ["a.png"]},
        {"prompt": "Hi", "completion": "Yes"},
        {"prompt": [asked], "completion": [answered], "image": "a.png"},
        {"query": "<image>?", "response": "Two.", "history": [["Hi", "Yes"]], "images": ["b.png"], "objects": {}},
    ]
    lines = ["\n".join([json.dumps(row, ensure_ascii=False)] * 2) for row in rows]
    return [text.encode() for text in [json.dumps([row] * 2) for row in rows] + lines]


JSON_WORDS = rb"""
<image> \ud83d \u0000 \u2028 \ null true NaN -Infinity 1e999 -0 0.1 1E+2 [ ] { } , : " {}, "image": "images":
"messages": "conversations": "system": "tools": "history": "_row":1, "":1, "\u0000":1, "id":[], "id":1.5, "a.b":{},
"_type":{"_type":"Value"}, "dtype":"int64", "a.png" "../a.png" "/" "." "" "http://a/b.png" "a.png\u0000" "type": "text"
""".split()
JSON_WORDS += [b"\xed\xa0\xbd", b"\xef\xbb\xbf", b"\xff", b"\x00", b"\r", b"\n", b"9" * 30, b"9" * 5000]
JSON_WORDS += [b"[" * 5000, b'{"a":' * 5000, b"]" * 5000, b"[]," * 100, b'"' + b"a/" * 3000 + b'"']

# Pictures


def try_picture(data: bytes, folder: Path) -> None:
    """Decode bytes as a picture, from memory and from a file in `folder`.

    Raises:
        AssertionError: The two differ. Any other error is one that no caller expects.
    """
    path = folder / "picture"
    path.write_bytes(data)
    assert _decode(data) == _decode(path)


def _decode(source: bytes | Path) -> tuple[tuple[int, int], bytes] | None:
    try:
        image = load_image(source)
    except ValueError as error:
        assert "the picture cannot be decoded (" in str(error)
        return None
    assert image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height > 0
    return image.size, image.tobytes()


def picture_seeds() -> list[bytes]:
    """Small valid pictures of every format in every mode that Pillow writes, and what may come along with them."""
    ramp = np.arange(15 * 13 * 4, dtype=np.uint8).reshape(15, 13, 4)
    rgba = Image.fromarray(ramp)
    rgb = rgba.convert("RGB")
    modes = [rgb.convert(mode) for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "I", "F")]
    modes += [rgb, rgba, modes[3].convert("PA"), Image.frombytes("LAB", rgb.size, ramp[..., :3].tobytes())]
    modes += [Image.fromarray(ramp[..., 0] * np.uint16(257))]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A], exif[0x9C9B] = 6, "text", 72.0, b"abc"
    exif.get_ifd(0x8769)[0x829A], exif.get_ifd(0x8825)[2] = 0.5, (1.0, 2.0, 3.0)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgba]}
    ways = {name: [{}, {"exif": exif, "xmp": xmp, "icc_profile": icc}, frames] for name in FORMATS}
    ways["MPO"] = [{"save_all": True, "append_images": [rgb.copy()]}]
    ways["GIF"] += [{"interlace": 0, "transparency": 0, "comment": b"c"}]
    ways["JPEG"] += [{"progressive": True}, {"restart_marker_blocks": 1}, {"comment": b"c", "dpi": (9, 9)}]
    ways["JPEG2000"] += [{"no_jp2": True}, {"tile_size": (8, 8), "irreversible": True}, {"num_resolutions": 2}]
    ways["PNG"] += [{"transparency": 0}, {"transparency": b"\0\x80"}, {"interlace": 1}, {"bits": 4}]
    ways["TIFF"] += [{"big_tiff": True}, {"compression": "tiff_lzw", "tiffinfo": {317: 2}}]
    for compression in ("tiff_adobe_deflate", "packbits", "jpeg", "group3", "group4", "zstd", "lzma"):
        ways["TIFF"] += [{"compression": compression}]
    ways["WEBP"] += [{"lossless": True}]
    seeds = {b"P3 1 2 255 1 2 3 4 5 6 ", b"P1 3 1 # c\n1 0 1", b"P2 1 1 65535 9 ", b"Pf 1 1 -1.0 \0\0\0\0"}
    for name, options in ways.items():
        for image in modes:
            for option in options:
                file = io.BytesIO()
                with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # not in this mode
                    image.copy().save(file, name, **option)
                    seeds.add(file.getvalue())
    return sorted(seeds)


PICTURE_WORDS = (
    b"IHDR|IDAT|PLTE|tRNS|eXIf|iCCP|zTXtRaw profile type exif\0\0|acTL|fcTL|fdAT|IEND|\xff\xe1|\xff\xe2ICC_PROFILE\0|"
    b"\xff\xe2MPF\0|\xff\xeeAdobe|\xff\xda|\xff\xd9|\xff\xc2|Exif\0\0|II*\0|MM\0*|II+\0|GIF89a|!\xf9\x04|"
    b"!\xffNETSCAPE2.0|VP8X|VP8L|ALPH|ANMF|EXIF|XMP |ftypavif|ftypavis|ispe|irot|iloc|jp2h|ihdr|pclr|cmap|colr|"
    b"\xff\x4f\xff\x51|P1|P4|P6|Pf|P7|BM|BA|\x28\0\0\0|\x7c\0\0\0|tiff:Orientation='9'|1e9 |-1 "
).split(b"|")


def with_checksums(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have: otherwise a mutation shows no more than a wrong one."""
    made, at = bytearray(data), 8
    while at + 12 <= len(data) and (end := at + 8 + int.from_bytes(data[at : at + 4])) + 4 <= len(data):
        made[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(made)


# Mutations

TARGETS = {"json": (try_json, json_seeds, JSON_WORDS), "picture": (try_picture, picture_seeds, PICTURE_WORDS)}
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, -1)


def mutate(data: bytes, seeds: list[bytes], words: list[bytes], source: random.Random) -> bytes:
    """Damage an input in one to eight places, half of them near its start, where headers are."""
    made = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4, 8))):
        at = source.randrange(min(len(made), source.choice((300, MOST_BYTES))) + 1)
        end = at + source.choice((1, 2, 4, 8, 32, 256))
        way = source.choice(("bit", "field", "insert", "overwrite", "repeat", "delete", "splice", "cut"))
        if way == "bit":
            made[at : at + 1] = bytes(byte ^ 1 << source.randrange(8) for byte in made[at : at + 1])
        elif way == "field":
            form = source.choice((">B", ">H", "<H", ">I", "<I", ">Q", "<Q"))
            size = struct.calcsize(form)
            made[at : at + size] = struct.pack(form, source.choice(NUMBERS) % 256**size)
        elif way == "insert":
            made[at:at] = source.choice(words)
        elif way == "overwrite":
            word = source.choice(words)
            made[at : at + len(word)] = word
        elif way == "repeat":
            made[at:at] = made[at:end] * source.choice((1, 2, 100))
        elif way == "delete":
            del made[at:end]
        elif way == "splice":
            other = source.choice(seeds)
            made[at:] = other[source.randrange(len(other)) :]
        elif source.random() < 0.3:
            del made[at:]
    made = bytes(made[:MOST_BYTES])
    return with_checksums(made) if made.startswith(b"\x89PNG") and source.random() < 0.9 else made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("fuzz_found"), help="folder for an input that breaks")
    parser.add_argument("--input", type=Path, help="try this file alone")
    parser.add_argument("--atheris", action="store_true", help="let coverage choose what is mutated further")
    args = parser.parse_args(argv)

    attempt, make_seeds, words = TARGETS[args.target]
    seeds = make_seeds()
    args.found.mkdir(parents=True, exist_ok=True)
    current = args.found / f"{args.target}_{args.seed}"
    Image.MAX_IMAGE_PIXELS = PIXELS
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    count, start = 0, time.monotonic()

    def try_one(data: bytes) -> None:
        nonlocal count
        count += 1
        current.write_bytes(data)  # first, since a crash of a C library leaves no time
        # Not an alarm: its exception could be taken for one of a picture that cannot be decoded.
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        attempt(data, folder)
        faulthandler.cancel_dump_traceback_later()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        for picture in ("a.png", "b.png"):
            Image.new("RGB", (1, 1)).save(folder / picture)
        for data in seeds:
            try_one(data)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        if args.atheris and not args.input:
            _run_atheris(args, try_one, seeds, words, folder / "corpus")  # ends the process
        source = random.Random(args.seed)
        try:
            if args.input:
                try_one(args.input.read_bytes())
            while not args.input and time.monotonic() - start < args.seconds:
                try_one(mutate(source.choice(seeds), seeds, words, source))
        finally:
            seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{count} inputs in {seconds:.0f} s, {count / seconds:.0f} a second; peak {peak:.0f} MiB", flush=True
            )
    current.unlink()


def _run_atheris(args, try_one: Callable, seeds: list[bytes], words: list[bytes], corpus: Path) -> None:
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def either(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, most)
        return mutate(data, seeds, words, random.Random(seed))[:most]

    options = [f"-max_total_time={args.seconds:.0f}", f"-seed={args.seed + 1}", f"-max_len={MOST_BYTES}"]
    options += ["-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={args.found}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], try_one, custom_mutator=either)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
