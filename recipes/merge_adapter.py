"""Merge an adapter, its projector and the base into one checkpoint that stock classes load.

The base is loaded unquantised, also after training in 4 bits. Every tensor of the adapter must land on a layer. A real
row goes through base, adapter model and merged model; what rounding does not explain is refused. The checkpoint is
then read back in a fresh process, must give the same logits to the last bit, and only then gets its name.

    python recipes/merge_adapter.py --adapter outputs/llava-qlora --dataset_name data/train.json \
        --output_dir outputs/llava-merged
    python recipes/merge_adapter.py --base outputs/llava-init --projector mm_projector.bin \
        --dataset_name data/train.json --output_dir outputs/llava-stage1

Needs memory for the base once (7B in bfloat16: 14 GB) and for the adapter, which is merged in place. The form of a
projector goes by its name: `x.safetensors` ours, `x.bin` LLaVA's mm_projector.bin, `model.safetensors` xtuner's.
Tested with tiny models on a CPU, where merged and adapter models answer alike; not run at 7B or on a GPU.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoProcessor

from _merging import (
    check_saved,
    check_whole_modules,
    clear_place,
    compute_logits,
    encode,
    first_row,
    judge_merge,
    load_adapter,
    load_base,
    read_adapter_config,
    upload,
    write_legacy_files,
)
from _projector import load_projector, save_projector
from _trainer import check_generation_config, stop_token_ids


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--adapter", help="local output folder of a run that trained an adapter")
    parser.add_argument("--base", help="hub id or folder, not quantised; default: what the adapter was trained on")
    parser.add_argument("--projector", help="put this one into the base first; with or without an --adapter")
    parser.add_argument("--dataset_name", required=True, help="LLaVA JSON; one row of it is compared")
    parser.add_argument("--image_folder", help="where relative picture paths start; default: the JSON file's folder")
    parser.add_argument("--output_dir", required=True, help="new or empty folder for the checkpoint")
    parser.add_argument("--save_projector", help="write the merged projector alone, too, in the form of this name")
    parser.add_argument("--allow_external_images", action="store_true", help="accept pictures outside of that folder")
    parser.add_argument("--allow_pickled_weights", action="store_true", help="load weights that are no safetensors")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="as base")
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu")
    parser.add_argument("--max_shard_size", default="5GB", help="of a weights file")
    parser.add_argument("--legacy_files", action="store_true", help="add what engines on transformers 4 read")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload, too; a new repository is private")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    config = read_adapter_config(args.adapter) if args.adapter else None
    base = args.base or (config and config.base_model_name_or_path)
    if not base or not (args.adapter or args.projector):
        raise ValueError("expected an --adapter, or a --projector, and the --base where no adapter names it")
    if args.projector and config and any("multi_modal_projector" in name for name in config.modules_to_save or []):
        raise ValueError(f"{args.adapter} brings the projector that it was trained with: drop --projector")
    output = clear_place(args.output_dir)
    row = first_row(args.dataset_name, args.image_folder, args.allow_external_images)
    own_processor = args.adapter and list(Path(args.adapter).glob("*processor_config.json"))
    source = args.adapter if own_processor else base
    revision = None if args.base else config.revision
    options = {"trust_remote_code": False, "revision": None if own_processor else revision}
    processor = AutoProcessor.from_pretrained(source, **options)

    model = load_base(base, args.dtype, revision, args.allow_pickled_weights)
    check_generation_config(model)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{base}: {size:.3g} GB in memory ({model.dtype}), merged in place, as much on disk; processor: {source}")
    model.to(device)
    inputs = encode(processor, row, model)
    if args.projector:
        load_projector(model, args.projector)
    if args.adapter:
        model = load_adapter(model, args.adapter, args.allow_pickled_weights)
        adapted = compute_logits(model, inputs)
        with model.disable_adapter():
            plain = compute_logits(model, inputs)
        model = model.merge_and_unload(safe_merge=True)
        check_whole_modules(model, args.adapter)
    logits = compute_logits(model, inputs)
    if args.adapter:
        print(judge_merge(plain, adapted, logits, model.dtype))

    model.generation_config.eos_token_id = stop_token_ids(model, processor)
    if processor.tokenizer.pad_token_id is not None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}-unfinished-", dir=output.parent) as unfinished:
        folder = Path(unfinished, output.name)
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        processor.save_pretrained(folder)
        if args.legacy_files:
            write_legacy_files(processor, folder)
        kind, generation = type(model), model.generation_config
        del model  # the fresh process needs the memory
        check_saved(folder, row, inputs, logits, processor, kind, generation)
        folder.replace(output)
    stops = " ".join(processor.tokenizer.convert_ids_to_tokens(generation.eos_token_id))
    print(f"{output}: read back in a fresh process as {kind.__name__}, same logits, chat template, stops at {stops}")
    if args.save_projector:
        print(f"projector: {save_projector(load_base(str(output)), args.save_projector)}")
    if args.push_to_hub:
        print(upload(output, args.push_to_hub))


if __name__ == "__main__":
    main()
