"""Checks that a model and its processor belong together, and that what shall train can.

A file of its own: the doctor asks the configuration alone, the pre-flight the loaded model too.
"""

import torch
from torch import nn
from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, PreTrainedConfig, VipLlavaConfig

from _findings import Findings, Place
from _parts import QUANTISED, part_of

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def check_config(findings: Findings, place: Place, config: PreTrainedConfig, processor) -> None:
    """Compare the configuration of a Llava class with its processor: vocabulary, image token, image tokens."""
    tokenizer, text = processor.tokenizer, config.get_text_config()
    if len(tokenizer) > text.vocab_size:
        findings.add(
            "error",
            "vocabulary",
            place,
            f"{len(tokenizer)} tokens in the tokenizer and {text.vocab_size} rows in the embedding",
            "an embedding row for each token",
            "Resize the embeddings (recipes/build_llava.py does), or load the tokenizer that belongs to the model",
        )
    if config.image_token_id != processor.image_token_id:
        findings.add(
            "error",
            "image-token-id",
            place,
            f"{config.image_token_id} in the model and {processor.image_token_id} ({processor.image_token}) in the "
            "processor",
            "one id of the image token",
            "Set image_token_id in config.json to the tokenizer's id",
        )
    size, expected = _expected_image_tokens(config)
    if expected is None:
        return
    (found,) = processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"]
    if found != expected:
        findings.add(
            "error",
            "image-tokens",
            place,
            f"{found} image tokens of a picture from the processor, {expected} features from the model",
            "as many image tokens as features",
            "Set patch_size, crop_size, num_additional_image_tokens (1 for CLIP, 0 for SigLIP) and "
            "vision_feature_select_strategy in processor_config.json after the model's config",
        )


def _expected_image_tokens(config: PreTrainedConfig) -> tuple[tuple[int, int], int | None]:
    """Height and width of a picture, and its features by the model's own configuration; None where that is unknown."""
    vision, size = config.vision_config, (64, 64)
    extra = CLASS_TOKENS.get(vision.model_type)
    if type(config) not in (LlavaConfig, VipLlavaConfig, LlavaNextConfig, LlavaOnevisionConfig) or extra is None:
        return size, None
    side = vision.image_size // vision.patch_size
    strategy = getattr(config, "vision_feature_select_strategy", "default")  # VipLlava always drops the first token
    tokens = side**2 + extra - (strategy == "default")
    if pinpoints := getattr(config, "image_grid_pinpoints", None):
        size = tuple(pinpoints[0])  # a picture of this size fills its tiles; a newline ends each line of patches
        lines, columns = (side * (edge // vision.image_size) for edge in size)
        tokens += lines * (columns + 1)
    return size, tokens


def check_model(findings: Findings, place: Place, model: nn.Module) -> None:
    """Check that something trains, that only the language model is quantised, and that weights are finite numbers.

    Weights on the meta device, or kept elsewhere by ZeRO-3, are not looked at; of a large model on the CPU, which
    waits for FSDP there, only the projector's.
    """
    parameters = dict(model.named_parameters())
    slow = sum(parameter.numel() for parameter in parameters.values() if parameter.device.type == "cpu") > 2e8
    if not any(parameter.requires_grad for parameter in parameters.values()):
        findings.add(
            "error", "nothing-trains", place, "no trainable parameter", "a part that trains", "Unfreeze a part"
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, tuple(QUANTISED.values())):
            if part_of(name) != "language_model" or "lm_head" in name:
                findings.add(
                    "error",
                    "quantised-part",
                    place,
                    f"{name} quantised",
                    "vision tower, projector and lm_head in their own dtype",
                    "Load with llm_int8_skip_modules as recipes/sft_qlora.py does",
                )
        elif (not slow or part_of(name) == "multi_modal_projector") and not _is_finite(parameter):
            findings.add(
                "error",
                "not-finite",
                place,
                f"{name} with numbers that are infinite or none",
                "finite weights",
                "Take an earlier checkpoint, or load it with --dtype float32 if float16 overflowed",
            )


def _is_finite(parameter: nn.Parameter) -> bool:
    if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
        return True
    # A sum is not finite where one number is not, and needs no second tensor of that size.
    return bool(torch.isfinite(parameter.detach().sum(dtype=torch.float32)))
