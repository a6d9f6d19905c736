"""The planted-defect suite: data sets and checkpoints with one known defect each, which the doctor must name with its
row and say nothing besides, and clean ones, of which it must say nothing. Behind it, the rest of the doctor.
"""

import errno
import io
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image, ImageCms
from tokenizers import processors
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import _repair
import inspect_data
import tiny
from _findings import Findings, Place
from _label_checks import LabelChecks
from _lengths import LengthCounter, padding_shares
from _memory import predict_memory
from _parts import adapter_config, add_adapters, list_parts, quantised_loading, train_only
from _row_checks import PictureChecks
from collators import LlavaDataCollator, chat_template_path, load_image, load_rows, training_chat_template

README = Path(__file__).parents[2] / "README.md"
NAMED, CLEAN = 129, 34  # as README prints them
ROW = 4  # where a defect stands unless its case says otherwise


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


class Site:
    """A clean data set and its checkpoint, to be spoiled: ten rows, one text-only, one with two exchanges."""

    def __init__(self, folder: Path, make_checkpoint: Callable[..., Path]):
        self.folder, self.make_checkpoint = folder, make_checkpoint
        self.checkpoint = make_checkpoint()
        self.file, self.content = "train.json", None
        self.flags: list[str] = []
        folder.mkdir()
        self.rows = []
        for number in range(10):
            self.save(tiny.picture(tiny.COLORS[number % 6], (24 + number, 24)), f"{number}.png")
            talk = turns(f"<image>\nWhat is in picture {number}?", f"It is number {number}.")
            self.rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": talk})
        self.rows[2] = {"id": "r2", "conversations": turns("Is two even?", "Yes.")}
        self.rows[7]["conversations"] += turns("Is it odd?", "It is.")

    def save(self, image: Image.Image, name: str, **options) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        image.save(self.folder / name, **options)

    def spoil(self, kind: str = "llava", **options) -> Path:
        """Take a checkpoint of its own, without weights, to be changed."""
        source, self.checkpoint = self.make_checkpoint(kind, **options), self.folder.parent / "checkpoint"
        shutil.copytree(source, self.checkpoint, ignore=shutil.ignore_patterns("*.safetensors"))
        return self.checkpoint

    def evaluate(self, *rows: dict) -> None:
        (self.folder / "test.json").write_text(json.dumps(rows))
        self.flags += ["--eval_dataset_name", str(self.folder / "test.json")]

    def to_parquet(self, change: Callable[[list[dict]], object] = lambda rows: None) -> None:
        """The rows as a hub set has them: `messages` of parts, the pictures' bytes in `images`."""
        path = self.folder / "train.json"
        path.write_text(json.dumps(self.rows))
        records = [
            {
                **{name: row[name] for name in ("id", "messages")},
                "images": [{"bytes": Path(image).read_bytes(), "path": Path(image).name} for image in row["images"]],
            }
            for row in load_rows(path)
        ]
        change(records)
        part = {"type": Value("string"), "text": Value("string"), "index": Value("int64")}
        messages = List({"role": Value("string"), "content": List(part)})
        features = Features({"id": Value("string"), "messages": messages, "images": List(datasets.Image())})
        self.file = "train.parquet"
        Dataset.from_list(records, features=features).to_parquet(self.folder / self.file)

    def write(self) -> Path:
        path = self.folder / self.file
        if self.content is not None:
            path.write_bytes(self.content)
        elif path.suffix != ".parquet":
            lines = path.suffix == ".jsonl"
            path.write_text("\n".join(map(json.dumps, self.rows)) if lines else json.dumps(self.rows))
        return path

    def run(self, *flags: str) -> int:
        """Run the doctor; returns its exit status."""
        names = ["--model_name_or_path", str(self.checkpoint), "--dataset_name", str(self.write())]
        try:
            inspect_data.main([*names, "--use_cpu", "--bf16", "False", *self.flags, *flags])
        except SystemExit as stop:
            return stop.code
        return 0

    def report(self, *flags: str) -> dict:
        output = self.folder.parent / "report.json"
        self.run(*flags, "--json", str(output))
        return json.loads(output.read_text())


def said(report: dict) -> list[tuple[str, str, int | None]]:
    """All that was found: level, code and row."""
    found = []
    for finding in report["findings"]:
        assert finding["count"] == len(finding["examples"])
        found += [(finding["level"], finding["code"], example["row"]) for example in finding["examples"]]
    return found


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory):
    """`make_checkpoint(kind, **options)`: a tiny checkpoint, made once."""
    made = {}

    def make(kind: str = "llava", **options) -> Path:
        key = (kind, *options.items())
        if key not in made:
            made[key] = Path(tiny.save_checkpoint(tmp_path_factory.mktemp("base") / kind, kind=kind, **options))
        return made[key]

    return make


@pytest.fixture
def site(tmp_path, make_checkpoint):
    return Site(tmp_path / "data", make_checkpoint)


# Ways to plant something in a site


Plant = Callable[[Site], object]


def all_of(*plants: Plant) -> Plant:
    return lambda site: [plant(site) for plant in plants]


def flags(*given: str) -> Plant:
    return lambda site: site.flags.extend(given)


def say(turn: int, text) -> Plant:
    return lambda site: site.rows[ROW]["conversations"][turn].update(value=text)


def keys(**values) -> Plant:
    """The row gets these keys, and loses those that are None."""

    def plant(site: Site) -> None:
        row = {**site.rows[ROW], **values}
        site.rows[ROW] = {key: value for key, value in row.items() if value is not None}

    return plant


def text_only(question: str = "Is four even?", **values) -> Plant:
    return keys(image=None, conversations=turns(question, "It is."), **values)


def speakers(*names: str) -> Plant:
    return keys(image=None, conversations=[{"from": name, "value": name} for name in names])


def instead(value) -> Plant:
    return lambda site: site.rows.__setitem__(ROW, value)


def again(**values) -> Plant:
    return lambda site: site.rows.append({**site.rows[ROW], **values})


def content(make: Callable[[list[dict]], bytes], file: str = "train.json") -> Plant:
    """The file holds these bytes, made from the clean rows."""
    return lambda site: (setattr(site, "file", file), setattr(site, "content", make(site.rows)))


def line(change: Callable[[str], str]) -> Plant:
    """A .jsonl file with this change in the row's line."""

    def make(rows: list[dict]) -> bytes:
        lines = list(map(json.dumps, rows))
        lines[ROW] = change(lines[ROW])
        return "\n".join(lines).encode()

    return content(make, "train.jsonl")


def parquet(change: Callable[[dict], object] = lambda record: None) -> Plant:
    return lambda site: site.to_parquet(lambda records: change(records[ROW]))


def shown(name: str, make: Callable[[], Image.Image], rows=(ROW,), **options) -> Plant:
    """The row shows this picture."""

    def plant(site: Site) -> None:
        site.save(make(), name, **options)
        for number in rows:
            site.rows[number]["image"] = name

    return plant


def damaged(name: str, change: Callable[[bytes], bytes], rows=(ROW,), **options) -> Plant:
    """The row shows a photograph whose file was changed."""

    def plant(site: Site) -> None:
        shown(name, noise, rows, **options)(site)
        path = site.folder / name
        path.write_bytes(change(path.read_bytes()))

    return plant


def elsewhere(name: str) -> Plant:
    """The row shows a picture outside of the folder, by this name."""

    def plant(site: Site) -> None:
        tiny.picture(size=(32, 32)).save(site.folder.parent / "outside.png")
        (site.folder / "link.png").symlink_to("../outside.png")
        keys(image=name.format(folder=site.folder.parent))(site)

    return plant


