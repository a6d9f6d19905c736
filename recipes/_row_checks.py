"""Checks of rows and of their pictures' files that need no model and decode no pixels.

A file of its own: the doctor runs them over a whole file, the pre-flight over the first rows of a run.
"""

import os
import re
from collections.abc import Callable, Iterable
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

from jinja2 import TemplateError
from PIL import Image

from _findings import Findings, Place
from collators import load_image
from collators.llava import FORMATS, UNDECODABLE

SMALLEST = 16  # pixels of a side; below this a picture is most likely an icon or a tracking pixel
MOST_PIXELS = 16_000_000  # a third of a second of decoding for the 336 to 1000 pixels a side that a tower sees
WIDEST = 5.0  # width by height or height by width
HIDDEN = 0.05  # share of the pictures' area that a centre crop may cut off, on average
# Words people write for <image>, which no reader takes for it; <img> is HTML too, and so is only warned of.
IMAGE_SPELLINGS = re.compile(r"<\s*image\s*/?\s*>|\[image\]", re.IGNORECASE)
PLACEHOLDER_TYPOS = re.compile(rf"{IMAGE_SPELLINGS.pattern}|<img>|\[img\]", re.IGNORECASE)
PICTURE_NAME = re.compile(r"\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)
WHOLE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
PROBE_QUESTION, PROBE_ANSWER = "what-is-asked", "what-is-answered"


def template_words(processor, chat_template: str) -> list[str]:
    """Words that mean something to the tokenizer or the chat template: special tokens and the headers of turns."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = (special | set(tokenizer.all_special_tokens)) - {processor.image_token}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": PROBE_QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": PROBE_ANSWER}]},
    ]
    try:
        rendered = processor.apply_chat_template(turns, chat_template=chat_template)
    except TemplateError:  # stage 1's, which takes pictures with captions alone and writes no headers
        rendered = ""
    # Split at the probes; what stands directly ahead of one, between blanks, is a header.
    pieces = re.split(f"{PROBE_QUESTION}|{PROBE_ANSWER}", rendered)[:-1]
    headers = {piece.split()[-1] for piece in pieces if piece.split()}
    headers = {word for word in headers if re.search(r"\W", word) and not any(token in word for token in special)}
    return sorted(special | headers, key=len, reverse=True)


class RowChecks:
    """Checks the rows of one or more files against each other and against the chat template.

    Args:
        findings: where what is found goes.
        words: of the chat template (`template_words`); none are looked for without.
    """

    def __init__(self, findings: Findings, words: Iterable[str] = ()):
        self.findings = findings
        words = list(words)
        self._words = re.compile("|".join(map(re.escape, words))) if words else None
        self._seen: dict[bytes, Place] = {}
        self._ids: dict[object, Place] = {}

    def __call__(self, place: Place, row: dict) -> None:
        """Check a row that `load_rows` accepts: `messages` with strings or parts, `images`, other columns."""
        empty, words, typos, broken = [], [], [], []
        texts = []
        for turn, message in enumerate(row["messages"]):
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
            text = "\n".join(parts)
            texts.append((message["role"], content if isinstance(content, str) else tuple(parts)))
            if message["role"] == "assistant" and not text.strip():
                empty.append(turn)
            if self._words and (word := self._words.search(text)):
                words.append((turn, word[0]))
            if message["role"] == "user":  # answers show no picture, but may be about HTML
                # The image token itself is left in string contents, where it is no typo.
                found = (typo[0] for typo in PLACEHOLDER_TYPOS.finditer(text) if typo[0] != "<image>")
                typos += [(turn, typo) for typo in found]
            if "\ufffd" in text:
                broken.append(turn)
        add = self.findings.add
        if empty:
            found = f"no text in the answer of turn {empty[0]}"
            add("warning", "empty-answer", place, found, "answers with text", "Write the answer or leave the row out")
        if words:
            add(
                "warning",
                "template-words",
                place,
                f"{words[0][1]!r} in turn {words[0][0]}",
                "texts without the chat template's own words",
                "Reword it: the model reads it as the start or end of a turn",
            )
        if typos:
            add(
                "warning",
                "placeholder-typo",
                place,
                f"{typos[0][1]!r} in turn {typos[0][0]}",
                "<image> for a picture, and nothing like it elsewhere",
                "Write <image> where a picture is meant",
            )
        if broken:
            add(
                "warning",
                "broken-characters",
                place,
                f"the replacement character U+FFFD in turn {broken[0]}",
                "texts as they were written",
                "Convert the file again from its source with the right encoding",
            )
        self._check_columns(place, row)
        self._check_repetition(place, row, texts)

    def _check_columns(self, place: Place, row: dict) -> None:
        if row["images"]:
            return
        for name, value in row.items():
            if name not in ("messages", "images", "id") and isinstance(value, str) and PICTURE_NAME.fullmatch(value):
                self.findings.add(
                    "warning",
                    "picture-key",
                    place,
                    f"no picture, but {name!r}: {value[:80]!r}",
                    "pictures in 'image' or 'images'",
                    "Rename the key, and write one <image> for each picture",
                )

    def _check_repetition(self, place: Place, row: dict, texts: list) -> None:
        sources = [_picture_key(source) for source in row["images"]]
        digest = blake2b(repr((texts, sources)).encode("utf-8", "backslashreplace"), digest_size=12).digest()
        first = self._seen.setdefault(digest, place)
        identity = row.get("id")
        identity = identity if isinstance(identity, str | int) else None
        named = self._ids.setdefault((place.file, identity), place) if identity is not None else place
        if first is not place:
            where = f"row {first.row}" if first.file == place.file else f"row {first.row} of {first.file}"
            self.findings.add(
                "warning",
                "duplicate-row",
                place,
                f"the conversation and pictures of {where}",
                "each row once",
                "Leave one out, or weigh rows on purpose by a mixture (docs/mixture.md)",
            )
        elif named is not place:
            self.findings.add(
                "note",
                "repeated-id",
                place,
                f"the id of row {named.row}",
                "ids that name one row",
                "Nothing is lost: errors name the row's number too",
            )


def _picture_key(source: object) -> object:
    if isinstance(source, dict):
        data = source.get("bytes")
        return blake2b(data, digest_size=12).digest() if data else source.get("path")
    return source if isinstance(source, str) else id(source)


class PictureChecks:
    """Checks pictures by their headers; decodes one only where its file does not end as it should.

    Args:
        findings: where what is found goes.
        decode: decode every picture, which also finds damage in its middle.
        fetch: as of `load_image`; URLs are skipped without it.

    Attributes:
        sizes: `(width, height)` in pixels of each picture of each row, upright; files seen before count again.
        formats, modes: number of distinct files by Pillow's name.
    """

    def __init__(self, findings: Findings, decode: bool = False, fetch: Callable[[str], bytes] | None = None):
        self.findings = findings
        self.decode = decode
        self.fetch = fetch
        self.sizes: list[tuple[int, int]] = []
        self.formats: dict[str, int] = {}
        self.modes: dict[str, int] = {}
        self.files = 0
        self._known: dict[str, tuple[int, int] | str | None] = {}

    def __call__(self, place: Place, sources: list) -> list[tuple[int, int] | None]:
        """Check a row's pictures.

        Returns:
            Width and height of each as it is shown, None for one that cannot be used.
        """
        sizes = []
        for source in sources:
            path = source.get("path") if isinstance(source, dict) and not source.get("bytes") else source
            if not isinstance(path, str):
                size = self._check(place, source)
            elif path in self._known:
                size = self._known[path]
            else:
                size = self._known[path] = self._check(place, source)
            if isinstance(size, str):
                refuse_picture(self.findings, place, source, size)
                size = None
            elif size is not None:
                self.sizes.append(size)
            sizes.append(size)
        return sizes

    def _check(self, place: Place, source: object) -> tuple[int, int] | str | None:
        """A picture's size, or what is wrong with it."""
        data, name = _open_source(source)
        if data is None:
            return "neither bytes nor a path"
        try:
            if isinstance(data, str) and "://" in data:
                if self.fetch is None:
                    return None
                data = BytesIO(self.fetch(data))
            with Image.open(data, formats=FORMATS) if not isinstance(data, Image.Image) else data.copy() as image:
                if self.decode or not _ends_whole(image):
                    load_image(source, self.fetch)
                return self._check_header(place, name, image)
        except UNDECODABLE as error:
            return str(error.__cause__ or error)

    def _check_header(self, place: Place, name: str, image: Image.Image) -> tuple[int, int]:
        self.files += 1
        self.formats[image.format or "memory"] = self.formats.get(image.format or "memory", 0) + 1
        self.modes[image.mode] = self.modes.get(image.mode, 0) + 1
        width, height = image.size

        def add(level, code, found, expected, remedy):
            self.findings.add(level, code, place, f"{name}: {found}", expected, remedy)

        try:  # not by a PNG's own method, which decodes it for a mark that may stand behind its pixels
            turned = Image.Image.getexif(image).get(0x0112, 1)
        except UNDECODABLE as error:
            turned, found = 1, f"an EXIF block that cannot be read ({error})"
            add("note", "picture-exif", found, "EXIF that can be read", "It is taken as upright here")
        if turned in (5, 6, 7, 8) and image.format != "TIFF":  # of a TIFF Pillow gives the upright size
            width, height = height, width

        if min(width, height) < SMALLEST:
            add(
                "warning",
                "picture-tiny",
                f"{width}×{height} pixels",
                f"pictures of {SMALLEST} pixels a side or more",
                "Look whether it is the picture that was meant",
            )
        if width * height > MOST_PIXELS:
            add(
                "warning",
                "picture-huge",
                f"{width}×{height} pixels",
                f"pictures of at most {MOST_PIXELS / 1e6:.0f} megapixels",
                "Make it smaller once: it is decoded every time, and the model sees a small part of its pixels",
            )
        if max(width, height) > WIDEST * min(width, height):
            add(
                "warning",
                "picture-aspect",
                f"{width}×{height} pixels",
                f"sides of at most {WIDEST:.0f} to 1",
                "Cut it into parts, or expect that little of it can be read",
            )
        if turned in range(2, 9):
            add(
                "note",
                "picture-exif",
                f"EXIF orientation {turned}",
                "pictures stored upright",
                "It is turned upright here; other trainers ignore the mark",
            )
        if image.mode.startswith("I"):
            add(
                "note",
                "picture-16-bit",
                f"mode {image.mode}",
                "8 bits a channel",
                "It is scaled to 8 bits here; other trainers turn it white",
            )
        if image.mode == "F":
            add(
                "note",
                "picture-float",
                "32-bit floats",
                "8 bits a channel",
                "It is scaled to 8 bits here; other trainers turn it black",
            )
        if image.mode in ("CMYK", "LAB"):
            add("note", "picture-cmyk", f"colours as {image.mode}", "RGB or grey", "It is converted to RGB here")
        if image.has_transparency_data:
            add("note", "picture-transparent", "transparency", "opaque pictures", "It is laid on white here")
        if getattr(image, "is_animated", False) and image.format != "MPO":
            add("note", "picture-animated", "several frames", "one frame", "The first one is taken")
        return width, height


def refuse_picture(findings: Findings, place: Place, source: object, reason: str) -> None:
    """Name a picture that `load_image` refuses, or would."""
    name = _open_source(source)[1]
    findings.add(
        "error",
        "picture-unreadable",
        place,
        f"{name}: {reason.removeprefix(f'{name}: ')}",
        "a picture that can be decoded",
        "Repair or remove it, or train with --on_bad_row skip",
    )


def _open_source(source: object) -> tuple[object, str]:
    """What Pillow opens, and a name for messages."""
    if isinstance(source, dict):
        if source.get("bytes"):
            return BytesIO(source["bytes"]), source.get("path") or "picture in the row"
        source = source.get("path")
    if isinstance(source, bytes):
        return BytesIO(source), "picture in the row"
    return source, str(source) if isinstance(source, str | Path) else "picture in memory"


def _ends_whole(image: Image.Image) -> bool:
    """Whether the file ends as its format does; one that is cut short does not. False where that cannot be told."""
    file = getattr(image, "fp", None)
    if file is None:
        return True
    if image.format == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= file.seek(0, os.SEEK_END)
    end = WHOLE_ENDS.get(image.format)
    if end is None:
        return False
    file.seek(-len(end), os.SEEK_END)
    return file.read(len(end)) == end


def hidden_by_crop(processor, width: int, height: int) -> float:
    """Share of a picture's area that the image processor cuts off, 0 where it pads, tiles or squeezes."""
    settings = processor.image_processor
    tiles = hasattr(settings, "image_grid_pinpoints")
    if tiles or not getattr(settings, "do_center_crop", False) or getattr(settings, "do_pad", False):
        return 0.0
    size, crop = dict(settings.size), dict(settings.crop_size)
    if not size.get("shortest_edge"):
        shown = [(size["width"], crop["width"]), (size["height"], crop["height"])]
    else:
        scale = size["shortest_edge"] / min(width, height)
        shown = [(width * scale, crop["width"]), (height * scale, crop["height"])]
    return 1 - min(1, shown[0][1] / shown[0][0]) * min(1, shown[1][1] / shown[1][0])
