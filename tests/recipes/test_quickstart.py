"""The quickstart's data and report, and the whole pipeline, shrunk, as the child processes that a user starts.

The small scale learns nothing: what the full scale reaches is measured by running it.
"""

import json
import math
import random
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
    images = [image for row in rows for image in np.atleast_1d(row.get("image", []))]
    return {int(re.fullmatch(r"images/scan_(\d{4})\.png", image)[1]) for image in images if "table" not in image}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "data"
    _digits.write_data(folder, held_in=1497, held_out=300, pairs=200, tables=20)
    return folder


def test_no_scan_is_on_both_sides_of_the_split(data):
    held_in = scans_of(read(data / "pretrain.json")), scans_of(read(data / "instruct.json"))
    held_out = scans_of(read(data / "pretrain_test.json")), scans_of(read(data / "instruct_test.json"))
    assert held_in[0] == held_in[1] and len(held_in[0]) == 1497
    assert held_out[0] == held_out[1] and len(held_out[0]) == 300
    assert not held_in[0] & held_out[0]
    assert held_in[0] >= scans_of(read(data / "multi_image.json"))
    assert held_out[0] >= scans_of(read(data / "multi_image_test.json"))
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


def test_rows_of_two_pictures_ask_what_their_source_says_and_answer_it(data):
    rows, test_rows = (read(data / f"multi_image{end}.json") for end in ("", "_test"))
    # 1497 of them are those of several questions on one picture, from instruct.json.
    assert Counter(row["source"] for row in rows) == {
        "multi_turn": 1497,
        "pair": 200,
        "table_2x2": 20,
        "table_3x3": 20,
    }
    assert Counter(row["source"] for row in test_rows) == {
        **{"which_is_larger": 300, "sum": 300},
        **{"table_2x2": 150, "table_3x3": 150},
    }
    sums = "Zero One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve Thirteen Fourteen Fifteen Sixteen"
    sums = [f"{word}." for word in [*sums.split(), "Seventeen", "Eighteen"]]
    digits, asked, answers = load_digits().target, Counter(), set()
    for row in rows + test_rows:
        if len(np.atleast_1d(row["image"])) == 1:
            continue
        first, second = (digits[int(image[-8:-4])] for image in row["image"])
        texts = [turn["value"] for turn in row["conversations"]]
        assert texts[0].count("<image>") == 2 and not any("<image>" in text for text in texts[1:])
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            kind = "which_is_larger" if "larger" in question else "sum"
            assert row["source"] in (kind, "pair")
            larger = "They are equal." if first == second else "The first." if first > second else "The second."
            assert answer == {"which_is_larger": larger, "sum": sums[first + second]}[kind]
            asked[row["source"], kind] += 1
            answers.add(answer)
    assert asked == {
        **{("pair", "which_is_larger"): 200, ("pair", "sum"): 200},
        **{("which_is_larger", "which_is_larger"): 300, ("sum", "sum"): 300},
    }
    assert {"The first.", "The second.", "They are equal."} < answers


def test_a_page_shows_the_scans_that_its_table_names(data):
    raw = load_digits()
    held_in = scans_of(read(data / "pretrain.json"))
    # No scan repeats, so its pixels name it.
    known = {(255 - scan * 255 / 16).round().astype(np.uint8).tobytes(): n for n, scan in enumerate(raw.images)}
    for end, side in ((end, side) for end in ("", "_test") for side in (2, 3)):
        rows = [row for row in read(data / f"multi_image{end}.json") if row["source"] == f"table_{side}x{side}"]
        for row in rows[:20]:
            page = np.asarray(Image.open(data / row["image"]))
            assert page.shape == (32, 32)
            assert (page[8 * side :] == 255).all() and (page[:, 8 * side :] == 255).all()
            cells = [
                [known[page[top : top + 8, left : left + 8].tobytes()] for left in range(0, 8 * side, 8)]
                for top in range(0, 8 * side, 8)
            ]
            assert all((scan in held_in) == (end == "") for line in cells for scan in line)
            question, answer = (turn["value"] for turn in row["conversations"])
            assert question.count("<image>") == 1
            header, rule, *body = answer.splitlines()
            assert rule == "| --- | --- |" + " --- |" * (side - 2)
            assert [line.split(" | ") for line in (header, *body)] == [
                [
                    f"| {raw.target[line[0]]}",
                    *(str(raw.target[scan]) for scan in line[1:-1]),
                    f"{raw.target[line[-1]]} |",
                ]
                for line in cells
            ]