def held_out(*rows: dict) -> Plant:
    """The rows of a file for evaluation, behind a clean one; pictures for it."""

    def plant(site: Site) -> None:
        site.save(tiny.picture("black", (50, 50)), "held_out.png")
        site.save(tiny.picture("black", (24, 24)), "as_large.png")  # as many bytes as others have, perhaps
        shutil.copy(site.folder / "5.png", site.folder / "copy.png")
        site.evaluate({"id": "e0", "image": "held_out.png", "conversations": turns("<image>\nWhich?", "None.")}, *rows)

    return plant


def template(text: str) -> Plant:
    """Train with this chat template, or the twin of this name."""

    def plant(site: Site) -> None:
        path = site.folder / "template.jinja"
        path.write_text(text if "{" in text else chat_template_path(text).read_text())
        site.flags += ["--chat_template_path", str(path)]

    return plant


def checkpoint(kind: str = "llava", **options) -> Plant:
    return lambda site: site.spoil(kind, **options)


def edited(file: str, part: str | None = None, kind: str = "llava", **values) -> Plant:
    """A checkpoint with other values in one of its JSON files, or in a part of it."""

    def plant(site: Site) -> None:
        path = site.spoil(kind) / file
        written = json.loads(path.read_text())
        (written if part is None else written[part]).update(values)
        path.write_text(json.dumps(written))

    return plant


def sliced(site: Site) -> None:
    """Train and evaluate on rows of one file."""
    site.flags += ["--dataset_train_split", "train[:7]", "--dataset_test_split", "train[7:]"]
    site.flags += ["--eval_strategy", "steps"]


def chatml(site: Site) -> None:
    path = site.spoil(chat_template=tiny.ONEVISION, tokenizer="qwen") / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 6}))  # <|im_end|>


def captions(site: Site) -> None:
    """Stage 1: every row a picture and its caption."""
    site.flags += ["--recipe", "pretrain_projector"]
    site.rows[2] = {"id": "r2", "image": "2.png", "conversations": turns("<image>\nDescribe it.", "It is two.")}
    del site.rows[7]["conversations"][2:]


def wide(site: Site) -> None:
    """Pictures of 16 to 9."""
    for number in range(10):
        site.save(tiny.picture(tiny.COLORS[number % 6], (160 + number, 90)), f"{number}.png")


def adding_eos(site: Site) -> None:
    tokenizer = AutoTokenizer.from_pretrained(site.spoil())
    special = [("<s>", 1), ("</s>", 2)]
    processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.save_pretrained(site.checkpoint)


def several(pictures: int, *values: str) -> Plant:
    names = ["0.png", "1.png", "3.png"][:pictures]
    return keys(image=None, images=names, conversations=turns(*values))


def noise(mode: str = "RGB", size=(64, 48)) -> Image.Image:
    """Like a photograph, which cannot be compressed to so few bytes that nothing could be cut off."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def full(value, dtype) -> Callable[[], Image.Image]:
    return lambda: Image.fromarray(np.full((32, 32), value, dtype=dtype))


def lab() -> Image.Image:
    srgb, profile = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(noise(), srgb, profile, outputMode="LAB")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 8]) + data[middle + 8 :]


def claim_giant(data: bytes) -> bytes:
    """A PNG that claims 40,000 × 40,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    return exif


VICUNA = chat_template_path("vicuna_v1").read_text()
NO_SYSTEM = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system turn') }}{%- endif -%}" + VICUNA
NO_STOP = VICUNA.replace("+ eos_token", "").replace("message['role'] | upper", "'QUESTION'")
ASKED = turns("<image>\nWhat?", "A square.")
LONG = "It is a red square on a white ground. " * 20
BRIEF = {"from": "system", "value": "Be brief."}

# What the doctor must name


class Defect(NamedTuple):
    plant: Plant
    level: str
    code: str
    found: str = ""
    rows: Iterable[int | None] = (ROW,)


def bad_row(plant: Plant, found: str, rows: Iterable[int | None] = (ROW,)) -> Defect:
    return Defect(plant, "error", "unusable-row", found, rows)


def warning(code: str, plant: Plant, found: str, rows: Iterable[int | None] = (ROW,)) -> Defect:
    return Defect(plant, "warning", code, found, rows)


def bad_picture(plant: Plant, found: str, rows: Iterable[int | None] = (ROW,)) -> Defect:
    return Defect(plant, "error", "picture-unreadable", found, rows)


def note(code: str, plant: Plant, found: str) -> Defect:
    return Defect(plant, "note", code, found)


def misfit(code: str, plant: Plant, found: str) -> Defect:
    return Defect(plant, "error", code, found, [None])


