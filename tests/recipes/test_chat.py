import io
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

import chat
import tiny
from collators import LlavaDataCollator, chat_template_path

SCRIPT = Path(chat.__file__)
BLUE_AFTER_RED = [
    tiny.user("Which colour?", images=1),
    tiny.assistant("Red."),
    tiny.user("And this?", images=1),
    tiny.assistant("Blue."),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model that tells red from blue, remembers one turn, and says "No" to a question without a picture."""
    processor = tiny.make_processor(chat_template_path("vicuna_v1").read_text(encoding="utf-8"))
    no = [tiny.user("Which colour?"), tiny.assistant("No")]
    rows = [
        tiny.row(*BLUE_AFTER_RED, images=[tiny.picture("red"), tiny.picture("blue")]),
        tiny.row(tiny.user("Which colour?", images=1), tiny.assistant("Blue."), images=[tiny.picture("blue")]),
        tiny.row(*no),
        tiny.row({"role": "system", "content": [{"type": "text", "text": "Shout."}]}, no[0], tiny.assistant("NO")),
    ]
    return tiny.overfit(tmp_path_factory.mktemp("checkpoint"), processor, rows)


@pytest.fixture
def pictures(tmp_path):
    for color in ("red", "blue"):
        tiny.picture(color).save(tmp_path / f"{color}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    return tmp_path


@pytest.mark.parametrize(
    ("text", "pictures", "content"),
    [
        ("Hi", 0, ["Hi"]),
        ("Hi", 2, [None, None, "Hi"]),
        ("A <image> or <image>?", 2, ["A ", None, " or ", None, "?"]),
        ("<image>\nHi", 1, [None, "\nHi"]),
    ],
)
def test_pictures_stand_where_the_question_says(text, pictures, content):
    parts = chat.make_message("user", text, pictures)["content"]
    assert parts == [{"type": "text", "text": text} if text else {"type": "image"} for text in content]


def test_an_empty_answer_stays_a_part():
    """The released llava-1.6-mistral template reads the first part of every turn."""
    assert chat.make_message("assistant", "")["content"] == [{"type": "text", "text": ""}]


def talk(monkeypatch, capsys, lines, *flags):
    """Run the recipe with these lines on standard input; returns the answers and the notes beside them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    capsys.readouterr()
    chat.main([str(flag) for flag in flags])
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if line and "Loading weights" not in line]
    return [line.strip() for line in out.splitlines()], notes


def test_a_piped_talk_in_a_process_of_its_own(checkpoint, pictures):
    lines = [
        "Which colour?",
        "/reset",
        f"/image {pictures}/missing.png",
        f"/image {pictures}/broken.png",
        "/image",
        "/picture",
        "",
        f"/image  {pictures}/blue.png ",
        "  Which colour?",
        "/reset",
        "Which colour?",
        "/quit",
        "Which colour?",
    ]
    command = [sys.executable, str(SCRIPT), "--model", checkpoint, "--image", str(pictures / "red.png")]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Red.", "Blue.", "No"]
    assert f"no picture added: {pictures}/missing.png" in done.stderr
    assert f"no picture added: {pictures}/broken.png" in done.stderr
    assert done.stderr.count("no picture added") == 3
    assert "/picture is no command: /image PATH, /reset, /quit" in done.stderr


def test_ctrl_c_stops_an_answer_but_not_the_program(checkpoint, tmp_path):
    """On a terminal, with a model that has no end token."""
    endless = shutil.copytree(checkpoint, tmp_path / "endless")
    GenerationConfig(pad_token_id=3).save_pretrained(endless)
    command = [sys.executable, str(SCRIPT), "--model", str(endless), "--max_new_tokens", "1000000"]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, command)
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"Which colour?\n")
        read_until(terminal, "1000000 new ones")  # the warning that comes right before the answer
        os.write(terminal, b"\x03")
        read_until(terminal, "(stopped by Ctrl-C)\r\n> ")
        os.write(terminal, b"/reset\n")
        read_until(terminal, "> ")
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(terminal)  # hangs up on a process that is still there


