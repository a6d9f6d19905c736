"""The doctor: what a data set would train, seen before any GPU hour is spent.

Reads every row as training does, counts tokens without decoding pictures, checks pictures by their headers, and puts a
sample of rows through the very collator that trains: which tokens carry loss, whether every answer ends in its stop
token, whether inference feeds the same ids. Nothing is loaded of the model but its configuration.

    python recipes/inspect_data.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name data/train.json \
        --html outputs/doctor.html
    python recipes/inspect_data.py --recipe sft_qlora --config recipes/qlora_24gb.yaml --dataset_name data/train.json \
        --model_name_or_path llava-hf/llava-1.5-7b-hf --eval_dataset_name data/test.json --fix data/train_fixed.jsonl

Takes the flags of the recipe that would train, and judges by that recipe's own values. Exit status 1 if an error was
found, else 0. docs/doctor.md lists what is looked for. Measured: 100,000 rows in 50 s, with
picture headers 54 s, one core (benchmarks/LOG.md).
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from _doctor import Doctor
from _doctor_report import print_report, write_page
from _repair import write_fixed
from collators.llava_json import PictureFolder

RECIPES = {
    "sft_full": ["multi_modal_projector", "language_model"],
    "sft_multi_image": ["multi_modal_projector", "language_model"],
    "sft_qlora": [],  # adapters
    "pretrain_projector": ["multi_modal_projector"],
}


def make_parser(recipe="sft_full"):
    """The parser of the recipe (by name, since it is a value here), and the doctor's own flags."""
    parser = importlib.import_module(recipe).make_parser()
    parser.set_defaults(use_cpu=not torch.cuda.is_available())  # else the recipes' bf16 is refused on a laptop
    own = parser.add_argument_group("doctor")
    own.add_argument(
        "--recipe", choices=RECIPES, default=recipe, help="the recipe that would train; default: sft_full"
    )
    own.add_argument(
        "--pictures", choices=["headers", "decode", "none"], default="headers", help="how closely to look at pictures"
    )
    own.add_argument("--sample_rows", type=int, default=200, help="rows that go through the collator")
    own.add_argument("--json", type=Path, help="write the report for a program")
    own.add_argument("--html", type=Path, help="write the report for a browser, with what the model would learn")
    own.add_argument("--fix", type=Path, help="write the rows that can train to this new .jsonl file")
    return parser


def main(argv=None):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES, default="sft_full")
    recipe = first.parse_known_args(argv)[0].recipe
    script_args, training_args, model_args, options = make_parser(recipe).parse_args_and_config(argv)
    source = script_args.dataset_name
    if options.fix and not source.lower().endswith((".json", ".jsonl")):
        raise ValueError(f"--fix {options.fix}: expected a .json or .jsonl file as --dataset_name, found {source}")
    if options.fix and "[" in script_args.dataset_train_split:
        raise ValueError(
            f"--fix takes the whole file: drop the slice --dataset_train_split {script_args.dataset_train_split}"
        )

    tower = ["vision_tower"] if getattr(script_args, "train_vision_tower", False) else []
    doctor = Doctor(
        script_args,
        training_args,
        model_args,
        parts=[*RECIPES[recipe], *tower],
        pictures=options.pictures,
        sample_rows=options.sample_rows,
    )
    examination = doctor.examine()
    report = examination.report
    print_report(report, Console())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        shown = {name: section for name, section in report.items() if name != "samples"}
        options.json.write_text(json.dumps(shown, indent=2, ensure_ascii=False, default=str), encoding="utf-8")
    if options.html:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        write_page(report, options.html)
        print(f"page: {options.html}")
    if options.fix:
        folder = os.path.abspath(script_args.image_folder or os.path.dirname(os.path.abspath(source)))
        find = PictureFolder(folder, script_args.allow_external_images, script_args.allow_remote_images)
        kept, repaired, left_out = write_fixed(
            source, options.fix, find, script_args.placement, examination.findings, examination.usable
        )
        print(
            f"{options.fix}: {kept} rows kept, {repaired} repaired, {left_out} left out; {options.fix}.changes.jsonl"
        )
        print(f"train on it with --image_folder {folder}")
    if examination.findings.count("error"):
        sys.exit(1)


if __name__ == "__main__":
    main()