DEFECTS = {
    # Rows that cannot be read
    "a misspelt key": bad_row(
        lambda site: site.rows[ROW].update(conversation=site.rows[ROW].pop("conversations")), "the key 'conversation'"
    ),
    "no conversation": bad_row(keys(conversations=None), "the keys ['id', 'image']"),
    "null as conversation": bad_row(lambda site: site.rows[ROW].update(conversations=None), "'conversations': null"),
    "a text as conversation": bad_row(keys(conversations="hi"), "'conversations' of type str"),
    "a row that is no object": bad_row(instead(["hi"]), "a row of type list"),
    "a turn that is no object": bad_row(keys(conversations=["hi"]), "turn 0 of type str"),
    "turns with role and content": bad_row(
        keys(conversations=[{"role": "user", "content": "hi"}]), "turn 0 with the keys ['role', 'content']"
    ),
    "a key more in a turn": bad_row(
        keys(conversations=[{"from": "human", "value": "hi", "weight": 0}]), "turn 0 with the keys ['from', 'value', "
    ),
    "an unknown speaker": bad_row(speakers("human", "bot"), "turn 1 from 'bot'"),
    "a speaker in capitals": bad_row(speakers("Human", "gpt"), "turn 0 from 'Human'"),
    "a number as answer": bad_row(say(1, 7), "turn 1 with a value of type int"),
    "null as answer": bad_row(say(1, None), "turn 1 with a value of type NoneType"),
    "two questions in a row": bad_row(speakers("human", "human", "gpt"), "the order human, human, gpt"),
    "a question without answer": bad_row(speakers("human"), "the order human"),
    "an answer first": bad_row(speakers("gpt", "human"), "the order gpt, human"),
    "a late system turn": bad_row(speakers("human", "system", "gpt"), "the order human, system, gpt"),
    "no turns": bad_row(keys(conversations=[]), "the order of no turns"),
    "a marker in an answer": bad_row(say(1, "A <image>"), "<image> in turn 1 (gpt)"),
    "a picture without marker": bad_row(say(0, "What?"), "0 <image> in the human turns and 1 in 'image'"),
    "a misspelt marker": bad_row(say(0, "<Image>\nWhat?"), "0 <image> in the human turns and 1 in 'image'"),
    "a marker without picture": bad_row(keys(image=None), "1 <image> in the human turns and 0 in 'image'"),
    "a picture too few": bad_row(say(0, "<image><image>"), "2 <image> in the human turns and 1 in 'image'"),
    "imgs for images": bad_row(keys(image=None, imgs=["4.png"]), "the key 'imgs'"),
    "Image for image": bad_row(keys(image=None, Image="4.png"), "the key 'Image'"),
    "image and images": bad_row(keys(images=["4.png"]), "both 'image' and 'images'"),
    "an empty path": bad_row(keys(image=""), "'image': ''"),
    "a number as path": bad_row(keys(image=[7]), "'image': [7]"),
    "a missing file": bad_row(keys(image="40.png"), "no picture file at "),
    "a folder as picture": bad_row(keys(image="../data"), "no picture file at "),
    "half a character": bad_row(say(1, "It \ud83d"), "half a character, \\ud83d"),
    "videos": bad_row(keys(videos=["4.mp4"]), "the key 'videos'"),
    "tools": bad_row(keys(tools="[{}]"), "the key 'tools'"),
    "a row of another shape": bad_row(
        instead({"query": "Is it?", "response": "Yes."}), "the keys 'query' and 'response'"
    ),
    "a column of our own name": bad_row(keys(_row=4), "the key '_row'"),
    "a URL": bad_row(keys(image="https://example.org/4.png"), "the URL https://example.org/4.png"),
    "an absolute path": bad_row(elsewhere("{folder}/outside.png"), "/outside.png outside of "),
    "a path through ..": bad_row(elsewhere("../outside.png"), "/../outside.png outside of "),
    "a link out of the folder": bad_row(elsewhere("link.png"), "/link.png outside of "),
    # Files
    "a line cut short": bad_row(line(lambda text: text[:-5]), "broken JSON in line 5"),
    "two rows in a line": bad_row(line(lambda text: text + text), "broken JSON in line 5: Extra data"),
    "a key that stands twice": bad_row(line(lambda text: '{"id": 1, ' + text[1:]), "stands twice"),
    "NaN": bad_row(line(lambda text: '{"score": NaN, ' + text[1:]), "NaN is not JSON"),
    "an object around the list": bad_row(
        content(lambda rows: json.dumps({"data": rows}).encode()),
        "row 0: found broken JSON in line 1: Expecting '['",
        [None],
    ),
    "a comma behind the last row": bad_row(
        content(lambda rows: json.dumps(rows).encode()[:-1] + b",]"), "row 10: found broken JSON in line 1", [None]
    ),
    "a list that breaks off, where bad rows are skipped": bad_row(
        all_of(content(lambda rows: json.dumps(rows).encode()[:-5]), flags("--on_bad_row", "skip")),
        "row 9: found broken JSON in line 1",
        [None],
    ),
    "UTF-16": bad_row(content(lambda rows: json.dumps(rows).encode("utf-16")), "expected UTF-8", [None]),
    "an empty file": bad_row(content(lambda rows: b""), "found no rows", [None]),
    "a file of another kind": bad_row(content(lambda rows: b"id,image\n", "train.csv"), "found a file", [None]),
    "Parquet cut short": bad_row(content(lambda rows: b"PAR1" * 9, "train.parquet"), "no Parquet file", [None]),
    "Parquet with a marker too few": bad_row(
        parquet(lambda record: record["messages"][0]["content"].pop(0)), "0 image placeholder(s) for 1 picture(s)"
    ),
    "Parquet with two questions in a row": bad_row(
        parquet(lambda record: record["messages"].insert(0, record["messages"][0])), "roles are user, user, assistant"
    ),
    "a folder of pictures beside Parquet": bad_row(
        all_of(parquet(), flags("--image_folder", "pictures")), "found image_folder='pictures'", [None]
    ),
    # Rows that the template takes otherwise than is meant
    "a system turn that is refused": bad_row(
        all_of(keys(conversations=[BRIEF, *ASKED]), template(NO_SYSTEM)), "no system turn"
    ),
    "a caption without picture": bad_row(all_of(captions, text_only()), "this row has no picture"),
    "two exchanges in stage 1": bad_row(
        all_of(captions, keys(conversations=ASKED + turns("And?", "None."))), "plain takes one user turn"
    ),
    "an answer that begins with a newline": Defect(
        all_of(chatml, say(1, "\nIt is four.")), "error", "prompt-differs", "ahead of the answer in turn 1"
    ),
    # Texts
    "an empty answer": warning("empty-answer", say(1, ""), "the answer of turn 1"),
    "a blank answer": warning("empty-answer", say(1, " \n\u00a0"), "the answer of turn 1"),
    "a row twice": warning("duplicate-row", again(), "of row 4", [10]),
    "a row twice, with another id": warning("duplicate-row", again(id="r10"), "of row 4", [10]),
    "an id twice": note("repeated-id", keys(id="r3"), "the id of row 3"),
    "USER: in a question": warning("template-words", say(0, "<image>\nWhat is USER: here?"), "'USER:' in turn 0"),
    "USER: where pictures have tags": warning(
        "template-words",
        all_of(say(0, "<image>\nWhat is USER: here?"), flags("--image_tag_format", "<Image>{}</Image>")),
        "'USER:' in turn 0",
    ),
    "ASSISTANT: in an answer": warning("template-words", say(1, "Yes. ASSISTANT: No."), "'ASSISTANT:' in turn 1"),
    "</s> in an answer": warning("template-words", say(1, "It is four.</s>"), "'</s>' in turn 1"),
    "<|im_end|> under chatml": warning(
        "template-words", all_of(chatml, say(1, "Four.<|im_end|>")), "'<|im_end|>' in turn 1"
    ),
    "[INST] under mistral": warning(
        "template-words", all_of(template("mistral_instruct"), say(0, "<image>\n[INST] What?")), "'[INST]' in turn 0"
    ),
    "###Human: under vip_llava": warning(
        "template-words", all_of(template("vip_llava"), say(1, "Four.\n###Human: And?")), "'###Human:' in turn 1"
    ),
    "<Image> in a question": warning("placeholder-typo", text_only("<Image>\nWhat?"), "'<Image>' in turn 0"),
    "<img> in a question": warning("placeholder-typo", text_only("<img>\nWhat?"), "'<img>' in turn 0"),
    "[image] in a question": warning("placeholder-typo", text_only("[image] What?"), "'[image]' in turn 0"),
    "an unknown key names a picture": warning("picture-key", text_only(img_file="x.png"), "'img_file': 'x.png'"),
    "an encoding that was lost": warning("broken-characters", say(1, "A caf\ufffd."), "U+FFFD in turn 1"),
    # Training and evaluation
    "a picture in both slices of a file": warning(
        "picture-in-eval", all_of(sliced, again(id="r10", conversations=ASKED)), "/4.png, which stands in row 4", [10]
    ),
    "a picture in both files": warning(
        "picture-in-eval", held_out({"image": "5.png", "conversations": ASKED}), "/5.png, which stands in row 5", [1]
    ),
    "a copied picture in both files": warning(
        "picture-in-eval",
        held_out({"image": "copy.png", "conversations": ASKED}),
        "copy.png, which stands in row 5",
        [1],
    ),
    "a picture of Parquet in both files": warning(
        "picture-in-eval",
        all_of(held_out({"image": "copy.png", "conversations": ASKED}), parquet()),
        "copy.png, which stands in row 5",
        [1],
    ),
    "a row in both files": warning(
        "duplicate-row", held_out({"conversations": turns("Is two even?", "Yes.")}), "of row 2 of ", [1]
    ),
    "a bad row for evaluation": bad_row(held_out({"image": "as_large.png"}), "the keys ['image']", [1]),
    "a bad row for evaluation, where those to train on are skipped": bad_row(
        all_of(held_out({"image": "as_large.png"}), flags("--on_bad_row", "skip")), "the keys ['image']", [1]
    ),
    # Pictures that cannot be used
    "a JPEG cut short": bad_picture(damaged("x.jpg", half), "x.jpg: image file is truncated"),
    "a PNG cut short": bad_picture(damaged("x.png", half), "x.png: "),
    "a WebP cut short": bad_picture(damaged("x.webp", half, lossless=True), "x.webp: "),
    "a GIF cut short": bad_picture(damaged("x.gif", half), "x.gif: image file is truncated"),
    "flipped bytes in a PNG": bad_picture(damaged("x.png", flip), "x.png: broken"),
    "an empty file as picture": bad_picture(damaged("x.jpg", lambda data: b""), "x.jpg: cannot identify"),
    "a page saved as picture": bad_picture(
        damaged("x.jpg", lambda data: b"<!DOCTYPE html><title>Not found</title>"), "x.jpg: cannot identify"
    ),
    "a decompression bomb": bad_picture(damaged("x.png", claim_giant), "1600000000 pixels) exceeds limit"),
    "EPS": bad_picture(shown("x.eps", noise), "x.eps: cannot identify"),
    "floats of no known range": bad_picture(shown("x.tiff", full(-7.5, np.float32)), "x.tiff: values from -7.5"),
    "one bad picture in two rows": bad_picture(damaged("x.png", half, (1, 4)), "x.png: ", [1, 4]),
    "broken bytes in Parquet": bad_picture(
        parquet(lambda record: record["images"][0].update(bytes=b"no picture")), "4.png: cannot identify"
    ),
    "nothing in Parquet": bad_picture(
        parquet(lambda record: record.update(images=[None])), "neither bytes nor a path"
    ),
    # Pictures that are most likely not meant
    "1×1": warning("picture-tiny", shown("x.png", lambda: tiny.picture(size=(1, 1))), "x.png: 1×1 pixels"),
    "20 megapixels": warning("picture-huge", shown("x.png", lambda: Image.new("1", (5000, 4000))), "5000×4000 pixels"),
    "40 to 1": warning("picture-aspect", shown("x.png", lambda: tiny.picture(size=(800, 20))), "800×20 pixels"),
    "a turned camera": note("picture-exif", shown("x.jpg", noise, exif=turned()), "x.jpg: EXIF orientation 6"),
    "EXIF that cannot be read": note(
        "picture-exif",
        damaged("x.webp", lambda data: data.replace(b"MM\0*", b"MM\0x"), exif=turned()),
        "an EXIF block that cannot",
    ),
    "16 bits": note("picture-16-bit", shown("x.png", full(40_000, np.uint16)), "mode I;16"),
    "floats": note("picture-float", shown("x.tiff", full(0.5, np.float32)), "32-bit floats"),
    "CMYK": note("picture-cmyk", shown("x.jpg", lambda: noise("CMYK")), "colours as CMYK"),
    "LAB": note("picture-cmyk", shown("x.tiff", lab), "colours as LAB"),
    "transparency": note("picture-transparent", shown("x.png", lambda: Image.new("RGBA", (32, 32))), "transparency"),
    "a transparent colour": note(
        "picture-transparent", shown("x.gif", lambda: Image.new("P", (32, 32)), transparency=0), "transparency"
    ),
    "an animation": note(
        "picture-animated",
        shown("x.gif", noise, save_all=True, append_images=[tiny.picture(size=(64, 48))]),
        "several frames",
    ),
    "a centre crop": warning(
        "centre-crop",
        all_of(wide, edited("processor_config.json", "image_processor", do_pad=False)),
        "of the pictures' area cut off on average",
        [None],
    ),
    # Limits
    "too long": Defect(
        all_of(say(1, LONG), flags("--max_length", "100")), "error", "too-long", "not even the first exchange fits"
    ),
    "too long, left out": warning(
        "too-long",
        all_of(say(1, LONG), flags("--max_length", "100", "--overlong", "drop")),
        "not even the first exchange fits",
    ),
    "shortened": warning(
        "shortened",
        all_of(keys(conversations=ASKED + turns("More?", LONG)), flags("--max_length", "100")),
        "the first 1 of 2 exchanges are kept",
    ),
    "too many pictures": Defect(
        all_of(several(2, "<image><image>The same?", "No."), flags("--max_images", "1")),
        "error",
        "too-many-pictures",
        "2 pictures, and not even the first exchange fits",
    ),
    "too many pictures, left out": warning(
        "too-many-pictures",
        all_of(several(2, "<image><image>The same?", "No."), flags("--max_images", "1", "--overlong", "drop")),
        "2 pictures, and not even the first exchange fits",
    ),
    "too many pictures, shortened": warning(
        "shortened",
        all_of(several(3, "<image><image>Same?", "No.", "<image>And?", "No."), flags("--max_images", "2")),
        "3 pictures; the first 1 of 2 exchanges are kept",
    ),
    "more than the model's context": warning(
        "context", edited("config.json", "text_config", max_position_embeddings=20), "rows of up to 53 tokens", [None]
    ),
    # Checkpoints
    "a template without stop token": misfit("chat-template", template(NO_STOP), "it never learns to stop"),
    "a template that is none": misfit("chat-template", template("{% for %}"), "Expected"),
    "a template without pictures": misfit(
        "chat-template", template(VICUNA.replace("<image>", "")), "Found total 0 <image> tokens"
    ),
    "no template": misfit(
        "chat-template", lambda site: (site.spoil() / "chat_template.jinja").unlink(), "has no chat template"
    ),
    "stage 1's template in stage 2": misfit(
        "chat-template",
        lambda site: (site.spoil() / "chat_template.jinja").write_text(chat_template_path("plain").read_text()),
        "carries stage 1's `plain` template",
    ),
    "a template that moves pictures": misfit(
        "chat-template", all_of(template("vicuna_v1"), flags("--placement", "keep")), "--placement keep"
    ),
    "a tokenizer that adds EOS": misfit("chat-template", adding_eos, "a tokenizer must not add EOS"),
    "generation that stops elsewhere": misfit(
        "chat-template", edited("generation_config.json", eos_token_id=6), "not in a stop token ('<|im_end|>')"
    ),
    "generation that stops elsewhere by the model's configuration": misfit(
        "chat-template",
        all_of(
            edited("config.json", "text_config", eos_token_id=6),
            lambda site: (site.checkpoint / "generation_config.json").unlink(),
        ),
        "not in a stop token ('<|im_end|>')",
    ),
    "a class token too few": misfit(
        "image-tokens", edited("processor_config.json", num_additional_image_tokens=0), "3 image tokens of a picture"
    ),
    "a class token too few of tiles": misfit(
        "image-tokens",
        edited("processor_config.json", kind="llava_next", num_additional_image_tokens=0),
        "13 image tokens of a picture from the processor, 14 features",
    ),
    "patches of another size": misfit(
        "image-tokens", edited("processor_config.json", patch_size=4), "16 image tokens of a picture"
    ),
    "a projector's features of another kind": misfit(
        "image-tokens", edited("config.json", vision_feature_select_strategy="full"), "5 features"
    ),
    "fewer embeddings than tokens": misfit(
        "vocabulary", edited("config.json", "text_config", vocab_size=300), "300 rows in the embedding"
    ),
    "a model of no known type": misfit(
        "config", edited("config.json", model_type="llava_2"), "a config.json that cannot be loaded: "
    ),
    "another image token": misfit(
        "image-token-id", edited("config.json", image_token_index=9), "9 in the model and 4 (<image>)"
    ),
}


