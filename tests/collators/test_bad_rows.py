"""Rows and pictures that cannot be used: which are left out, what is said of them, and what a row may not name."""

import io
import json
import os
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch.utils.data import DataLoader

import tiny
from collators import LlavaDataCollator, chat_template_path, llava_json, load_image, load_rows, training_chat_template
from collators.llava import FORMATS
from tiny import assistant, picture, row, user


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def encoded(image: Image.Image, fmt: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


# A batch with bad rows


def make_collator(kind: str = "llava", template: str | None = None, **kwargs) -> LlavaDataCollator:
    processor = tiny.make_processor(kind=kind)
    template = chat_template_path(template).read_text() if template else training_chat_template(processor)
    return LlavaDataCollator(processor, chat_template=template, **kwargs)


TORN = [{"bytes": b"no picture", "path": "torn.jpg"}]
LONG = "A question of many, many words about a red square on a white ground? " * 20
BAD = {
    "form": (
        {"_row": 41, "id": "q", "messages": [user("Hi")], "images": []},
        {},
        "row 41 (id 'q'): roles are user; expected an optional system turn, then user and assistant in turn, with at "
        "least one answer",
    ),
    "picture": (
        row(user("Hi", images=1), assistant("Yes"), images=TORN, _row=7),
        {},
        "row 7: torn.jpg: the picture cannot be decoded (cannot identify image file <_io.BytesIO object at",
    ),
    "missing picture": (
        row(user("Hi", images=1), assistant("Yes"), images=["nowhere.png"], id=3),
        {},
        "row 3: nowhere.png: no such picture; check the path and --image_folder",
    ),
    "too long": (
        row(user(LONG), assistant("Yes"), _row=8, id="long"),
        {"max_length": 150},
        "row 8 (id 'long'): 913 tokens for max_length=150, and not even the first exchange fits. Raise --max_length, "
        "shorten the row, or pass overlong='drop' to leave it out.",
    ),
    "too many pictures": (
        row(user("Hi", images=3), assistant("Yes"), _row=9),
        {"max_images": 2},
        "row 9: 3 pictures for max_images=2, and not even the first exchange fits. Raise --max_images, shorten the "
        "row, or pass overlong='drop' to leave it out.",
    ),
    "refused by the template": (
        row(user("Hi"), assistant("Yes"), _row=10),
        {"template": "plain"},
        "row 10: the chat template cannot render it: plain takes a picture and its caption; this row has no picture",
    ),
    "no row": (None, {}, "row 1 of the batch is NoneType; expected a mapping with `messages`"),
}
GOOD = [row(user("Hi", images=1), assistant("Yes")), row(user("A longer question?", images=1), assistant("No, red."))]


def kept(batch: dict, place: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a row, up to padding."""
    mask = batch["attention_mask"][place].bool()
    return batch["input_ids"][place][mask].tolist(), batch["labels"][place][mask].tolist()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_gives_its_place_to_one_that_trains_nothing(fault, kind, tmp_path, caplog):
    bad, options, reason = BAD[fault]
    file = tmp_path / "out" / "skipped_rows.jsonl"
    collator = make_collator(kind, on_bad_row="skip", skipped_rows=file, **options)
    batch = collator([GOOD[0], bad, GOOD[1]])
    reference = make_collator(kind, **options)(GOOD)
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == 3
    assert (batch["labels"][1] == -100).all()
    assert [kept(batch, 0), kept(batch, 2)] == [kept(reference, 0), kept(reference, 1)]
    assert (batch["labels"][[0, 2]] != -100).any(1).all()
    assert batch["pixel_values"].shape[0] == 3
    [found] = lines(file)
    assert found["reason"].startswith(reason)
    assert found | {"reason": ""} == {"row": (bad or {}).get("_row"), "id": (bad or {}).get("id"), "reason": ""}
    assert (collator.skipped, collator.dropped, collator.shortened) == (1, 0, 0)
    assert caplog.messages == [f"{found['reason']}; skipped (no. 1 of this kind in this process)"]


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_raises_unless_told(fault):
    bad, options, reason = BAD[fault]
    with pytest.raises((ValueError, FileNotFoundError, TypeError)) as error:
        make_collator(**options)([GOOD[0], bad, GOOD[1]])
    assert str(error.value).startswith(reason)


def test_the_row_in_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    collator = make_collator(on_bad_row="skip")
    batch = collator([BAD["form"][0], BAD["picture"][0]])
    decoded = collator.processor.tokenizer.batch_decode(batch["input_ids"])
    assert decoded == ["<s>USER: " + "<image>" * 4 + "\nWhat? ASSISTANT: This.</s>"] * 2
    assert (batch["labels"] == -100).all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_several_at_once(tmp_path, side):
    """In one batch: before it is encoded, while it is, and once it is seen to be too long."""
    options = {"max_length": 100, "max_images": 2, "padding_side": side, "template": "plain"}
    file = tmp_path / "skipped.jsonl"
    collator = make_collator(on_bad_row="skip", skipped_rows=file, **options)
    long = row(user("Hi", images=1), assistant(LONG), _row=11)
    form, torn, many, refused = (
        BAD[name][0] for name in ("form", "picture", "too many pictures", "refused by the template")
    )
    batch = collator([form, GOOD[0], torn, long, many, GOOD[1], refused])
    reference = make_collator(**options)(GOOD)
    assert batch["labels"].shape[0] == batch["pixel_values"].shape[0] == 7
    assert [kept(batch, 1), kept(batch, 5)] == [kept(reference, 0), kept(reference, 1)]
    assert (batch["labels"] != -100).any(1).tolist() == [False, True, False, False, False, True, False]
    assert [line["row"] for line in lines(file)] == [41, 7, 9, 10, 11]
    assert collator.skipped == 5


def test_left_out_and_skipped_in_one_batch(tmp_path):
    """`overlong="drop"` takes a row out of its batch, which gets smaller, and is not named among the bad ones."""
    file = tmp_path / "skipped.jsonl"
    collator = make_collator(on_bad_row="skip", skipped_rows=file, overlong="drop", max_length=150, max_images=2)
    dropped = [BAD["too long"][0], BAD["too many pictures"][0]]
    batch = collator([*dropped, BAD["form"][0], GOOD[0]])
    assert batch["labels"].shape[0] == 2
    assert (batch["labels"] != -100).any(1).tolist() == [False, True]
    assert [line["row"] for line in lines(file)] == [41]
    assert (collator.skipped, collator.dropped) == (1, 2)


def test_a_row_that_was_shortened_and_is_too_long_still_counts_once(tmp_path):
    talk = [user("Hi", images=2), assistant(LONG), user("And?", images=1), assistant("Yes")]
    collator = make_collator(on_bad_row="skip", max_length=100, max_images=2)
    assert (collator([row(*talk)])["labels"] == -100).all()
    assert (collator.skipped, collator.shortened) == (1, 0)


def test_text_only_rows_beside_a_bad_one():
    rows = [row(user("Hi"), assistant("Yes")), BAD["form"][0], row(user("Ho"), assistant("No"))]
    batch = make_collator(on_bad_row="skip")(rows)
    reference = make_collator()([rows[0], rows[2]])
    assert [kept(batch, 0), kept(batch, 2)] == [kept(reference, 0), kept(reference, 1)]
    assert (batch["labels"][1] == -100).all()


def test_a_text_only_batch_whose_template_refuses_a_row(tmp_path):
    """The row is alone in raising: each is encoded by itself, and named once."""
    file = tmp_path / "skipped.jsonl"
    collator = make_collator(on_bad_row="skip", skipped_rows=file)
    collator.chat_template = "{% for m in messages %}{% if 'secret' in m.content[0].text %}" + (
        "{{ raise_exception('not this one') }}{% endif %}{% endfor %}" + collator.chat_template
    )
    batch = collator([row(user(text), assistant("Yes"), _row=number) for number, text in enumerate(["a", "secret"])])
    assert (batch["labels"] != -100).any(1).tolist() == [True, False]
    assert lines(file) == [{"row": 1, "id": None, "reason": "row 1: the chat template cannot render it: not this one"}]
    assert collator.skipped == 1


def test_a_made_up_row_must_fit_too():
    with pytest.raises(ValueError, match="max_length=5: not even a made-up exchange of 24 tokens fits"):
        make_collator(on_bad_row="skip", max_length=5)([BAD["form"][0]])


def test_odd_names_are_written_as_json(tmp_path):
    file = tmp_path / "skipped.jsonl"
    names = ["é\u2028\n", "\ud800", [1, None], picture()]
    make_collator(on_bad_row="skip", skipped_rows=file)([{"id": name} for name in names])
    assert [line["id"] for line in lines(file)][:3] == ["é\u2028\n", "\ud800", [1, None]]
    assert lines(file)[3]["id"].startswith("<PIL.Image.Image image mode=RGB size=16x16")


class Rows(torch.utils.data.Dataset):
    """Every second one bad, with names so long that a line is more than a buffer."""

    def __len__(self):
        return 60

    def __getitem__(self, index: int) -> dict:
        return {"_row": index, "id": "é" * 20_000} if index % 2 else row(user("Hi"), assistant("Yes"))


def test_workers_share_one_file(tmp_path):
    """One pass names each row once, and no line comes between the halves of another."""
    file = tmp_path / "skipped.jsonl"
    collator = make_collator(on_bad_row="skip", skipped_rows=file)
    loader = DataLoader(Rows(), 4, collate_fn=collator, num_workers=2, multiprocessing_context="fork")
    assert [(batch["labels"] != -100).any(1).tolist() for batch in loader] == [[True, False] * 2] * 15
    found = lines(file)
    assert sorted(line["row"] for line in found) == list(range(1, 60, 2))
    assert {line["id"] for line in found} == {"é" * 20_000}
    assert collator.skipped == 0  # that of this process, which read none


# Files with bad rows


def talk(value: str = "Hi", image: str | None = None, **columns) -> dict:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes"}]
    return {"conversations": turns, **({"image": image} if image else {}), **columns}


def write(path: Path, rows: list) -> Path:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(texts) if path.suffix == ".jsonl" else f"[{','.join(texts)}]", encoding="utf-8")
    return path


def hundreds(bad: dict[int, object], count: int = 200) -> list:
    return [bad.get(number, talk(id=number)) for number in range(count)]


NO_ANSWER = {"id": "q", "conversations": [{"from": "human", "value": "Hi"}]}
ORDER = (
    "found the order human; expected an optional system turn, then human and gpt in alternation, human first and gpt "
    "last. Remove or merge the turns that break the order."
)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_bad_rows_of_a_file_are_left_out_and_named(folder, tmp_path, suffix, streaming):
    path = write(folder / f"train{suffix}", hundreds({5: NO_ANSWER, 100: talk("<image>", "none.png", id=7)}))
    out = tmp_path / "out" / "skipped.jsonl"
    options = {"streaming": streaming, "on_bad_row": "skip", "number_rows": True}
    numbers = [number for number in range(200) if number not in (5, 100)]
    for _ in range(2):  # the second time from the cache
        rows = list(load_rows(path, skipped_rows=out, **options))
        assert [row["_row"] for row in rows] == [row["id"] for row in rows] == numbers
    missing = f"found no picture file at {folder}/none.png; expected an existing file. "
    assert lines(out) == [
        {"row": 5, "id": "q", "reason": f"{path}: {ORDER}"},
        {"row": 100, "id": 7, "reason": f"{path}: {missing}Correct the path or --image_folder ({folder})."},
    ]
    del options["number_rows"]
    assert set(next(iter(load_rows(path, **options)))) == {"messages", "images", "id"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_line_is_one_bad_row(folder, tmp_path, streaming):
    path = write(folder / "train.jsonl", hundreds({3: '{"id": 3, "conversations": [', 4: "7"}))
    options = {"streaming": streaming, "on_bad_row": "skip", "number_rows": True}
    assert [row["_row"] for row in load_rows(path, skipped_rows=tmp_path / "out.jsonl", **options)][2:4] == [2, 5]
    assert [(line["row"], line["id"]) for line in lines(tmp_path / "out.jsonl")] == [(3, None), (4, None)]


def test_a_column_that_changes_its_type_behind_a_bad_row(folder, tmp_path):
    """The file is read twice then; its bad row is named once."""
    bad = {5: NO_ANSWER, 150: talk(id="a string")}
    rows = load_rows(write(folder / "train.json", hundreds(bad)), on_bad_row="skip", skipped_rows=tmp_path / "out")
    assert rows["id"][:6] == [0, 1, 2, 3, 4, 6] and rows["id"][149] == "a string"
    assert [line["row"] for line in lines(tmp_path / "out")] == [5]


def test_a_picture_that_goes_missing_takes_its_row_along(folder, tmp_path):
    path = write(folder / "train.json", hundreds({9: talk("<image>", "a.png", id=9), 20: NO_ANSWER}))
    assert len(load_rows(path, on_bad_row="skip")) == 199
    (folder / "a.png").unlink()
    rows = load_rows(path, on_bad_row="skip", skipped_rows=tmp_path / "out.jsonl", number_rows=True)
    assert rows["_row"][8:11] == [8, 10, 11] and len(rows) == 198
    assert [line["row"] for line in lines(tmp_path / "out.jsonl")] == [9, 20]
    with pytest.raises(ValueError, match="^2 of 200 rows cannot be used:"):
        load_rows(path)


@pytest.mark.parametrize("count", [199, 200])
def test_more_than_one_in_a_hundred_is_an_error(folder, tmp_path, count):
    path = write(folder / "train.json", hundreds({3: NO_ANSWER, 50: NO_ANSWER}, count))
    if count == 200:
        with pytest.warns(UserWarning, match=r"2 of 200 rows are left out .*row 3 \(id 'q'\)"):
            assert len(load_rows(path, on_bad_row="skip")) == 198
        return
    with pytest.raises(ValueError) as error:
        load_rows(path, on_bad_row="skip", skipped_rows=tmp_path / "out.jsonl")
    assert str(error.value).split("\n") == [
        "2 of 199 rows cannot be used:",
        f"{path}, row 3 (id 'q'): {ORDER}",
        f"{path}, row 50 (id 'q'): {ORDER}",
        "That is more than 1% of the rows, the most that on_bad_row='skip' leaves out.",
    ]
    assert not (tmp_path / "out.jsonl").exists()


def test_slices_name_a_row_once(folder, tmp_path):
    path = write(folder / "train.json", hundreds({5: NO_ANSWER}, 201))
    options = {"on_bad_row": "skip", "skipped_rows": tmp_path / "out.jsonl", "number_rows": True}
    assert load_rows(path, split="train[:90%]", **options)["_row"] == [*range(5), *range(6, 181)]
    assert load_rows(path, split="train[90%:]", **options)["_row"] == list(range(181, 201))
    assert [line["row"] for line in lines(tmp_path / "out.jsonl")] == [5]


def test_odd_names_do_not_tear_a_line(folder, tmp_path):
    """A line separator is not escaped in JSON, and ends a line for `str.splitlines`."""
    path = write(folder / "train.json", hundreds({5: NO_ANSWER | {"id": "a\u2028b\x85\nc"}}))
    for _ in range(2):
        load_rows(path, on_bad_row="skip", skipped_rows=tmp_path / "out.jsonl")
    assert [line["id"] for line in lines(tmp_path / "out.jsonl")] == ["a\u2028b\x85\nc"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["file", "saved"])
def test_bad_rows_of_a_dataset_of_another_shape(tmp_path, layout, streaming):
    data = [{"query": "Q", "response": "A", "images": [], "id": number} for number in range(200)]
    data[4] |= {"query": "<image>"}
    features = Features(
        {"query": Value("string"), "response": Value("string"), "images": List(Value("binary")), "id": Value("int64")}
    )
    made, path = Dataset.from_list(data, features=features), tmp_path / "train.parquet"
    made.to_parquet(path) if layout == "file" else made.save_to_disk(path := tmp_path / "saved")
    options = {"on_bad_row": "skip", "skipped_rows": tmp_path / "out.jsonl", "streaming": streaming}
    for _ in range(2):
        rows = list(load_rows(path, number_rows=True, **options))
        assert [row["_row"] for row in rows] == [row["id"] for row in rows] == [*range(4), *range(5, 200)]
    reason = "found 1 <image> in the user turns and 0 in 'image' or 'images'; expected as many <image> as pictures. "
    [line] = lines(tmp_path / "out.jsonl")
    assert line["reason"].startswith(f"{path}: {reason}")
    assert (line["row"], line["id"]) == (4, 4)
    assert set(next(iter(load_rows(path, **options)))) == {"messages", "images", "id"}


def test_a_dataset_with_many_bad_rows_is_an_error(tmp_path):
    data = [{"query": "Q", "response": "A" if number else None} for number in range(99)]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"^1 of 99 rows cannot be used:\n.*found 'response': null"):
        load_rows(tmp_path / "train.parquet", on_bad_row="skip")


def test_a_dataset_is_read_once_for_each_way(tmp_path, monkeypatch):
    """The numbers do not change what the cache knows the messages by."""
    data = [{"query": "Q", "response": "A"} for _ in range(3)]
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "train.parquet")
    for options in ({}, {"number_rows": True}, {"on_bad_row": "skip", "number_rows": True}):
        first = load_rows(tmp_path / "train.parquet", **options)
        with monkeypatch.context() as patch:
            patch.setattr(llava_json, "_read_batch", lambda *args: pytest.fail("read again"))
            assert load_rows(tmp_path / "train.parquet", **options)[:] == first[:]


def test_numbers_of_datasets(tmp_path):
    """In a slice those of the split; saved ones stay; a stream of several files has none."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "set").mkdir()
    for part in range(2):
        pq.write_table(pa.Table.from_pylist([{"messages": messages}] * 3), tmp_path / "set" / f"train-{part}.parquet")
    options = {"number_rows": True}
    assert load_rows(tmp_path / "set", **options)["_row"] == [0, 1, 2, 3, 4, 5]
    rows = load_rows(tmp_path / "set", split="train[4:]", **options)
    assert rows["_row"] == [4, 5]
    rows.save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        again = load_rows(tmp_path / "saved", streaming=streaming, **options)
        assert [row["_row"] for row in again] == [4, 5]
    pq.write_table(pa.table({"messages": [messages], "_row": ["a"]}), tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="own.parquet: found the column '_row'; expected columns of your own"):
        load_rows(tmp_path / "own.parquet", **options)
    file = load_rows(tmp_path / "set" / "train-0.parquet", streaming=True, **options)
    loader = DataLoader(file, None, num_workers=1, multiprocessing_context="fork")
    assert [row["_row"] for row in loader] == [0, 1, 2]
    assert set(next(iter(load_rows(tmp_path / "set", streaming=True, **options)))) == {"messages", "images"}


def test_options_of_bad_rows(folder):
    with pytest.raises(ValueError, match="on_bad_row='drop': expected 'raise' or 'skip'"):
        load_rows(write(folder / "train.json", [talk()]), on_bad_row="drop")
    with pytest.raises(ValueError, match="on_bad_row='drop': expected one of 'raise', 'skip'"):
        make_collator(on_bad_row="drop")
    with pytest.raises(ValueError, match="found the key '_row'; expected keys of your own. Rename the key"):
        load_rows(write(folder / "train.json", [talk(_row=1)]))


# Where pictures may lie


@pytest.fixture
def outside(folder, tmp_path):
    """A picture beside the data folder, and links to it and back."""
    (tmp_path / "data2").mkdir()
    (folder / "below").mkdir()
    for path in (tmp_path / "data2" / "out.png", folder / "below" / "c.png"):
        picture().save(path)
    (folder / "link.png").symlink_to(tmp_path / "data2" / "out.png")
    (folder / "folder").symlink_to(tmp_path / "data2")
    (folder / "inner.png").symlink_to(folder / "below" / "c.png")
    (folder / "inner").symlink_to("below")
    (tmp_path / "data2" / "back").symlink_to(folder)
    return tmp_path / "data2"


REFUSED = ["{outside}/out.png", "../data2/out.png", "below/../../data2/out.png", "link.png", "folder/out.png"]
REFUSED += ["inner/../../data2/out.png"]
ACCEPTED = [
    "a.png",
    "{folder}/a.png",
    "below/c.png",
    "below/../a.png",
    "inner.png",
    "inner/c.png",
    "folder/back/a.png",
]


def load(path: Path, streaming: bool, **options) -> list[list[str]]:
    return [row["images"] for row in load_rows(path, streaming=streaming, **options)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_outside_of_the_folder_is_refused(folder, outside, name, streaming):
    path = write(folder / "train.json", [talk("<image>", name.format(outside=outside))])
    full = os.path.join(folder, name.format(outside=outside))
    with pytest.raises(ValueError) as error:
        load(path, streaming)
    assert f"row 0: found the picture {full} outside of {folder}; expected pictures in --image_folder. " in str(
        error.value
    )
    for _ in range(2):
        assert load(path, streaming, allow_external_images=True) == [[full]]
    with pytest.raises(ValueError, match="outside of"):
        load(path, streaming)  # what was written to the cache for another answer is not taken


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_picture_in_the_folder_is_accepted(folder, outside, name, streaming):
    path = write(folder / "train.json", [talk("<image>", name.format(folder=folder))])
    assert load(path, streaming) == [[os.path.join(folder, name.format(folder=folder))]]


def test_a_folder_above_both_is_a_way_out(folder, outside, tmp_path):
    rows = [talk("<image>", "data2/out.png"), talk("<image>", "data/link.png")]
    path = write(folder / "train.json", rows)
    assert load(path, False, image_folder=tmp_path) == [[f"{outside}/out.png"], [f"{folder}/link.png"]]


def test_the_folder_itself_may_be_a_link(folder, outside):
    path = write(outside / "train.json", [talk("<image>", "a.png")])
    assert load(path, False, image_folder=outside / "back") == [[f"{outside}/back/a.png"]]


def test_a_picture_that_became_a_link_is_seen_in_a_cached_file(folder, outside):
    path = write(folder / "train.json", [talk("<image>", "a.png")])
    load(path, False)
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(outside / "out.png")
    with pytest.raises(ValueError, match=r"row 0: found the picture .*/data/a\.png outside of"):
        load(path, False)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.png\0.jpg", "\0", "below", "..", "a.png/", "/dev/zero", "x" * 5000])
def test_what_is_no_file_is_a_bad_row(folder, outside, name, streaming):
    path = write(folder / "train.json", [talk("<image>", name)])
    with pytest.raises(ValueError, match="row 0: found no picture file at .*; expected an existing file"):
        load(path, streaming, allow_external_images=True)


def test_a_link_to_itself_hides_no_other_picture(folder):
    (folder / "loop.png").symlink_to("loop.png")
    assert load(write(folder / "train.json", [talk("<image>", "a.png")]), False) == [[f"{folder}/a.png"]]
    with pytest.raises(ValueError, match="found no picture file at .*loop.png"):
        load(write(folder / "train.json", [talk("<image>", "loop.png")]), False)


# URLs


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://EXAMPLE.COM/A.PNG"])
def test_a_url_is_refused_or_fetched(folder, url, streaming):
    path = write(folder / "train.json", [talk("<image>", url, id=1)])
    with pytest.raises(ValueError) as error:
        load(path, streaming, allow_external_images=True)
    assert f"row 0 (id 1): found the URL {url}; expected the path of a picture. Download it" in str(error.value)
    [loaded] = load_rows(path, streaming=streaming, allow_remote_images=True, number_rows=True)
    assert loaded["images"] == [url]

    asked = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return encoded(picture("blue"))

    batch = make_collator(fetch_image=fetch)([loaded])
    local = make_collator()([loaded | {"images": [picture("blue")]}])
    assert asked == [url]
    assert torch.equal(batch["pixel_values"], local["pixel_values"])
    with pytest.raises(ValueError) as error:
        make_collator()([loaded])
    assert str(error.value).startswith(f"row 0 (id 1): {url}: a URL; nothing is fetched while training.")


def test_a_url_that_cannot_be_fetched_is_a_bad_row(folder, tmp_path):
    def fetch(url: str) -> bytes:
        raise ValueError(f"{url}: the picture cannot be fetched (HTTP status 404; expected 200).")

    file = tmp_path / "skipped.jsonl"
    bad = row(user("Hi", images=1), assistant("Yes"), images=["http://example.com/a.png"], _row=3)
    batch = make_collator(fetch_image=fetch, on_bad_row="skip", skipped_rows=file)([bad, GOOD[0]])
    assert (batch["labels"] != -100).any(1).tolist() == [False, True]
    reason = "row 3: http://example.com/a.png: the picture cannot be fetched (HTTP status 404; expected 200)."
    assert lines(file) == [{"row": 3, "id": None, "reason": reason}]


# Datasets that name files

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
PICTURE = datasets.Image().pa_type


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "kind", "value"),
    [
        ("images", pa.list_(pa.string()), ["a.png"]),
        ("images", pa.large_list(pa.large_string()), ["a.png"]),
        ("image", pa.string(), "a.png"),
        ("images", pa.list_(PICTURE), [{"bytes": None, "path": "a.png"}]),
        ("images", pa.list_(PICTURE), [{"bytes": b"", "path": "a.png"}]),
        ("image", PICTURE, {"bytes": None, "path": "a.png"}),
        ("image", pa.struct({"path": pa.string()}), {"path": "a.png"}),
    ],
)
def test_a_dataset_of_paths_is_refused(folder, monkeypatch, column, kind, value, streaming):
    """Its rows could name any file of this machine; a picture's bytes are all that it should hold."""
    monkeypatch.chdir(folder)
    table = pa.table({"messages": [MESSAGES] * 2, column: pa.array([None, value], kind)})
    pq.write_table(table, folder / "train.parquet")
    message = f"train.parquet: found paths in '{column}'; expected the pictures themselves, as bytes. "
    with pytest.raises(ValueError, match=message):
        list(load_rows(folder / "train.parquet", streaming=streaming))
    rows = list(load_rows(folder / "train.parquet", streaming=streaming, allow_external_images=True))
    assert not rows[0]["images"]
    [image] = rows[1]["images"]
    assert load_image(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["parquet", "saved"])
def test_pictures_that_only_claim_to_be_files_of_the_folder(folder, tmp_path, layout, streaming):
    """`datasets.Image` without bytes is what an image folder gives; a saved dataset can say that it came from one."""
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "images": List(datasets.Image(decode=False)),
        }
    )
    table = pa.table(
        {"messages": [MESSAGES], "images": [[{"bytes": None, "path": f"{folder}/a.png"}]]},
        schema=features.arrow_schema,
    )
    path = tmp_path / "train.parquet"
    if layout == "parquet":
        pq.write_table(table, path)
    else:
        path = tmp_path / "saved"
        Dataset.from_dict({"messages": [MESSAGES]}).save_to_disk(path)
        with pa.ipc.new_stream(str(next(path.glob("*.arrow"))), table.schema) as file:
            file.write_table(table)
        info = json.loads((path / "dataset_info.json").read_text())
        info |= {"builder_name": "imagefolder", "features": features.to_dict()}
        (path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="found paths in 'images'"):
        list(load_rows(path, streaming=streaming))
    [loaded] = load_rows(path, streaming=streaming, allow_external_images=True)
    assert loaded["images"] == [{"bytes": None, "path": f"{folder}/a.png"}]


