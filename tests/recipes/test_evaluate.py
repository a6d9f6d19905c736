import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from jinja2 import TemplateError
from rich.console import Console
from transformers import GenerationConfig

import evaluate
import tiny
from _answers import answer, load_checkpoint, read_letter, score, summarise
from collators import LlavaDataCollator, chat_template_path

VICUNA = chat_template_path("vicuna_v1").read_text(encoding="utf-8")
# What the trained checkpoint knows: the pictures' colours and the turns.
LESSONS = [
    (["red"], ["Which colour?", "Red."]),
    (["blue"], ["Which colour?", "Blue.", "Is it a digit?", "No"]),
    (["red", "blue"], ["Which colours?", "Red and blue.", "How many?", "Two"]),
    ([], ["Which letter?", "B", "Why?", "B. It comes behind A"]),
]


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("random"), VICUNA)


@pytest.fixture(scope="module")
def trained_checkpoint(tmp_path_factory):
    """A tiny model overfitted to `LESSONS`, stop tokens included."""
    processor = tiny.make_processor(VICUNA)
    rows = []
    for colors, texts in LESSONS:
        turns = [tiny.assistant(text) if place % 2 else tiny.user(text) for place, text in enumerate(texts)]
        turns[0] = tiny.user(texts[0], images=len(colors))
        rows.append(tiny.row(*turns, images=[tiny.picture(color) for color in colors]))
    return tiny.overfit(tmp_path_factory.mktemp("trained"), processor, rows)


@pytest.fixture
def data(tmp_path):
    """`LESSONS` as LLaVA JSON, with an id, a source and the pictures as PNG files."""
    return write_lessons(tmp_path)


def write_lessons(folder, lessons=LESSONS, **columns):
    rows = []
    for number, (colors, texts) in enumerate(lessons):
        names = [f"{number}-{color}.png" for color in colors]
        for name, color in zip(names, colors, strict=True):
            tiny.picture(color).save(folder / name)
        values = ["<image>\n" * len(names) + texts[0], *texts[1:]]
        turns = [{"from": "gpt" if place % 2 else "human", "value": value} for place, value in enumerate(values)]
        source = "pictures" if colors else "text"
        rows.append({"id": f"row-{number}", "source": source, "image": names, "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def run(checkpoint, data, output, *flags):
    """Run the recipe; returns its records and its summary."""
    evaluate.main(["--model", checkpoint, "--dataset_name", str(data), "--output", str(output), *map(str, flags)])
    summary = json.loads(Path(f"{output}.summary.json").read_text())
    return read_records(output), summary


def read_records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("B. Because it is round", "B"),
        ("B. ", "B"),
        ("It is round. The answer is C.", "C"),
        ("The answer is D, I think", "D"),
        ("The answer is Apple", "A"),
        ("The answer is F.", "F"),
        # What LLaVA's rules leave unread.
        ("B.", None),
        ("b", None),
        ("F", None),
        ("A\n", None),
        ("B) round", None),
        ("AB", None),
        ("The answer is C", None),
        ("The answer is A. The answer is B.", None),
        ("", None),
    ],
)
def test_read_letter_follows_llavas_rules(text, letter):
    assert read_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "reference", "loose", "strict"),
    [
        ("Red.", "Red.", True, True),
        (" Red.\n", "Red.", True, True),
        ("red", "Red.", True, False),
        ("RED .", "red", True, False),
        ("STRASSE", "Straße", True, False),
        ("Red..", "Red", False, False),
        ("Red!", "Red", False, False),
        ("a red", "red", False, False),
        ("", ".", True, False),
        ("", "Red", False, False),
    ],
)
def test_exact_match_forgives_case_blanks_and_one_full_stop(text, reference, loose, strict):
    scores = score(text, reference, has_picture=True)
    assert (scores["exact_match"], scores["exact_match_strict"]) == (loose, strict)


@pytest.mark.parametrize(
    ("text", "reference", "has_picture", "expected"),
    [
        ("B. Because", "B", True, (True, True)),
        ("B. Because", "B", False, (True, None)),
        ("A", "B", True, (False, False)),
        ("It is B", "B", True, (False, False)),
        ("B", "B. Because", True, (None, None)),
        ("F", "F", True, (None, None)),
        ("", "", True, (None, None)),
    ],
)
def test_scienceqa_asks_only_where_the_reference_is_an_option_letter(text, reference, has_picture, expected):
    scores = score(text, reference, has_picture)
    assert (scores["scienceqa"], scores["scienceqa_image"]) == expected


