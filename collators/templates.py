"""Finds the training twin of a checkpoint's chat template.

A file of its own: it reads the `chat_templates/` folder, so it cannot stand in the collator's paste-able file.
"""

import logging
import re
from pathlib import Path

from jinja2 import TemplateError

from collators.llava import INTERLEAVED, PLACEMENT, LlavaDataCollator, rendered_placement

logger = logging.getLogger(__name__)

TWINS = ("vicuna_v1", "vip_llava", "mistral_instruct", "llama_2", "chatml", "interleave_qwen", "plain")
# Each conversation's twin that leaves pictures where they stand in a turn.
KEEP_TWINS = {name: f"{name}_keep" for name in TWINS if name != "plain"}


def chat_template_path(name: str) -> Path:
    """Path of the twin `name` (one of `TWINS` or `KEEP_TWINS`), for TRL's `--chat_template_path`."""
    known = [*TWINS, *KEEP_TWINS.values()]
    if name not in known:
        raise ValueError(f"chat template {name!r}: expected one of {', '.join(known)}")
    return Path(__file__).with_name("chat_templates") / f"{name}.jinja"


def training_chat_template(processor, path: str | Path | None = None, *, placement: str = "front") -> str:
    """Choose the chat template to train with, and to save with the processor.

    With `path`, that file. Else the processor's own template, if it marks answers with `{% generation %}` and trains a
    stop token; else the twin for `placement` whose prompts equal those of the own template, compared by what both
    render (a question with a picture, one without, one under a system text); else the own template, which
    `LlavaDataCollator` judges. A twin that puts pictures first gives way to its keep twin under `"keep"`, which the
    log says; the other way round only `path` goes, so that no run undoes another's placement unasked.

    Args:
        processor: The checkpoint's processor.
        path: A `.jinja` or `.j2` file (TRL's `--chat_template_path`).
        placement: `"keep"` takes the twin that leaves pictures where they stand in a turn, `"front"` the one that
            puts them before its text.

    Returns:
        The template's text.

    Raises:
        ValueError: `path` is no template file, the processor has no template or several, it carries stage 1's
            `plain` template, which renders no question, and no `path` says what stage 2 should use, or the template
            has the other placement, so that inference would not ask as training did; the message names the twin.
    """
    if placement not in PLACEMENT:
        raise ValueError(f"placement={placement!r}: expected one of {', '.join(map(repr, PLACEMENT))}")
    example = f"for example {chat_template_path('vicuna_v1' if placement == 'front' else KEEP_TWINS['vicuna_v1'])}"
    if path is not None:
        if not (Path(path).is_file() and Path(path).suffix in (".jinja", ".j2")):
            raise ValueError(
                f"--chat_template_path {path}: expected an existing .jinja file, {example}. (TRL also clones from a "
                "tokenizer; a processor needs the file.)"
            )
        return _check_placement(processor, Path(path).read_text(encoding="utf-8"), placement, f"{path}")
    template = processor.chat_template
    if not isinstance(template, str):
        found = f"has several chat templates ({', '.join(template)})" if template else "has no chat template"
        raise ValueError(f"the checkpoint {found}: pass --chat_template_path, {example}")
    if _rendered_placement(processor, template) is None and _prompts(processor, template)[0] is not None:
        raise ValueError(
            "the checkpoint carries stage 1's `plain` template, which leaves every question out: pass "
            f"--chat_template_path with the conversation's template, {example}"
        )
    family = _family(processor, template)
    is_keep_twin = family is not None and template == _read(KEEP_TWINS[family])
    if family and not is_keep_twin and (template == _read(family) or not _trains_a_stop_token(processor, template)):
        if placement == "front":
            return _read(family)
        twin = KEEP_TWINS[family]
        logger.warning("--placement keep: %s in place of the checkpoint's template, which puts pictures first", twin)
        return _read(twin)
    return _check_placement(processor, template, placement, "the checkpoint's chat template")


def _check_placement(processor, template: str, placement: str, whose: str) -> str:
    rendered = _rendered_placement(processor, template)
    if rendered in (None, placement):
        return template
    family = _family(processor, template)
    if family:
        twin = f"its twin {chat_template_path(family if placement == 'front' else KEEP_TWINS[family])}"
    else:
        twin = "one that does"
    does = {
        "front": "renders the pictures of a turn before its text",
        "keep": "leaves the pictures of a turn where they stand in its text",
    }
    raise ValueError(
        f"--placement {placement}: {whose} {does[rendered]}. Pass --chat_template_path with {twin}, or --placement "
        f"{rendered}."
    )


def _rendered_placement(processor, template: str) -> str | None:
    try:
        return rendered_placement(processor, template)
    except (TemplateError, TypeError):  # it does not render such a turn at all, which the collator says better
        return None


def _read(name: str) -> str:
    return chat_template_path(name).read_text(encoding="utf-8")


def _family(processor, template: str) -> str | None:
    """The twin whose prompts are the template's own, wherever it leaves pictures."""
    own = _prompts(processor, template)
    return next((name for name in KEEP_TWINS if own == _prompts(processor, _read(name))), None)


def tag_images(processor, template: str, image_tag_format: str) -> str:
    """Put words around each picture of a chat template: LLaVA's `mm_use_im_start_end` and its `mmtag` conversations.

    Args:
        processor: The checkpoint's processor, which says what the image token is.
        template: A chat template that writes the image token out, as all twins do. With the tags in it already it
            comes back as it is.
        image_tag_format: `"<Image>{}</Image>"`, `"<im_start>{}<im_end>"`: the picture takes the place of `{}`.

    Returns:
        The template with the tags, which are tokens of their own where the tokenizer has such, and else plain text.

    Raises:
        ValueError: The format has no `{}`, or what would end a string in the template; or the template does not
            write the image token out.
    """
    image = processor.image_token
    before, mark, after = image_tag_format.partition("{}")
    if not mark or not before + after or set(before + after) & set("'\"\\{}"):
        raise ValueError(
            f"image_tag_format={image_tag_format!r}: expected words around one {{}}, without quotes, backslashes and "
            "further braces, for example <Image>{}</Image>"
        )
    tag = f"{before}{image}{after}"
    code = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    around = re.findall(rf"(.?){re.escape(image)}(.?)", code, re.DOTALL)
    if tag not in template and any(left not in "'\"}" or right not in "'\"{\\ \n" for left, right in around):
        raise ValueError(
            f"image_tag_format={image_tag_format!r}: the chat template has words around {image} already. Pass "
            "--chat_template_path with one that has not, or write these into it yourself."
        )
    tagged = template if tag in template else template.replace(image, tag)
    rendered = processor.apply_chat_template(INTERLEAVED, chat_template=tagged)
    if rendered.count(tag) != 1 or rendered.count(image) != 1:
        raise ValueError(
            f"image_tag_format={image_tag_format!r}: the chat template does not write {image} out, so the tags cannot "
            "be put around it. Write them into the template yourself."
        )
    return tagged


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