def test_a_picture_with_a_name_is_no_path(tmp_path):
    """Nor is a slice refused for the rows outside of it, nor `image` passed over for being beside `images`."""
    held, named = ({"bytes": data, "path": "a.png"} for data in (encoded(picture()), None))
    rows = [{"messages": MESSAGES, "images": [image]} for image in (held, named, held)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    assert [row["images"] for row in load_rows(tmp_path / "set", split="train[:1]")] == [[held]]
    with pytest.raises(ValueError, match="found paths in 'images'"):
        load_rows(tmp_path / "set", split="train[:2]")
    rows = [
        {"messages": MESSAGES, "images": [b"x"], "image": None},
        {"messages": MESSAGES, "images": None, "image": "a"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "both.parquet")
    with pytest.raises(ValueError, match="found paths in 'image'"):
        load_rows(tmp_path / "both.parquet")


# Which pictures are decoded


@pytest.mark.parametrize("fmt", ["EPS", "ICO", "PDF", "TGA", "PCX", "SGI", "IM", "DDS", "XBM"])
def test_a_format_outside_the_list_is_refused(tmp_path, fmt):
    """Pillow itself reads all but PDF; for EPS it starts Ghostscript."""
    path = tmp_path / "a.png"
    picture().convert("1" if fmt == "XBM" else "RGB").save(path, fmt)
    if fmt != "PDF":
        assert Image.open(path).format == fmt
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=r"the picture cannot be decoded \(cannot identify image file"):
            load_image(source)


def test_what_cameras_write_is_in_the_list():
    assert [fmt for fmt in FORMATS if fmt != "AVIF"] == [
        "BMP",
        "GIF",
        "JPEG",
        "JPEG2000",
        "PNG",
        "PPM",
        "TIFF",
        "WEBP",
    ]
    for fmt in [*FORMATS, "MPO"]:
        assert load_image(encoded(picture("white"), fmt, save_all=fmt == "MPO")).getpixel((0, 0)) == (255, 255, 255)


def test_a_decompression_bomb_is_named_with_the_limit():
    """It is told by its header: nothing of its 900 million pixels is decoded."""
    data = bytearray(encoded(picture("red", (1, 1))))
    data[16:24] = (30_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    with pytest.raises(ValueError, match=r"bomb.png: .*900000000 pixels\) exceeds limit of 178956970 pixels"):
        load_image({"bytes": bytes(data), "path": "bomb.png"})


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "JPEG2000"])
def test_an_object_that_failed_once_fails_again(fmt):
    """Pillow 12 decodes a JPEG 2000 that failed to black at the second try."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, fmt)
    torn = Image.open(io.BytesIO(data[: len(data) - len(data) // 4]))
    for _ in range(3):
        with pytest.raises(ValueError, match="picture in memory: the picture cannot be decoded"):
            load_image(torn)


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_raise_one_kind_of_error():
    """So that they are named and can be skipped; Pillow has a dozen, RuntimeError and struct.error among them."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A], exif[0x9C9B] = 6, "text", 72.0, b"abc"
    exif.get_ifd(0x8769)[0x829A] = 0.5
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (24, 30, 3), dtype=np.uint8))
    broken = 0
    for fmt in FORMATS:
        whole = encoded(noise, fmt, **({"exif": exif} if fmt in ("AVIF", "JPEG", "PNG", "TIFF", "WEBP") else {}))
        for _ in range(200):
            data = np.frombuffer(whole, dtype=np.uint8).copy()
            places = random.integers(0, len(data), 8) if random.random() < 0.5 else random.integers(8, 300, 3)
            data[places % len(data)] = random.choice([0, 1, 2, 3, 5, 7, 10, 12, 255], len(places))
            try:
                load_image(data.tobytes())
            except ValueError:
                broken += 1
    assert broken > 300


