"""The doctor's report for a terminal, and as one HTML page that needs nothing outside itself.

A file of its own because it is text and drawing, not checking. docs/doctor.md has the report's keys.
"""

import re
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from _parts import shorten_count

LEVELS = {"error": "bold red", "warning": "bold yellow", "note": "dim"}
EXAMPLES = 3  # of a finding, in a terminal
WIDTH, HEIGHT = 400, 170  # of the histogram's plotting area, in SVG units
LONG = 1000  # characters, a line break counted as 60, from which the page folds a row
# Shown as symbols: they would drive a terminal, and XML has no way to hold them.
UNSHOWABLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
UNSHOWABLE |= {127: 0x2421, **dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)}
# Well-formed XML too, so that a test can parse it; without a script, so that the policy can forbid all of them.
TEMPLATE = """<!DOCTYPE html>
<html lang="en">
{%- macro draw(name, table) %}
{% if table.form == "stack" %}<div>
<div class="stack" aria-hidden="true">{% for kind, share in table.shares.items() if share %}
<i class="{{ kind }}" style="flex: {{ "%.4f"|format(share) }} 1 0"></i>{% endfor %}</div>
<ul class="legend" aria-label="Shares of the tokens">{% for kind, share in table.rows %}
<li><b class="swatch {{ kind }}"></b>{{ kind }} <strong>{{ share }}</strong></li>{% endfor %}</ul>
</div>
{% else %}<div class="scroll {{ table.form }}"
{%- if table.header|length > 5 %} role="region" tabindex="0" aria-label="Table of {{ name }}"{% endif %}><table>
{% if table.header %}<thead><tr>{% for cell in table.header %}<th scope="col">{{ cell }}</th>{% endfor %}
{%- if table.form == "gauge" %}<td></td>{% endif %}</tr></thead>
{% endif %}<tbody>
{% for row in table.rows %}<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}{% if table.form == "gauge" %}
<td><i style="width: {{ "%.1f"|format(100 * table.shares[row[0]]) }}%"></i></td>{% endif %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}{% endmacro %}
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>Doctor: {{ data.path }}</title>
<style>
:root { color-scheme: light dark; --ground: #fff; --raised: #f1f2f5; --ink: #1c1d21; --quiet: #5c6068; --rule: #d5d8de;
  --line: #1f5fbf; --good: #17703a; --error: #b3261e; --warning: #8a5200; --mark: #d3f2dc; --prompt: #7d8593;
  --image: #6480d8; --chip: #e3e8fb; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181d; --raised: #262a33; --ink: #e8eaee; --quiet: #a2a8b3;
  --rule: #3a3f4a; --line: #7fb0ff; --good: #6fd196; --error: #ff8f85; --warning: #f0b45c; --mark: #123f27;
  --prompt: #8d94a1; --image: #7f97e8; --chip: #2b3358; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 1.25rem 3rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, p, ul, dl, dd, figure, fieldset { margin: 0; padding: 0; border: 0; list-style: none; }
h1 { font-size: 1.9rem; line-height: 1.25; }
h2 { font-size: 1.4rem; line-height: 1.25; margin-bottom: 1rem; }
h3, h3 code { font-size: 1rem; }
code, .text, .chip { font-family: ui-monospace, monospace; font-size: .9rem; }
.quiet, dt, thead th, li span { color: var(--quiet); }
dt, thead th, figcaption, li span { font-size: .85rem; }
a { color: var(--line); }
:focus-visible { outline: 2px solid var(--line); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; z-index: 2; padding: .5rem 1rem; background: var(--ground); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
header { padding-top: 2rem; }
.settings { display: grid; gap: .75rem 1.5rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.wide { grid-column: span 2; }
nav { position: sticky; top: 0; z-index: 1; background: var(--ground); border-bottom: 1px solid var(--rule); }
nav ul, .head, .bar, .filter, .legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; align-items: baseline; }
nav a { display: block; padding: .65rem 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding-top: 2.75rem; }
section, article { scroll-margin-top: 3.5rem; }
article { border: 1px solid var(--rule); border-radius: .5rem; padding: 1rem 1.25rem; margin-top: 1rem; }
.bar { justify-content: space-between; }
.verdict { font-size: 1.15rem; }
.verdict, .level { font-weight: bold; color: var(--level); }
.finding { border-left: .3rem solid var(--level); }
.finding:target { outline: 2px solid var(--line); }
.error { --level: var(--error); }
.warning { --level: var(--warning); }
.note { --level: var(--quiet); }
.none { --level: var(--good); }
{% for level in counts %}
section:has(#show-{{ level }}:not(:checked)) .finding.{{ level }}:not(:target) { display: none; }
{%- endfor %}
.columns { display: grid; gap: 1.5rem 3.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
article .columns { gap: .75rem 2.5rem; margin-top: .5rem; grid-template-columns: 2fr 1fr; }
dd + dt { margin-top: .5rem; }
p + .legend { margin-top: .4rem; }
.stack { display: flex; gap: 2px; height: 2.25rem; margin-bottom: .6rem; }
.sample .stack { height: .5rem; margin: .75rem 0; gap: 1px; }
.stack i { min-width: 3px; }
.stack i, .swatch { background: var(--kind); border-radius: 2px; forced-color-adjust: none; }
.swatch { display: inline-block; width: .85rem; height: .85rem; margin-right: .5rem; }
.trained { --kind: var(--good); }
.prompt { --kind: var(--prompt); }
.image { --kind: var(--image); }
.padding { --kind: repeating-linear-gradient(135deg, var(--quiet) 0 2px, var(--raised) 2px 6px); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: left; font-weight: normal;
  overflow-wrap: normal; vertical-align: baseline; }
:is(th, td):last-child { padding-right: 0; }
:is(.grid, .gauge) :is(td, th + th) { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.facts th { width: 50%; }
.gauge td:nth-child(3) { width: 65%; vertical-align: middle; }
.gauge i { display: block; height: .7rem; background: var(--image); border-radius: 2px; forced-color-adjust: none; }
.scroll.gauge, .columns > :only-child { grid-column: 1 / -1; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; overflow: visible; grid-row: span 2; }
svg text { fill: var(--quiet); font-size: 13px; }
rect { fill: var(--image); stroke: var(--ground); stroke-width: .5; }
.axis { stroke: var(--rule); }
.limit { stroke: var(--error); stroke-width: 2; stroke-dasharray: 5 3; }
.head > :last-child { margin-left: auto; }
.body { display: flex; gap: 1.25rem; }
.pictures { display: flex; flex: none; flex-wrap: wrap; gap: .75rem; max-width: 20.75rem; color: var(--quiet); }
figure { width: 10rem; }
img { display: block; max-width: 100%; min-width: 4rem; max-height: 14rem; border: 1px solid var(--rule);
  border-radius: .25rem; }
.text { flex: 1; min-width: 0; white-space: pre-wrap; unicode-bidi: plaintext; color: var(--quiet); line-height: 1.7; }
.text > * { unicode-bidi: isolate; }
mark { background: var(--mark); color: var(--ink); padding: .1em 0; border-radius: 2px; box-decoration-break: clone;
  text-decoration: underline 2px var(--good); text-underline-offset: .25em; }
kbd { font: inherit; border: 1px solid currentColor; border-radius: .25rem; padding: 0 .15em; }
.chip { background: var(--chip); color: var(--ink); border-radius: 1rem; padding: .1em .65em; white-space: nowrap;
  font-weight: normal; }
.newline::before { content: "↵"; }
.more { display: block; text-align: right; }
.sample:has(.more :not(:checked)) .text { max-height: 20rem; overflow: hidden;
  mask-image: linear-gradient(#000 75%, transparent); }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
@media (max-width: 40rem) { body { padding: 0 1rem 2rem; } h1 { font-size: 1.5rem; } nav { position: static; }
  article { padding: .8rem .9rem; } article .columns { grid-template-columns: 1fr; } .body { flex-direction: column; }
  figure { width: 8rem; } .head > :last-child { margin-left: 0; }
  th, td { padding-right: .9rem; font-size: .92rem; } .gauge td:nth-child(3) { width: 40%; } }
@media print { nav, .skip, .filter, .more { display: none; } * { print-color-adjust: exact; }
  .sample:has(.more) .text { max-height: none !important; mask-image: none !important; }
  .finding, tr, svg, figure { break-inside: avoid; } h2, .head { break-after: avoid; } }
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the findings</a>
<header>
<p class="quiet">What this data would train</p>
<h1>{{ data.path }}</h1>
<dl class="settings">
<div class="wide"><dt>model</dt><dd>{{ model.name }}{% if model.class %} ({{ model.class }}){% endif %}</dd></div>
<div><dt>rows usable</dt><dd>{{ "{:,} of {:,}".format(data.usable, data.rows) }}</dd></div>
{% if data.eval_path is not none %}<div class="wide"><dt>held out</dt><dd>{{ data.eval_path }}</dd></div>
{% endif %}{% for name, value in settings.items() %}<div><dt>{{ name }}</dt>
<dd>{% if value is number %}{{ "{:,}".format(value) }}{% else %}{{ value or "none" }}{% endif %}</dd></div>
{% endfor %}</dl>
</header>
<nav aria-label="Sections"><ul>
<li><a href="#findings">Findings</a></li>
{% for name in tables %}<li><a href="#{{ name }}">{{ name.capitalize() }}</a></li>
{% endfor %}{% if samples %}<li><a href="#samples">What the model learns</a></li>{% endif %}
</ul></nav>
<main id="main" tabindex="-1">
<section id="findings">
<h2>Findings</h2>
<div class="bar"><p class="verdict {{ findings[0].level if findings else "none" }}">{{ verdict }}</p>
{% if findings %}<fieldset class="filter"><legend class="hidden">Levels to show</legend>
{% for level, count in counts.items() %}<label><input type="checkbox" id="show-{{ level }}" checked="checked"
  autocomplete="off"/> {{ level }}s ({{ count }})</label>
{% endfor %}</fieldset>{% endif %}
</div>
{% for finding in findings %}<article class="finding {{ finding.level }}" id="finding-{{ loop.index }}">
<div class="head"><span class="level">{{ finding.level }}</span> <h3><code>{{ finding.code }}</code></h3>
<span class="quiet">{{ "{:,}".format(finding.count) }} found</span></div>
<div class="columns">
<ul>{% for example in finding.examples %}
<li><span>{{ where(example) }}:</span> {{ example.found }}</li>{% endfor %}
{% if finding.count > finding.examples|length -%}
<li><span>and {{ "{:,}".format(finding.count - finding.examples|length) }} more</span></li>
{% endif %}</ul>
<dl><dt>expected</dt> <dd>{{ finding.expected }}</dd> <dt>remedy</dt> <dd>{{ finding.remedy }}</dd></dl>
</div></article>
{% endfor %}</section>
{% for name, drawn in tables.items() %}<section id="{{ name }}">
<h2>{{ name.capitalize() }}</h2>
<div class="columns">{% if name == "lengths" %}
<svg viewBox="-45 -30 450 225" role="img" aria-label="Histogram: rows by their number of tokens">
{% for x, y, w, h, title in chart.bars %}<rect x="{{ x }}" y="{{ y }}" width="{{ w }}" height="{{ h }}">
<title>{{ title }}</title></rect>
{% endfor %}{% for place, label in chart.levels %}
<line class="axis" x1="0" x2="{{ width }}" y1="{{ place }}" y2="{{ place }}"/>
<text x="-6" y="{{ place + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}{% for x, anchor, label in chart.limits %}
<line class="limit" x1="{{ x }}" x2="{{ x }}" y1="-8" y2="{{ height }}"/>
<text x="{{ x }}" y="-14" text-anchor="{{ anchor }}">{{ label }}</text>
{% endfor %}<text x="0" y="{{ height + 20 }}">{{ chart.first }}</text>
<text x="{{ width / 2 }}" y="{{ height + 20 }}" text-anchor="middle">tokens of a row</text>
<text x="{{ width }}" y="{{ height + 20 }}" text-anchor="end">{{ chart.last }}</text>
</svg>{% endif %}
{% for table in drawn %}{{ draw(name, table) }}{% endfor %}</div>
</section>
{% endfor %}{% if samples %}<section id="samples">
<h2>What the model learns</h2>
<p class="quiet">{{ samples|length }} of the rows that went through the collator.</p>
<ul class="legend"><li><mark>trained</mark> carries loss</li><li>all else is read only:</li>
<li><code class="quiet">prompt</code></li><li><b class="chip">{{ "<image>" }} ×576</b> tokens of a picture</li>
<li><kbd>token</kbd> BOS or stop token</li></ul>
{% for sample in samples %}<article class="sample">
<div class="head"><h3>Row {{ sample.row }}</h3>
{% if sample.id is not none %}<span>id <code>{{ sample.id }}</code></span>{% endif %}
{% for code in sample.codes %}{% if code in places %}<a href="#finding-{{ places[code] }}">{{ code }}</a>
{% else %}<span>{{ code }}</span>{% endif %}
{% endfor %}<span class="quiet">{{ "{:,} tokens, {:,} trained".format(sample.tokens, sample.trained) }}</span></div>
<div class="stack" aria-hidden="true">{% for span in sample.spans %}
<i class="{{ span.kind }}" style="flex: {{ "%d"|format(span.tokens) }} 1 0"></i>{% endfor %}</div>
<div class="body">{% if sample.pictures %}<div class="pictures">{% for picture in sample.pictures %}
<figure><img src="data:image/jpeg;base64,{{ picture.jpeg }}" alt="{{ picture.name }}"/>
<figcaption>{{ picture.name }}, {{ picture.width }} × {{ picture.height }}</figcaption></figure>{% endfor %}
</div>{% endif %}
<div class="text">
{%- for span in sample.spans -%}
<{{ span.tag }} class="{{ span.style }}" title="{{ span.kind }}, {{ span.tokens }} tokens">
{%- for piece in span.pieces -%}
{% if loop.index is odd %}{{ piece }}{% elif piece == "\\n" %}<i class="newline"></i>{{ piece }}
{%- else %}<kbd>{{ piece }}</kbd>{% endif %}
{%- endfor %}</{{ span.tag }}>{% endfor -%}
</div></div>
{% if sample.is_long %}<label class="more"><input type="checkbox" autocomplete="off"/> show all of row {{ sample.row }}
</label>{% endif %}
</article>
{% endfor %}</section>
{% endif %}</main>
<footer class="quiet">This file holds rows and pictures of the data: share it as you would share them.</footer>
</body>
</html>
"""


