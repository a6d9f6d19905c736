import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)

import build_llava
import tiny
from _projector import save_projector

TEXT_TOWER = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SQUARE = {"height": 16, "width": 16}


def save_tower(path, kind="clip", two_towers=False, **picture):
    """Write a random vision tower, alone or beside its text tower, with an image processor; return its state dict."""
    torch.manual_seed(1)
    if two_towers:
        config_class, model_class = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
        config = config_class(text_config=TEXT_TOWER, vision_config=tiny.vision_config(kind).to_dict())
        model = model_class(config)
        tower = model.vision_model
    else:
        tower = model = AutoModel.from_config(tiny.vision_config(kind))
    model.to(picture.pop("dtype", torch.float32)).save_pretrained(path)
    if kind == "clip":
        CLIPImageProcessor(**{"size": {"shortest_edge": 16}, "crop_size": SQUARE, **picture}).save_pretrained(path)
    else:
        SiglipImageProcessor(**{"size": SQUARE, **picture}).save_pretrained(path)
    return {name: tensor.clone() for name, tensor in tower.state_dict().items()}


def bare_tokenizer() -> LlamaTokenizer:
    """As Llama's: BOS in front, no `<image>`, no pad token."""
    model = json.loads(tiny.llama_tokenizer().backend_tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True)


