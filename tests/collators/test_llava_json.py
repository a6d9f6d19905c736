import io
import json
import multiprocessing
import pickle
import re
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Json, List, Value
from hypothesis import given
from hypothesis import strategies as st

from collators import LlavaDataCollator, llava_json, load_rows, read_row, training_chat_template
from collators.row_shapes import RowReader
from tiny import make_processor, picture

DOCS = Path(__file__).parents[2] / "docs" / "data_format.md"
SOURCE = Path(llava_json.__file__)


def talk(*values, **columns) -> dict:
    speakers = ("human", "gpt") * len(values)
    turns = [{"from": speaker, "value": value} for speaker, value in zip(speakers, values, strict=False)]
    return {"conversations": turns, **columns}


def write(path, rows) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")
    return path


def text(value) -> dict:
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "text": None}
QUESTION = talk("<image>\nWhich?", "Red.", id="r", image="a.png")


# What a row becomes


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_becomes_messages_and_images(folder, suffix, streaming):
    system = {"from": "system", "value": "Be brief."}
    many = talk("Compare <image> with <image>.", "Same.", "Sure?", "Yes.", id="m", images=["a.png", "b.png"])
    many["conversations"].insert(0, system)
    users = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": ""}]
    path = write(folder / f"train{suffix}", [QUESTION, many, {"id": "t", "image": None, "conversations": users}])

    assert list(load_rows(path, streaming=streaming)) == [
        {
            "messages": [
                {"role": "user", "content": [IMAGE, text("Which?")]},
                {"role": "assistant", "content": [text("Red.")]},
            ],
            "images": [f"{folder}/a.png"],
            "id": "r",
        },
        {
            "messages": [
                {"role": "system", "content": [text("Be brief.")]},
                {"role": "user", "content": [text("Compare "), IMAGE, text(" with "), IMAGE, text(".")]},
                {"role": "assistant", "content": [text("Same.")]},
                {"role": "user", "content": [text("Sure?")]},
                {"role": "assistant", "content": [text("Yes.")]},
            ],
            "images": [f"{folder}/a.png", f"{folder}/b.png"],
            "id": "m",
        },
        {
            "messages": [
                {"role": "user", "content": [text("Hi")]},
                {"role": "assistant", "content": [text("")]},
            ],
            "images": [],
            "id": "t",
        },
    ]


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("<image>", [IMAGE]),
        ("<image>\nQ", [IMAGE, text("Q")]),
        ("Q\n<image>", [text("Q"), IMAGE]),
        ("A\n<image>\nB", [text("A\n"), IMAGE, text("B")]),
        ("<image>\n\n Q \n", [IMAGE, text("\n Q \n")]),
        ("<image>\n<image>\nQ", [IMAGE, IMAGE, text("Q")]),
        ("<image><image>", [IMAGE, IMAGE]),
        ("\n<image>\n", [text("\n"), IMAGE]),
        (" no picture\n", [text(" no picture\n")]),
        ("", [text("")]),
    ],
)
def test_text_is_split_at_the_markers(folder, value, content):
    row = talk(value, "Yes.", images=["a.png"] * value.count("<image>"))
    assert load_rows(write(folder / "train.json", [row]))[0]["messages"][0]["content"] == content


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("<image>", [IMAGE]),
        ("<image>\nWhat?", [IMAGE, text("\nWhat?")]),
        ("Image 1: <image>\nWhat?", [text("Image 1: "), IMAGE, text("\nWhat?")]),
        ("Q\n<image>", [text("Q\n"), IMAGE]),
        ("<image>\n<image>\n\n Q \n", [IMAGE, text("\n"), IMAGE, text("\n\n Q \n")]),
        ("<image><image>.", [IMAGE, IMAGE, text(".")]),
        ("", [text("")]),
    ],
)
def test_kept_in_place_the_text_is_verbatim(folder, value, content, streaming):
    row = talk(value, "Yes.\n", images=["a.png"] * value.count("<image>"))
    path = write(folder / "train.json", [row])
    messages = list(load_rows(path, placement="keep", streaming=streaming))[0]["messages"]
    assert messages[0]["content"] == content
    assert messages[1]["content"] == [text("Yes.\n")]


