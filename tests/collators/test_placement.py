"""Several pictures a row: where they stand, how many there may be, and what is written around them."""

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from collators import (
    LlavaDataCollator,
    chat_template_path,
    load_rows,
    rendered_placement,
    tag_images,
    training_chat_template,
)
from collators.templates import KEEP_TWINS, TWINS
from labels import check_labels
from tiny import assistant, picture, row, user

RELEASED = {
    "vicuna_v1": tiny.LLAVA_1_5,
    "vip_llava": tiny.VIP_LLAVA,
    "mistral_instruct": tiny.LLAVA_1_6_MISTRAL,
    "chatml": tiny.ONEVISION,
    "interleave_qwen": tiny.INTERLEAVE_QWEN,
}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
ASKED = "Image 1: <image>\nImage 2: <image>\nIs <image>, or <image><image>, larger?"


def twin(name: str) -> str:
    return chat_template_path(name).read_text(encoding="utf-8")


def make_collator(family: str, placement: str = "keep", tokenizer: str = "byte", **kwargs) -> LlavaDataCollator:
    processor = tiny.make_processor(twin(family if placement == "front" else KEEP_TWINS[family]), tokenizer)
    stop = "<|im_end|>" if family in ("chatml", "interleave_qwen") else "</s>"
    return LlavaDataCollator(
        processor,
        placement=placement,
        stop_token_ids=[processor.tokenizer.convert_tokens_to_ids(stop)],
        **kwargs,
    )


def ask(text: str, answer: str = "Yes", **columns) -> dict:
    """A row as LLaVA JSON has it: `<image>` typed into a string."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [picture()] * text.count("<image>"), **columns}


def decode(collator, batch, index: int = 0) -> str:
    """The row as the model sees it, a picture's tokens written as one `<image>`."""
    ids = batch["input_ids"][index][batch["attention_mask"][index].bool()]
    return collator.processor.tokenizer.decode(ids).replace("<image>" * tiny.IMAGE_TOKENS, "<image>")


# The keep twins


@pytest.mark.parametrize("family", KEEP_TWINS)
def test_every_family_has_a_twin_that_leaves_pictures_in_place(family):
    processor = tiny.make_processor()
    assert rendered_placement(processor, twin(family)) == "front"
    assert rendered_placement(processor, twin(KEEP_TWINS[family])) == "keep"
    assert rendered_placement(processor, twin("plain")) is None
    assert set(KEEP_TWINS) == set(TWINS) - {"plain"}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("vicuna_v1", "<s>USER: {} ASSISTANT: Yes</s>"),
        ("vip_llava", "<s>###Human: {}###Assistant: Yes</s>"),
        ("mistral_instruct", "<s>[INST] {} [/INST] Yes</s>"),
        ("llama_2", "<s>[INST] {} [/INST] Yes </s>"),
        ("chatml", "<s><|im_start|>user \n{}<|im_end|><|im_start|>assistant\nYes<|im_end|>"),
        ("interleave_qwen", "<s><|im_start|>user\n\n{}<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"),
    ],
)
def test_the_text_stays_as_it_was_written(family, expected):
    """Where two pictures touch, the newline of the family's own habit parts them; all else is verbatim."""
    collator = make_collator(family)
    between = "" if family in ("chatml", "interleave_qwen") else "\n"
    written = ASKED.replace("<image><image>", f"<image>{between}<image>")
    batch = collator([ask(ASKED)])
    assert decode(collator, batch) == expected.format(written)
    assert batch["pixel_values"].shape[0] == 5


@pytest.mark.parametrize("family", KEEP_TWINS)
@pytest.mark.parametrize(
    "text",
    [
        *("<image>\nWhat?", "Look.\n<image>\nWhat?", "What?\n<image>", "<image> and what?", "<image>\r\nWhat?"),
        *('Is "<image>" it?', "<image>'s colour", "<image>/<image>", "<image>。什么", "<image>\u00a0a", "(<image>)"),
    ],
)
def test_a_text_with_its_pictures_is_verbatim(family, text):
    collator = make_collator(family)
    assert text in decode(collator, collator([ask(text)]))


@pytest.mark.parametrize("family", KEEP_TWINS)
@pytest.mark.parametrize("word", ["What?", "7", "什么"])
def test_a_picture_that_touches_a_word_gets_the_newline_of_the_released_template(family, word):
    collator = make_collator(family)
    assert f"<image>\n{word}" in decode(collator, collator([ask(f"<image>{word}")]))