def test_summary_arithmetic():
    keys = ("source", "exact_match", "exact_match_strict", "stopped", "scienceqa", "scienceqa_image")
    values = [
        ("sqa", True, True, True, True, None),
        ("sqa", False, False, True, False, False),
        ("sqa", True, False, False, True, True),
        (7, True, False, False, None, None),
    ]
    assert summarise([dict(zip(keys, row, strict=True)) for row in values], "source") == {
        "questions": 4,
        "exact_match": 0.75,
        "exact_match_strict": 0.25,
        "stopped": 0.5,
        "scienceqa": 2 / 3,
        "scienceqa_image": 0.5,
        "group_by": "source",
        "groups": {
            "sqa": {
                "questions": 3,
                "exact_match": 2 / 3,
                "exact_match_strict": 1 / 3,
                "stopped": 2 / 3,
                "scienceqa": 2 / 3,
                "scienceqa_image": 0.5,
            },
            "7": {
                "questions": 1,
                "exact_match": 1.0,
                "exact_match_strict": 0.0,
                "stopped": 0.0,
                "scienceqa": None,
                "scienceqa_image": None,
            },
        },
    }
    assert summarise([]) == {"questions": 0, **dict.fromkeys(keys[1:])}


def test_table_shows_percent_and_group_names_as_they_are():
    """A measure that applies to no question at all has no column."""
    shares = {"exact_match": 0.98765, "exact_match_strict": 0.5, "stopped": 1.0, "scienceqa": 0.25}
    scores = {"questions": 81, **shares, "scienceqa_image": None}
    console = Console(width=120, file=io.StringIO())
    console.print(evaluate.make_table({**scores, "groups": {"[coco]": {**scores, "questions": 9, "scienceqa": None}}}))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["all", "81", "98.8%", "50.0%", "100.0%", "25.0%"] in lines
    assert ["[coco]", "9", "98.8%", "50.0%", "100.0%", "-"] in lines


def test_records_and_summary_of_a_model_that_knows_its_lessons(trained_checkpoint, data, tmp_path):
    records, summary = run(trained_checkpoint, data, tmp_path / "new" / "answers.jsonl")
    right = {"exact_match": True, "exact_match_strict": True, "stopped": True}
    assert records[0] == {
        "id": "row-0",
        "turn": 0,
        "source": "pictures",
        "question": "Which colour?",
        "reference": "Red.",
        "images": [str(tmp_path / "0-red.png")],
        "answer": "Red.",
        **right,
        "scienceqa": None,
        "scienceqa_image": None,
    }
    assert [(r["id"], r["turn"], r["question"], r["answer"]) for r in records] == [
        ("row-0", 0, "Which colour?", "Red."),
        ("row-1", 0, "Which colour?", "Blue."),
        ("row-1", 1, "Is it a digit?", "No"),
        ("row-2", 0, "Which colours?", "Red and blue."),
        ("row-2", 1, "How many?", "Two"),
        ("row-3", 0, "Which letter?", "B"),
        ("row-3", 1, "Why?", "B. It comes behind A"),
    ]
    assert [len(r["images"]) for r in records] == [1, 1, 1, 2, 2, 0, 0]
    perfect = {"exact_match": 1.0, "exact_match_strict": 1.0, "stopped": 1.0}
    settings = summary.pop("settings")
    assert (settings["model"], settings["max_new_tokens"]) == (trained_checkpoint, 256)
    assert summary == {
        "questions": 7,
        **perfect,
        "scienceqa": 1.0,
        "scienceqa_image": None,
        "group_by": "source",
        "groups": {
            "pictures": {"questions": 5, **perfect, "scienceqa": None, "scienceqa_image": None},
            "text": {"questions": 2, **perfect, "scienceqa": 1.0, "scienceqa_image": None},
        },
    }


def test_a_cut_answer_has_not_stopped(trained_checkpoint, data, tmp_path):
    # Three tokens hold " B" with its end token, but not " Blue.".
    records, summary = run(trained_checkpoint, data, tmp_path / "answers.jsonl", "--max_new_tokens", 3)
    assert [r["stopped"] for r in records if r["reference"] in ("B", "Blue.")] == [False, True]
    assert summary["stopped"] == sum(r["stopped"] for r in records) / 7
    assert all(r["reference"].startswith(r["answer"]) for r in records)