def conversations_with_system(site: Site) -> None:
    for number in (4, 7):
        site.rows[number]["conversations"].insert(0, BRIEF)


def sharegpt(site: Site) -> None:
    """LLaMA-Factory's: `images`, and the system text beside the turns."""
    for given in site.rows:
        given["images"] = [given.pop("image")] if "image" in given else []
        given["system"] = "Be brief."


def messages(site: Site) -> None:
    """TRL's: strings without a marker, all pictures in front."""
    for given in site.rows:
        said = [turn["value"].removeprefix("<image>\n") for turn in given.pop("conversations")]
        given["messages"] = [
            {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)
        ]
        given["images"] = [given.pop("image")] if "image" in given else []


def parts(site: Site) -> None:
    """TRL's and the hub's: lists of parts, each with the keys of the others, as Arrow writes them."""
    messages(site)
    for given in site.rows:
        for turn in given["messages"]:
            turn["content"] = [{"type": "text", "text": turn["content"], "index": None}]
        images = [{"type": "image", "text": None, "index": 0}] * len(given["images"])
        given["messages"][0]["content"] = images + given["messages"][0]["content"]


def prompts(site: Site) -> None:
    """TRL's prompt and completion."""
    messages(site)
    for given in site.rows:
        *given["prompt"], answer = given.pop("messages")[:2]
        given["completion"] = [answer]