TEXTS = st.lists(st.sampled_from(["<image>", "\n", "word", " ", "é", "<imag"]), max_size=12).map("".join)


def split(value, placement) -> list[dict]:
    return RowReader(placement)._split(value)


def join(content) -> str:
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


@given(TEXTS)
def test_splitting_loses_one_newline_a_marker_and_nothing_else(value):
    content = split(value, "front")
    assert [part["type"] for part in content].count("image") == value.count("<image>")
    assert join(content).replace("\n", "") == value.replace("\n", "")
    touching = len(re.findall(r"<image>\n|\n<image>(?!\n)", value))
    assert join(content).count("\n") == value.count("\n") - touching
    assert value == "" or all(part["text"] != "" for part in content)


@given(TEXTS)
def test_splitting_loses_nothing_of_what_is_kept_in_place(value):
    content = split(value, "keep")
    assert join(content) == value
    assert value == "" or all(part["text"] != "" for part in content)


@given(TEXTS, st.sampled_from(["front", "keep"]))
def test_the_collator_splits_string_contents_the_same(value, placement):
    messages = [{"role": "user", "content": value}, {"role": "assistant", "content": "Yes."}]
    row = {"messages": messages, "images": ["a.png"] * value.count("<image>")}
    content = read_row(row, "<image>", placement=placement)["messages"][0]["content"]
    expected = [{"type": "image"} if part["type"] == "image" else part for part in split(value, placement)]
    if placement == "front":
        expected.sort(key=lambda part: part["type"] != "image")
    assert content == expected


def test_a_placement_is_one_of_two(folder):
    for path in (write(folder / "train.json", [QUESTION]), folder):
        with pytest.raises(ValueError, match="placement='middle': expected one of 'front', 'keep'"):
            load_rows(path, placement="middle")


def test_another_placement_is_another_cache(folder):
    path = write(folder / "train.json", [QUESTION])
    assert [load_rows(path, placement=p)[0]["messages"][0]["content"][1] for p in ("front", "keep", "front")] == [
        text("Which?"), text("\nWhich?"), text("Which?"),
    ]  # fmt: skip


@pytest.mark.parametrize("placement", ["front", "keep"])
def test_messages_pass_through_with_both_placements(tmp_path, placement):
    vsft().save_to_disk(tmp_path / "set")
    assert load_rows(tmp_path / "set", placement=placement)[0] == VSFT_ROW


def test_image_folder_and_absolute_paths(folder, tmp_path):
    rows = [QUESTION, talk("<image>", "Blue.", image=str(folder / "b.png"))]
    path = write(tmp_path / "elsewhere.json", rows)
    assert load_rows(path, image_folder=folder)["images"] == [[f"{folder}/a.png"], [f"{folder}/b.png"]]


def test_the_split_gets_its_name(folder):
    path = write(folder / "train.json", [QUESTION])
    assert load_rows(path, split="validation").split == "validation"
    assert load_rows(path, split="validation", streaming=True).split == "validation"


def test_a_file_can_be_sliced(folder):
    path = write(folder / "train.json", [talk("Q", "A", id=i) for i in range(10)])
    assert load_rows(path, split="train[:90%]")["id"] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert load_rows(path, split="train[90%:]")["id"] == [9]
    assert load_rows(path, split="all_rows[2:4]+all_rows[-1:]")["id"] == [2, 3, 9]
    with pytest.raises(ValueError, match="Unknown split"):
        load_rows(path, split="train[:2]+test[2:]")
    with pytest.raises(ValueError, match=r"found split='train\[:2\]'; a stream has no slices"):
        load_rows(path, split="train[:2]", streaming=True)


