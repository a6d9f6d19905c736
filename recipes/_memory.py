"""Predict the peak memory of a training run from its model and its arguments, before any step.

Parameters, gradients and optimizer state are counted tensor by tensor. Activations are a formula over the sizes of the
layers at hand (docs/memory.md has it in words), held in the tests against the bytes that live during real steps on a
CPU and during steps of fake tensors at the size of a 7B model. No figure has been compared with a GPU's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from rich import box
from rich.table import Table
from torch import nn
from transformers import TrainingArguments
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer import utils as trl_utils

from _parts import find_part, numel

GIB = 2**30
Sharding = Literal["none", "ddp", "fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_offload"]

# What no tensor of a run accounts for: the CUDA context with its libraries, and what the caching allocator cannot hand
# out again. Rules of thumb, not measurements.
CONTEXT = 1 * GIB
FRAGMENTATION = 0.05

# Copies of a parameter's size that an optimizer keeps, by transformers' name for it; bitsandbytes' in 8 or 32 bits.
TORCH_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1}
BNB_MOMENTS = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), 1),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), 3),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), 1),
}
BNB_MIN_8BIT, BNB_BLOCK, BNB_CODE = 4096, 256, 256 * 4  # elements, elements, bytes of one quantisation map
NF4_CODE = 16 * 4
ZERO_BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size

# Linear layers that read the same tensor, so that autograd keeps it once; the attention's output is counted with it.
SHARED_INPUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1"), "mlp"),
    **dict.fromkeys(("down_proj", "fc2"), "product"),
    **dict.fromkeys(("o_proj", "out_proj"), None),
}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device at the peak of a step, by what they hold.

    Attributes:
        parameters: The weights as they lie, quantisation state included.
        gradients: Of what trains.
        optimizer: Its state; None if the optimizer is not one that is known here.
        activations: The most that forward and backward pass keep besides; see `predict_memory`.
        communication: Copies that sharding gathers and DDP's buckets.
        host: Bytes of one process that offloading puts into host memory instead of the device.
        paged: Whether the driver can move optimizer state to the host when the device is full.
    """

    parameters: int
    gradients: int
    optimizer: int | None
    activations: int
    communication: int = 0
    host: int = 0
    paged: bool = False

    @property
    def allowance(self) -> int:
        """For the CUDA context and fragmentation: 1 GiB and 5 % of the rest. A rule of thumb."""
        tensors = self.parameters + self.gradients + (self.optimizer or 0) + self.activations + self.communication
        return CONTEXT + int(FRAGMENTATION * tensors)

    @property
    def total(self) -> int | None:
        """Bytes of the device, allowance included; None if the optimizer's state is unknown."""
        if self.optimizer is None:
            return None
        tensors = self.parameters + self.gradients + self.optimizer + self.activations + self.communication
        return tensors + self.allowance

    def table(self) -> Table:
        """One row an item, in GiB."""
        table = Table(
            title="Predicted memory of one device", box=box.SIMPLE_HEAD, show_edge=False, padding=0, min_width=38
        )
        table.add_column("item", no_wrap=True)
        table.add_column("GiB", justify="right", no_wrap=True)
        for item in ("parameters", "gradients", "optimizer", "activations", "communication", "allowance"):
            table.add_row(item, _gib(getattr(self, item)))
        table.add_section()
        table.add_row("total", _gib(self.total))
        if self.host:
            table.add_row("host memory, a process", _gib(self.host))
        spill = "; paged: optimizer state can move to the host" if self.paged else ""
        table.caption = f"arithmetic, not compared with a GPU{spill}"
        return table


