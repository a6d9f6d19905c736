import io

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CohereConfig,
    Dinov2Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    SwinConfig,
)

import tiny
from _assembly import assemble, check_picture, check_saved, count_extra_tokens, load_parts
from _parts import PARTS, add_adapters, find_part, part_of, part_table, train_only
from collators import LlavaDataCollator, chat_template_path

KINDS = ("llava", "vipllava", "llava_next", "llava_onevision")
RATES = dict.fromkeys(PARTS, 2e-5)


def make_model(kind, seed=0):
    text = {"llava_next": "mistral", "llava_onevision": "qwen2"}.get(kind, "llama")
    return tiny.make_model(tiny.make_processor(), kind, text, seed)


def cells(table):
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision_tower"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector"),
        ("model.image_newline", "multi_modal_projector"),
        ("model.language_model.embed_tokens.weight", "language_model"),
        ("lm_head.weight", "language_model"),
        ("base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.default.weight", "vision_tower"),
        ("module.base_model.model.lm_head.base_layer.weight", "language_model"),
        # Names of checkpoints written before transformers 5.
        ("language_model.lm_head.weight", "language_model"),
    ],
)
def test_part_of(name, part):
    assert part_of(name) == part


def test_part_of_refuses_a_name_outside_of_the_parts():
    with pytest.raises(ValueError, match="parameter 'model.audio_tower.conv1.weight' lies in none of vision_tower"):
        part_of("model.audio_tower.conv1.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_every_class_has_a_part_and_every_part_is_found(kind):
    model = make_model(kind)
    for part in PARTS:
        assert find_part(model, part) is getattr(model.model, part)
    assert {part_of(name) for name, _ in model.named_parameters()} == set(PARTS)


def test_find_part_sees_through_peft_and_ddp():
    bare = make_model("llava")
    tower = bare.model.vision_tower
    wrapped = get_peft_model(bare, LoraConfig(target_modules=r".*language_model.*q_proj"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert find_part(DistributedDataParallel(wrapped), "vision_tower") is tower
    finally:
        torch.distributed.destroy_process_group()


def test_find_part_errors():
    with pytest.raises(ValueError, match="unknown part 'projector': expected some of vision_tower, multi_modal_proj"):
        find_part(make_model("llava"), "projector")
    with pytest.raises(ValueError, match="Linear has no vision_tower: expected one of the Llava classes"):
        find_part(nn.Linear(1, 1), "vision_tower")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [["multi_modal_projector"], ["multi_modal_projector", "language_model"], []])
def test_train_only_unfreezes_and_upcasts_exactly_these_parts(kind, parts):
    model = make_model(kind).to(torch.bfloat16)
    expected = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    train_only(model, parts)
    for name, parameter in model.named_parameters():
        trained = part_of(name) in parts
        assert parameter.requires_grad is trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name
        assert torch.equal(parameter.float(), expected[name]), name


def test_train_only_includes_the_head_and_the_newline_and_keeps_ties():
    model = make_model("llava_next")
    train_only(model, ["language_model"])
    assert model.lm_head.weight.requires_grad and not model.model.image_newline.requires_grad
    train_only(model, ["multi_modal_projector"])
    assert model.model.image_newline.requires_grad and not model.lm_head.weight.requires_grad

    tied = make_model("llava").to(torch.bfloat16)
    tied.lm_head.weight = tied.get_input_embeddings().weight
    train_only(tied, ["language_model"])
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert tied.lm_head.weight.dtype == torch.float32


def test_train_only_errors():
    model = make_model("llava")
    with pytest.raises(ValueError, match="unknown part 'lm_head', 'vision_model'"):
        train_only(model, ["vision_model", "lm_head"])
    model.model.language_model.layers[0].mlp.up_proj = quantised_linear()
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.up_proj.weight holds quantised weights \(torch.uint8\), which cannot train"
    ):
        train_only(model, ["language_model"])
    train_only(model, ["multi_modal_projector"])


def quantised_linear():
    # Moving the layer to a device is what packs its weight.
    return Linear4bit(32, 64, bias=False, compute_dtype=torch.float32).to("cpu")


def test_part_table_of_a_fresh_model():
    model = make_model("llava")
    train_only(model, ["multi_modal_projector", "language_model"])
    # Tower: embeddings 32 (CLS) + 32*3*8*8 + 5*32; a layer 4*(32*32+32) + (64*32+64) + (32*64+32) + 2*64, three of
    # them; two LayerNorms of 64. Projector: 2*(32*32+32). Decoder: a layer 2*32*32 + 2*16*32 + 3*64*32 + 2*32, two of
    # them; a norm of 32; embeddings and head of 360*32 each.
    table = part_table(model, {"multi_modal_projector": 1e-3, "language_model": 2e-5})
    assert cells(table) == [
        ["vision_tower", "32,096", "0", "float32", "no", "0", "-"],
        ["multi_modal_projector", "2,112", "2,112", "float32", "no", "0", "0.001"],
        ["language_model", "41,632", "41,632", "float32", "no", "0", "2e-05"],
        ["total", "75,840", "43,744", "", "", "0", ""],
    ]
    assert table.caption == "57.68% of the parameters train"


def test_part_table_of_the_7b_model_fits_into_80_columns():
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=LlamaConfig()))
    train_only(model.bfloat16(), ["multi_modal_projector"])
    console = Console(file=io.StringIO(), width=80)
    console.print(part_table(model, {"multi_modal_projector": 1e-3}))
    lines = console.file.getvalue().splitlines()
    assert [line.split() for line in lines[4:7]] == [
        ["vision_tower", "303.51", "M", "0", "bfloat16", "no", "0", "-"],
        ["multi_modal_projector", "20.98", "M", "20.98", "M", "float32", "no", "0", "0.001"],
        ["language_model", "6.738", "B", "0", "bfloat16", "no", "0", "-"],
    ]


