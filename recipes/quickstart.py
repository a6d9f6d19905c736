"""The whole way to a small LLaVA on real handwritten digits: on a CPU, in minutes, with the scripts for a 7B model.

Trains: a small CLIP and a small Llama from scratch, in place of the pretrained ones that a real run downloads; then
        what the recipes train: stage 1, stage 2, QLoRA, and several pictures with the vision tower.
Data:   scikit-learn's 1,797 scans of digits as PNG files and LLaVA JSON, 300 of them held out from all training.

    python recipes/quickstart.py --output_dir quickstart_output

From build_llava.py on, every step is a child process; its command is printed, and you can run it by itself. A second
run starts over. Measured: 9.6 minutes on 2 CPU cores beside another job; held-out questions answered: 97.6 % on one
picture (28.9 % before), 95.8 % on two; 97.0 % of the cells of tables (2026-11-21; benchmarks/LOG.md).
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import rich
import torch

from _digits import QUESTIONS, train_backbones, write_data
from _report import ONE_PICTURE, SEVERAL_PICTURES, make_tables, rate_merging, rate_titles, read_answers, write_report
from collators import chat_template_path

SCALES = {
    "full": (dict(held_in=1497, held_out=300, pairs=3000, tables=2000), dict(tower_steps=1500, llama_steps=1200)),
    "small": (dict(held_in=48, held_out=20, pairs=16, tables=8), dict(tower_steps=20, llama_steps=20)),
}
# SFTConfig's bf16 and checkpointing and the recipes' loader processes are for GPUs. A log line is a curve's point.
CPU = dict(use_cpu=True, dtype="float32", bf16=False, activation_checkpointing=False, dataloader_num_workers=0)
CPU |= dict(logging_steps=10, logging_first_step=True, save_strategy="no", report_to="none")
# LLaVA-1.5 takes 1e-3 and 2e-5; models this small learn faster and see fewer rows. A table is new to the tower.
STAGE_1 = CPU | dict(learning_rate=3e-3, per_device_train_batch_size=16, num_train_epochs=4)
STAGE_2 = CPU | dict(learning_rate=5e-4, per_device_train_batch_size=32, num_train_epochs=2)
QLORA = STAGE_2 | dict(learning_rate=3e-3, projector_learning_rate=5e-4, num_train_epochs=1, lora_r=32, lora_alpha=64)
MULTI = STAGE_2 | dict(learning_rate=1e-3, train_vision_tower=True, gradient_accumulation_steps=1)
# At this size a second thread gains little on an idle machine, and on a busy one costs several times the run.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart_output"), help="folder for everything")
    parser.add_argument("--scale", choices=SCALES, default="full", help="small: for tests; it learns nothing")
    return parser


def make_command(script, **options):
    words = [Path(sys.executable), Path(__file__).with_name(script)]
    words += [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return [os.path.relpath(word) if isinstance(word, Path) else str(word) for word in words]


def run(script, **options):
    command = make_command(script, **options)
    print(f"\n$ {shlex.join(command)}", flush=True)
    if status := subprocess.run(command, env=os.environ | ENVIRONMENT).returncode:
        sys.exit(f"exit status {status} from\n$ {shlex.join(command)}")


def evaluate(checkpoint, data, rows=None):
    """Ask a checkpoint the held-out rows of `data`, or the first `rows`; returns one record a question."""
    output = checkpoint.with_name("answers") / f"{data}-{checkpoint.name}.jsonl"
    questions = dict(dataset_name=checkpoint.with_name("data") / f"{data}_test.json", limit=rows, max_new_tokens=64)
    run("evaluate.py", model=checkpoint, **questions, batch_size=100, device="cpu", output=output)
    return read_answers(output)


def main(argv=None):
    args = make_parser().parse_args(argv)
    folder, (sizes, steps), start = args.output_dir, SCALES[args.scale], time.monotonic()
    mark = folder / ".quickstart"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        sys.exit(f"{folder} holds something other than a quickstart's output: pass another --output_dir")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.touch()
    torch.set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
    names = "data", "clip", "llama", "llava-init", "stage1", "stage2", "qlora", "merged", "multi-image"
    data, clip, llama, init, stage_1, stage_2, qlora, merged, multi = map(folder.joinpath, names)
    write_data(data, **sizes)
    train_backbones(data, clip, llama, **steps)
    titled, instruct, mixed = map(data.joinpath, ("pretrain.json", "instruct.json", "multi_image.json"))

    run("build_llava.py", vision_tower=clip, language_model=llama, output_dir=init)
    answers = {"before": evaluate(init, "instruct")}
    run("pretrain_projector.py", model_name_or_path=init, dataset_name=titled, output_dir=stage_1, **STAGE_1)
    answers["after stage 1"] = evaluate(stage_1, "instruct", rows=sizes["held_out"] * len(QUESTIONS))
    # Stage 1 leaves the template without questions in its checkpoint; stage 2 needs the one with them.
    rows = dict(dataset_name=instruct, chat_template_path=chat_template_path("vicuna_v1"))
    run("sft_full.py", model_name_or_path=stage_1, **rows, output_dir=stage_2, **STAGE_2)
    answers["after stage 2"] = evaluate(stage_2, "instruct")
    run("sft_qlora.py", model_name_or_path=stage_1, **rows, output_dir=qlora, **QLORA)
    answers["by QLoRA"] = evaluate(qlora, "instruct")
    run("merge_adapter.py", adapter=qlora, dataset_name=instruct, device="cpu", output_dir=merged)
    merging = rate_merging(answers["by QLoRA"], evaluate(merged, "instruct"))
    run("sft_multi_image.py", model_name_or_path=stage_2, dataset_name=mixed, output_dir=multi, **MULTI)
    answers["multi-image"] = evaluate(multi, "instruct")
    asked = {"after stage 2": evaluate(stage_2, "multi_image"), "multi-image": evaluate(multi, "multi_image")}
    next_command = shlex.join(make_command("chat.py", model=multi, image=Path(asked["multi-image"][0]["images"][0])))
    findings = [
        rate_titles(answers["after stage 1"], data / "pretrain_test.json"),
        merging,
        f"{args.scale} scale, {(time.monotonic() - start) / 60:.1f} minutes on {os.cpu_count()} CPU cores.",
    ]
    curves = {"stage 1": stage_1, "stage 2": stage_2, "stage 2 by QLoRA": qlora, "multi-image": multi}
    answers = {ONE_PICTURE: answers, SEVERAL_PICTURES: asked}
    write_report(folder / "report.html", answers, findings, curves, next_command)
    rich.print(*make_tables(answers), *findings, sep="\n")
    print(f"Report: {folder / 'report.html'}\nNow talk to it:\n$ {next_command}")


if __name__ == "__main__":
    main()
