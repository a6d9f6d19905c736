"""The tree keeps the shape a reader relies on: small recipes, identical common blocks, arrows in one direction."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if not path.name.startswith("_"))
TRAINING = [path for path in RECIPES if "LlavaTrainer(" in path.read_text(encoding="utf-8")]
SOURCES = sorted((ROOT / "recipes").glob("*.py")) + sorted((ROOT / "collators").glob("*.py"))
# What a training recipe may do in its own way: choose its parts or adapters, and save what only it saves.
OWN_STATEMENTS = ("use_peft", "set_seed(", "train_only(", "vision_tower =", "add_adapters(", "save_projector(")
OWN_LINE = "        **quantised_loading(model_args, training_args),\n"


def test_the_globs_find_what_they_should():
    assert {"pretrain_projector", "sft_full", "evaluate", "chat", "build_llava"} <= {path.stem for path in RECIPES}
    assert {"pretrain_projector", "sft_full", "sft_qlora"} <= {path.stem for path in TRAINING}
    assert not (ROOT / "recipes" / "__init__.py").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_at_most_120_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_parser_and_a_main(path):
    source = path.read_text(encoding="utf-8")
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert {"make_parser", "main"} <= names
    assert source.rstrip().endswith('if __name__ == "__main__":\n    main()')


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_recipe_says_what_it_does(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for line in ("Trains:", "Frozen:", "Data:", "Measured:", "python recipes/", "accelerate launch recipes/"):
        assert line in docstring


def common_statements(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8").replace(OWN_LINE, "")
    main = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    statements = [ast.get_source_segment(source, statement) for statement in main.body]
    return [text for text in statements if not any(own in text for own in OWN_STATEMENTS)]


def test_the_training_recipes_keep_their_common_blocks_identical():
    first, *others = TRAINING
    assert len(common_statements(first)) >= 9
    for other in others:
        assert common_statements(other) == common_statements(first), other.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arrows_point_from_recipes_to_collators_to_libraries(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    recipes = {recipe.stem for recipe in RECIPES}
    assert not imported & recipes, "no recipe imports another"
    if path.parent.name == "collators":
        assert not any(name.startswith("_") and name != "__future__" for name in imported)
        # llava_json.py reads files of every shape in row_shapes.py, which itself pastes; llava.py pastes alone.
        if path.name not in ("__init__.py", "templates.py", "llava_json.py"):
            assert not any(name.startswith("collators") for name in imported), "a collator file pastes into a notebook"
        if path.name == "llava_json.py":
            assert {name for name in imported if name.startswith("collators")} == {"collators.row_shapes"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_path_edits_and_no_broad_excepts(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"sys\.path\b|except( (Base)?Exception( as \w+)?)?:", source)
    assert path.stem not in ("utils", "common", "data", "datasets")


def test_the_top_level_is_the_users_own():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    allowed = {"recipes", "collators", "tests", "accelerate_configs", "benchmarks", "docs", ".ci"}
    allowed |= {"requirements.txt", "README.md", "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md", ".gitignore"}
    assert {name.split("/")[0] for name in tracked} <= allowed


def test_requirements_are_pinned_exactly():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line]
    assert lines[-1] == "-e ."
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines[:-1])
    assert "torch==2.13.0" in lines


def test_one_torchvision_is_pinned():
    """The one that belongs to the pinned torch: in the extra that users install, and in the Makefile for the tests."""
    pins = [
        re.findall(r"torchvision==[0-9.]+", (ROOT / name).read_text(encoding="utf-8"))
        for name in ("pyproject.toml", "Makefile")
    ]
    assert pins[0] == pins[1] == ["torchvision==0.28.0"]
