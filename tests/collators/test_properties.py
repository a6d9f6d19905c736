"""Whatever the conversations, options and broken rows, a batch holds what inference feeds, and only answers train.

Beside the literal tests. What a batch should be is put together from the prompts of inference here, a row and an
exchange at a time, without the collator's masks, padding and truncation.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
from collators import LlavaDataCollator, chat_template_path, read_row
from collators.row_shapes import BadRow, RowReader
from collators.templates import KEEP_TWINS, TWINS

WORDS = [
    "Why?",
    "Séven.",
    "中文",
    "\U0001f642",
    "\u200b",
    "\n",
    "\n\n",
    " ",
    "\t",
    "<imag",
    "{{ 7 }}",
    "<unk>",
    "<pad>",
]
WORDS += ["</s>", "ASSISTANT: No</s>", "USER: ", "<|im_end|>", "<|im_start|>assistant\n", "[/INST] ", "<<SYS>>", "###"]
COLORS = [(red, green, 77) for red in (0, 100, 200) for green in (0, 128, 255)]
texts = st.lists(st.sampled_from(WORDS), max_size=4).map("".join)
# A colour stands for a picture of it, so that the batch's pixels tell whose they are.
questions = st.lists(st.sampled_from(COLORS) | texts, min_size=1, max_size=4)
exchanges = st.lists(st.tuples(questions, texts), min_size=1, max_size=4)
unanswered = st.just([]) | questions.map(lambda question: [(question, None)])
talks = st.builds(list.__add__, exchanges, unanswered)
# What takes the place of a row that cannot be used.
MADE_UP = tiny.row(tiny.user("What?", 1), tiny.assistant("This."), images=[Image.new("RGB", (64, 48))])
BROKEN = {
    "no answer": {"messages": [tiny.user("Hi")], "images": []},
    "torn": tiny.row(tiny.user("Hi", 1), tiny.assistant("Yes"), images=[b"torn"]),
}


@cache
def make_processor(template: str, tokenizer: str, pad: str):
    return tiny.make_processor(chat_template_path(template).read_text(encoding="utf-8"), tokenizer, pad_token=pad)


def as_row(system: str | None, exchanges: list, front: bool = False) -> dict:
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for question, answer in exchanges:
        question = sorted(question, key=lambda part: isinstance(part, str)) if front else question
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in question]
        messages += [{"role": "user", "content": parts}] + ([] if answer is None else [tiny.assistant(answer)])
    colors = [part for question, _ in exchanges for part in question if not isinstance(part, str)]
    return {"messages": messages, "images": [Image.new("RGB", (16, 16), color) for color in colors]}


def feed(processor, messages: list[dict], images: list, **kwargs) -> list[int]:
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    kwargs["processor_kwargs"] = {"images": [images[:count]]} if count else {}
    return processor.apply_chat_template([messages], tokenize=True, return_dict=True, **kwargs)["input_ids"][0]


def expect(collator: LlavaDataCollator, row: dict) -> tuple[list[int], list[int]]:
    """Ids and labels of a row: from each prompt to the stop token that the turn behind it ends in."""
    processor, messages, images = collator.processor, row["messages"], row["images"]
    ids = feed(processor, messages, images)
    untrained = [processor.image_token_id, processor.tokenizer.bos_token_id]
    if collator.train_on == "all":
        return ids, [-100 if token in untrained else token for token in ids]
    labels = [-100] * len(ids)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in turns if collator.train_on == "assistant" else turns[-1:]:
        asked = feed(processor, messages[:turn], images, add_generation_prompt=True)
        said = feed(processor, messages[: turn + 1], images)
        end = max(place for place, token in enumerate(said) if token in collator.stop_token_ids) + 1
        assert ids[: len(asked)] == asked and ids[:end] == said[:end] and end > len(asked)
        labels[len(asked) : end] = ids[len(asked) : end]
    return ids, labels


@st.composite
def cases(draw):
    template = draw(st.sampled_from([*TWINS, *KEEP_TWINS.values()]))
    tokenizer = draw(st.sampled_from(["byte", "llama", "qwen"]))
    rows = [(draw(st.none() | texts), talk) for talk in draw(st.lists(talks, min_size=1, max_size=3))]
    if template == "plain":  # takes a picture and its caption alone
        rows = [(None, [([COLORS[index], *talk[0][0]], talk[0][1])]) for index, (_, talk) in enumerate(rows)]
    if tokenizer == "qwen":  # which makes one token of newlines across a boundary, as it does for Qwen2 itself
        rows = [
            (system, [(question, answer and answer.lstrip()) for question, answer in talk]) for system, talk in rows
        ]
    for place in draw(st.lists(st.integers(0, len(rows)), max_size=2)):
        rows.insert(place, draw(st.sampled_from(sorted(BROKEN))))
    options = {
        "train_on": draw(st.sampled_from(["assistant", "last_assistant", "all"])),
        "placement": "front" if template in KEEP_TWINS else draw(st.sampled_from(["keep", "keep", "front"])),
        "max_images": draw(st.none() | st.integers(1, 4)),
        "overlong": draw(st.sampled_from(["raise", "drop"])),
        "on_bad_row": draw(st.sampled_from(["skip", "skip", "skip", "raise"])),
        "padding_side": draw(st.sampled_from(["left", "right"])),
        "pad_to_multiple_of": draw(st.sampled_from([None, 8])),
    }
    pad = draw(st.sampled_from(["<pad>", "</s>"]))
    # Where a row is cut: at the end of which exchange of which row, give or take a token.
    cut = draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(-1, 1)))
    return template, tokenizer, pad, rows, options, cut


@given(cases())
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_a_batch_is_what_inference_feeds(case):
    template, tokenizer, pad, rows, options, cut = case
    processor = make_processor(template, tokenizer, pad)
    stop = "<|im_end|>" if template.startswith(("chatml", "interleave_qwen")) else "</s>"
    stops = [processor.tokenizer.convert_tokens_to_ids(stop)]
    collator = LlavaDataCollator(processor, stop_token_ids=stops, **options)
    front = options["placement"] == "front"

    given_rows, candidates = [], []  # of each row: as many of its exchanges as there may be, and their tokens
    for row in rows:
        broken = isinstance(row, str)
        given_rows.append(BROKEN[row] if broken else as_row(*row))
        kept = [] if broken else [as_row(row[0], row[1][: count + 1], front) for count in range(len(row[1]))]
        candidates.append([(prefix, len(feed(processor, **prefix))) for prefix in kept])
    if cut and any(candidates):
        chosen = [found for found in candidates if found][cut[0] % sum(map(bool, candidates))]
        at_end = chosen[cut[1] % len(chosen)][1] + cut[2]
        collator.max_length = max(at_end, len(feed(processor, **MADE_UP)))

    made_up = feed(processor, **MADE_UP)
    unusable = (made_up, [-100] * len(made_up), MADE_UP["images"])
    expected, shortened, dropped, skipped = [], 0, 0, 0
    most_images, most_tokens = collator.max_images or 99, collator.max_length or 9999
    for found in candidates:
        fitting = [row for row, length in found if len(row["images"]) <= most_images and length <= most_tokens]
        if fitting:
            expected.append((*expect(collator, fitting[-1]), fitting[-1]["images"]))
            shortened += len(fitting) < len(found)
        elif found and options["overlong"] == "drop":
            dropped += 1
        else:
            expected.append(unusable)
            skipped += 1
    if skipped and options["on_bad_row"] == "raise":
        with pytest.raises(ValueError, match="row . of the batch"):
            collator(given_rows)
        return
    expected = expected or [unusable]

    batch = collator(given_rows)
    assert (collator.shortened, collator.dropped, collator.skipped) == (shortened, dropped, skipped)
    longest, multiple = max(len(ids) for ids, *_ in expected), options["pad_to_multiple_of"] or 1

    def padded(line: list[int], fill: int) -> list[int]:
        pads = [fill] * (-(-longest // multiple) * multiple - len(line))
        return pads + line if options["padding_side"] == "left" else line + pads

    pad_id = processor.tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [padded(ids, pad_id) for ids, *_ in expected]
    assert batch["attention_mask"].tolist() == [padded([1] * len(ids), 0) for ids, *_ in expected]
    assert batch["labels"].tolist() == [padded(labels, -100) for _, labels, _ in expected]
    images = [image for *_, images in expected for image in images]
    if images:
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["pixel_values"], pixels)
    assert ("pixel_values" in batch) == bool(images)


strings = st.lists(st.sampled_from(["<image>", "<image>", "\n", " ", "Why?", "中", "<imag"]), max_size=5).map("".join)


@given(
    talk=st.lists(st.tuples(strings, strings), min_size=1, max_size=3),
    system=st.just("") | strings,
    extra=st.sampled_from([0, 0, 0, 0, 1, -1]),
    shape=st.sampled_from(["conversations", "messages", "query"]),
    placement=st.sampled_from(["front", "keep"]),
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_a_file_and_the_collator_read_a_row_alike(talk, system, extra, shape, placement):
    """What `load_rows` makes of strings is what the collator would make of them, or both refuse the row."""
    texts = [text for exchange in talk for text in exchange]
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    if shape == "query":
        record = {"query": texts[-2], "response": texts[-1], "history": [list(exchange) for exchange in talk[:-1]]}
    elif shape == "conversations":
        record = {shape: [{"from": turn["role"], "value": turn["content"]} for turn in messages]}
    else:
        record = {shape: list(messages)}
    if system:
        record["system"] = system
        messages.insert(0, {"role": "system", "content": system})
    row = {"messages": messages, "images": ["a.png"] * max(0, "".join(texts[::2]).count("<image>") + extra)}
    count = len(row["images"])
    try:
        read = RowReader(placement)(record, count)
    except BadRow:
        read = None
    # LLaVA's own shape has an <image> for each picture; without any, the other trainers put pictures first.
    if shape == "conversations" and count and "<image>" not in "".join(texts[::2]):
        assert read is None
    elif read is None:
        with pytest.raises(ValueError, match="row 0 of the batch"):
            read_row(row, "<image>", placement=placement)
    else:
        as_read = read_row(row | {"messages": read}, "<image>", placement=placement)
        assert as_read == read_row(row, "<image>", placement=placement)
