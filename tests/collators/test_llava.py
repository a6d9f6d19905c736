"""The batch, label, truncation and placement contracts of `LlavaDataCollator`."""

import io
import logging
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing

import collators.llava
import tiny
from collators import LlavaDataCollator, chat_template_path, load_image, training_chat_template
from collators.templates import KEEP_TWINS, TWINS
from tiny import assistant, picture, row, user

CONVERSATIONS = ("vicuna_v1", "vip_llava", "mistral_instruct", "llama_2", "chatml", "interleave_qwen")
RELEASED = [
    (tiny.LLAVA_1_5, "vicuna_v1"),
    (tiny.VIP_LLAVA, "vip_llava"),
    (tiny.LLAVA_1_6_MISTRAL, "mistral_instruct"),
    (tiny.ONEVISION, "chatml"),
    (tiny.INTERLEAVE_QWEN, "interleave_qwen"),
]
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


def twin(name: str) -> str:
    return chat_template_path(name).read_text(encoding="utf-8")


def make_collator(template: str = "vicuna_v1", tokenizer: str = "byte", processor: dict | None = None, **kwargs):
    stop = "<|im_end|>" if template in ("chatml", "interleave_qwen") else "</s>"
    built = tiny.make_processor(twin(template), tokenizer, **(processor or {}))
    kwargs.setdefault("stop_token_ids", [built.tokenizer.convert_tokens_to_ids(stop)])
    return LlavaDataCollator(built, **kwargs)


def trained(collator, batch, index: int = 0) -> list[str]:
    """The trained spans of one row, decoded."""
    labels = batch["labels"][index].tolist()
    spans, current = [], []
    for label in [*labels, -100]:
        if label != -100:
            current.append(label)
        elif current:
            spans.append(collator.processor.tokenizer.decode(current))
            current = []
    return spans


# Literal expectations


def test_literal_batch():
    """`USER: <image>\\nHi ASSISTANT: Yes</s>`, token for token."""
    collator = make_collator()
    batch = collator([row(user("Hi", images=1), assistant("Yes"))])
    tokens = ["<s>", "USER", ":", "Ġ"] + ["<image>"] * 4 + ["Ċ", "H", "i", "ĠA", "SS", "IST", "AN", "T", ":"]
    answer = ["Ġ", "Yes", "</s>"]
    ids = collator.processor.tokenizer.convert_tokens_to_ids(tokens + answer)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["attention_mask"].tolist() == [[1] * len(ids)]
    assert batch["labels"].tolist() == [[-100] * len(tokens) + ids[-3:]]
    assert {key: value.dtype for key, value in batch.items() if key != "pixel_values"} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("template", "spans"),
    [
        ("vicuna_v1", [" Yes</s>", " No</s>"]),
        ("vip_llava", [" Yes</s>", " No</s>"]),
        ("mistral_instruct", [" Yes</s>", " No</s>"]),
        ("interleave_qwen", ["Yes<|im_end|>", "No<|im_end|>"]),
        ("llama_2", [" Yes </s>", " No </s>"]),
        ("chatml", ["Yes<|im_end|>", "No<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("first", ["plain rows", "system"])
def test_every_answer_and_its_stop_token_is_trained(template, spans, first):
    collator = make_collator(template)
    messages = [user("Hi", images=1), assistant("Yes"), user("And now?"), assistant("No")]
    batch = collator([row(*([SYSTEM] if first == "system" else []), *messages)])
    assert trained(collator, batch) == spans


def test_plain_renders_the_picture_and_the_caption_only():
    collator = make_collator("plain")
    batch = collator([row(user("Describe the image concisely.", images=1), assistant("A red square."))])
    decoded = collator.processor.tokenizer.decode(batch["input_ids"][0])
    assert decoded == "<s>" + "<image>" * 4 + "A red square.\n</s>"
    assert trained(collator, batch) == ["A red square.\n</s>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("Hi"), assistant("Yes")], "this row has no picture"),
        ([user("Hi", images=1), assistant("Yes"), user("And?"), assistant("No")], "one user turn"),
    ],
)
def test_plain_refuses_what_it_would_drop(messages, message):
    collator = make_collator("plain")
    with pytest.raises(ValueError, match=f"row 'bad': the chat template cannot render it: .*{message}"):
        collator([row(user("Hi", images=1), assistant("Yes")), row(*messages, id="bad")])


@pytest.mark.parametrize("tokenizer", ["byte", "llama"])
@pytest.mark.parametrize("template", CONVERSATIONS)
def test_words_of_the_template_typed_in_a_text_change_nothing(template, tokenizer):
    """FIELD NOTES §1: the original code drops such samples whole."""
    collator = make_collator(template, tokenizer)
    odd = "USER: no ASSISTANT: yes </s> [/INST] <|im_end|> end"
    batch = collator([row(user(odd), assistant(odd), user("And?"), assistant("No"))])
    stop = collator.processor.tokenizer.decode(sorted(collator.stop_token_ids))
    first, second = trained(collator, batch)
    assert first.strip().removesuffix(stop).strip() == odd
    assert second.strip().removesuffix(stop).strip() == "No"


def test_an_empty_answer_trains_its_stop_token():
    collator = make_collator()
    assert trained(collator, collator([row(user("Hi"), assistant(""))])) == [" </s>"]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", [" Yes</s>", " No</s>"]),
        ("last_assistant", [" No</s>"]),
        ("all", ["USER: ", "\nHi ASSISTANT: Yes</s>USER: And? ASSISTANT: No</s>"]),
    ],
)
def test_train_on(train_on, expected):
    collator = make_collator(train_on=train_on)
    rows = [row(user("Hi", images=1), assistant("Yes"), user("And?"), assistant("No")), row(user("A"), assistant("B"))]
    assert trained(collator, collator(rows)) == expected