def test_ctrl_c_at_the_prompt_drops_the_line(monkeypatch):
    typed = iter(["one", KeyboardInterrupt, " two ", EOFError, "three"])

    def read(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    assert list(chat.read_lines()) == ["one", "two"]


def read_until(terminal, text):
    seen = ""
    while text not in seen:
        assert select.select([terminal], [], [], 120)[0], f"waited for {text!r}, found {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")


def test_history_feeds_back_the_ids_and_pictures_of_the_talk(checkpoint, pictures, monkeypatch, capsys):
    prompts, outputs, pixels = [], [], []
    generate = LlavaForConditionalGeneration.generate

    def record(self, input_ids, **kwargs):
        prompts.append(input_ids[0].tolist())
        pixels.append(kwargs["pixel_values"])
        outputs.append(generate(self, input_ids=input_ids, **kwargs)[0].tolist())
        return torch.tensor(outputs[-1:])

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", record)
    lines = ["Which colour?", f"/image {pictures}/blue.png", "And this?", "Which colour?"]
    out, err = talk(monkeypatch, capsys, lines, "--model", checkpoint, "--image", pictures / "red.png")
    assert out[:2] == ["Red.", "Blue."]
    for output, prompt in zip(outputs[:2], prompts[1:], strict=True):
        assert output[-1] == 2  # the end token that the model emitted
        assert prompt[: len(output)] == output
    assert [len(pictures) for pictures in pixels] == [1, 2, 2]
    assert torch.equal(pixels[1][:1], pixels[0])

    processor = tiny.make_processor(chat_template_path("vicuna_v1").read_text(encoding="utf-8"))
    images = [tiny.picture("red"), tiny.picture("blue")]
    trained = LlavaDataCollator(processor)([tiny.row(*BLUE_AFTER_RED, images=images)])
    assert outputs[1] == trained["input_ids"][0].tolist()


def test_system_text_and_reset(checkpoint, monkeypatch, capsys):
    lines = ["Which colour?", "/reset", "Which colour?"]
    assert talk(monkeypatch, capsys, lines, "--model", checkpoint, "--system", "Shout.") == (["NO", "NO"], [])
    assert talk(monkeypatch, capsys, lines, "--model", checkpoint) == (["No", "No"], [])


def test_a_cut_answer_is_said_to_be_cut(checkpoint, monkeypatch, capsys):
    out, err = talk(monkeypatch, capsys, ["Which colour?"], "--model", checkpoint, "--max_new_tokens", 2)
    assert (out, err) == (["No"], ["(cut at --max_new_tokens 2)"])


def test_what_template_or_processor_refuse_is_not_asked_and_the_talk_goes_on(
    checkpoint, pictures, monkeypatch, capsys
):
    lines = ["Is <image> a word?", "Which colour?"]
    out, err = talk(monkeypatch, capsys, lines, "--model", checkpoint)
    assert (out, len(err)) == (["No"], 1)
    assert err[0].startswith("not asked: Found 1 <image> tokens in the text but no images were passed")

    plain = shutil.copytree(checkpoint, pictures / "plain")
    shutil.copy(chat_template_path("plain"), plain / "chat_template.jinja")
    lines = ["Hi", f"/image {pictures}/red.png", "Hi"]
    out, err = talk(monkeypatch, capsys, lines, "--model", plain, "--max_new_tokens", 2)
    assert (len(out), err[0]) == (1, "not asked: plain takes a picture and its caption; this row has no picture")


def test_several_pictures_belong_to_one_question(checkpoint, pictures, monkeypatch, capsys):
    images = []

    def look(model, processor, messages, shown, **kwargs):
        images.append([image.getpixel((0, 0)) for image in shown])
        return stream_answer(model, processor, messages, shown, **kwargs)

    stream_answer = chat.stream_answer
    monkeypatch.setattr(chat, "stream_answer", look)
    flags = ("--model", checkpoint, "--image", pictures / "red.png", "--image", pictures / "blue.png")
    talk(monkeypatch, capsys, ["Which colour?", "Which colour?"], *flags, "--max_new_tokens", 2)
    assert images == [[(255, 0, 0), (0, 0, 255)]] * 2