def queries(site: Site) -> None:
    """ms-swift's older rows."""
    for given in site.rows:
        *earlier, query, response = [turn["value"] for turn in given.pop("conversations")]
        given |= {"query": query, "response": response, "history": [earlier] if earlier else []}
        given["images"] = [given.pop("image")] if "image" in given else []


def saved_to_disk(site: Site) -> None:
    parquet()(site)
    Dataset.from_parquet(str(site.folder / "train.parquet")).save_to_disk(site.folder / "saved")
    site.file, site.write = "saved", lambda: site.folder / "saved"


def shards(site: Site) -> None:
    """A stream of two files, whose rows have no numbers."""
    parquet()(site)
    rows = Dataset.from_parquet(str(site.folder / "train.parquet"))
    (site.folder / "shards").mkdir()
    for number in range(2):
        rows.shard(2, number).to_parquet(site.folder / "shards" / f"train-{number}.parquet")
    site.file, site.write = "shards", lambda: site.folder / "shards"
    site.flags += ["--dataset_streaming"]


def several_pictures(site: Site) -> None:
    several(3, "<image>\n<image>\nThe same?", "No.", "<image>\nAnd this?", "No.")(site)
    site.rows[5] = {
        **site.rows[5],
        "image": ["5.png", "5.png"],
        "conversations": turns("<image> and <image>?", "Same."),
    }


def interleaved(site: Site) -> None:
    several_pictures(site)
    template("vicuna_v1_keep")(site)
    site.flags += ["--placement", "keep"]


def formats(site: Site) -> None:
    """A picture in each usual format; JPEG progressive, and with bytes behind its end as cameras write them."""
    for number, suffix in enumerate(("jpg", "webp", None, "bmp", "tiff", "gif", "jp2", "jpeg", "png", "ppm")):
        if suffix:
            shown(f"photographs/{number} é.{suffix}", noise, [number])(site)
    site.rows[2] = {**site.rows[0], "id": "r2", "image": "progressive.JPG", "conversations": ASKED}
    site.save(noise(), "progressive.JPG", progressive=True)
    path = site.folder / "photographs" / "7 é.jpeg"
    path.write_bytes(path.read_bytes() + b"\0" * 100)


def unicode_texts(site: Site) -> None:
    say(0, "<image>\n这是什么？ 👩‍👩‍👧 𝛼 é\u0301 \u200b\ttab  blanks\r\nLast line \n")(site)
    say(1, "Ein Bild – „schön“ 🟥 مرحبا\n\n```\ncode\n```\n")(site)
    site.rows[8]["conversations"][1]["value"] = "Yes.\n"


def harmless_words(site: Site) -> None:
    say(0, '<image>\nWrite HTML for user: <img src="a.png" alt="image"> <picture> <photo> [1] <3 a < b')(site)
    say(1, 'The assistant says: <s1> <br> <html lang="en"> [INSERT] image.png, user: assistant: User: System:')(site)
    site.rows[7]["conversations"][3]["value"] = "<Image> and [image] are no tags, <img> is one."
    site.rows[5]["conversations"] = turns("<image>\nAn image? <|x|> ### Human", "USER ASSISTANT $x_1$ <imagery>")
    site.rows[6] |= {"source": "coco.jpg", "url": "https://example.org/6.png"}
    site.rows[2] |= {"source": "text.json", "note": "see 2.png and 3.png", "image": None}


def one_picture_often(site: Site) -> None:
    """Many questions about one picture, the same question about many, the same answer to all; no ids."""
    for number, given in enumerate(site.rows):
        del given["id"]
        if number in (4, 5, 6):
            given["image"] = "4.png"
        elif number != 2:
            given["conversations"] = turns("<image>\nDescribe it.", "A square.")


def evaluated(site: Site) -> None:
    """Held-out pictures of the same sizes, in pixels and some in bytes, and an answer that stands in both files."""
    rows = []
    for number in range(4):
        data = bytearray((site.folder / f"{number}.png").read_bytes())
        site.save(tiny.picture("brown", (24 + number, 24)), f"held_out_{number}.png")
        (site.folder / f"large_{number}.bmp").write_bytes(data)
        rows.append({"id": f"r{number}", "image": f"held_out_{number}.png", "conversations": ASKED})
    site.evaluate(*rows)


CLEAN_SETS: dict[str, Plant] = {
    "LLaVA's rows, some text-only": lambda site: None,
    "system turns and several exchanges": conversations_with_system,
    "lines": lambda site: setattr(site, "file", "train.jsonl"),
    "a byte order mark and Windows' line ends": content(
        lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=2).replace("\n", "\r\n").encode()
    ),
    "ShareGPT's rows": sharegpt,
    "TRL's rows of strings": messages,
    "TRL's rows of parts": parts,
    "TRL's prompts and completions": prompts,
    "ms-swift's rows": queries,
    "Parquet": parquet(),
    "a saved dataset": saved_to_disk,
    "a stream of several files": shards,
    "several pictures": several_pictures,
    "pictures between words": interleaved,
    "no words beside a picture": say(0, "<image>"),
    "every format": formats,
    "any script, emoji, blanks": unicode_texts,
    "words that look like others": harmless_words,
    "one picture and one question often": one_picture_often,
    "an evaluation file": evaluated,
    "two slices of one file": sliced,
    "captions in stage 1": captions,
    "adapters": flags("--recipe", "sft_qlora"),
    "the last answer alone": flags("--train_on", "last_assistant"),
    "all text": flags("--train_on", "all"),
    "limits that all rows keep": flags("--max_length", "53", "--max_images", "1"),
    "wide pictures, padded": all_of(
        wide, edited("processor_config.json", "image_processor", do_pad=False), flags("--image_aspect_ratio", "pad")
    ),
    "chatml": chatml,
    "mistral": template("mistral_instruct"),
    "llama_2": template("llama_2"),
    "VipLlava": checkpoint("vipllava", chat_template=tiny.VIP_LLAVA),
    "LlavaNext": all_of(wide, checkpoint("llava_next")),
    "a SigLIP tower": checkpoint(tower="siglip"),
    "a SentencePiece tokenizer": checkpoint(tokenizer="llama"),
}


@pytest.fixture(scope="module")
def examine(tmp_path_factory, make_checkpoint):
    """`examine(name)`: what the doctor reports of a planted or clean set, asked once."""
    reports = {}

    def report(name: str) -> dict:
        if name not in reports:
            site = Site(tmp_path_factory.mktemp("case") / "data", make_checkpoint)
            plant = DEFECTS[name].plant if name in DEFECTS else CLEAN_SETS[name]
            plant(site)
            reports[name] = site.report()
        return reports[name]

    return report


def is_named(defect: Defect, report: dict) -> bool:
    found = [example["found"] for finding in report["findings"] for example in finding["examples"]]
    expected = [(defect.level, defect.code, number) for number in defect.rows]
    return said(report) == expected and all(defect.found in text for text in found)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named_and_nothing_else(examine, name):
    assert is_named(DEFECTS[name], examine(name)), (DEFECTS[name][1:], examine(name)["findings"])


@pytest.mark.parametrize("name", CLEAN_SETS)
def test_a_clean_set_is_left_alone(examine, name):
    report = examine(name)
    assert said(report) == [], report["findings"]
    assert report["data"]["usable"] == report["data"]["rows"] == report["lengths"]["rows"] == report["labels"]["rows"]
    assert report["lengths"]["exact"]


