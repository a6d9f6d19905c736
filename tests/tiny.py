"""Tiny random members of the real Llava classes, their tokenizers and processors. Nothing is downloaded.

Sizes: 16-pixel pictures, 8-pixel patches, so a picture is 4 image tokens; hidden size 32; two layers a part.
"""

import copy
import json
from functools import cache
from importlib.util import find_spec

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from collators import LlavaDataCollator

IMAGE_TOKENS = 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"]

# The released llava-hf templates, as published on the hub (the format strings are data that a twin must reproduce).
LLAVA_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_1_6_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text']"
    " + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VIP_LLAVA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '###Human: '}}{% elif message['role'] =="
    " 'assistant' %}{{ '###' + message['role'].title() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)
INTERLEAVE_QWEN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] |"
    " selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{% else %}{% for content in"
    " message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ '\n' + content['text'] }}"
    "{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# LLaVA-NeXT on Llama 3: its assistant turns open with one newline more than its generation prompt.
LLAMA_3_NEXT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n'}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] + '<|im_end|>' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)

CORPUS = [
    "USER: ASSISTANT: What is in the picture? A red square on a white ground. How many digits are there? Yes. No.",
    "Describe the image. The picture shows the digit seven. Is the number even or odd? It is even. [INST] [/INST]",
    "system user assistant <<SYS>> <</SYS>> A chat between a curious user and an artificial intelligence assistant.",
]


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2 style) that, like Llama's, puts BOS in front when special tokens are asked for."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@cache
def llama_tokenizer() -> LlamaTokenizer:
    """A SentencePiece-style BPE in the real `LlamaTokenizer` class: "▁" for blanks, byte fallback, BOS in front."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    backend.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)

    model = json.loads(backend.to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True
    )
    tokenizer.add_tokens(["<image>", "<pad>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return tokenizer


@cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE cut as Qwen2's is: runs of newlines, and a mark with the newline behind it, are one token."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *["A.\n\nB!\n\n\nC \n\n D\n\n\nE"] * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def make_tokenizer(kind: str = "byte", **overrides):
    """A fresh copy of one of the tokenizers, with e.g. `padding_side="left"` or `pad_token="</s>"` set."""

    tokenizer = copy.deepcopy({"byte": byte_tokenizer, "llama": llama_tokenizer, "qwen": qwen_tokenizer}[kind]())
    for name, value in overrides.items():
        setattr(tokenizer, name, value)
    return tokenizer


# The classes whose processors can be made here: LLaVA-OneVision's needs torchvision, which the suite's second run has.
KINDS = ["llava", "vipllava", "llava_next", *(["llava_onevision"] if find_spec("torchvision") else [])]
COLORS = ["red", "green", "blue", "white", "black", "yellow"]
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def make_processor(
    chat_template: str = LLAVA_1_5, tokenizer: str = "byte", kind: str = "llava", tower: str = "clip", **overrides
):
    """The processor of a class for 16-pixel tiles in 8-pixel patches: 4 image tokens each (anyres classes: more)."""
    tokenizer = make_tokenizer(tokenizer, **overrides)
    square = {"height": 16, "width": 16}
    if kind == "llava_onevision":
        return make_onevision_processor(tokenizer, chat_template, square)
    size = {"size": {"shortest_edge": 16}, "crop_size": square}
    if kind == "llava_next":
        processor, image_processor = (
            LlavaNextProcessor,
            LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **size),
        )
    else:
        processor, image_processor = LlavaProcessor, LlavaImageProcessorPil(do_pad=True, **size)
    return processor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        num_additional_image_tokens=1 if tower == "clip" else 0,
        chat_template=chat_template,
    )


def make_onevision_processor(tokenizer, chat_template: str, square: dict):
    # Its video processor needs torchvision.
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

    tokenizer.add_tokens(["<video>"], special_tokens=True)
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=IMAGE_TOKENS,
        vision_feature_select_strategy="full",
        chat_template=chat_template,
    )


def text_config(kind: str, vocab_size: int):
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=3,
    )
    return {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[kind](**sizes)


def vision_config(kind: str):
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    return {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind](**sizes)


def make_model(processor, kind: str = "llava", text: str = "llama", seed: int = 0, tower: str = "clip"):
    """A random model of the class `kind` in float32: `llava`, `vipllava`, `llava_next` or `llava_onevision`."""
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    common = dict(
        text_config=text_config(text, len(tokenizer)),
        vision_config=vision_config(tower),
        image_token_index=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if kind == "vipllava":
        model = VipLlavaForConditionalGeneration(VipLlavaConfig(vision_feature_layers=[-2, -3], **common))
    elif kind == "llava_next":
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **common))
    elif kind == "llava_onevision":
        common["vision_config"] = vision_config("siglip")  # it has no way to leave a class token out
        common["video_token_index"] = getattr(processor, "video_token_id", tokenizer.unk_token_id)
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(image_grid_pinpoints=PINPOINTS, **common))
    else:
        if tower == "siglip":  # it has no class token; llava-interleave-qwen reads its last layer
            common |= dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
        model = LlavaForConditionalGeneration(LlavaConfig(image_seq_length=IMAGE_TOKENS, **common))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def save_checkpoint(
    path,
    chat_template: str = LLAVA_1_5,
    kind: str = "llava",
    tokenizer: str = "byte",
    tower: str = "clip",
    text: str = "llama",
    seed: int = 0,
    **overrides,
):
    """Write a tiny checkpoint (model + processor) as `from_pretrained` finds one on the hub; returns its path."""
    processor = make_processor(chat_template, tokenizer, kind, tower, **overrides)
    make_model(processor, kind, text, seed, tower).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def picture(color="red", size=(16, 16)) -> Image.Image:
    return Image.new("RGB", size, color)


def user(text: str, images: int = 0) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def row(*messages, images=None, **columns) -> dict:
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    return {"messages": list(messages), "images": images or [picture()] * count, **columns}


def overfit(path, processor, rows) -> str:
    """Train a tiny model until it knows `rows` by heart, stop tokens included; save it to `path` and return that."""
    model = make_model(processor).train()
    batch = LlavaDataCollator(processor)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(500):
        loss = model(**batch).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)
