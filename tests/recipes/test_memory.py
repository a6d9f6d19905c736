"""The predicted memory against what lives: in real steps on the CPU, and in fake tensors of a 7B model's size."""

import json
import runpy
import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.optim import GlobalOptimManager
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

import tiny
from _memory import GIB, MemoryPlan, _bytes, _moments, predict_memory
from _parts import UNQUANTISED, add_adapters, train_only
from _trainer import LlavaSFTConfig, LlavaTrainer
from collators import LlavaDataCollator, chat_template_path, load_rows

ROOT = Path(__file__).parent.parent.parent
QUANTISED = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def make_processor():
    processor = tiny.make_processor(chat_template_path("vicuna_v1").read_text())
    processor.image_processor.size = {"shortest_edge": 112}
    processor.image_processor.crop_size = {"height": 112, "width": 112}
    return processor


def make_model(processor, recipe, folder, dtype=torch.float32, attention="sdpa", layers=8):
    """Large enough for the terms of the formula to show: hidden size 256, 8 layers, 196 image tokens a picture."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=layers,
            num_attention_heads=8,
            max_position_embeddings=4096,
            pad_token_id=3,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=112,
            patch_size=8,
        ),
        image_token_index=processor.image_token_id,
        image_seq_length=196,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(dtype)
    if recipe.startswith("Q"):
        model.save_pretrained(folder)
        quantisation = BitsAndBytesConfig(
            **QUANTISED, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(UNQUANTISED)
        )
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, quantization_config=quantisation)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model


def adapt(model, recipe="LoRA", dropout=0.0):
    return add_adapters(model, LoraConfig(r=16, lora_dropout=dropout, use_dora="DoRA" in recipe))


PARTS = {
    "projector": ["multi_modal_projector"],
    "full": ["multi_modal_projector", "language_model"],
    "tower": ["multi_modal_projector", "language_model", "vision_tower"],
}


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in old and storage._cdata not in self.storages:
                    self.storages[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return outputs

    def forget(self, key):
        self.now -= self.storages.pop(key)


class MeteredTrainer(LlavaTrainer):
    """The real trainer; its last micro-batch, which finds all gradients in place, is metered."""

    kept = peak = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.kept = self.meter.now
        return loss

    def training_step(self, *args, **kwargs):
        with Live() as self.meter:
            loss = super().training_step(*args, **kwargs)
        self.peak = self.meter.peak
        return loss


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    tiny.picture().save(folder / "a.png")
    ask = {"from": "human", "value": "<image>\n" + "a" * 20}
    talks = [
        {"id": i, "image": "a.png", "conversations": [ask, {"from": "gpt", "value": "b" * (300 + 5 * (i % 2))}]}
        for i in range(8)
    ]
    (folder / "rows.json").write_text(json.dumps(talks))
    return load_rows(str(folder / "rows.json"))


def train(
    recipe, rows, folder, dtype=torch.float32, dropout=0.0, attention="sdpa", layers=8, kind=MeteredTrainer, **flags
):
    processor = make_processor()
    model = make_model(processor, recipe, folder / "base", dtype, attention, layers)
    if recipe in PARTS:
        train_only(model, PARTS[recipe])
    else:
        model = adapt(model, recipe, dropout)
    flags = {"optim": "adamw_torch", "bf16": False, "gradient_accumulation_steps": 2, "max_steps": 2} | flags
    args = LlavaSFTConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        per_device_train_batch_size=2,
        report_to="none",
        max_length=4096,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **flags,
    )
    trainer = kind(
        model=model,
        args=args,
        processing_class=processor,
        data_collator=LlavaDataCollator(processor, max_length=4096),
        train_dataset=rows,
    )
    trainer.train()
    batch = trainer.data_collator([rows[0], rows[1]])
    trainer.sizes = dict(batch_size=2, tokens=batch["input_ids"].shape[1], pictures=2)
    return trainer


def storages(tensors) -> int:
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def live_parameters(model) -> int:
    """Bytes of all parameters and of what bitsandbytes keeps with them, each storage once."""
    total = 0
    for parameter in model.parameters():
        tensors = [parameter.data]
        if isinstance(parameter, Params4bit):
            state = parameter.quant_state
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        total += storages(tensors)
    return total


# What is counted


@pytest.mark.parametrize(
    ("recipe", "optim"),
    [
        ("projector", "adamw_torch"),
        ("full", "adamw_torch"),
        ("full", "adamw_torch_fused"),
        ("full", "adamw_bnb_8bit"),
        ("full", "paged_adamw_32bit"),
        ("full", "paged_adamw_8bit"),
        ("full", "lion_8bit"),
        ("full", "ademamix_8bit"),
        ("full", "adafactor"),
        ("full", "sgd"),
        ("full", "rmsprop"),
        ("full", "adagrad"),
        ("LoRA", "paged_adamw_8bit"),
        ("DoRA", "adamw_torch"),
        ("QLoRA", "paged_adamw_8bit"),
        ("QDoRA", "adamw_torch"),
    ],
)
def test_weights_gradients_and_optimizer_are_those_of_two_real_steps(recipe, optim, rows, tmp_path, monkeypatch):
    # One manager a process remembers an optimizer's 32-bit embeddings by position and id, and misleads the next one.
    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    trainer = train(recipe, rows, tmp_path, layers=2, kind=LlavaTrainer, optim=optim, gradient_accumulation_steps=1)
    plan = predict_memory(trainer.model, trainer.args, **trainer.sizes)
    assert plan.parameters == live_parameters(trainer.model)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.compute_loss(trainer.model, trainer.data_collator([rows[0], rows[1]])).backward()
    assert plan.gradients == storages(parameter.grad for parameter in trained)
    states = trainer.optimizer.state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    assert plan.optimizer == storages(tensors)
    assert plan.paged == ("paged" in optim)


@pytest.mark.parametrize("double", [False, True])
def test_a_4bit_weight_counts_before_it_is_quantised_as_it_does_after(double):
    """How the meta device can tell of a model that bitsandbytes has not touched."""
    for inputs, outputs in ((256, 688), (200, 30)):
        options = dict(bias=False, quant_type="nf4", compress_statistics=double)
        before = Linear4bit(inputs, outputs, device="meta", **options).weight
        after = Linear4bit(inputs, outputs, **options).to("cpu").weight
        assert before.quant_state is None and after.dtype == torch.uint8
        assert _bytes(before) == _bytes(after)
    # 6000 weights: 3000 bytes, 94 blocks of 64, the 16 values of NF4; doubly quantised blocks take a byte, a block
    # of them 4 bytes, their offset 4 and their map 1024.
    assert _bytes(before) == 3000 + 64 + (94 + 4 + 4 + 1024 if double else 94 * 4)


def predict(model, sharding="none", world_size=1, tokens=600, batch_size=2, **flags):
    args = LlavaSFTConfig(use_cpu=True, **{"optim": "adamw_torch"} | flags)
    return predict_memory(
        model,
        args,
        batch_size=batch_size,
        tokens=tokens,
        pictures=batch_size,
        sharding=sharding,
        world_size=world_size,
    )


@pytest.mark.parametrize("kind", ["llava", "vipllava", "llava_next"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_every_class_bare_and_wrapped_on_the_meta_device_too(kind, text):
    model = tiny.make_model(tiny.make_processor(), kind, text)
    train_only(model, PARTS["full"])
    assert predict(model) == predict(model.to("meta"))
    model = adapt(tiny.make_model(tiny.make_processor(), kind, text))
    assert predict(model) == predict(model.to("meta"))


def test_tied_weights_count_once_and_originals_of_modules_to_save_too():
    model = tiny.make_model(tiny.make_processor())
    train_only(model, PARTS["full"])
    plan = predict(model)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    assert plan.parameters - predict(model).parameters == model.lm_head.weight.numel() * 4
    wrapped = adapt(tiny.make_model(tiny.make_processor()))
    projector = 2 * (32 * 32 + 32) * 4
    lora = 2 * (4 * 16 * 32 + 2 * 16 * 32 + 2 * 16 * 16 + 3 * 16 * (32 + 64)) * 4
    assert predict(wrapped).parameters == plan.parameters + projector + lora
    assert predict(wrapped).gradients == projector + lora


def test_an_unknown_optimizer_is_unknown():
    plan = predict(tiny.make_model(tiny.make_processor()), optim="lomo")
    assert plan.optimizer is None and plan.total is None
    table = plan.table()
    assert list(table.columns[1].cells)[2] == list(table.columns[1].cells)[-1] == "unknown"
    assert predict(tiny.make_model(tiny.make_processor()), optim="sgd", optim_args="momentum=0.9").optimizer is None


def test_the_sum_and_the_table():
    plan = MemoryPlan(2 * GIB, GIB, 2 * GIB, 4 * GIB, GIB, host=3 * GIB, paged=True)
    assert plan.allowance == GIB + GIB // 2
    assert plan.total == 10 * GIB + plan.allowance
    table = plan.table()
    assert list(table.columns[1].cells) == ["2.00", "1.00", "2.00", "4.00", "1.00", "1.50", "11.50", "3.00"]
    assert table.caption == "arithmetic, not compared with a GPU; paged: optimizer state can move to the host"


# Several processes


def test_shares_of_two_processes():
    model = tiny.make_model(tiny.make_processor())
    train_only(model, PARTS["full"])
    alone = predict(model, bf16=False)
    numel = sum(parameter.numel() for parameter in model.parameters())
    trained = alone.gradients // 4
    steps = 4 * sum(parameter.requires_grad for parameter in model.parameters())
    assert (alone.parameters, alone.optimizer) == (numel * 4, trained * 8 + steps)

    ddp = predict(model, "ddp", 2, bf16=False)
    assert (ddp.parameters, ddp.gradients, ddp.optimizer) == (alone.parameters, alone.gradients, alone.optimizer)
    assert ddp.communication == alone.gradients

    layer = sum(parameter.numel() for parameter in model.model.language_model.layers[0].parameters())
    seen = sum(parameter.numel() for parameter in model.model.vision_tower.encoder.layers[0].parameters())
    largest = sum(sorted([layer, layer, seen, seen, seen])[-2:])
    outside = numel - 2 * layer - 3 * seen
    for sharding, size in (("fsdp2", 4), ("zero3", 4)):
        plan = predict(model, sharding, 2, bf16=False)
        assert (plan.parameters, plan.gradients) == (numel * 4 // 2, trained * 4 // 2)
        assert (plan.optimizer, plan.host) == (alone.optimizer // 2, 0)
        assert plan.communication == (outside + largest) * size
        offload = predict(model, f"{sharding}_offload", 2, bf16=False)
        assert (offload.parameters, offload.gradients, offload.optimizer) == (0, 0, 0)
        assert offload.host == plan.parameters + plan.gradients + plan.optimizer
        assert offload.communication == plan.communication

    # DeepSpeed's bfloat16 engine: 16-bit weights and gradients, float32 masters and moments in shares.
    zero2 = predict(model, "zero2", 2)
    assert (zero2.parameters, zero2.gradients) == (numel * 2, trained)
    assert zero2.optimizer == (trained * 12 + steps) // 2
    assert predict(model, "zero3", 2).parameters == numel
    assert predict(model, "fsdp2", 2).communication == (outside + largest) * 2


def test_errors():
    model = tiny.make_model(tiny.make_processor())
    with pytest.raises(ValueError, match="sharding 'fsdp': expected one of none, ddp, fsdp2, fsdp2_offload, zero2"):
        predict(model, "fsdp", 2)
    with pytest.raises(ValueError, match="sharding 'none' with 2 processes: expected 'ddp'"):
        predict(model, world_size=2)
    attention = model.model.language_model.layers[1].self_attn
    attention.wq = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match="LlamaDecoderLayer has a linear layer wq: expected q_proj, k_proj"):
        predict(model)
    model = tiny.make_model(tiny.make_processor())
    model.lm_head = Linear4bit(32, 40, bias=False, device="meta")
    with pytest.raises(ValueError, match="sharding 'zero3' of 4-bit weights is not known here: expected none, ddp or"):
        predict(model, "zero3", 2)


# What is a formula


RUNS = [
    # recipe, weights, autocast, dropout, attention
    ("projector", torch.bfloat16, True, 0.0, "sdpa"),
    ("full", torch.float32, True, 0.0, "sdpa"),
    ("full", torch.float32, False, 0.0, "sdpa"),
    ("full", torch.float32, False, 0.0, "eager"),
    ("tower", torch.float32, True, 0.0, "sdpa"),
    ("LoRA", torch.bfloat16, True, 0.05, "sdpa"),
    ("LoRA", torch.float32, False, 0.0, "sdpa"),
    ("DoRA", torch.bfloat16, True, 0.0, "sdpa"),
    ("QLoRA", torch.bfloat16, True, 0.0, "sdpa"),
]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(("recipe", "dtype", "bf16", "dropout", "attention"), RUNS)
def test_activations_of_real_steps(
    recipe, dtype, bf16, dropout, attention, checkpointing, rows, tmp_path, monkeypatch
):
    """Within 10 % of the bytes that live in a micro-batch of the real trainer, through TRL's fused head.

    The head in chunks of 64 tokens of the vocabulary, else its buffer for 32,768 would be all that counts here.
    """
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    flags = dict(bf16=bf16, gradient_checkpointing=checkpointing, max_steps=1)
    trainer = train(recipe, rows, tmp_path, dtype, dropout, attention, **flags)
    moments = _moments(trainer.model, trainer.args, **trainer.sizes)
    assert moments.kept == pytest.approx(trainer.kept, rel=0.1)
    assert predict_memory(trainer.model, trainer.args, **trainer.sizes).activations == pytest.approx(
        trainer.peak, rel=0.1
    )


def fake_7b(recipe):
    """Two layers of LLaVA-1.5-7B's size: on the meta device, and the same as tensors that only pretend to be."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32
        ),
        vision_config=CLIPVisionConfig(num_hidden_layers=2),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    if recipe == "full":
        train_only(model, PARTS["full"])
    else:
        model.to(torch.bfloat16)
        with torch.device("meta"):
            add_fused_lm_head(model)
            model = adapt(model, recipe)
    if recipe == "full":
        add_fused_lm_head(model)
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("recipe", ["full", "LoRA", "DoRA"])
def test_activations_at_the_size_of_a_7b_model(recipe, checkpointing, monkeypatch):
    """Forward and backward pass of fake tensors, which have sizes and lives but no bytes: 2 rows of 1024 tokens."""
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    model = fake_7b(recipe)
    args = LlavaSFTConfig(use_cpu=True, gradient_checkpointing=checkpointing)
    moments = _moments(model, args, batch_size=2, tokens=1024, pictures=0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                    module._parameters[name] = fake
                    fake.grad = torch.zeros_like(fake) if fake.requires_grad else None
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        embedded = torch.zeros(2, 1024, 4096, dtype=torch.float32 if recipe == "full" else torch.bfloat16)
        embedded.requires_grad_().grad = torch.zeros_like(embedded)
        labels = torch.zeros(2, 1024, dtype=torch.long)
        with Live() as meter:
            inputs = embedded * 1
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(inputs_embeds=inputs, labels=labels, fused_lm_head=True).loss
            kept = meter.now
            loss.backward()
    assert moments.kept == pytest.approx(kept, rel=0.1)
    assert max(moments.forward, moments.head, moments.layer) == pytest.approx(meter.peak, rel=0.1)


# The page


def test_docs_memory_prints_what_the_command_prints(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "predicted_memory.py"), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    assert sum(line.startswith("|---") for line in printed.splitlines()) == 3
    assert printed in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
