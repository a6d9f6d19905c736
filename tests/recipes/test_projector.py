"""The projector alone: written, read and refused in the forms of three code bases."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from _parts import find_part, part_of
from _projector import load_projector, save_projector

KINDS = ("llava", "vipllava", "llava_next", "llava_onevision")
# Tensors of the tiny projectors: 32 -> 32 -> 32; VipLlava feeds it two vision layers through a LayerNorm.
MLP_SHAPES = {"linear_1.weight": (32, 32), "linear_1.bias": (32,), "linear_2.weight": (32, 32), "linear_2.bias": (32,)}
SHAPES = {
    "llava": MLP_SHAPES,
    "vipllava": {
        **MLP_SHAPES,
        "linear_1.weight": (32, 64),
        "projector_layernorm.weight": (64,),
        "projector_layernorm.bias": (64,),
    },
    "llava_next": {**MLP_SHAPES, "image_newline": (32,)},
    "llava_onevision": {**MLP_SHAPES, "image_newline": (32,)},
}
LLAVA_KEYS = {
    "linear_1.weight": "model.mm_projector.0.weight",
    "linear_1.bias": "model.mm_projector.0.bias",
    "linear_2.weight": "model.mm_projector.2.weight",
    "linear_2.bias": "model.mm_projector.2.bias",
    "image_newline": "model.image_newline",
}


def make_model(kind, seed=0):
    return tiny.make_model(tiny.make_processor(), kind, seed=seed)


def projector_of(model):
    return {name: p for name, p in model.named_parameters() if part_of(name) == "multi_modal_projector"}


def assert_same_projector(one, other):
    for name, tensor in projector_of(one).items():
        assert torch.equal(tensor, projector_of(other)[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_projector_loads_into_another_model(kind, tmp_path):
    source, target = make_model(kind, seed=1), make_model(kind, seed=2)
    before = copy.deepcopy(target.state_dict())
    file = save_projector(source, tmp_path / "projector")
    assert file == tmp_path / "projector" / "projector.safetensors"
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items()} == SHAPES[kind]

    load_projector(target, tmp_path)  # a stage 1 output, the projector in its folder
    wanted = source.state_dict()
    for name, tensor in target.state_dict().items():
        is_projector = part_of(name) == "multi_modal_projector"
        assert torch.equal(tensor, wanted[name] if is_projector else before[name]), name
    assert not torch.equal(before["model.multi_modal_projector.linear_1.weight"], load_file(file)["linear_1.weight"])


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_llavas_own_form(kind, tmp_path):
    source, target = (make_model(kind, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    file = save_projector(source, tmp_path / "stage1" / "mm_projector.bin")
    assert file == tmp_path / "stage1" / "mm_projector.bin"
    own = load_file(save_projector(source, tmp_path / "own.safetensors"))
    written = torch.load(file, weights_only=True)
    assert written.keys() == {LLAVA_KEYS[name] for name in SHAPES[kind]}
    assert all(torch.equal(written[LLAVA_KEYS[name]], tensor) for name, tensor in own.items())
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    load_projector(target, file.parent)
    assert_same_projector(source, target)


@pytest.mark.parametrize(
    "prefix", ["model.", "base_model.model.model.", "module.model.", "transformer."], ids=lambda prefix: prefix
)
def test_llavas_wrappers_in_front_of_a_key_are_dropped(prefix, tmp_path):
    source, target = make_model("llava_next", seed=1), make_model("llava_next", seed=2)
    own = load_file(save_projector(source, tmp_path))
    file = tmp_path / "non_lora_trainables.bin"
    torch.save({prefix + LLAVA_KEYS[name].removeprefix("model."): tensor for name, tensor in own.items()}, file)
    load_projector(target, file)
    assert_same_projector(source, target)


def test_xtuners_own_form(tmp_path):
    source, target = (make_model("llava", seed=seed).to(torch.bfloat16) for seed in (1, 2))
    file = save_projector(source, tmp_path / "projector" / "model.safetensors")
    own = load_file(save_projector(source, tmp_path / "own.safetensors"))
    written = load_file(file)
    assert sorted(written) == ["model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight"]
    for name, key in LLAVA_KEYS.items():
        if name != "image_newline":
            assert torch.equal(written[key.replace("mm_projector.", "")], own[name])
    assert json.loads((tmp_path / "projector" / "config.json").read_text()) == {
        "architectures": ["ProjectorModel"],
        "bias": True,
        "depth": 2,
        "hidden_act": "gelu",
        "llm_hidden_size": 32,
        "model_type": "projector",
        "torch_dtype": "bfloat16",
        "visual_hidden_size": 32,
    }
    for path in (tmp_path, tmp_path / "projector", file):
        load_projector(target, path)
        assert_same_projector(source, target)
        target = make_model("llava", seed=2).to(torch.bfloat16)
    with pytest.raises(FileExistsError, match="model.safetensors exists, maybe a checkpoint's: give xtuner's form a"):
        save_projector(source, file)


def test_xtuners_older_pickle_is_read(tmp_path):
    source, target = make_model("llava", seed=1), make_model("llava", seed=2)
    file = save_projector(source, tmp_path / "projector" / "model.safetensors")
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="holds several projectors .*model.safetensors, .*pytorch_model.bin"):
        load_projector(target, tmp_path)
    file.unlink()
    load_projector(target, tmp_path)
    assert_same_projector(source, target)


def test_a_checkpoints_own_weights_are_not_taken_for_a_projector(tmp_path):
    model = make_model("llava")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no projector: expected projector.safetensors, mm_projector"):
        load_projector(model, tmp_path)
    save_projector(model, tmp_path / "projector")
    load_projector(model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("vipllava", "p.bin", "LLaVA's mm_projector.bin has no place for this projector's projector_layernorm.weight"),
        ("vipllava", "model.safetensors", "xtuner's projector folder has no place for .*projector_layernorm.weight"),
        ("llava_next", "model.safetensors", "has no place for this projector's image_newline: save it as projector.s"),
    ],
)
def test_a_projector_that_a_form_cannot_hold_is_refused(kind, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_projector(make_model(kind), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_activation_is_part_of_a_form(tmp_path):
    gelu, relu = make_model("llava"), make_model("llava")
    relu.config.projector_hidden_act = "relu"
    save_projector(gelu, tmp_path / "mm_projector.bin")
    save_projector(relu, tmp_path / "xtuner" / "model.safetensors")
    with pytest.raises(ValueError, match="two linear layers with biases and GELU .*; this projector has .*'relu'"):
        save_projector(relu, tmp_path / "relu.bin")
    with pytest.raises(
        ValueError, match="mm_projector.bin was trained with the activation 'gelu', the model's .*relu"
    ):
        load_projector(relu, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="was trained with the activation 'relu', the model's projector has 'gelu'"):
        load_projector(gelu, tmp_path / "xtuner")
    load_projector(relu, tmp_path / "xtuner")


def test_a_projector_without_biases(tmp_path):
    model = make_model("llava")
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        layer.bias = None
    with pytest.raises(ValueError, match="two linear layers with biases .* and model.mm_projector.0.weight, model.mm"):
        save_projector(model, tmp_path / "mm_projector.bin")
    save_projector(model, tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["bias"] is False


@pytest.mark.parametrize("name", ["projector.safetensors", "mm_projector.bin", "model.safetensors"])
def test_every_form_is_read_and_written_through_a_peft_wrapper(name, tmp_path):
    source, target = make_model("llava", seed=1), make_model("llava", seed=2)
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    wrapped = get_peft_model(source, config)
    with torch.no_grad():
        find_part(wrapped, "multi_modal_projector").linear_1.weight.fill_(7)
    file = save_projector(wrapped, tmp_path / name)
    load_projector(target, file)
    assert torch.equal(target.model.multi_modal_projector.linear_1.weight, torch.full((32, 32), 7.0))
    wrapped = get_peft_model(make_model("llava", seed=3), config)
    load_projector(wrapped, file)
    assert (find_part(wrapped, "multi_modal_projector").linear_1.weight == 7).all()


def test_load_casts_to_the_models_dtype_and_save_takes_the_trained_copy_of_peft(tmp_path):
    source = make_model("llava", seed=1)
    save_projector(source, tmp_path)
    target = make_model("llava", seed=2).to(torch.bfloat16)
    load_projector(target, tmp_path)
    weight = target.model.multi_modal_projector.linear_1.weight
    assert torch.equal(weight, source.model.multi_modal_projector.linear_1.weight.bfloat16())

    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    wrapped = get_peft_model(target, config)
    with torch.no_grad():
        find_part(wrapped, "multi_modal_projector").linear_1.weight.fill_(7)
    saved = load_file(save_projector(wrapped, tmp_path / "trained.safetensors"))
    assert sorted(saved) == sorted(MLP_SHAPES)
    assert torch.equal(saved["linear_1.weight"], torch.full((32, 32), 7, dtype=torch.bfloat16))


def test_save_refuses_a_projector_with_adapters(tmp_path):
    model = get_peft_model(make_model("llava"), LoraConfig(target_modules=["linear_1"]))
    with pytest.raises(
        ValueError, match=r"carries adapters on linear_1: merge them first \(recipes/merge_adapter.py\)"
    ):
        save_projector(model, tmp_path)


def test_misfits_are_one_error_that_lists_them(tmp_path):
    tensors = {"model.mm_projector.0.weight": torch.zeros(32, 48), "model.mm_projector.0.bias": torch.zeros(32)}
    torch.save({**tensors, "model.embed_tokens.weight": torch.zeros(2, 32)}, tmp_path / "mm_projector.bin")
    model = make_model("llava")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        load_projector(model, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/mm_projector.bin does not fit this model's projector:\n"
        "  missing: linear_2.weight (32, 32)\n"
        "  missing: linear_2.bias (32,)\n"
        "  unexpected: model.embed_tokens.weight (2, 32)\n"
        "  wrong shape: linear_1.weight is (32, 48), the model's is (32, 32)\n"
        "Take a projector made for this vision tower, language model and class."
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Malicious:
    def __reduce__(self):
        return print, ("this must not run",)


def test_unreadable_files(tmp_path, capsys):
    model = make_model("llava")
    with pytest.raises(FileNotFoundError, match="gone does not exist: expected a projector file or a folder"):
        load_projector(model, tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match="holds no projector: expected projector.safetensors, mm_projector.bin"
    ):
        load_projector(model, tmp_path)

    torch.save({"model.mm_projector.0.weight": Malicious()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="mm_projector.bin: not a readable file of tensors"):
        load_projector(model, tmp_path)
    assert "this must not run" not in capsys.readouterr().out

    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="cut.safetensors: not a readable file of tensors"):
        load_projector(model, tmp_path / "cut.safetensors")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(ValueError, match="empty.bin: not a readable file of tensors"):
        load_projector(model, tmp_path / "empty.bin")

    save_file({"linear_1.weight": torch.zeros(1)}, tmp_path / "projector.safetensors")
    with pytest.raises(ValueError, match="holds several projectors .*: name one of these files"):
        load_projector(model, tmp_path)


def test_llavas_stage_one_file_has_no_newline_and_the_model_keeps_its_own(tmp_path, caplog):
    file = save_projector(make_model("llava_next"), tmp_path / "mm_projector.bin")
    tensors = torch.load(file, weights_only=True)
    torch.save({name: tensor for name, tensor in tensors.items() if "newline" not in name}, file)
    model = make_model("llava_next", seed=5)
    newline = model.model.image_newline.detach().clone()
    load_projector(model, file)
    assert torch.equal(model.model.image_newline, newline)
    assert "has no image_newline (LLaVA's stage 1 saves none): the model keeps its own" in caplog.text


def test_rounding_is_said(tmp_path, caplog):
    file = save_projector(make_model("llava"), tmp_path / "projector.safetensors")
    load_projector(make_model("llava", seed=5), file)
    assert "rounded" not in caplog.text
    load_projector(make_model("llava", seed=5).bfloat16(), file)
    assert "rounded from torch.float32 to the model's torch.bfloat16: linear_1.weight" in caplog.text