def predict_memory(
    model: nn.Module,
    args: TrainingArguments,
    *,
    batch_size: int,
    tokens: int,
    pictures: int,
    sharding: Sharding = "none",
    world_size: int = 1,
) -> MemoryPlan:
    """Predict the peak memory of one device. Reads shapes and dtypes only, so a model on the meta device will do.

    The peak of a step is taken to be parameters + gradients + optimizer state + activations, where activations are the
    largest of three moments: the end of the forward pass (all that autograd keeps, autocast's cached half-precision
    weights, the tower's hidden states), the backward pass of the language-model head, and the backward pass of one
    decoder layer (under gradient checkpointing its recomputed tensors besides the inputs of all). With gradient
    accumulation all four lie there together; without, gradients come while activations go, and the sum is too high
    by up to one set of gradients. The head's share supposes that every position is trained, which is too high too.

    Args:
        model: Any Llava class as it will train: frozen, wrapped by PEFT, quantised. A `Params4bit` that is not yet
            quantised counts as it will be (NF4 or FP4, blocks of 64).
        args: Optimizer, precision and gradient checkpointing are read from it.
        batch_size: Rows of one device's batch.
        tokens: Tokens of each row, image tokens included: the longest batch.
        pictures: Pictures of one device's batch; for LlavaNext their tiles.
        sharding: How several processes share the model. DeepSpeed is taken to train in bfloat16 with float32 master
            weights if `args.bf16` is set.
        world_size: Processes.

    Raises:
        ValueError: An unknown `sharding`, `sharding` "none" with several processes, 4-bit weights where parameters
            are sharded, or decoder layers of unknown build.
    """
    if sharding not in get_args(Sharding):
        raise ValueError(f"sharding {sharding!r}: expected one of {', '.join(get_args(Sharding))}")
    if sharding == "none" and world_size > 1:
        raise ValueError(
            f"sharding 'none' with {world_size} processes: expected 'ddp' or how else they share the model"
        )
    shards = sharding.startswith(("fsdp2", "zero3"))
    parameters = list(model.parameters())
    if shards and any(isinstance(parameter, Params4bit) for parameter in parameters):
        raise ValueError(f"sharding {sharding!r} of 4-bit weights is not known here: expected none, ddp or zero2")

    half = sharding not in ("none", "ddp") and (args.bf16 or args.fp16)
    deepspeed_half = half and sharding.startswith("zero")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = sum(_bytes(parameter) for parameter in parameters)
    gradients = sum(numel(parameter) * parameter.element_size() for parameter in trained)
    optimizer = _optimizer_bytes(model, trained, args)
    communication = host = 0

    if deepspeed_half:
        # The engine holds every weight in 16 bits; float32 master copies of what trains lie with the optimizer.
        weights = sum(_bytes(p) if isinstance(p, Params4bit) else numel(p) * 2 for p in parameters)
        gradients = sum(numel(parameter) for parameter in trained) * 2
        optimizer = None if optimizer is None else optimizer + sum(numel(parameter) for parameter in trained) * 4
    if sharding == "ddp":
        communication = gradients  # buckets of all gradients, beside `parameter.grad`
    if shards:
        communication = _gathered_bytes(model, 2 if half else None)
        weights = ceil(weights / world_size)
    if sharding not in ("none", "ddp"):
        gradients = ceil(gradients / world_size)
        optimizer = None if optimizer is None else ceil(optimizer / world_size)
    if sharding == "zero2":
        communication = min(ZERO_BUCKET, sum(numel(parameter) for parameter in trained)) * (2 if half else 4)
    if sharding.endswith("offload"):
        host = weights + gradients + (optimizer or 0)
        weights, gradients, optimizer = 0, 0, None if optimizer is None else 0

    moments = _moments(model, args, batch_size, tokens, pictures, half)
    return MemoryPlan(
        parameters=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(moments.forward, moments.head, moments.layer),
        communication=communication,
        host=host,
        paged="paged" in args.optim,
    )


