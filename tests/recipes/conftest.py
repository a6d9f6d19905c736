"""The data and the checkpoints that the tests of the training recipes run on."""

import json

import pytest

import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve pictures with one exchange each, and conversations with two, one and no picture."""
    folder = tmp_path_factory.mktemp("data")
    captions, talks = [], []
    for index in range(12):
        color = tiny.COLORS[index % len(tiny.COLORS)]
        tiny.picture(color, (20, 16)).save(folder / f"{index}.png")
        ask = {"from": "human", "value": "What is it?\n<image>"}
        captions.append(
            {"id": index, "image": f"{index}.png", "conversations": [ask, {"from": "gpt", "value": color}]}
        )
        more = [{"from": "human", "value": "Is it odd?"}, {"from": "gpt", "value": "No" if index % 2 else "Yes"}]
        talks.append({**captions[-1], "conversations": captions[-1]["conversations"] + more[: 2 * (index % 2)]})
    talks[3] = {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    for name, rows in (("pretrain.json", captions), ("instruct.json", talks)):
        (folder / name).write_text(json.dumps(rows))
    (folder / "instruct.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(kind)`: a tiny checkpoint of that class on disk."""
    made = {}

    def make(kind: str = "llava") -> str:
        if kind not in made:
            made[kind] = tiny.save_checkpoint(tmp_path_factory.mktemp(kind), kind=kind)
        return made[kind]

    return make
