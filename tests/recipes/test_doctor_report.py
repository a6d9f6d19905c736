"""The doctor's page and terminal output, of reports made by hand."""

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from _doctor_report import TEMPLATE, print_report, write_page

HOSTILE = '<script>alert(1)</script>"></style></td><img src=x onerror=alert(1)>&lt; {{ 7*7 }} [bold red]x[/] é'
PERCENTILES = {"p50": 700, "p95": 1323, "p99": 1575, "max": 2400}


def thumbnail():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "teal").save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def make_report(text=None, **sections):
    """A report with every section; `text` stands in each place that holds a text of the data or of its paths."""

    def say(default):
        return default if text is None else text

    example = {"file": say("train.json"), "row": 17, "id": say("a"), "found": say("pictures/17.jpg is truncated")}
    whole = {"file": say("train.json"), "row": None, "id": None, "found": say("22% cut off")}
    remedy, expected = say("Repair it."), say("a picture that can be decoded")
    shared = {"expected": expected, "remedy": remedy}
    report = {
        "data": {"path": say("train.json"), "rows": 1200, "usable": 1190, "eval_path": say("test.json")},
        "model": {"name": say("llava-hf/llava-1.5-7b-hf"), "class": say("LlavaForConditionalGeneration")},
        "settings": {
            "max_length": 2048,
            "max_images": None,
            "overlong": say("raise"),
            "train_on": say("assistant"),
            "placement": say("front"),
            "batch_size": 16,
        },
        "findings": [
            {"level": "error", "code": say("picture-unreadable"), "count": 1057, "examples": [example] * 5, **shared},
            {"level": "warning", "code": say("centre-crop"), "count": 1, "examples": [whole], **shared},
            {"level": "note", "code": say("repeated-id"), "count": 1, "examples": [{**example, "id": 0}], **shared},
        ],
        "labels": {
            **{"rows": 256, "tokens": 182344, "trained": 0.081, "prompt": 0.189, "image": 0.612, "pad": 0.118},
            **{"turns": 411, "turns_with_stop": 411, "stop_tokens": [say("</s>")], "bos_token": say("<s>")},
            **{"rows_with_bos": 256, "rows_without_trained": 0, "rows_equal_to_inference": 254},
        },
        "lengths": {
            **{"rows": 1190, "exact": True, "max_length": 2048, "kept": 1180, "shortened": 7, "left_out": 3},
            **{"tokens": PERCENTILES, "text_tokens": {**PERCENTILES, "max": 1824}, "image_tokens": PERCENTILES},
            "padding": {"random": 0.31, "length grouped": 0.043, "modality and length grouped": 0.022, "packed": 0.01},
            **{"batch_size": 16, "histogram": [[0, 1000, 1100], [1000, 2000, 0], [2000, 2500, 90]]},
        },
        "pictures": {
            **{"checked": say("headers"), "pictures": 1300, "files": 1200, "text_only_rows": 60},
            **{"formats": {say("JPEG"): 1100}, "modes": {say("RGB"): 1190}, "width": PERCENTILES},
            **{"height": PERCENTILES, "hidden_by_crop": {"mean": 0.22, "max": 0.4375}},
        },
        "parts": [
            {
                **{"part": say("language_model"), "parameters": 6738939904, "trainable": 20979712, "adapters": 224},
                **{"dtype": say("bfloat16, float32"), "quantised": say("4-bit"), "learning_rate": 2e-4},
            },
            {
                **{"part": "vision_tower", "parameters": 12345, "trainable": 0, "adapters": 0},
                **{"dtype": "bfloat16", "quantised": "no", "learning_rate": None},
            },
        ],
        "memory": {
            **{"parameters": 4 * 2**30, "gradients": 2**29, "optimizer": 2**30, "activations": 2**31},
            **{"communication": 0, "allowance": 2**29, "total": 8 * 2**30},
        },
        "samples": [
            {
                **{"row": 17, "id": say("a"), "tokens": 1631, "trained": 22, "codes": [say("picture-unreadable")]},
                "pictures": [{"name": say("17.jpg"), "width": 640, "height": 480, "jpeg": thumbnail()}],
                "spans": [
                    {"kind": "prompt", "text": say("<s>USER: "), "tokens": 4},
                    {"kind": "image", "text": say("<image>"), "tokens": 1576},
                    {"kind": "prompt", "text": say("\nWhich?\n ASSISTANT:"), "tokens": 29},
                    {"kind": "trained", "text": say(" Nine.\nYes.</s>"), "tokens": 22},
                ],
            },
            {
                **{"row": 18, "id": None, "tokens": 4, "trained": 0, "codes": ["shortened"], "pictures": []},
                "spans": [],
            },
        ],
    }
    return report | sections


