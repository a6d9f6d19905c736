"""The recipes on two processes, each start a real one: DDP, FSDP2, ZeRO-2, ZeRO-3, two machines; killed and resumed.

One plain process on the same global batch is the measure. accelerate deals whole batches to the processes in turn, so
in micro-step k process r has the rows from (2k + r)·b on, b being the rows a device. Both together have the rows from
2bk on, which is the micro-batch of one process with 2b rows a device; gradients are accumulated over the same k, and
the loss is divided by the trained tokens of all processes. Losses and weights then agree to rounding.
"""

import json
import random
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.data_loader import BatchSamplerShard
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForImageTextToText

import pretrain_projector
import sft_full
import sft_qlora
import tiny
from _distributed import layer_classes, show_a_blank_picture
from _parts import add_adapters, find_part, train_only
from collators import LlavaDataCollator, chat_template_path
from launch import ROOT, Launch, accelerate
from runs import ON_CPU, losses

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
RECIPES = {"pretrain_projector": pretrain_projector, "sft_full": sft_full, "sft_qlora": sft_qlora}
ADAPTERS = ["--lora_r", "4", "--lora_alpha", "64", "--lora_dropout", "0"]
METHODS = {
    # The `plain` template of stage 1 refuses rows without a picture.
    "stage 1": ("pretrain_projector", ["--chat_template_path", str(chat_template_path("vicuna_v1"))]),
    "full": ("sft_full", []),
    "LoRA": ("sft_qlora", [*ADAPTERS, "--load_in_4bit", "False"]),
    "DoRA": ("sft_qlora", [*ADAPTERS, "--load_in_4bit", "False", "--use_dora"]),
    "QLoRA": ("sft_qlora", ADAPTERS),
}
LAUNCHERS = ["cpu_2proc", "cpu_2proc_fsdp2", "cpu_2proc_zero2", "cpu_2proc_zero3"]
MATRIX = [(launcher, method) for launcher in LAUNCHERS for method in ("stage 1", "full", "LoRA")]
KILLED = [("cpu_2proc", method) for method in ("full", "LoRA", "DoRA", "QLoRA")]
KILLED += [("cpu_2proc_fsdp2", "full"), ("cpu_2proc_zero3", "full")]
CELLS = sorted({*MATRIX, *KILLED})

