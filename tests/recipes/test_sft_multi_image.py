"""The multi-image recipe's own defaults and presets, and what the recipes make of a processor."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import build_llava
import pretrain_projector
import sft_full
import sft_multi_image
import tiny
from _processor import prepare_processor
from collators import chat_template_path
from runs import changed_parts, command

PRESETS = sorted(Path(sft_multi_image.__file__).parent.glob("multi_image_*.yaml"))


def twin(name: str) -> str:
    return chat_template_path(name).read_text(encoding="utf-8")


def values(*flags: str):
    files = ["--model_name_or_path", "x", "--dataset_name", "y", "--bf16", "False", "--use_cpu", "True"]
    return sft_multi_image.make_parser().parse_args_and_config([*files, *flags])


def test_the_defaults_and_presets_are_what_their_comments_say():
    assert [path.stem for path in PRESETS] == ["multi_image_llava_1_5", "multi_image_onevision"]
    script, training, _ = values()
    assert (script.placement, training.learning_rate, training.max_length) == ("keep", 1e-5, 8192)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 128

    config = ["--config", str(PRESETS[0])]
    script, training, model = sft_multi_image.make_parser().parse_args_and_config(
        ["--dataset_name", "y", "--bf16", "False", "--use_cpu", "True", *config]
    )
    assert (script.placement, script.image_aspect_ratio) == ("front", "pad")
    assert (training.learning_rate, training.max_length) == (2e-5, 4096)
    assert model.model_name_or_path == "llava-hf/llava-1.5-7b-hf"

    script, training, _ = values("--config", str(PRESETS[1]))
    assert (script.placement, script.train_vision_tower) == ("keep", True)
    assert (training.learning_rate, training.vision_tower_learning_rate) == (1e-5, 2e-6)
    assert training.max_length == 32768


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_trains_what_it_says(path, base, data, tmp_path):
    flags = ["--config", str(path), "--max_steps", "2", "--learning_rate", "1e-2"]
    sft_multi_image.main(command("sft_multi_image", base(), data, tmp_path, *flags))
    tower = {"vision_tower"} if yaml.safe_load(path.read_text()).get("train_vision_tower") else set()
    assert set(changed_parts(base(), tmp_path)) == {"multi_modal_projector", "language_model"} | tower
    keeps = path.stem == "multi_image_onevision"
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == twin("vicuna_v1_keep" if keeps else "vicuna_v1")


def test_adapters_are_sent_to_their_recipe(base, data, tmp_path):
    with pytest.raises(ValueError, match="or take sft_qlora.py"):
        sft_multi_image.main(command("sft_multi_image", base(), data, tmp_path, "--use_peft"))


# What is saved with the processor

STRIPES = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize(
    "own",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 16, "width": 16}),
        SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    ],
    ids=["CLIP, resized beyond its crop", "SigLIP"],
)
@pytest.mark.parametrize("ratio", ["pad", "crop", "resize"])
def test_the_square_has_the_side_that_the_tower_takes(own, ratio):
    processor = tiny.make_processor()
    processor.image_processor = own
    script_args = SimpleNamespace(placement="front", image_tag_format=None, image_aspect_ratio=ratio)
    prepare_processor(processor, script_args, SimpleNamespace(chat_template_path=None))
    pixels = processor.image_processor(tiny.picture(size=(40, 20)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("kind", ["llava", "vipllava"])
@pytest.mark.parametrize(
    ("ratio", "seen"),
    [
        ("pad", "    RRRRGGGGBBBBWWWW"[4:]),
        ("crop", "GGGGGGGGBBBBBBBB"),
        ("resize", "RRRRGGGGBBBBWWWW"),
        (None, "GGGGGGGGBBBBBBBB"),
    ],
)
def test_the_aspect_ratio_is_saved_with_the_checkpoint(kind, ratio, seen, data, tmp_path):
    """From an image processor as the released checkpoints have it, CLIP's, which cuts the centre out."""
    own = CLIPImageProcessorPil(
        **dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, resample=0),
        **dict(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    )
    processor = tiny.make_processor(kind=kind)
    processor.image_processor = own
    tiny.make_model(processor, kind).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    flags = ["--max_steps", "1", *(["--image_aspect_ratio", ratio] if ratio else [])]
    sft_full.main(command("sft_full", str(tmp_path / "base"), data, tmp_path / "out", *flags))

    saved = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(saved) is LlavaProcessor
    picture = Image.new("RGB", (32, 16))
    for place, colour in enumerate(STRIPES):
        picture.paste(tuple(colour), (8 * place, 0, 8 * place + 8, 16))
    pixels = saved.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    middle = pixels[:, 8].T  # (width, channels)
    letters = {(1, -1, -1): "R", (-1, 1, -1): "G", (-1, -1, 1): "B", (1, 1, 1): "W"}
    assert "".join(letters[tuple(round(value) for value in pixel.tolist())] for pixel in middle) == seen
    grey = torch.full((3,), 127 / 127.5 - 1)
    assert torch.allclose(pixels[:, 0, 0], grey, atol=1e-3) == (ratio == "pad")


