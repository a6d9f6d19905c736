"""The quickstart's report: one HTML file that needs nothing outside itself.

A file of its own because it is text and drawing, not training: the quickstart stays a pipeline one reads at a glance.
"""

import base64
import json
import re
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.table import Column, Table

WIDTH, HEIGHT = 400, 160  # of a chart's plotting area, in SVG units
ONE_PICTURE, SEVERAL_PICTURES = "Held-out questions on one picture", "Held-out questions on two pictures, and tables"
FOOTNOTES = {
    ONE_PICTURE: (
        "Exact match. Always the likeliest answer would score 10, 50, 10 and 60 % in the first four rows. Stage 1's "
        "template shows the model the picture alone, so there it can be asked no second question."
    ),
    SEVERAL_PICTURES: (
        "Exact match; of tables also the share of cells with the right digit, where 10 % would be chance. Always the "
        "likeliest answer would score 50 % for which is larger and 13 % for sums. Stage 2 saw no such question, its "
        "language model knew them from texts alone, and its template puts the pictures ahead of the words."
    ),
}
# Well-formed XML too, so that a test can parse it; colours follow the reader's light or dark setting.
TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>LLaVA quickstart</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1d21; --quiet: #5c6068; --rule: #d5d8de; --line: #1f5fbf;
  --good: #17703a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181d; --ink: #e8eaee; --quiet: #a2a8b3; --rule: #3a3f4a;
  --line: #7fb0ff; --good: #6fd196; --bad: #ff8f85; } }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
.quiet, figcaption, dt { color: var(--quiet); }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; font-weight: normal; }
td, thead th { text-align: right; font-variant-numeric: tabular-nums; }
.all > * { font-weight: bold; }
.charts, .examples { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; }
svg { width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--quiet); font-size: 15px; }
.grid { stroke: var(--rule); }
.loss { fill: none; stroke: var(--line); stroke-width: 2; }
.example { display: flex; gap: 1rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
.pictures { display: flex; flex-direction: column; gap: .4rem; flex: none; }
.example img { width: 6rem; height: 6rem; image-rendering: pixelated; border: 1px solid var(--rule); }
.example p { margin: 0 0 .3rem; font-weight: bold; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .7rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.table { overflow-x: auto; overflow-wrap: normal; white-space: pre; font: .85rem/1.3 ui-monospace, monospace; }
.right { color: var(--good); }
.wrong { color: var(--bad); }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--rule); }
@media (max-width: 30rem) { th, td { padding-right: .4rem; font-size: .9rem; } }
</style>
</head>
<body>
<h1>LLaVA quickstart</h1>
{% for line in findings %}<p>{{ line }}</p>
{% endfor %}
{% for section in sections %}<h2>{{ section.name }}</h2>
<table>
<thead><tr>{% for name in section.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.table %}<tr{% if row[0] == 'all' %} class="all"{% endif %}><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
<p class="quiet">{{ section.footnote }}</p>
{% endfor %}<h2>Training loss</h2>
<div class="charts">
{% for chart in charts %}<figure>
<svg viewBox="-50 -10 460 200" role="img" aria-label="{{ chart.name }}: training loss by step">
{% for place, label in chart.levels %}<line class="grid" x1="0" x2="{{ width }}" y1="{{ place }}" y2="{{ place }}"/>
<text x="-6" y="{{ place + 5 }}" text-anchor="end">{{ label }}</text>
{% endfor %}<polyline class="loss" points="{{ chart.points }}"/>
<text x="0" y="{{ height + 22 }}">step {{ chart.first }}</text>
<text x="{{ width }}" y="{{ height + 22 }}" text-anchor="end">{{ chart.last }}</text>
</svg>
<figcaption>{{ chart.caption }}</figcaption>
</figure>
{% endfor %}</div>
<h2>Held-out pictures</h2>
<p class="quiet">Taken at even distances from the lists of questions, not chosen by their answers.</p>
{% for section in sections %}<h3>{{ section.name }}</h3>
<div class="examples">
{% for example in section.examples %}<div class="example">
<div class="pictures">{% for picture in example.pictures %}
<img src="data:image/png;base64,{{ picture.png }}" alt="{{ picture.name }}"/>
{% endfor %}</div>
<div>
<p>{{ example.question }}</p>
<dl>{% for answer in example.answers %}<dt>{{ answer.name }}</dt>
<dd class="{{ 'right' if answer.right else 'wrong' }}{{ ' table' if answer.table }}">
{{- answer.text }}{{ ' ✓' if answer.right }}</dd>
{% endfor %}<dt>reference</dt>
<dd{% if example.table %} class="table"{% endif %}>{{ example.reference }}</dd></dl>
</div>
</div>
{% endfor %}</div>
{% endfor %}<h2>Next</h2>
<pre>{{ next_command }}</pre>
</body>
</html>
"""


def read_answers(path: Path) -> list[dict]:
    """The records that `evaluate.py` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rate_kinds(answers: dict[str, list[dict]]) -> list[list[str]]:
    """Exact match for each kind of question (`source`) and over all of them, a row each; of tables `rate_cells` too.

    Args:
        answers: Checkpoint → its records; the first checkpoint's say which kinds there are.

    Returns:
        Rows of a name, the number of questions, and the share for each checkpoint ("–" where nothing was asked). A
        row of cells counts cells.
    """
    first, *_ = answers.values()
    rows = []
    for kind in [*dict.fromkeys(record["source"] for record in first), None]:
        asked = [[r for r in records if kind in (None, r["source"])] for records in answers.values()]
        shares = [_share(record["exact_match"] for record in records) for records in asked]
        rows.append(["all" if kind is None else kind.replace("_", " "), str(len(asked[0])), *shares])
        if asked[0][0]["reference"].startswith("|") and kind:
            cells = [[hit for r in records for hit in rate_cells(r["answer"], r["reference"])] for records in asked]
            rows.append([f"{rows[-1][0]}, cells", str(len(cells[0])), *map(_share, cells)])
    return rows


