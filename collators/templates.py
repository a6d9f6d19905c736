"""Finds the training twin of a checkpoint's chat template.

A file of its own: it reads the `chat_templates/` folder, so it cannot stand in the collator's paste-able file.
"""

from pathlib import Path

from jinja2 import TemplateError

from collators.llava import LlavaDataCollator

TWINS = ("vicuna_v1", "vip_llava", "mistral_instruct", "llama_2", "chatml", "interleave_qwen", "plain")


def chat_template_path(name: str) -> Path:
    """Path of the twin `name` (one of `TWINS`), for TRL's `--chat_template_path`."""
    if name not in TWINS:
        raise ValueError(f"chat template {name!r}: expected one of {', '.join(TWINS)}")
    return Path(__file__).with_name("chat_templates") / f"{name}.jinja"


def training_chat_template(processor, path: str | Path | None = None) -> str:
    """Choose the chat template to train with, and to save with the processor.

    With `path`, that file. Else the processor's own template, if it marks answers with `{% generation %}` and trains
    a stop token; else the twin whose prompts equal those of the own template, compared by what both render (a question
    with a picture, one without, one under a system text); else the own template, which `LlavaDataCollator` judges.

    Args:
        processor: The checkpoint's processor.
        path: A `.jinja` or `.j2` file (TRL's `--chat_template_path`).

    Returns:
        The template's text.

    Raises:
        ValueError: `path` is no template file, the processor has no template or several, or it carries stage 1's
            `plain` template, which renders no question, and no `path` says what stage 2 should use.
    """
    example = f"for example {chat_template_path('vicuna_v1')}"
    if path is not None:
        if not (Path(path).is_file() and Path(path).suffix in (".jinja", ".j2")):
            raise ValueError(
                f"--chat_template_path {path}: expected an existing .jinja file, {example}. (TRL also clones from a "
                "tokenizer; a processor needs the file.)"
            )
        return Path(path).read_text(encoding="utf-8")
    template = processor.chat_template
    if not isinstance(template, str):
        found = f"has several chat templates ({', '.join(template)})" if template else "has no chat template"
        raise ValueError(f"the checkpoint {found}: pass --chat_template_path, {example}")
    own = _prompts(processor, template)
    twins = {name: chat_template_path(name).read_text(encoding="utf-8") for name in TWINS}
    same = next((name for name, twin in twins.items() if own == _prompts(processor, twin)), None)
    if same == "plain":
        raise ValueError(
            "the checkpoint carries stage 1's `plain` template, which leaves every question out: pass "
            f"--chat_template_path with the conversation's template, {example}"
        )
    if same is None or _trains_a_stop_token(processor, template):
        return template
    return twins[same]


def _trains_a_stop_token(processor, template: str) -> bool:
    try:
        return LlavaDataCollator(processor, chat_template=template).marks_answers
    except ValueError:
        return False


def _prompts(processor, template: str) -> list[str | None]:
    picture, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    probes = [[{"role": "user", "content": [picture, text]}], [{"role": "user", "content": [text]}]]
    rendered = []
    for messages in [*probes, [system, *probes[1]]]:
        try:
            rendered.append(
                processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)
            )
        except (TemplateError, TypeError):  # the template refuses this form, which is part of how it renders
            rendered.append(None)
    return rendered
