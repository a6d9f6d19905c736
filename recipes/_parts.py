"""The three parts of a Llava model: find, freeze, quantise, adapt and show them.

Works on `LlavaForConditionalGeneration` and its VipLlava, LlavaNext and LlavaOnevision relatives, bare or inside a
PEFT or DDP wrapper. On transformers 5 the parts live under `model.model`; `lm_head` and LlavaNext's `image_newline`
stand outside of them and are counted with the part that they serve.
"""

import copy
import os
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from rich import box
from rich.table import Table
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config, get_quantization_config

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
# For `BitsAndBytesConfig(llm_int8_skip_modules=...)`. Names from the root, since transformers 5 matches a name's start
# or end alone ("vision_tower" is neither); with `lm_head`, since any list replaces the default that spares it.
UNQUANTISED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
QUANTISED = {"4-bit": Params4bit, "8-bit": Int8Params}
# accelerate 1.15 leaves packed weights out of FSDP2; transformers 5.23 refuses them a device under ZeRO-3.
UNSHARDED = (
    "{} does not shard a 4-bit or 8-bit base: take accelerate_configs/multi_gpu.yaml (DDP, the whole base on each "
    "GPU), or --load_in_4bit False"
)
OWNERS = {**{part: part for part in PARTS}, "lm_head": "language_model", "image_newline": "multi_modal_projector"}
IN_TOWER = r"model\.vision_tower\..*"
LAYER = re.compile(r"\.(\d+)\.")  # the first number in a dotted name is the layer's


def part_of(parameter_name: str) -> str:
    """Return which of `PARTS` a parameter (or module) of this dotted name belongs to.

    Raises:
        ValueError: the name lies in none of the parts.
    """
    for word in parameter_name.split("."):
        if word in OWNERS:
            return OWNERS[word]
    raise ValueError(f"parameter {parameter_name!r} lies in none of {', '.join(OWNERS)}: is this a Llava model?")


def find_part(model: nn.Module, part: str) -> nn.Module:
    """Return the module that a part's forward pass runs through: of a PEFT `modules_to_save` copy, the active one.

    `find_part(model, "language_model")` is the decoder without `lm_head`.

    Raises:
        ValueError: `part` is not one of `PARTS`, or the model has no such module.
    """
    _check_parts([part])
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == part:
            if isinstance(module, ModulesToSaveWrapper):
                return module.modules_to_save[module.active_adapters[0]]
            return module
    raise ValueError(f"{type(model).__name__} has no {part}: expected one of the Llava classes, bare or wrapped")


def train_only(model: nn.Module, parts: Iterable[str]) -> None:
    """Make exactly these parts trainable, their weights in float32; freeze all else in the dtype it has.

    Float32, because at a learning rate of 2e-5 most updates of a bfloat16 weight round to nothing. Of a vision tower
    the layers behind the one whose features are used stay frozen: they would never get a gradient.

    Args:
        model: changed in place.
        parts: any of `PARTS`; none at all freezes the whole model.

    Raises:
        ValueError: an unknown part, or one whose weights are quantised and so cannot train.
    """
    parts = _check_parts(parts)
    bypassed = _bypassed(model) if "vision_tower" in parts else set()
    for name, parameter in model.named_parameters():
        trained = part_of(name) in parts and name not in bypassed
        if trained and not parameter.is_floating_point():
            raise ValueError(
                f"{name} holds quantised weights ({parameter.dtype}), which cannot train: leave {part_of(name)} out "
                "of the quantisation (llm_int8_skip_modules) or train adapters on it"
            )
        if trained and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(trained)


def quantised_loading(model_args: ModelConfig, training_args: TrainingArguments) -> dict:
    """Arguments of `from_pretrained` for a base in 4-bit or 8-bit: the decoder layers alone, on this process's device.

    Empty where neither is asked for: a `BitsAndBytesConfig(load_in_4bit=False)` with other 4-bit fields quantises.

    Raises:
        ValueError: `--dtype auto`, which does not say in which dtype the quantised layers compute; or the launcher
            shards weights.
    """
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return {}
    if is_deepspeed_zero3_enabled():
        raise ValueError(UNSHARDED.format("ZeRO-3"))
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(UNSHARDED.format("FSDP"))
    if model_args.dtype == "auto":
        raise ValueError("--dtype auto beside a quantised base: say --dtype bfloat16, or float16 on cards without it")
    config = get_quantization_config(model_args)
    config.llm_int8_skip_modules = list(UNQUANTISED)
    return {"quantization_config": config, "device_map": {"": training_args.device}}


def adapter_config(model_args: ModelConfig) -> LoraConfig:
    """TRL's `get_peft_config`, and the revision of the base, which PEFT, evaluating and merging read from it."""
    config = get_peft_config(model_args)
    config.revision = None if model_args.model_revision == "main" else model_args.model_revision
    return config


