"""Rows as other trainers write them, through `load_rows` and the collator."""

import io
import json
import os
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value

from collators import LlavaDataCollator, load_rows, row_shapes, training_chat_template
from tiny import make_processor, picture

DOCS = Path(__file__).parents[2] / "docs" / "from_other_trainers.md"
SOURCE = Path(row_shapes.__file__)


def write(path, rows) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")
    return path


def encoded(color="red") -> bytes:
    buffer = io.BytesIO()
    picture(color).save(buffer, "PNG")
    return buffer.getvalue()


def text(value) -> dict:
    return {"type": "text", "text": value}


def turn(role, *content) -> dict:
    return {"role": role, "content": list(content)}


def chat(*contents) -> list[dict]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def talk(*values) -> list[dict]:
    speakers = ("human", "gpt") * len(values)
    return [{"from": speaker, "value": value} for speaker, value in zip(speakers, values, strict=False)]


IMAGE = {"type": "image", "text": None}
A, B = {"images": ["a.png"]}, {"images": ["a.png", "b.png"]}

# Each row in the form that its trainer documents (see the sources in row_shapes.py), and what it becomes.
ROWS = {
    "LLaMA-Factory sharegpt": (
        {"conversations": talk("<image>Which?", "Red."), "system": "Be brief.", "tools": "", **A},
        [turn("system", text("Be brief.")), turn("user", IMAGE, text("Which?")), turn("assistant", text("Red."))],
    ),
    "LLaMA-Factory sharegpt without system": (
        {"conversations": talk("Hi", "Ho"), "system": ""},
        [turn("user", text("Hi")), turn("assistant", text("Ho"))],
    ),
    "LLaMA-Factory openai": (
        {"messages": chat("<image>Which?", "Red.", "Sure?", "Yes."), **A},
        [
            turn("user", IMAGE, text("Which?")),
            turn("assistant", text("Red.")),
            turn("user", text("Sure?")),
            turn("assistant", text("Yes.")),
        ],
    ),
    "ms-swift": (
        {"messages": [{"role": "system", "content": "S"}, *chat("<image> or\n<image>?", "No.")], **B},
        [
            turn("system", text("S")),
            turn("user", IMAGE, text(" or"), IMAGE, text("?")),
            turn("assistant", text("No.")),
        ],
    ),
    "ms-swift without tags": (
        {"messages": chat("Which?", "Red.", "Sure?", "Yes."), **B},
        [
            turn("user", IMAGE, IMAGE, text("Which?")),
            turn("assistant", text("Red.")),
            turn("user", text("Sure?")),
            turn("assistant", text("Yes.")),
        ],
    ),
    "TRL messages of parts": (
        {
            "messages": [
                turn("user", text("Is"), {"type": "image"}, text("red?")),
                turn("assistant", text("Yes.")),
            ],
            "image": "a.png",
        },
        [turn("user", text("Is"), IMAGE, text("red?")), turn("assistant", text("Yes."))],
    ),
    "llava-instruct-mix-vsft": (
        {
            "messages": [
                turn("user", {"index": None, **text("Which?\n")}, {"index": 0, "text": None, "type": "image"}),
                turn("assistant", {"index": None, **text("Red.")}),
            ],
            **A,
        },
        [turn("user", text("Which?\n"), IMAGE), turn("assistant", text("Red."))],
    ),
    "TRL conversational": (
        {"prompt": chat("Which?"), "completion": [{"role": "assistant", "content": "Red."}], "image": "a.png"},
        [turn("user", IMAGE, text("Which?")), turn("assistant", text("Red."))],
    ),
    "TRL conversational with system and parts": (
        {
            "prompt": [{"role": "system", "content": "S"}, turn("user", {"type": "image"}, text("Which?"))],
            "completion": [turn("assistant", text("Red."))],
            **A,
        },
        [turn("system", text("S")), turn("user", IMAGE, text("Which?")), turn("assistant", text("Red."))],
    ),
    "TRL with a prompt of text and a completion of parts": (
        {"prompt": chat("Which?"), "completion": [turn("assistant", text("Red."))], **A},
        [turn("user", IMAGE, text("Which?")), turn("assistant", text("Red."))],
    ),
    "TRL standard": (
        {"prompt": "The sky is", "completion": " blue."},
        [turn("user", text("The sky is")), turn("assistant", text(" blue."))],
    ),
    "ms-swift query": (
        {"query": "<image>Which?", "response": "Red.", "history": [], **A},
        [turn("user", IMAGE, text("Which?")), turn("assistant", text("Red."))],
    ),
    "ms-swift query with history": (
        {"system": "S", "query": "Sure?", "response": "Yes.", "history": [["Which?", "Red."]], **A},
        [
            turn("system", text("S")),
            turn("user", IMAGE, text("Which?")),
            turn("assistant", text("Red.")),
            turn("user", text("Sure?")),
            turn("assistant", text("Yes.")),
        ],
    ),
    "a picture alone": (
        {"query": "", "response": "Red.", "image": "a.png"},
        [turn("user", IMAGE), turn("assistant", text("Red."))],
    ),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", ROWS)
def test_a_row_becomes_messages(folder, case, streaming, suffix):
    row, messages = ROWS[case]
    [read] = load_rows(write(folder / f"train{suffix}", [row | {"id": 7}]), streaming=streaming)
    names = [row["image"]] if "image" in row else row.get("images", [])
    assert read == {
        "messages": messages,
        "images": [f"{folder}/{name}" for name in names],
        "id": 7,
        **({"tools": ""} if "tools" in row else {}),
    }


def test_kept_in_place_the_text_is_verbatim(folder):
    path = write(folder / "train.json", [{"query": "Is\n<image>\nred?", "response": "Yes.", **A}])
    content = load_rows(path, placement="keep")[0]["messages"][0]["content"]
    assert content == [text("Is\n"), IMAGE, text("\nred?")]
    assert load_rows(path)[0]["messages"][0]["content"] == [text("Is\n"), IMAGE, text("red?")]


def test_null_keys_are_no_shape(folder):
    row = {"conversations": talk("Hi", "Ho"), "messages": None, "query": None, "response": "R", "prompt": "P"}
    [read] = load_rows(write(folder / "train.json", [row]))
    assert read == {
        "messages": [turn("user", text("Hi")), turn("assistant", text("Ho"))],
        "images": [],
        "query": None,
        "response": "R",
        "prompt": "P",
    }


# Errors

SAID = {"role": "assistant", "content": "A"}
BAD_ROWS = {
    "typo": ({"message": chat("Q", "A")}, "found the key 'message'; expected the key 'messages'. Rename the key."),
    "prompt alone": (
        {"prompt": chat("Q")},
        "found the keys ['prompt', 'id']; expected the keys of one shape ('conversations'; 'messages'; 'prompt' and "
        "'completion'; 'query' and 'response'). Give the row its conversation.",
    ),
    "two shapes": (
        {"prompt": chat("Q"), "completion": [SAID], "messages": chat("Q", "A")},
        "found the keys 'messages', and also 'prompt' and 'completion'; expected the keys of one shape. Rename or "
        "remove those that are not the conversation.",
    ),
    "tools": (
        {"conversations": talk("Q", "A"), "tools": "[]"},
        "found the key 'tools'; expected a conversation with pictures alone. Leave such rows out, or write the tools "
        "into the system turn as the model shall see them.",
    ),
    "videos": (
        {"messages": chat("<video>Q", "A"), "videos": ["a.mp4"]},
        "found the key 'videos'; expected a conversation with pictures alone. Leave such rows out, or give frames of "
        "the video as pictures.",
    ),
    "audios": (
        {"query": "Q", "response": "A", "audios": ["a.wav"]},
        "found the key 'audios'; expected a conversation with pictures alone. Leave such rows out.",
    ),
    "objects": (
        {"messages": chat("Q", "<bbox>"), "objects": {"ref": [], "bbox": [[1, 2]]}},
        "found the key 'objects'; expected a conversation with pictures alone. Write names and boxes into the text, "
        "where <ref-object> and <bbox> stand.",
    ),
    "system of no type": (
        {"query": "Q", "response": "A", "system": ["S"]},
        "found 'system' of type list; expected a string in 'system'. Write the text in quotes.",
    ),
    "picture in system": (
        {"query": "Q", "response": "A", "system": "<image>", **A},
        "found <image> in 'system'; expected <image> in user turns only. Move or remove it.",
    ),
    "two systems": (
        {"messages": [{"role": "system", "content": "S"}, *chat("Q", "A")], "system": "S"},
        "found 'system' and a system turn; expected one of the two. Remove the other.",
    ),
    "messages no list": (
        {"messages": "hi"},
        "found 'messages' of type str; expected a list of turns. Put the turns in a list.",
    ),
    "turn no object": (
        {"messages": ["hi"]},
        'found turn 0 of type str; expected an object. Write {"role": ..., "content": ...}.',
    ),
    "loss": (
        {"messages": [*chat("Q"), SAID | {"loss": False}]},
        "found turn 1 with the keys ['role', 'content', 'loss']; expected 'role' and 'content' alone. Rename or "
        "remove the keys; what belongs to the whole row may stand beside 'messages'.",
    ),
    "tool turn": (
        {"messages": [*chat("Q"), {"role": "tool", "content": "{}"}, SAID]},
        "found turn 1 with the role 'tool'; expected user, assistant or system. Rename it.",
    ),
    "number as content": (
        {"messages": chat("Q", 7)},
        "found turn 1 with a content of type int; expected a string or a list of parts. Write the text in quotes.",
    ),
    "picture in a part": (
        {"messages": [turn("user", {"type": "image", "image": "a.png"}), SAID]},
        "found the part {'type': 'image', 'image': 'a.png'} in turn 0; expected parts {\"type\": \"text\", \"text\": "
        '...} without <image>, and {"type": "image"}. Name the pictures in \'images\', in the order of the image '
        "parts.",
    ),
    "part no object": ({"messages": [turn("user", "Q"), SAID]}, "found the part 'Q' in turn 0; expected parts"),
    "video part": ({"messages": [turn("user", {"type": "video"}), SAID]}, "found the part {'type': 'video'} in turn"),
    "marker in a text part": (
        {"messages": [turn("user", text("<image>")), SAID], **A},
        "found the part {'type': 'text', 'text': '<image>'} in turn 0; expected parts",
    ),
    "marker in an answer": (
        {"messages": chat("Q", "<image>"), **A},
        "found <image> in turn 1 (assistant); expected <image> in user turns only. Move or remove it.",
    ),
    "picture part in an answer": (
        {"messages": [*chat("Q"), turn("assistant", {"type": "image"})], **A},
        "found <image> in turn 1 (assistant); expected <image> in user turns only",
    ),
    "pretraining": (
        {"messages": [SAID]},
        "found the order assistant; expected an optional system turn, then user and assistant in alternation, user "
        "first and assistant last. Remove or merge the turns that break the order.",
    ),
    "one tag of two": (
        {"messages": chat("<image>Q", "A"), **B},
        "found 1 <image> in the user turns and 2 in 'image' or 'images'; expected as many <image> as pictures. Write "
        "one <image> where each picture belongs, or name the missing picture.",
    ),
    "tag without a picture": ({"query": "<image>Q", "response": "A"}, "found 1 <image> in the user turns and 0 in"),
    "parts without a tag": (
        {"messages": [turn("user", text("Q")), SAID], **A},
        "found 0 <image> in the user turns and 1 in 'image' or 'images'; expected as many <image> as pictures",
    ),
    "prompt of no type": (
        {"prompt": 7, "completion": "A"},
        "found 'prompt': 7; expected a string or a list of turns with 'role' and 'content'. Write the text in quotes, "
        "or the turns in a list.",
    ),
    "completion of no turns": ({"prompt": "Q", "completion": ["A"]}, "found 'completion': ['A']; expected a string"),
    "answer in the prompt": (
        {"prompt": chat("Q", "A", "Q"), "completion": [SAID]},
        "found an assistant turn in 'prompt'; expected answers in 'completion' alone, since TRL trains nothing else. "
        "Write both as one list 'messages'; --train_on last_assistant then trains the completion alone.",
    ),
    "several completions": (
        {"prompt": "Q", "completion": [SAID, *chat("Q", "A")]},
        "found the roles ['assistant', 'user', 'assistant'] in 'completion'; expected one assistant turn in "
        "'completion'. Write prompt and completion as one list 'messages'; every assistant turn of it is trained.",
    ),
    "empty prompt": ({"prompt": [], "completion": "A"}, "found the order assistant; expected an optional system"),
    "history of text": (
        {"query": "Q", "response": "A", "history": "[['Q', 'A']]"},
        "found 'history': \"[['Q', 'A']]\"; expected a list of [query, response] pairs. Write every earlier question "
        "with its answer, oldest first.",
    ),
    "half a pair": ({"query": "Q", "response": "A", "history": [["Q"]]}, "found 'history': [['Q']]; expected a list"),
    "responses": (
        {"query": "Q", "response": ["A", "B"]},
        "found a response of type list; expected a string. Write the text in quotes.",
    ),
    "null in the history": (
        {"query": "Q", "response": "A", "history": [[None, "A"]]},
        "found a query of type NoneType; expected a string. Write the text in quotes.",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(folder, case, streaming):
    row, message = BAD_ROWS[case]
    path = write(folder / "train.json", [row | {"id": "x"}])
    with pytest.raises(ValueError) as error:
        list(load_rows(path, streaming=streaming))
    assert f"{path}, row 0 (id 'x'): {message}" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixed_file_is_named(folder, streaming):
    rows = [{"conversations": talk("Q", "A")}, {"messages": chat("Q", "A")}, {"query": "Q", "response": "A"}]
    path = write(folder / "train.jsonl", rows)
    with pytest.raises(ValueError) as error:
        list(load_rows(path, streaming=streaming))
    message = (
        f"{path}, row 1: found the keys 'messages' behind rows with 'conversations'; expected rows of one shape. Give "
        "each shape a file of its own."
    )
    assert message in str(error.value)
    if not streaming:
        assert str(error.value).splitlines()[0] == "2 of 3 rows cannot be used:"
        assert f"{path}, row 2: found the keys 'query' and 'response' behind rows with" in str(error.value)


def test_every_row_error_is_in_the_docs():
    pages = DOCS.read_text(encoding="utf-8") + (DOCS.parent / "data_format.md").read_text(encoding="utf-8")
    messages = [message for _, message in BAD_ROWS.values()]
    expectations = {match[1] for text in messages if (match := re.search(r"; expected (.+?)\. [A-Z]", text))}
    assert len(expectations) == 20
    assert [text for text in expectations if f"| `{text}` |" not in pages] == []


# Datasets of the shapes


PARQUET = {
    "conversations": {"conversations": talk("<image>\nWhich?", "Red."), "system": None},
    "messages": {"messages": chat("<image>\nWhich?", "Red.")},
    "prompt": {"prompt": chat("Which?"), "completion": [{"role": "assistant", "content": "Red."}]},
    "query": {"query": "<image>\nWhich?", "response": "Red.", "history": []},
}
PICTURES = {
    "struct": {"images": [{"bytes": encoded(), "path": "a.png"}]},
    "binary": {"images": [encoded()]},
    "one struct": {"image": {"bytes": encoded(), "path": None}},
    "one binary": {"image": encoded()},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("shape", PARQUET)
def test_parquet_with_pictures_inside(tmp_path, shape, pictures, layout, streaming):
    path = tmp_path / "set" / "train.parquet"
    path.parent.mkdir()
    row = PARQUET[shape] | PICTURES[pictures] | {"id": 3}
    pq.write_table(pa.Table.from_pylist([row]), path)
    [read] = load_rows(path if layout == "file" else path.parent, streaming=streaming)
    images = PICTURES[pictures].get("images") or [PICTURES[pictures]["image"]]
    messages = [turn("user", IMAGE, text("Which?")), turn("assistant", text("Red."))]
    assert read == {
        "messages": chat("<image>\nWhich?", "Red.") if shape == "messages" else messages,
        "images": images,
        "id": 3,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_are_not_decoded(tmp_path, streaming):
    features = Features({"query": Value("string"), "response": Value("string"), "images": List(Image())})
    row = {"query": "Which?", "response": "Red.", "images": [{"bytes": b"no picture", "path": "a.png"}]}
    Dataset.from_list([row] * 3, features=features).to_parquet(tmp_path / "train.parquet")
    rows = load_rows(tmp_path / "train.parquet", streaming=streaming)
    assert [read["images"] for read in rows] == [row["images"]] * 3
    assert rows.features["images"] == List(Image(decode=False))
    assert list(rows.features) == ["messages", "images"]
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)  # what a loader's worker does


def test_pictures_are_written_once(tmp_path, cache):
    """Of a dataset in another shape only the messages are written anew."""
    rows = [{"query": "Which?", "response": "Red.", "images": [os.urandom(1000)]} for _ in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    first = load_rows(tmp_path / "train.parquet")
    files = {file: file.stat().st_mtime_ns for file in cache.parent.rglob("*.arrow")}
    sizes = sorted(file.stat().st_size for file in files)
    assert sizes[0] < 100_000 and 300_000 < sizes[1] < 400_000 and len(sizes) == 2
    assert first["images"] == [row["images"] for row in rows]
    assert load_rows(tmp_path / "train.parquet")[:] == first[:]
    assert {file: file.stat().st_mtime_ns for file in cache.parent.rglob("*.arrow")} == files


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_and_without_pictures(tmp_path, streaming):
    rows = [
        {"query": "Which?", "response": "Red.", "images": [encoded()]},
        {"query": "Hi", "response": "Ho", "images": None},
        {"query": "Hi", "response": "Ho", "images": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    read = list(load_rows(tmp_path / "train.parquet", streaming=streaming))
    assert [row["images"] or [] for row in read] == [[encoded()], [], []]
    assert [row["messages"][0]["content"] for row in read] == [[IMAGE, text("Which?")], [text("Hi")], [text("Hi")]]
    assert make_collator()(read)["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_system_column_beside_messages(tmp_path, streaming):
    rows = [{"messages": chat("Hi", "Ho"), "system": system, "n": 1} for system in ("S", None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    read = list(load_rows(tmp_path / "train.parquet", streaming=streaming))
    talk = [turn("user", text("Hi")), turn("assistant", text("Ho"))]
    assert read == [
        {"messages": [turn("system", text("S")), *talk], "n": 1, "images": []},
        {"messages": talk, "n": 1, "images": []},
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}, "found the key 'objects'"),
        ({"videos": ["a.mp4"]}, "found the key 'videos'"),
        ({"loss": False}, r"turn 1 with the keys \['role', 'content', 'loss'\]"),
        ({"query": "Q", "response": "R"}, "the keys 'messages', and also 'query' and 'response'"),
    ],
    ids=["objects", "videos", "loss", "two shapes"],
)
def test_messages_in_parquet_are_read_where_they_say_more(tmp_path, change, message, streaming):
    """As in JSON: what nothing here renders or trains otherwise is refused, not passed over."""
    row = {"messages": chat("Which?", "Red."), "images": []} | change
    if "loss" in row:
        row["messages"][1]["loss"] = row.pop("loss")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        list(load_rows(tmp_path / "train.parquet", streaming=streaming))


def test_empty_columns_of_ms_swift_say_nothing(tmp_path):
    row = {"messages": chat("Which?", "Red."), "objects": {"ref": [], "bbox": []}}
    (tmp_path / "rows.json").write_text(json.dumps([row, row | {"objects": {"ref": None, "bbox": None}}]))
    assert len(load_rows(tmp_path / "rows.json")) == 2


def test_paths_as_polars_writes_them_are_refused(tmp_path):
    kind = pa.large_list(pa.large_string())
    table = pa.table({"query": ["<image>"], "response": ["R"], "images": pa.array([["a.png"]], kind)})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="found paths in 'images'; expected the pictures themselves"):
        load_rows(tmp_path / "train.parquet")


@pytest.mark.parametrize("row", [{"query": "Q", "response": None}, {"conversations": None}])
def test_a_null_is_named(tmp_path, row):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="found '(response|conversations)': null; expected a conversation"):
        load_rows(tmp_path / "rows.json")


def test_a_parquet_file_can_be_sliced(tmp_path):
    rows = [{"query": str(number), "response": "R", "images": [b"x"] * (number % 2)} for number in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    read = load_rows(tmp_path / "train.parquet", split="train[90%:]")
    assert read["messages"] == [[turn("user", IMAGE, text("9")), turn("assistant", text("R"))]]
    assert load_rows(tmp_path / "train.parquet", split="validation").split == "validation"
    with pytest.raises(ValueError, match=r"found split='train\[:2\]'; a stream has no slices"):
        load_rows(tmp_path / "train.parquet", split="train[:2]", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_a_dataset_are_named(tmp_path, streaming):
    good, bad = {"query": "Q", "response": "A", "images": []}, {"query": "<image>", "response": "A", "images": []}
    rows = [row | {"id": number} for number, row in enumerate([good, *[bad] * 7, good])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    path = tmp_path / "train.parquet"
    with pytest.raises(ValueError) as error:
        list(load_rows(path, streaming=streaming))
    lines = str(error.value).splitlines()
    found = "found 1 <image> in the user turns and 0 in 'image' or 'images'; expected as many <image> as pictures"
    if streaming:
        assert len(lines) == 1 and lines[0].startswith(f"{path}, row 1 (id 1): {found}")
    else:
        assert lines[0] == "7 of the first 9 rows cannot be used:"
        assert [line.partition(": ")[0] for line in lines[1:6]] == [
            f"{path}, row {row} (id {row})" for row in range(1, 6)
        ]
        assert all(f": {found}" in line for line in lines[1:6])
        assert lines[6:] == ["and 2 more"]


def test_datasets_that_cannot_be_read(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"query": ["Q"], "response": ["A"], "images": [["a.png"]]}), path)
    with pytest.raises(ValueError, match="train.parquet: found paths in 'images'; expected the pictures themselves"):
        load_rows(path)
    pq.write_table(pa.table({"text": ["Q"]}), path)
    with pytest.raises(ValueError, match=r"train.parquet: found the keys \['text'\]; expected the keys of one shape"):
        load_rows(path)
    with pytest.raises(ValueError, match="found name='en'; a file has no configurations"):
        load_rows(path, name="en")
    with pytest.raises(ValueError, match="found image_folder='x'; expected it with a .json or .jsonl file alone"):
        load_rows(path, image_folder="x")
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="train.parquet: found no Parquet file .*. Write or download it again"):
        load_rows(path)
    with pytest.raises(FileNotFoundError, match="nowhere.parquet"):
        load_rows(tmp_path / "nowhere.parquet")


# Into a batch


def make_collator(**options) -> LlavaDataCollator:
    processor = make_processor()
    return LlavaDataCollator(processor, chat_template=training_chat_template(processor), **options)


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
@pytest.mark.parametrize(
    ("row", "prompt", "trained"),
    [
        (
            {"conversations": talk("<image>\nWhich?", "Red.", "Sure?", "Yes."), "system": "S"},
            "S USER: <image>\nWhich? ASSISTANT: Red.</s>USER: Sure? ASSISTANT: Yes.</s>",
            " Red.</s> Yes.</s>",
        ),
        (
            {"messages": chat("<image>Which?", "Red.", "Sure?", "Yes.")},
            "USER: <image>\nWhich? ASSISTANT: Red.</s>USER: Sure? ASSISTANT: Yes.</s>",
            " Red.</s> Yes.</s>",
        ),
        (
            {"prompt": chat("Which?"), "completion": [{"role": "assistant", "content": "Red."}]},
            "USER: <image>\nWhich? ASSISTANT: Red.</s>",
            " Red.</s>",
        ),
        (
            {"prompt": "Which?", "completion": "Red."},
            "USER: <image>\nWhich? ASSISTANT: Red.</s>",
            " Red.</s>",
        ),
        (
            {"query": "Sure?", "response": "Yes.", "history": [["Which?", "Red."]]},
            "USER: <image>\nWhich? ASSISTANT: Red.</s>USER: Sure? ASSISTANT: Yes.</s>",
            " Red.</s> Yes.</s>",
        ),
    ],
    ids=["conversations", "messages", "prompt lists", "prompt strings", "query"],
)
def test_what_trains(folder, row, prompt, trained, suffix):
    if suffix == ".json":
        path = write(folder / "train.json", [row | {"images": ["a.png"]}])
    else:
        path = folder / "train.parquet"
        pq.write_table(pa.Table.from_pylist([row | {"images": [{"bytes": encoded(), "path": None}]}]), path)
    collator = make_collator()
    batch = collator([load_rows(path)[0]])
    labels = batch["labels"][0]
    decode = collator.processor.tokenizer.decode
    assert decode(labels[labels != -100]) == trained
    assert decode(batch["input_ids"][0]).replace("<image>" * 4, "<image>").removeprefix("<s>") == prompt
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


def test_the_file_works_pasted_into_an_empty_namespace():
    namespace = {"__name__": "cell"}
    exec(SOURCE.read_text(encoding="utf-8"), namespace)
    row = {"query": "Which?", "response": "Red."}
    assert namespace["RowReader"]("front")(row, 1) == row_shapes.RowReader("front")(row, 1)


# The documentation


def test_the_documented_files_load_and_the_documented_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS.read_text(encoding="utf-8")
    (tmp_path / "my_data" / "pictures").mkdir(parents=True)
    for name in ("digit-1.png", "digit-2.png"):
        picture().save(tmp_path / "my_data" / "pictures" / name)
    files = re.findall(r"`(my_data/[\w.]+)`[^`]*:\n\n```jsonl?\n(.*?)```", page, flags=re.DOTALL)
    assert len(files) == len(re.findall("```json", page)) == 7
    for name, content in files:
        Path(name).write_text(content, encoding="utf-8")
        if name != "my_data/history.jsonl":
            rows = list(load_rows(name))
            assert rows
            make_collator(placement="front")(rows)
    with pytest.raises(ValueError, match="found an assistant turn in 'prompt'"):
        load_rows("my_data/history.jsonl")

    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(block, namespace)