@pytest.mark.parametrize("pad", ["</s>", "B"])
def test_padding_is_neither_part_of_an_answer_nor_its_end(trained_checkpoint, data, tmp_path, pad):
    """LLaVA-NeXT on Llama 3 pads with "!"; many checkpoints pad with their end token."""
    checkpoint = shutil.copytree(trained_checkpoint, tmp_path / "checkpoint")
    tokenizer = tiny.make_tokenizer()
    GenerationConfig(eos_token_id=2, pad_token_id=tokenizer.convert_tokens_to_ids(pad)).save_pretrained(checkpoint)
    records, _ = run(str(checkpoint), data, tmp_path / "answers.jsonl", "--max_new_tokens", 8)
    assert [r["answer"] for r in records if r["stopped"]] == [r["reference"] for r in records if r["stopped"]]
    assert {r["stopped"] for r in records} == {True, False}


@pytest.mark.parametrize("end_ids", [None, [2, 51]])
def test_end_tokens_are_those_of_the_generation_config(trained_checkpoint, data, tmp_path, end_ids):
    checkpoint = shutil.copytree(trained_checkpoint, tmp_path / "checkpoint")
    GenerationConfig(eos_token_id=end_ids, pad_token_id=3).save_pretrained(checkpoint)
    records, _ = run(str(checkpoint), data, tmp_path / "answers.jsonl", "--max_new_tokens", 40)
    assert {r["stopped"] for r in records} == {end_ids is not None}


@pytest.mark.parametrize("kind", ["llava", "vipllava"])
@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_does_not_depend_on_its_batch_mates(data, tmp_path, kind, beams):
    checkpoint = tiny.save_checkpoint(tmp_path / "checkpoint", VICUNA, kind)
    flags = ("--max_new_tokens", 12, "--num_beams", beams, "--dtype", "float32")
    alone, _ = run(checkpoint, data, tmp_path / "alone.jsonl", "--batch_size", 1, *flags)
    together, _ = run(checkpoint, data, tmp_path / "together.jsonl", "--batch_size", 7, *flags)
    assert len({r["answer"] for r in alone}) > 3
    assert together == alone


def test_prompts_are_those_of_inference_with_reference_answers_before(random_checkpoint, data, tmp_path):
    records, _ = run(random_checkpoint, data, tmp_path / "answers.jsonl", "--max_new_tokens", 12)
    model, processor = load_checkpoint(random_checkpoint)
    text = "USER: <image>\n<image>\nWhich colours? ASSISTANT: Red and blue.</s>USER: How many? ASSISTANT:"
    inputs = processor(text=text, images=[tiny.picture("red"), tiny.picture("blue")], return_tensors="pt")
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    [record] = [r for r in records if r["question"] == "How many?"]
    assert record["answer"] == processor.decode(ids, skip_special_tokens=True).strip() != ""


def test_a_question_is_shown_the_pictures_up_to_it(random_checkpoint, data, tmp_path):
    values = ["<image>\nWhich colour?", "Red.", "And <image> this?", "Blue."]
    turns = [{"from": "gpt" if place % 2 else "human", "value": value} for place, value in enumerate(values)]
    data.write_text(json.dumps([{"image": ["0-red.png", "1-blue.png"], "conversations": turns}]))
    first, second = run(random_checkpoint, data, tmp_path / "answers.jsonl", "--max_new_tokens", 1)[0]
    assert first["images"] == [str(tmp_path / "0-red.png")]
    assert second["images"] == [str(tmp_path / "0-red.png"), str(tmp_path / "1-blue.png")]
    assert second["question"] == "And  this?"


def test_the_processor_keeps_its_own_padding_side(random_checkpoint):
    model, processor = load_checkpoint(random_checkpoint)
    questions = [[tiny.user("Hi")], [tiny.user("Which colour?", images=1)]]
    first, second = answer(model, processor, questions, [[], [tiny.picture()]], max_new_tokens=6)
    assert processor.tokenizer.padding_side == "right"
    assert first == answer(model, processor, questions[:1], [[]], max_new_tokens=6)[0]


def test_greedy_unless_a_temperature_is_given(random_checkpoint, data, tmp_path):
    checkpoint = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    sampling = GenerationConfig(eos_token_id=2, pad_token_id=3, do_sample=True, temperature=50.0, top_k=0)
    sampling.save_pretrained(checkpoint)
    greedy, _ = run(random_checkpoint, data, tmp_path / "greedy.jsonl", "--max_new_tokens", 6)
    assert run(str(checkpoint), data, tmp_path / "default.jsonl", "--max_new_tokens", 6)[0] == greedy
    torch.manual_seed(0)
    sampled, _ = run(random_checkpoint, data, tmp_path / "1.jsonl", "--max_new_tokens", 6, "--temperature", 50)
    assert [r["answer"] for r in sampled] != [r["answer"] for r in greedy]