def print_report(report: dict, console: Console) -> None:
    """Print the findings, the figures and, last, the verdict.

    Args:
        report: As docs/doctor.md has it; no text of it is taken for markup.
        console: Where to.
    """
    report = _clean(report)
    for finding in report["findings"]:
        style, examples = LEVELS[finding["level"]], finding["examples"][:EXAMPLES]
        rows = [("found", f"{_where(example)}: {example['found']}") for example in examples]
        if finding["count"] > len(examples):
            rows.append(("", f"and {finding['count'] - len(examples):,} more"))
        rows += [("expected", finding["expected"]), ("remedy", finding["remedy"])]
        title = Text(f"{finding['code']}, {finding['count']:,} found", style)
        level = Column(Text(finding["level"], style), width=8, style="dim")
        texts = Column(title, overflow="fold", style="dim" if finding["level"] == "note" else "")
        _print_rows(console, [level, texts], rows)
    for section, grids in _make_tables(report).items():
        console.print(Text(section.capitalize(), "bold"))
        for grid in grids:
            first, *others = map(Text, grid["header"] or grid["rows"][0])
            side = "right" if grid["header"] else "left"
            columns = [Column(first, no_wrap=True), *(Column(name, justify=side, overflow="fold") for name in others)]
            _print_rows(console, columns, grid["rows"], show_header=bool(grid["header"]), header_style="dim")
    counts = _count_levels(report["findings"])
    console.print(Text(_word_verdict(counts), LEVELS[next(iter(counts))] if counts else "bold green"))


