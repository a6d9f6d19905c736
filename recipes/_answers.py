"""Asks a checkpoint and scores what it answers: what `evaluate.py` and `chat.py` stand on.

A file of its own so that both give the same answer to the same prompt, and stay scripts that one reads top to bottom.
"""

import argparse
import re
import warnings
from collections.abc import Callable

import torch
from peft import PeftConfig, PeftModel
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import find_adapter_config_file

from _weights import safe_weights
from collators import load_image

MEASURES = ("exact_match", "exact_match_strict", "stopped", "scienceqa", "scienceqa_image")
OPTIONS = ("A", "B", "C", "D", "E")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --dtype, --device, --max_new_tokens and --temperature."""
    parser.add_argument("--model", required=True, help="folder or hub id of a checkpoint or an adapter")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", help="auto: cuda if there is one, else cpu")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="where an answer is cut")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above: sampled")
    parser.add_argument("--allow_remote_images", action="store_true", help="fetch pictures that are named by a URL")
    parser.add_argument("--allow_pickled_weights", action="store_true", help="load weights that are no safetensors")


def load_processor(path: str) -> ProcessorMixin:
    """Load a checkpoint's processor.

    Raises:
        ValueError: there is none at `path`, or it has no chat template.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"{path}: found no processor; expected a folder or hub id with the model and its processor_config.json. "
            "Check the path, or save the processor that the model was trained with beside it."
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{path}: the {type(processor).__name__} has no chat template; expected the one that the model was "
            "trained with. Put it there as chat_template.jinja (see collators/chat_templates/)."
        )
    return processor


def load_checkpoint(
    path: str, dtype: str = "auto", device: str = "auto", allow_pickled_weights: bool = False
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a model and its processor with the stock auto classes, ready to generate. No code of theirs runs.

    An adapter is loaded with PEFT onto its unquantised base: the auto class would do so too, but drops DoRA's
    magnitudes with no more than a table in the log (transformers 5.23).

    Raises:
        ValueError: as `load_processor`; the weights are no safetensors (`_weights.safe_weights`).
    """
    processor = load_processor(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = safe_weights(path, allow_pickled=allow_pickled_weights)
    options = {"dtype": dtype, "trust_remote_code": False}
    if find_adapter_config_file(path) is None:
        return AutoModelForImageTextToText.from_pretrained(path, **options, **weights).to(device), processor
    config = PeftConfig.from_pretrained(path)
    name, revision = config.base_model_name_or_path, config.revision
    base = AutoModelForImageTextToText.from_pretrained(name, revision=revision, **options, **weights)
    return PeftModel.from_pretrained(base, path).eval().to(device), processor


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversations: list[list[dict]],
    images: list[list],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    fetch_image: Callable[[str], bytes] | None = None,
    **generation,
) -> list[tuple[str, bool]]:
    """Answer the last turn of each conversation, all in one batch that is padded on the left.

    The prompt is the processor's own chat template with its generation prompt; a row's answer does not depend on its
    batch mates, which may be text-only or have any number of pictures.

    Args:
        conversations: Messages with list contents (the released templates render no strings), the last one a user's.
        images: What `load_image` takes, for each conversation in the order of its image parts.
        max_new_tokens: Tokens after which an answer is cut.
        temperature: 0 decodes greedily, or by beams, whatever the checkpoint's generation config says.
        fetch_image: As `fetch` of `load_image`.
        **generation: Further arguments of `generate`, such as `num_beams` or `streamer`.

    Returns:
        For each conversation the answer, without blanks at its ends (they are the template's), and whether the model
        ended it itself: it emitted one of the generation config's end tokens.

    Raises:
        ValueError, FileNotFoundError: a picture is broken or missing, or there are not as many as image parts.
        jinja2.TemplateError: the chat template refuses the conversation.
    """
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={
            "padding": True,
            "padding_side": "left",
            "images": [[load_image(source, fetch_image) for source in sources] for sources in images],
        },
    ).to(model.device, model.dtype)
    length = inputs["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        warnings.warn(
            f"a prompt of {length} tokens and {max_new_tokens} new ones exceed the {limit} positions that the model "
            "was made for: expect rubbish beyond; lower --max_new_tokens or shorten the conversation",
            stacklevel=2,
        )
    if temperature > 0:
        generation["temperature"] = temperature
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=temperature > 0, **generation)

    end_ids = model.generation_config.eos_token_id
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    answers = []
    for ids in generated[:, length:].tolist():
        # Behind its end an answer is padded, maybe with an ordinary token: LLaVA-NeXT on Llama 3 pads with "!", id 0.
        end = next((place for place, token in enumerate(ids) if token in end_ids), None)
        answers.append((processor.decode(ids[:end], skip_special_tokens=True).strip(), end is not None))
    return answers


def read_letter(text: str) -> str | None:
    """Read the option letter of an answer by the rules of LLaVA's `eval_science_qa.py`.

    The answer is the letter alone ("B"), opens with it ("B. Because ..."), or says once "The answer is B." (any
    character may stand for the full stop, but there must be one).

    Returns:
        The letter, or None: LLaVA counts such an answer as wrong and draws no letter by chance.
    """
    if opening := re.match(rf"([{''.join(OPTIONS)}])(\. |\Z)", text):
        return opening[1]
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else None


def score(text: str, reference: str, has_picture: bool) -> dict[str, bool | None]:
    """Compare an answer with its reference.

    Returns:
        `exact_match`: they agree but for case, blanks at the ends and one full stop at the end.
        `exact_match_strict`: they agree but for blanks at the ends.
        `scienceqa`: the answer's letter is the reference; None unless the reference is one of `OPTIONS`.
        `scienceqa_image`: the same, for LLaVA's IMG-Accuracy; None for a question without a picture, too.
    """
    text, reference = text.strip(), reference.strip()
    loose_text, loose_reference = (value.removesuffix(".").rstrip().casefold() for value in (text, reference))
    right_letter = read_letter(text) == reference if reference in OPTIONS else None
    return {
        "exact_match": loose_text == loose_reference,
        "exact_match_strict": text == reference,
        "scienceqa": right_letter,
        "scienceqa_image": right_letter if has_picture else None,
    }


def summarise(records: list[dict], group_by: str | None = None) -> dict:
    """Count the records (`questions`) and take each measure's share, 0 to 1, of those where it is not None.

    A measure that is None in all of them has the share None. With `group_by`, `groups` holds the same for each value
    of that key, as a string, in order of appearance.
    """
    summary = {"questions": len(records)}
    for measure in MEASURES:
        hits = [record[measure] for record in records if record[measure] is not None]
        summary[measure] = sum(hits) / len(hits) if hits else None
    if group_by is not None:
        groups = {}
        for record in records:
            groups.setdefault(str(record[group_by]), []).append(record)
        summary |= {"group_by": group_by, "groups": {name: summarise(group) for name, group in groups.items()}}
    return summary


def make_table(summary: dict) -> Table:
    """What `summarise` found, for a terminal: a row for all questions and for each group."""
    measures = [measure for measure in MEASURES if summary[measure] is not None]
    table = Table("", "questions", *(measure.replace("_", " ") for measure in measures))
    for name, scores in [("all", summary), *summary.get("groups", {}).items()]:
        shares = ["-" if scores[measure] is None else f"{scores[measure]:.1%}" for measure in measures]
        table.add_row(escape(name), str(scores["questions"]), *shares)
    return table