def test_train_on_all_trains_no_bos():
    """llama_2 opens every round with one."""
    collator = make_collator("llama_2", train_on="all")
    batch = collator([row(user("Hi"), assistant("Yes"), user("And?"), assistant("No"))])
    assert trained(collator, batch) == ["[INST] Hi [/INST] Yes </s>", "[INST] And? [/INST] No </s>"]


def test_train_on_all_keeps_the_stop_token_of_a_tokenizer_whose_bos_is_its_eos():
    collator = make_collator(train_on="all", processor={"bos_token": "</s>"})
    batch = collator([row(user("Hi"), assistant("Yes"))])
    assert trained(collator, batch)[0].endswith("Yes</s>")


# Padding


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_do_not_depend_on_batch_mates_nor_on_the_pad_token(side, pad):
    """`labels[labels == pad_token_id] = -100` would erase every stop token when pad is EOS (FIELD NOTES §1)."""
    collator = make_collator(padding_side=side, processor={"pad_token": pad})
    rows = [
        row(user("Hi", images=1), assistant("Yes")),
        row(user("A much longer question about nothing?"), assistant("A longer answer."), user("?"), assistant("No")),
        row(user("Two", images=2), assistant("Yes, two.")),
    ]
    batch = collator(rows)
    assert batch["pixel_values"].shape[0] == 3
    for index, single in enumerate(rows):
        alone = collator([single])
        kept = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][kept].tolist() == alone["input_ids"][0].tolist()
        assert batch["labels"][index][kept].tolist() == alone["labels"][0].tolist()
        assert (batch["labels"][index][~kept] == -100).all()
        assert kept[0 if side == "right" else -1]


def test_text_only_batch_has_no_pixels():
    batch = make_collator()([row(user("Hi"), assistant("Yes")), row(user("Hello"), assistant("No"))])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_pad_to_multiple_of():
    batch = make_collator(pad_to_multiple_of=32)([row(user("Hi"), assistant("Yes"))])
    assert batch["input_ids"].shape == (1, 32)


def test_a_missing_pad_token_is_named():
    collator = make_collator(processor={"pad_token": None})
    collator([row(user("Hi"), assistant("Yes"))])
    with pytest.raises(ValueError, match="no pad token: set processor.tokenizer.pad_token"):
        collator([row(user("Hi"), assistant("Yes"))] * 2)