def test_part_table_counts_adapters_and_true_4_bit_weights():
    model = make_model("llava").to(torch.bfloat16)
    model.model.language_model.layers[0].mlp.up_proj = quantised_linear()
    model.model.vision_tower.encoder.layers[0].mlp.fc1 = Linear8bitLt(32, 64, has_fp16_weights=False).to("cpu")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)"))
    rows = {row[0]: row[1:] for row in cells(part_table(model, {"language_model": 2e-4}))}
    # Rank 2 on q (32 -> 32) and v (32 -> 16) of two layers: 2 * (2*32 + 2*32 + 2*32 + 2*16) weights in 4 adapters.
    assert rows["language_model"] == [
        *["42,080", "448", "bfloat16, float32", "4-bit", "4", "0.0002"],
    ]
    assert rows["vision_tower"][0] == "32,096" and rows["vision_tower"][3] == "8-bit"
    assert rows["multi_modal_projector"][2:4] == ["bfloat16", "no"]
    assert rows["total"][:2] == ["76,288", "448"]


def test_part_table_counts_a_tied_head_once_and_wants_a_rate_for_what_trains():
    model = make_model("llava")
    model.lm_head.weight = model.get_input_embeddings().weight
    assert cells(part_table(model, RATES))[2][1] == f"{41_632 - 360 * 32:,}"
    with pytest.raises(KeyError, match="vision_tower"):
        part_table(model, {"language_model": 1e-3, "multi_modal_projector": 1e-3})


SIZES = dict(
    vocab_size=360, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


def make_language_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("config", "layer", "expected"),
    [
        (tiny.vision_config("clip"), -2, 1),
        (tiny.vision_config("clip"), 0, 1),
        (tiny.vision_config("siglip"), -2, 0),
        (Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8), -1, 1),
    ],
)
def test_count_extra_tokens(config, layer, expected):
    assert count_extra_tokens(AutoModel.from_config(config).eval(), layer) == expected