def add_adapters(
    model: nn.Module,
    config: LoraConfig,
    *,
    freeze_projector: bool = False,
    lora_vision_tower: bool = False,
) -> PeftModel:
    """Put LoRA or DoRA adapters on the language model's linear layers and freeze all that they stand on.

    `lm_head` gets none: TRL's fused head reads its plain weight. The projector trains whole, in float32, as PEFT's
    `modules_to_save`, so that it lies in the adapter's file and any tool that loads the adapter gets it. LlavaNext's
    `image_newline` stays frozen: PEFT has no place for a bare parameter.

    Args:
        model: any Llava class; its language model may be quantised.
        config: rank, alpha, dropout, DoRA as wanted. `target_modules` None or "all-linear": every linear layer; a name
            or several (`q_proj`): the language model's layers of that name. Not changed.
        freeze_projector: leave the projector as it is.
        lora_vision_tower: adapters on the vision tower too, on the layers up to the one whose features are used (the
            others never see a gradient), with the rank and alpha that xtuner gives a tower: 64 and 16.

    Raises:
        ValueError: the tower or the projector is quantised, `target_modules` has a name that no linear layer of the
            language model has, `modules_to_save` or `target_parameters` is set, the config chooses layers in a way
            that this function replaces, or DoRA meets an 8-bit base.
    """
    chooses = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
    if given := [name for name in chooses if getattr(config, name)]:
        raise ValueError(
            f"{', '.join(given)}: add_adapters chooses the layers itself; only target_modules may say which"
        )
    if config.modules_to_save or config.target_parameters:
        raise ValueError(
            "--lora_modules_to_save and --lora_target_parameters reach outside the language model's linear layers: "
            "the projector trains whole as it is (--freeze_projector if it should not); recipes/sft_full.py trains "
            "the rest whole"
        )
    for name, parameter in model.named_parameters():
        if _is_quantised(parameter) and (part_of(name) != "language_model" or "lm_head" in name):
            raise ValueError(f"{name} is quantised: load with llm_int8_skip_modules={list(UNQUANTISED)}")

    if config.use_dora and any(isinstance(parameter, Int8Params) for parameter in model.parameters()):
        raise ValueError("DoRA's first forward pass fails on an 8-bit base (peft 0.21, CPU): take --load_in_4bit")

    chosen = _named(_linear_layers(model, "language_model"), config.target_modules)
    config = copy.deepcopy(config)
    if lora_vision_tower:
        chosen += _linear_layers(model, "vision_tower")
        config.rank_pattern, config.alpha_pattern = {IN_TOWER: 64}, {IN_TOWER: 16}
    config.target_modules = _pattern(chosen)
    config.modules_to_save = None if freeze_projector else ["multi_modal_projector"]
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode a CPU with AVX512-BF16 repacks the weights for a kernel without a backward pass, and keeps
            # them so: training after the first evaluation would lose its gradients (bitsandbytes 0.50.2).
            module.support_avx512bf16_for_cpu = False
    model = get_peft_model(model, config)
    _set_magnitudes(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def list_misfits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Say which tensors of a file are missing, unexpected or of another shape than the model's; empty if all fit."""
    misfits = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in found]
    misfits += [f"unexpected: {name} {tuple(found[name].shape)}" for name in found if name not in expected]
    misfits += [
        f"wrong shape: {name} is {tuple(found[name].shape)}, the model's is {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    return misfits


def numel(parameter: nn.Parameter) -> int:
    """Count the weights that a parameter stands for: all of a 4-bit one, and of one that is sharded by ZeRO-3."""
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in its place


def list_parts(model: nn.Module, learning_rates: dict[str, float]) -> list[dict]:
    """What trains of each part, in which precision, at which learning rate.

    A tied `lm_head` is counted once, a 4-bit tensor by the weights that it stands for, not by the bytes it takes; the
    untrained original that PEFT keeps beside a `modules_to_save` projector is not counted.

    Args:
        model: any Llava class, bare or wrapped.
        learning_rates: peak learning rate of every part that has a trainable parameter.

    Returns:
        For each of `PARTS`: `part`, `parameters`, `trainable`, `dtype`, `quantised`, `adapters` (layers with one),
        `learning_rate` (None where nothing trains).
    """
    tuner_layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    parts = []
    for part in PARTS:
        parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if part_of(name) == part and ".original_module." not in name
        ]
        trainable = sum(numel(parameter) for parameter in parameters if parameter.requires_grad)
        dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters if not _is_quantised(p)}
        parts.append(
            {
                "part": part,
                "parameters": sum(numel(parameter) for parameter in parameters),
                "trainable": trainable,
                "dtype": ", ".join(sorted(dtypes)),
                "quantised": _quantisation(parameters),
                "adapters": sum(part_of(name) == part for name in tuner_layers),
                "learning_rate": learning_rates[part] if trainable else None,
            }
        )
    return parts


