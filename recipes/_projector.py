"""Moves the projector alone between models, in the file forms of three code bases.

- a folder, or `<name>.safetensors`: our own, for any class. Keys `linear_1.weight`, … and `image_newline` where there
  is one; a folder gets a `projector.safetensors`.
- `<name>.bin`: LLaVA's `mm_projector.bin`. Keys `model.mm_projector.0.weight`, … and `model.image_newline`.
- `model.safetensors`: xtuner's `projector/` folder, with its `config.json`. Keys `model.0.weight`, …

The path's name says which form is written; a file's keys say which one is read. Tensors keep their values and, when
written, their dtype. LLaVA's and xtuner's projectors are an `nn.Sequential(Linear, activation, Linear)`, LLaVA's with
GELU; both by the code of haotian-liu/LLaVA (c121f04) and InternLM/xtuner (projector/modeling_projector.py).

A file of its own beside `_parts.py`: three recipes move projectors, and none that freezes parts needs to know how.
"""

import json
import logging
import pickle
import re
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from _distributed import whole_tensors
from _parts import find_part, list_misfits

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "projector.safetensors"
LLAVA_FILE = "mm_projector.bin"
XTUNER_FILES = ("model.safetensors", "pytorch_model.bin")
# Key within the projector -> place in the nn.Sequential of LLaVA and xtuner.
PLACES = {
    f"{layer}.{name}": f"{i}.{name}" for layer, i in (("linear_1", 0), ("linear_2", 2)) for name in ("weight", "bias")
}
LLAVA_KEYS = {own: f"model.mm_projector.{place}" for own, place in PLACES.items()} | {
    "image_newline": "model.image_newline"
}
XTUNER_KEYS = {own: f"model.{place}" for own, place in PLACES.items()}


def save_projector(model: nn.Module, path: str | Path, write: bool = True) -> Path:
    """Write the projector alone, in the form that the path's name asks for (see above).

    xtuner's folder gets no `auto_map`: it would point to code files that are xtuner's own. `AutoModel` reads the
    folder once `xtuner.model.modules` is imported, as xtuner's own tools do.

    Args:
        model: any Llava class, bare or wrapped; of a PEFT `modules_to_save` copy the active one is written.
        path: see above. Not a folder that serves as a checkpoint: engines that read every `*.safetensors` of a
            checkpoint would trip over our own file.
        write: False on all processes but the one that writes. Of a sharded model (FSDP2, ZeRO-3) each process holds a
            slice, so all must call this.

    Returns:
        The file written.

    Raises:
        ValueError: the projector carries adapters, so its plain weights are not what was trained; or the form has no
            place for one of its tensors (VipLlava's layer norm; in xtuner's form LlavaNext's `image_newline`), or is
            of another activation.
        FileExistsError: xtuner's form would overwrite a `model.safetensors` or `config.json`, maybe a checkpoint's.
    """
    path = Path(path)
    file = path if path.suffix in (".safetensors", ".bin") else path / PROJECTOR_FILE
    tensors = whole_tensors(_projector_tensors(model))
    if not write:
        return file
    if file.suffix == ".bin":
        tensors = _rename(tensors, LLAVA_KEYS, f"LLaVA's {LLAVA_FILE}")
        if _activation(model) != "gelu" or len(tensors) < len(PLACES):
            raise ValueError(
                f"LLaVA's {LLAVA_FILE} is two linear layers with biases and GELU between them; this projector has the "
                f"activation {_activation(model)!r} and {', '.join(tensors)}: save it as {PROJECTOR_FILE}"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, file)
        return file
    config = None
    if file.name == XTUNER_FILES[0]:
        tensors = _rename(tensors, XTUNER_KEYS, "xtuner's projector folder")
        config = _xtuner_config(tensors, _activation(model))
        for existing in (file, file.with_name("config.json")):
            if existing.exists():
                raise FileExistsError(
                    f"{existing} exists, maybe a checkpoint's: give xtuner's form a folder of its own"
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
    if config:
        file.with_name("config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return file


def load_projector(model: nn.Module, path: str | Path) -> None:
    """Copy a projector from disk into the model, cast to the dtype that the model's own projector has.

    Args:
        model: changed in place.
        path: a file of one of the three forms, xtuner's older `pytorch_model.bin` included; or a folder that holds
            one of them, itself or (a stage 1 output) in its `projector` folder.

    Raises:
        FileNotFoundError: nothing at `path`, or a folder with none of these files.
        ValueError: several of these files in one folder, an unreadable one, one made for another activation, or
            missing, unexpected or wrongly shaped tensors. LlavaNext keeps its own `image_newline` where LLaVA's or
            xtuner's form has none, with a warning.
    """
    file = _projector_file(Path(path))
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file}: not a readable file of tensors ({type(error).__name__}): expected {PROJECTOR_FILE} as "
            f"stage 1 writes it, LLaVA's {LLAVA_FILE} or xtuner's {XTUNER_FILES[0]}; download or save it again"
        ) from error
    made_for = _file_activation(file, found)
    if made_for not in (None, _activation(model)):
        raise ValueError(
            f"{file} was trained with the activation {made_for!r}, the model's projector has {_activation(model)!r}: "
            f'build the model with "projector_hidden_act": "{made_for}"'
        )
    own_form = "linear_1.weight" in found
    found = {_own_name(name): tensor for name, tensor in found.items()}
    expected = _projector_tensors(model)
    if "image_newline" in expected and "image_newline" not in found and not own_form:
        logger.warning("%s has no image_newline (LLaVA's stage 1 saves none): the model keeps its own", file)
        del expected["image_newline"]

    if faults := list_misfits(found, expected):
        lines = "\n  ".join(faults)
        raise ValueError(
            f"{file} does not fit this model's projector:\n  {lines}\n"
            "Take a projector made for this vision tower, language model and class."
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])
    if rounded := sorted(name for name in expected if not torch.equal(expected[name].to(found[name]), found[name])):
        dtypes = f"{found[rounded[0]].dtype} to the model's {expected[rounded[0]].dtype}"
        logger.warning("%s: rounded from %s: %s", file, dtypes, ", ".join(rounded))