def _print_rows(console: Console, columns: list[Column], rows: list[tuple], **options) -> None:
    gap = 2 if len(columns) < 6 else 1  # the parts' seven columns fit into the 80 that rich assumes of a log file
    table = Table(*columns, box=None, pad_edge=False, padding=(0, gap, 0, 0), **options)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table, Text())


def write_page(report: dict, path: Path) -> None:
    """Write the page; every text is escaped.

    Args:
        report: As docs/doctor.md has it.
        path: The HTML file.

    Raises:
        ValueError: The thumbnail of a sample is not base64.
    """
    report = _clean(report)
    findings, labels, lengths = report["findings"], report["labels"], report["lengths"]
    counts = _count_levels(findings)
    tokens = [token for token in (*labels["stop_tokens"], labels["bos_token"]) if token] if labels else []
    marked = re.compile("(" + "|".join(map(re.escape, ["\n", *tokens])) + ")")
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    html = page.render(
        {name: report[name] for name in ("data", "model", "settings", "findings")},
        verdict=_word_verdict(counts),
        counts=counts,
        where=_where,
        tables=_make_tables(report),
        chart=lengths and _make_chart(lengths),
        samples=[_make_sample(sample, marked) for sample in report["samples"]],
        places={finding["code"]: number for number, finding in reversed([*enumerate(findings, 1)])},
        width=WIDTH,
        height=HEIGHT,
    )
    path.write_text(html, encoding="utf-8")


