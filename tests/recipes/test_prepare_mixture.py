"""The steps of a mixture, its determinism, its refusals, and that its output is what `load_rows` takes."""

import json
import math
import os
import re
from dataclasses import fields
from pathlib import Path
from threading import Thread

import pytest
import yaml
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import _mixture
import _mixture_steps
import prepare_mixture
import tiny
from _mixture_steps import sort_records
from collators import load_rows
from collators.row_shapes import MARKERS

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SHORT = "Answer the question using a single word or phrase."
ORDER = "an optional system turn, then human and gpt in alternation, human first and gpt last"
JSON = "a list of objects in a .json file, one object a line in a .jsonl file"


def talk(*texts, image=None, **columns):
    """A row of LLaVA JSON; `texts` alternate between human and gpt."""
    turns = [{"from": "gpt" if at % 2 else "human", "value": text} for at, text in enumerate(texts)]
    pictures = {} if image is None else {"images" if isinstance(image, list) else "image": image}
    return {**columns, **pictures, "conversations": turns}


def values(row):
    return [turn["value"] for turn in row["conversations"]]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]"
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """`mix(rows, steps)`: run the recipe on one source, or on `sources`; returns the rows of its output."""
    monkeypatch.chdir(tmp_path)

    def run(rows=None, steps=(), *flags, sources=None, shuffle=False, suffix=".jsonl", output="mix.jsonl", **source):
        if rows is not None:
            write(Path(f"rows{suffix}"), rows)
        entry = {"name": "vqa", "path": f"rows{suffix}", "steps": list(steps), **source}
        Path("mixture.yaml").write_text(yaml.safe_dump({"sources": sources or [entry], "shuffle": shuffle}))
        prepare_mixture.main(["--output", output, *flags])
        return [json.loads(line) for line in Path(output).read_text("utf-8").splitlines()]

    return run


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    text = (RECIPES.parent / "docs" / "mixture.md").read_text(encoding="utf-8")
    (mixture,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    vqa, chats, mixed = re.findall(r"```jsonl\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    Path("data/images").mkdir(parents=True)
    for file, content in (("mixture.yaml", mixture), ("data/vqa.jsonl", vqa), ("data/chats.jsonl", chats)):
        Path(file).write_text(content, encoding="utf-8")
    prepare_mixture.main(["--config", "mixture.yaml", "--output", "mixed/mix.jsonl"])
    assert Path("mixed/mix.jsonl").read_text(encoding="utf-8") == mixed
    assert left_out("mixed/mix.jsonl", source=1) == {f"invalid rows: expected {ORDER}": 1}


def test_the_documented_row_of_each_dataset_is_taken(mix):
    text = (RECIPES.parent / "docs" / "mixture.md").read_text(encoding="utf-8")
    rows = [json.loads(row) for row in re.findall(r"^\| [\w, -]+ \| `(\{.*?\})`", text, re.M)]
    assert [row["id"] for row in mix(rows)] == [1, 2, 3, 4, 5, 6]
    assert len(mix([rows[3]], ["rotate_choices"], "--overwrite")) == 2


def test_the_documentation_names_every_step_and_key():
    text = (RECIPES.parent / "docs" / "mixture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)", text, re.M)
    keys = {known.name for kind in (_mixture.Mixture, _mixture.Source) for known in fields(kind)}
    assert set(named) == keys | _mixture_steps.STEPS.keys()


def read_summary(output="mix.jsonl"):
    return json.loads(Path(f"{output}.summary.json").read_text())


def left_out(output="mix.jsonl", source=0, step=0):
    """What a step left out, by reason; step 0 is the reading of rows."""
    return read_summary(output)["sources"][source]["steps"][step]["left_out"]


def test_a_row_comes_out_as_it_went_in(mix):
    rows = [
        talk("<image>\nWhät?", "Ä cat.", image="a.png", id=7, box=[0, 0.5]),
        talk("<image> and <image>?", "Both.", image=["a.png", "b/c.png"]),
        talk("Hi", "Yes", image=None, id="7"),
    ]
    assert mix(rows) == [{**row, "source": "vqa"} for row in rows]
    assert mix(rows, (), "--overwrite", suffix=".json") == [{**row, "source": "vqa"} for row in rows]


def test_speakers_get_llavas_names(mix):
    turns = [("system", "Be brief."), ("user", "A?"), ("assistant", "B.")]
    (row,) = mix([{"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}])
    assert [turn["from"] for turn in row["conversations"]] == ["system", "human", "gpt"]


STEPS = {
    "merge": (
        [
            talk("<image>\nA?", "a", image="1.png", id=1),
            talk("B?\n<image>", "b", image="2.png", id=2),
            talk("Text?", "t", id=3),
            talk("C? <image>", "c", image="1.png", id=4),
            talk("<image><image>\nD?", "d", image=["1.png", "2.png"], id=5),
            talk("Text?", "t", id=6),
        ],
        ["merge_same_image"],
        [
            talk("<image>\nA?", "a", "C? ", "c", image="1.png", id=1),
            talk("B?\n<image>", "b", image="2.png", id=2),
            talk("Text?", "t", id=3),
            talk("<image><image>\nD?", "d", image=["1.png", "2.png"], id=5),
            talk("Text?", "t", id=6),
        ],
    ),
    "prompt": (
        [talk("<image>\nA?", "a", "B?", "b", image="1.png"), talk("<image>", "c", image="1.png")],
        [{"add_prompt": {"prompt": SHORT}}],
        [
            talk(f"<image>\nA?\n{SHORT}", "a", "B?", "b", image="1.png"),
            talk(f"<image>\n{SHORT}", "c", image="1.png"),
        ],
    ),
    "prompt on every turn": (
        [talk("A?\n<image>", "a", "B?", "b", image="1.png")],
        [{"add_prompt": {"prompt": SHORT, "every_turn": True}}],
        [talk(f"A?\n<image>\n{SHORT}", "a", f"B?\n{SHORT}", "b", image="1.png")],
    ),
    "prompt behind a picture": (
        [talk("Where?<image>", "a", image="1.png"), talk("A?\n<image><image>", "b", image=["1.png", "2.png"])],
        [{"add_prompt": {"prompt": SHORT}}],
        [
            talk(f"Where?<image>\n\n{SHORT}", "a", image="1.png"),
            talk(f"A?\n<image><image>\n\n{SHORT}", "b", image=["1.png", "2.png"]),
        ],
    ),
    "prompt of lines around the question": (
        [talk("Where?<image>", "a", image="1.png"), talk("<image>", "b", image="1.png")],
        [{"add_prompt": {"prompt": "Look.\n{question}\nShort."}}],
        [
            talk("Look.\nWhere?<image>\n\nShort.", "a", image="1.png"),
            talk("<image>Look.\nShort.", "b", image="1.png"),
        ],
    ),
    "prompt around the question": (
        [talk("<image>\n[0.1, 0.2, 0.3, 0.4]", "a", image="1.png")],
        [{"add_prompt": {"prompt": "Describe {question}, briefly."}}],
        [talk("<image>\nDescribe [0.1, 0.2, 0.3, 0.4], briefly.", "a", image="1.png")],
    ),
    "rotate": (
        [talk("<image>\nWhere?", "sea", image="1.png", choices=["sky", "sea", "road"], id=1)],
        ["rotate_choices", {"add_prompt": {"prompt": "Letter."}}],
        [
            talk("<image>\nWhere?\nA. sky\nB. sea\nC. road\nLetter.", "B", image="1.png", id=1),
            talk("<image>\nWhere?\nA. sea\nB. road\nC. sky\nLetter.", "A", image="1.png", id=1),
            talk("<image>\nWhere?\nA. road\nB. sky\nC. sea\nLetter.", "C", image="1.png", id=1),
        ],
    ),
    "rotate behind a picture": (
        [talk("Where?<image>", "sea", image="1.png", choices=["sky", "sea"])],
        ["rotate_choices"],
        [
            talk("Where?<image>\n\nA. sky\nB. sea", "B", image="1.png"),
            talk("Where?<image>\n\nA. sea\nB. sky", "A", image="1.png"),
        ],
    ),
    "merge, one picture under two names": (
        [talk("<image>A", "a", image="./x//1.png"), talk("<image>B", "b", image="x/1.png")],
        ["merge_same_image"],
        [talk("<image>A", "a", "B", "b", image="./x//1.png")],
    ),
    "merge, choices": (
        [talk("<image>A", "a", image=f"{at}.png", choices=["a", "b"]) for at in (1, 1, 2)],
        ["merge_same_image"],
        [talk("<image>A", "a", "A", "a", image="1.png"), talk("<image>A", "a", image="2.png", choices=["a", "b"])],
    ),
    "merge, a picture alone": (
        [talk("<image>", "a", image="1.png"), talk("<image>\n", "b", image="1.png")],
        ["merge_same_image"],
        [talk("<image>", "a", "", "b", image="1.png")],
    ),
    "split": (
        [talk("<image>\nA", "a", "B", "b", "C", "c", image="1.png"), talk("D", "d", "E", "e")],
        [{"split_exchanges": {"at_most": 2}}],
        [
            talk("<image>\nA", "a", "B", "b", image="1.png"),
            talk("<image>\nC", "c", image="1.png"),
            talk("D", "d", "E", "e"),
        ],
    ),
    "split, several pictures": (
        [talk("<image> A", "a", "B <image>", "b", "C", "c", image=["1.png", "2.png"])],
        [{"split_exchanges": {"at_most": 1}}],
        [
            talk("<image> A", "a", image="1.png"),
            talk("<image>\nB <image>", "b", image=["1.png", "2.png"]),
            talk("<image>\n<image>\nC", "c", image=["1.png", "2.png"]),
        ],
    ),
    "repeat": (
        [talk("A", "a"), talk("<image>B", "b", image="1.png")],
        [{"repeat": {"times": 2}}],
        [talk("A", "a"), talk("A", "a"), talk("<image>B", "b", image="1.png"), talk("<image>B", "b", image="1.png")],
    ),
    "drop empty": (
        [talk("A", " \n"), talk("<image>", "b", image="1.png"), talk("", "c")],
        ["drop_empty"],
        [talk("<image>", "b", image="1.png")],
    ),
    "share over one": (
        [talk("A", "a"), talk("B", "b")],
        [{"sample": {"share": 2}}],
        [talk("A", "a")] * 2 + [talk("B", "b")] * 2,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_gives_these_rows(mix, name):
    rows, steps, expected = STEPS[name]
    assert mix(rows, steps) == [{**row, "source": "vqa"} for row in expected]


def test_a_system_turn_opens_every_segment(mix):
    turns = [("system", "S"), ("human", "A"), ("gpt", "a"), ("human", "B"), ("gpt", "b")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    assert list(map(values, mix([row], [{"split_exchanges": {"at_most": 1}}]))) == [["S", "A", "a"], ["S", "B", "b"]]


def test_rows_with_another_system_turn_are_not_joined(mix):
    rows = [talk("<image>A", "a", image="1.png", id=at) for at in range(3)]
    rows[1]["conversations"].insert(0, {"from": "system", "value": "S"})
    assert [(row["id"], len(row["conversations"])) for row in mix(rows, ["merge_same_image"])] == [(0, 4), (1, 3)]


def test_a_system_column_becomes_a_turn(mix, tokenizer):
    rows = [talk("<image>A", "a", image="1.png", id=1)]
    rows += [talk("<image>B", "b", image="1.png", id=at, system="Be brief.") for at in (2, 3)]
    merged = mix(rows, ["merge_same_image"], "--tokenizer", tokenizer)
    assert [(row["id"], values(row)) for row in merged] == [
        (1, ["<image>A", "a"]),
        (2, ["Be brief.", "<image>B", "b", "B", "b"]),
    ]
    assert not any("system" in row for row in merged) and merged[1]["conversations"][0]["from"] == "system"
    counted = len(tiny.byte_tokenizer()("Be brief.", add_special_tokens=False)["input_ids"])
    assert read_summary()["sources"][0]["tokens"] == counted + 6
    mix(rows, [{"truncate": {"tokens": counted}}], "--tokenizer", tokenizer, "--overwrite")
    assert left_out(step=1) == {f"rows with more than {counted} tokens in the first exchange": 2}


def test_a_question_that_was_a_picture_is_counted_when_it_gets_empty(mix):
    mix([talk("<image>", "a", image="1.png")] * 3, ["merge_same_image"])
    assert left_out(step=1) == {
        "rows joined to one of the same picture": 2,
        "<image> that were a whole question, now an empty one": 2,
    }


@given(st.lists(st.sampled_from(["A?", "<image>", "\n", " "]), max_size=6).map("".join))
def test_a_prompt_has_a_line_of_its_own_wherever_pictures_stand(question):
    row = talk(question, "a") | {"images": []}
    (prompted,) = _mixture_steps.add_prompt(row, None, prompt="P")
    text, front = values(prompted)[0], MARKERS["front"].sub("", values(prompted)[0])
    assert front == "P" or front.endswith("\nP")
    assert text == "P" or text.endswith("\nP")
    assert front[:-1].rstrip("\n") == MARKERS["front"].sub("", question).rstrip("\n")


def test_a_row_that_a_step_refuses_does_not_take_its_siblings_along(mix):
    row = talk("A", "x", "B", "z", "C", "y", choices=["x", "y"])
    kept = mix([row], [{"split_exchanges": {"at_most": 1}}, "rotate_choices"], drop_invalid=True)
    assert [values(row) for row in kept] == [
        ["A\nA. x\nB. y", "A"],
        ["A\nA. y\nB. x", "B"],
        ["C\nA. x\nB. y", "B"],
        ["C\nA. y\nB. x", "A"],
    ]
    (source,) = read_summary()["sources"]
    assert [(step["rows_in"], step["rows_out"]) for step in source["steps"]] == [(1, 1), (1, 3), (3, 4)]
    assert list(left_out(step=2).values()) == [1]


def test_a_wrong_tokenizer_stops_before_rows_are_read(mix, capsys):
    with pytest.raises(OSError):
        mix([talk("A", "a")], (), "--tokenizer", "no/such/folder")
    assert "vqa" not in capsys.readouterr().out


def test_one_of_several_prompts_is_drawn_for_each_row(mix):
    rows = mix([talk("A", "a")] * 200, [{"add_prompt": {"prompt": ["P", "Q"]}}])
    drawn = [values(row)[0] for row in rows]
    assert set(drawn) == {"A\nP", "A\nQ"}
    assert 60 < drawn.count("A\nP") < 140


def test_exchanges_are_drawn_in_their_order_with_the_picture(mix):
    texts = [text for at in range(20) for text in (f"{'<image>' if at == 3 else ''}{at}", str(at))]
    (row,) = mix([talk(*texts, image="1.png")], [{"sample_exchanges": {"at_most": 10}}])
    numbers = [int(text) for text in values(row)[1::2]]
    assert len(numbers) == 10 and numbers == sorted(set(numbers)) and numbers != list(range(10))
    assert "".join(values(row)).count("<image>") == 1 and row["image"] == "1.png"
    assert read_summary()["sources"][0]["steps"][1]["left_out"] == {"exchanges not drawn": 10}


@pytest.mark.parametrize(("options", "count"), [({"rows": 37}, 37), ({"share": 0.25}, 25), ({"share": 1.5}, 150)])
def test_a_sample_is_exact_and_keeps_the_order(mix, options, count):
    rows = mix([talk("A", "a", id=at) for at in range(100)], [{"sample": options}])
    ids = [row["id"] for row in rows]
    assert len(ids) == count and ids == sorted(ids)
    assert ids[:count] != list(range(count))
    assert max(ids.count(at) for at in range(100)) == (2 if count > 100 else 1)


def test_every_row_is_drawn_equally_often(mix):
    drawn = [0] * 20
    for seed in range(60):
        flags = ("--overwrite", "--seed", str(seed))
        for row in mix([talk("A", "a", id=at) for at in range(20)], [{"sample": {"rows": 10}}], *flags):
            drawn[row["id"]] += 1
    assert sum(drawn) == 600
    assert min(drawn) > 15 and max(drawn) < 45  # 30 expected, standard deviation 3.9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_tokens_are_counted_without_pictures_and_long_rows_cut(mix, tokenizer):
    count = len(tiny.byte_tokenizer()("Is the number even or odd?", add_special_tokens=False)["input_ids"])
    question = "Is the number even or odd?"
    rows = [
        talk(f"<image>\n{question}", question, question, question, question, question, image="1.png", id=1),
        talk(question * 3, question * 3, id=2),
        talk(question, question, id=3),
    ]
    kept = mix(rows, [{"truncate": {"tokens": 5 * count}}], "--tokenizer", tokenizer)
    assert [(row["id"], len(row["conversations"])) for row in kept] == [(1, 4), (3, 2)]
    (source,) = read_summary()["sources"]
    assert source["tokens"] == 6 * count
    assert source["steps"][1]["left_out"] == {
        f"exchanges beyond {5 * count} tokens": 1,
        f"rows with more than {5 * count} tokens in the first exchange": 1,
    }


def test_the_summary_accounts_for_every_row(mix, capsys):
    rows = [talk(f"<image>{at}?", str(at), image=f"{at % 4}.png") for at in range(10)] + [talk("A", "")]
    mix(rows, ["drop_empty", "merge_same_image", {"sample": {"rows": 3}}, {"repeat": {"times": 2}}])
    summary = read_summary()
    (source,) = summary["sources"]
    flow = [(step["step"], step["rows_in"], step["rows_out"], step["left_out"]) for step in source["steps"]]
    assert flow == [
        ("read", 11, 11, {}),
        ("drop_empty", 11, 10, {"rows with an empty turn": 1}),
        ("merge_same_image", 10, 4, {"rows joined to one of the same picture": 6}),
        ("sample", 4, 3, {"rows not drawn": 1}),
        ("repeat", 3, 6, {}),
    ]
    output = [json.loads(line) for line in Path("mix.jsonl").read_text().splitlines()]
    assert summary["total"] == {
        "tokens": None,
        "rows_read": 11,
        "rows": 6,
        "turns": sum(len(row["conversations"]) for row in output),
        "pictures": 6,
    }
    printed = capsys.readouterr().out
    assert "vqa, sample: 1 rows not drawn" in printed and "–" in printed


def two_sources(count=300):
    write(Path("one.jsonl"), [talk(f"<image>{at}?", str(at), image=f"{at % 97}.png", id=at) for at in range(count)])
    write(Path("two.json"), [talk("A", "a", "B", "b", "C", "c", id=f"t{at}") for at in range(count)])
    one = ["merge_same_image", {"add_prompt": {"prompt": ["P", "Q", "R"]}}, {"sample": {"share": 0.7}}]
    two = [{"sample_exchanges": {"at_most": 2}}, {"repeat": {"times": 2}}]
    return [{"path": "one.jsonl", "steps": one}, {"path": "two.json", "steps": two}]


def test_neither_processes_nor_runs_on_disk_change_a_byte(mix, monkeypatch, tokenizer):
    sources = two_sources()
    sources[1]["steps"].insert(0, {"truncate": {"tokens": 4}})
    outputs = []
    for workers, chunk, run_bytes in ((1, 100, 1 << 20), (2, 7, 1 << 20), (1, 10, 3000)):
        monkeypatch.setattr(_mixture, "CHUNK_ROWS", chunk)  # 7: more chunks than are handed out ahead
        monkeypatch.setattr(_mixture_steps, "RUN_BYTES", run_bytes)
        monkeypatch.setattr(_mixture_steps, "RUNS_OPEN", 3)
        output = f"mix-{chunk}.jsonl"  # of its own, or the second run would find the first one's up to date
        flags = ("--num_workers", str(workers), "--tokenizer", tokenizer)
        mix(None, (), *flags, sources=sources, shuffle=True, output=output)
        outputs.append((Path(output).read_bytes(), read_summary(output)))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0][1]["total"]["tokens"] > 0
    assert outputs[0][1]["sources"][1]["steps"][1]["left_out"] == {"exchanges beyond 4 tokens": 300}
    assert not list(Path().glob("*.partial"))


def test_a_draw_is_the_same_number_everywhere():
    assert _mixture_steps.draw(42, "vqa", 0, 7) == 9663104928573861203


def test_the_seed_decides_the_draws(mix):
    sources = two_sources()
    first = mix(None, sources=sources)
    assert mix(None, (), "--seed", "42", sources=sources, output="again.jsonl") == first
    assert mix(None, (), "--seed", "43", "--overwrite", sources=sources) != first


def test_sources_follow_each_other_unless_shuffled(mix):
    sources = two_sources(100)
    kept = mix(None, sources=sources)
    names = [row["source"] for row in kept]
    assert names == sorted(names) and set(names) == {"one", "two"}
    shuffled = mix(None, (), "--overwrite", sources=sources, shuffle=True)
    assert shuffled != kept
    assert sorted(map(json.dumps, shuffled)) == sorted(map(json.dumps, kept))


@given(st.lists(st.tuples(st.text("ab\n", max_size=2), st.integers(), st.binary(max_size=40)), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
def test_sorting_on_disk_is_sorting(tmp_path, records):
    bytes_held, runs_open = _mixture_steps.RUN_BYTES, _mixture_steps.RUNS_OPEN
    _mixture_steps.RUN_BYTES, _mixture_steps.RUNS_OPEN = 1000, 2
    try:
        assert list(sort_records(records, str(tmp_path))) == sorted(records)
    finally:
        _mixture_steps.RUN_BYTES, _mixture_steps.RUNS_OPEN = bytes_held, runs_open


def test_a_second_run_does_nothing(mix, capsys):
    rows = [talk("A", "a", id=at) for at in range(5)]
    mix(rows)
    before = os.stat("mix.jsonl")
    os.utime("mix.jsonl.summary.json", ns=(0, 0))
    capsys.readouterr()
    prepare_mixture.main(["--output", "mix.jsonl", "--num_workers", "2"])
    assert "mix.jsonl is up to date" in capsys.readouterr().out
    assert (os.stat("mix.jsonl").st_mtime_ns, os.stat("mix.jsonl").st_ino) == (before.st_mtime_ns, before.st_ino)
    assert os.stat("mix.jsonl.summary.json").st_mtime_ns == 0


def test_a_touched_source_is_the_same_source(mix, capsys):
    mix([talk("A", "a")])
    os.utime("rows.jsonl", ns=(0, 0))
    mix()
    assert "mix.jsonl is up to date" in capsys.readouterr().out


def test_what_a_run_cannot_know_to_be_the_same_is_not_current(mix, tmp_path):
    folder = tmp_path / "tokenizer"
    tiny.byte_tokenizer().save_pretrained(folder)
    mix([talk("A", "a")], (), "--tokenizer", str(folder))
    with open(folder / "tokenizer_config.json", "a") as file:
        file.write("\n")
    with pytest.raises(FileExistsError, match="not known to be what these files, settings and code give"):
        mix(None, (), "--tokenizer", str(folder))
    source = Path("rows.jsonl").stat()
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("A", "B"))
    os.utime("rows.jsonl", ns=(source.st_atime_ns, source.st_mtime_ns))
    with pytest.raises(FileExistsError, match="not known to be"):
        mix()
    mix([talk("A", "a")], ["drop_missing_images"], "--overwrite")
    with pytest.raises(FileExistsError, match="not known to be"):
        mix(None, ["drop_missing_images"])


def test_a_run_killed_between_summary_and_output_can_be_repeated(mix, monkeypatch):
    def replace(source, target):
        if str(target) == "mix.jsonl":
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        mix([talk("A", "a")])
    assert Path("mix.jsonl.summary.json").exists() and not Path("mix.jsonl").exists()
    assert len(mix()) == 1


def test_a_second_run_at_once_waits_for_the_first(mix, monkeypatch):
    write(Path("rows.jsonl"), [talk("A", "a")])
    second = Thread(target=mix)
    with FileLock("mix.jsonl.lock"):
        second.start()
        second.join(1)
        assert second.is_alive() and not Path("mix.jsonl").exists()
    second.join()
    assert Path("mix.jsonl").exists() and not list(Path().glob("*.partial"))


def test_a_source_that_changes_meanwhile_is_noticed(mix, monkeypatch):
    def write_and_change(*args, **kwargs):
        summary = _mixture.write_mixture(*args, **kwargs)
        write(Path("rows.jsonl"), [talk("A", "b")])
        return summary

    monkeypatch.setattr(prepare_mixture, "write_mixture", write_and_change)
    with pytest.raises(ValueError, match="a source changed while it was read"):
        mix([talk("A", "a")])
    assert list(Path().glob("mix.jsonl*")) == [Path("mix.jsonl.lock")]


@pytest.mark.parametrize("change", ["seed", "input", "steps", "output", "no summary", "half", "list"])
def test_an_output_of_other_settings_is_not_replaced_unasked(mix, change):
    rows = [talk("A", "a", id=at) for at in range(5)]
    mix(rows)
    flags, steps = (), ()
    if change == "output":
        with open("mix.jsonl", "a") as file:
            file.write("{}\n")
    elif change == "no summary":
        Path("mix.jsonl.summary.json").unlink()
    elif change in ("half", "list"):
        Path("mix.jsonl.summary.json").write_text("{" if change == "half" else "[]")
    elif change == "input":
        rows[0]["id"] = 9
    elif change == "steps":
        steps = ["drop_empty"]
    else:
        flags = ("--seed", "1")
    before = Path("mix.jsonl").read_bytes()
    given_rows = rows if change == "input" else None
    with pytest.raises(FileExistsError, match="--overwrite to replace it"):
        mix(given_rows, steps, *flags)
    assert Path("mix.jsonl").read_bytes() == before
    assert len(mix(given_rows, steps, *flags, "--overwrite")) == 5


BAD_ROWS = {
    "unreadable JSON": ('{"id": 1,', JSON),
    "an infinite number": ('{"box": [1e400], "conversations": []}', JSON),
    "not an object": ("7", "an object"),
    "a typo": ({"conversation": []}, "the key 'conversations'"),
    "another shape": ({"messages": talk("A", "a")["conversations"]}, "'role' and 'content' alone"),
    "another good shape": ({"query": "A", "response": "a"}, "'conversations'"),
    "two shapes": ({**talk("A", "a"), "query": "A", "response": "a"}, "the keys of one shape"),
    "a malformed turn": ({"conversations": [{"from": "human", "text": "A"}]}, "'from' and 'value' alone"),
    "an unknown speaker": (
        {"conversations": [{"from": "me", "value": "A"}]},
        "human or user, gpt or assistant, or system",
    ),
    "turns out of order": (talk("A", "a", "B"), ORDER),
    "too many pictures": (talk("A", "a", image="1.png"), "as many <image> as pictures"),
    "unclear pictures": ({**talk("A", "a"), "img": "1.png"}, "the key 'image' or 'images'"),
    "tools": (talk("A", "a", tools="[{}]"), "a conversation with pictures alone"),
    "videos": (talk("A", "a", videos=["1.mp4"]), "a conversation with pictures alone"),
    "a number as system": (talk("A", "a", system=7), "a string in 'system'"),
    "a picture in the system": (talk("A", "a", system="<image>"), "<image> in user turns only"),
    "two system turns": (
        {"system": "S", "conversations": [{"from": "system", "value": "S"}, *talk("A", "a")["conversations"]]},
        "one of the two",
    ),
}


@pytest.mark.parametrize(
    ("name", "workers"),
    [(name, "1") for name in BAD_ROWS] + [("unreadable JSON", "2"), ("turns out of order", "2")],
)
def test_a_bad_row_stops_the_run_or_is_counted(mix, name, workers, capsys):
    bad, expected = BAD_ROWS[name]
    rows = [talk("A", "a", id="good"), bad]
    with pytest.raises(ValueError, match=r"1 rows cannot be used \(1 expected") as caught:
        mix(rows, (), "--num_workers", workers)
    assert "rows.jsonl, row 1" in str(caught.value) and f"; expected {expected}. " in str(caught.value)
    assert list(Path().glob("mix.jsonl*")) == [Path("mix.jsonl.lock")]

    kept = mix(rows, (), "--num_workers", workers, drop_invalid=True)
    assert [row["id"] for row in kept] == ["good"]
    (source,) = read_summary()["sources"]
    assert source["rows_read"] == 2 and left_out() == {f"invalid rows: expected {expected}": 1}
    assert "rows.jsonl, row 1" in source["first_invalid"][0]
    assert f"vqa, read: 1 invalid rows: expected {expected}" in capsys.readouterr().out


def test_rows_that_load_are_taken(mix):
    system = [{"from": "system", "value": "S"}]
    expected = [talk("A", "a"), {"conversations": system + talk("A", "a")["conversations"]}, talk("A", "a", tools=[])]
    rows = [talk("A", "a", messages=None), talk("A", "a", system="S"), talk("A", "a", system="", tools=[])]
    assert mix(rows) == [{**row, "source": "vqa"} for row in expected]


def test_five_bad_rows_are_named_and_all_are_counted(mix):
    with pytest.raises(ValueError) as caught:
        mix([*([talk("A")] * 7), talk("A", "a"), *([talk("<image>", "a")] * 4)])
    counted = f"11 rows cannot be used (7 expected {ORDER}; 4 expected as many <image> as pictures)"
    assert counted in str(caught.value)
    assert str(caught.value).count("rows.jsonl, row") == 5


@pytest.mark.parametrize(
    "row",
    [
        talk("A", "x"),
        talk("A", "x", choices="x"),
        talk("A", "x", choices=["x"]),
        talk("A", "x", choices=["x", "x"]),
        talk("A", "x", choices=["x", 7]),
        talk("A", "x", choices=["x", "<image>"]),
        talk("A", "x", "B", "x", choices=["x", "y"]),
    ],
)
def test_choices_that_cannot_be_rotated(mix, row):
    with pytest.raises(ValueError, match=r"\(1 expected one question, a list of 2 to 26"):
        mix([row], ["rotate_choices"])


def test_a_step_names_the_row_it_cannot_use(mix):
    rows = [talk("A", "x", choices=["x", "y"], id="fine"), talk("B", "z", choices=["x", "y"], id="off")]
    with pytest.raises(ValueError, match=r"row 1 \(id 'off'\): found 'choices': \['x', 'y'\] with 2 turns"):
        mix(rows, ["rotate_choices"])
    assert {row["id"] for row in mix(rows, ["rotate_choices"], drop_invalid=True)} == {"fine"}


def test_what_stands_behind_a_break_in_a_list_is_not_lost_silently(mix):
    Path("rows.json").write_text('[{"conversations": []}, {"id": , }, {"conversations": []}]')
    with pytest.raises(ValueError, match="What stands behind it in the list cannot be read"):
        mix(None, suffix=".json", drop_invalid=True)


def test_missing_pictures_are_dropped_when_asked(mix):
    Path("pictures").mkdir()
    tiny.picture().save("pictures/1.png")
    rows = [talk("<image>", "a", image=f"{at}.png", id=at) for at in range(3)]
    kept = mix(rows, ["drop_missing_images"], image_folder="pictures", output="out/mix.jsonl")
    assert [(row["id"], row["image"]) for row in kept] == [(1, "../pictures/1.png")]
    assert read_summary("out/mix.jsonl")["sources"][0]["steps"][1]["left_out"] == {"rows with a missing picture": 2}


def test_a_way_up_from_a_link_is_the_systems(mix, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    os.symlink(tmp_path / "elsewhere" / "deep", "link")
    Path("elsewhere/pictures").mkdir()
    tiny.picture().save("elsewhere/pictures/1.png")
    (row,) = mix([talk("<image>", "a", image="1.png")], ["drop_missing_images"], image_folder="link/../pictures")
    assert row["image"] == "elsewhere/pictures/1.png"


@pytest.mark.parametrize("linked", [False, True])
def test_the_output_loads_and_finds_its_pictures(mix, tmp_path, linked):
    folder = tmp_path / "elsewhere" / "deep"
    folder.mkdir(parents=True)
    if linked:
        os.symlink(folder, "out")
    Path("pictures").mkdir()
    for at in range(2):
        tiny.picture().save(f"pictures/{at}.png")
    absolute = str(tmp_path / "pictures" / "1.png")
    rows = [
        talk("<image>\nA?", "a", image="0.png", id=1, box=[1]),
        talk("<image>\nA?", "a", image=absolute, id="2"),
        talk("<image> <image>", "a", image=["0.png", "1.png"]),
        talk("Hi", "b"),
    ]
    mix(rows, image_folder="pictures", output="out/mix.jsonl")
    with pytest.raises(ValueError, match="outside of .*--allow_external_images"):
        load_rows("out/mix.jsonl")
    loaded = load_rows("out/mix.jsonl", allow_external_images=True)
    assert [len(row["images"]) for row in loaded] == [1, 1, 2, 0]
    assert all(os.path.samefile(row["images"][0], "pictures/0.png") for row in (loaded[0], loaded[2]))
    assert loaded["source"] == ["vqa"] * 4 and loaded["id"] == [1, "2", None, None]
    assert len(list(load_rows("out/mix.jsonl", streaming=True, allow_external_images=True))) == 4


VALUES = st.sampled_from(["A", "<image>B", "<image>", "", 7])
TURNS = st.lists(
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "user", "system"]), "value": VALUES},
        optional={"note": st.none() | st.just("x")},
    ),
    max_size=4,
)
PICTURES = st.sampled_from([None, "1.png", "", [], ["1.png"], ["1.png", "1.png"], 7])
OTHERS = {
    "image": PICTURES,
    "images": PICTURES,
    "img": PICTURES,
    "id": st.integers() | st.text(max_size=3),
    "system": st.sampled_from([None, "", "S", "<image>", 7]),
    "tools": st.sampled_from([None, [], "[]", {}]),
    "messages": st.sampled_from([None, talk("A", "a")["conversations"]]),
    "prompt": st.just("A"),
    "completion": st.just("a"),
    "choices": st.sampled_from([["a", "b"], 7]),
    "box": st.just(math.inf),
}
GOOD = st.sampled_from([talk("<image>A", "a"), talk("A", "a"), talk("<image>", "a", "B", "b")])
ROWS = st.fixed_dictionaries(
    {"conversations": GOOD.map(lambda row: row["conversations"]) | TURNS}, optional=OTHERS
) | GOOD.map(lambda row: row | {"image": "1.png"} if "<image>" in str(row) else row)


@given(st.lists(ROWS, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_left_of_any_rows_loads_and_all_are_accounted_for(mix, rows):
    for name in ("1.png", "own.png"):
        if not Path(name).exists():
            tiny.picture().save(name)
    steps = ["merge_same_image", {"split_exchanges": {"at_most": 1}}, "drop_empty", "rotate_choices"]
    steps += [{"add_prompt": {"prompt": SHORT}}]
    good = talk("<image>A", "a", image="own.png", choices=["a", "b"])
    kept = mix([*rows, good], steps, "--overwrite", drop_invalid=True)
    assert len(list(load_rows("mix.jsonl", streaming=True))) == len(kept)
    (source,) = read_summary()["sources"]
    read, merged, split, dropped, rotated, prompted = source["steps"]
    for before, after in zip(source["steps"], source["steps"][1:], strict=False):
        assert before["rows_out"] == after["rows_in"]
    assert read["rows_in"] == source["rows_read"] == len(rows) + 1 and prompted["rows_out"] == source["rows"]
    for step, copies in ((read, 1), (merged, 1), (dropped, 1), (rotated, 2), (prompted, 1)):
        gone = sum(count for why, count in step["left_out"].items() if "rows" in why)
        assert step["rows_out"] == copies * (step["rows_in"] - gone)
    assert split["rows_out"] >= split["rows_in"] and split["left_out"] == {}


@given(ROWS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_is_taken_exactly_if_it_loads(mix, row):
    if not Path("1.png").exists():
        tiny.picture().save("1.png")
    good = talk("A", "a")
    kept = mix([good, row], (), "--overwrite", drop_invalid=True)
    try:
        loads = len(list(load_rows("rows.jsonl", streaming=True))) == 2
    except ValueError:
        loads = False
    assert len(kept) == 1 + loads


BAD_SETTINGS = {
    "an unknown key": ({"path": "rows.jsonl", "weight": 2}, "expected some of the keys name, path, image_folder"),
    "no path": ({"name": "a"}, "at least path"),
    "a wrong type": ({"path": "rows.jsonl", "drop_invalid": "yes"}, "expected bool"),
    "an unknown step": ({"path": "rows.jsonl", "steps": ["merge"]}, "expected one of the steps add_prompt, rotate"),
    "an unknown option": ({"path": "rows.jsonl", "steps": [{"repeat": {"n": 2}}]}, "expected the options times"),
    "a missing option": ({"path": "rows.jsonl", "steps": ["repeat"]}, "expected the options times"),
    "an option too many": ({"path": "rows.jsonl", "steps": [{"drop_empty": {"a": 1}}]}, "expected the options none"),
    "a wrong option": ({"path": "rows.jsonl", "steps": [{"repeat": {"times": "2"}}]}, "expected int"),
    "none of it": ({"path": "rows.jsonl", "steps": [{"repeat": {"times": 0}}]}, "numbers above 0"),
    "true for a number": ({"path": "rows.jsonl", "steps": [{"repeat": {"times": True}}]}, "expected int"),
    "no prompts": ({"path": "rows.jsonl", "steps": [{"add_prompt": {"prompt": []}}]}, "expected str | list"),
    "a picture in a prompt": (
        {"path": "rows.jsonl", "steps": [{"add_prompt": {"prompt": "<image>"}}]},
        "texts without",
    ),
    "infinitely many": ({"path": "rows.jsonl", "steps": [{"sample": {"share": math.inf}}]}, "finite numbers above 0"),
    "rows and share": ({"path": "rows.jsonl", "steps": [{"sample": {"rows": 1, "share": 1}}]}, "either rows or share"),
    "neither": ({"path": "rows.jsonl", "steps": ["sample"]}, "either rows or share"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_mixture_file_is_refused_with_what_is_known(mix, name):
    source, message = BAD_SETTINGS[name]
    write(Path("rows.jsonl"), [talk("A", "a")])
    with pytest.raises(ValueError) as caught:
        mix(sources=[source])
    assert "mixture.yaml, sources[0]" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sources:\n- steps: []\n  path: a.json\n  steps: []\n",
            r"found the key 'steps' twice\s+in .*line 2",
        ),
        ("sources: [{path: a.json, path: b.json}]", "found the key 'path' twice"),
        ("sources: [", r"expected the node content.*line 1"),
        ("sources: \x07", "special characters are not allowed"),
    ],
)
def test_a_file_that_is_not_sound_yaml_is_named(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)mine\.yaml: .*{message}"):
        _mixture.load_mixture(tmp_path / "mine.yaml")


def test_sources_need_files_and_names_of_their_own(mix):
    with pytest.raises(FileNotFoundError, match="no .json or .jsonl file at rows.jsonl"):
        mix()
    write(Path("rows.jsonl"), [talk("A", "a")])
    with pytest.raises(FileNotFoundError, match="no folder at nowhere"):
        mix(image_folder="nowhere")
    with pytest.raises(ValueError, match="each with its own name"):
        mix(sources=[{"path": "rows.jsonl"}] * 2)


def test_runs_that_cannot_end_well_are_refused(mix):
    rows = [talk("A", "a")]
    with pytest.raises(ValueError, match="source vqa: sample found 1 rows; expected at least 2"):
        mix(rows, [{"sample": {"rows": 2}}])
    with pytest.raises(ValueError, match="source vqa: truncate counts tokens; pass --tokenizer"):
        mix(rows, [{"truncate": {"tokens": 9}}])
    with pytest.raises(ValueError, match="no row is left of 1"):
        mix([talk("A", "")], ["drop_empty"])
    with pytest.raises(ValueError, match="the output is a folder or also a source"):
        mix(rows, (), "--overwrite", output="rows.jsonl")
    Path("folder.jsonl").mkdir()  # known before the work, not after it
    with pytest.raises(ValueError, match="the output is a folder or also a source"):
        mix(rows, output="folder.jsonl")
    with pytest.raises(ValueError, match="an output that ends in .jsonl"):
        mix(rows, output="mix.json")
    assert sorted(path.name for path in Path().iterdir()) == [
        *("folder.jsonl", "mix.jsonl.lock", "mixture.yaml", "rows.jsonl")
    ]


def test_llavas_own_mixture_runs_on_rows_as_the_datasets_come(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    preset = yaml.safe_load((RECIPES / "llava_v1_5_mixture.yaml").read_text())
    names = [source["name"] for source in preset["sources"]]
    assert names == ["llava", "sharegpt", "vqav2", "gqa", "okvqa", "ocrvqa", "aokvqa", "textcaps", "refcoco", "vg"]
    Path("data/images").mkdir(parents=True)
    for source in preset["sources"]:
        picture = None if source["name"] == "sharegpt" else "1.png"
        rows = [talk("<image>\nA?" if picture else "A?", "x", image=picture, choices=["x", "y"])] * 12
        write(Path(source["path"]), rows)
        for step in source.get("steps", []):
            if "sample" in step:
                assert step == {"sample": {"rows": 80000}}
                step["sample"]["rows"] = 1
    Path("mixture.yaml").write_text(yaml.safe_dump(preset))
    prepare_mixture.main(["--output", "mix.jsonl", "--tokenizer", tokenizer])
    written = {source["name"]: (source["rows"], source["turns"]) for source in read_summary()["sources"]}
    assert written == {
        "llava": (12, 24),
        "sharegpt": (12, 24),
        "vqav2": (1, 24),
        "gqa": (1, 24),
        "okvqa": (1, 24),
        "ocrvqa": (1, 24),
        "aokvqa": (24, 48),
        "textcaps": (1, 2),
        "refcoco": (2, 24),
        "vg": (1, 20),
    }
