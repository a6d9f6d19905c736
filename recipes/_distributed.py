"""More than one process: what FSDP2 and ZeRO need from a LLaVA, and what cannot work is refused.

Which launch file to take, and what each of them shards: docs/multi_gpu.md.
"""

import os
import types
from contextlib import nullcontext
from dataclasses import replace

import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from _parts import UNSHARDED, find_part, part_of


def prepare_for_processes(trainer) -> None:
    """Make a built `LlavaTrainer` ready for the launcher at hand; one plain process needs (almost) nothing.

    Raises:
        ValueError: The launcher cannot train this model: see `check_launcher`.
    """
    check_launcher(trainer)
    model = trainer.model
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        # Theirs wins: --fsdp_transformer_layer_cls_to_wrap, FSDP_TRANSFORMER_CLS_TO_WRAP or the launch file.
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = layer_classes(model)
        # accelerate 1.15 reduces gradients in bfloat16 and rounds what the model returns to it, the loss included.
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
        model.register_forward_pre_hook(_gather_output_head)
    if _is_zero3(trainer):
        _save_under_hub_names(model)
        if trainer.args.bf16:
            # ZeRO-3 computes in bfloat16 without autocast, and leaves adapters that are float32 as they are (0.19.8,
            # deepspeedai/DeepSpeed#8072). Its optimizer holds float32 masters of its own.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded or not _trains(model, "language_model"):
        show_a_blank_picture(model, trainer.processing_class)


def check_launcher(trainer) -> None:
    """Refuse what would hang, fail later with another message, or train otherwise than it was told to.

    Raises:
        ValueError: FSDP was asked for on the CPU, where accelerate would train with DDP in silence; FSDP version 1; or
            the model is quantised and the launcher shards weights.
    """
    # AcceleratorState makes the switch to FSDP for GPUs and their kin alone (accelerate 1.15, state.py).
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise ValueError(
            "FSDP was asked for, but accelerate shards nothing on the CPU and would train with DDP instead: take "
            "accelerate_configs/cpu_2proc.yaml"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is neither made ready nor tested here: set fsdp_version: 2")
    # A base that is quantised on disk; any other is refused before it is loaded.
    if getattr(trainer.model, "is_quantized", False) and (trainer.is_fsdp_enabled or _is_zero3(trainer)):
        raise ValueError(UNSHARDED.format("FSDP" if trainer.is_fsdp_enabled else "ZeRO-3"))


def layer_classes(model: nn.Module) -> list[str]:
    """Name the layer classes of the language model and of the vision tower, for FSDP to wrap.

    Taken from the module tree: `_no_split_modules` of every Llava class names classes that are not in the model
    ("Could not find the transformer layer class CLIPTextEmbeddings", transformers 5.23).

    Returns:
        For example `["CLIPEncoderLayer", "LlamaDecoderLayer"]`.
    """
    names = set()
    for part in ("language_model", "vision_tower"):
        stacks = (module for module in find_part(model, part).modules() if isinstance(module, nn.ModuleList))
        names |= {type(layer).__name__ for layer in next(stacks)}  # the outermost: experts are stacked within layers
    return sorted(names)


def show_a_blank_picture(model: nn.Module, processor) -> None:
    """Let a batch without pictures run through vision tower and projector as every other does, at a weight of zero.

    Processes that shard a model must call its modules in the same order, and their backward passes must meet the same
    parameters. A text-only batch on one of them calls no tower, and FSDP, ZeRO-2 and ZeRO-3 hang or die
    (huggingface/transformers#37186, deepspeedai/DeepSpeed#7170, 2U1/Qwen-VL-Series-Finetune#57,
    hiyouga/LlamaFactory#5616). Where the projector alone trains, such a batch has no gradient at all. One blank
    picture cures both and adds no token. It is shown inside the model's own forward, since ZeRO-3 traces the order
    of the modules from there. Delete once the Llava classes in transformers do so themselves.

    Args:
        model: any Llava class, bare or inside a PEFT wrapper; changed in place.
        processor: its processor, which prepares the picture.
    """
    blank = dict(processor.image_processor(Image.new("RGB", (32, 32)), return_tensors="pt"))

    def forward(self, input_ids=None, pixel_values=None, inputs_embeds=None, **kwargs):
        if pixel_values is None and inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            picture = {name: value.to(inputs_embeds.device) for name, value in blank.items()}
            picture["pixel_values"] = picture["pixel_values"].to(inputs_embeds.dtype)
            layer = self.config.vision_feature_layer  # VipLlava's method has no default of its own
            features = self.get_image_features(**picture, vision_feature_layer=layer).pooler_output
            weightless = 0.0 * sum(feature.mean() for feature in features)
            inputs_embeds = inputs_embeds + weightless.to(inputs_embeds.dtype)
            input_ids = None
        return type(self).forward(
            self, input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs
        )

    inner = _inner_model(model)
    inner.forward = types.MethodType(forward, inner)


def whole_tensors(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copy parameters to the CPU, those that FSDP2 or ZeRO-3 keeps in slices put together: every process must call it.

    Args:
        parameters: live ones by any name.
    """
    sliced = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    gather = nullcontext()
    if sliced:
        import deepspeed  # needed, and so installed, by ZeRO alone

        gather = deepspeed.zero.GatheredParameters(sliced)
    with gather:
        tensors = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _inner_model(model: nn.Module) -> nn.Module:
    """The module that owns tower, projector and language model: `LlavaModel` and its relatives."""
    for module in model.modules():
        if hasattr(module, "get_image_features") and "language_model" in dict(module.named_children()):
            return module
    raise ValueError(f"{type(model).__name__} has no part that joins pictures and text: is this a Llava model?")


def _gather_output_head(model: nn.Module, args) -> None:
    """Gather `lm_head` before TRL's fused head reads its weight outside of the head's own forward.

    accelerate puts the head into one group with the final norm, whose forward gathers both; but it looks for that
    norm beside `language_model`, not inside it (accelerate 1.15, `_find_final_norm`). TRL then calls `full_tensor()`
    on the weight (trl 1.16, `add_fused_lm_head`), whose backward keeps of each process's gradient the slice that is
    its own, instead of the sum over the processes.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


def sharding_of(trainer) -> str:
    """How the processes share the model, in the words of `_memory.predict_memory`."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        return "fsdp2_offload" if state.fsdp_plugin.cpu_offload else "fsdp2"
    if trainer.is_deepspeed_enabled:
        config = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        offloads = config.get("offload_param", {}).get("device", "none") != "none"
        return f"zero{config['stage']}{'_offload' if offloads else ''}"
    return "ddp" if trainer.args.world_size > 1 else "none"


def _is_zero3(trainer) -> bool:
    return trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3


def _save_under_hub_names(model: nn.Module) -> None:
    """Forget the key renamings that loading did not use, so that saving does not undo them.

    `from_pretrained` keeps those it used, but under ZeRO-3 all that it knows: a saved Llava then has
    `language_model.model.model.layers…` (transformers 5.23, integrations/deepspeed.py), which transformers
    reads, but which are not the hub's names.
    """
    for module in model.modules():
        if getattr(module, "_weight_conversions", None):
            module._weight_conversions = [entry for entry in module._weight_conversions if entry.was_used()]


def _trains(model: nn.Module, part: str) -> bool:
    return any(p.requires_grad and part_of(name) == part for name, p in model.named_parameters())
