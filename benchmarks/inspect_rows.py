"""Measure how long the doctor takes for a file of 100,000 rows, with and without a look at the pictures' headers.

    python benchmarks/inspect_rows.py

Writes a file of --rows rows of about 1 KB (as open_rows.py does) over --pictures distinct 640×480 JPEGs, and a tiny
checkpoint whose tokenizer has --vocabulary tokens of that text, to a temporary folder; runs `recipes/inspect_data.py`
on it as a process of its own, on one core, and deletes it. Seconds are wall and CPU of the whole process, start and
imports included.
"""

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from open_rows import TEXT, write_rows
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from collators import chat_template_path

MODES = {"texts and paths": "none", "picture headers": "headers"}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=10_000, help="distinct picture files")
    today = datetime.date.today().isoformat()
    parser.add_argument("--output", default=f"benchmarks/results/inspect_rows_cpu_{today}.json")
    return parser


def write_pictures(folder, count):
    folder.mkdir()
    noise = np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
    image.save(folder / "000000.png", "JPEG")  # the name that open_rows gives; Pillow goes by content
    data = (folder / "000000.png").read_bytes()
    for number in range(1, count):
        (folder / f"{number:06}.png").write_bytes(data)
    return len(data)


def write_checkpoint(folder):
    """A tiny Llava with 576 image tokens a picture and a tokenizer of whole words, as a real one has for such text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **size),
            text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **size),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    square = {"height": 336, "width": 336}
    processor = LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size=square),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template_path("vicuna_v1").read_text("utf-8"),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(argv=None):
    args = make_parser().parse_args(argv)
    result = {"rows": args.rows, "pictures": args.pictures, "modes": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        result["bytes_a_picture"] = write_pictures(folder / "pictures", args.pictures)
        write_rows(folder / "train.jsonl", args.rows, args.pictures)
        write_checkpoint(folder / "checkpoint")
        for mode, pictures in MODES.items():
            report = folder / "report.json"
            command = [sys.executable, "recipes/inspect_data.py", "--model_name_or_path", folder / "checkpoint"]
            command += ["--dataset_name", folder / "train.jsonl", "--pictures", pictures, "--json", report]
            command += ["--use_cpu", "True", "--bf16", "False"]
            before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(
                ["taskset", "-c", "0", *map(str, command)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found = json.loads(report.read_text("utf-8"))
            result["modes"][mode] = {
                "wall_seconds": round(wall, 1),
                "cpu_seconds": round(cpu, 1),
                "milliseconds_a_row": round(1000 * wall / args.rows, 3),
                "peak_gb": round(after.ru_maxrss * 1024 / 1e9, 2),
                "median_tokens": found["lengths"]["tokens"]["p50"],
                "findings": [finding["code"] for finding in found["findings"]],
            }
            print(mode, result["modes"][mode], flush=True)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