# Other columns


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_keep_values_and_types(folder, streaming):
    columns = [
        {
            "id": 7,
            "source": "web",
            "n": 1,
            "score": 0.12345678901234567,
            "box": [0, 0.5],
            "meta": {"a": "1"},
            "none": None,
        },
        {
            "id": "7",
            "source": None,
            "n": 2**63 - 1,
            "score": 2.0,
            "box": [],
            "meta": {"b": [True, None]},
            "none": None,
        },
        {"id": None, "source": "123", "n": -5, "score": -1.0, "box": None, "meta": {}},
        {"id": "é\U0001f600", "source": "null", "n": 0, "score": 1e300, "box": [1, 2], "meta": 1.5, "late": True},
    ]
    rows = load_rows(write(folder / "train.jsonl", [talk("Q", "A", **c) for c in columns]), streaming=streaming)
    read = [{name: row[name] for name in row if name not in ("messages", "images")} for row in rows]
    expected = [{"none": None, "late": None, **c} for c in columns]
    if streaming:  # all columns are Json there, which `datasets` reads to about 15 digits
        expected[0]["score"] = pytest.approx(0.12345678901234567, rel=1e-15)
    assert read == expected
    assert [type(row["id"]) for row in read] == [int, str, type(None), str]
    types = {name: feature for name, feature in rows.features.items() if name not in ("messages", "images")}
    plain = {"source": Value("string"), "n": Value("int64"), "score": Value("float64"), "none": Value("null")}
    assert types == {name: Json() if streaming else plain.get(name, Json()) for name in types} | (
        {} if streaming else {"late": Value("bool")}
    )


def test_a_mixed_column_survives_map_and_save(folder, tmp_path):
    rows = load_rows(write(folder / "train.json", [talk("Q", "A", id=value) for value in (7, "7", None, "x")]))
    rows.map(lambda row: {"length": 1}).save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved")["id"] == [7, "7", None, "x"]


def test_a_column_may_change_behind_the_first_rows(folder):
    """The first 1000 rows say how a file is stored; a later row that does not fit makes it be read once more."""
    path = write(folder / "train.jsonl", [talk("Q", "A", id=i, n=i) for i in range(1000)] + [talk("Q", "A", id="7")])
    rows = load_rows(path)
    assert rows["id"] == [*range(1000), "7"]
    assert rows["n"] == [*range(1000), None]
    assert {name: rows.features[name] for name in ("id", "n")} == {"id": Json(), "n": Value("int64")}


def test_a_bad_row_behind_a_column_that_changed(folder, cache):
    rows = [talk("Q", "A", id=i) for i in range(1000)] + [talk("Q", "A", id="x", late=1), talk("Q", id="y")]
    path = write(folder / "train.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"1 of 1002 rows cannot be used:\n.*row 1001 \(id 'y'\): found the order human"
    ):
        load_rows(path)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_a_stream_leaves_out_a_late_column_with_a_warning(folder):
    path = write(folder / "train.jsonl", [talk("Q", "A", id=i) for i in range(1000)] + [talk("Q", "A", model="x")])
    with pytest.warns(UserWarning, match="column 'model' is left out"):
        rows = list(load_rows(path, streaming=True))
    assert [row["id"] for row in rows] == [*range(1000), None]
    assert "model" not in rows[-1]
    assert load_rows(path)[1000]["model"] == "x"


# Errors


def turns(*pairs) -> dict:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs]}