def test_limit_counts_rows_and_group_by_takes_any_column(random_checkpoint, data, tmp_path):
    flags = ("--max_new_tokens", 1, "--limit", 2, "--group_by", "id")
    records, summary = run(random_checkpoint, data, tmp_path / "answers.jsonl", *flags)
    assert [r["id"] for r in records] == ["row-0", "row-1", "row-1"]
    assert {name: group["questions"] for name, group in summary["groups"].items()} == {"row-0": 1, "row-1": 2}


@pytest.mark.parametrize(("column", "group_by"), [("source", "source"), ("category", "category"), ("kind", None)])
def test_scores_are_grouped_by_source_else_category(random_checkpoint, data, tmp_path, column, group_by):
    data.write_text(data.read_text().replace('"source"', f'"{column}"'))
    _, summary = run(random_checkpoint, data, tmp_path / "answers.jsonl", "--max_new_tokens", 1)
    assert summary.get("group_by") == group_by


def test_a_dataset_with_string_contents_and_embedded_pictures(trained_checkpoint, tmp_path):
    tiny.picture("blue").save(tmp_path / "blue.png")
    picture = {"bytes": (tmp_path / "blue.png").read_bytes(), "path": "blue.png"}
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Which colour?"}]
    answer_ = [{"type": "text", "text": "Blue."}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer_}]
    Dataset.from_list([{"messages": turns, "images": [picture]}]).save_to_disk(tmp_path / "with_picture")
    [record], _ = run(trained_checkpoint, tmp_path / "with_picture", tmp_path / "1.jsonl")
    assert (record["id"], record["images"], record["answer"]) == (0, ["blue.png"], "Blue.")

    turns = [{"role": "user", "content": "Which letter?"}, {"role": "assistant", "content": "B"}]
    Dataset.from_list([{"messages": turns}]).save_to_disk(tmp_path / "text_only")
    [record], _ = run(trained_checkpoint, tmp_path / "text_only", tmp_path / "2.jsonl")
    assert (record["question"], record["images"], record["answer"]) == ("Which letter?", [], "B")

    for number, question in enumerate(("<image>\nWhich colour?", "Which colour?")):  # as the collator reads them
        turns[0]["content"] = question
        rows = Dataset.from_list([{"id": "x", "messages": turns, "images": [picture]}])
        rows.save_to_disk(tmp_path / f"strings{number}")
        [record], _ = run(trained_checkpoint, tmp_path / f"strings{number}", tmp_path / f"{number}.strings.jsonl")
        assert (record["question"], record["answer"]) == ("Which colour?", "Blue.")

    turns[0]["content"] = "<image> and <image>"
    Dataset.from_list([{"id": "x", "messages": turns, "images": [picture]}]).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"row 'x': 2 image placeholder\(s\) for 1 picture\(s\)"):
        run(trained_checkpoint, tmp_path / "odd", tmp_path / "3.jsonl")


