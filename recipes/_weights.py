"""Which files a checkpoint's weights may come from.

A file of its own: every recipe that loads a checkpoint asks here, and none of them needs more than this.
"""

import json
from pathlib import Path

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file


def safe_weights(
    source: str | Path, revision: str | None = None, allow_pickled: bool = False, with_base: bool = True
) -> dict:
    """Arguments of `from_pretrained`: safetensors alone, since a pickled weights file can hold code.

    torch unpickles with `weights_only=True`, which has had holes (CVE-2025-32434), so such files are asked for.

    Args:
        source: hub id or folder of a checkpoint or an adapter.
        revision: of a hub id.
        allow_pickled: the user asks for such files; returns no argument.
        with_base: of an adapter look at the base that it names too, which `from_pretrained` loads with it.

    Raises:
        ValueError: there is no weights file in safetensors at `source`, or its index names other files.
    """
    if allow_pickled:
        return {}
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if find_adapter_config_file(source, revision=revision) is not None:
        names = [SAFETENSORS_WEIGHTS_NAME]
        if with_base:
            base = PeftConfig.from_pretrained(str(source), revision=revision)
            safe_weights(base.base_model_name_or_path, base.revision)
    elif own := PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("transformers_weights"):
        names = [own]
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    files = [file for name in names if (file := cached_file(source, name, **options))]
    if files and files[0].endswith(".json"):
        # transformers loads what an index names with torch.load, `use_safetensors` or not (5.23).
        files = list(json.loads(Path(files[0]).read_text("utf-8"))["weight_map"].values())
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise ValueError(
            f"{source}: found no {' or '.join(names)}; expected weights in safetensors, since other files can hold "
            "code. Convert them, or pass --allow_pickled_weights if you trust where they come from."
        )
    return {"use_safetensors": True}