def test_the_score_is_the_one_that_the_readme_prints(examine):
    named = sum(is_named(defect, examine(name)) for name, defect in DEFECTS.items())
    false_alarms = sum(len(said(examine(name))) for name in CLEAN_SETS)
    assert (named, len(DEFECTS), false_alarms, len(CLEAN_SETS)) == (NAMED, NAMED, 0, CLEAN)
    line = r"(\d+) of (\d+) named with the right row, (\d+) false alarms on (\d+) clean sets"
    (printed,) = re.findall(line, README.read_text(encoding="utf-8"))
    assert tuple(map(int, printed)) == (NAMED, NAMED, 0, CLEAN)


# More of the same that needs another question


def test_bos_at_the_start_of_a_row_is_named_as_an_error_and_as_a_word(site):
    site.rows[0]["conversations"].insert(0, {**BRIEF, "value": "<s>Be brief."})
    report = site.report()
    assert said(report) == [("error", "unusable-row", 0), ("warning", "template-words", 0)]
    assert report["findings"][0]["examples"][0]["found"] == "its first text begins with <s>, so BOS would be left out"
    assert report["lengths"]["tokens"]["p50"] == 33  # the other rows of its batch are counted with BOS


def test_rows_that_would_be_skipped_are_warnings_up_to_one_in_a_hundred(site):
    all_of(say(1, LONG), flags("--max_length", "100", "--on_bad_row", "skip"))(site)
    site.rows[5]["conversations"] = []
    assert said(site.report()) == [
        ("error", "unusable-row", None), ("warning", "too-long", 4), ("warning", "unusable-row", 5),
    ]  # fmt: skip
    site.rows += [{"conversations": turns(f"What is {number}?", "A number.")} for number in range(300)]
    report = site.report()
    assert [finding["code"] for finding in report["findings"]] == ["too-long", "unusable-row"]
    assert said(report) == [("warning", "too-long", 4), ("warning", "unusable-row", 5)]
    assert report["data"] == {"path": str(site.folder / "train.json"), "rows": 310, "usable": 308, "eval_path": None}
    assert (report["lengths"]["rows"], report["labels"]["rows"]) == (309, 199)  # the sample holds row 4 too


@pytest.mark.parametrize(
    ("pictures", "sample_rows", "found"),
    [("headers", 0, []), ("headers", 10, [4]), ("decode", 0, [4]), ("none", 0, []), ("none", 10, [4])],
)
def test_damage_in_the_middle_is_found_by_decoding(site, pictures, sample_rows, found):
    """`headers` decodes nothing of a file that ends as it should; the rows of the sample are decoded in any case."""
    damaged("x.png", flip)(site)
    report = site.report("--pictures", pictures, "--sample_rows", str(sample_rows))
    assert said(report) == [("error", "picture-unreadable", row) for row in found]
    assert report["data"]["usable"] == 10 - len(found)
    assert report["lengths"]["rows"] == (9 if pictures == "decode" else 10)
    assert (report["pictures"] or {}).get("checked") == (None if pictures == "none" else pictures)
    assert (report["labels"] or {}).get("rows") == (10 - len(found) if sample_rows else None)


@pytest.mark.filterwarnings("ignore")
def test_decoding_refuses_what_training_refuses():
    """And a look at the headers nothing else, whatever is damaged, without an error of its own."""
    random, refused = np.random.default_rng(0), {"decode": 0, "headers": 0}
    for fmt in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        encoded = io.BytesIO()
        noise(size=(30, 24)).save(encoded, fmt, **({"exif": turned()} if fmt != "GIF" else {}))
        for _ in range(60):
            data = np.frombuffer(encoded.getvalue(), dtype=np.uint8).copy()
            places = random.integers(0, len(data), 8) if random.random() < 0.5 else random.integers(8, 300, 3)
            data[places % len(data)] = random.choice([0, 1, 2, 3, 5, 7, 10, 12, 255], len(places))
            try:
                expected = load_image(data.tobytes()).size
            except ValueError:
                expected = None
            for mode in refused:
                checks = PictureChecks(Findings(), decode=mode == "decode")
                (size,) = checks(Place("train.json", 0), [data.tobytes()])
                assert size == expected or (mode, size is not None, expected) == ("headers", True, None)
                refused[mode] += size is None
    assert refused["decode"] > refused["headers"] > 20


# What the report says


def test_the_exit_status_says_whether_there_is_an_error(site, capsys):
    assert site.run() == 0
    say(1, "")(site)
    assert site.run() == 0
    assert "1 warning" in capsys.readouterr().out
    say(1, 7)(site)
    assert site.run() == 1


def test_the_report_for_a_program(site):
    say(1, "")(site)
    held_out()(site)
    report = site.report("--max_length", "60")
    assert list(report) == [
        "data", "model", "settings", "findings", "labels", "lengths", "pictures", "parts", "memory",
    ]  # fmt: skip
    train, test = str(site.folder / "train.json"), str(site.folder / "test.json")
    assert report["data"] == {"path": train, "rows": 10, "usable": 10, "eval_path": test}
    assert report["model"] == {"name": str(site.checkpoint), "class": "LlavaForConditionalGeneration"}
    assert report["settings"] == {
        "max_length": 60,
        "max_images": None,
        "overlong": "raise",
        "train_on": "assistant",
        "placement": "front",
        "batch_size": 16,
    }
    assert report["findings"] == [
        {
            "level": "warning",
            "code": "empty-answer",
            "count": 1,
            "expected": "answers with text",
            "remedy": "Write the answer or leave the row out.",
            "examples": [{"file": train, "row": 4, "id": "r4", "found": "no text in the answer of turn 1"}],
        }
    ]
    # By hand: a picture is 4 tokens; 8 rows of 33, row 4 without its answer's 9, and rows 2 and 7 of 19 and 53.
    labels, lengths = report["labels"], report["lengths"]
    shares = {kind: labels.pop(kind) for kind in ("trained", "prompt", "image", "pad")}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["image"] / (1 - shares["pad"]) == pytest.approx(9 * 4 / labels["tokens"])
    assert labels == {
        "rows": 10,
        "turns": 11,
        "turns_with_stop": 11,
        "rows_with_bos": 10,
        "rows_without_trained": 0,
        "rows_equal_to_inference": 10,
        "tokens": 328,
        "stop_tokens": ["</s>"],
        "bos_token": "<s>",
    }
    assert lengths["tokens"] == {"p50": 33, "p95": 53, "p99": 53, "max": 53}
    assert report["pictures"] == {
        "checked": "headers",
        "pictures": 9,
        "files": 9,
        "text_only_rows": 1,
        "formats": {"PNG": 9},
        "modes": {"RGB": 9},
        "width": {"p50": 29, "p95": 33, "p99": 33, "max": 33},
        "height": {"p50": 24, "p95": 24, "p99": 24, "max": 24},
        "hidden_by_crop": None,
    }


