"""What is looked at before step 0 of every training run."""

import json
import shutil

import pytest
import torch
from torch import nn

import pretrain_projector
import sft_full
import sft_qlora
import tiny
from _findings import Findings, Place
from _model_checks import check_config, check_model
from _parts import train_only
from runs import command, losses

RECIPES = {"pretrain_projector": pretrain_projector, "sft_full": sft_full, "sft_qlora": sft_qlora}
HERE = Place("checkpoint")


@pytest.fixture
def spoilt(data, tmp_path):
    """A copy of the data whose row 1 has a picture that is cut short, and row 2 an empty answer."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    for name in ("instruct.json", "pretrain.json"):
        rows = json.loads((folder / name).read_text())
        rows[2]["conversations"][1]["value"] = ""
        (folder / name).write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_an_error_in_the_first_rows_stops_a_run_before_step_zero(recipe, base, spoilt, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(ValueError) as error:
        RECIPES[recipe].main(command(recipe, base(), spoilt, out, "--max_steps", "1"))
    lines = str(error.value).splitlines()
    assert lines[0] == "pre-flight: 1 kind(s) of errors"
    assert lines[1].startswith(f"  picture-unreadable: training data, row 1 (id 1): found {spoilt}/1.png: ")
    assert lines[-1] == "recipes/inspect_data.py looks at all rows; --skip_preflight starts all the same."
    assert "empty-answer: training data, row 2 (id 2): found no text" in capsys.readouterr().out
    assert not list(out.glob("checkpoint-*")) and not (out / "model.safetensors").exists()


def test_a_dry_run_has_the_preflight_too(base, spoilt, tmp_path):
    with pytest.raises(ValueError, match="pre-flight: 1 kind"):
        sft_full.main(command("sft_full", base(), spoilt, tmp_path / "out", "--dry_run", "True"))


def test_it_can_be_left_out(base, spoilt, tmp_path, capsys):
    flags = ["--max_steps", "1", "--train_sampling_strategy", "sequential", "--skip_preflight", "True"]
    with pytest.raises(ValueError, match=r"row 1 \(id 1\): .*1\.png: the picture cannot be decoded"):
        sft_full.main(command("sft_full", base(), spoilt, tmp_path / "out", *flags))
    assert "empty-answer" not in capsys.readouterr().out


def test_a_bad_row_to_skip_is_a_warning(base, spoilt, tmp_path, capsys):
    """Of 200 rows, so that one is no more than 1 %."""
    rows = json.loads((spoilt / "pretrain.json").read_text())
    rows = rows[:3] + [rows[0]] * 197
    (spoilt / "instruct.json").write_text(json.dumps([row | {"id": at} for at, row in enumerate(rows)]))
    flags = ["--max_steps", "2", "--train_sampling_strategy", "sequential", "--on_bad_row", "skip"]
    sft_full.main(command("sft_full", base(), spoilt, tmp_path / "out", *flags))
    assert "picture-unreadable: training data, row 1 (id 1)" in capsys.readouterr().out
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(line["row"], line["id"]) for line in skipped] == [(1, 1)]
    assert "1.png: the picture cannot be decoded" in skipped[0]["reason"]
    assert len(losses(tmp_path / "out")) == 2


def test_clean_rows_say_nothing(base, data, tmp_path, capsys):
    sft_full.main(command("sft_full", base(), data, tmp_path / "out", "--max_steps", "1"))
    assert "pre-flight" not in capsys.readouterr().out


def test_weights_that_are_no_numbers_are_named(base, data, tmp_path):
    processor = tiny.make_processor()
    model = tiny.make_model(processor)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"not-finite: .*found lm_head\.weight with numbers that are infinite"):
        sft_full.main(command("sft_full", str(tmp_path / "base"), data, tmp_path / "out", "--max_steps", "1"))


# The checks of a model by themselves


def codes(findings: Findings) -> list[str]:
    return [finding["code"] for finding in findings.to_list()]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_model_and_its_own_processor_agree(kind, tower):
    if tower == "siglip" and kind in ("vipllava", "llava_next"):
        pytest.skip("released with CLIP alone")
    processor, findings = tiny.make_processor(kind=kind, tower=tower), Findings()
    model = tiny.make_model(processor, kind, tower=tower)
    train_only(model, ["multi_modal_projector"])
    check_config(findings, HERE, model.config, processor)
    check_model(findings, HERE, model)
    assert codes(findings) == []


def test_what_skipping_does_not_leave_out_stays_an_error():
    findings = Findings(skips_rows=True)
    for code in ("picture-unreadable", "prompt-differs"):
        findings.add("error", code, Place("train.json", 3), "one", "another", "Mend it")
    findings.add("error", "unusable-row", Place("train.json"), "no rows", "rows", "Write some")
    levels = {finding["code"]: finding["level"] for finding in findings.to_list()}
    assert levels == {"picture-unreadable": "warning", "prompt-differs": "error", "unusable-row": "error"}


def test_misfits_of_model_and_processor():
    processor, findings = tiny.make_processor(), Findings()
    model = tiny.make_model(processor)
    processor.num_additional_image_tokens = 0
    processor.tokenizer.add_tokens(["one more"])
    model.config.image_token_id = 1
    check_config(findings, HERE, model.config, processor)
    assert sorted(codes(findings)) == ["image-token-id", "image-tokens", "vocabulary"]
    assert "found 3 image tokens of a picture from the processor, 4 features from the model" in "".join(
        findings.lines("error")
    )


def test_a_model_of_which_nothing_trains():
    findings = Findings()
    model = tiny.make_model(tiny.make_processor())
    train_only(model, [])
    check_model(findings, HERE, model)
    assert codes(findings) == ["nothing-trains"]


def test_a_quantised_tower_is_named():
    from bitsandbytes.nn import Params4bit

    findings = Findings()
    model = tiny.make_model(tiny.make_processor())
    layer = model.model.vision_tower.encoder.layers[0].mlp.fc1
    layer.weight = Params4bit(torch.zeros(64, 32), requires_grad=False)
    assert isinstance(layer.weight, nn.Parameter)
    check_model(findings, HERE, model)
    assert codes(findings) == ["quantised-part"]
