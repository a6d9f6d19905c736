"""Build a LLaVA from a vision tower and a language model, with a fresh two-layer MLP projector between them.

Trains: nothing. Both parts are carried over unchanged, which is checked tensor by tensor on a reload from disk.
Data: none. A made-up picture and text run through the model to prove what was derived from the parts.
Result: tested with tiny CLIP and SigLIP towers and Llama, Mistral and Qwen2 models; not measured yet at 7B.

    python recipes/build_llava.py --vision_tower openai/clip-vit-large-patch14-336 \
        --language_model lmsys/vicuna-7b-v1.5 --allow_pickled_weights --output_dir outputs/llava-init
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import rich
from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor, set_seed
from transformers.hf_argparser import HfArg
from trl import TrlParser

from _assembly import assemble, check_picture, check_saved, count_extra_tokens, load_parts
from _parts import part_table
from _processor import square_image_processor
from _projector import load_projector
from collators import LlavaDataCollator, chat_template_path, tag_images


@dataclass
class BuildArguments:
    vision_tower: str = HfArg(help="CLIP, SigLIP or another plain ViT, alone or with its text tower: hub id or folder")
    language_model: str = HfArg(help="causal language model: hub id or folder")
    output_dir: str = HfArg(help="where the model and its processor are written")
    projector: str | None = HfArg(default=None, help="stage 1's projector or LLaVA's mm_projector.bin: file or folder")
    projector_hidden_act: str = HfArg(default="gelu", help="activation between the projector's two layers")
    vision_feature_layer: int = HfArg(default=-2, help="hidden state of the tower that the projector reads")
    vision_feature_select_strategy: Literal["default", "full"] | None = HfArg(default=None, help="unset: from tower")
    image_aspect_ratio: Literal["pad", "crop", "resize"] = HfArg(default="pad", help="how a picture becomes square")
    image_tag_format: str | None = HfArg(default=None, help="'<im_start>{}<im_end>': tokens put around each picture")
    chat_template: str = HfArg(default="vicuna_v1", help="one of collators/chat_templates/, or path to a .jinja file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(default="auto", help="auto: exact for both parts")
    allow_pickled_weights: bool = HfArg(default=False, help="load weights that are no safetensors")
    seed: int = HfArg(default=42, help="of the projector and of the new embedding rows")
    overwrite: bool = HfArg(default=False, help="write into an output_dir that is not empty")


def make_parser() -> TrlParser:
    return TrlParser((BuildArguments,), allow_abbrev=False)


def make_tokenizer(options: BuildArguments):
    """Give the language model's tokenizer `<image>`, the words of the image tags, and a pad token if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.language_model, trust_remote_code=False)
    except (OSError, ValueError) as error:  # whose message may lack the name, or ask for tiktoken instead
        hint = "a tokenizer.model without tokenizer.json needs the packages sentencepiece and protobuf"
        raise OSError(f"{options.language_model}: no tokenizer could be loaded ({error}); {hint}") from error
    tags = (options.image_tag_format or "").partition("{}")[::2]  # as LLaVA's mm_use_im_start_end adds them
    tokenizer.add_tokens(["<image>", *filter(None, tags)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def make_processor(options: BuildArguments, tower, tokenizer) -> LlavaProcessor:
    """Derive from the tower how a picture is prepared and how many tokens it becomes."""
    extra = count_extra_tokens(tower, options.vision_feature_layer)
    strategy = options.vision_feature_select_strategy or ("default" if extra else "full")
    if strategy == "default" and not extra:
        raise ValueError("vision_feature_select_strategy default would lose a patch: the tower has no CLS; pass full")
    own = AutoImageProcessor.from_pretrained(options.vision_tower, trust_remote_code=False)
    image_processor = square_image_processor(options.image_aspect_ratio, tower.config.image_size, own)
    return LlavaProcessor(
        image_processor, tokenizer, tower.config.patch_size, strategy, num_additional_image_tokens=extra
    )


def main(argv=None):
    (options,) = make_parser().parse_args_and_config(argv)
    if not options.overwrite and any(Path(options.output_dir).glob("*")):
        raise FileExistsError(f"{options.output_dir} is not empty: choose another --output_dir or pass --overwrite")
    set_seed(options.seed)
    tokenizer = make_tokenizer(options)
    parts = load_parts(options.vision_tower, options.language_model, options.dtype, options.allow_pickled_weights)
    processor = make_processor(options, parts[0], tokenizer)
    name = options.chat_template
    processor.chat_template = (Path(name) if name.endswith(".jinja") else chat_template_path(name)).read_text("utf-8")
    if options.image_tag_format:
        processor.chat_template = tag_images(processor, processor.chat_template, options.image_tag_format)
    model = assemble(*parts, processor, options.vision_feature_layer, options.projector_hidden_act)
    if options.projector:
        load_projector(model, options.projector)
    tokens = model.config.image_seq_length = check_picture(model, processor)
    LlavaDataCollator(processor, stop_token_ids=model.generation_config.eos_token_id)  # checks the chat template

    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    projector, stops = model.model.multi_modal_projector, model.generation_config.eos_token_id
    del parts, model  # the check needs two copies of a 7B model, not three
    parts = load_parts(options.vision_tower, options.language_model, options.dtype, options.allow_pickled_weights)
    saved = check_saved(options.output_dir, *parts, projector).requires_grad_(False)

    rich.print(part_table(saved, {}))
    print(
        f"pictures: {options.image_aspect_ratio} to {saved.config.vision_config.image_size} pixels, patches of "
        f"{processor.patch_size}, {processor.num_additional_image_tokens} further tokens, select strategy "
        f"{processor.vision_feature_select_strategy}: {tokens} image tokens each\n"
        f"text: {len(tokenizer)} tokens in {saved.config.text_config.vocab_size} rows, {tokenizer.pad_token} pads, "
        f"{' '.join(tokenizer.convert_ids_to_tokens(stops))} stops\n"
        f"next: python recipes/pretrain_projector.py --model_name_or_path {options.output_dir} --dataset_name "
        "captions.json --image_folder images --output_dir outputs/llava-stage1"
    )


if __name__ == "__main__":
    main()