# Prompts: training equals inference


@pytest.mark.parametrize("tokenizer", ["byte", "llama"])
@pytest.mark.parametrize(
    ("released", "name"),
    RELEASED,
)
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("system", [False, True])
def test_twin_has_the_released_prompt(released, name, tokenizer, images, system):
    """The ids up to the answer are those that the released template feeds at inference, BOS included."""
    collator = make_collator(name, tokenizer)
    messages = [*([SYSTEM] if system else []), user("What is it?", images=images)]
    prompt = collator.processor.apply_chat_template(
        messages,
        chat_template=released,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": [picture()] * images} if images else {},
    )["input_ids"][0]
    batch = collator([row(*messages, assistant("A dog."))])
    start = (batch["labels"][0] != -100).nonzero()[0, 0]
    assert batch["input_ids"][0, :start].tolist() == prompt
    assert prompt[0] == collator.processor.tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("released", "name"),
    RELEASED,
)
def test_the_twin_of_a_released_template_is_found(released, name):
    assert training_chat_template(tiny.make_processor(released)) == twin(name)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_twin_is_its_own_twin(name):
    assert training_chat_template(tiny.make_processor(twin(name))) == twin(name)


def test_stage_two_does_not_take_stage_ones_template():
    with pytest.raises(ValueError, match="leaves every question out: pass --chat_template_path"):
        training_chat_template(tiny.make_processor(twin("plain")))
    assert training_chat_template(tiny.make_processor(twin("plain")), chat_template_path("vicuna_v1")) == twin(
        "vicuna_v1"
    )


def test_chat_template_errors(tmp_path):
    with pytest.raises(ValueError, match="expected an existing .jinja file"):
        training_chat_template(tiny.make_processor(), tmp_path / "none.jinja")
    with pytest.raises(ValueError, match="no chat template: pass --chat_template_path"):
        training_chat_template(tiny.make_processor(chat_template=None))
    with pytest.raises(ValueError, match=r"several chat templates \(default, rag\): pass --chat_template_path"):
        training_chat_template(tiny.make_processor(chat_template={"default": "", "rag": ""}))
    with pytest.raises(ValueError, match="expected one of vicuna_v1"):
        chat_template_path("vicuna")


def test_every_template_file_is_known():
    found = {path.stem for path in Path(collators.llava.__file__).parent.glob("chat_templates/*.jinja")}
    assert found == {*TWINS, *KEEP_TWINS.values()}


def test_a_template_that_trains_a_stop_token_is_kept():
    """Its prompts are vicuna_v1's; its answers are its own affair."""
    own = twin("vicuna_v1").replace("' ' + texts", "' So: ' + texts")
    assert training_chat_template(tiny.make_processor(own)) == own


def test_an_unknown_template_is_left_to_the_collator():
    assert training_chat_template(tiny.make_processor(NO_MARKS), placement="keep") == NO_MARKS


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_string_content_renders_like_parts(name):
    """The released llava-1.5 and OneVision templates render string content as nothing at all (FIELD NOTES §3)."""
    processor = tiny.make_processor(twin(name))
    parts = [user("What is it?"), assistant("A dog."), user("Sure?")]
    strings = [{"role": m["role"], "content": m["content"][0]["text"]} for m in parts]
    assert "What is it?" in processor.apply_chat_template(strings)
    assert processor.apply_chat_template(strings) == processor.apply_chat_template(parts)


# Templates that do not train a stop token


@pytest.mark.parametrize(
    ("released", "stop"),
    [
        (tiny.LLAVA_1_5, "</s>"),
        (tiny.VIP_LLAVA, "</s>"),
        (tiny.ONEVISION, "<|im_end|>"),
        (tiny.INTERLEAVE_QWEN, "<|im_end|>"),
    ],
    ids=["llava-1.5", "vip-llava", "onevision", "interleave"],
)
def test_a_released_template_that_trains_no_stop_token_is_refused(released, stop):
    processor = tiny.make_processor(released)
    with pytest.raises(ValueError, match=r"not in a stop token .*Pass a training template"):
        LlavaDataCollator(processor, stop_token_ids=[processor.tokenizer.convert_tokens_to_ids(stop)])