@pytest.mark.parametrize("placement", ["front", "keep"])
def test_a_question_is_asked_with_the_ids_that_training_used(placement):
    """Also under a template that renders the parts in the order they have, and with pictures between the words."""
    in_order = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'][0]['text'] + '</s>' }}{% endgeneration %}{% else %}{% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    processor = tiny.make_processor(in_order)
    parts = [{"type": "text", "text": "A "}, {"type": "image"}, {"type": "text", "text": " b "}, {"type": "image"}]
    row = tiny.row({"role": "user", "content": parts}, tiny.assistant("Yes"), tiny.user("And?"), tiny.assistant("No"))
    batch = LlavaDataCollator(processor, placement=placement)([row])
    trained = (batch["labels"][0] != -100).tolist()
    starts = [place for place, kept in enumerate(trained) if kept and not trained[place - 1]]
    questions = list(evaluate.read_questions([row], [], processor.image_token, placement))
    assert len(questions) == len(starts) == 2
    for (messages, images, _), start in zip(questions, starts, strict=True):
        asked = processor.apply_chat_template(
            [messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images": [images]},
        )["input_ids"][0]
        assert asked == batch["input_ids"][0, :start].tolist()


@pytest.mark.parametrize(
    ("template", "flags", "question"),
    [
        ("vicuna_v1", [], "A  or ?"),
        ("vicuna_v1_keep", [], "A <image> or <image>?"),
        ("vicuna_v1_keep", ["--placement", "front"], "A  or ?"),
    ],
)
def test_pictures_are_placed_as_the_checkpoints_template_does(template, flags, question, tmp_path):
    checkpoint = tiny.save_checkpoint(tmp_path / "model", chat_template_path(template).read_text(encoding="utf-8"))
    data = write_lessons(tmp_path, [(["red", "blue"], ["?", "Red."])])
    data.write_text(data.read_text().replace(json.dumps("<image>\n<image>\n?"), json.dumps("A <image> or <image>?")))
    [record], summary = run(checkpoint, data, tmp_path / "answers.jsonl", "--max_new_tokens", 1, *flags)
    assert record["question"] == question
    assert summary["settings"]["placement"] == ("keep" if "<image>" in question else "front")


def test_an_existing_output_is_not_overwritten_unasked(random_checkpoint, data, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text("precious")
    with pytest.raises(FileExistsError, match="answers.jsonl exists: pass another --output, or --overwrite"):
        run(random_checkpoint, data, output, "--max_new_tokens", 1)
    assert output.read_text() == "precious"
    assert len(run(random_checkpoint, data, output, "--max_new_tokens", 1, "--overwrite")[0]) == 7


def test_batches_are_on_disk_before_the_next_one_starts(random_checkpoint, data, tmp_path, monkeypatch):
    output, seen = tmp_path / "answers.jsonl", []

    def look(*args, **kwargs):
        seen.append(len(read_records(output)))
        return answer(*args, **kwargs)

    monkeypatch.setattr(evaluate, "answer", look)
    run(random_checkpoint, data, output, "--max_new_tokens", 1, "--batch_size", 2)
    assert seen == [0, 2, 4, 6]


def test_a_broken_picture_ends_the_run_with_file_and_rows_and_keeps_what_was_done(random_checkpoint, data, tmp_path):
    output = tmp_path / "answers.jsonl"
    run(random_checkpoint, data, output, "--max_new_tokens", 1)
    broken = tmp_path / "2-red.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ValueError, match="2-red.png") as error:
        run(random_checkpoint, data, output, "--max_new_tokens", 1, "--batch_size", 3, "--overwrite")
    assert error.value.__notes__ == [f"{data}: in the batch of rows ['row-2', 'row-2', 'row-3']"]
    assert [r["id"] for r in read_records(output)] == ["row-0", "row-1", "row-1"]
    assert not Path(f"{output}.summary.json").exists()


def test_stage_ones_template_refuses_a_row_without_a_picture(data, tmp_path):
    plain = chat_template_path("plain").read_text(encoding="utf-8")
    checkpoint = tiny.save_checkpoint(tmp_path / "checkpoint", plain)
    records, _ = run(checkpoint, data, tmp_path / "1.jsonl", "--max_new_tokens", 1, "--limit", 1)
    assert len(records) == 1
    write_lessons(tmp_path, LESSONS[3:])
    with pytest.raises(TemplateError, match="this row has no picture") as error:
        run(checkpoint, data, tmp_path / "2.jsonl")
    assert error.value.__notes__ == [f"{data}: in the batch of rows ['row-0', 'row-0']"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "--batch_size 0, .*expected at least 1 row"),
        (["--limit", "-3"], "--limit -3, .*expected at least 1 row"),
        (["--temperature", "-1"], "a temperature of 0 or more"),
        (["--group_by", "answer"], "--group_by answer: a record's own field"),
    ],
)
def test_flags_out_of_range_are_refused_and_no_output_is_touched(flags, message, random_checkpoint, data, tmp_path):
    output = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match=message):
        run(random_checkpoint, data, output, *flags)
    assert not output.exists()


def test_unknown_group_by_names_the_columns(random_checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match=r"--group_by kind: .*rows.json has the columns .*'id', 'source'"):
        run(random_checkpoint, data, tmp_path / "answers.jsonl", "--group_by", "kind")


def test_a_checkpoint_without_processor_or_template_is_refused(random_checkpoint, tmp_path):
    checkpoint = shutil.copytree(random_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="checkpoint: the LlavaProcessor has no chat template; expected the one"):
        load_checkpoint(str(checkpoint))
    (checkpoint / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="checkpoint: found no processor; expected a folder or hub id with the model"):
        load_checkpoint(str(checkpoint))
    with pytest.raises(ValueError, match="no/where: found no processor"):
        load_checkpoint(str(tmp_path / "no" / "where"))


def test_prompts_beyond_the_models_positions_are_warned_about(trained_checkpoint):
    model, processor = load_checkpoint(trained_checkpoint)
    question = [[tiny.user("Which letter?")]]
    with pytest.warns(UserWarning, match=r"a prompt of \d+ tokens and 2048 new ones exceed the 2048 positions"):
        assert answer(model, processor, question, [[]], max_new_tokens=2048) == [("B", True)]
