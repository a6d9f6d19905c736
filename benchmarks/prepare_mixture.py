"""Time and memory of `recipes/prepare_mixture.py` on generated rows: each step alone, then a whole recipe.

    PYTHONPATH=recipes python benchmarks/prepare_mixture.py --folder mixture_benchmark

Every run is a fresh process with one worker, so that its peak memory is its own: `--rows` rows of about 270 bytes for
the whole recipe, a tenth of them for the steps. As many as that tenth are the whole recipe's small file, the rows of
1.1 KB from open_rows.py, and the rows that all show one picture. The folder is deleted at the end; it needs room for
six copies of the input.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import open_rows
import rich
from rich.table import Table

from _mixture import Mixture, Source, write_mixture

SHORT = {"prompt": "Answer the question using a single word or phrase."}
STEPS = {
    "none (read, check, write)": [],
    "add_prompt": [("add_prompt", SHORT)],
    "rotate_choices": [("rotate_choices", {})],
    "drop_empty": [("drop_empty", {})],
    "repeat, 2 times": [("repeat", {"times": 2})],
    "sample, half": [("sample", {"share": 0.5})],
    "merge_same_image": [("merge_same_image", {})],
    "merge_same_image, sample_exchanges": [("merge_same_image", {}), ("sample_exchanges", {"at_most": 3})],
    "merge_same_image, split_exchanges": [("merge_same_image", {}), ("split_exchanges", {"at_most": 3})],
}
WHOLE = [("drop_empty", {}), ("merge_same_image", {}), ("sample", {"share": 0.5}), ("add_prompt", SHORT)]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, default=Path("mixture_benchmark"), help="made, and deleted at the end")
    today = datetime.date.today().isoformat()
    output = Path(f"benchmarks/results/prepare_mixture_cpu_{today}.json")
    parser.add_argument("--output", type=Path, default=output, help="JSON file for the figures")
    return parser


def write_rows(path: Path, rows: int, pictures: int) -> None:
    """VQA-like rows, one exchange each, a picture's rows scattered over the whole file."""
    with path.open("w") as file:
        for row in range(rows):
            turns = [
                {
                    "from": "human",
                    "value": f"<image>\nWhat is the person number {row} on the left of the street doing?",
                },
                {"from": "gpt", "value": f"answer {row % 97}"},
            ]
            choices = [f"answer {row % 97}", "none of these"]
            image = f"coco/train2017/{row * 7919 % pictures:012d}.jpg"
            record = {"id": f"vqa-{row}", "image": image, "choices": choices, "conversations": turns}
            file.write(json.dumps(record) + "\n")


def measure(path: Path, steps: list, shuffle: bool) -> dict:
    """Run one mixture; seconds, rows a second of the input, and the peak memory in MiB."""
    source = Source("vqa", str(path), str(path.parent), steps=steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.monotonic(), time.process_time()
    summary = write_mixture(Mixture([source], shuffle), path.with_name("mixed.jsonl"))
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    rows = summary["total"]["rows_read"]
    return {
        "rows": rows,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "rows_per_cpu_s": round(rows / cpu),
        "rows_per_wall_s": round(rows / wall),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_mib_before": before // 1024,
    }


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.folder.mkdir(parents=True)
    names = ("small", "large", "long_rows", "one_picture")
    small, large, long_rows, one_picture = files = [args.folder / f"{name}.jsonl" for name in names]
    tenth = args.rows // 10
    write_rows(small, tenth, tenth // 5)
    write_rows(large, args.rows, args.rows // 5)
    write_rows(one_picture, tenth, 1)
    open_rows.write_rows(long_rows, tenth, tenth // 5)
    runs = {name: (small, steps, False) for name, steps in STEPS.items()}
    runs["merge_same_image, one picture"] = (one_picture, STEPS["merge_same_image"], False)
    runs["none, rows of 1.1 KB"] = (long_rows, [], False)
    runs["whole recipe, rows of 1.1 KB"] = (long_rows, WHOLE, True)
    runs |= {f"whole recipe, {path.stem} file": (path, WHOLE, True) for path in (small, large)}
    results = {
        "date": datetime.date.today().isoformat(),
        "cpu_cores": os.cpu_count(),
        "input_bytes": {path.name: path.stat().st_size for path in files},
        "runs": {},
    }
    table = Table("", "rows", "rows / CPU s", "wall s", "peak MiB")
    for name, run in runs.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            figures = results["runs"][name] = pool.submit(measure, *run).result()
        columns = ("rows", "rows_per_cpu_s", "wall_s", "peak_mib")
        table.add_row(name, *(f"{figures[column]:,}" for column in columns))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    shutil.rmtree(args.folder)
    rich.print(table)


if __name__ == "__main__":
    main()