BAD_ROWS = {
    "conversation": (
        {"conversation": []},
        "found the key 'conversation'; expected the key 'conversations'. Rename the key.",
    ),
    "no conversations": (
        {"id": None, "text": "x"},
        "found the keys ['id', 'text']; expected the keys of one shape ('conversations'; 'messages'; 'prompt' and "
        "'completion'; 'query' and 'response'). Give the row its conversation.",
    ),
    "no near miss": ({"version": 1}, "found the keys ['version', 'id']; expected the keys of one shape"),
    "conversations no list": (
        {"conversations": "hi"},
        "found 'conversations' of type str; expected a list of turns. Put the turns in a list.",
    ),
    "not an object": (
        ["hi"],
        "found a row of type list; expected an object. Write one object a row; a file that is one list ends in .json.",
    ),
    "turn no object": (
        {"conversations": ["hi"]},
        'found turn 0 of type str; expected an object. Write {"from": ..., "value": ...}.',
    ),
    "turn keys": (
        {"conversations": [{"role": "user", "content": "hi"}]},
        "found turn 0 with the keys ['role', 'content']; expected 'from' and 'value' alone. Rename or remove the "
        "keys; what belongs to the whole row may stand beside 'conversations'.",
    ),
    "extra turn key": (
        {"conversations": [{"from": "human", "value": "hi", "loss": False}]},
        "found turn 0 with the keys ['from', 'value', 'loss']; expected 'from' and 'value' alone. Rename or remove",
    ),
    "speaker": (
        turns(("human", "Q"), ("bot", "A")),
        "found turn 1 from 'bot'; expected human or user, gpt or assistant, or system. Rename it.",
    ),
    "number as value": (
        turns(("human", "Q"), ("gpt", 7)),
        "found turn 1 with a value of type int; expected a string. Write the text in quotes.",
    ),
    "null as value": (
        turns(("human", None), ("gpt", "A")),
        "found turn 0 with a value of type NoneType; expected a string. Write the text in quotes.",
    ),
    "two humans": (
        turns(("human", "Q"), ("human", "Q"), ("gpt", "A")),
        "found the order human, human, gpt; expected an optional system turn, then human and gpt in alternation, "
        "human first and gpt last. Remove or merge the turns that break the order.",
    ),
    "no answer": (
        turns(("system", "S"), ("human", "Q")),
        "found the order system, human; expected an optional system",
    ),
    "gpt first": (turns(("gpt", "A"), ("human", "Q")), "found the order gpt, human; expected an optional system"),
    "late system": (
        turns(("human", "Q"), ("system", "S"), ("gpt", "A")),
        "found the order human, system, gpt; expected an optional system",
    ),
    "system alone": (turns(("system", "S")), "found the order system; expected an optional system"),
    "no turns": (turns(), "found the order of no turns; expected an optional system"),
    "marker in an answer": (
        turns(("human", "Q"), ("gpt", "A <image>")),
        "found <image> in turn 1 (gpt); expected <image> in human turns only. Move or remove it.",
    ),
    "marker in a system turn": (
        turns(("system", "<image>"), ("human", "Q"), ("gpt", "A")),
        "in turn 0 (system); expected",
    ),
    "picture without marker": (
        talk("Q", "A", image="a.png"),
        "found 0 <image> in the human turns and 1 in 'image' or 'images'; expected as many <image> as pictures. Write "
        "one <image> where each picture belongs, or name the missing picture.",
    ),
    "marker without picture": (talk("<image>\nQ", "A"), "found 1 <image> in the human turns and 0 in 'image'"),
    "fewer pictures": (talk("<image><image>", "A", image=["a.png"]), "found 2 <image> in the human turns and 1 in"),
    "imgs": (
        talk("<image>", "A", imgs=["a.png"]),
        "found the key 'imgs'; expected the key 'image' or 'images'. Rename the key.",
    ),
    "Image": (talk("Q", "A", Image="a.png"), "found the key 'Image'; expected the key 'image' or 'images'"),
    "both": (
        talk("<image>", "A", image="a.png", images=["a.png"]),
        "found both 'image' and 'images'; expected one of them. Put all pictures of the row in 'images'.",
    ),
    "empty path": (
        talk("Q", "A", image=""),
        "found 'image': ''; expected the path of a picture or a list of paths. Write paths as strings, and null or "
        "nothing in a text-only row.",
    ),
    "path no string": (
        talk("<image>", "A", images=[7]),
        "found 'images': [7]; expected the path of a picture or a list",
    ),
    "missing file": (
        talk("<image>", "A", image="c.png"),
        "found no picture file at {folder}/c.png; expected an existing file. Correct the path or "
        "--image_folder ({folder}).",
    ),
    "folder as picture": (
        talk("<image>", "A", image="../data"),
        "found no picture file at {folder}/../data; expected",
    ),
    "half a pair": (
        talk("Q", "A \ud83d"),
        "found half a character, \\ud83d; expected whole Unicode characters. Remove it from the text.",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(folder, case, streaming):
    row, message = BAD_ROWS[case]
    path = write(folder / "train.jsonl", [QUESTION, row | {"id": "x"} if isinstance(row, dict) else row, QUESTION])
    with pytest.raises(ValueError) as error:
        list(load_rows(path, streaming=streaming))
    if not streaming:
        assert str(error.value).startswith("1 of 3 rows cannot be used:\n")
    message = message.format(folder=folder) if "{folder}" in message else message
    known = isinstance(row, dict) and case != "half a pair"
    assert f"{path}, row 1{' (id {!r})'.format('x') if known else ''}: " in str(error.value)
    assert message in str(error.value)


def test_every_row_error_is_in_the_docs():
    docs = DOCS.read_text(encoding="utf-8")
    expectations = {
        match[1] for _, message in BAD_ROWS.values() if (match := re.search(r"; expected (.+?)\. [A-Z]", message))
    }
    assert len(expectations) == 15
    assert [text for text in expectations if f"| `{text}` |" not in docs] == []


def test_five_bad_rows_are_shown_and_the_rest_counted(folder):
    bad = talk("Q", id=3)
    path = write(folder / "train.json", [QUESTION, *[bad] * 42])
    with pytest.raises(ValueError) as error:
        load_rows(path)
    lines = str(error.value).splitlines()
    assert lines[0] == "42 of 43 rows cannot be used:"
    assert [line.split(":")[0] for line in lines[1:6]] == [f"{path}, row {row} (id 3)" for row in range(1, 6)]
    assert lines[6:] == ["and 37 more"]


def test_different_faults_share_one_error(folder):
    cases = ["conversation", "speaker", "missing file"]
    path = write(folder / "train.json", [BAD_ROWS[case][0] for case in cases])
    with pytest.raises(ValueError) as error:
        load_rows(path)
    assert [re.search(r"found (.{10})", line)[1] for line in str(error.value).splitlines()[1:]] == [
        "the key 'c", "turn 1 fro", "no picture",
    ]  # fmt: skip


ROW = json.dumps(QUESTION)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", f"{ROW}\n\n{ROW[:-5]}\n{ROW}\n", "row 1: found broken JSON in line 3: Unterminated string"),
        ("x.jsonl", f"{ROW} {ROW}\n", "row 0: found broken JSON in line 1: Extra data"),
        ("x.jsonl", "[\n" + ROW + "\n]", "row 0: found broken JSON in line 1: Expecting value"),
        ("x.jsonl", f"[{ROW}]\n", "row 0: found a row of type list; expected an object"),
        ("x.json", f"[\n{ROW},\n{ROW[:-1]}\n]", "row 1: found broken JSON in line 4: Expecting ',' delimiter"),
        ("x.json", f"[{ROW}\n{ROW}]", "row 1: found broken JSON in line 2: Expecting ','"),
        ("x.json", f"[{ROW},]", "row 1: found broken JSON in line 1: Expecting value"),
        ("x.json", f"[{ROW}", "row 1: found broken JSON in line 1: Expecting ','"),
        ("x.json", f"[{ROW}]\n[{ROW}]", "row 1: found broken JSON in line 1: text behind the end of the list"),
        ("x.json", f"{ROW}\n{ROW}\n", "row 0: found broken JSON in line 1: Expecting '['"),
        ("x.json", "[1, null]", "row 0: found a row of type int; expected an object"),
        ("x.json", '[{"id": 1, "id": 2}]', "one of the keys ['id', 'id'] stands twice"),
        ("x.jsonl", '{"score": NaN}', "NaN is not JSON (write null)"),
        ("x.jsonl", '{"hash": 9223372036854775808}', "the number 9223372036854775808 does not fit in 64 bits"),
        ("x.jsonl", '{"box": [0.5, -1e400]}', "the number -1e400 does not fit in 64 bits"),
        ("x.json", "[]", "x.json: found no rows; expected a list of objects (.json) or an object a line (.jsonl)"),
        ("x.json", "\n", "x.json: found no rows; expected"),
        ("x.jsonl", "\n\n", "x.jsonl: found no rows; expected"),
        ("x.jsonl", ROW.encode("utf-16"), "row 0: found 'utf-8' codec can't decode byte 0xff in position 0: "),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(folder, name, content, message, streaming):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        list(load_rows(path, streaming=streaming))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_options_that_cannot_apply(folder):
    with pytest.raises(ValueError, match="found name='en'; a file has no configurations"):
        load_rows(write(folder / "train.json", [QUESTION]), name="en")
    with pytest.raises(ValueError, match="found image_folder='pictures'; expected it with a .json or .jsonl"):
        load_rows(folder, image_folder="pictures")
    with pytest.raises(
        ValueError, match="a.png: found a file; expected .json, .jsonl, .parquet, a folder or a hub id"
    ):
        load_rows(folder / "a.png")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        load_rows(folder / "nowhere.json")


# Reading


def test_a_byte_order_mark_is_skipped(folder):
    path = folder / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([QUESTION]).encode())
    assert load_rows(path)["id"] == ["r"]


@given(
    rows=st.lists(st.none() | st.dictionaries(st.text(max_size=5), st.text() | st.integers(-9, 9), max_size=2)),
    block=st.integers(1, 20),
    indent=st.sampled_from([None, 2]),
)
def test_a_list_is_read_the_same_in_blocks_of_any_size(rows, block, indent):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava_json, "BLOCK", block)
        file = io.StringIO(json.dumps(rows, indent=indent))
        assert list(llava_json._read_list(file, json.JSONDecoder().raw_decode)) == rows