# What a data set could smuggle in


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "outside" / "secret.png"
    path.parent.mkdir()
    picture("blue").save(path)
    return path


@pytest.mark.parametrize("scheme", ["file", "s3", "ftp"])
def test_only_http_urls_may_be_remote(folder, scheme):
    path = write(folder / "train.json", [talk("<image>", f"{scheme}://host/a.png")])
    with pytest.raises(ValueError, match=rf"the URL {scheme}://host/a\.png"):
        load_rows(path, allow_remote_images=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_string_in_place_of_bytes_is_no_path(secret, tmp_path, streaming):
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    table = pa.table({"messages": [said], "images": [[{"bytes": str(secret)}]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    row = next(iter(load_rows(tmp_path / "rows.parquet", streaming=streaming)))
    with pytest.raises(TypeError, match="expected bytes in 'bytes', found str"):
        make_collator()([row])


@pytest.mark.parametrize("streaming", [False, True])
def test_no_other_column_is_opened(secret, tmp_path, streaming):
    """`datasets` decodes a column of pictures as its row is read, whatever the path in it names."""
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(turn), "images": List(datasets.Image()), "photo": datasets.Image()})
    columns = {"messages": [said], "images": [[]], "photo": [{"bytes": None, "path": str(secret)}]}
    pq.write_table(pa.table(columns, schema=features.arrow_schema), tmp_path / "rows.parquet")
    row = next(iter(load_rows(tmp_path / "rows.parquet", streaming=streaming)))
    assert row["photo"] == {"bytes": None, "path": str(secret)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", ["linked", "metadata"])
def test_an_image_folder_stays_in_its_folder(secret, tmp_path, how, streaming):
    folder = tmp_path / "shots"
    folder.mkdir()
    picture().save(folder / "a.png")
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    record = {"file_name": "a.png", "messages": said}
    (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    assert len(list(load_rows(folder, streaming=streaming))) == 1
    if how == "linked":
        (folder / "a.png").unlink()
        (folder / "a.png").symlink_to(secret)
    else:
        (folder / "metadata.jsonl").write_text(json.dumps({**record, "images": [str(secret)]}) + "\n")
    with pytest.raises(ValueError, match="outside of|found paths in 'images'"):
        list(load_rows(folder, streaming=streaming))


def test_a_fault_of_the_machine_is_no_bad_row(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")

    def fail(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    bad = row(user("Q", 1), assistant("A"), images=[str(tmp_path / "a.png")])
    with pytest.raises(OSError, match=r"Too many open files: the picture cannot be read: .*a\.png"):
        make_collator(on_bad_row="skip")([bad])
