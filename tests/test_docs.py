"""Every command that a document prints parses with that recipe's own parser, and every path it names exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("recipes/*.py")]
)
DOCUMENTS += sorted(ROOT.glob("benchmarks/*.md"))
FOLDERS = ("recipes", "collators", "tests", "accelerate_configs", "benchmarks", "docs")


def commands_in(text: str) -> list[str]:
    """Command lines that run a recipe, continuation lines joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    start = re.compile(r"([A-Z0-9_]+=\S+ )*(srun )?(python|accelerate launch|torchrun)( .*)? ?recipes/\w+\.py")
    return [line for line in found if start.match(line)]


COMMANDS = [
    pytest.param(command, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, command in enumerate(commands_in(path.read_text(encoding="utf-8")))
]


def test_there_are_commands_and_documents():
    assert len(COMMANDS) >= 10
    assert {"README.md", "data_format.md", "sft_full.py"} <= {path.name for path in DOCUMENTS}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_parses(command):
    words = shlex.split(command, comments=True)
    place = next(index for index, word in enumerate(words) if word.startswith("recipes/"))
    assert (ROOT / words[place]).exists()
    parser = importlib.import_module(Path(words[place]).stem).make_parser()
    arguments = words[place + 1 :]
    if "--config" in arguments:
        index = arguments.index("--config")
        values = yaml.safe_load((ROOT / arguments[index + 1]).read_text(encoding="utf-8"))
        if hasattr(parser, "set_defaults_with_config"):  # else the file is no list of flags
            assert parser.set_defaults_with_config(**values) == []
            del arguments[index : index + 2]
    _, unknown = parser.parse_known_args(arguments)
    assert unknown == []


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_named_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    folders = "|".join(FOLDERS)
    named = set(re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", text))
    named |= {(path.parent / link).relative_to(ROOT).as_posix() for link in re.findall(r"\]\(([\w./-]+)\)", text)}
    missing = sorted(name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}.*")))
    assert missing == []


RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py") if not path.name.startswith("_"))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "recipes" / "README.md"], ids=lambda path: path.parent.name
)
def test_every_recipe_has_a_row(path):
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(RECIPES) >= 8
    assert [name for name in RECIPES if not any(f"`{name}`" in row for row in rows)] == []