def part_table(model: nn.Module, learning_rates: dict[str, float]) -> Table:
    """`list_parts` and a total, for a terminal."""
    # Fits into the 80 columns that rich assumes of a log file.
    table = Table(title="Parts of the model", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("part", no_wrap=True)
    for column in ("parameters", "trainable", "dtype", "quantised", "adapters", "learning\nrate"):
        table.add_column(column, justify="right", no_wrap=column != "dtype")
    parts = list_parts(model, learning_rates)
    for part in parts:
        table.add_row(
            part["part"],
            shorten_count(part["parameters"]),
            shorten_count(part["trainable"]),
            part["dtype"],
            part["quantised"],
            str(part["adapters"]),
            "-" if part["learning_rate"] is None else f"{part['learning_rate']:g}",
        )
    count, trainable, adapters = (sum(part[n] for part in parts) for n in ("parameters", "trainable", "adapters"))
    table.add_section()
    table.add_row("total", shorten_count(count), shorten_count(trainable), "", "", str(adapters), "")
    table.caption = f"{trainable / count:.2%} of the parameters train"
    return table


def _set_magnitudes(model: PeftModel) -> None:
    """Start DoRA's magnitudes from the norms of the weights in float32, as its forward pass takes them.

    PEFT takes them in the base's dtype: in bfloat16 they are off by up to 0.4 %, and the model does not start from
    its base (peft 0.21).
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, magnitude in module.lora_magnitude_vector.items():
                base = module.get_base_layer()
                with gather_params_ctx(base.parameters()):
                    weight = dequantize_module_weight(base).detach().float()
                    # Zero, unless the adapter starts from the weights themselves (PiSSA, OLoRA).
                    adapter = (module.lora_B[name].weight @ module.lora_A[name].weight).detach().float()
                    magnitude.weight.data = (weight + module.scaling[name] * adapter).norm(dim=1)


def _bypassed(model: nn.Module) -> set[str]:
    """Names of the tower's parameters behind the layer whose features are used: they never get a gradient."""
    names = [name for name, _ in model.named_parameters() if part_of(name) == "vision_tower"]
    layers = [int(found[1]) if (found := LAYER.search(name)) else None for name in names]
    if not any(layer is not None for layer in layers):
        return set()
    count = 1 + max(layer for layer in layers if layer is not None)
    # Hidden state 0 is what enters layer 0, so hidden state k is what leaves layer k - 1.
    features = model.config.vision_feature_layer
    features = [features] if isinstance(features, int) else features
    used = max(layer if layer >= 0 else count + 1 + layer for layer in features)
    last = max((place for place, layer in enumerate(layers) if layer is not None and layer < used), default=-1)
    return {
        name
        for place, name in enumerate(names)
        if place > last or (layers[place] is not None and layers[place] >= used)
    }


def _linear_layers(model: nn.Module, part: str) -> list[str]:
    """Names of the linear layers that an adapter may stand on: numbered ones, that the part's output depends on."""
    bypassed = _bypassed(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(name) == part
        and LAYER.search(name)
        and f"{name}.weight" not in bypassed
    ]
    if not names:
        kind = type(find_part(model, part)).__name__
        raise ValueError(f"{kind} has no numbered linear layers for adapters; recipes/sft_full.py trains it whole")
    return names


def _named(layers: list[str], wanted: str | list[str] | None) -> list[str]:
    """Those of `layers` whose own name is wanted; all of them if none is named."""
    if wanted in (None, "all-linear"):
        return layers
    wanted = {wanted} if isinstance(wanted, str) else set(wanted)
    known = {layer.rpartition(".")[2] for layer in layers}
    if wanted - known:
        raise ValueError(
            f"--lora_target_modules {' '.join(sorted(wanted - known))}: no linear layer of the language model has "
            f"that name; expected some of {' '.join(sorted(known))}, or leave the flag out to train them all"
        )
    return [layer for layer in layers if layer.rpartition(".")[2] in wanted]


def _pattern(layers: list[str]) -> str:
    """A regular expression for PEFT's `target_modules` that matches these names in full and nothing else."""
    blocks = defaultdict(list)
    for layer in layers:
        stem, number, rest = LAYER.split(layer, maxsplit=1)
        blocks[stem, rest].append(number)
    rests = defaultdict(list)
    for (stem, rest), numbers in blocks.items():
        rests[stem, "|".join(numbers)].append(re.escape(rest))
    return "|".join(
        rf"{re.escape(stem)}\.({numbers})\.({'|'.join(names)})" for (stem, numbers), names in rests.items()
    )


def _check_parts(parts: Iterable[str]) -> set[str]:
    unknown = sorted(set(parts := list(parts)) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part {', '.join(map(repr, unknown))}: expected some of {', '.join(PARTS)}")
    return set(parts)


def shorten_count(count: int) -> str:
    """`7,062,902,784` → `7.063 B`."""
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.3f} B"


def _is_quantised(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, tuple(QUANTISED.values()))


def _quantisation(parameters: list[nn.Parameter]) -> str:
    found = [name for name, kind in QUANTISED.items() if any(isinstance(parameter, kind) for parameter in parameters)]
    return ", ".join(found) or "no"