NO_MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_without_marks_is_split_by_prefix_renders():
    """The newline behind <|im_end|> belongs to the next header and is not trained."""
    processor = tiny.make_processor(NO_MARKS)
    collator = LlavaDataCollator(processor, stop_token_ids=[processor.tokenizer.convert_tokens_to_ids("<|im_end|>")])
    batch = collator(
        [
            row(SYSTEM, user("Hi", images=1), assistant("Yes"), user("And?"), assistant("No")),
            row(user("Hi"), assistant("")),
        ]
    )
    assert trained(collator, batch) == ["Yes<|im_end|>", "No<|im_end|>"]
    assert trained(collator, batch, 1) == ["<|im_end|>"]
    assert batch["input_ids"].shape[0] == 2 and batch["pixel_values"].shape[0] == 1


def test_a_template_without_marks_may_end_in_its_stop_token():
    """Nothing is left behind the last answer then, and nothing may be put there."""
    template = NO_MARKS.replace("<|im_end|>\n", "<|im_end|>")
    processor = tiny.make_processor(template)
    collator = LlavaDataCollator(processor, stop_token_ids=processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    batch = collator([row(user("Hi"), assistant("Yes"))])
    decoded = processor.tokenizer.decode(batch["input_ids"][0])
    assert decoded == "<s><|im_start|>user\nHi<|im_end|><|im_start|>assistant\nYes<|im_end|>"
    batch = collator([row(user("Hi"), assistant("Yes"), user("And?", images=1))])
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("And?<|im_end|>")


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [
        (twin("vicuna_v1").partition("{%- if add_generation_prompt")[0], {}),
        (tiny.LLAMA_3_NEXT, {"eos_token": "<|im_end|>"}),
    ],
    ids=["no generation prompt", "llama-3-next"],
)
def test_a_template_whose_inference_prompt_differs_is_refused(template, tokenizer):
    kind = "qwen" if tokenizer else "byte"
    with pytest.raises(ValueError, match=r"feed .* up to an answer at inference, but .* in training"):
        LlavaDataCollator(tiny.make_processor(template, kind, **tokenizer))


def test_a_tokenizer_that_adds_eos_is_refused():
    processor = tiny.make_processor(twin("vicuna_v1"))
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(ValueError, match="a tokenizer must not add EOS by itself"):
        LlavaDataCollator(processor)


def test_a_missing_eos_token_is_named():
    with pytest.raises(ValueError, match="no EOS token: pass stop_token_ids="):
        LlavaDataCollator(tiny.make_processor(twin("vicuna_v1"), eos_token=None))


def test_a_text_that_begins_with_bos_is_refused():
    """transformers would leave BOS out of every row of such a batch."""
    system = {"role": "system", "content": [{"type": "text", "text": "<s> Be brief."}]}
    with pytest.raises(ValueError, match="row 'odd': its first text begins with <s>"):
        make_collator()([row(system, user("Hi"), assistant("Yes"), id="odd"), row(user("Hi"), assistant("Yes"))])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_MARKS.replace("{{ '<|im_end|>\n' }}", ""), "not in a stop token"),
        ("{{ messages | length }}" + NO_MARKS, "is no prefix of the whole"),
    ],
    ids=["no stop token", "not prefix-stable"],
)
def test_a_template_without_marks_that_is_not_understood_is_refused(template, message):
    processor = tiny.make_processor(template)
    with pytest.raises(ValueError, match=message):
        LlavaDataCollator(processor, stop_token_ids=[processor.tokenizer.convert_tokens_to_ids("<|im_end|>")])


# Truncation


LONG = [
    user("Hi", images=1),
    assistant("Yes"),
    user("Two", images=1),
    assistant("No, not at all."),
    user("?"),
    assistant("No"),
]