def test_table_in_markdown_has_its_first_row_as_header():
    assert _digits.write_table([3, 5, 1, 2], columns=2) == "| 3 | 5 |\n| --- | --- |\n| 1 | 2 |"


def test_texts_for_the_language_model_show_what_their_answers_say():
    rng, sums, tables, larger, titles = random.Random(0), 0, 0, 0, 0
    for _ in range(300):
        text = _digits.write_text(rng)
        assert text.endswith("</s>") and "<image>" not in text
        if title := re.fullmatch(r"((?: \w+)+)The digit (\w+)\.\n</s>", text):
            shown = [word for word in title[1].split() if word in _digits.WORDS]
            assert Counter(shown).most_common(1)[0][0] == title[2]
            titles += 1
        seen = re.match(
            r"USER: (?:Here is|First see) (\w+)(?: and here is|, then) (\w+)\. .* ASSISTANT: ([\w ]+)\.", text
        )
        if seen and {seen[1], seen[2]} <= {*_digits.WORDS}:
            first, second = _digits.WORDS.index(seen[1]), _digits.WORDS.index(seen[2])
            reply = "They are equal" if first == second else "The first" if first > second else "The second"
            assert re.search(r"larger\? ASSISTANT: ([\w ]+)\.", text)[1] == reply
            larger += 1
        if plus := re.match(r"USER: (?:What is|Add) (\w+) (?:plus|to) (\w+)[?.].* ASSISTANT: (\w+)\.</s>USER", text):
            first, second, total = (_digits.WORDS.index(word.lower()) for word in plus.groups())
            assert first + second == total
            sums += 1
        if "|" in text:
            cells = [digit for line in re.findall(r"\| \d.*", text) for digit in re.findall(r"\d", line)]
            page = re.search(r"((?:\w+ ){15}\w+)(?:\n|\. Give| ASSISTANT)", text)[1].split()
            assert [word for word in page if word not in ("paper", "white")] == [_digits.WORDS[int(c)] for c in cells]
            side = math.isqrt(len(cells))
            assert [number for number, word in enumerate(page) if word not in ("paper", "white")] == [
                4 * row + column for row in range(side) for column in range(side)
            ]
            tables += 1
    assert sums > 5 and tables > 30 and larger > 5 and titles > 20


def test_a_pair_shows_two_scans(data):
    pairs = [row["image"] for row in read(data / "multi_image.json") if row["source"] == "pair"]
    assert pairs and all(first != second for first, second in pairs)


def test_every_file_loads_as_llava_json_with_ids_and_text_only_rows(data):
    for name in ("pretrain", "instruct", "multi_image", "pretrain_test", "instruct_test", "multi_image_test"):
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


TABLE = "| 3 | 5 |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (TABLE, [True, True, True, True]),
        ("| 3 | 6 |\n| --- | --- |\n| 1 | 2 |", [True, False, True, True]),
        (" |3|5|\n|:-:|-|\n|1|2| \n", [True, True, True, True]),
        ("| 3 | 5 |\n| --- | --- |", [True, True, False, False]),
        ("| 3 | 5 |\n| --- | --- |\n| 1 |", [True, True, True, False]),
        (f"{TABLE}\n| 7 | 8 |", [True, True, True, True, False, False]),
        ("| 3 | 5 | 9 |\n| --- | --- | --- |\n| 1 | 2 | 9 |", [True, True, False, True, True, False]),
        ("| 3 | 5 |\n| 1 | 2 |", [False] * 4),
        ("| 3 | 5 |\n| --- |\n| 1 | 2 |", [False] * 4),
        (f"Here: {TABLE}", [False] * 4),
        ("Three.", [False] * 4),
        ("", [False] * 4),
    ],
)
def test_cells_of_markdown_tables_are_compared_by_place(answer, right):
    assert _report.rate_cells(answer, TABLE) == right


def test_shares_of_tables_have_a_row_for_cells():
    answers = {
        "before": [{"source": "table_2x2", "reference": TABLE, "answer": "", "exact_match": False}],
        "after": [
            {"source": "table_2x2", "reference": TABLE, "answer": TABLE.replace("5", "6"), "exact_match": False}
        ],
    }
    assert _report.rate_kinds(answers) == [
        ["table 2x2", "1", "0.0%", "0.0%"],
        ["table 2x2, cells", "4", "0.0%", "75.0%"],
        ["all", "1", "0.0%", "0.0%"],
    ]


