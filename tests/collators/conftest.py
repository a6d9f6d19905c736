"""A data folder and a cache of `datasets` for the tests that read rows."""

import datasets
import pytest

from tiny import picture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where `load_rows` keeps what it has read, empty for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "llava_json"


@pytest.fixture
def folder(tmp_path):
    """A data folder with the pictures a.png and b.png."""
    path = tmp_path / "data"
    path.mkdir()
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        picture(color).save(path / name)
    return path