def rate_cells(answer: str, reference: str) -> list[bool]:
    """Compare two Markdown tables cell by cell, each with the one at its place, the headers among them.

    Returns:
        Whether they agree, for every place that a cell of either table has: a missing row is as many wrong cells as it
        should have, a row too many as many as it has. An answer that is no Markdown table has no cells.
    """
    pairs = zip_longest(_read_cells(answer), _read_cells(reference), fillvalue=[])
    return [given == wanted for rows in pairs for given, wanted in zip_longest(*rows)]


def _read_cells(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines()]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if re.fullmatch(r"\|.*\|", line)]
    ruled = len(rows) > 1 and len(rows[0]) == len(rows[1]) and all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
    return [rows[0], *rows[2:]] if ruled and len(rows) == len(lines) else []


def make_tables(answers: dict[str, dict[str, list[dict]]]) -> list[Table]:
    """`rate_kinds` for a terminal: a table for each of `FOOTNOTES` in `answers`."""
    tables = []
    for name, checkpoints in answers.items():
        tables.append(Table(Column("", no_wrap=True), "number", *checkpoints, title=name, caption=FOOTNOTES[name]))
        for row in rate_kinds(checkpoints):
            tables[-1].add_row(*row)
    return tables


def rate_merging(adapter: list[dict], merged: list[dict]) -> str:
    """Say to how many of the same questions both gave the same answer."""
    same = [one["answer"] == other["answer"] for one, other in zip(adapter, merged, strict=True)]
    return f"The merged checkpoint gives the adapter's answer to {sum(same)} of {len(same)} questions."