def _clean(value: object) -> object:
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value.translate(UNSHOWABLE) if isinstance(value, str) else value


def _count_levels(findings: list[dict]) -> dict[str, int]:
    levels = [finding["level"] for finding in findings]
    return {level: levels.count(level) for level in LEVELS if level in levels}


def _word_verdict(counts: dict[str, int]) -> str:
    text = ", ".join(f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items())
    if "error" in counts:
        return f"{text}: training would stop or train something else"
    if "warning" in counts:
        return f"{text}: training would run, likely not as meant"
    return f"{text}: nothing to mend" if text else "no findings"


def _where(example: dict) -> str:
    row = "" if example["row"] is None else f", row {example['row']}"
    return example["file"] + row + ("" if example["id"] is None else f" (id {example['id']!r})")


def _make_tables(report: dict) -> dict[str, list[dict]]:
    """Section -> its tables of texts, for terminal and page alike; `shares` are drawn as bars."""
    makers = {
        "labels": _tell_labels,
        "lengths": _tell_lengths,
        "pictures": _tell_pictures,
        "parts": _tell_parts,
        "memory": _tell_memory,
    }
    return {name: make(report[name]) for name, make in makers.items() if report[name] is not None}


def _table(form: str, header: list[str], rows: list[tuple], shares: dict[str, float] | None = None) -> dict:
    return {"form": form, "header": header, "rows": rows, "shares": shares}