def test_lines_are_counted_across_blocks(folder, monkeypatch):
    monkeypatch.setattr(llava_json, "BLOCK", 10)
    path = folder / "train.json"
    path.write_text(f"[\n{ROW},\n\n{ROW},\n{{broken}}\n]")
    with pytest.raises(ValueError, match="row 2: found broken JSON in line 5: Expecting property name"):
        load_rows(path)


def test_a_stream_reads_no_further_than_it_must(folder):
    path = write(folder / "train.jsonl", [QUESTION] * 3)
    with path.open("a") as file:
        file.write("broken\n")
    stream = iter(load_rows(path, streaming=True))
    assert [next(stream)["id"] for _ in range(3)] == ["r", "r", "r"]
    with pytest.raises(ValueError, match="row 3: found broken JSON in line 4"):
        next(stream)


def test_a_stream_writes_nothing(folder, cache):
    list(load_rows(write(folder / "train.jsonl", [QUESTION]), streaming=True))
    assert not cache.exists()


# The cache


def test_the_second_call_reads_the_cache(folder, cache, monkeypatch):
    path = write(folder / "train.json", [QUESTION])
    first = load_rows(path)
    monkeypatch.setattr(llava_json, "read_records", None)
    again = load_rows(path)
    assert again[:] == first[:]
    assert again.features == first.features
    assert again.cache_files == first.cache_files
    assert [file.suffix for file in cache.iterdir() if file.suffix != ".lock"] == [".arrow"]