def rate_titles(records: list[dict], rows: Path) -> str:
    """Say which share of the pictures gets a title whatever is asked, and which share gets its own.

    Args:
        records: Answers to several questions a picture.
        rows: The LLaVA JSON file with the title of each picture.
    """
    titles = {
        Path(row["image"]).name: row["conversations"][1]["value"]
        for row in json.loads(rows.read_text(encoding="utf-8"))
    }
    answers = {}
    for record in records:
        answers.setdefault(Path(record["images"][0]).name, set()).add(record["answer"])
    titled = _share(texts <= set(titles.values()) for texts in answers.values())
    named = _share(texts == {titles[name]} for name, texts in answers.items())
    return (
        f"After stage 1 {titled} of the {len(answers)} held-out pictures get a title, whatever is asked; "
        f"for {named} it names the right digit."
    )


def write_report(
    path: Path,
    answers: dict[str, dict[str, list[dict]]],
    findings: list[str],
    stages: dict[str, Path],
    next_command: str,
) -> None:
    """Write the report; every text is escaped.

    Args:
        path: The HTML file.
        answers: One of `FOOTNOTES` → checkpoint → the records that `evaluate.py` wrote of it, about the same questions
            in the same order; a checkpoint may have been asked the first ones only. A dozen of those that all were
            asked become examples.
        findings: Paragraphs for the head of the page.
        stages: Name of a training run → its output folder, which holds `trainer_state.json`.
        next_command: What to type next.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    html = environment.from_string(TEMPLATE).render(
        findings=findings,
        sections=[_make_section(name, checkpoints) for name, checkpoints in answers.items()],
        charts=[_make_chart(name, folder) for name, folder in stages.items()],
        next_command=next_command,
        width=WIDTH,
        height=HEIGHT,
    )
    path.write_text(html, encoding="utf-8")


def _share(hits: Iterable[bool]) -> str:
    hits = list(hits)
    return f"{sum(hits) / len(hits):.1%}" if hits else "–"


def _make_chart(name: str, folder: Path) -> dict:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in history if "loss" in entry), strict=True)
    top, span = max(losses) or 1.0, max(steps[-1] - steps[0], 1)
    points = (
        f"{WIDTH * (step - steps[0]) / span:.1f},{HEIGHT * (1 - loss / top):.1f}"
        for step, loss in zip(steps, losses, strict=True)
    )
    return {
        "name": name,
        "points": " ".join(points),
        "levels": [(HEIGHT * (1 - share), f"{top * share:.2f}") for share in (0, 0.5, 1)],
        "first": steps[0],
        "last": steps[-1],
        "caption": f"{name}: {losses[0]:.3f} at step {steps[0]}, {losses[-1]:.3f} at step {steps[-1]}",
    }


def _make_section(name: str, answers: dict[str, list[dict]]) -> dict:
    asked = list(zip(*answers.values(), strict=False))
    # One question further in each stride, so that all kinds come up although they follow in turn.
    places = {place for number in range(12) if (place := number * (len(asked) // 12) + number % 4) < len(asked)}
    return {
        "name": name,
        "header": ["", "number", *answers],
        "table": rate_kinds(answers),
        "footnote": FOOTNOTES[name],
        "examples": [_make_example(list(answers), asked[place]) for place in sorted(places)],
    }


def _make_example(names: list[str], records: tuple[dict, ...]) -> dict:
    pictures = [Path(image) for image in records[0]["images"]]
    return {
        "pictures": [
            {"png": base64.b64encode(path.read_bytes()).decode("ascii"), "name": path.stem.replace("_", " ")}
            for path in pictures
        ],
        "question": records[-1]["question"],  # the last checkpoint's template leaves each <image> in its place
        "reference": records[0]["reference"],
        "table": records[0]["reference"].startswith("|"),
        "answers": [
            {
                "name": name,
                "text": record["answer"] or "(nothing)",
                "right": record["exact_match"],
                "table": record["answer"].startswith("|"),
            }
            for name, record in zip(names, records, strict=True)
        ],
    }