def test_tiles_refuse_an_aspect_ratio(base, data, tmp_path):
    with pytest.raises(ValueError, match="--image_aspect_ratio pad: LlavaNextProcessor cuts a picture of any shape"):
        sft_full.main(command("sft_full", base("llava_next"), data, tmp_path, "--image_aspect_ratio", "pad"))


def test_tags_are_saved_with_the_checkpoint(base, data, tmp_path):
    tags = ["--image_tag_format", "<Image>{}</Image>", "--max_steps", "1"]
    for number, start in enumerate((base(), str(tmp_path / "0"))):  # the second run finds them there already
        out = tmp_path / str(number)
        sft_full.main(command("sft_full", start, data, out, *tags))
        rendered = AutoProcessor.from_pretrained(out).apply_chat_template([tiny.user("Hi", images=1)])
        assert rendered == "USER: <Image><image></Image>\nHi "


def test_tags_survive_both_stages(base, data, tmp_path):
    """Each stage takes a template by --chat_template_path, which TRL reads once more without the tags."""
    tags = ["--image_tag_format", "<Image>{}</Image>", "--max_steps", "1"]
    stage_1, stage_2 = tmp_path / "1", tmp_path / "2"
    pretrain_projector.main(command("pretrain_projector", base(), data, stage_1, *tags))
    assert AutoProcessor.from_pretrained(stage_1).apply_chat_template([tiny.user("Hi", images=1)]) == (
        "<Image><image></Image>"
    )
    vicuna = ["--chat_template_path", str(chat_template_path("vicuna_v1")), "--save_steps", "1"]
    sft_full.main(command("sft_full", str(stage_1), data, stage_2, *tags, *vicuna))
    for saved in (stage_2, stage_2 / "checkpoint-1"):
        rendered = AutoProcessor.from_pretrained(saved).apply_chat_template([tiny.user("Hi", images=1)])
        assert rendered == "USER: <Image><image></Image>\nHi "


def test_build_llava_makes_tags_tokens(tmp_path):
    """LLaVA's mm_use_im_start_end: two tokens more, around each picture."""
    processor = tiny.make_processor()
    model = tiny.make_model(processor)
    tower, language_model = tmp_path / "tower", tmp_path / "language_model"
    model.model.vision_tower.save_pretrained(tower)
    processor.image_processor.save_pretrained(tower)
    lm = tiny.text_config("llama", len(processor.tokenizer))
    LlamaForCausalLM(lm).save_pretrained(language_model)
    processor.tokenizer.save_pretrained(language_model)
    out = tmp_path / "llava"
    flags = ["--image_tag_format", "<im_start>{}<im_end>", "--output_dir", str(out)]
    build_llava.main(["--vision_tower", str(tower), "--language_model", str(language_model), *flags])

    built = AutoProcessor.from_pretrained(out)
    inputs = built.apply_chat_template(
        [tiny.user("Hi", images=1)],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": [tiny.picture()]},
    )["input_ids"][0]
    tokens = built.tokenizer.convert_ids_to_tokens(inputs)
    start = tokens.index("<im_start>")
    assert tokens[start : start + 6] == ["<im_start>", *["<image>"] * 4, "<im_end>"]
    embeddings = AutoModelForImageTextToText.from_pretrained(out).get_input_embeddings()
    assert embeddings.weight.shape[0] >= len(built.tokenizer) == len(processor.tokenizer) + 2
    assert "im_start" in json.dumps(json.loads((out / "tokenizer.json").read_text())["added_tokens"])