def test_padding_of_a_worked_example():
    """Rows of 1 to 16 tokens, 136 in all, the last four without a picture. The fixed seed draws the orders

        13 11 10 7   12 9 14 6   3 15 16 1   5 4 8 2      of all,
        9 1 6 10   8 5 3 11   4 2 12 7                    of those with a picture,
        13 14 16 15                                       of those without,

    of which transformers sorts so many at once that there are four sorts or more, then puts the longest row first.
    """
    tokens = np.arange(1, 17)
    shares = padding_shares(tokens, tokens <= 12, batch_size=2, length=17)
    assert shares == {
        "random": 1 - 136 / 186,  # 2 × (13 + 10 + 12 + 14 + 15 + 16 + 5 + 8)
        "length grouped": 1 - 136 / 158,  # 16 11, 10 7; 14 12, 9 6; 13 15, 3 1; 8 5, 4 2
        "modality and length grouped": 1 - 136 / 170,  # 12 1, 10 6, 8 5, 11 3, 4 2, 9 7; 16 13, 14 15
        "packed": 0,
    }
    # Eight at once: 16 13, 12 11, 10 9, 7 6; 14 15, 8 5, 4 3, 2 1
    accumulated = padding_shares(tokens, tokens <= 12, batch_size=2, length=17, accumulation=4)
    assert accumulated["length grouped"] == 1 - 136 / 148
    # 10, 8 + 3, 6 + 4, and 2 in a sequence that goes on; all without a picture
    packed = padding_shares(np.array([10, 2, 6, 4, 8, 3]), np.zeros(6, dtype=bool), batch_size=2, length=11)["packed"]
    assert packed == pytest.approx(2 / 35)


LIMITS = [{}, {"max_length": 80}, {"max_images": 2}]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_lengths_are_the_collators(site, kind, limits):
    """Of every class, for pictures of any shape, alone and several, before and after the limits."""
    checkpoint(kind)(site)
    for number, size in enumerate([(24, 24), (90, 30), (30, 90), (200, 60), (17, 64)]):
        site.save(tiny.picture("green", size), f"{number}.png")
    several(2, "<image><image>The same?", "No.")(site)
    site.rows[5] |= {"image": ["0.png", "1.png", "3.png"]}
    site.rows[5]["conversations"] = turns("<image>\nOne?", "Yes.", "<image><image>Two?", "Yes.", "And?", LONG)
    site.rows[6] |= {"image": ["1.png"] * 3, "conversations": turns("<image>" * 3, LONG)}
    given = [text for name, value in limits.items() for text in (f"--{name}", str(value))]
    report = site.report("--overlong", "drop", *given)
    found = report["lengths"]
    assert found["exact"]
    assert {code for _, code, _ in said(report)} <= {"shortened", "too-long", "too-many-pictures"}

    processor = AutoProcessor.from_pretrained(site.checkpoint)
    processor.chat_template = training_chat_template(processor)
    rows = list(load_rows(site.folder / "train.json"))
    whole = LlavaDataCollator(processor)
    lengths = sorted(whole([row])["input_ids"].shape[1] for row in rows)
    assert [found["tokens"][name] for name in ("p50", "max")] == [lengths[5], lengths[9]]
    cut = LlavaDataCollator(processor, overlong="drop", **limits)
    for row in rows:
        cut([row])
    assert (found["shortened"], found["left_out"]) == (cut.shortened, cut.dropped)
    assert found["kept"] == 10 - cut.shortened - cut.dropped
    assert bool(cut.shortened and cut.dropped) == bool(limits)


def test_the_pre_flight_spends_no_time_on_the_page(site, monkeypatch):
    processor = AutoProcessor.from_pretrained(site.checkpoint)
    processor.chat_template = training_chat_template(processor)
    collator, findings = LlavaDataCollator(processor), Findings()
    counter = LengthCounter(processor, processor.chat_template)
    monkeypatch.setattr(counter, "count", None)  # would fail
    checks = LabelChecks(findings, collator, collator, counter, show=False)
    labels = checks([(Place("train.json", number), row) for number, row in enumerate(load_rows(site.write()))])
    assert (labels["rows"], labels["turns"], labels["rows_equal_to_inference"]) == (10, 11, 10)
    assert (checks.shown, findings.to_list()) == ([], [])


@pytest.mark.parametrize("pictures", ["headers", "none"])
def test_tiles_are_counted_only_where_sizes_are_known(site, pictures):
    checkpoint("llava_next")(site)
    report = site.report("--pictures", pictures)
    assert said(report) == []
    assert report["lengths"]["rows"] == (10 if pictures == "headers" else 1)


# Parts and memory


def describe(name, parameters, trainable, dtype, rate, quantised="no", adapters=0) -> dict:
    return {
        "part": name,
        "parameters": parameters,
        "trainable": trainable,
        "dtype": dtype,
        "quantised": quantised,
        "adapters": adapters,
        "learning_rate": rate,
    }


