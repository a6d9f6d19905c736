"""Loads an adapter strictly, judges a merge by its logits, reads a checkpoint back: what `merge_adapter.py` stands on.

A file of its own beside its only user: a recipe has at most 120 lines, and each of these steps is there because a
library does it in silence (peft warns about missing keys and drops unexpected ones; a half-merged model saves well).
"""

import gc
import json
import logging
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from httpx2 import HTTPError  # what huggingface_hub lets through when there is no network
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from _parts import find_part, list_misfits
from _weights import safe_weights
from collators import load_image, load_rows, read_row

logger = logging.getLogger(__name__)

# Root mean square of the difference that a right merge may show, as a share of that of the logits. Random models of 2
# to 32 layers, with LoRA and DoRA of several sizes, gave at most 1.3e-6, 0.0045 and 0.026 (CPU); one more, trained for
# a few steps, 0.072 in bfloat16. The bounds leave room for wider models: in the 16-bit dtypes they are 32 times the
# distance between 1 and the next number.
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}


def clear_place(output_dir: str) -> Path:
    """Resolve the folder that is to be made, and remove an empty one that stands there.

    At the beginning rather than at the end, where a folder that cannot be replaced would cost the whole work.

    Raises:
        OSError: there is something else, a folder that is not empty, the current one, or a mount point.
    """
    output = Path(output_dir).resolve()
    if output.exists():
        if output == Path.cwd() or not output.is_dir() or any(output.iterdir()):
            raise FileExistsError(f"{output} is not empty, or the current folder: choose another --output_dir")
        output.rmdir()
    return output


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """Read what `trainer.save_model()` of a LoRA or DoRA run wrote.

    Raises:
        FileNotFoundError: no adapter in `folder`.
        ValueError: an adapter of another kind.
    """
    weights = any(Path(folder, name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if not (weights and Path(folder, CONFIG_NAME).is_file()):
        raise FileNotFoundError(
            f"{folder} holds no {CONFIG_NAME} with {SAFETENSORS_WEIGHTS_NAME}: expected the output folder, or a "
            "checkpoint-N folder, of a run that trained an adapter"
        )
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{folder} is a {config.peft_type.value} adapter: expected LoRA or DoRA")
    return config


def load_base(
    base: str, dtype: str = "auto", revision: str | None = None, allow_pickled_weights: bool = False
) -> PreTrainedModel:
    """Load the model that an adapter goes onto, unquantised, on the CPU.

    Args:
        base: hub id or folder.
        dtype: as for `from_pretrained`; `"auto"` is the checkpoint's own.
        revision: of a hub id.
        allow_pickled_weights: load weights that are no safetensors, too.

    Raises:
        OSError: no such checkpoint.
        ValueError: a quantised checkpoint, one that lacks weights, one in other files than safetensors, or no Llava.
    """
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise OSError(
            f"the base {base} is neither a checkpoint folder here nor to be had from the hub ({error}): pass --base "
            "with the model that the adapter was trained on"
        ) from error
    if (quantisation := getattr(config, "quantization_config", None)) is not None:
        method = quantisation["quant_method"] if isinstance(quantisation, dict) else quantisation.quant_method
        raise ValueError(
            f"the base {base} is quantised ({method}), and merging into rounded weights rounds the adapter away: pass "
            "--base with the unquantised checkpoint that it was made of"
        )
    options = {"dtype": dtype, "revision": revision, **safe_weights(base, revision, allow_pickled_weights)}
    model, report = AutoModelForImageTextToText.from_pretrained(
        base, config=config, output_loading_info=True, trust_remote_code=False, **options
    )
    if report["missing_keys"]:
        raise ValueError(
            f"{base} lacks {len(report['missing_keys'])} weights of {type(model).__name__}, such as "
            f"{min(report['missing_keys'])}, which would stay random: expected the whole model"
        )
    find_part(model, "multi_modal_projector")
    return model.eval()


def load_adapter(model: PreTrainedModel, folder: str | Path, allow_pickled_weights: bool = False) -> PeftModel:
    """Put an adapter onto a model such that every tensor of its file lands, and none that it should have is missing.

    Adapters of older transformers load too: below 4.52 the parts of a Llava did not lie below `model.`, below 5 CLIP
    and SigLIP had a `vision_model` level. peft 0.21 renames the keys of such LoRA layers, but not those of a projector
    (KeyError) nor the names that the config matches; here, both are brought to today's names. An old config matches
    the modules by the names that they had then, so it picks those that it picked then.

    Args:
        model: the unquantised base; its layers are replaced in place.
        folder: as for `read_adapter_config`.
        allow_pickled_weights: load an `adapter_model.bin`, too.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, all listed; or no safetensors.
    """
    config = read_adapter_config(folder)
    safe_weights(folder, allow_pickled=allow_pickled_weights, with_base=False)  # `load_base` loads that
    tensors = {_todays_key(key): tensor for key, tensor in load_peft_weights(str(folder), device="cpu").items()}
    _match_todays_names(config, model, {key.partition(".lora_")[0] for key in tensors if ".lora_" in key})
    config.base_model_name_or_path = None  # peft would warn that it is renamed
    config.inference_mode = True
    model = get_peft_model(model, config)

    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if faults := list_misfits(tensors, expected):
        lines = "\n  ".join(faults)
        raise ValueError(
            f"the adapter in {folder} does not fit {config.target_modules!r} of this base:\n  {lines}\n"
            "Pass the --base that it was trained on; if that is right, its file is cut, of another run, or has "
            "adapters on embeddings or lm_head, which are not supported."
        )
    set_peft_model_state_dict(model, tensors)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if lost := [key for key in tensors if not torch.equal(loaded[key], tensors[key].to(loaded[key]))]:
        raise ValueError(f"peft did not load {', '.join(lost)} of {folder}")
    return model.eval()


def check_whole_modules(model: PreTrainedModel, folder: str | Path) -> None:
    """Compare what was trained whole (the projector) with the adapter's file, tensor for tensor, after the merge.

    The logits alone would not do: in bfloat16 a projector that trained for a few steps hides in the rounding. What the
    merged model's dtype rounds is logged.

    Raises:
        ValueError: a tensor of the merged model is another than the file's in the model's dtype.
    """
    parameters = dict(model.named_parameters())
    for key, tensor in load_peft_weights(str(folder), device="cpu").items():
        name = _todays_key(key).removeprefix("base_model.model.")
        if name not in parameters:
            continue
        rounded = tensor.to(parameters[name].dtype)
        if not torch.equal(parameters[name].cpu(), rounded):
            raise ValueError(f"{name} of the merged model is not the one in {folder}. Nothing was written.")
        if not torch.equal(rounded.to(tensor), tensor):
            logger.warning("%s: rounded from %s to the base's %s", name, tensor.dtype, rounded.dtype)


def first_row(dataset_name: str, image_folder: str | None = None, allow_external_images: bool = False) -> dict:
    """The first row with a picture, so that vision tower and projector are compared too; without any, the first."""
    rows = load_rows(dataset_name, image_folder=image_folder, allow_external_images=allow_external_images)
    return next((row for row in rows if row["images"]), rows[0])


def encode(processor: ProcessorMixin, row: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Turn a whole conversation, answers included, into what the model takes, on its device and in its dtype."""
    conversation = read_row(row, processor.image_token)
    images = [load_image(source) for source in conversation["images"]]
    return processor.apply_chat_template(
        [conversation["messages"]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": [images]} if images else {},
    ).to(model.device, model.dtype)


@torch.no_grad()
def compute_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the positions that are not padding: float32 on the CPU, `(tokens, vocabulary)`."""
    return model(**inputs).logits[inputs["attention_mask"].bool()].float().cpu()


def judge_merge(base: torch.Tensor, adapted: torch.Tensor, merged: torch.Tensor, dtype: torch.dtype) -> str:
    """Compare a merged model with its adapter model, and refuse what rounding does not explain.

    Both models compute the same function in exact arithmetic: W x + B A x and (W + B A) x. In a real dtype each
    differs from it by its own roundings, which grow with the size of the logits and with the dtype's precision
    (`ROUNDING`), not with what the adapter learnt. So two rules, in root mean squares over all logits: the difference
    is within the dtype's roundings; and it is below half of the adapter's effect, the difference between the adapter
    model and the base, so that what was learnt outweighs it. The second is what catches a merge that did nothing: its
    difference is the whole effect. In a 16-bit dtype one wrong layer of many may pass both; in float32 it does not.
    (`check_whole_modules` compares the projector exactly.)

    Args:
        base: Logits `(tokens, vocabulary)` with the adapter off.
        adapted: Logits with the adapter beside its layers.
        merged: Logits with the adapter merged into them.
        dtype: what the models computed in.

    Returns:
        One line on the difference.

    Raises:
        ValueError: the difference is not explained by rounding, or outweighs the adapter; the adapter has no effect on
            the row; or logits are not finite.
    """
    for name, logits in (("base", base), ("adapter model", adapted), ("merged model", merged)):
        if not logits.isfinite().all():
            raise ValueError(f"the {name}'s logits are not finite in {_name(dtype)}: pass another --dtype")
    difference, effect, size = _rms(merged - adapted), _rms(adapted - base), _rms(adapted)
    agree = (merged.argmax(-1) == adapted.argmax(-1)).float().mean()
    line = (
        f"merged and adapter model, {_name(dtype)}, {len(merged)} positions: largest difference of a logit "
        f"{(merged - adapted).abs().max():.3g}, same most likely token at {agree:.1%}; root mean squares: difference "
        f"{difference:.3g}, adapter's effect {effect:.3g}, logits {size:.3g}"
    )
    if difference > ROUNDING[dtype] * size:
        raise ValueError(
            f"{line}. The difference is more than the {ROUNDING[dtype]:g} of the logits that rounding takes: the "
            "merged model is not the one that was trained. If --dtype float32 merges it, it was rounding after all. "
            "Nothing was written."
        )
    if effect == 0:
        raise ValueError(f"{line}. The adapter changes nothing on this row: was it trained? Nothing was written.")
    if difference >= effect / 2:
        raise ValueError(
            f"{line}. The difference is not below half of the adapter's effect on this row, so the merge would lose "
            "what was learnt: pass --dtype float32, or a row that the adapter was trained for. Nothing was written."
        )
    return line


def check_saved(folder: Path, row: dict, inputs: dict, logits: torch.Tensor, processor, model_kind: type, generation):
    """Load a checkpoint in a fresh process with the stock auto classes, and compare it with what was to be written.

    Args:
        folder: the checkpoint.
        row: as `first_row` gives it; the saved processor encodes it again.
        inputs: of the processor in memory.
        logits: of the model in memory.
        processor: the one in memory.
        model_kind: the class of the model in memory.
        generation: its generation config.

    Raises:
        ValueError: what was read differs; the message says in what.
    """
    gc.collect()  # a merged PeftModel is a cycle of references
    torch.cuda.empty_cache()
    device = str(inputs["input_ids"].device)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(_read_back, folder, row, device).result()
    wanted = {
        "class": model_kind.__name__,
        "input_ids": inputs["input_ids"].tolist(),
        "chat template": processor.chat_template,
        "stop tokens": generation.eos_token_id,
        "pad token": generation.pad_token_id,
    }
    differs = [name for name, value in wanted.items() if found[name] != value]
    if not torch.equal(torch.from_numpy(found["logits"]), logits):
        differs.append("logits")
    if differs:
        raise ValueError(
            f"read back in a fresh process, the checkpoint has other {', '.join(differs)}: it is discarded"
        )


def write_legacy_files(processor: ProcessorMixin, folder: Path) -> None:
    """Add to a checkpoint what transformers 4, and engines built on it, look for; transformers 5 reads it as before.

    - `preprocessor_config.json`, whose content transformers 5 keeps in `processor_config.json`. LLaVA-1.5's class
      there is `CLIPImageProcessor`, which does the same as `LlavaImageProcessor` without padding.
    - The tokenizer class `PreTrainedTokenizerFast`, which transformers 5 calls `TokenizersBackend`.
    - `rope_theta` and `rope_scaling`, which transformers 5 keeps in `rope_parameters`: transformers 4.57 takes 10000
      without a word when `rope_theta` is missing, which is wrong for Mistral and Qwen2.
    - The `vision_model` level in the names of a CLIP or SigLIP tower that was built on transformers 5: 4.57 leaves the
      whole tower random without it, with a warning.
    """
    image_processor = json.loads(processor.image_processor.to_json_string())
    image_processor["processor_class"] = type(processor).__name__
    if image_processor["image_processor_type"] == "LlavaImageProcessor" and not image_processor.get("do_pad"):
        image_processor["image_processor_type"] = "CLIPImageProcessor"
    _write_json(folder / "preprocessor_config.json", image_processor)

    tokenizer = _read_json(folder / "tokenizer_config.json")
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        _write_json(folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})

    config = _read_json(folder / "config.json")
    rope = config["text_config"].get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
            config["text_config"]["rope_scaling"] = scaling
    _write_json(folder / "config.json", config)

    if config["vision_config"]["model_type"] not in ("clip_vision_model", "siglip_vision_model"):
        return
    for file in folder.glob("*.safetensors"):
        save_file({_legacy_name(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        content = _read_json(index)
        content["weight_map"] = {_legacy_name(name): file for name, file in content["weight_map"].items()}
        _write_json(index, content)


def upload(folder: Path, repo_id: str) -> str:
    """Upload a checkpoint; a repository that does not exist yet becomes a private one.

    Returns:
        The address of the commit.

    Raises:
        OSError: it did not work, which leaves the folder as it is.
    """
    try:
        HfApi().create_repo(repo_id, private=True, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repo_id, folder_path=folder))
    except (OSError, ValueError, HTTPError) as error:
        raise OSError(
            f"{folder} is complete, but could not be uploaded to {repo_id} ({error}): once that is mended, run "
            f"hf upload {repo_id} {folder}"
        ) from None


def _legacy_name(name: str) -> str:
    return re.sub(r"(^|\.)vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model.", name)


def _read_back(folder: Path, row: dict, device: str) -> dict:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device)
    inputs = encode(processor, row, model)
    return {
        "class": type(model).__name__,
        "input_ids": inputs["input_ids"].tolist(),
        "chat template": processor.chat_template,
        "stop tokens": model.generation_config.eos_token_id,
        "pad token": model.generation_config.pad_token_id,
        "logits": compute_logits(model, inputs).numpy(),
    }


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _todays_key(key: str) -> str:
    """`base_model.model.language_model.model.layers.0…` -> `base_model.model.model.language_model.layers.0…`."""
    name = key.removeprefix("base_model.model.")
    name = re.sub(r"^language_model\.lm_head\b", "lm_head", name)
    name = re.sub(r"^language_model\.model\b", "model.language_model", name)
    name = re.sub(r"^(vision_tower|multi_modal_projector)\b", r"model.\1", name)
    name = re.sub(r"^model\.vision_tower\.vision_model\b", "model.vision_tower", name)
    return f"base_model.model.{name}"


def _name_4_52(name: str) -> str:
    return re.sub(r"^model\.vision_tower\b", "model.vision_tower.vision_model", name)


def _name_4(name: str) -> str:
    name = re.sub(r"^lm_head\b", "language_model.lm_head", _name_4_52(name))
    name = re.sub(r"^model\.language_model\b", "language_model.model", name)
    return re.sub(r"^model\.(vision_tower|multi_modal_projector)\b", r"\1", name)


def _match_todays_names(config: PeftConfig, model: torch.nn.Module, adapted: set[str]) -> None:
    """Name the modules in `config` one by one if its patterns fit `adapted` by the names of an older transformers."""
    names = [name for name, _ in model.named_modules() if name]
    for old_name in (str, _name_4_52, _name_4):
        matched = [name for name in names if check_target_module_exists(config, old_name(name))]
        if {f"base_model.model.{name}" for name in matched} == adapted:
            break
    else:
        return  # peft or the comparison of keys will say what does not fit
    if old_name is str:
        return
    for patterns in ("rank_pattern", "alpha_pattern"):
        old = getattr(config, patterns)
        found = {name: old.get(get_pattern_key(old, old_name(name))) for name in matched}
        setattr(config, patterns, {re.escape(name): value for name, value in found.items() if value is not None})
    config.target_modules = set(matched)
    config.exclude_modules = None  # it is about the old names, too


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
