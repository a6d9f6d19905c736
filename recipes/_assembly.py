"""Joins a vision tower and a language model to a Llava, and proves that neither changed on the way.

A file of its own beside `build_llava.py`, its only user: a recipe has at most 120 lines.
"""

import logging
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging as hf_logging

from _weights import safe_weights

logger = logging.getLogger(__name__)


def load_parts(
    vision_tower: str, language_model: str, dtype: str = "auto", allow_pickled_weights: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Load a vision tower (of a two-tower checkpoint the vision one alone) and a causal language model.

    Args:
        vision_tower: hub id or folder.
        language_model: hub id or folder.
        dtype: of both, or `"auto"` for each as its checkpoint has it.
        allow_pickled_weights: load weights that are no safetensors, too.

    Raises:
        ValueError: a checkpoint lacks weights of its model, which would stay random; an auto class refuses it; or its
            weights are no safetensors (`_weights.safe_weights`).
        OSError: no such checkpoint.
    """
    return (
        _load_whole(AutoModel, vision_tower, dtype, allow_pickled_weights),
        _load_whole(AutoModelForCausalLM, language_model, dtype, allow_pickled_weights),
    )


@torch.no_grad()
def count_extra_tokens(tower: PreTrainedModel, vision_feature_layer: int) -> int:
    """Run one picture through the tower and return how many tokens it has besides its patches: CLIP 1, SigLIP 0.

    Raises:
        ValueError: no plain vision transformer (fixed integer `image_size` and `patch_size`, a token for each patch),
            or no such hidden state.
    """
    kind = type(tower).__name__
    size, patch = (getattr(tower.config, name, None) for name in ("image_size", "patch_size"))
    if not (isinstance(size, int) and isinstance(patch, int)):
        raise ValueError(
            f"{kind} has image_size {size} and patch_size {patch}; expected a vision tower with whole numbers there, "
            "as CLIP and SigLIP are"
        )
    states = tower(torch.zeros(1, 3, size, size, dtype=tower.dtype), output_hidden_states=True).hidden_states
    if not -len(states) <= vision_feature_layer < len(states):
        raise ValueError(f"vision_feature_layer {vision_feature_layer}: {kind} has {len(states)} hidden states")
    tokens, patches = states[vision_feature_layer].shape[1], (size // patch) ** 2
    if tokens < patches:
        raise ValueError(f"{kind} makes {tokens} tokens of {patches} patches; expected one for each, as CLIP's are")
    return tokens - patches


@torch.no_grad()
def assemble(
    tower: PreTrainedModel,
    language_model: PreTrainedModel,
    processor: LlavaProcessor,
    vision_feature_layer: int,
    projector_hidden_act: str,
) -> LlavaForConditionalGeneration:
    """Join the parts themselves, not copies, and a fresh projector in `nn.Linear`'s initialisation, as LLaVA's own.

    The language model gets an embedding row for every token, a multiple of 8 in all; new rows are the mean of the
    others. Parts of two dtypes are cast to the one that holds both exactly (float16 with bfloat16: float32). Of the
    language model's generation settings the stop tokens are kept: sampling settings were made for text alone, and
    `save_pretrained` refuses a temperature without `do_sample`, which some checkpoints have.

    Args:
        tower: as `load_parts` gives it.
        language_model: as `load_parts` gives it.
        processor: gives `<image>`, pad and stop tokens and the select strategy.
        vision_feature_layer: hidden state of the tower that the projector reads.
        projector_hidden_act: activation between the projector's layers.

    Raises:
        ValueError: a language model whose logits `LlavaForConditionalGeneration` would change.
    """
    kind, tokenizer = type(language_model).__name__, processor.tokenizer
    if language_model.config.tie_word_embeddings and not hasattr(language_model.base_model, "embed_tokens"):
        raise ValueError(
            f"{kind} ties its head to other than `embed_tokens`, which LlavaForConditionalGeneration cannot"
        )
    # Never fewer rows than before: Qwen2 has more rows than tokens.
    rows = max(max(tokenizer.get_vocab().values()) + 1, language_model.get_input_embeddings().num_embeddings)
    language_model.resize_token_embeddings(rows, pad_to_multiple_of=8)
    language_model.config.pad_token_id = tokenizer.pad_token_id
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projector_hidden_act=projector_hidden_act,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower = tower
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.model.language_model = language_model.base_model
    model.set_output_embeddings(head := language_model.get_output_embeddings())
    dtype = torch.promote_types(tower.dtype, language_model.dtype)
    if tower.dtype != language_model.dtype:
        logger.warning(
            "The vision tower is %s, the language model %s: both become %s, which holds them exactly. --dtype takes "
            "another.",
            *(str(each).removeprefix("torch.") for each in (tower.dtype, language_model.dtype, dtype)),
        )
    model.to(dtype)

    ids = torch.arange(16)[None]
    same = torch.equal(model(input_ids=ids).logits, language_model(input_ids=ids).logits)
    if head.bias is not None or not same:
        raise ValueError(
            f"{kind} does more to its logits than a linear head without bias (softcapping, scaling), which "
            "LlavaForConditionalGeneration does not; expected a model like Llama, Mistral or Qwen2"
        )
    stops = language_model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id
    )
    return model


@torch.no_grad()
def check_picture(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> int:
    """Push one picture, twice as wide as high, through processor and model; return its number of image tokens.

    Raises:
        ValueError: the processor writes another number of image tokens than the model has features.
    """
    picture = Image.new("RGB", (640, 320), "red")
    inputs = processor(images=picture, text=processor.image_token, return_tensors="pt").to(model.device, model.dtype)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    (features,) = model.get_image_features(inputs["pixel_values"]).pooler_output
    if tokens != len(features):
        raise ValueError(
            f"a picture becomes {tokens} image tokens but {len(features)} features; the processor has patch_size "
            f"{processor.patch_size}, vision_feature_select_strategy {processor.vision_feature_select_strategy}, "
            f"num_additional_image_tokens {processor.num_additional_image_tokens}, crop_size "
            f"{dict(processor.image_processor.crop_size)}: one of them is not the vision tower's"
        )
    return tokens


def check_saved(
    folder: str | Path, tower: PreTrainedModel, language_model: PreTrainedModel, projector: nn.Module
) -> PreTrainedModel:
    """Load a checkpoint as a user will, and compare every tensor with the parts that it was made of.

    Args:
        folder: a saved Llava checkpoint; embeddings may have further rows than the language model's, and its dtype may
            be another if it holds the parts' values exactly.
        tower: loaded anew from its own checkpoint, like the language model.
        language_model: with its head.
        projector: the one that was saved.

    Returns:
        The loaded model.

    Raises:
        ValueError: a tensor differs; the message names it.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder)
    pairs = (
        ("vision_tower", model.model.vision_tower, tower),
        ("multi_modal_projector", model.model.multi_modal_projector, projector),
        ("language_model", model.model.language_model, language_model.base_model),
        ("lm_head", model.get_output_embeddings(), language_model.get_output_embeddings()),
    )
    for part, saved, original in pairs:
        found = saved.state_dict()
        for name, tensor in original.state_dict().items():
            # Further embedding rows come last, so the first numbers are those of the original.
            first = found[name].flatten()[: tensor.numel()]
            if not torch.equal(first, tensor.flatten().to(first.dtype)):
                raise ValueError(f"{folder}: {part}.{name} differs from the part it was made of; do not use it")
    return model


def _load_whole(auto_class: type, source: str, dtype: str, allow_pickled: bool) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if auto_class is AutoModel:
            # With the vision config of a two-tower checkpoint, AutoModel takes the class that LlavaModel builds too.
            config = getattr(config, "vision_config", config)
        # The library would list a CLIP's whole text tower as unexpected; what is missing is an error below.
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()
        try:
            options = {"dtype": dtype, "trust_remote_code": False, **safe_weights(source, allow_pickled=allow_pickled)}
            model, info = auto_class.from_pretrained(source, config=config, output_loading_info=True, **options)
        finally:
            hf_logging.set_verbosity(verbosity)
    except OSError as error:  # offline, the library's message leaves the name out
        raise OSError(f"{source}: {error}") from error
    if info["missing_keys"]:
        raise ValueError(
            f"{source}: the checkpoint lacks {len(info['missing_keys'])} weights of {type(model).__name__}, such as "
            f"{min(info['missing_keys'])}, which would stay random; expected the whole model"
        )
    return model.eval()