@pytest.mark.parametrize("family", KEEP_TWINS)
@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("words", [["What is it?"], ["What is it?", "And now?"], []])
def test_both_twins_render_pictures_first_alike(family, images, system, words):
    """What stock tools send: image parts, then a text without a newline of its own."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text} for text in words]
    talk = [{"role": "user", "content": content}, assistant("A dog."), user("Sure?"), assistant("Yes.")]
    messages = [*([SYSTEM] if system else []), *talk]
    processor = tiny.make_processor()
    for upto, prompt in ((len(messages) - 1, True), (len(messages), False)):
        front, keep = (
            processor.apply_chat_template(messages[:upto], chat_template=twin(name), add_generation_prompt=prompt)
            for name in (family, KEEP_TWINS[family])
        )
        assert keep == front


@pytest.mark.parametrize("family", KEEP_TWINS)
def test_a_string_renders_as_one_text(family):
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    processor = tiny.make_processor(twin(KEEP_TWINS[family]))
    assert processor.apply_chat_template(talk) == processor.apply_chat_template([user("What?"), assistant("This.")])


@pytest.mark.parametrize("name", ["mistral_instruct_keep", "llama_2_keep"])
def test_an_unknown_role_is_refused(name):
    with pytest.raises(Exception, match=f"{name} knows the roles system, user and assistant, not tool"):
        tiny.make_processor(twin(name)).apply_chat_template([{"role": "tool", "content": []}])


def test_a_file_of_interleaved_rows_reaches_the_model_verbatim(tmp_path):
    picture().save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "A <image>\nB:\n<image>"}, {"from": "gpt", "value": "Yes"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": ["a.png"] * 2, "conversations": turns}]))
    for placement, expected in (("keep", "A <image>\nB:\n<image> "), ("front", "<image>\n<image>\nA  B: ")):
        collator = make_collator("vicuna_v1", placement)
        rows = load_rows(tmp_path / "rows.json", placement=placement)
        assert decode(collator, collator([rows[0]])) == f"<s>USER: {expected}ASSISTANT: Yes</s>"


# Choosing one


@pytest.mark.parametrize("family", RELEASED)
def test_the_released_template_gives_way_to_its_keep_twin(family):
    processor = tiny.make_processor(RELEASED[family])
    assert training_chat_template(processor, placement="keep") == twin(KEEP_TWINS[family])


@pytest.mark.parametrize("family", KEEP_TWINS)
def test_keep_takes_the_other_twin_and_says_so_front_does_not_undo_it(family, caplog):
    front, keep = tiny.make_processor(twin(family)), tiny.make_processor(twin(KEEP_TWINS[family]))
    assert training_chat_template(front) == twin(family)
    assert training_chat_template(keep, placement="keep") == twin(KEEP_TWINS[family])
    assert not caplog.text
    assert training_chat_template(front, placement="keep") == twin(KEEP_TWINS[family])
    assert f"--placement keep: {KEEP_TWINS[family]} in place of the checkpoint's template" in caplog.text
    with pytest.raises(
        ValueError, match=rf"--placement front: the checkpoint's .*{family}\.jinja, or --placement keep"
    ):
        training_chat_template(keep)
    assert training_chat_template(keep, chat_template_path(family)) == twin(family)


def test_a_template_that_moves_pictures_is_refused_with_its_twins_name(tmp_path):
    given = "--placement keep: .*vicuna_v1.jinja renders the pictures of a turn before"
    with pytest.raises(ValueError, match=rf"{given}.*with its twin .*vicuna_v1_keep\.jinja"):
        training_chat_template(tiny.make_processor(), chat_template_path("vicuna_v1"), placement="keep")
    keep = chat_template_path("vicuna_v1_keep")
    assert training_chat_template(tiny.make_processor(), keep, placement="keep") == keep.read_text()

    own = twin("vicuna_v1").replace("' ' + texts", "' So: ' + texts")
    with pytest.raises(ValueError, match=r"the checkpoint's chat template .*twin .*vicuna_v1_keep\.jinja"):
        training_chat_template(tiny.make_processor(own), placement="keep")
    strange = twin("vicuna_v1").replace("'ASSISTANT:'", "'BOT:'")
    with pytest.raises(ValueError, match="with one that does, or --placement front"):
        training_chat_template(tiny.make_processor(strange), placement="keep")
    with pytest.raises(ValueError, match="placement='back': expected one of 'front', 'keep'"):
        training_chat_template(tiny.make_processor(), placement="back")


def test_a_template_that_keeps_pictures_is_refused_under_front():
    """Training would move them, and inference would not."""
    keep = chat_template_path("vicuna_v1_keep")
    given = "--placement front: .*vicuna_v1_keep.jinja leaves the pictures of a turn where they stand in its text"
    with pytest.raises(ValueError, match=rf"{given}.*twin .*vicuna_v1\.jinja, or --placement keep"):
        training_chat_template(tiny.make_processor(), keep)
    tagged = tag_images(tiny.make_processor(), twin("vicuna_v1_keep"), "<Image>{}</Image>")
    with pytest.raises(ValueError, match="--placement front: the checkpoint's chat template leaves the pictures"):
        training_chat_template(tiny.make_processor(tagged))
    assert training_chat_template(tiny.make_processor(tagged), placement="keep") == tagged


@pytest.mark.parametrize("placement", ["front", "keep"])
def test_words_of_the_template_do_not_mislead(placement):
    """Such as a system text that says "before" or "behind"."""
    name = "vicuna_v1" if placement == "front" else "vicuna_v1_keep"
    template = "Answer before you look. Leave nobody behind. " + twin(name)
    assert rendered_placement(tiny.make_processor(), template) == placement


def test_a_captions_template_with_tags_is_one_still():
    tagged = tag_images(tiny.make_processor(), twin("plain"), "<Image>{}</Image>")
    for placement in ("front", "keep"):
        with pytest.raises(ValueError, match="leaves every question out"):
            training_chat_template(tiny.make_processor(tagged), placement=placement)


def test_what_cannot_be_rendered_is_left_to_the_collator():
    text_only = "{% for m in messages %}{{ 'Q: ' + m['content'] }}{% endfor %}"
    assert training_chat_template(tiny.make_processor(text_only), placement="keep") == text_only
    with pytest.raises(ValueError, match="leaves every question out: .* for example .*vicuna_v1_keep.jinja"):
        training_chat_template(tiny.make_processor(twin("plain")), placement="keep")


def test_stage_ones_template_moves_nothing():
    collator = LlavaDataCollator(tiny.make_processor(twin("plain")), placement="keep")
    caption = row(
        {"role": "user", "content": [{"type": "text", "text": "Describe."}, {"type": "image"}]}, assistant("A dog.")
    )
    assert decode(collator, collator([caption])) == "<s><image>A dog.\n</s>"


# How many


def talk(*pictures: int, **columns) -> dict:
    turns = [message for count in pictures for message in (user("Hi", images=count), assistant("Yes"))]
    return row(*turns, **columns)


@pytest.mark.parametrize(
    ("pictures", "kept"),
    [((1, 1), 2), ((2,), 1), ((1, 2, 0), 1), ((0, 3), 1), ((2, 0, 1), 2)],
    ids=str,
)
def test_max_images_drops_whole_exchanges_from_the_end(pictures, kept, caplog):
    collator = make_collator("vicuna_v1", max_images=2)
    with caplog.at_level(logging.WARNING):
        batch = collator([talk(*pictures, id="seven")])
    assert decode(collator, batch).count("Yes</s>") == kept
    assert ("pixel_values" in batch) == bool(sum(pictures[:kept]))
    cut = kept < len(pictures)
    assert collator.shortened == cut
    said = (
        f"row 'seven': {sum(pictures)} pictures for max_images=2; kept the first {kept} of {len(pictures)} exchanges"
    )
    assert (said in caplog.text) == cut


def test_a_question_without_an_answer_goes_with_its_pictures():
    collator = make_collator("vicuna_v1", max_images=1)
    batch = collator([row(*talk(1)["messages"], user("And these?", images=2), images=[picture()] * 3)])
    assert decode(collator, batch).count("<image>") == 1 and batch["pixel_values"].shape[0] == 1


def test_a_first_exchange_with_too_many_pictures_is_refused_or_dropped(caplog, tmp_path):
    rows = [talk(1, id="few"), talk(3, 0, id="many")]
    with pytest.raises(ValueError, match="row 'many': 3 pictures for max_images=2, .* Raise --max_images"):
        make_collator("vicuna_v1", max_images=2)(rows)
    collator = make_collator("vicuna_v1", max_images=2, overlong="drop")
    rows[1]["images"] = [tmp_path / "never opened.png"] * 3
    batch = collator(rows)
    assert batch["input_ids"].shape[0] == 1 and collator.dropped == 1 and "row 'many'" in caplog.text
    alone = collator(rows[1:])
    assert (alone["labels"] == -100).all() and alone["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="max_images=0: expected a positive number of pictures"):
        make_collator("vicuna_v1", max_images=0)


def test_a_row_that_is_cut_twice_counts_once():
    short = talk(1)
    limit = make_collator("vicuna_v1")([short])["input_ids"].shape[1]
    collator = make_collator("vicuna_v1", max_images=2, max_length=limit)
    batch = collator([talk(1, 1, 1), short])
    assert batch["input_ids"].shape == (2, limit) and (collator.shortened, collator.dropped) == (1, 0)
    collator = make_collator("vicuna_v1", max_images=1, max_length=limit, overlong="drop")
    long = row(user("Hi " * 9, images=1), assistant("Yes"), user("And?", images=1), assistant("No"))
    assert collator([long, short])["input_ids"].shape == (1, limit)
    assert (collator.shortened, collator.dropped) == (0, 1)


# What is written around them


@pytest.mark.parametrize("name", [*TWINS, *KEEP_TWINS.values()])
@pytest.mark.parametrize("tags", ["<Image>{}</Image>", "<im_start>{}<im_end>", "Picture: {}"])
def test_every_twin_takes_tags(name, tags):
    processor = tiny.make_processor()
    tagged = tag_images(processor, twin(name), tags)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}
    rendered = processor.apply_chat_template([question, assistant("This.")], chat_template=tagged)
    plain = processor.apply_chat_template([question, assistant("This.")], chat_template=twin(name))
    assert rendered == plain.replace("<image>", tags.format("<image>"))
    assert tag_images(processor, tagged, tags) == tagged


def test_tags_are_context_not_answer():
    processor = tiny.make_processor()
    collator = LlavaDataCollator(
        processor, placement="keep", chat_template=tag_images(processor, twin("vicuna_v1_keep"), "<Image>{}</Image>")
    )
    batch = collator([ask("A <image>, B <image>?")])
    tagged = "A <Image><image></Image>, B <Image><image></Image>? "
    assert decode(collator, batch) == f"<s>USER: {tagged}ASSISTANT: Yes</s>"
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == " Yes</s>"


@pytest.mark.parametrize("tags", ["<Image>", "{}", "'{}'", '"{}"', "{{}}", "\\{}", "{}{}", "{% x %}{}"])
def test_tags_that_cannot_be_written_are_refused(tags):
    with pytest.raises(ValueError, match="expected words around one {}"):
        tag_images(tiny.make_processor(), twin("vicuna_v1"), tags)


def test_tags_go_into_plain_text_and_past_comments():
    template = "{# writes <image> #}{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    template += "<image>{% endif %}{% endfor %}{% endfor %}"
    processor = tiny.make_processor()
    tagged = tag_images(processor, template, "<Image>{}</Image>")
    assert processor.apply_chat_template([user("Hi", images=1)], chat_template=tagged) == "<Image><image></Image>"


def test_tags_do_not_nest():
    tagged = tag_images(tiny.make_processor(), twin("vicuna_v1"), "<Image>{}</Image>")
    with pytest.raises(ValueError, match="has words around <image> already"):
        tag_images(tiny.make_processor(), tagged, "<im_start>{}<im_end>")


def test_a_template_that_does_not_write_the_image_token_out_is_refused():
    template = twin("vicuna_v1").replace("'<image>\\n'", "'<im' + 'age>\\n'")
    with pytest.raises(ValueError, match="does not write <image> out"):
        tag_images(tiny.make_processor(), template, "<Image>{}</Image>")


# Properties

COLLATORS = {}
pieces = st.lists(st.sampled_from(["<image>", "<image>", "\n", " ", "a", "Why?", ", ", "1: "]), min_size=1, max_size=8)


@given(
    talks=st.lists(
        st.lists(st.tuples(pieces, st.sampled_from(["Yes", "No, 7.", "|1|2|"])), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    ),
    family=st.sampled_from(sorted(KEEP_TWINS)),
    placement=st.sampled_from(["keep", "front"]),
    tokenizer=st.sampled_from(["byte", "llama", "qwen"]),
)
@settings(max_examples=150, deadline=None)
def test_exactly_the_answers_of_interleaved_rows_train_alone_and_in_any_batch(talks, family, placement, tokenizer):
    key = (family, placement, tokenizer)
    collator = COLLATORS.setdefault(key, make_collator(*key))
    rows = []
    for exchanges in talks:
        texts = [text for question, answer in exchanges for text in ("".join(question), answer)]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        rows.append({"messages": messages, "images": [picture()] * "".join(texts).count("<image>")})
    check_labels(collator, rows)
    for single in rows:
        ids = collator([single])["input_ids"][0].tolist()
        assert ids.count(collator.processor.image_token_id) == tiny.IMAGE_TOKENS * len(single["images"])