def _tell_shares(form: str, header: list[str], shares: dict[str, float]) -> dict:
    return _table(form, header, [(name, f"{share:.1%}") for name, share in shares.items()], shares)


def _tell_percentiles(name: str, kinds: dict[str, dict]) -> dict:
    rows = [(kind, *(f"{value:,}" for value in values.values())) for kind, values in kinds.items()]
    return _table("grid", [name, *next(iter(kinds.values()))], rows)


def _tell_labels(labels: dict) -> list[dict]:
    shares = {**{kind: labels[kind] for kind in ("trained", "prompt", "image")}, "padding": labels["pad"]}
    stops, bos, rows = " or ".join(labels["stop_tokens"]), labels["bos_token"], labels["rows"]
    facts = [
        ("rows through the collator", f"{rows:,}"),
        ("their tokens", f"{labels['tokens']:,}"),
        (f"trained turns that end in {stops}", _tell_part(labels["turns_with_stop"], labels["turns"])),
        (f"rows that begin with {bos}", _tell_part(labels["rows_with_bos"], rows)) if bos else ("BOS token", "none"),
        ("rows without trained tokens", f"{labels['rows_without_trained']:,}"),
        ("rows prompted as at inference", _tell_part(labels["rows_equal_to_inference"], rows)),
    ]
    return [_tell_shares("stack", ["tokens", "share"], shares), _table("facts", [], facts)]


def _tell_part(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}" + (f": {whole - part:,} not" if part < whole else "")