def test_truncation_drops_whole_exchanges_with_their_pictures(caplog):
    free = make_collator()
    ends = [index + 1 for index, label in enumerate(free([row(*LONG)])["labels"][0].tolist()) if label == 2]
    for limit in range(ends[0], ends[2] + 1):
        collator = make_collator(max_length=limit)
        kept = sum(end <= limit for end in ends)
        with caplog.at_level(logging.WARNING):
            batch = collator([row(*LONG, id="seven")])
        assert batch["input_ids"].shape[1] == ends[kept - 1]
        assert batch["pixel_values"].shape[0] == min(kept, 2)
        assert trained(collator, batch) == [" Yes</s>", " No, not at all.</s>", " No</s>"][:kept]
        assert collator.shortened == (kept < 3)
    assert "row 'seven'" in caplog.text and "kept the first 1 of 3 exchanges" in caplog.text


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_beside_other_rows(side):
    free = make_collator()
    limit = free([row(*LONG[:2])])["input_ids"].shape[1]
    collator = make_collator(max_length=limit, padding_side=side)
    also_long = [user("A"), assistant("B"), user("And a question as long as can be?"), assistant("N")]
    batch = collator([row(*also_long), row(*LONG), row(user("C"), assistant("D"))])
    assert batch["input_ids"].shape == (3, limit) and batch["pixel_values"].shape[0] == 1
    assert [trained(collator, batch, i) for i in range(3)] == [[" B</s>"], [" Yes</s>"], [" D</s>"]]


def test_a_question_without_an_answer_at_the_end_goes_first():
    free = make_collator()
    limit = free([row(*LONG[:2])])["input_ids"].shape[1]
    collator = make_collator(max_length=limit)
    assert trained(collator, collator([row(*LONG[:3])])) == [" Yes</s>"]


def test_overlong_rows_are_refused_or_dropped_by_name(caplog):
    rows = [row(user("Hi"), assistant("Yes"), id="short"), row(*LONG, id="long")]
    limit = make_collator()(rows[:1])["input_ids"].shape[1]
    with pytest.raises(ValueError, match="row 'long': .* not even the first exchange fits. Raise --max_length"):
        make_collator(max_length=limit)(rows)
    collator = make_collator(max_length=limit, overlong="drop")
    batch = collator(rows)
    assert batch["input_ids"].shape[0] == 1 and "pixel_values" not in batch
    assert collator.dropped == 1 and "row 'long'" in caplog.text


def test_a_batch_of_overlong_rows_alone_trains_nothing(caplog):
    """With a batch of one row, dropping it must not end the run: what stands in for it carries no loss."""
    limit = make_collator()([row(user("What?", images=1), assistant("This."))])["input_ids"].shape[1]
    collator = make_collator(max_length=limit, overlong="drop")
    batch = collator([row(user("Hi " * 20), assistant("Yes"), id="long")])
    assert (batch["labels"] == -100).all() and batch["input_ids"].shape == (1, limit)
    assert batch["pixel_values"].shape == (1, 3, 16, 16) and "row 'long'" in caplog.text and collator.dropped == 1
    with pytest.raises(ValueError, match="not even a made-up exchange"):
        make_collator(max_length=4, overlong="drop")([row(user("Hi"), assistant("Yes"))])


# Placement


KEEP = NO_MARKS


def interleaved():
    content = [
        {"type": "text", "text": "First "},
        {"type": "image"},
        {"type": "text", "text": " then "},
        {"type": "image"},
        {"type": "text", "text": " end "},
    ]
    return row({"role": "user", "content": content}, assistant("Yes"))