def test_a_changed_file_is_read_again(folder):
    path = write(folder / "train.json", [talk("Q", "old")])
    assert load_rows(path)[0]["messages"][1]["content"] == [text("old")]
    write(path, [talk("Q", "new")])
    assert load_rows(path)[0]["messages"][1]["content"] == [text("new")]


def test_another_image_folder_is_another_cache(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    picture("green").save(other / "a.png")
    path = write(folder / "train.json", [QUESTION])
    assert load_rows(path)[0]["images"] == [f"{folder}/a.png"]
    assert load_rows(path, image_folder=other)[0]["images"] == [f"{other}/a.png"]


def test_a_picture_that_has_gone_is_missed_in_a_cached_file_too(folder):
    path = write(folder / "train.json", [talk("Q", "A"), QUESTION])
    load_rows(path)
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"row 1 \(id 'r'\): found no picture file at .*a.png"):
        load_rows(path)


def test_bad_rows_leave_no_cache(folder, cache):
    path = write(folder / "train.json", [{"conversation": []}])
    for _ in range(2):
        with pytest.raises(ValueError, match="'conversation'"):
            load_rows(path)
    assert not list(cache.glob("*.arrow"))


def test_a_file_that_changes_while_it_is_read_is_refused(folder, monkeypatch, cache):
    path = write(folder / "train.json", [QUESTION])
    check = llava_json._check

    def check_then_change(*args):
        features = check(*args)
        write(path, [QUESTION, QUESTION])
        return features

    monkeypatch.setattr(llava_json, "_check", check_then_change)
    with pytest.raises(ValueError, match="the file changed while it was read"):
        load_rows(path)
    assert not list(cache.glob("*.arrow"))


