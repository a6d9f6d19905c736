"""Rows and checkpoints from elsewhere: a bad row does not end a run that skips it, and no code of theirs runs."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import chat
import evaluate
import pretrain_projector
import sft_full
import sft_multi_image
import sft_qlora
import tiny
from _answers import load_checkpoint
from _assembly import load_parts
from _merging import load_adapter, load_base
from _projector import load_projector
from _weights import safe_weights
from launch import accelerate
from runs import command, losses

RECIPES = [pretrain_projector, sft_full, sft_multi_image, sft_qlora]


# Bad rows in a run


@pytest.fixture
def rows(tmp_path):
    """400 rows: number 20 has a torn JPEG, number 30 none, and number 40 is a question without an answer."""
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.picture("red", (20, 16)).save(folder / "red.jpg")
    (folder / "torn.jpg").write_bytes((folder / "red.jpg").read_bytes()[:300])
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    made = [{"id": f"r{number}", "image": "red.jpg", "conversations": talk} for number in range(400)]
    made[20]["image"] = "torn.jpg"
    made[30]["image"] = "gone.jpg"
    made[40]["conversations"] = talk[:1]
    (folder / "instruct.json").write_text(json.dumps(made))
    return folder


IN_ORDER = ["--train_sampling_strategy", "sequential", "--per_device_train_batch_size", "1"]
IN_ORDER += ["--gradient_accumulation_steps", "1", "--save_strategy", "no", "--max_steps", "24"]


def skipped(out: Path) -> list[tuple]:
    found = [json.loads(line) for line in (out / "skipped_rows.jsonl").read_text().splitlines()]
    return sorted((line["row"], line["id"], line["reason"]) for line in found)


def expected(folder: Path) -> list[tuple]:
    file, torn = folder / "instruct.json", folder / "torn.jpg"
    return [
        (20, "r20", f"row 20 (id 'r20'): {torn}: the picture cannot be decoded "),
        (30, "r30", f"{file}: found no picture file at {folder}/gone.jpg; expected an existing file. "),
        (40, "r40", f"{file}: found the order human; expected an optional system turn, then human and gpt in "),
    ]


def test_a_run_goes_on_and_names_what_it_skipped(rows, base, tmp_path):
    """The step of a bad row alone trains nothing and has a loss that is a number."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "skipped_rows.jsonl").write_text("of an earlier run\n")
    flags = ["--on_bad_row", "skip", *IN_ORDER, "--logging_steps", "1"]
    sft_full.main(command("sft_full", base(), rows, out, *flags))
    found = skipped(out)
    assert [line[:2] for line in found] == [line[:2] for line in expected(rows)]
    assert all(line[2].startswith(start[2]) for line, start in zip(found, expected(rows), strict=True))
    history = losses(out)
    assert len(history) == 24 and all(map(math.isfinite, history.values()))
    assert [step for step, loss in history.items() if loss == 0] == [21]
    assert (out / "model.safetensors").exists()


def test_unless_told_a_run_stops_at_a_bad_row(rows, base, tmp_path):
    with pytest.raises(ValueError) as error:
        sft_full.main(command("sft_full", base(), rows, tmp_path / "out", *IN_ORDER))
    assert str(error.value).startswith(
        f"2 of 400 rows cannot be used:\n{rows}/instruct.json, row 30 (id 'r30'): found"
    )
    made = json.loads((rows / "instruct.json").read_text())
    (rows / "instruct.json").write_text(json.dumps(made[:30]))
    with pytest.raises(ValueError, match=r"^row 20 \(id 'r20'\): .*torn.jpg: the picture cannot be decoded"):
        sft_full.main(command("sft_full", base(), rows, tmp_path / "out", *IN_ORDER, "--skip_preflight", "True"))
    assert not (tmp_path / "out" / "skipped_rows.jsonl").exists()


def test_two_processes_of_which_one_has_a_bad_row(rows, base, tmp_path):
    """Neither waits for the other: the row's place is filled, so that both make as many steps."""
    out = tmp_path / "out"
    flags = ["--on_bad_row", "skip", *IN_ORDER, "--max_steps", "12", "--dataloader_num_workers", "1"]
    run = accelerate("cpu_2proc", "sft_full", command("sft_full", base(), rows, out, *flags), out)
    run.wait()
    assert (out / "model.safetensors").exists(), run.printed[-3000:]
    assert [line[:2] for line in skipped(out)] == [(20, "r20"), (30, "r30"), (40, "r40")]
    assert len(losses(out)) == 12 and all(0 < loss < 100 for loss in losses(out).values())


# Pickled weights


@pytest.fixture
def pickled(base, tmp_path):
    """A checkpoint whose weights are in `pytorch_model.bin` alone."""
    return make_pickled(base(), tmp_path / "pickled")


