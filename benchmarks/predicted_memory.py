"""Print the tables of docs/memory.md: the predicted memory of LLaVA-1.5-7B and -13B in every recipe.

    PYTHONPATH=recipes python benchmarks/predicted_memory.py

The models are built on the meta device, which takes no memory, and frozen as each recipe freezes them. Arithmetic: no
GPU has been measured.
"""

import torch
from peft import LoraConfig
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from _memory import GIB, MemoryPlan, predict_memory, quantise_on_paper
from _parts import add_adapters, train_only
from _trainer import LlavaSFTConfig

# Sizes of the released checkpoints: Vicuna and CLIP ViT-L/14 at 336 pixels, 576 image tokens.
VICUNA = {
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}
CLIP = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
CARDS = (16, 24, 40, 48, 80)
USABLE = 0.95  # of a card's nominal size, read as GiB: a 16 GB card shows 15 to 16 GiB
BATCHES = {"pretrain_projector": (32, 4, 1), "sft_full": (16, 4, 1)}
ADAPTERS = ("LoRA", "DoRA", "QLoRA", "QDoRA")


def make_model(recipe: str, size: str, rank: int = 128) -> torch.nn.Module:
    """A model on the meta device, frozen, adapted and quantised as `recipe` does it."""
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, **VICUNA[size])
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**CLIP))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    if recipe == "sft_full":
        train_only(model, ["multi_modal_projector", "language_model"])
        return model
    model.to(torch.bfloat16)
    if recipe == "pretrain_projector":
        train_only(model, ["multi_modal_projector"])
        return model
    with torch.device("meta"):
        model = add_adapters(model, LoraConfig(r=rank, lora_dropout=0.05, use_dora=recipe.endswith("DoRA")))
    if recipe.startswith("Q"):
        quantise_on_paper(model)
    return model


def predict(
    model: torch.nn.Module, batch: int, tokens: int = 2048, optim: str = "adamw_torch_fused", **several
) -> MemoryPlan:
    # bfloat16 autocast and gradient checkpointing are LlavaSFTConfig's defaults, as in every recipe.
    args = LlavaSFTConfig(optim=optim, use_cpu=True)
    return predict_memory(model, args, batch_size=batch, tokens=tokens, pictures=batch, **several)


def gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def fits(plan: MemoryPlan) -> str:
    return next((f"{card} GB" for card in CARDS if plan.total <= USABLE * card * GIB), "none")


def print_table(title: str, columns: list[str], rows: list[list]) -> None:
    print(f"\n**{title}**\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "|".join(["---"] * len(columns)) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def main():
    models = {
        (recipe, size): make_model(recipe, size)
        for recipe in ("pretrain_projector", "sft_full", *ADAPTERS)
        for size in VICUNA
    }
    items = ["parameters", "gradients", "optimizer", "activations", "total", "smallest card"]

    rows = []
    for (recipe, size), model in models.items():
        for batch in BATCHES.get(recipe, (16, 4, 1)):
            plan = predict(model, batch)
            parts = [plan.parameters, plan.gradients, plan.optimizer, plan.activations, plan.total]
            rows.append([recipe, size, batch, *map(gib, parts), fits(plan)])
    print_table(
        "One GPU: rows of 2048 tokens, one picture each, AdamW, rank 128; GiB", ["", "", "batch", *items], rows
    )

    rows = []
    for size in VICUNA:
        for rank in (128, 64, 16):
            model = make_model("QLoRA", size, rank)
            for optim in ("adamw_torch_fused", "paged_adamw_8bit"):
                plans = [predict(model, batch, tokens, optim) for tokens in (2048, 1024) for batch in (4, 2, 1)]
                rows.append([size, rank, f"`{optim}`", *(f"{gib(plan.total)} ({fits(plan)})" for plan in plans)])
    columns = [f"{tokens} tokens × {batch}" for tokens in (2048, 1024) for batch in (4, 2, 1)]
    print_table("QLoRA on small cards: total GiB and the smallest card", ["", "rank", "optimizer", *columns], rows)

    rows = []
    for recipe, batch in (("sft_full", 16), ("sft_full", 1), ("LoRA", 16)):
        for size in VICUNA:
            for sharding in ("ddp", "zero2", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"):
                plan = predict(models[recipe, size], batch, sharding=sharding, world_size=8)
                parts = [plan.parameters, plan.gradients, plan.optimizer, plan.activations, plan.communication]
                host = gib(8 * plan.host) if plan.host else "-"
                rows.append([recipe, size, batch, sharding, *map(gib, [*parts, plan.total]), fits(plan), host])
    columns = ["", "", "batch", "sharding", *items[:4], "gathered, buckets", *items[4:], "host memory, all 8"]
    print_table("8 GPUs: each one's share, rows of 2048 tokens; GiB", columns, rows)


if __name__ == "__main__":
    main()
