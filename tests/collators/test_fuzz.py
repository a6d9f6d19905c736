"""What tests/fuzz.py does for hours, on a few hundred inputs; and whatever it once found, as a literal case."""

import io
import json
import random
import struct
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import fuzz
from collators import llava_json, load_image, load_rows
from collators.llava_json import read_records
from tiny import picture

JSON_SEEDS, PICTURE_SEEDS = fuzz.json_seeds(), fuzz.picture_seeds()
seeds = st.integers(0, 2**64 - 1)


def examples(count: int):
    # The folder that all examples share holds one file, which each writes anew.
    shared = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=shared)


@given(seeds)
@examples(1500)
def test_damaged_files(folder, seed):
    source = random.Random(seed)
    fuzz.try_json(fuzz.mutate(source.choice(JSON_SEEDS), JSON_SEEDS, fuzz.JSON_WORDS, source), folder)


KEYS = [
    "conversations",
    "messages",
    "prompt",
    "completion",
    "query",
    "response",
    "history",
    "image",
    "images",
    "system",
]
KEYS += ["tools", "objects", "videos", "id", "_row", "from", "value", "role", "content", "type", "text", "index"]


def objects(values):
    """Rows and turns, with keys that mean something and whatever values."""
    said = st.sampled_from(["human", "gpt", "user", "assistant", "system", "<image>", "a.png", "text", "image", ""])
    return st.dictionaries(st.sampled_from(KEYS), values | said, max_size=4)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | objects(inner), max_leaves=12)


@given(st.lists(objects(values), min_size=1, max_size=3))
@examples(600)
def test_rows_of_any_values(folder, rows):
    for data in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        fuzz.try_json(data.encode(), folder)


@pytest.mark.filterwarnings("ignore")
@given(seeds)
@examples(3000)
def test_damaged_pictures(folder, seed):
    source = random.Random(seed)
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", fuzz.PIXELS):
        fuzz.try_picture(fuzz.mutate(source.choice(PICTURE_SEEDS), PICTURE_SEEDS, fuzz.PICTURE_WORDS, source), folder)


@pytest.mark.filterwarnings("ignore")
def test_the_undamaged_ones_are_of_every_kind():
    """Or the tests above would try nothing."""
    formats = {Image.open(io.BytesIO(data)).format for data in PICTURE_SEEDS}
    assert formats == {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
    for data in PICTURE_SEEDS:
        load_image(data)


# Found so far


def write(folder, text: str, suffix: str = ".json"):
    path = folder / f"rows{suffix}"
    path.write_text(text, encoding="utf-8")
    return path


ROW = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("deep", [101, 900, 100_000])
def test_lists_in_lists_without_end(folder, suffix, deep, streaming):
    """Python's stack ended in `json`, or in whatever read the row later."""
    row = '{"tags": ' + "[" * (deep - 1) + "]" * (deep - 1) + "," + json.dumps(ROW)[1:]
    path = write(folder, f"[{row}]" if suffix == ".json" else row, suffix)
    with pytest.raises(ValueError, match="broken JSON in line 1: lists or objects nested more than 100 deep"):
        list(load_rows(path, streaming=streaming))
    nested = write(folder, json.dumps([{"tags": json.loads("[" * 99 + "]" * 99), **ROW}]))
    assert list(load_rows(nested, streaming=streaming))[0]["tags"] == json.loads("[" * 99 + "]" * 99)


def test_a_number_at_the_end_of_a_block_of_the_file(folder):
    """What was read of it so far was taken for all of it: 12 for 1234, and too large an integer for 1e20 in digits."""
    path = write(folder, '[1234, {"score": 100000000000000000000.5, "id": -12}, 5.5e3, [7]]')
    for block in range(1, 40):
        with mock.patch.object(llava_json, "BLOCK", block):
            assert list(read_records(str(path))) == [1234, {"score": 1e20, "id": -12}, 5500.0, [7]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_key_that_arrow_would_cut(folder, streaming):
    """Its values were lost, or went to the column of the first half."""
    path = write(folder, json.dumps([{"a\0b": 1, **ROW}]))
    with pytest.raises(
        ValueError, match=r"row 0: found the keys \['a\\x00b', 'conversations'\]; expected keys without"
    ):
        list(load_rows(path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("end", [", {broken, ", '] and more"'])
def test_a_list_that_breaks_off_is_never_skipped(folder, end, streaming):
    """One bad row of 201 it was, and who knows how many behind it were lost with it."""
    path = write(folder, f"[{', '.join([json.dumps(ROW)] * 200)}{end}{', '.join([json.dumps(ROW)] * 200)}]")
    with pytest.raises(ValueError, match="rows.json: found broken JSON in line 1: .* in the list cannot be read"):
        list(load_rows(path, streaming=streaming, on_bad_row="skip"))


def exif(*entries: bytes, behind: bytes = b"") -> bytes:
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4) + behind


TURNED = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # a quarter, so that a picture of 3 × 2 pixels is one of 2 × 3
RATIONAL_TEXT = struct.pack(">HHII", 0x010E, 5, 1, 38)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_what_pillow_cannot_write_into_an_exif_block_again(fmt):
    """AttributeError: the description is a fraction. The orientation beside it is whole."""
    file = io.BytesIO()
    picture(size=(3, 2)).save(file, fmt, exif=exif(RATIONAL_TEXT, TURNED, behind=struct.pack(">II", 1, 2)))
    assert load_image(file.getvalue()).size == (2, 3)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_a_picture_whose_exif_block_cannot_be_read_is_upright(fmt):
    file = io.BytesIO()
    picture(size=(3, 2)).save(file, fmt, exif=b"Exif\0\0XX\0*" + exif(TURNED)[10:])
    with pytest.warns(UserWarning, match="a.png: its EXIF block cannot be read .not a TIFF file .* taken as upright"):
        image = load_image({"bytes": file.getvalue(), "path": "a.png"})
    assert image.size == (3, 2) and image.getpixel((0, 0))[0] > 200


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\1jp2h" + (1 << 62).to_bytes(8),  # a box of 4 EiB
        b"II+\0\x08\0\0\0" + (1 << 62).to_bytes(8, "little"),  # a directory that far behind
    ],
    ids=["JPEG2000", "TIFF"],
)
@pytest.mark.filterwarnings("ignore")
def test_sizes_and_places_that_no_file_has(folder, data):
    """Asked of an open file they were MemoryError, and an OSError with a number as of a broken disk."""
    (folder / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="a.png: the picture cannot be decoded"):
        load_image(folder / "a.png")


def test_a_device_is_no_picture():
    with pytest.raises(ValueError, match="/dev/zero: the picture cannot be decoded .not a file"):
        load_image("/dev/zero")