def _projector_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The live parameters by their name within the projector; LlavaNext's `image_newline` stands beside it."""
    projector = find_part(model, "multi_modal_projector")
    adapted = [name for name, module in projector.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"the projector carries adapters on {', '.join(adapted)}: merge them first (recipes/merge_adapter.py)"
        )
    tensors = dict(projector.named_parameters())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "image_newline":
            tensors["image_newline"] = parameter
    return tensors


def _projector_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a projector file or a folder that holds one")
    candidates = [PROJECTOR_FILE, LLAVA_FILE, f"projector/{PROJECTOR_FILE}"]
    # A checkpoint has a model.safetensors too: its config.json tells them apart.
    for folder in ("", "projector/"):
        if _is_xtuners(path / folder):
            candidates += [f"{folder}{name}" for name in XTUNER_FILES]
    files = [path / name for name in candidates if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{path} holds no projector: expected {', '.join(candidates[:3])}, or xtuner's folder with its config.json"
        )
    if len(files) > 1:
        raise ValueError(f"{path} holds several projectors ({', '.join(map(str, files))}): name one of these files")
    return files[0]


def _is_xtuners(folder: Path) -> bool:
    return _read_config(folder).get("model_type") == "projector"


def _read_config(folder: Path) -> dict:
    config = folder / "config.json"
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def _xtuner_config(tensors: dict[str, torch.Tensor], activation: str) -> dict:
    """What xtuner's `ProjectorConfig` reads."""
    llm_hidden_size, visual_hidden_size = tensors["model.0.weight"].shape
    return {
        "architectures": ["ProjectorModel"],
        "bias": "model.0.bias" in tensors,
        "depth": 2,
        "hidden_act": activation,
        "llm_hidden_size": llm_hidden_size,
        "model_type": "projector",
        "torch_dtype": str(tensors["model.0.weight"].dtype).removeprefix("torch."),
        "visual_hidden_size": visual_hidden_size,
    }


def _activation(model: nn.Module) -> str:
    configs = (getattr(module, "config", None) for module in model.modules())
    return next(config.projector_hidden_act for config in configs if hasattr(config, "projector_hidden_act"))


def _file_activation(file: Path, tensors: dict[str, torch.Tensor]) -> str | None:
    """The activation that a projector was trained with; our own files do not say."""
    if any("mm_projector." in name for name in tensors):
        return "gelu"
    return _read_config(file.parent).get("hidden_act") if _is_xtuners(file.parent) else None


def _rename(tensors: dict[str, torch.Tensor], keys: dict[str, str], form: str) -> dict[str, torch.Tensor]:
    if homeless := [name for name in tensors if name not in keys]:
        raise ValueError(
            f"{form} has no place for this projector's {', '.join(homeless)}: save it as {PROJECTOR_FILE}"
        )
    return {keys[name]: tensor for name, tensor in tensors.items()}


def _own_name(name: str) -> str:
    """`model.mm_projector.0.weight`, `model.0.weight` -> `linear_1.weight`; other names come back unchanged.

    Whatever stands before `mm_projector` is dropped: LLaVA's LoRA runs write `base_model.model.model.mm_projector.…`.
    """
    if match := re.fullmatch(r"(?:.*\bmm_projector|model)\.([02]\.(?:weight|bias))", name):
        return next(own for own, place in PLACES.items() if place == match[1])
    return "image_newline" if name.endswith(".image_newline") else name