def quantise_on_paper(model: nn.Module) -> None:
    """Put a not yet quantised NF4 layer under each adapter of a model on the meta device, for `predict_memory`."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            module.base_layer = Linear4bit(
                base.in_features, base.out_features, bias=base.bias is not None, quant_type="nf4", device="meta"
            ).requires_grad_(False)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f}"


def _bytes(parameter: nn.Parameter) -> int:
    """A parameter's bytes; of a 4-bit one with its quantisation state, or as it will be once it is quantised."""
    if not isinstance(parameter, Params4bit):
        return numel(parameter) * parameter.element_size()
    state = parameter.quant_state
    if state is not None:
        tensors = [parameter.data, state.absmax, state.code]
        tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    blocks = ceil(parameter.numel() / parameter.blocksize)
    absmax = blocks + ceil(blocks / BNB_BLOCK) * 4 + 4 + BNB_CODE if parameter.compress_statistics else blocks * 4
    return ceil(parameter.numel() / 2) + absmax + NF4_CODE


def _optimizer_bytes(model: nn.Module, trained: list[nn.Parameter], args: TrainingArguments) -> int | None:
    name = str(getattr(args.optim, "value", args.optim))
    if name in TORCH_MOMENTS and not args.optim_args:
        # Moments in the parameter's own dtype, and a float32 step a tensor.
        return sum(TORCH_MOMENTS[name] * numel(p) * p.element_size() + 4 for p in trained)
    if name == "sgd" and not args.optim_args:
        return 0
    if name == "adafactor":
        # Rows and columns of a matrix in float32, all of a vector; the tensor's root mean square.
        return 4 * sum(
            (numel(p) if p.dim() < 2 else numel(p) // p.shape[-1] + numel(p) // p.shape[-2]) + 1 for p in trained
        )
    if name not in BNB_MOMENTS:
        return None
    moments, total, maps = BNB_MOMENTS[name], 0, 0
    # Trainer keeps embeddings in 32 bits; bitsandbytes itself tensors of fewer than 4096 elements.
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for p in trained:
        if "8bit" in name and numel(p) >= BNB_MIN_8BIT and id(p) not in embeddings:
            total += moments * (numel(p) + 4 * ceil(numel(p) / BNB_BLOCK))
            maps = min(moments, 2) * BNB_CODE  # one pair for all tensors
        else:
            total += moments * 4 * numel(p)
    return total + maps


def _gathered_bytes(model: nn.Module, element_size: int | None) -> int:
    """What lies unsharded at once: all outside of the layers (FSDP2 keeps it gathered) and the two largest layers."""
    layers = [*_layers(find_part(model, "language_model")), *_layers(find_part(model, "vision_tower"))]

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(numel(p) * (element_size or p.element_size()) for p in parameters)

    inside = [size(layer.parameters()) for layer in layers]
    return size(model.parameters()) - sum(inside) + sum(sorted(inside)[-2:])


def _layers(part: nn.Module) -> list[nn.Module]:
    """The decoder or encoder layers of a part: its longest list of modules."""
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"{type(part).__name__} has no list of layers: expected a decoder or encoder of transformers")
    return list(max(lists, key=len))


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each linear layer, one with an adapter as the adapter's module."""
    for name, child in module.named_children():
        if isinstance(child, (LoraLayer, nn.Linear)):
            yield name, child
        else:
            yield from _linears(child)


@dataclass(frozen=True)
class _Layer:
    saved: int  # bytes that autograd keeps of one layer
    casts: int  # bytes of half-precision copies of its float32 weights that train, which autocast caches
    transient: int  # bytes that its backward pass needs besides


@dataclass(frozen=True)
class _Precision:
    residual: int  # bytes an element of the hidden states between layers
    compute: int  # bytes an element of what linear layers and attention return
    autocast: bool