def load_in_child(path, cache, start, results):
    datasets.config.HF_DATASETS_CACHE = cache
    written = []
    write_rows = llava_json._write
    llava_json._write = lambda *args: (written.append(1), write_rows(*args))
    start.wait(timeout=60)
    results.put((len(written), load_rows(path)["id"], len(written)))


def test_of_several_processes_one_writes(folder, tmp_path):
    path = write(folder / "train.json", [QUESTION | {"id": i} for i in range(2000)])
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    children = [
        context.Process(target=load_in_child, args=(path, tmp_path / "cache", start, results)) for _ in range(3)
    ]
    for child in children:
        child.start()
    loaded = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert [ids for _, ids, _ in loaded] == [list(range(2000))] * 3
    assert sorted(after for _, _, after in loaded) == [0, 0, 1]


# Datasets that have messages


def encoded(color="red") -> bytes:
    buffer = io.BytesIO()
    picture(color).save(buffer, "PNG")
    return buffer.getvalue()


PART = {"index": Value("int64"), "text": Value("string"), "type": Value("string")}
MESSAGES = List({"content": List(PART), "role": Value("string")})
VSFT = Features({"messages": MESSAGES, "images": List(Image()), "source": Value("string")})
VSFT_ROW = {
    "messages": [
        {
            "content": [
                {"index": None, "text": "Which?\n", "type": "text"},
                {"index": 0, "text": None, "type": "image"},
            ],
            "role": "user",
        },
        {"content": [{"index": None, "text": "Red.", "type": "text"}], "role": "assistant"},
    ],
    "images": [{"bytes": encoded(), "path": None}],
    "source": "web",
}


def vsft() -> Dataset:
    """Rows in the layout of HuggingFaceH4/llava-instruct-mix-vsft."""
    broken = VSFT_ROW | {"images": [{"bytes": b"no picture", "path": "broken.png"}]}
    return Dataset.from_list([VSFT_ROW, broken], features=VSFT)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["parquet", "saved", "saved dict"])
def test_messages_pass_through_with_undecoded_pictures(tmp_path, layout, streaming):
    path = tmp_path / "set"
    if layout == "parquet":
        path.mkdir()
        vsft().to_parquet(path / "train.parquet")
    else:
        (vsft() if layout == "saved" else DatasetDict(train=vsft(), test=vsft().select([1]))).save_to_disk(path)
    rows = load_rows(path, streaming=streaming)
    assert list(rows) == [VSFT_ROW, VSFT_ROW | {"images": [{"bytes": b"no picture", "path": "broken.png"}]}]
    assert rows.features == VSFT | {"images": List(Image(decode=False))}
    if layout == "saved dict":
        assert len(list(load_rows(path, split="test", streaming=streaming))) == 1
        with pytest.raises(ValueError, match=r"found the splits \['train', 'test'\]; expected 'val' to be one"):
            load_rows(path, split="val", streaming=streaming)
        with pytest.raises(ValueError, match="a saved dataset has no slices"):
            load_rows(path, split="train[:1]", streaming=streaming)


