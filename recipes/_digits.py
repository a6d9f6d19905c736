"""The quickstart's raw material: real pictures with questions, and a tokenizer and two backbones trained on the spot.

A file of its own because none of it is a LLaVA recipe: it stands in for the picture collection and for the pretrained
CLIP and Vicuna that a real run downloads, so that the quickstart needs no network and no GPU.

The pictures are the 1,797 scans of handwritten digits that scikit-learn ships, 8 × 8 pixels in 17 shades
(https://archive.ics.uci.edu/dataset/80). Both backbones see held-in scans only; the language model sees none at all.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from collators import load_image

SIDE = 32  # pixels of an enlarged scan and of a page with a table, and the tower's picture size
PATCH = 8  # so a picture is 4 × 4 image tokens; a scan in its own size, as a table's cell shows it, is one of them
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WORDS += ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
# What a text names besides digits, so that the language model learns to look for the digit in what precedes.
OTHER_WORDS = ("ink", "paper", "line", "curve", "stroke", "edge", "corner", "loop", "white", "black", "grey", "dot")
INSTRUCTIONS = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Give a short and clear explanation of the image.",
    "Write a terse but informative summary of the picture.",
    "What is in the photo?",
)
# kind of question → its wordings, its answer for a digit
QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[int], str]]] = {
    "which_digit": (
        ("Which digit is this?", "What digit is written here?"),
        lambda digit: f"{WORDS[digit].capitalize()}.",
    ),
    "even_or_odd": (
        ("Is it even or odd?", "Is this number odd or even?"),
        lambda digit: "Odd." if digit % 2 else "Even.",
    ),
    "plus_one": (
        ("What is it plus one?", "Which number comes next?"),
        lambda digit: f"{WORDS[digit + 1].capitalize()}.",
    ),
    "greater_than_five": (
        ("Is it greater than five?", "Is this number above five?"),
        lambda digit: "Yes." if digit > 5 else "No.",
    ),
}
# kind of question on two pictures → its wordings, its wording after the other kind, its answer for two digits
PAIR_QUESTIONS: dict[str, tuple[tuple[str, ...], str, Callable[[int, int], str]]] = {
    "which_is_larger": (
        (
            "Here is <image> and here is <image>. Which is larger?",
            "First see <image>, then <image>. Which one is larger?",
            "<image>\n<image>\nWhich of the two is larger?",
        ),
        "Which is larger?",
        lambda first, second: (
            "They are equal." if first == second else "The first." if first > second else "The second."
        ),
    ),
    "sum": (
        (
            "What is <image> plus <image>?",
            "Add <image> to <image>. What is the sum?",
            "<image>\n<image>\nWhat is the sum of the two?",
        ),
        "What is their sum?",
        lambda first, second: f"{WORDS[first + second].capitalize()}.",
    ),
}
TABLE_SIDES = (2, 3)  # rows and columns
TABLE_WORDINGS = (
    "<image>\nWrite this table in Markdown.",
    "Turn this table into Markdown: <image>",
    "Here is a table: <image>. Give it as Markdown.",
)
TITLES = tuple(f"The digit {word}." for word in WORDS[:10])


def write_data(folder: Path, held_in: int, held_out: int, pairs: int, tables: int, seed: int = 0) -> None:
    """Write the scans as PNG files and six LLaVA JSON files, no scan on both sides of the split.

    `images/scan_0123.png` is scan 123 of `load_digits`, black on white, enlarged to 32 × 32 pixels. `pretrain.json`
    has one titled row a held-in scan; `instruct.json` has for each held-in scan one row of every question kind and
    one of two or three questions (`source` tells the kind), and a text-only row for every digit and wording.
    `multi_image.json` has rows of two pictures with both questions on them, rows of one picture of a table, whose
    answer is the table in Markdown, and the rows of several questions on one picture, lest they be forgotten.
    `pretrain_test.json` and `instruct_test.json` are the same of held-out scans, without text-only rows: those have
    nothing to hold out. In `instruct_test.json` the rows of several questions are the last `held_out`.
    `multi_image_test.json` has `held_out` rows of either question on two pictures, and half as many of each table.

    Args:
        folder: Where to write; made if need be.
        held_in: Scans to train on.
        held_out: Scans to test on; both splits have the digits in the same proportions.
        pairs: Rows of two pictures in `multi_image.json`.
        tables: Rows of each size of table in `multi_image.json`.
        seed: Of the split and of the wordings.
    """
    (folder / "images").mkdir(parents=True)
    raw, rng, grouping = load_digits(), random.Random(seed), random.Random(seed + 1)
    digits = raw.target.tolist()
    pictures = [
        Image.fromarray((255 - scan * 255 / 16).round().astype(np.uint8)) for scan in raw.images
    ]  # 16: all ink
    sides = train_test_split(
        range(len(digits)), train_size=held_in, test_size=held_out, stratify=digits, random_state=seed
    )
    for suffix, scans in zip(("", "_test"), sides, strict=True):
        pretrain, single, several, text_only = [], [], [], []
        for scan in scans:
            image, digit = _scan_path(scan), digits[scan]
            pictures[scan].resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / image)
            # Before or behind the words, as in LLaVA's own LCS-558K.
            marked = rng.choice(("<image>\n{}", "{}\n<image>")).format(rng.choice(INSTRUCTIONS))
            pretrain.append(_row(f"{scan}-title", "title", [(marked, TITLES[digit])], image))
            for kind in QUESTIONS:
                question, reply = _ask(rng, kind, digit)
                single.append(_row(f"{scan}-{kind}", kind, [(f"<image>\n{question}", reply)], image))
            (question, reply), *more = [_ask(rng, k, digit) for k in rng.sample(list(QUESTIONS), rng.choice((2, 3)))]
            turns = [(f"<image>\n{question}", reply), *more]
            several.append(_row(f"{scan}-multi_turn", "multi_turn", turns, image))
        if not suffix:
            text_only = [
                _row(f"text-{digit}-{kind}-{number}", "text_only", [(f"{title} {wording}", reply(digit))])
                for digit, title in enumerate(TITLES)
                for kind, (wordings, reply) in QUESTIONS.items()
                for number, wording in enumerate(wordings)
            ]
        mixed = [] if suffix else [*several]
        for kind, count in (dict.fromkeys(PAIR_QUESTIONS, held_out) if suffix else {"pair": pairs}).items():
            for number, (first, second) in enumerate(_draw(grouping, scans, count, 2)):
                asked = grouping.sample([*PAIR_QUESTIONS], 2) if kind == "pair" else [kind]
                turns = _ask_pair(grouping, asked, digits[first], digits[second])
                mixed.append(_row(f"{kind}-{number}", kind, turns, [_scan_path(first), _scan_path(second)]))
        for side in TABLE_SIDES:
            kind, count = f"table_{side}x{side}", held_out // 2 if suffix else tables
            for number, drawn in enumerate(_draw(grouping, scans, count, side * side)):
                image, page = f"images/{kind}{suffix}_{number:04}.png", Image.new("L", (SIDE, SIDE), "white")
                for place, scan in enumerate(drawn):
                    page.paste(pictures[scan], (place % side * PATCH, place // side * PATCH))
                page.save(folder / image)
                turn = grouping.choice(TABLE_WORDINGS), write_table([digits[scan] for scan in drawn], side)
                mixed.append(_row(f"{kind}-{number}", kind, [turn], image))
        files = {"pretrain": pretrain, "instruct": single + several + text_only, "multi_image": mixed}
        for name, rows in files.items():
            (folder / f"{name}{suffix}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_table(digits: list[int], columns: int) -> str:
    """The digits, row by row, as a Markdown table whose header is the first row."""
    rows = [digits[start : start + columns] for start in range(0, len(digits), columns)]
    header, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([header, f"|{' --- |' * columns}", *body])


def _scan_path(scan: int) -> str:
    return f"images/scan_{scan:04}.png"


def _draw(rng: random.Random, scans: list[int], count: int, size: int) -> Iterator[list[int]]:
    """`count` groups of different scans; no scan comes again before nearly all have come."""
    left = []
    for _ in range(count):
        if len(left) < size:
            left = rng.sample(scans, len(scans))
        yield [left.pop() for _ in range(size)]


def _ask_pair(rng: random.Random, kinds: list[str], first: int, second: int) -> list[tuple[str, str]]:
    turns = []
    for kind in kinds:
        wordings, wording_after, reply = PAIR_QUESTIONS[kind]
        turns.append((wording_after if turns else rng.choice(wordings), reply(first, second)))
    return turns


def _ask(rng: random.Random, kind: str, digit: int) -> tuple[str, str]:
    wordings, reply = QUESTIONS[kind]
    return rng.choice(wordings), reply(digit)


def _row(name: str, source: str, turns: list[tuple[str, str]], image: str | list[str] | None = None) -> dict:
    texts = [text for turn in turns for text in turn]
    conversation = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": name, "source": source} | ({"image": image} if image else {}) | {"conversations": conversation}


def write_text(rng: random.Random) -> str:
    """Make up one text for the language model: words that decide what follows, then a title, questions or a table.

    Such words are to this model what a web page is to Vicuna: it learns that what precedes decides the answer. Without
    them (titles and answers alone) a stage 1 that only trains the projector named 23 to 49 % of the digits. They stand
    where pictures will: words in which a digit prevails for a scan, sixteen words for a page with a table. That is how
    the model comes to know sums, order and Markdown, as a model from the hub does.
    """
    topic = rng.random()
    if topic < 0.4:
        digits = rng.randrange(10), rng.randrange(10)
        turns = _ask_pair(rng, rng.sample(list(PAIR_QUESTIONS), 2), *digits)
        shown = [_write_words(rng, digit) if rng.random() < 0.5 else f" {WORDS[digit]}" for digit in digits]
    elif topic < 0.65:
        side, width = rng.choice(TABLE_SIDES), SIDE // PATCH
        digits = [rng.randrange(10) for _ in range(side * side)]
        turns = [(rng.choice(TABLE_WORDINGS), write_table(digits, side))]
        page = [rng.choice(("paper", "white")) for _ in range(width * width)]
        for place, digit in enumerate(digits):
            page[place // side * width + place % side] = WORDS[digit]
        shown = ["".join(f" {word}" for word in page)]
    else:
        digit = rng.randrange(10)
        scan = _write_words(rng, digit)
        if rng.random() < 0.3:
            return f"{scan}{TITLES[digit]}\n</s>"
        turns = [_ask(rng, kind, digit) for kind in rng.sample(list(QUESTIONS), rng.choice((1, 1, 2, 3)))]
        opening, shown = rng.choice((("<image>\n", [scan]), ("<image> ", [f" {TITLES[digit]}"])))
        turns[0] = opening + turns[0][0], turns[0][1]
    text = "".join(f"USER: {question} ASSISTANT: {reply}</s>" for question, reply in turns)
    words = iter(shown)
    return re.sub(" ?<image>", lambda _: next(words), text)


def _write_words(rng: random.Random, digit: int) -> str:
    """One to sixteen words, each after a blank, in which the digit's prevails over other digits'."""
    count = rng.randint(1, (SIDE // PATCH) ** 2)
    words = [rng.choice(OTHER_WORDS) for _ in range(count)]
    hits = rng.randint(1, count)
    strays = rng.randint(0, (hits - 1) // 2)
    for number, place in enumerate(rng.sample(range(count), min(count, hits + strays))):
        words[place] = WORDS[digit if number < hits else rng.randrange(10)]
    return "".join(f" {word}" for word in words)


def train_backbones(data: Path, clip: Path, llama: Path, tower_steps: int, llama_steps: int) -> None:
    """Train and save a CLIP on the titles in `data` and a Llama on texts; print how well the CLIP sees."""
    print("Training the two backbones that a real run downloads.")
    tokenizer = train_tokenizer()
    train_vision_tower(clip, tokenizer, data / "pretrain.json", tower_steps)
    train_language_model(llama, tokenizer, llama_steps)
    rate = rate_vision_tower(clip, tokenizer, data / "pretrain_test.json")
    print(f"The CLIP alone finds the right title for {rate:.1%} of the held-out pictures.")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the language model's kind of text; it puts BOS in front, as Llama's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # EOS is not id 2: CLIPTextModel takes that for the mark of old, broken configs and pools elsewhere.
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(0)
    backend.train_from_iterator((write_text(rng) for _ in range(4000)), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def train_vision_tower(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: Path, steps: int) -> None:
    """Train a small CLIP on titled pictures, with CLIP's loss against all ten titles, and save it with its processor.

    Args:
        folder: Where to save.
        tokenizer: For the titles.
        rows: A `pretrain.json`.
        steps: Of 64 pictures, each shifted, turned, scaled and blurred by noise at random.
    """
    torch.manual_seed(0)
    part = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4)
    special = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    text = dict(**part, **special, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=16)
    vision = dict(**part, num_hidden_layers=4, image_size=SIDE, patch_size=PATCH)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    square = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)

    pixels, labels = _read_titled(image_processor, rows)
    titles = _encode_titles(tokenizer)

    def loss():
        drawn = torch.randint(len(pixels), (64,))
        return cross_entropy(model(**titles, pixel_values=_distort(pixels[drawn])).logits_per_image, labels[drawn])

    _fit(model, loss, steps, learning_rate=2e-3, description="vision tower")
    for part in (model, image_processor):
        part.save_pretrained(folder)


@torch.inference_mode()
def rate_vision_tower(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: Path) -> float:
    """Share of the pictures in `rows` whose own title is the one, of all ten, that the saved CLIP finds nearest."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels, labels = _read_titled(CLIPImageProcessorPil.from_pretrained(folder), rows)
    nearest = model(**_encode_titles(tokenizer), pixel_values=pixels).logits_per_image.argmax(-1)
    return (nearest == labels).float().mean().item()


