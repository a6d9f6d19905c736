"""The quickstart's data and report, and the whole pipeline, shrunk, as the child processes that a user starts.

The small scale learns nothing: what the full scale reaches is measured by running it.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import _digits
import _report
import quickstart
from collators import load_rows

RECIPES = Path(quickstart.__file__).parent


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def scans_of(rows):
    return {int(re.fullmatch(r"images/scan_(\d{4})\.png", row["image"])[1]) for row in rows if "image" in row}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    _digits.write_data(folder, held_in=1497, held_out=300)
    return folder


def test_no_scan_is_on_both_sides_of_the_split(data):
    held_in = scans_of(read(data / "pretrain.json")), scans_of(read(data / "instruct.json"))
    held_out = scans_of(read(data / "pretrain_test.json")), scans_of(read(data / "instruct_test.json"))
    assert held_in[0] == held_in[1] and len(held_in[0]) == 1497
    assert held_out[0] == held_out[1] and len(held_out[0]) == 300
    assert not held_in[0] & held_out[0]
    # The numbers are those of scikit-learn's scans, which do not repeat.
    images = load_digits().images
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images) == 1797


def test_pictures_are_the_scans_they_are_named_after(data):
    raw = load_digits()
    for row in read(data / "pretrain_test.json")[:20]:
        [scan] = scans_of([row])
        picture = Image.open(data / row["image"])
        assert picture.size == (32, 32)
        small = 16 - np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
        # Bicubic enlargement overshoots and blurs edges, but a cell keeps its own scan's shade and no other's.
        assert abs(small - raw.images[scan]).mean() < 1
        assert row["conversations"][1]["value"] == f"The digit {_digits.WORDS[raw.target[scan]]}."


def test_rows_ask_what_their_source_says_and_answer_it(data):
    rows = read(data / "instruct_test.json")
    assert Counter(row["source"] for row in rows) == dict.fromkeys([*_digits.QUESTIONS, "multi_turn"], 300)
    assert {row["source"] for row in rows[:1200]} == set(_digits.QUESTIONS)
    answers = {
        "which_digit": "Zero. One. Two. Three. Four. Five. Six. Seven. Eight. Nine.",
        "even_or_odd": "Even. Odd. Even. Odd. Even. Odd. Even. Odd. Even. Odd.",
        "plus_one": "One. Two. Three. Four. Five. Six. Seven. Eight. Nine. Ten.",
        "greater_than_five": "No. No. No. No. No. No. Yes. Yes. Yes. Yes.",
    }
    kinds = {wording: kind for kind, (wordings, _) in _digits.QUESTIONS.items() for wording in wordings}
    digits, lengths = load_digits().target, set()
    for row in rows:
        [scan] = scans_of([row])
        texts = [turn["value"] for turn in row["conversations"]]
        lengths.add((row["source"] == "multi_turn", len(texts)))
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            kind = kinds[question.removeprefix("<image>\n")]
            assert row["source"] in (kind, "multi_turn")
            assert answer == answers[kind].split()[digits[scan]]
    assert lengths == {(False, 2), (True, 4), (True, 6)}


def test_every_file_loads_as_llava_json_with_ids_and_text_only_rows(data):
    for name in ("pretrain", "instruct", "pretrain_test", "instruct_test"):
        rows = load_rows(data / f"{name}.json")
        assert len(set(rows["id"])) == len(rows) == len(read(data / f"{name}.json"))
        assert sum(not images for images in rows["images"]) == (80 if name == "instruct" else 0)


def test_titles_count_whatever_is_asked_and_whether_they_are_right(tmp_path):
    rows = [
        {"image": f"images/{name}.png", "conversations": [{}, {"value": title}]}
        for name, title in zip("abcd", _digits.TITLES, strict=False)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    zero, one, two, _ = (row["conversations"][1]["value"] for row in rows)
    answers = {"a": (zero, zero), "b": (one, two), "c": (two, "Yes."), "d": ("", "")}
    records = [{"images": [f"/x/{name}.png"], "answer": text} for name, pair in answers.items() for text in pair]
    assert _report.rate_titles(records, tmp_path / "rows.json") == (
        "After stage 1 50.0% of the 4 held-out pictures get a title, whatever is asked; for 25.0% it names the right "
        "digit."
    )


def test_table_takes_shares_by_kind_and_leaves_open_what_was_not_asked():
    def record(source, right):
        return {"source": source, "exact_match": right}

    answers = {
        "before": [record("plus_one", False), record("plus_one", True), record("multi_turn", False)],
        "after": [record("plus_one", True), record("plus_one", True)],
    }
    assert _report.rate_kinds(answers) == [
        ["plus one", "2", "50.0%", "100.0%"],
        ["multi turn", "1", "0.0%", "–"],
        ["all", "3", "33.3%", "100.0%"],
    ]


def test_report_escapes_what_a_model_says(tmp_path):
    picture = tmp_path / "scan.png"
    Image.new("L", (4, 4)).save(picture)
    text = "<script>alert('&')</script>"
    record = {"images": [str(picture)], "question": text, "reference": text, "answer": text}
    record |= {"exact_match": False, "source": text}
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}, {"step": 2, "eval_loss": 9.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    path = tmp_path / "report.html"
    _report.write_report(path, {text: [record]}, [text], {text: tmp_path}, text)
    root = check_page(path)
    assert root.find(".//script") is None
    assert {root.find(".//dd").text, root.find(".//pre").text, root.find("body/p").text} == {text}
    assert root.find(".//polyline").get("points") == "0.0,0.0 400.0,120.0"


def check_page(path):
    html = path.read_text(encoding="utf-8")
    own_pictures = r"data:image/png;base64,[\w+/=]+"
    assert not re.findall(r"//|@import|<link|<iframe|url\(", re.sub(own_pictures, "", html))
    root = ElementTree.fromstring(html)
    assert all(re.fullmatch(own_pictures, image.get("src")) for image in root.iter("img"))
    return root


def start(*flags):
    command = [sys.executable, str(RECIPES / "quickstart.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = start("--scale", "small", "--output_dir", tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("pass another --output_dir")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_failing_step_stops_the_quickstart_with_its_command(capfd):
    with pytest.raises(SystemExit) as stopped:
        quickstart.run("no_recipe.py", vision_tower="two words")
    command, shown = capfd.readouterr().out.strip(), str(stopped.value)
    assert command.endswith("no_recipe.py --vision_tower 'two words'")
    assert shown == f"exit status 2 from\n{command}"


@pytest.mark.slow
def test_small_scale_runs_the_whole_pipeline_and_again_over_its_own_output(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / ".quickstart").touch()
    (folder / "stage1").mkdir()
    (folder / "stage1" / "left by a run before").touch()
    result = start("--scale", "small", "--output_dir", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (folder / "stage1" / "left by a run before").exists()

    for name in ("clip", "llama", "llava-init", "stage1", "stage2", "merged"):
        assert (folder / name / "model.safetensors").is_file()
    assert (folder / "stage1" / "projector" / "projector.safetensors").is_file()
    assert (folder / "qlora" / "adapter_model.safetensors").is_file()
    held_in, held_out = (scans_of(read(folder / "data" / f"instruct{end}.json")) for end in ("", "_test"))
    assert (len(held_in), len(held_out), held_in & held_out) == (48, 20, set())

    answers = {
        name: _report.read_answers(folder / "answers" / f"{name}.jsonl")
        for name in ("llava-init", "stage1", "stage2", "qlora", "merged")
    }
    asked = {name: [(r["id"], r["turn"], r["question"]) for r in records] for name, records in answers.items()}
    assert asked["llava-init"] == asked["stage2"] == asked["qlora"] == asked["merged"]
    assert [r["answer"] for r in answers["qlora"]] == [r["answer"] for r in answers["merged"]]
    number = len(answers["merged"])
    assert f"The merged checkpoint gives the adapter's answer to {number} of {number} questions." in result.stdout
    assert asked["stage1"] == asked["stage2"][:80]
    assert {scan for records in answers.values() for r in records for scan in scans_of([{"image": image_of(r)}])} == (
        held_out
    )

    commands = [line.split()[2:] for line in result.stdout.splitlines() if line.startswith("$ ")]
    assert [Path(command[0]).name for command in commands] == [
        *("build_llava.py", "evaluate.py", "pretrain_projector.py", "evaluate.py", "sft_full.py", "evaluate.py"),
        *("sft_qlora.py", "evaluate.py", "merge_adapter.py", "evaluate.py"),
        "chat.py",
    ]
    for kind in ("which digit", "even or odd", "plus one", "greater than five", "multi turn", "all"):
        assert re.search(rf"{kind}\W+\d+\W+[\d.]+%\W+([\d.]+%|–)\W+[\d.]+%\W+[\d.]+%", result.stdout), kind

    root = check_page(folder / "report.html")
    assert len(root.findall(".//polyline")) == 3
    assert len({image.get("src") for image in root.iter("img")}) == 12
    assert len(root.findall(".//tbody/tr")) == 6
    assert root.find(".//pre").text.split()[1:] == commands[-1]


def image_of(record):
    return f"images/{Path(record['images'][0]).name}"