EMPTY = dict.fromkeys(("labels", "lengths", "pictures", "parts", "memory")) | {"findings": [], "samples": []}


def write(tmp_path, report):
    path = tmp_path / "page.html"
    write_page(report, path)
    html = path.read_text(encoding="utf-8")
    return html, ElementTree.fromstring(html)


def text_of(element):
    return " ".join("".join(element.itertext()).split())


class Elements(HTMLParser):
    """Start tags with the names of their attributes, as a browser takes the page apart."""

    def __init__(self, html):
        super().__init__()
        self.found, self.ids, self.links = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src")]


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE.replace('"', "'")], ids=["double", "single"])
def test_texts_never_become_elements_or_attributes(tmp_path, text):
    plain, _ = write(tmp_path, make_report("plain"))
    html, root = write(tmp_path, make_report(text))
    assert Elements(html).found == Elements(plain).found
    assert "".join(root.itertext()).count(text) == 51
    assert root.find(".//img").get("alt") == text
    assert {tag for tag, *_ in Elements(html).found} & {"script", "iframe", "object", "link", "base", "form"} == set()


def test_control_characters_are_shown_not_obeyed(tmp_path):
    text = "a\x00b\x1b[31mc\x9b\r\udcffd\uffff"
    _, root = write(tmp_path, make_report(text))
    assert root.find(".//h1").text == "a␀b␛[31mc\ufffd␍\ufffdd\ufffd"
    assert "\x1b" not in show(make_report(text)) and "\x9b" not in show(make_report(text))


def test_the_page_reaches_for_nothing(tmp_path):
    html, root = write(tmp_path, make_report())
    assert not re.findall(r"http(?!-equiv)|@import|url\(|srcset", re.sub('base64,[^"]*', "", html))
    elements = Elements(html)
    assert len(elements.ids) == len(set(elements.ids))
    pictures = [link for link in elements.links if not link.startswith("#")]
    assert pictures == [f"data:image/jpeg;base64,{thumbnail()}"]
    assert {link[1:] for link in elements.links if link.startswith("#")} <= set(elements.ids)
    assert root.find(".//meta[@http-equiv='Content-Security-Policy']").get("content") == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize("jpeg", ['x" onerror="alert(1)', "", "PHN2Zz4=\n", "data:image/svg+xml,<svg/>"])