def test_count_extra_tokens_errors():
    tower = AutoModel.from_config(tiny.vision_config("clip"))
    for layer in (-5, 4):  # three layers and the embeddings: -4 to 3
        with pytest.raises(ValueError, match=f"vision_feature_layer {layer}: CLIPVisionModel has 4 hidden states"):
            count_extra_tokens(tower, layer)
    with pytest.raises(
        ValueError, match="LlamaModel has image_size None and patch_size None; expected a vision tower"
    ):
        count_extra_tokens(AutoModel.from_config(tiny.text_config("llama", 360)), -2)
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)
    with pytest.raises(ValueError, match="SwinModel makes 16 tokens of 64 patches; expected one for each"):
        count_extra_tokens(AutoModel.from_config(swin), -1)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_assemble_joins_the_parts_themselves(kind):
    processor, tower = tiny.make_processor(), AutoModel.from_config(tiny.vision_config("clip"))
    language_model = make_language_model(tiny.text_config(kind, 360))
    language_model.generation_config.eos_token_id = [6]
    model = assemble(tower, language_model, processor, -2, "gelu")
    assert model.model.vision_tower is tower
    assert model.model.language_model is language_model.model and model.lm_head is language_model.lm_head
    assert model.config.image_token_id == 4 and model.config.text_config.pad_token_id == 3
    # The language model's own stop tokens and the tokenizer's.
    assert model.generation_config.eos_token_id == [2, 6]
    assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (1, 3)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tower_dtype", "language_dtype", "expected"),
    [("float32", "bfloat16", "float32"), ("float16", "bfloat16", "float32"), ("bfloat16", "bfloat16", "bfloat16")],
)
def test_assemble_takes_the_dtype_that_holds_both_parts_exactly(tower_dtype, language_dtype, expected):
    tower = AutoModel.from_config(tiny.vision_config("clip"), dtype=tower_dtype)
    language_model = AutoModelForCausalLM.from_config(tiny.text_config("llama", 360), dtype=language_dtype).eval()
    model = assemble(tower, language_model, tiny.make_processor(), -2, "gelu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, expected)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), "Gemma2ForCausalLM does more to its logits"),
        (CohereConfig(**SIZES, eos_token_id=2), "CohereForCausalLM does more to its logits"),
        (PhiConfig(**SIZES), "PhiForCausalLM does more to its logits"),
        (
            GPT2Config(vocab_size=360, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2),
            "GPT2LMHeadModel ties its head to other than `embed_tokens`",
        ),
    ],
)
def test_assemble_refuses_a_language_model_that_it_would_change(config, message):
    language_model = make_language_model(config)
    tower = AutoModel.from_config(tiny.vision_config("clip"))
    with pytest.raises(ValueError, match=message):
        assemble(tower, language_model, tiny.make_processor(), -2, "gelu")


def test_check_picture():
    processor = tiny.make_processor()
    model = tiny.make_model(processor)
    assert check_picture(model, processor) == 4
    processor.num_additional_image_tokens = 0
    with pytest.raises(ValueError, match="a picture becomes 3 image tokens but 4 features; .* num_additional_image_t"):
        check_picture(model, processor)


def test_load_parts_and_check_saved(tmp_path):
    tower, language_model = (
        AutoModel.from_config(tiny.vision_config("clip")),
        make_language_model(LlamaConfig(**SIZES)),
    )
    tower.save_pretrained(tmp_path / "tower")
    language_model.save_pretrained(tmp_path / "language_model")
    paths = tmp_path / "tower", tmp_path / "language_model"
    model = assemble(*load_parts(*paths), tiny.make_processor(), -2, "gelu")
    projector = model.model.multi_modal_projector
    model.save_pretrained(tmp_path / "llava")
    saved = check_saved(tmp_path / "llava", *load_parts(*paths), projector)
    assert torch.equal(saved.model.vision_tower.embeddings.class_embedding, tower.embeddings.class_embedding)

    for module, part, name in (
        (model.lm_head, "lm_head", "weight"),
        (model.model.vision_tower.embeddings.patch_embedding, "vision_tower", "embeddings.patch_embedding.weight"),
        (model.model.language_model.norm, "language_model", "norm.weight"),
    ):
        original = module.weight.detach().clone()
        module.weight.data.view(-1)[-1] += 1e-3
        model.save_pretrained(tmp_path / "llava")
        with pytest.raises(ValueError, match=f"{part}.{name} differs from the part it was made of"):
            check_saved(tmp_path / "llava", *load_parts(*paths), projector)
        module.weight.data.copy_(original)