def _layer_bytes(
    layer: nn.Module, config, precision: _Precision, tokens: int, attended: int, padded: bool, on_cpu: bool
) -> _Layer:
    """What one layer keeps for its backward pass, term by term in bytes a token.

    Args:
        layer: A decoder layer of the Llama kind or an encoder layer of the CLIP kind.
        config: Its text or vision config.
        precision: Bytes an element.
        tokens: Of the whole batch.
        attended: Tokens of one row.
        padded: Whether attention needs a mask: rows of several lengths.
        on_cpu: Whether the run is on a CPU, whose dropout masks are of the adapter's dtype (torch 2.13).
    """
    if missing := [name for name in ("intermediate_size", "num_attention_heads") if not hasattr(config, name)]:
        raise ValueError(f"{type(config).__name__} has no {missing[0]}: expected layers of the Llama or CLIP kind")
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = config._attn_implementation
    full, half = precision.residual, precision.compute
    norms = [module for name, module in layer.named_modules() if "norm" in name]

    # A norm keeps its input in float32 and, for the gradient of its own weight, its output.
    a_token = sum(4 * hidden + (full * hidden if module.weight.requires_grad else 0) for module in norms)
    if attention != "flash_attention_2" and padded:
        kv_heads = heads  # repeated: a masked call has no grouped kernel
    a_token += half * head_dim * (2 * heads + 2 * kv_heads) + 4 * heads  # query, output, key, value, log-sum-exp
    if attention == "eager":
        a_token += heads * attended * (4 + (half if half != 4 else 0))  # the softmax, and its cast
    elif attention == "sdpa" and padded:
        a_token += attended * half  # the boolean mask as a bias, made anew in every layer
    a_token += 3 * inner * half  # the activation's input and output, and what it is multiplied with

    constant = casts = largest = replica = 0
    shared, adapted = set(), False
    for name, module in _linears(layer):
        if name not in SHARED_INPUT:
            raise ValueError(f"{type(layer).__name__} has a linear layer {name}: expected {', '.join(SHARED_INPUT)}")
        weight = module.get_base_layer().weight if isinstance(module, LoraLayer) else module.weight
        parameters = [p for p in module.parameters() if p.dim() == 2 and not isinstance(p, Params4bit)]
        if precision.autocast:
            constant += sum(2 * numel(p) for p in parameters if p.dtype == torch.float32)
            casts += sum(2 * numel(p) for p in parameters if p.dtype == torch.float32 and p.requires_grad)
        if isinstance(weight, Params4bit):
            replica = max(replica, numel(weight) * half)  # dequantised for each product
        own_copy = precision.autocast and full != half
        if isinstance(module, LoraLayer):
            adapted = True
            adapter = module.active_adapters[0]
            rank, dropout = module.r[adapter], getattr(module.lora_dropout[adapter], "p", 0)
            a_token += rank * half
            own_copy = precision.autocast or dropout > 0
            if dropout:
                a_token += module.in_features * (module.lora_A[adapter].weight.element_size() if on_cpu else 1)
            if adapter in module.lora_magnitude_vector:
                a_token += 2 * module.out_features * half  # what magnitudes multiply: base and adapter output
                # An identity matrix through A and B, and four copies of the weight, to take a norm of (peft 0.21).
                square, matrix = module.in_features**2, module.in_features * module.out_features
                replica = max(replica, square * (6 if precision.autocast else half) + 6 * matrix)
        elif not weight.requires_grad:
            continue
        else:
            largest = max(largest, numel(weight))
        if own_copy and not (SHARED_INPUT[name] in (None, "product") and not isinstance(module, LoraLayer)):
            a_token += module.in_features * half
        elif SHARED_INPUT[name] is not None and SHARED_INPUT[name] not in shared:
            shared.add(SHARED_INPUT[name])
            a_token += module.in_features * half

    converts = adapted and precision.autocast  # an adapter's input passes through float32
    wide = 2 * half + 4 if converts else 3 * half
    transient = tokens * hidden * full * (3 if converts else 1)
    needed = max(tokens * inner * wide, tokens * inner * half + 4 * largest)
    if attention == "eager":  # two gradients of the softmax's size, by when the MLP's tensors are gone
        needed = max(needed, tokens * (8 * heads * attended - 4 * inner * half))
    transient += needed + replica
    return _Layer(saved=tokens * a_token + constant, casts=casts, transient=transient)