def train_language_model(folder: Path, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train a small Llama on `write_text`, `steps` times 32 texts, and save it with its tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(1)

    def loss():
        batch = tokenizer([write_text(rng) for _ in range(32)], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    _fit(model, loss, steps, learning_rate=3e-3, description="language model")
    for part in (model, tokenizer):
        part.save_pretrained(folder)


def _read_titled(image_processor, rows: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels `(rows, 3, 32, 32)` and the index of each row's title in `TITLES`, `(rows,)`."""
    records = json.loads(rows.read_text(encoding="utf-8"))
    images = [load_image(rows.parent / record["image"]) for record in records]
    labels = [TITLES.index(record["conversations"][1]["value"]) for record in records]
    return image_processor(images, return_tensors="pt")["pixel_values"], torch.tensor(labels)


def _encode_titles(tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    batch = tokenizer([f"{title}</s>" for title in TITLES], return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _distort(pixels: torch.Tensor) -> torch.Tensor:
    """Turn `(batch, 3, height, width)` by up to 10 degrees, scale by 12 %, shift by 8 % of a side, and add noise."""
    angle, scale, right, down = torch.empty(4, len(pixels)).uniform_(-1, 1)
    angle, scale = math.radians(10) * angle, 1 + 0.12 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # A side is 2 long in affine_grid's coordinates.
    rows = [torch.stack([cos, -sin, 0.16 * right], -1), torch.stack([sin, cos, 0.16 * down], -1)]
    grid = affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * torch.randn_like(moved)


def _fit(model: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int, learning_rate: float, description: str):
    # PyTorch's 0.999 averages over 1000 steps, about as many as there are: the language model then learnt less.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in track(range(steps), description):
        loss().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
