"""Loads an adapter strictly, judges a merge by its logits, reads a checkpoint back: what `merge_adapter.py` stands on.

A file of its own beside its only user: a recipe has at most 120 lines, and each of these steps is there because a
library does it in silence (peft warns about missing keys and drops unexpected ones; a half-merged model saves well).
"""

import gc
import json
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from httpx2 import HTTPError  # what huggingface_hub lets through when there is no network
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from _parts import find_part
from collators import load_image, load_rows, read_row

# Root mean square of the difference that a right merge may show, as a share of that of the logits. Random models of 2
# to 32 layers, with LoRA and DoRA of several sizes, gave at most 1.3e-6, 0.0045 and 0.026 (CPU); the bounds leave room
# for longer sums: in the 16-bit dtypes they are 16 times the distance between 1 and the next number.
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.016, torch.bfloat16: 0.125}


def read_adapter_config(folder: str | Path) -> PeftConfig:
    """Read what `trainer.save_model()` of a LoRA or DoRA run wrote.

    Raises:
        FileNotFoundError: no adapter in `folder`.
        ValueError: an adapter of another kind.
    """
    if not Path(folder, "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter_config.json: expected the output folder, or a checkpoint-N folder, of a run "
            "that trained an adapter"
        )
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{folder} is a {config.peft_type.value} adapter: expected LoRA or DoRA")
    return config


def load_base(base: str, dtype: str = "auto", revision: str | None = None) -> PreTrainedModel:
    """Load the model that an adapter goes onto, unquantised, on the CPU.

    Args:
        base: hub id or folder.
        dtype: as for `from_pretrained`; `"auto"` is the checkpoint's own.
        revision: of a hub id.

    Raises:
        OSError: no such checkpoint.
        ValueError: a quantised checkpoint, one that lacks weights, or no Llava.
    """
    try:
        config = AutoConfig.from_pretrained(base, revision=revision)
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
    model, report = AutoModelForImageTextToText.from_pretrained(
        base, config=config, revision=revision, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(
            f"{base} lacks {len(report['missing_keys'])} weights of {type(model).__name__}, such as "
            f"{min(report['missing_keys'])}, which would stay random: expected the whole model"
        )
    find_part(model, "multi_modal_projector")
    return model.eval()


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put an adapter onto a model such that every tensor of its file lands, and none that it should have is missing.

    Adapters of older transformers load too: below 4.52 the parts of a Llava did not lie below `model.`, below 5 CLIP
    and SigLIP had a `vision_model` level. peft 0.21 renames the keys of such LoRA layers, but not those of a projector
    (KeyError) nor the names that the config matches; here, both are brought to today's names. An old config matches
    the modules by the names that they had then, so it picks those that it picked then.

    Args:
        model: the unquantised base; its layers are replaced in place.
        folder: as for `read_adapter_config`.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, all listed.
    """
    config = read_adapter_config(folder)
    tensors = {_todays_key(key): tensor for key, tensor in load_peft_weights(str(folder), device="cpu").items()}
    _match_todays_names(config, model, {key.partition(".lora_")[0] for key in tensors if ".lora_" in key})
    config.base_model_name_or_path = None  # peft would warn that it is renamed
    config.inference_mode = True
    model = get_peft_model(model, config)

    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    faults = [f"missing: {key} {tuple(expected[key].shape)}" for key in expected if key not in tensors]
    faults += [f"unexpected: {key} {tuple(tensors[key].shape)}" for key in tensors if key not in expected]
    faults += [
        f"wrong shape: {key} is {tuple(tensors[key].shape)}, the model's is {tuple(expected[key].shape)}"
        for key in expected
        if key in tensors and tensors[key].shape != expected[key].shape
    ]
    if faults:
        lines = "\n  ".join(faults)
        raise ValueError(
            f"the adapter in {folder} does not fit {config.target_modules!r} of this base:\n  {lines}\n"
            "Pass the --base that it was trained on; if that is right, its file is cut or of another run."
        )
    set_peft_model_state_dict(model, tensors)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if lost := [key for key in tensors if not torch.equal(loaded[key], tensors[key].to(loaded[key]))]:
        raise ValueError(f"peft did not load {', '.join(lost)} of {folder}")
    return model.eval()


def first_row(dataset_name: str, image_folder: str | None = None) -> dict:
    """The first row with a picture, so that vision tower and projector are compared too; without any, the first."""
    rows = load_rows(dataset_name, image_folder=image_folder)
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

    Args:
        base: Logits `(tokens, vocabulary)` with the adapter off.
        adapted: Logits with the adapter beside its layers.
        merged: Logits with the adapter merged into them.
        dtype: what the models computed in.

    Returns:
        One line on the difference.

    Raises:
        ValueError: the difference is not explained by rounding, outweighs the adapter, or the logits are not finite.
    """
    if not merged.isfinite().all():
        raise ValueError(f"the merged model's logits are not finite in {_name(dtype)}: pass another --dtype")
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
            "merged model is not the one that was trained. Nothing was written."
        )
    if difference > effect / 2:
        raise ValueError(
            f"{line}. The difference is more than half of the adapter's effect on this row, so the merge would lose "
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


def write_legacy_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Write beside the processor's files what transformers 4, and engines built on it, read in their place.

    They look for `preprocessor_config.json` (transformers 5 puts it into `processor_config.json` and reads it from
    there still), in which LLaVA-1.5's own class is `CLIPImageProcessor`, and do not know the tokenizer class
    `TokenizersBackend` (huggingface/transformers 5), which is `PreTrainedTokenizerFast` under a new name.
    """
    config = json.loads(processor.image_processor.to_json_string())
    config["processor_class"] = type(processor).__name__
    if config["image_processor_type"] == "LlavaImageProcessor" and not config.get("do_pad"):
        config["image_processor_type"] = "CLIPImageProcessor"  # the same steps, known to every version
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        ) from error


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
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