@dataclass(frozen=True)
class _Moments:
    kept: int  # bytes that autograd keeps after the forward pass
    forward: int  # and what lives besides at its end
    head: int  # the backward pass of the head
    layer: int  # the backward pass of one layer


def _moments(
    model: nn.Module, args: TrainingArguments, batch_size: int, tokens: int, pictures: int, half: bool = False
) -> _Moments:
    """The moments that `predict_memory` names, in bytes; `half`: weights come in 16 bits, not by autocast."""
    text, tower = find_part(model, "language_model"), find_part(model, "vision_tower")
    projector = find_part(model, "multi_modal_projector")
    autocast = (args.bf16 or args.fp16) and not half

    def precision(module: nn.Module) -> _Precision:
        residual = 2 if half else next(module.parameters()).element_size()
        return _Precision(residual, 2 if autocast else residual, autocast)

    inside = precision(text)
    rows, hidden = batch_size * tokens, text.config.hidden_size
    on_cpu = args.device.type == "cpu" and next(text.parameters()).device.type == "cpu"
    layers = [_layer_bytes(m, text.config, inside, rows, tokens, batch_size > 1, on_cpu) for m in _layers(text)]
    stored = rows * hidden * inside.residual * len(layers)
    if not args.gradient_checkpointing:
        stored = sum(layer.saved for layer in layers)
    cached = sum(layer.casts for layer in layers) if args.gradient_checkpointing else 0
    if text.config._attn_implementation == "eager":
        stored += rows * tokens * inside.residual  # one mask for all layers
    elif text.config._attn_implementation == "sdpa" and batch_size > 1:
        stored += rows * tokens

    vision, seen = precision(tower), pictures * _tower_tokens(tower.config)
    features = seen * tower.config.hidden_size * vision.residual * (len(_layers(tower)) + 1)
    features += pictures * tower.config.num_channels * tower.config.image_size**2 * 4
    if any(parameter.requires_grad for parameter in tower.parameters()):
        seeing = [
            _layer_bytes(m, tower.config, vision, seen, _tower_tokens(tower.config), False, on_cpu)
            for m in _layers(tower)
        ]
        if args.gradient_checkpointing:
            stored += seen * tower.config.hidden_size * vision.residual * len(seeing)
            cached += sum(layer.casts for layer in seeing)
        else:
            stored += sum(layer.saved for layer in seeing)
        layers += seeing
    if any(parameter.requires_grad for parameter in projector.parameters()):
        linears = [module for _, module in _linears(projector)]
        # The input of each layer, and the activation's.
        widths = sum(module.in_features for module in linears) + linears[0].out_features
        stored += seen * widths * inside.compute
        cached += sum(2 * m.in_features * m.out_features for m in linears) if autocast else 0

    head = model.get_output_embeddings().weight
    cast = min(head.shape[0], trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE) * hidden * inside.compute
    tile = min(rows, TOKEN_CHUNK_SIZE) * trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE * inside.compute
    tile += cast if head.element_size() != inside.compute else 0
    head_saved = rows * hidden * (4 + (2 if text.norm.weight.requires_grad else 1) * inside.residual)
    head_backward = rows * hidden * (4 + (inside.residual if inside.residual != 4 else 0))
    if head.requires_grad:
        head_backward += numel(head) * (4 + (head.element_size() if head.element_size() != 4 else 0))

    recomputed = max(layer.saved for layer in layers) if args.gradient_checkpointing else 0
    return _Moments(
        kept=stored + head_saved,
        forward=stored + head_saved + cached + features + tile,
        head=stored + head_saved + tile + head_backward,
        layer=stored + recomputed + max(layer.transient for layer in layers),
    )


def _tower_tokens(config) -> int:
    return (config.image_size // config.patch_size) ** 2 + 1