# Of the tiny model, in bytes: AdamW keeps two moments of each trained weight, and a step of 4 bytes a tensor.
RECIPES = {
    "sft_full": (
        [
            describe("vision_tower", 32_096, 0, "float32", None),
            describe("multi_modal_projector", 2_112, 2_112, "float32", 2e-5),
            describe("language_model", 41_632, 41_632, "float32", 2e-5),
        ],
        {"parameters": 4 * 75_840, "gradients": 4 * 43_744, "optimizer": 8 * 43_744 + 25 * 4},
    ),
    "pretrain_projector": (
        [
            describe("vision_tower", 32_096, 0, "bfloat16", None),
            describe("multi_modal_projector", 2_112, 2_112, "float32", 1e-3),
            describe("language_model", 41_632, 0, "bfloat16", None),
        ],
        {"parameters": 2 * 73_728 + 4 * 2_112, "gradients": 4 * 2_112, "optimizer": 8 * 2_112 + 4 * 4},
    ),
    "sft_qlora": (
        [
            describe("vision_tower", 32_096, 0, "bfloat16", None),
            describe("multi_modal_projector", 2_112, 2_112, "float32", 2e-5),
            describe("language_model", 172_704, 131_072, "bfloat16, float32", 2e-4, "4-bit", 14),
        ],
        {"parameters": 672_400, "gradients": 4 * 133_184, "optimizer": 8 * 133_184 + 32 * 4},
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_and_memory_are_those_of_the_loaded_model(site, recipe):
    parts, memory = RECIPES[recipe]
    captions(site)  # for all three recipes; the last --recipe counts
    report = site.report("--recipe", recipe, "--optim", "adamw_torch")
    assert said(report) == []
    assert report["parts"] == parts
    assert {name: report["memory"][name] for name in memory} == memory
    assert report["memory"]["total"] == sum(size for name, size in report["memory"].items() if name != "total")

    arguments = inspect_data.make_parser(recipe).parse_args_and_config(
        ["--model_name_or_path", str(site.checkpoint), "--dataset_name", "x", "--use_cpu", "--bf16", "False"]
    )
    _, training_args, model_args, _ = arguments
    loading = quantised_loading(model_args, training_args)
    model = AutoModelForImageTextToText.from_pretrained(site.checkpoint, dtype=model_args.dtype, **loading)
    if model_args.use_peft:
        model = add_adapters(model, adapter_config(model_args))
    else:
        train_only(model, inspect_data.RECIPES[recipe])
    rates = {part["part"]: part["learning_rate"] for part in parts}
    assert list_parts(model, rates) == parts
    plan = predict_memory(model, training_args, batch_size=1, tokens=10, pictures=1)
    assert {name: getattr(plan, name) for name in ("parameters", "gradients")} == {
        name: memory[name] for name in ("parameters", "gradients")
    }


def test_a_processor_without_a_model(site):
    folder = site.spoil()
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()
    report = site.report()
    assert said(report) == []
    assert (report["model"]["class"], report["parts"], report["memory"]) == (None, None, None)
    assert report["labels"]["turns_with_stop"] == 11
    assert report["lengths"]["exact"]


# --fix


def test_the_rows_that_can_train_are_written(site, capsys):
    def talk(number, *said, **columns):
        return {"id": f"r{number}", **columns, "conversations": turns(*said)}

    good, text = talk(0, "<image>\nWhat?", "A square.", image="0.png"), talk(1, "Why?", "")
    shout = [{"from": " Human", "value": "Who?"}, {"from": "GPT", "value": "Me."}]
    damaged("cut.jpg", half, [])(site)
    site.rows = [
        good,
        text,  # an empty answer is a warning
        {"id": "r2", "image": "1.png", "conversation": turns("<image>", "One.")},
        talk(3, "<image><image>", "No.", imgs=["0.png", "1.png"]),
        {"id": "r4", "conversations": shout},
        talk(5, "Is it?", "Yes.", "And?"),
        talk(6, "<Image>\nWhich? [image]", "These.", images=["0.png", "1.png"]),
        talk(7, "Is it?", "No.", image=""),
        {**good, "id": "r8"},
        talk(9, "<image>", "Cut.", image="cut.jpg"),
        talk(10, "<image>", "Missing.", image="missing.png"),
        {"id": "r11", "image": "cut.jpg", "conversation": turns("<image>", "Cut.")},  # the key alone does not help
        {"id": "r12", "conversations": [{"from": "human", "value": "Q"}, {"from": "bot", "value": "A"}]},
        {"id": "r13", "conversations": [*turns("Q", "A"), {"from": ["human"], "value": "Q"}]},
        {"id": "r14", "message": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        talk(15, "<image>\nAnd?", LONG, image="2.png"),
        ["no object"],
    ]
    output = site.folder / "fixed" / "train.jsonl"
    before = site.write().read_bytes()
    assert site.run("--max_length", "100", "--fix", str(output)) == 1
    assert site.write().read_bytes() == before
    printed = f"{output}: 2 rows kept, 6 repaired, 9 left out; {output}.changes.jsonl\n"
    assert printed + f"train on it with --image_folder {site.folder}\n" in capsys.readouterr().out

    expected = [
        good,
        text,
        {"id": "r2", "image": "1.png", "conversations": turns("<image>", "One.")},
        talk(3, "<image><image>", "No.", images=["0.png", "1.png"]),
        talk(4, "Who?", "Me."),
        talk(5, "Is it?", "Yes."),
        talk(6, "<image>\nWhich? <image>", "These.", images=["0.png", "1.png"]),
        talk(7, "Is it?", "No.", image=None),
    ]
    lines = output.read_text().splitlines()
    assert list(map(json.loads, lines)) == expected
    assert lines[0] == json.dumps(good)
    loaded = load_rows(output, image_folder=site.folder)
    assert loaded["id"] == [row["id"] for row in expected]
    assert [len(images) for images in loaded["images"]] == [1, 0, 1, 2, 0, 0, 2, 0]

    changes = [json.loads(line) for line in Path(f"{output}.changes.jsonl").read_text().splitlines()]
    assert [(change["row"], change["action"]) for change in changes] == [
        *[(row, "repaired") for row in range(2, 8)],
        *[(row, "left out") for row in range(8, 17)],
    ]
    assert [change["id"] for change in changes] == [*[f"r{row}" for row in range(2, 16)], None]
    reasons = [change["reason"] for change in changes]
    assert reasons[:8] == [
        "renamed 'conversation' to 'conversations'",
        "renamed 'imgs' to 'images'",
        "renamed the speakers [' Human', 'GPT']",
        "dropped the last question, which has no answer",
        "wrote <image> for ['<Image>', '[image]']",
        "wrote null for the empty 'image'",
        "repeats an earlier row",
        "picture-unreadable",
    ]
    starts = ["found no picture file at", f"{site.folder}/cut.jpg: the picture cannot be", "found turn 1 from 'bot'"]
    starts += ["found turn 2 from ['human']", "found the key 'message'", "too-long", "found a row of type list"]
    assert [reason[: len(start)] for reason, start in zip(reasons[8:], starts, strict=True)] == starts


def test_a_row_of_another_shape_is_not_repaired_into_the_file(site):
    site.rows[0] = {"message": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    output = site.folder / "fixed.jsonl"
    site.run("--fix", str(output))
    assert load_rows(output)["id"] == [f"r{row}" for row in range(1, 10)]


def test_what_exists_is_not_written_over(site):
    output = site.folder / "fixed.jsonl"
    site.run("--fix", str(output))
    before = output.read_bytes()
    with pytest.raises(FileExistsError, match="fixed.jsonl exists; pass another name"):
        site.run("--fix", str(output))
    assert output.read_bytes() == before
    output.unlink()
    with pytest.raises(FileExistsError, match="fixed.jsonl.changes.jsonl exists"):
        site.run("--fix", str(output))
    assert not output.exists()
    with pytest.raises(ValueError, match="expected the name of a new .jsonl file"):
        site.run("--fix", str(site.folder / "fixed.json"))
    parquet()(site)
    with pytest.raises(ValueError, match="expected a .json or .jsonl file as --dataset_name"):
        site.run("--fix", str(site.folder / "other.jsonl"))


def test_a_list_that_breaks_off_is_not_fixed(site):
    text = json.dumps(site.rows)
    content(lambda rows: text.replace('{"id": "r6"', '"id": "r6"').encode())(site)
    before = sorted(site.folder.iterdir())
    with pytest.raises(ValueError, match=r"--fix: .*train.json, row 7: .* What stands behind it would be lost"):
        site.run("--on_bad_row", "skip", "--fix", str(site.folder / "fixed.jsonl"))
    assert sorted(site.folder.iterdir()) == sorted([*before, site.folder / "train.json"])


def test_a_disk_that_fills_leaves_no_fixed_file(site, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    say(1, 7)(site)
    monkeypatch.setattr(_repair, "repair", fill)  # at row 4, behind rows that are written
    with pytest.raises(OSError, match="No space left"):
        site.run("--fix", str(site.folder / "fixed.jsonl"))
    assert not list(site.folder.glob("fixed*"))


# Slices


def test_a_slice_is_what_is_read(site):
    sliced(site)
    site.rows[9]["conversations"][1]["value"] = ""
    report = site.report()
    path = str(site.write())
    assert report["data"] == {"path": path, "rows": 7, "usable": 7, "eval_path": f"{path}:train[7:]"}
    assert said(report) == [("warning", "empty-answer", 9)]
    assert report["findings"][0]["examples"][0]["file"] == f"{path}:train[7:]"
    assert site.report("--eval_strategy", "no")["findings"] == []


@pytest.mark.parametrize(("policy", "bad", "named"), [("raise", 8, 8), ("skip", 8, None), ("skip", 2, 2)])
def test_a_slice_counts_rows_as_training_does(site, policy, bad, named):
    """Where rows are skipped, the slice begins behind them; else a bad row anywhere stops the run."""
    site.rows[bad]["conversations"] = []
    site.rows[4]["conversations"][1]["value"] = ""
    site.flags += ["--on_bad_row", policy, "--dataset_train_split", "train[:4]"]
    found = {(code, row) for _, code, row in said(site.report()) if row is not None}
    assert found == {("unusable-row", named)} - {("unusable-row", None)} | (
        {("empty-answer", 4)} if (policy, bad) == ("skip", 2) else set()
    )


def test_fix_takes_no_slice(site):
    with pytest.raises(ValueError, match="--fix takes the whole file: drop the slice"):
        site.run("--dataset_train_split", "train[:5]", "--fix", str(site.folder / "fixed.jsonl"))


def test_fix_of_a_file_with_held_out_rows_writes_them_all(site):
    """Rows that the evaluation repeats are no repetitions within the file."""
    site.flags += ["--dataset_test_split", "train[7:]", "--eval_strategy", "steps"]
    output = site.folder / "fixed.jsonl"
    assert {code for _, code, _ in said(site.report("--fix", str(output)))} == {"duplicate-row", "picture-in-eval"}
    assert len(output.read_text().splitlines()) == 10