def _tell_lengths(lengths: dict) -> list[dict]:
    limit, estimated = lengths["max_length"], "" if lengths["exact"] else ", estimated: the collator's differ"
    facts = [
        ("rows counted", f"{lengths['rows']:,}{estimated}"),
        ("max_length", "none" if limit is None else f"{limit:,}"),
        ("rows kept whole", f"{lengths['kept']:,}"),
        ("rows shortened", f"{lengths['shortened']:,}"),
        ("rows left out", f"{lengths['left_out']:,}"),
    ]
    kinds = {"all": lengths["tokens"], "of texts": lengths["text_tokens"], "of pictures": lengths["image_tokens"]}
    tables = [_tell_percentiles("tokens of a row", kinds), _table("facts", [], facts)]
    if lengths["padding"]:
        tables.append(_tell_shares("gauge", [f"batches of {lengths['batch_size']}", "padding"], lengths["padding"]))
    return tables


def _tell_pictures(pictures: dict) -> list[dict]:
    hidden = pictures["hidden_by_crop"]
    hidden = f"{hidden['mean']:.1%} on average, {hidden['max']:.1%} at most" if hidden else "none"
    kinds = {kind: ", ".join(f"{n} {count:,}" for n, count in pictures[kind].items()) for kind in ("formats", "modes")}
    facts = [
        ("pictures", f"{pictures['pictures']:,} in {pictures['files']:,} files"),
        ("checked", pictures["checked"]),
        ("rows without a picture", f"{pictures['text_only_rows']:,}"),
        *kinds.items(),
        ("hidden by a centre crop", hidden),
    ]
    return [_table("facts", [], facts), _tell_percentiles("pixels", {s: pictures[s] for s in ("width", "height")})]


def _tell_parts(parts: list[dict]) -> list[dict]:
    rows = []
    for part in parts:
        counts = (shorten_count(part[kind]) for kind in ("parameters", "trainable"))
        rate = "–" if part["learning_rate"] is None else f"{part['learning_rate']:g}"
        rows.append((part["part"], *counts, part["dtype"], part["quantised"], f"{part['adapters']:,}", rate))
    header = ["part", "parameters", "trainable", "dtype", "quantised", "adapters", "rate"]
    return [_table("grid", header, rows)]


def _tell_memory(memory: dict) -> list[dict]:
    rows = [(item, "unknown" if size is None else f"{size / 2**30:.2f}") for item, size in memory.items()]
    whole = memory["total"] or sum(size or 0 for size in memory.values())
    shares = {item: (size or 0) / whole for item, size in memory.items()}
    return [_table("gauge", ["predicted, one device", "GiB"], rows, shares)]


def _make_chart(lengths: dict) -> dict:
    bins, limit = lengths["histogram"], lengths["max_length"]
    first, last, top = bins[0][0], bins[-1][1], max(rows for _, _, rows in bins)
    scale = WIDTH / (last - first)
    bars = []
    for low, high, rows in bins:
        if rows:
            place, height = scale * (low - first), max(HEIGHT * rows / top, 2)  # a single row is seen too
            sizes = (f"{size:.1f}" for size in (place, HEIGHT - height, scale * (high - low), height))
            bars.append((*sizes, f"{low:,} to {high - 1:,} tokens: {rows:,} rows"))
    limits = []
    if limit is not None and first <= limit <= last:
        place = scale * (limit - first)
        limits = [(f"{place:.1f}", "end" if place > WIDTH / 2 else "start", f"max_length {limit:,}")]
    levels = [(0, f"{top:,}"), (HEIGHT, "0")]
    return {"bars": bars, "levels": levels, "limits": limits, "first": f"{first:,}", "last": f"{last:,}"}


def _make_sample(sample: dict, marked: re.Pattern) -> dict:
    for picture in sample["pictures"]:
        if not re.fullmatch("[A-Za-z0-9+/]+={0,2}", picture["jpeg"]):
            found = f"row {sample['row']}, {picture['name']}: found {picture['jpeg'][:40]!r} as its thumbnail"
            raise ValueError(f"{found}, expected a JPEG in base64")
    spans = []
    for span in sample["spans"]:
        tag, style, pieces = "span", span["kind"], marked.split(span["text"])
        if span["kind"] == "image":
            tag, style, pieces = "b", "chip", [f"{span['text']} ×{span['tokens']:,}"]
        elif span["kind"] == "trained":
            tag = "mark"
        spans.append({**span, "tag": tag, "style": style, "pieces": pieces})
    size = sum(len(span["text"]) + 60 * span["text"].count("\n") for span in sample["spans"])
    return {**sample, "spans": spans, "is_long": size > LONG}