def test_placement_keep_renders_pictures_where_they_stand():
    processor = tiny.make_processor(KEEP)
    collator = LlavaDataCollator(
        processor, placement="keep", stop_token_ids=[processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    )
    decoded = processor.tokenizer.decode(collator([interleaved()])["input_ids"][0])
    assert "user\nFirst " + "<image>" * 4 + " then " + "<image>" * 4 + " end <|im_end|>" in decoded


def test_placement_keep_notices_a_template_that_moves_pictures():
    collator = make_collator(placement="keep")
    collator([row(user("What?", images=2), assistant("Yes"))])
    with pytest.raises(ValueError, match="renders the pictures of a turn before its text"):
        collator([interleaved()])


def test_placement_front_is_llavas_habit(caplog):
    """Pictures first, the texts untouched: what the released templates render of the same parts at inference."""
    collator = make_collator()
    collator([row({"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}, assistant("Yes"))])
    assert not caplog.text
    decoded = collator.processor.tokenizer.decode(collator([interleaved()])["input_ids"][0])
    assert decoded == "<s>USER: " + ("<image>" * 4 + "\n") * 2 + "First   then   end  ASSISTANT: Yes</s>"
    assert "row 0 of the batch: pictures between texts were moved to the front" in caplog.text and collator.moved == 1


# Row forms


def test_rows_of_strings():
    collator = make_collator()
    strings = {
        "messages": [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Yes"}],
        "images": [picture()],
    }
    single = {"messages": strings["messages"], "image": picture()}
    without_placeholder = {**strings, "messages": [{"role": "user", "content": "Hi"}, strings["messages"][1]]}
    expected = collator([row(user("Hi", images=1), assistant("Yes"))])["input_ids"].tolist()
    assert collator([strings])["input_ids"].tolist() == expected
    assert collator([single])["input_ids"].tolist() == expected and "pixel_values" in collator([single])
    assert collator([without_placeholder])["input_ids"].tolist() == expected


def test_none_keys_of_arrow_are_ignored_and_rows_are_not_changed():
    """Arrow unifies part structs; `{'index': None, 'text': …}` is the layout of llava-instruct-mix-vsft."""
    collator = make_collator()
    messages = [
        {
            "role": "user",
            "content": [{"index": 0, "text": None, "type": "image"}, {"index": None, "text": "Hi", "type": "text"}],
        },
        {"role": "assistant", "content": [{"index": None, "text": "Yes", "type": "text", "image": None}]},
    ]
    dataset = datasets.Dataset.from_list([{"messages": messages}]).add_column("images", [["x.png"]])
    single = {**dataset[0], "images": [picture()]}
    before = pickle.dumps(single)
    batch = collator([single])
    assert batch["input_ids"].tolist() == collator([row(user("Hi", images=1), assistant("Yes"))])["input_ids"].tolist()
    assert pickle.dumps(single) == before


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"conversations": []}, "row 5: expected `messages`"),
        ({"messages": ["Hi", "Yes"], "images": []}, "row 5: expected `messages`"),
        ({"messages": [{"role": "user", "content": ["Hi"]}, assistant("x")], "images": []}, "content is list"),
        (
            {"messages": [user("Hi", images=1), assistant("x")], "images": picture()},
            "`images` is Image; expected a list",
        ),
        ({"messages": [assistant("Hi")], "images": []}, "row 5: roles are assistant; expected"),
        ({"messages": [user("Hi"), user("Ho"), assistant("x")], "images": []}, "roles are user, user, assistant"),
        ({"messages": [user("Hi")], "images": []}, "at least one answer"),
        (
            {"messages": [user("Hi", images=1), assistant("x")], "images": []},
            r"1 image placeholder\(s\) for 0 picture",
        ),
        ({"messages": [user("Hi"), assistant("x")], "images": [picture()]}, r"0 image placeholder\(s\) for 1 picture"),
        ({"messages": [user("a <image>"), assistant("x")], "images": [picture()]}, "typed inside a user text"),
        ({"messages": [user("a"), assistant("<image>")], "images": []}, "typed inside a assistant text"),
        ({"messages": [{"role": "user", "content": None}, assistant("x")], "images": []}, "content is NoneType"),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "video", "url": None}]}, assistant("x")],
                "images": [],
            },
            "a user turn holds {'type': 'video'}",
        ),
        (
            {"messages": [user("Hi", images=1), assistant("x")], "images": ["/none.png"]},
            "row 5: /none.png: no such picture",
        ),
        ({"messages": [user("Hi", images=1), assistant("x")], "images": [3]}, "row 5: .* found int"),
    ],
)
def test_bad_rows_are_named(broken, message):
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message):
        make_collator()([{"id": 5, **broken}])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"train_on": "answers"}, "expected one of 'assistant', 'last_assistant', 'all'"),
        ({"placement": "back"}, "expected one of 'front', 'keep'"),
        ({"overlong": "cut"}, "expected one of 'raise', 'drop'"),
        ({"padding_side": "both"}, "expected one of 'left', 'right'"),
        ({"max_length": 0}, "expected a positive number of tokens"),
    ],
)
def test_options_are_closed_sets(option, message):
    with pytest.raises(ValueError, match=message):
        make_collator(**option)


