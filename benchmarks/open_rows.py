"""Measure how long a LLaVA JSON file of a million rows takes to open, and how much memory.

    python benchmarks/open_rows.py

Writes a file of --rows rows of about 1 KB (one in twenty text-only) over --pictures distinct picture files, 1×1 PNGs,
to a temporary folder, opens it with `load_rows` in fresh processes (the first time, from the cache, and as a stream up
to its first row) and deletes it. A second row of figures is for the same rows as one JSON list. Wall and CPU seconds
are those of the call; the peak of memory is the process's, imports included. Nothing is dropped from the page cache.
"""

import argparse
import datetime
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

TEXT = (
    "the picture shows a small dog beside two red chairs near an open window while someone in the background reads "
    "what is left of yesterday's paper and does not look up"
)
MODES = ("first open", "second open", "first row of a stream")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=90_000, help="distinct picture files")
    today = datetime.date.today().isoformat()
    parser.add_argument("--output", default=f"benchmarks/results/open_rows_cpu_{today}.json")
    parser.add_argument("--measure", nargs=2, metavar=("MODE", "FILE"), help="what each child process does")
    return parser


def write_pictures(folder, count):
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06}.png").write_bytes(buffer.getvalue())


def make_row(number, pictures, chance):
    """One row: two to four exchanges about a picture, or, one time in twenty, about none."""
    words, turns, has_picture = TEXT.split(), [], chance.random() > 0.05
    for turn in range(chance.randint(2, 4)):
        marker = "<image>\n" if turn == 0 and has_picture else ""
        turns.append({"from": "human", "value": marker + " ".join(chance.choices(words, k=12)) + "?"})
        turns.append({"from": "gpt", "value": " ".join(chance.choices(words, k=40)) + "."})
    picture = {"image": f"pictures/{number % pictures:06}.png"} if has_picture else {}
    return {"id": f"row-{number}", **picture, "conversations": turns}


def write_rows(path, rows, pictures):
    chance = random.Random(0)
    is_list = path.suffix == ".json"
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            opening = ("[" if number == 0 else ",\n") if is_list else ""
            file.write(opening + json.dumps(make_row(number, pictures, chance)) + ("" if is_list else "\n"))
        file.write("]" if is_list else "")


def measure(mode, path):
    """Open `path` in this process; returns seconds, GB and rows."""
    from collators import load_rows  # not above: the parent would carry torch along for nothing

    wall, cpu = time.perf_counter(), time.process_time()
    if mode == "first row of a stream":
        rows = load_rows(path, streaming=True)
        found = next(iter(rows))
    else:
        rows = load_rows(path)
        found = rows[len(rows) - 1]
    assert found["messages"]
    return {
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    result = {"rows": args.rows, "pictures": args.pictures, "cpu_cores": os.cpu_count(), "files": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder, "pictures"), args.pictures)
        for suffix in (".jsonl", ".json"):
            path = Path(folder, f"train{suffix}")
            write_rows(path, args.rows, args.pictures)
            figures = {"gb": round(path.stat().st_size / 1e9, 2)}
            for mode in MODES:
                child = subprocess.run(
                    [sys.executable, __file__, "--measure", mode, path],
                    env=os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache", "TMPDIR": folder},
                    stdout=subprocess.PIPE,
                    check=True,
                )
                figures[mode] = json.loads(child.stdout.splitlines()[-1])
                print(suffix, mode, figures[mode], flush=True)
            result["files"][suffix] = figures
            path.unlink()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
