"""Runs of the training recipes on tiny models: their command lines, and what they leave behind."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from _parts import part_of

ON_CPU = ["--bf16", "False", "--dtype", "float32", "--use_cpu", "True", "--report_to", "none"]
# The loss falls, so "greater is better" makes an early checkpoint the best one.
BEST_IS_EARLY = [
    *("--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--max_steps", "6"),
    *("--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss", "--greater_is_better", "True"),
    *("--learning_rate", "1e-2", "--save_total_limit", "9"),
]
SMALL = ["--per_device_train_batch_size", "2", "--logging_steps", "1", "--dataloader_num_workers", "0"]


def command(recipe: str, base: str, data: Path, out: Path, *flags: str) -> list[str]:
    rows = data / ("pretrain.json" if recipe == "pretrain_projector" else "instruct.json")
    files = ["--model_name_or_path", base, "--dataset_name", str(rows), "--output_dir", str(out)]
    return [*files, *ON_CPU, *SMALL, *flags]


def losses(out: Path) -> dict[int, float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def changed_parts(before: str, after: Path) -> dict[str, set[str]]:
    """Names of the parameters whose values differ, by part."""
    old = AutoModelForImageTextToText.from_pretrained(before).state_dict()
    new = AutoModelForImageTextToText.from_pretrained(after).state_dict()
    assert old.keys() == new.keys()
    changed = {}
    for name in old:
        if not torch.equal(old[name], new[name]):
            changed.setdefault(part_of(name), set()).add(name)
    return changed


def trainable_names(path: str, parts: set[str]) -> set[str]:
    model = AutoModelForImageTextToText.from_pretrained(path)
    return {name for name, _ in model.named_parameters() if part_of(name) in parts}


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.002)


def kill_after_two_saves(script: str, argv: list[str], out: Path) -> None:
    """Start a recipe that saves every 4 steps as a process of its own, and SIGKILL it after the second save.

    Leaves the newest folder as a save that was cut short does: without the file that is written last.
    """
    child = [sys.executable, script, *argv]
    with subprocess.Popen(child, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(out / "checkpoint-8" / "trainer_state.json", process)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "trainer_state.json").exists()
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-100")
    (out / "checkpoint-100" / "trainer_state.json").unlink()
