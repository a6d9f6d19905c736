"""Finds the training twin of a checkpoint's chat template.

A file of its own: it reads the `chat_templates/` folder, so it cannot stand in the collator's paste-able file.
"""

from importlib.resources import as_file, files
from pathlib import Path

from jinja2 import TemplateError

# `plain` stands apart: it renders no question, so no conversation may pick it by chance.
TWINS = ("vicuna_v1", "mistral_instruct", "llama_2", "chatml", "plain")


def chat_template_path(name: str) -> Path:
    """Path of the twin `name` (one of `TWINS`), for TRL's `--chat_template_path`."""
    if name not in TWINS:
        raise ValueError(f"chat template {name!r}: expected one of {', '.join(TWINS)}")
    with as_file(files("collators") / "chat_templates" / f"{name}.jinja") as path:
        return path


def training_chat_template(processor, path: str | Path | None = None) -> str:
    """Choose the chat template to train with, and to save with the processor.

    Without `path`, the twin whose prompts equal those of the processor's own template, compared by what both render
    (a question with a picture, one without, one under a system text); else TRL's own training twin of the template;
    else the template as it is, which `LlavaDataCollator` then checks.

    Args:
        processor: The checkpoint's processor.
        path: A `.jinja` or `.j2` file to take instead (TRL's `--chat_template_path`).

    Returns:
        The template's text.

    Raises:
        ValueError: `path` is no template file, the processor has no template, or the processor carries stage 1's
            `plain` template, which renders no question, and no `path` says what stage 2 should use.
    """
    if path is not None:
        if not (Path(path).is_file() and Path(path).suffix in (".jinja", ".j2")):
            raise ValueError(
                f"--chat_template_path {path}: expected an existing .jinja file, for example "
                f"{chat_template_path('vicuna_v1')}. (TRL also clones from a tokenizer; a processor needs the file.)"
            )
        return Path(path).read_text(encoding="utf-8")
    if not processor.chat_template:
        raise ValueError(
            f"the checkpoint has no chat template: pass --chat_template_path, for example "
            f"{chat_template_path('vicuna_v1')}"
        )
    own = _prompts(processor, processor.chat_template)
    for name in TWINS:
        template = chat_template_path(name).read_text(encoding="utf-8")
        if own == _prompts(processor, template):
            if name == "plain":
                raise ValueError(
                    "the checkpoint carries stage 1's `plain` template, which leaves every question out: pass "
                    f"--chat_template_path with the conversation's template, for example "
                    f"{chat_template_path('vicuna_v1')}"
                )
            return template
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(processor) or processor.chat_template
    except ValueError:
        return processor.chat_template


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