# Purity


def test_it_sets_nothing_on_the_processor():
    processor = tiny.make_processor(twin("vicuna_v1"), padding_side="left")
    before = (str(processor.to_dict()), repr(processor.tokenizer), processor.chat_template)
    collator = LlavaDataCollator(processor, chat_template=twin("vicuna_v1"), max_length=64)
    collator([row(user("Hi", images=1), assistant("Yes")), row(user("Hello"), assistant("No"))])
    assert (str(processor.to_dict()), repr(processor.tokenizer), processor.chat_template) == before


def test_it_survives_pickling_to_spawned_workers():
    collator = make_collator()
    rows = [row(user("Hi", images=1), assistant("Yes"))]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        batch = pool.submit(collator, rows).result(timeout=120)
    assert batch["labels"].tolist() == collator(rows)["labels"].tolist()


def test_the_file_pastes_into_an_empty_namespace():
    source = Path(collators.llava.__file__).read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    exec(compile(source, "cell", "exec"), namespace)
    batch = namespace["LlavaDataCollator"](tiny.make_processor(twin("vicuna_v1")))([row(user("Hi"), assistant("Yes"))])
    assert (batch["labels"] != -100).sum() == 3


# Pictures


def encoded(image: Image.Image, fmt: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


def test_pictures_are_decoded_as_a_person_sees_them(tmp_path):
    grey16 = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left column is the upright picture's top row
    turned = Image.new("RGB", (2, 1), "red")
    turned.putpixel((1, 0), (0, 0, 255))
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    frames = [picture("red", (1, 1)), picture("blue", (1, 1))]
    cases = {
        "16-bit": (encoded(grey16), [(0, 0, 0), (128, 128, 128), (255, 255, 255)]),
        "dark 16-bit": (encoded(Image.fromarray(np.array([[0, 257]], dtype=np.uint16))), [(0, 0, 0), (1, 1, 1)]),
        "float": (
            encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF"),
            [(0,) * 3, (128,) * 3, (255,) * 3],
        ),
        "transparent": (encoded(clear), [(255, 255, 255)]),
        "palette": (encoded(picture("red", (1, 1)).convert("P")), [(255, 0, 0)]),
        "CMYK": (encoded(picture("white", (1, 1)).convert("CMYK"), "TIFF"), [(255, 255, 255)]),
        "LAB": (encoded(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"), [(255, 255, 255)]),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), [(255, 0, 0)]),
    }
    for name, (data, expected) in cases.items():
        image = load_image(data)
        assert image.mode == "RGB", name
        assert np.abs(np.asarray(image).reshape(-1, 3).astype(int) - np.array(expected)).max() <= 3, name
    upright = load_image(encoded(turned, exif=exif))
    assert upright.size == (1, 2) and upright.getpixel((0, 0)) == (255, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(turned))
    for source in (
        path,
        str(path),
        path.read_bytes(),
        {"bytes": path.read_bytes(), "path": None},
        {"path": str(path), "bytes": None},
        turned,
    ):
        assert load_image(source).tobytes() == turned.tobytes()


def test_broken_pictures_are_named_every_time(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for fmt in ("PNG", "JPEG"):
        data = encoded(noise, fmt)
        path = tmp_path / f"torn.{fmt.lower()}"
        path.write_bytes(data[: len(data) // 2])
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"torn.{fmt.lower()}: the picture cannot be decoded .*Repair or remove"
            ):
                load_image(path)
    with pytest.raises(ValueError, match="bad.png: the picture cannot be decoded"):
        load_image({"bytes": b"no picture", "path": "bad.png"})
    with pytest.raises(ValueError, match="a URL; nothing is fetched"):
        load_image("https://example.com/a.png")
    with pytest.raises(ValueError, match="known ranges"):
        load_image(Image.fromarray(np.array([[-1.0, 2.0]], dtype=np.float32)))
    (tmp_path / "good.png").write_bytes(encoded(noise))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="good.png: .*decompression bomb"):
        load_image(tmp_path / "good.png")


# Properties

texts = st.text(
    alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20
).filter(lambda text: text.strip() and "<" not in text)


@given(
    exchanges=st.lists(st.tuples(texts, texts, st.integers(0, 2)), min_size=1, max_size=4),
    system=st.booleans(),
    template=st.sampled_from(CONVERSATIONS),
    tokenizer=st.sampled_from(["byte", "llama", "qwen"]),
)
@settings(max_examples=150, deadline=None)
def test_exactly_the_answers_and_stop_tokens_are_trained(exchanges, system, template, tokenizer):
    collator = collator_of(template, tokenizer)
    messages = [SYSTEM] if system else []
    for question, answer, images in exchanges:
        messages += [user(question, images=images), assistant(answer)]
    batch = collator([row(*messages)])
    stop = collator.processor.tokenizer.decode(sorted(collator.stop_token_ids))
    answers = [span.removesuffix(stop).strip() for span in trained(collator, batch)]
    assert all(span.endswith(stop) for span in trained(collator, batch))
    decode = collator.processor.tokenizer.decode
    encode = collator.processor.tokenizer.encode
    # What a tokenizer cannot round-trip (some blanks) is compared after one round trip of its own.
    assert answers == [decode(encode(" " + answer, add_special_tokens=False)).strip() for _, answer, _ in exchanges]
    bos = collator.processor.tokenizer.bos_token_id
    assert bos is None or batch["input_ids"][0, 0] == bos


def test_a_newline_that_the_tokenizer_merges_with_the_header_is_logged(caplog):
    """Nothing in the text is changed; Qwen2's tokenizer makes one token of two newlines."""
    collator = make_collator("chatml", "qwen")
    collator([row(user("Hi"), assistant("Yes")), row(user("Hi"), assistant("\nYes"), id="odd")])
    assert collator.merged == 1 and "row 'odd': an answer begins with a newline" in caplog.text
    collator = make_collator("vicuna_v1", "qwen")
    collator([row(user("Hi"), assistant("\nYes"))])
    assert collator.merged == 0


blanks = st.text(alphabet=" \n.!aé", max_size=6)


@given(
    exchanges=st.lists(st.tuples(blanks, blanks), min_size=1, max_size=3),
    template=st.sampled_from(CONVERSATIONS),
    tokenizer=st.sampled_from(["byte", "llama", "qwen"]),
)
@settings(max_examples=200, deadline=None)
def test_the_ids_up_to_every_answer_are_the_inference_prompt(exchanges, template, tokenizer):
    """Blanks and newlines at the ends are what tokenizers merge across a boundary."""
    collator = collator_of(template, tokenizer)
    messages = [message for question, answer in exchanges for message in (user(question, images=1), assistant(answer))]
    merged = collator.merged
    batch = collator([row(*messages)])
    if collator.merged > merged:
        assert tokenizer == "qwen" and any("\n" in answer for _, answer in exchanges)
        return
    labels = batch["labels"][0].tolist()
    starts = [i for i, label in enumerate(labels) if label != -100 and labels[i - 1] == -100]
    assert len(starts) == len(exchanges)
    for index, start in enumerate(starts):
        prompt = collator.processor.apply_chat_template(
            messages[: 2 * index + 1],
            chat_template=collator.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images": [picture()] * (index + 1)},
        )["input_ids"][0]
        assert batch["input_ids"][0, :start].tolist() == prompt


COLLATORS = {}


def collator_of(template: str, tokenizer: str) -> LlavaDataCollator:
    return COLLATORS.setdefault((template, tokenizer), make_collator(template, tokenizer))
