"""Talk to a checkpoint in a terminal: one conversation about any number of pictures.

    python recipes/chat.py --model outputs/llava-sft --image cat.jpg

`/image PATH` adds a picture to the next question, ahead of it or, if it says `<image>` once for each, there; `/reset`
forgets all, `/quit` or Ctrl-D ends. Ctrl-C stops an answer; what there is of it stays in the conversation. Questions
may also come from a pipe, one a line: answers go to standard output, all else to standard error.
"""

import argparse
import os
import signal
import sys
from itertools import chain

import torch
from jinja2 import TemplateError
from transformers import TextStreamer

from _answers import add_arguments, answer, load_checkpoint
from collators import fetch_image, load_image


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--image", action="append", default=[], help="picture of the first question; repeatable")
    parser.add_argument("--system", help="system text; default: none")
    return parser


def note(text):
    print(text, file=sys.stderr, flush=True)


def read_lines():
    """Yield the lines typed until Ctrl-D; Ctrl-C drops the one at hand."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            note("")
        except EOFError:
            return


class Printer(TextStreamer):
    """Prints an answer as it comes, without the blank that many templates put ahead of it."""

    begun = False

    def on_finalized_text(self, text, stream_end=False):
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


def stream_answer(model, processor, messages, images, **generation):
    """Print the answer word by word and return it; Ctrl-C ends it at the next token."""
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        [(text, stopped)] = answer(
            model,
            processor,
            [messages],
            [images],
            streamer=Printer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=[lambda ids, scores, **_: torch.full(ids.shape[:1], bool(pressed), device=ids.device)],
            **generation,
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    if not stopped:
        note("(stopped by Ctrl-C)" if pressed else f"(cut at --max_new_tokens {generation['max_new_tokens']})")
    return text


def make_message(role, text, pictures=0):
    """Pictures stand where the text says <image>; unless it says so of each of them, ahead of it."""
    texts = text.split("<image>") if text.count("<image>") == pictures > 0 else [*[""] * pictures, text]
    parts = [part for words in texts for part in ({"type": "image"}, {"type": "text", "text": words})][1:]
    return {"role": role, "content": [part for part in parts if part.get("text") != ""] or parts}


def main(argv=None):
    args = make_parser().parse_args(argv)
    model, processor = load_checkpoint(args.model, args.dtype, args.device, args.allow_pickled_weights)
    generation = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    fetch = fetch_image if args.allow_remote_images else None
    opening = [make_message("system", args.system)] if args.system else []
    messages, shown, waiting = opening, [], []
    for line in chain((f"/image {path}" for path in args.image), read_lines()):
        command, _, argument = line.partition(" ")
        if command == "/image":
            try:
                waiting.append(load_image(os.path.expanduser(argument.strip()), fetch))
            except (OSError, ValueError) as error:
                note(f"no picture added: {error}")
        elif line == "/reset":
            messages, shown, waiting = opening, [], []
        elif line == "/quit":
            break
        elif line.startswith("/"):
            note(f"{command} is no command: /image PATH, /reset, /quit")
        elif line:
            question = make_message("user", line, len(waiting))
            try:
                text = stream_answer(model, processor, [*messages, question], shown + waiting, **generation)
            except (ValueError, TemplateError) as error:
                note(f"not asked: {error}")
                continue
            messages = [*messages, question, make_message("assistant", text)]
            shown, waiting = shown + waiting, []


if __name__ == "__main__":
    main()