def make_pickled(checkpoint: str, folder: Path) -> str:
    shutil.copytree(checkpoint, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return str(folder)


REFUSED = r"found no model\.safetensors or model\.safetensors\.index\.json; expected weights in safetensors.*pass "
REFUSED += "--allow_pickled_weights"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_training_recipe_refuses_pickled_weights(recipe, pickled, data, tmp_path):
    argv = command(recipe.__name__, pickled, data, tmp_path / "out", "--max_steps", "1")
    with pytest.raises(ValueError, match=REFUSED):
        recipe.main(argv)


def test_a_training_recipe_loads_them_when_asked(pickled, data, tmp_path):
    argv = command("sft_full", pickled, data, tmp_path / "out", "--max_steps", "1", "--allow_pickled_weights")
    sft_full.main(argv)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_evaluate_and_chat_refuse_them(pickled, data, tmp_path):
    argv = ["--model", pickled, "--dataset_name", str(data / "instruct.json"), "--output", str(tmp_path / "a.jsonl")]
    with pytest.raises(ValueError, match=REFUSED):
        evaluate.main([*argv, "--device", "cpu"])
    with pytest.raises(ValueError, match=REFUSED):
        chat.main(["--model", pickled, "--device", "cpu"])
    model, _ = load_checkpoint(pickled, device="cpu", allow_pickled_weights=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_merging_and_building_refuse_them(pickled):
    with pytest.raises(ValueError, match=REFUSED):
        load_base(pickled)
    assert load_base(pickled, allow_pickled_weights=True).config.model_type == "llava"
    with pytest.raises(ValueError, match=REFUSED):
        load_parts(pickled, pickled)


def make_adapter(checkpoint: str, folder: Path, pickled: bool = True) -> Path:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")).save_pretrained(folder)
    if pickled:
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    for file in Path(checkpoint).glob("*"):
        if file.name.startswith(("processor", "tokenizer", "chat_template")):
            shutil.copy(file, folder)
    return folder


def test_pickled_adapters_are_refused(base, pickled, tmp_path):
    refused = r"found no adapter_model\.safetensors; expected weights in safetensors"
    adapter = make_adapter(base(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=refused):
        load_checkpoint(str(adapter), device="cpu")
    with pytest.raises(ValueError, match=refused):
        load_adapter(load_base(base()), adapter)
    load_checkpoint(str(adapter), device="cpu", allow_pickled_weights=True)
    load_adapter(load_base(base()), adapter, allow_pickled_weights=True)
    # A sound adapter may name a base that is not.
    with pytest.raises(ValueError, match=REFUSED):
        load_checkpoint(str(make_adapter(pickled, tmp_path / "sound", pickled=False)), device="cpu")


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_an_index_that_names_a_pickle_is_refused(index, pickled, tmp_path):
    """`use_safetensors=True` would load it (transformers 5.23)."""
    folder = Path(pickled)
    names = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}))
    if index.startswith("other"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": index}))
    with pytest.raises(ValueError, match="expected weights in safetensors"):
        safe_weights(pickled)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(pickled)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="--allow_pickled_weights"):  # `from_pretrained` would load the base, too
        safe_weights(adapter)


def test_sharded_safetensors_are_accepted(base, tmp_path):
    AutoModelForImageTextToText.from_pretrained(base()).save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert safe_weights(tmp_path) == {"use_safetensors": True}


# Code in files


class Evil:
    """Unpickled with `weights_only=False` it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_the_evil_pickle_would_work(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_a_pickle_with_code_does_not_run(base, pickled, tmp_path):
    """Not even where pickles are allowed."""
    marker = tmp_path / "marker"
    torch.save({"linear_1.weight": Evil(marker)}, tmp_path / "mm_projector.bin")
    model = AutoModelForImageTextToText.from_pretrained(base())
    with pytest.raises(ValueError, match=r"mm_projector\.bin: not a readable file of tensors \(UnpicklingError\)"):
        load_projector(model, tmp_path / "mm_projector.bin")
    torch.save({"weight": Evil(marker)}, Path(pickled) / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(pickled, device="cpu", allow_pickled_weights=True)
    adapter = make_adapter(base(), tmp_path / "adapter")
    torch.save({"weight": Evil(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load_adapter(load_base(base()), adapter, allow_pickled_weights=True)
    assert not marker.exists()


@pytest.fixture
def with_code(base, tmp_path):
    """A checkpoint of an unknown class whose code lies beside it, and the folder which that code makes."""
    folder, marker = tmp_path / "with_code", tmp_path / "marker"
    shutil.copytree(base(), folder)
    (folder / "own.py").write_text(
        f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
        "from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
        "class OwnProcessor(LlavaProcessor):\n    pass\n"
    )
    names = {"AutoConfig": "OwnConfig", "AutoModelForImageTextToText": "OwnModel", "AutoProcessor": "OwnProcessor"}
    auto_map = {auto: f"own.{name}" for auto, name in names.items()}
    for file, changes in (("config.json", {"model_type": "own"}), ("processor_config.json", {})):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes, "auto_map": auto_map}))
    content = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**content, "processor_class": "OwnProcessor"}))
    return str(folder), marker


def test_the_code_would_run(with_code):
    folder, marker = with_code
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_a_training_recipe_runs_no_code_of_a_checkpoint(recipe, with_code, data, tmp_path):
    folder, marker = with_code
    argv = command(recipe.__name__, folder, data, tmp_path / "out", "--max_steps", "1")
    assert recipe.make_parser().parse_args_and_config(argv)[1].trust_remote_code is False
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        recipe.main(argv)
    assert not marker.exists()


def test_evaluate_chat_merge_and_build_run_no_code_of_a_checkpoint(with_code, monkeypatch):
    folder, marker = with_code
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    for load in (lambda: load_checkpoint(folder, device="cpu"), lambda: load_base(folder)):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_parts(folder, folder)
    assert not marker.exists()
