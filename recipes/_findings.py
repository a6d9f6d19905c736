"""What the doctor and the pre-flight found, counted and with examples.

A file of its own: the checks of rows, pictures, labels and models all report here, and neither knows how it is shown.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

LEVELS = ("error", "warning", "note")
# Of a row that cannot be used at all, which --on_bad_row skip leaves out.
UNUSABLE = frozenset({"unusable-row", "picture-unreadable", "too-long", "too-many-pictures"})
EXAMPLES = 5  # kept of each kind


@dataclass(frozen=True)
class Place:
    """Where something was found: a row of a file, or the file or checkpoint as a whole."""

    file: str
    row: int | None = None
    id: object = None


@dataclass
class Findings:
    """Findings by level, code and what is expected.

    Attributes:
        skips_rows: a row that cannot be used will be skipped, so that an error of a row is a warning.
        rows: `(file, row)` -> the codes found there.
    """

    skips_rows: bool = False
    rows: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    _counts: Counter = field(default_factory=Counter)
    _examples: dict[tuple, list[dict]] = field(default_factory=lambda: defaultdict(list))

    def add(self, level: str, code: str, place: Place, found: str, expected: str, remedy: str) -> None:
        """Note one thing found.

        Args:
            level: one of `LEVELS`. An error stops a run or spoils what it trains; a warning is most likely not meant;
                a note says what is done about something unusual.
            code: kebab-case, stable: people filter by it.
            place: where.
            found: what, at this place.
            expected: what instead; the same words for all of the same kind.
            remedy: what to do.
        """
        if self.skips_rows and code in UNUSABLE and level == "error" and place.row is not None:
            level = "warning"
        kind = (LEVELS.index(level), code, expected, remedy.removesuffix("."))
        self._counts[kind] += 1
        if len(self._examples[kind]) < EXAMPLES:
            self._examples[kind].append({"file": place.file, "row": place.row, "id": place.id, "found": found})
        if place.row is not None:
            self.rows[place.file, place.row].add(code)

    def count(self, level: str) -> int:
        return sum(count for kind, count in self._counts.items() if LEVELS[kind[0]] == level)

    def to_list(self) -> list[dict]:
        """JSON-able, errors first, the most frequent of a level first."""
        order = sorted(self._counts.items(), key=lambda item: (item[0][0], -item[1], item[0]))
        return [
            {
                "level": LEVELS[level],
                "code": code,
                "count": count,
                "expected": expected,
                "remedy": f"{remedy}.",
                "examples": self._examples[level, code, expected, remedy],
            }
            for (level, code, expected, remedy), count in order
        ]

    def lines(self, level: str) -> list[str]:
        """For a log or an exception: a line each kind, with its first example."""
        lines = []
        for finding in self.to_list():
            if finding["level"] != level:
                continue
            example = finding["examples"][0]
            where = example["file"] + ("" if example["row"] is None else f", row {example['row']}")
            where += "" if example["id"] is None else f" (id {example['id']!r})"
            more = f" [{finding['count']} of this kind]" if finding["count"] > 1 else ""
            lines.append(
                f"{finding['code']}: {where}: found {example['found']}; expected {finding['expected']}. "
                f"{finding['remedy']}{more}"
            )
        return lines