STEPS, ROWS, BATCH, ACCUMULATED = 12, 16, 2, 2
TEXT_ONLY = {2, 3, 8, 9, 12, 13, 14, 15}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index in range(ROWS):
        color = tiny.COLORS[index % len(tiny.COLORS)]
        tiny.picture(color, (20, 16)).save(folder / f"{index}.png")
        picture = {} if index in TEXT_ONLY else {"image": f"{index}.png"}
        ask = {"from": "human", "value": "What is it?" + "\n<image>" * len(picture)}
        rows.append({"id": index, **picture, "conversations": [ask, {"from": "gpt", "value": color}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def flags(base: str, data: Path, out: Path, method: str, rows: int = BATCH) -> list[str]:
    return [
        *("--model_name_or_path", base, "--dataset_name", str(data), "--output_dir", str(out), *ON_CPU),
        *("--max_steps", str(STEPS), "--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "2e-3"),
        *("--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(ACCUMULATED)),
        *("--train_sampling_strategy", "sequential", "--dataloader_num_workers", "0", "--save_strategy", "no"),
        *METHODS[method][1],
    ]


@pytest.fixture(scope="module")
def single(base, data, tmp_path_factory):
    """`single(method)`: the output of one plain process on the global batch of two."""
    made = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("single")
            RECIPES[METHODS[method][0]].main(flags(base(), data, made[method], method, rows=2 * BATCH))
        return made[method]

    return run


def keys_on_disk(folder: Path) -> dict[str, set[str]]:
    keys = {}
    for file in sorted(folder.glob("**/*.safetensors")):
        if "checkpoint-" not in str(file.relative_to(folder)):
            with safe_open(file, "pt") as tensors:
                keys[str(file.relative_to(folder))] = set(tensors.keys())
    return keys


def assert_equal_runs(out: Path, reference: Path) -> None:
    assert len(losses(reference)) == STEPS
    assert losses(out) == pytest.approx(losses(reference), rel=1e-4)
    assert keys_on_disk(out) == keys_on_disk(reference) != {}
    weights = AutoModelForImageTextToText.from_pretrained(out).state_dict()
    expected = AutoModelForImageTextToText.from_pretrained(reference).state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            weights[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text
        )
    if (reference / "projector").exists():
        projector, same = (load_file(folder / "projector" / "projector.safetensors") for folder in (out, reference))
        torch.testing.assert_close(projector, same, atol=1e-5, rtol=1e-4)


def assert_sharded(launcher: str, run: Launch) -> None:
    records = run.sharding()
    assert len(records) == 2
    for record in records:
        if launcher == "cpu_2proc":
            assert (record["wrapper"], record["share"]) == ("DistributedDataParallel", 1)
        elif launcher == "cpu_2proc_fsdp2":
            assert record["types"] == ["DTensor"] and record["share"] == pytest.approx(0.5, abs=0.05)
        else:
            stage = int(launcher[-1])
            assert (record["wrapper"], record["zero_stage"]) == ("DeepSpeedEngine", stage)
            assert record["share"] == pytest.approx({2: 1, 3: 0.5}[stage], abs=0.05)


# The matrix


def test_in_some_steps_one_process_has_text_alone_and_in_one_both_have():
    batches = BatchSampler(SequentialSampler(range(ROWS)), BATCH, drop_last=False)
    first, second = (list(BatchSamplerShard(batches, 2, rank)) for rank in (0, 1))
    assert (first, second) == ([[0, 1], [4, 5], [8, 9], [12, 13]], [[2, 3], [6, 7], [10, 11], [14, 15]])
    has_pictures = [tuple(not TEXT_ONLY.issuperset(rows) for rows in pair) for pair in zip(first, second, strict=True)]
    assert has_pictures == [(True, False), (True, True), (False, True), (False, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "method"), CELLS, ids=lambda value: value.removeprefix("cpu_2proc_"))
def test_two_processes_train_as_one(launcher, method, base, data, single, tmp_path):
    """Of some cells both processes are killed on the way; what they go on to is then held against the same measure."""
    recipe, out = METHODS[method][0], tmp_path / "out"
    command = flags(base(), data, out, method)
    if (launcher, method) in KILLED:
        command += ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "100"]
        chance = random.Random(f"{launcher} {method}")  # another moment in each cell, the same in every run
        saved, delay = chance.choice([2, 4]), chance.uniform(0, 0.15)
        print(f"SIGKILL {delay:.3f} s after checkpoint-{saved}")
        run = accelerate(launcher, recipe, command, out)
        run.wait_for(out / f"checkpoint-{saved}" / "trainer_state.json")
        time.sleep(delay)
        run.kill()
        assert not (out / f"checkpoint-{STEPS}").exists()
        command += ["--resume_from_checkpoint", "True"]
    run = accelerate(launcher, recipe, command, out)
    run.wait()
    assert (out / "trainer_state.json").exists(), run.printed[-3000:]
    assert_sharded(launcher, run)
    assert run.printed.count("Parts of the model") == 1
    assert "global batch 8 rows = 2 a device × 2 accumulated × 2 process(es); 12 steps" in run.printed
    assert_equal_runs(out, single(method))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_machines(launcher, base, data, single, tmp_path):
    """Two launchers on one machine that know of each other by an address alone, one process each."""
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if launcher == "accelerate":
        start = ["accelerate.commands.launch", "--config_file", "accelerate_configs/multi_node.yaml"]
        start += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        ranks = [["--machine_rank", "0"], ["--machine_rank", "1"]]
    else:
        start = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "llava"]
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        ranks = [[], []]
    command = ["recipes/sft_full.py", *flags(base(), data, out, "full")]
    machines = [
        Launch([*start, *rank, *command], tmp_path / "out" if index == 0 else tmp_path / "second")
        for index, rank in enumerate(ranks)
    ]
    for machine in machines:
        machine.wait()
    assert (out / "trainer_state.json").exists(), machines[0].printed[-3000:]
    assert_equal_runs(out, single("full"))


# What is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "method", "environment", "message"),
    [
        ("cpu_2proc_fsdp2", "QLoRA", {}, "FSDP does not shard a 4-bit or 8-bit base"),
        ("cpu_2proc_zero3", "QLoRA", {}, "ZeRO-3 does not shard a 4-bit or 8-bit base"),
        # The user's own list is taken as it is, so that a wrong name in it is an error.
        ("cpu_2proc_fsdp2", "full", {"FSDP_TRANSFORMER_CLS_TO_WRAP": "NoSuchLayer"}, "layer class NoSuchLayer"),
    ],
)
def test_refused_by_two_processes(launcher, method, environment, message, base, data, tmp_path):
    out = tmp_path / "out"
    run = accelerate(launcher, METHODS[method][0], flags(base(), data, out, method), out, **environment)
    run.wait()
    assert message in run.printed


def test_fsdp_that_would_not_shard_is_refused(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="shards nothing on the CPU .*cpu_2proc.yaml"):
        sft_full.main(flags(base(), data, tmp_path, "full"))


# The launch files


def test_there_are_launch_files():
    names = {path.stem for path in CONFIGS}
    assert {"single_gpu", "multi_gpu", "fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_offload"} <= names
    assert {"multi_node", *LAUNCHERS} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_launch_file_is_topology_that_accelerate_reads(path):
    load_config_from_file(str(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.startswith("# ") for line in lines[:3]] == [True, True, False]
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings |= settings.pop("deepspeed_config", {})
    assert not settings.keys() & {"mixed_precision", "gradient_clipping", "train_batch_size", "optimizer"} - {
        name for name, value in settings.items() if value == "auto"
    }


@pytest.mark.parametrize("twin", LAUNCHERS)
def test_a_cpu_twin_says_what_its_gpu_file_says(twin):
    original = {"cpu_2proc": "multi_gpu"}.get(twin, twin.removeprefix("cpu_2proc_"))
    ours, theirs = (
        yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in (twin, original)
    )
    assert ours == {**theirs, "use_cpu": True, "main_process_port": 0, "num_processes": 2}


# What the model gets


@pytest.mark.parametrize(
    ("kind", "text", "names"),
    [
        ("llava", "llama", ["CLIPEncoderLayer", "LlamaDecoderLayer"]),
        ("vipllava", "qwen2", ["CLIPEncoderLayer", "Qwen2DecoderLayer"]),
        ("llava_next", "mistral", ["CLIPEncoderLayer", "MistralDecoderLayer"]),
    ],
)
def test_the_wrapped_layers_are_those_of_the_live_model(kind, text, names):
    model = tiny.make_model(tiny.make_processor(kind=kind), kind, text)
    assert layer_classes(model) == names
    assert not set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}  # why we look


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "PEFT"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_blank_picture_changes_nothing_but_reaches_all_that_a_picture_does(kind, wrapped):
    processor = tiny.make_processor(kind=kind)
    model = tiny.make_model(processor, kind)
    train_only(model, ["multi_modal_projector"])
    if wrapped:
        model = add_adapters(model, LoraConfig(r=4, target_modules="all-linear"))
    collator = LlavaDataCollator(processor, chat_template=chat_template_path("vicuna_v1").read_text())
    text = collator([tiny.row(tiny.user("Hi"), tiny.assistant("red"))])
    both = collator([tiny.row(tiny.user("Hi", images=1), tiny.assistant("red"))])
    expected = [model(**dict(batch)).logits for batch in (text, both)]
    show_a_blank_picture(model, processor)
    for batch, logits in zip((text, both), expected, strict=True):
        assert torch.equal(model(**dict(batch)).logits, logits)
    model(**text).loss.backward()
    projector = list(find_part(model, "multi_modal_projector").parameters())
    if kind == "llava_next" and not wrapped:
        projector.append(model.model.image_newline)
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in projector)