def test_merging_is_rated_by_the_same_answers():
    assert _report.rate_merging([{"answer": "a"}, {"answer": "b"}], [{"answer": "a"}, {"answer": "c"}]) == (
        "The merged checkpoint gives the adapter's answer to 1 of 2 questions."
    )


def test_table_takes_shares_by_kind_and_leaves_open_what_was_not_asked():
    def record(source, right):
        return {"source": source, "reference": "Yes.", "exact_match": right}

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
    record = {"images": [str(picture), str(picture)], "question": text, "reference": text, "answer": text}
    record |= {"exact_match": False, "source": text}
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}, {"step": 2, "eval_loss": 9.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    path = tmp_path / "report.html"
    table = record | {"reference": f"| {text} |", "answer": f"| {text} |"}
    answers = {_report.ONE_PICTURE: {text: [record]}, _report.SEVERAL_PICTURES: {text: [table]}}
    _report.write_report(path, answers, [text], {text: tmp_path}, text)
    root = check_page(path)
    assert root.find(".//script") is None
    assert len(root.findall(".//img")) == 4
    assert [cell.text for cell in root.findall(".//dd") if "table" in cell.get("class", "")] == [f"| {text} |"] * 2
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

    for name in ("clip", "llama", "llava-init", "stage1", "stage2", "merged", "multi-image"):
        assert (folder / name / "model.safetensors").is_file()
    assert (folder / "stage1" / "projector" / "projector.safetensors").is_file()
    assert (folder / "qlora" / "adapter_model.safetensors").is_file()
    held_in, held_out = (scans_of(read(folder / "data" / f"instruct{end}.json")) for end in ("", "_test"))
    assert (len(held_in), len(held_out), held_in & held_out) == (48, 20, set())

    answers = {path.stem: _report.read_answers(path) for path in (folder / "answers").glob("*.jsonl")}
    asked = {name: [(r["id"], r["turn"]) for r in records] for name, records in answers.items()}
    models = ("llava-init", "stage2", "qlora", "merged", "multi-image")
    number = len(asked["instruct-merged"])
    assert len({tuple(asked[f"instruct-{model}"]) for model in models}) == 1 and number > 100
    assert [r["answer"] for r in answers["instruct-qlora"]] == [r["answer"] for r in answers["instruct-merged"]]
    assert f"The merged checkpoint gives the adapter's answer to {number} of {number} questions." in result.stdout
    assert asked["instruct-stage1"] == asked["instruct-stage2"][:80]
    assert asked["multi_image-stage2"] == asked["multi_image-multi-image"] and len(asked["multi_image-stage2"]) == 60
    images = {f"images/{Path(image).name}" for records in answers.values() for r in records for image in r["images"]}
    assert scans_of([{"image": image} for image in images]) == held_out
    # The pictures stand where the question has them; stage 2's own template cannot do that.
    questions = [
        {r["question"].count("<image>") for r in answers[f"multi_image-{m}"]} for m in ("stage2", "multi-image")
    ]
    assert questions == [{0}, {1, 2}]

    commands = [line.split()[2:] for line in result.stdout.splitlines() if line.startswith("$ ")]
    assert [Path(command[0]).name for command in commands] == [
        *("build_llava.py", "evaluate.py", "pretrain_projector.py", "evaluate.py", "sft_full.py", "evaluate.py"),
        *("sft_qlora.py", "evaluate.py", "merge_adapter.py", "evaluate.py"),
        *("sft_multi_image.py", "evaluate.py", "evaluate.py", "evaluate.py"),
        "chat.py",
    ]
    share = r"\W+([\d.]+%|–)"
    for kind in ("which digit", "even or odd", "plus one", "greater than five", "multi turn", "all"):
        assert re.search(rf"{kind}\W+\d+{share * 5}", result.stdout), kind
    for kind in ("which is larger", "sum", "table 2x2", "table 2x2, cells", "table 3x3", "table 3x3, cells", "all"):
        assert re.search(rf"{kind}\W+\d+{share * 2}", result.stdout), kind

    root = check_page(folder / "report.html")
    assert len(root.findall(".//polyline")) == 4
    assert [len(examples) for examples in root.findall(".//div[@class='examples']")] == [12, 12]
    assert [len(body) for body in root.iter("tbody")] == [6, 7]
    assert root.find(".//pre").text.split()[1:] == commands[-1]