# Adapters (what a run trains of them: test_sft_qlora.py)


def adapted_layers(model):
    return {
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stand_on_their_part_of_every_class(kind):
    """Both towers have three layers; LlavaOnevision uses the last hidden state, the others the one before."""
    used = 3 if kind == "llava_onevision" else 2
    model = add_adapters(make_model(kind), LoraConfig(r=2), lora_vision_tower=True)
    layers = adapted_layers(model)
    tower = {name for name in layers if "vision_tower" in name}
    assert len(layers - tower) == 14 and all(
        name.startswith("model.language_model.layers.") for name in layers - tower
    )
    assert {int(name.split(".layers.")[1][0]) for name in tower} == set(range(used)) and len(tower) == 6 * used
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".modules_to_save.default." in name for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_trained_tower_the_layers_behind_the_features_stay_frozen(kind):
    model = make_model(kind)
    train_only(model, ["vision_tower"])
    frozen = {name for name, parameter in model.model.vision_tower.named_parameters() if not parameter.requires_grad}
    ends = {name.split(".")[0] for name in frozen if ".layers." not in name}
    if kind == "llava_onevision":
        assert ends == {"post_layernorm", "head"} and not any(".layers." in name for name in frozen)
    else:
        assert ends == {"post_layernorm"}
        assert {name.split(".layers.")[1][0] for name in frozen if ".layers." in name} == {"2"}


def test_a_language_model_without_linear_layers_is_refused():
    model = tiny.make_model(tiny.make_processor())
    model.model.language_model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="LlamaModel has no numbered linear layers for adapters; recipes/sft_full.py"):
        add_adapters(model, LoraConfig(r=2))


def test_a_quantised_tower_is_refused():
    model = tiny.make_model(tiny.make_processor())
    model.model.vision_tower.encoder.layers[0].mlp.fc1 = quantised_linear()
    with pytest.raises(ValueError, match="fc1.weight is quantised: load with llm_int8_skip_modules="):
        add_adapters(model, LoraConfig(r=2))


def test_a_tower_without_numbered_layers_trains_whole_and_takes_no_adapters():
    model = tiny.make_model(tiny.make_processor())
    model.model.vision_tower = nn.Sequential(nn.Identity())
    model.model.vision_tower.patches = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Sequential has no numbered linear layers"):
        add_adapters(model, LoraConfig(r=2), lora_vision_tower=True)
    train_only(model, ["vision_tower"])
    assert model.model.vision_tower.patches.weight.requires_grad


def test_dora_on_weights_that_the_adapter_took_over_starts_from_the_base():
    """PiSSA moves the largest part of a weight into the adapter, which then is not zero."""
    model = tiny.make_model(tiny.make_processor())
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        expected = model(**inputs).logits
        adapted = add_adapters(model, LoraConfig(r=2, use_dora=True, init_lora_weights="pissa")).eval()
        torch.testing.assert_close(adapted(**inputs).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dora_starts_from_the_base(dtype):
    """Under autocast, as training runs: PEFT's own magnitudes of a bfloat16 base are rounded."""
    processor = tiny.make_processor()
    model = tiny.make_model(processor).to(dtype)
    inputs = LlavaDataCollator(processor, chat_template=chat_template_path("vicuna_v1").read_text())(
        [tiny.row(tiny.user("What is it?", images=1), tiny.assistant("red"))]
    )
    weights = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.language_model.layers]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = model(**inputs).logits
        adapted = add_adapters(model, LoraConfig(r=2, use_dora=True)).eval()
        torch.testing.assert_close(adapted(**inputs).logits, expected, atol=5e-4, rtol=0)
    for layer, weight in zip(adapted.get_base_model().model.language_model.layers, weights, strict=True):
        magnitude = layer.mlp.up_proj.lora_magnitude_vector["default"].weight
        assert magnitude.dtype == torch.float32 and torch.equal(magnitude, weight.float().norm(dim=1))