def save_language_model(path, kind="llama", tokenizer=None, dtype=torch.float32, vocab_size=None, **config):
    tokenizer = tokenizer or bare_tokenizer()
    settings = tiny.text_config(kind, vocab_size or len(tokenizer))
    for name, value in {"pad_token_id": tokenizer.pad_token_id, **config}.items():
        setattr(settings, name, value)
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(settings).to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A CLIP tower and a Llama that most tests share."""
    folder = tmp_path_factory.mktemp("parts")
    save_tower(folder / "tower")
    save_language_model(folder / "language_model")
    return folder


def build(folder, output_dir, *flags):
    paths = dict(vision_tower=folder / "tower", language_model=folder / "language_model", output_dir=output_dir)
    build_llava.main([*(word for name, path in paths.items() for word in (f"--{name}", str(path))), *flags])
    return str(output_dir)


def load(path):
    return AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name][: len(tensor)] if tensor.ndim else found[name], tensor), name


@pytest.mark.parametrize(
    ("tower", "two_towers", "language", "config"),
    [
        ("clip", True, "llama", {}),
        ("clip", False, "mistral", {}),
        ("siglip", True, "qwen2", {}),
        ("siglip", False, "qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_stock_classes_load_every_weight_of_the_parts(tower, two_towers, language, config, tmp_path):
    vision = save_tower(tmp_path / "tower", tower, two_towers)
    text = save_language_model(tmp_path / "language_model", language, **config)
    output_dir = build(tmp_path, tmp_path / "llava")

    model, info = AutoModelForImageTextToText.from_pretrained(output_dir, output_loading_info=True)
    assert not any(info.values())
    assert_same(model.model.vision_tower.state_dict(), vision)
    decoder = {name.removeprefix("model."): tensor for name, tensor in text.items() if name != "lm_head.weight"}
    assert_same(model.model.language_model.state_dict(), decoder)
    assert torch.equal(model.lm_head.weight[: len(text["lm_head.weight"])], text["lm_head.weight"])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == bool(config)

    processor = AutoProcessor.from_pretrained(output_dir)
    derived = {"clip": ("default", 1), "siglip": ("full", 0)}[tower]
    assert (processor.vision_feature_select_strategy, processor.num_additional_image_tokens) == derived
    assert model.config.vision_feature_select_strategy == derived[0]
    assert (processor.patch_size, model.config.image_seq_length, model.config.vision_feature_layer) == (8, 4, -2)
    inputs = processor(images=tiny.picture(size=(40, 16)), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    new = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (1, 3)


def test_checkpoints_in_the_layout_of_transformers_4(tmp_path):
    """Pickled, with the `vision_model` level and with buffers that are weights no more."""
    vision, text = save_tower(tmp_path / "tower"), save_language_model(tmp_path / "language_model")
    old_vision = {f"vision_model.{name}": tensor for name, tensor in vision.items()}
    old_vision["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    old_text = {**text, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for part, weights in (("tower", old_vision), ("language_model", old_text)):
        (tmp_path / part / "model.safetensors").unlink()
        torch.save(weights, tmp_path / part / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"tower: found no model\.safetensors .*--allow_pickled_weights"):
        build(tmp_path, tmp_path / "llava")
    model, _ = load(build(tmp_path, tmp_path / "llava", "--allow_pickled_weights"))
    assert_same(model.model.vision_tower.state_dict(), vision)
    assert torch.equal(model.lm_head.weight[:476], text["lm_head.weight"])


def test_tokens_rows_and_generation_settings(parts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(parts / "language_model")
    vocabulary = len(tokenizer)
    assert vocabulary == 476 and tokenizer.pad_token is None and "<image>" not in tokenizer.get_vocab()
    output_dir = build(parts, tmp_path / "llava")
    model, processor = load(output_dir)

    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [476, 477]
    assert (model.config.image_token_id, model.config.text_config.pad_token_id) == (476, 477)
    assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0] == 480
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, [2], 477)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert torch.allclose(weight[476:], weight[:476].mean(0), atol=1e-5)

    text = "Is it even? It is.\n  Two  blanks"
    ids = processor.tokenizer(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"] and ids[0] == tokenizer.bos_token_id
    assert processor.tokenizer.decode([476, *ids], skip_special_tokens=True) == text
    twin = (Path(build_llava.__file__).parent.parent / "collators/chat_templates/vicuna_v1.jinja").read_text()
    assert processor.chat_template == processor.tokenizer.chat_template == twin


def test_a_sentencepiece_tokenizer_without_tokenizer_json(tmp_path):
    """What Vicuna ships; its ids come out as SentencePiece's own, `<image>` and `<pad>` behind them."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(tiny.CORPUS * 20), encoding="utf-8")
    save_tower(tmp_path / "tower")
    save_language_model(tmp_path / "language_model", vocab_size=400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "language_model" / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "language_model" / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (tmp_path / "language_model" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(build(tmp_path, tmp_path / "out"))[1].tokenizer
    original = sentencepiece.SentencePieceProcessor(str(tmp_path / "language_model" / "tokenizer.model"))
    for text in ("USER: What is it? ASSISTANT: A red square.", "two  blanks", "é 🙂", "line\nline"):
        assert tokenizer.encode(text) == [1, *original.encode(text)]
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [400, 401]


def test_pad_token_spare_rows_and_stop_tokens_of_the_language_model_are_kept(tmp_path):
    save_tower(tmp_path / "tower")
    tokenizer = tiny.make_tokenizer("byte", pad_token="</s>")
    text = save_language_model(tmp_path / "language_model", "qwen2", tokenizer, vocab_size=400)
    # As Vicuna's: save_pretrained refuses a temperature without do_sample.
    generation = {"eos_token_id": [6, 2], "bos_token_id": 1, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    (tmp_path / "language_model" / "generation_config.json").write_text(json.dumps(generation))
    output_dir = build(tmp_path, tmp_path / "llava", "--chat_template", "chatml")

    model, processor = load(output_dir)
    assert torch.equal(model.lm_head.weight, text["lm_head.weight"])
    assert model.config.image_token_id == processor.image_token_id == 4
    assert processor.tokenizer.pad_token == "</s>" and model.generation_config.pad_token_id == 2
    assert model.generation_config.eos_token_id == [2, 6]
    assert (model.generation_config.temperature, model.generation_config.max_length) == (None, None)


# Four upright stripes of 8 pixels. With mean and std 0.5 a channel is 1 or -1, the grey behind a padded picture
# (127 of 255) is about -0.004.
STRIPES = {"R": (1.0, -1, -1), "G": (-1.0, 1, -1), "B": (-1.0, -1, 1), "W": (1.0, 1, 1), ".": (-1 / 255,) * 3}
PAD = ["." * 16] * 4 + ["RRRRGGGGBBBBWWWW"] * 8 + ["." * 16] * 4


@pytest.mark.parametrize(
    ("ratio", "expected"), [("pad", PAD), ("crop", ["GGGGGGGGBBBBBBBB"] * 16), ("resize", ["RRRRGGGGBBBBWWWW"] * 16)]
)
def test_saved_processor_makes_a_picture_square_as_asked(ratio, expected, tmp_path, parts):
    save_tower(tmp_path / "tower", image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=0)
    (tmp_path / "language_model").symlink_to(parts / "language_model")
    output_dir = build(tmp_path, tmp_path / "llava", "--image_aspect_ratio", ratio)
    saved = json.loads(Path(output_dir, "processor_config.json").read_text())["image_processor"]
    assert saved["image_processor_type"] == "LlavaImageProcessor" and saved["crop_size"] == SQUARE

    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)
    picture = Image.fromarray(np.repeat(np.repeat(colours[None], 8, axis=1), 16, axis=0))
    assert picture.size == (32, 16)
    processor = AutoProcessor.from_pretrained(output_dir)
    pixels = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    wanted = torch.tensor([[STRIPES[letter] for letter in line] for line in expected])
    assert torch.allclose(pixels, wanted, atol=1e-6)
    assert processor._get_num_multimodal_tokens(image_sizes=[(16, 32)])["num_image_tokens"] == [4]


def test_padding_has_the_towers_own_mean_colour(parts, tmp_path):
    processor = AutoProcessor.from_pretrained(build(parts, tmp_path / "llava")).image_processor
    pixels = processor(tiny.picture("red", size=(16, 48)), return_tensors="pt")["pixel_values"][0]
    # CLIP's mean as 8-bit numbers; LLaVA pads with these.
    background = torch.tensor([122, 116, 104]) / 255
    expected = (background - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    assert torch.allclose(pixels[:, 8, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "text", "flags", "expected"),
    [
        ("float32", "bfloat16", [], "float32"),
        ("bfloat16", "bfloat16", [], "bfloat16"),
        ("float32", "float32", ["--dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_dtype(vision, text, flags, expected, tmp_path, caplog):
    tower = save_tower(tmp_path / "tower", dtype=getattr(torch, vision))
    save_language_model(tmp_path / "language_model", dtype=getattr(torch, text))
    output_dir = build(tmp_path, tmp_path / "llava", *flags)
    dtype = getattr(torch, expected)
    assert {tensor.dtype for tensor in load_file(Path(output_dir, "model.safetensors")).values()} == {dtype}
    model = AutoModelForImageTextToText.from_pretrained(output_dir)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_same(model.model.vision_tower.state_dict(), {name: tensor.to(dtype) for name, tensor in tower.items()})
    told = "The vision tower is float32, the language model bfloat16: both become float32, which holds them exactly."
    assert (told in caplog.text) == (vision != text)


def projector_of(output_dir):
    model = AutoModelForImageTextToText.from_pretrained(output_dir)
    return {name: tensor.clone() for name, tensor in model.model.multi_modal_projector.state_dict().items()}


def test_fresh_projector_follows_the_seed_and_the_flags(parts, tmp_path):
    first = projector_of(build(parts, tmp_path / "first", "--seed", "7"))
    again = projector_of(build(parts, tmp_path / "again", "--seed", "7"))
    other = projector_of(build(parts, tmp_path / "other", "--seed", "8", "--projector_hidden_act", "relu"))
    assert_same(again, first)
    assert not torch.equal(other["linear_1.weight"], first["linear_1.weight"])
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == {
        **{"linear_1.weight": (32, 32), "linear_1.bias": (32,)},
        **{"linear_2.weight": (32, 32), "linear_2.bias": (32,)},
    }
    # nn.Linear's initialisation, LLaVA's own: uniform within 1 / sqrt(32).
    assert 0.17 < first["linear_1.weight"].abs().max() <= 32**-0.5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "other")
    assert type(model.model.multi_modal_projector.act) is torch.nn.ReLU


@pytest.mark.parametrize("layout", ["own", "llava"])
def test_projector_flag(layout, parts, tmp_path):
    source = tiny.make_model(tiny.make_processor(), seed=5)
    expected = source.model.multi_modal_projector.state_dict()
    if layout == "own":
        save_projector(source, tmp_path / "stage1" / "projector")
    else:
        (tmp_path / "stage1").mkdir()
        layers = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
        tensors = {f"{layers[n.partition('.')[0]]}.{n.partition('.')[2]}": tensor for n, tensor in expected.items()}
        torch.save(tensors, tmp_path / "stage1" / "mm_projector.bin")
    output_dir = build(parts, tmp_path / "llava", "--projector", str(tmp_path / "stage1"))
    assert_same(projector_of(output_dir), expected)


def test_a_projector_of_the_wrong_size_is_refused_before_anything_is_written(parts, tmp_path):
    tensors = {"model.mm_projector.0.weight": torch.zeros(32, 48), "model.mm_projector.0.bias": torch.zeros(32)}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(
        ValueError, match=r"(?s)mm_projector.bin does not fit .*linear_1.weight is \(32, 48\), the model"
    ):
        build(parts, tmp_path / "llava", "--projector", str(tmp_path / "mm_projector.bin"))
    assert not (tmp_path / "llava").exists()


def test_layer_strategy_and_template_flags(parts, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'user' %}{% for part in message.content %}"
        "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% else %}{% generation %}"
        "{{ message.content[0].text + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    flags = ["--vision_feature_select_strategy", "full", "--vision_feature_layer", "-1", "--chat_template"]
    output_dir = build(parts, tmp_path / "llava", *flags, str(template))
    model, processor = load(output_dir)
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-1, "full")
    assert model.config.image_seq_length == 5  # four patches and CLS
    inputs = processor(images=tiny.picture(), text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 5
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    assert processor.chat_template == template.read_text()


def test_what_is_printed(parts, tmp_path, capsys):
    output_dir = build(parts, tmp_path / "llava")
    printed = capsys.readouterr().out
    assert re.search(r"multi_modal_projector +2,112 +0 +float32 +no +0 +-", printed)
    assert (
        "pictures: pad to 16 pixels, patches of 8, 1 further tokens, select strategy default: 4 image tokens each\n"
        "text: 478 tokens in 480 rows, <pad> pads, </s> stops\n"
        f"next: python recipes/pretrain_projector.py --model_name_or_path {output_dir} "
    ) in printed


def test_yaml_config_stands_between_the_defaults_and_the_command_line(parts, tmp_path):
    config = tmp_path / "build.yaml"
    config.write_text("image_aspect_ratio: crop\nvision_feature_layer: -3\n")
    build(parts, tmp_path / "llava", "--config", str(config), "--vision_feature_layer", "-1")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "llava").config.vision_feature_layer == -1
    assert AutoProcessor.from_pretrained(tmp_path / "llava").image_processor.do_pad is False

    config.write_text("image_aspect_ration: crop\n")
    with pytest.raises(ValueError, match="Unknown arguments from config file: .*image_aspect_ration"):
        build(parts, tmp_path / "typo", "--config", str(config))
    config.write_text("image_aspect_ratio: squeeze\n")
    with pytest.raises(ValueError, match="image_aspect_ratio 'squeeze': expected pad, crop, resize"):
        build(parts, tmp_path / "typo", "--config", str(config))


@pytest.mark.parametrize("flags", [["--chat", "plain"], ["--image_aspect_ratio", "squeeze"], ["--projectr", "x"]])
def test_unknown_and_abbreviated_flags_are_refused(flags, parts, tmp_path):
    with pytest.raises((SystemExit, ValueError)):
        build(parts, tmp_path / "llava", *flags)
    assert not (tmp_path / "llava").exists()


def test_output_dir_must_be_empty_or_overwrite_be_given(parts, tmp_path):
    output_dir = tmp_path / "llava"
    output_dir.mkdir()
    build(parts, output_dir)
    with pytest.raises(FileExistsError, match="llava is not empty: choose another --output_dir or pass --overwrite"):
        build(parts, output_dir)
    before = projector_of(output_dir)
    build(parts, output_dir, "--overwrite", "--seed", "1")
    assert not torch.equal(projector_of(output_dir)["linear_1.weight"], before["linear_1.weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vision_feature_layer", "-5"], "vision_feature_layer -5: CLIPVisionModel has 4 hidden states"),
        (
            ["--chat_template", "vicuna"],
            "'vicuna': expected one of vicuna_v1, vip_llava, mistral_instruct, llama_2, chatml, interleave_qwen",
        ),
        # This tokenizer has no <|im_end|>, so the template's stop is no token that generate stops at.
        (["--chat_template", "chatml"], "never learns to stop"),
        (["--projector_hidden_act", "gelo"], "gelo"),
        (["--projector", "gone"], "gone does not exist: expected a projector file or a folder"),
        (["--chat_template", "gone.jinja"], "gone.jinja"),
        (["--vision_tower", "gone/tower"], "gone/tower"),
        (["--language_model", "gone/lm"], "gone/lm"),
    ],
)
def test_bad_flags(flags, message, parts, tmp_path):
    with pytest.raises((ValueError, KeyError, OSError), match=re.escape(message)):
        build(parts, tmp_path / "llava", *flags)
    assert not (tmp_path / "llava").exists()


def test_a_strategy_that_would_lose_a_patch_is_refused(parts, tmp_path):
    save_tower(tmp_path / "tower", "siglip")
    (tmp_path / "language_model").symlink_to(parts / "language_model")
    with pytest.raises(ValueError, match="default would lose a patch: the tower has no CLS; pass full"):
        build(tmp_path, tmp_path / "llava", "--vision_feature_select_strategy", "default")


def test_checkpoints_that_cannot_be_parts(parts, tmp_path):
    (tmp_path / "no_tokenizer").mkdir()
    with pytest.raises(OSError, match="(?s)no_tokenizer: no tokenizer could be loaded .* packages sentencepiece"):
        build(parts, tmp_path / "llava", "--language_model", str(tmp_path / "no_tokenizer"))

    AutoModel.from_config(tiny.text_config("llama", 476)).save_pretrained(tmp_path / "headless")
    bare_tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(
        ValueError, match="headless: the checkpoint lacks 1 weights of LlamaForCausalLM, such as lm_head"
    ):
        build(parts, tmp_path / "llava", "--language_model", str(tmp_path / "headless"))

    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    bare_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="T5Config.*AutoModelForCausalLM"):
        build(parts, tmp_path / "llava", "--language_model", str(tmp_path / "t5"))

    with pytest.raises(
        ValueError, match="LlamaModel has image_size None and patch_size None; expected a vision tower"
    ):
        build(parts, tmp_path / "llava", "--vision_tower", str(parts / "language_model"))
    assert not (tmp_path / "llava").exists()
