"""The three parts of a Llava model: find them, choose which train, show them.

Works on `LlavaForConditionalGeneration` and its VipLlava, LlavaNext and LlavaOnevision relatives, bare or inside a
PEFT or DDP wrapper. On transformers 5 the parts live under `model.model`; `lm_head` and LlavaNext's `image_newline`
stand outside of them and are counted with the part that they serve.
"""

from collections.abc import Iterable

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from rich import box
from rich.table import Table
from torch import nn

PARTS = ("vision_tower", "multi_modal_projector", "language_model")
OWNERS = {**{part: part for part in PARTS}, "lm_head": "language_model", "image_newline": "multi_modal_projector"}


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

    Float32, because at a learning rate of 2e-5 most updates of a bfloat16 weight round to nothing.

    Args:
        model: changed in place.
        parts: any of `PARTS`; none at all freezes the whole model.

    Raises:
        ValueError: an unknown part, or one whose weights are quantised and so cannot train.
    """
    parts = _check_parts(parts)
    for name, parameter in model.named_parameters():
        trained = part_of(name) in parts
        if trained and not parameter.is_floating_point():
            raise ValueError(
                f"{name} holds quantised weights ({parameter.dtype}), which cannot train: leave {part_of(name)} out "
                "of the quantisation (llm_int8_skip_modules) or train adapters on it"
            )
        if trained and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(trained)


def part_table(model: nn.Module, learning_rates: dict[str, float]) -> Table:
    """Return a table of one row a part and a total: what trains, in which precision, at which learning rate.

    A tied `lm_head` is counted once, a 4-bit tensor by the weights that it stands for, not by the bytes it takes.

    Args:
        model: any Llava class, bare or wrapped.
        learning_rates: peak learning rate of every part that has a trainable parameter.
    """
    # Fits into the 80 columns that rich assumes of a log file.
    table = Table(title="Parts of the model", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("part", no_wrap=True)
    for column in ("parameters", "trainable", "dtype", "quantised", "adapters", "learning\nrate"):
        table.add_column(column, justify="right", no_wrap=column != "dtype")

    tuner_layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    totals = [0, 0, 0]
    for part in PARTS:
        parameters = [parameter for name, parameter in model.named_parameters() if part_of(name) == part]
        count = sum(_count(parameter) for parameter in parameters)
        trainable = sum(_count(parameter) for parameter in parameters if parameter.requires_grad)
        adapters = sum(part_of(name) == part for name in tuner_layers)
        table.add_row(
            part,
            _shorten(count),
            _shorten(trainable),
            ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
            _quantisation(parameters),
            str(adapters),
            f"{learning_rates[part]:g}" if trainable else "-",
        )
        totals = [total + more for total, more in zip(totals, (count, trainable, adapters), strict=True)]
    count, trainable, adapters = totals
    table.add_section()
    table.add_row("total", _shorten(count), _shorten(trainable), "", "", str(adapters), "")
    table.caption = f"{trainable / count:.2%} of the parameters train"
    return table


def _check_parts(parts: Iterable[str]) -> set[str]:
    unknown = sorted(set(parts := list(parts)) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part {', '.join(map(repr, unknown))}: expected some of {', '.join(PARTS)}")
    return set(parts)


def _count(parameter: nn.Parameter) -> int:
    if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
        return parameter.quant_state.shape.numel()
    return parameter.numel()


def _shorten(count: int) -> str:
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.3f} B"


def _quantisation(parameters: list[nn.Parameter]) -> str:
    kinds = {"4-bit": Params4bit, "8-bit": Int8Params}
    found = [name for name, kind in kinds.items() if any(isinstance(parameter, kind) for parameter in parameters)]
    return ", ".join(found) or "no"