def test_undecoded_pictures_are_not_copied(tmp_path):
    vsft().save_to_disk(tmp_path / "set")
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert load_rows(tmp_path / "set")[0]["images"] == VSFT_ROW["images"]
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_slice_of_a_split(tmp_path):
    (tmp_path / "set").mkdir()
    vsft().to_parquet(tmp_path / "set" / "train.parquet")
    rows = load_rows(tmp_path / "set", split="train[1:]")
    assert rows["images"] == [[{"bytes": b"no picture", "path": "broken.png"}]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_single_image_becomes_images_of_one(tmp_path, streaming):
    features = Features({"messages": MESSAGES, "image": Image(), "source": Value("string")})
    rows = [{"messages": [], "source": "web", "image": image} for image in (VSFT_ROW["images"][0], None)]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    rows = load_rows(tmp_path / "set", streaming=streaming)
    assert rows.features == {
        "messages": MESSAGES, "source": Value("string"), "images": List(Image(decode=False)),
    }  # fmt: skip
    assert [row["images"] for row in rows] == [VSFT_ROW["images"], []]
    assert [row["source"] for row in rows] == ["web", "web"]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_folder_with_metadata(folder, streaming):
    talk_ = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Red."}]
    write(folder / "metadata.jsonl", [{"file_name": name, "messages": talk_} for name in ("a.png", "b.png")])
    rows = list(load_rows(folder, streaming=streaming))
    assert [row["messages"] for row in rows] == [talk_, talk_]
    assert [Path(row["images"][0]["path"]).name for row in rows] == ["a.png", "b.png"]


@pytest.mark.parametrize("streaming", [False, True])
def test_string_contents_and_no_pictures(folder, tmp_path, streaming):
    (tmp_path / "set").mkdir()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write(tmp_path / "set" / "train.jsonl", [{"messages": messages, "id": 1}])
    rows = load_rows(tmp_path / "set", streaming=streaming)
    assert list(rows) == [{"messages": messages, "id": 1, "images": []}]
    assert rows.features["images"] == List(Value("string"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_no_shape_is_refused(tmp_path, streaming):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [{"text": "Q"}])
    with pytest.raises(ValueError, match=r"set: found the keys \['text'\]; expected the keys of one shape"):
        load_rows(tmp_path / "set", streaming=streaming)


# Into a batch


def make_collator() -> LlavaDataCollator:
    processor = make_processor()
    return LlavaDataCollator(processor, chat_template=training_chat_template(processor))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_go_through_the_collator(folder, streaming):
    path = write(folder / "train.json", [QUESTION, talk("Hi", "Ho", id=2)])
    rows = load_rows(path, streaming=streaming)
    batch = make_collator()(list(rows))
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


def test_the_file_works_pasted_into_an_empty_namespace(folder):
    namespace = {}
    exec(SOURCE.read_text(encoding="utf-8"), namespace)
    path = write(folder / "train.json", [QUESTION])
    assert list(namespace["load_rows"](path)) == list(load_rows(path))
    assert list(namespace["load_rows"](path, streaming=True)) == list(load_rows(path))


# The documentation


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("suffix", "content"), [(s, block) for s in ("json", "jsonl") for block in blocks(s)])
def test_the_documented_files_load(tmp_path, suffix, content, streaming):
    (tmp_path / "pictures").mkdir()
    for name in ("digit-1.png", "digit-2.png"):
        picture().save(tmp_path / "pictures" / name)
    (tmp_path / f"train.{suffix}").write_text(content)
    records = json.loads(content) if suffix == "json" else [json.loads(line) for line in content.splitlines()]
    rows = list(load_rows(tmp_path / f"train.{suffix}", streaming=streaming))
    assert len(rows) == len(records) > 0
    assert [row.get("id") for row in rows] == [record.get("id") for record in records]


def test_the_documented_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "my_data"
    (data / "pictures").mkdir(parents=True)
    for name in ("digit-1.png", "digit-2.png"):
        picture().save(data / "pictures" / name)
    (data / "train.json").write_text(blocks("json")[0])
    # A local folder stands in for the hub: `load_dataset` prefers it.
    hub = tmp_path / "HuggingFaceH4" / "llava-instruct-mix-vsft"
    hub.mkdir(parents=True)
    vsft().remove_columns("source").to_parquet(hub / "train.parquet")

    namespace = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert next(iter(namespace["stream"]))["images"] == VSFT_ROW["images"]
    assert [row["images"] for row in namespace["mixed"]] == [
        VSFT_ROW["images"],
        [{"bytes": b"no picture", "path": "broken.png"}],
        [{"bytes": None, "path": str(data / "pictures" / "digit-1.png")}],
        [{"bytes": None, "path": str(data / "pictures" / "digit-2.png")}],
    ]
    assert make_collator()([namespace["mixed"][0], namespace["mixed"][2]])["pixel_values"].shape[0] == 2