def test_a_thumbnail_that_is_not_base64_is_refused(tmp_path, jpeg):
    report = make_report()
    report["samples"][0]["pictures"][0]["jpeg"] = jpeg
    with pytest.raises(ValueError, match=r"row 17, 17\.jpg: found .* as its thumbnail, expected a JPEG in base64"):
        write_page(report, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_page_shows_the_findings(tmp_path):
    _, root = write(tmp_path, make_report())
    assert root.find(".//p[@class='verdict error']").text == (
        "1 error, 1 warning, 1 note: training would stop or train something else"
    )
    assert [box.get("id") for box in root.iter("input") if box.get("id")] == [
        "show-error",
        "show-warning",
        "show-note",
    ]
    error, warning, note = (article for article in root.iter("article") if "finding" in article.get("class"))
    example = "train.json, row 17 (id 'a'): pictures/17.jpg is truncated "
    assert text_of(error) == (
        f"error picture-unreadable 1,057 found {example * 5}and 1,052 more "
        "expected a picture that can be decoded remedy Repair it."
    )
    assert "1 found train.json: 22% cut off expected" in text_of(warning)
    assert "train.json, row 17 (id 0): " in text_of(note)


def test_the_page_shows_the_figures(tmp_path):
    _, root = write(tmp_path, make_report())
    cells = {
        section.get("id"): [[text_of(cell) for cell in row] for row in section.iter("tr")]
        for section in root.iter("section")
    }
    assert list(cells) == ["findings", "labels", "lengths", "pictures", "parts", "memory", "samples"]
    shares = [text_of(item) for item in root.find(".//ul[@aria-label='Shares of the tokens']")]
    assert shares == ["trained 8.1%", "prompt 18.9%", "image 61.2%", "padding 11.8%"]
    assert cells["labels"] == [
        ["rows through the collator", "256"],
        ["their tokens", "182,344"],
        ["trained turns that end in </s>", "411 of 411"],
        ["rows that begin with <s>", "256 of 256"],
        ["rows without trained tokens", "0"],
        ["rows prompted as at inference", "254 of 256: 2 not"],
    ]
    assert cells["lengths"] == [
        ["tokens of a row", "p50", "p95", "p99", "max"],
        ["all", "700", "1,323", "1,575", "2,400"],
        ["of texts", "700", "1,323", "1,575", "1,824"],
        ["of pictures", "700", "1,323", "1,575", "2,400"],
        ["rows counted", "1,190"],
        ["max_length", "2,048"],
        ["rows kept whole", "1,180"],
        ["rows shortened", "7"],
        ["rows left out", "3"],
        ["batches of 16", "padding", ""],
        ["random", "31.0%", ""],
        ["length grouped", "4.3%", ""],
        ["modality and length grouped", "2.2%", ""],
        ["packed", "1.0%", ""],
    ]
    assert cells["pictures"][-3:] == [
        ["pixels", "p50", "p95", "p99", "max"],
        ["width", "700", "1,323", "1,575", "2,400"],
        ["height", "700", "1,323", "1,575", "2,400"],
    ]
    assert ["hidden by a centre crop", "22.0% on average, 43.8% at most"] in cells["pictures"]
    assert cells["parts"][1:] == [
        ["language_model", "6.739 B", "20.98 M", "bfloat16, float32", "4-bit", "224", "0.0002"],
        ["vision_tower", "12,345", "0", "bfloat16", "no", "0", "–"],
    ]
    assert cells["memory"][1:3] + cells["memory"][-1:] == [
        ["parameters", "4.00", ""],
        ["gradients", "0.50", ""],
        ["total", "8.00", ""],
    ]
    bars = [[rect.get(name) for name in ("x", "y", "width", "height")] for rect in root.iter("rect")]
    assert bars == [["0.0", "0.0", "160.0", "170.0"], ["320.0", "156.1", "80.0", "13.9"]]
    assert [title.text for title in root.findall(".//rect/title")] == [
        "0 to 999 tokens: 1,100 rows",
        "2,000 to 2,499 tokens: 90 rows",
    ]
    assert root.find(".//line[@class='limit']").get("x1") == "327.7"


def test_the_page_shows_what_the_model_learns(tmp_path):
    report = make_report()
    _, root = write(tmp_path, report)
    row, other = root.findall(".//article[@class='sample']")
    assert text_of(row.find("div")) == "Row 17 id a picture-unreadable 1,631 tokens, 22 trained"
    assert text_of(other.find("div")) == "Row 18 shortened 4 tokens, 0 trained"
    assert [link.get("href") for link in row.iter("a")] == ["#finding-1"] and not other.findall(".//a")
    spans = row.find(".//div[@class='text']")
    assert [(span.tag, span.get("title"), "".join(span.itertext())) for span in spans] == [
        ("span", "prompt, 4 tokens", "<s>USER: "),
        ("b", "image, 1576 tokens", "<image> ×1,576"),
        ("span", "prompt, 29 tokens", "\nWhich?\n ASSISTANT:"),
        ("mark", "trained, 22 tokens", " Nine.\nYes.</s>"),
    ]
    assert not (spans.text or "").strip("\n") and not any(span.tail for span in spans)
    assert [token.text for token in spans.iter("kbd")] == ["<s>", "</s>"]
    assert len(spans.findall(".//i[@class='newline']")) == 3
    assert [bar.get("style") for bar in row.find("div[@class='stack']")] == [
        f"flex: {tokens} 1 0" for tokens in (4, 1576, 29, 22)
    ]
    assert not root.findall(".//label[@class='more']")
    report["samples"][1]["spans"] = [{"kind": "prompt", "text": "word " * 201, "tokens": 402}]
    _, root = write(tmp_path, report)
    assert [text_of(label) for label in root.findall(".//label[@class='more']")] == ["show all of row 18"]


def test_what_a_report_lacks_is_left_out(tmp_path):
    report = make_report(**EMPTY)
    report["data"]["eval_path"] = report["model"]["class"] = None
    html, root = write(tmp_path, report)
    assert [section.get("id") for section in root.iter("section")] == ["findings"]
    assert [link.get("href") for link in root.find(".//nav").iter("a")] == ["#findings"]
    assert root.find(".//p[@class='verdict none']").text == "no findings"
    assert "held out" not in html and "None" not in html
    assert show(make_report(**EMPTY)) == "no findings\n"

    report = make_report()
    report["lengths"] |= {"padding": {}, "max_length": None, "exact": False}
    report["labels"]["bos_token"] = report["pictures"]["hidden_by_crop"] = None
    report["memory"] |= {"optimizer": None, "total": None}
    _, root = write(tmp_path, report)
    assert not root.findall(".//line[@class='limit']")
    rows = [[text_of(cell) for cell in row] for row in root.iter("tr")]
    assert ["rows counted", "1,190, estimated: the collator's differ"] in rows and ["max_length", "none"] in rows
    assert ["BOS token", "none"] in rows and ["hidden by a centre crop", "none"] in rows
    assert ["optimizer", "unknown", ""] in rows and ["total", "unknown", ""] in rows
    assert "batches of 16" not in text_of(root)


def test_colours_can_be_read_in_light_and_dark():
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for what else must be told apart from the ground."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    themes = [dict(re.findall(r"--(\w+): (#\w+);", rules)) for rules in re.findall(r":root {([^}]*)}", TEMPLATE)]
    assert len(themes) == 2
    texts = [(name, "ground") for name in ("ink", "quiet", "line", "error", "warning", "good")]
    texts += [("ink", "mark"), ("ink", "chip")]
    for theme in themes:
        for least, pairs in ((4.5, texts), (3, [("prompt", "ground"), ("image", "ground"), ("good", "mark")])):
            for pair in pairs:
                dark, light = sorted(luminance(theme[name]) for name in pair)
                assert (light + 0.05) / (dark + 0.05) >= least, pair


def show(report, **options):
    file = io.StringIO()
    print_report(report, Console(file=file, width=80, **options))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def test_the_terminal_shows_findings_figures_and_a_verdict():
    shown = show(make_report())
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.startswith(
        "error     picture-unreadable, 1,057 found\n"
        + "found     train.json, row 17 (id 'a'): pictures/17.jpg is truncated\n" * 3
        + "          and 1,054 more\n"
        "expected  a picture that can be decoded\n"
        "remedy    Repair it.\n\n"
        "warning   centre-crop, 1 found\n"
        "found     train.json: 22% cut off\n"
    )
    for piece in (
        "\nLabels\ntokens   share\ntrained   8.1%\nprompt   18.9%\nimage    61.2%\npadding  11.8%\n",
        "\ntrained turns that end in </s>  411 of 411\n",
        "\nrows prompted as at inference   254 of 256: 2 not\n",
        "\ntokens of a row  p50    p95    p99    max\nall              700  1,323  1,575  2,400\n",
        "\nrows left out    3\n",
        "\nmodality and length grouped     2.2%\n",
        "\npictures                 1,300 in 1,200 files\n",
        "\nlanguage_model    6.739 B   20.98 M bfloat16, float32     4-bit      224 0.0002\n",
        "\ntotal                  8.00\n",
    ):
        assert piece in shown, piece
    assert shown.endswith("\n1 error, 1 warning, 1 note: training would stop or train something else\n")
    assert "\x1b[1;31merror" in show(make_report(), force_terminal=True, color_system="standard")

    findings = make_report()["findings"]
    assert show(make_report(findings=findings[1:])).endswith(
        "1 warning, 1 note: training would run, likely not as meant\n"
    )
    assert show(make_report(findings=findings[2:])).endswith("1 note: nothing to mend\n")


def test_the_terminal_takes_no_text_for_markup():
    shown = show(make_report("[bold]x[/bold] :smile: [/]"))
    assert "\nfound     [bold]x[/bold] :smile: [/], row 17 (id '[bold]x[/bold] :smile: [/]'):\n" in shown
    assert "trained turns that end in [bold]x[/bold] :smile: [/]  411 of 411" in shown
