"""Every HF-native class through every training recipe, on rows with one, several, no pictures and all of these mixed.

LLaVA-OneVision's processor needs torchvision, so its cells run where that can be imported: in the suite's second run.
"""

import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import pretrain_projector
import sft_full
import sft_multi_image
import sft_qlora
import tiny
from _answers import answer, load_checkpoint
from _parts import part_of
from collators import LlavaDataCollator, load_rows, read_row
from labels import check_labels
from runs import ON_CPU, SMALL, changed_parts, losses

RECIPES = {
    "pretrain_projector": pretrain_projector,
    "sft_full": sft_full,
    "sft_qlora": sft_qlora,
    "sft_multi_image": sft_multi_image,
}
QWEN = dict(text="qwen2", tokenizer="qwen", eos_token="<|im_end|>")
# class, tower and language model → its tiny checkpoint, with the chat template that its kind has on the hub
CLASSES = {
    "Llava, CLIP, Llama": dict(),
    "Llava, CLIP, Mistral": dict(text="mistral", tokenizer="llama"),
    "Llava, CLIP, Qwen2": QWEN | dict(chat_template=tiny.INTERLEAVE_QWEN),
    "Llava, SigLIP, Llama": dict(tower="siglip", tokenizer="llama"),
    "Llava, SigLIP, Mistral": dict(tower="siglip", text="mistral"),
    "Llava, SigLIP, Qwen2": QWEN | dict(tower="siglip", chat_template=tiny.INTERLEAVE_QWEN),
    "VipLlava, CLIP, Llama": dict(kind="vipllava", tokenizer="llama", chat_template=tiny.VIP_LLAVA),
    "LlavaNext, CLIP, Llama": dict(kind="llava_next"),
    "LlavaNext, CLIP, Mistral": dict(
        kind="llava_next", text="mistral", tokenizer="llama", chat_template=tiny.LLAVA_1_6_MISTRAL
    ),
    "LlavaOnevision, SigLIP, Qwen2": QWEN | dict(kind="llava_onevision", tower="siglip", chat_template=tiny.ONEVISION),
}
PICTURES = {
    "one": [(1,), (1, 0), (1,), (1,)],
    "several": [(2,), (1, 1), (3,), (2, 0, 1)],
    "none": [(0,), (0, 0), (0,), (0,)],
    "mixed": [(1,), (0,), (2, 1), (0, 2)],
}
ANSWERS = ["red", "Yes, two.", "No"]
# A caption's template, stage 1's, has no place for a row without a picture or for a second turn.
MISSING = {(name, "pretrain_projector", "none") for name in CLASSES}
CELLS = [cell for cell in product(CLASSES, RECIPES, PICTURES) if cell not in MISSING]
NEEDS_TORCHVISION = "LlavaOnevision, SigLIP, Qwen2"
HERE = [cell for cell in CELLS if cell[0] != NEEDS_TORCHVISION or find_spec("torchvision")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = {}

    def make(name: str) -> str:
        if name not in made:
            made[name] = tiny.save_checkpoint(tmp_path_factory.mktemp("base"), **CLASSES[name])
        return made[name]

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A LLaVA JSON file for each kind of rows, and one of captions; pictures of several shapes."""
    folder = tmp_path_factory.mktemp("data")
    sizes = [(16, 16), (40, 16), (16, 31), (20, 16), (64, 48)]
    for number, size in enumerate(sizes):
        tiny.picture(tiny.COLORS[number], size).save(folder / f"{number}.png")
    for kind, rows in PICTURES.items():
        talks, captions = [], []
        for index, counts in enumerate(rows):
            names = [f"{(index + place) % len(sizes)}.png" for place in range(sum(counts))]
            turns = []
            for turn, count in enumerate(counts):
                asked = "What about <image>? " * (count - 1) + ("And\n<image>" if count else "Now?")
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": ANSWERS[turn]}]
            talks.append({"id": f"{kind}-{index}", "image": names, "conversations": turns})
            title = [{"from": "human", "value": "<image>" * len(names)}, {"from": "gpt", "value": "red"}]
            captions += [{"id": f"{kind}-{index}", "image": names, "conversations": title}] if names else []
        (folder / f"{kind}.json").write_text(json.dumps(talks))
        (folder / f"{kind}_captions.json").write_text(json.dumps((captions * 2)[:4]))
    return folder


def command(name, recipe, base, rows, out, *flags) -> list[str]:
    files = ["--model_name_or_path", base(name), "--dataset_name", str(rows), "--output_dir", str(out)]
    adapters = ["--lora_r", "4"] if recipe == "sft_qlora" else []
    return [*files, *ON_CPU, *SMALL, "--learning_rate", "1e-2", "--save_steps", "1", *adapters, *flags]


def test_the_readme_says_how_many_cells_there_are():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    count = len(CLASSES) * len(RECIPES) * len(PICTURES)
    assert f"{len(CELLS)} of {count} cells" in readme and len(CELLS) + len(MISSING) == count


def test_a_missing_cell_is_refused(base, data, tmp_path):
    """Stage 1's template has no place for a row without a picture."""
    with pytest.raises(ValueError, match=r"row 0 \(id 'none-0'\): .*plain takes a picture and its caption"):
        argv = command("Llava, CLIP, Llama", "pretrain_projector", base, data / "none.json", tmp_path)
        pretrain_projector.main([*argv, "--train_sampling_strategy", "sequential"])


@pytest.mark.parametrize("cell", HERE, ids=" | ".join)
def test_a_cell_trains_resumes_saves_reloads_and_generates(cell, base, data, tmp_path):
    name, recipe, kind = cell
    rows = data / f"{kind}{'_captions' if recipe == 'pretrain_projector' else ''}.json"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    RECIPES[recipe].main(command(name, recipe, base, rows, whole, "--max_steps", "3", "--save_total_limit", "9"))
    RECIPES[recipe].main(
        command(
            *(name, recipe, base, rows, resumed, "--max_steps", "3"),
            *("--resume_from_checkpoint", str(whole / "checkpoint-2")),
        )
    )
    assert losses(resumed)[3] == losses(whole)[3]
    first, second = (
        {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))} for folder in (whole, resumed)
    )
    assert first and first.keys() == second.keys()
    for file, tensors in first.items():
        assert tensors.keys() == second[file].keys()
        assert all(torch.equal(tensor, second[file][key]) for key, tensor in tensors.items())

    pictures = {"multi_modal_projector"} if kind != "none" else set()
    if recipe == "sft_qlora":
        [tensors] = first.values()
        assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)
        assert {part_of(key) for key in tensors} == {"language_model", "multi_modal_projector"}
    else:
        changed = changed_parts(base(name), whole)
        assert set(changed) == pictures | ({"language_model"} if recipe != "pretrain_projector" else set())
        anyres = CLASSES[name].get("kind") in ("llava_next", "llava_onevision")
        newline = {key for key in changed.get("multi_modal_projector", ()) if "image_newline" in key}
        assert bool(newline) == (anyres and kind != "none")

    placement = "keep" if recipe == "sft_multi_image" else "front"
    loaded = list(load_rows(rows, placement=placement))
    processor = AutoProcessor.from_pretrained(whole)
    check_labels(LlavaDataCollator(processor, placement=placement), loaded)
    model, processor = load_checkpoint(str(whole), device="cpu")
    talks = [read_row(row, processor.image_token, placement=placement) for row in loaded]
    questions, images = [], []
    for talk in talks:
        question = talk["messages"][:1]
        questions.append(question)
        images.append(talk["images"][: sum(part["type"] == "image" for part in question[0]["content"])])
    together = answer(model, processor, questions, images, max_new_tokens=4)
    alone = [answer(model, processor, [q], [i], max_new_tokens=4)[0] for q, i in zip(questions, images, strict=True)]
    assert together == alone
    if recipe != "sft_qlora":
        assert type(AutoModelForImageTextToText.from_pretrained(whole)) is type(model)
