"""What a row of each trainer's shape means: its keys → messages with text and image parts.

Apart from `llava_json.py`, which finds, reads and caches rows, so that each shape stands in one function beside its
source, and a new one is a function and a line of `SHAPES`. docs/from_other_trainers.md shows a row of each.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

# Where a text is split. Templates that put pictures in front write a newline of their own behind each, so one that
# touches a marker goes with it (the one behind before the one in front). Kept in place, all text is the user's.
MARKERS = {"front": re.compile(r"<image>\n|\n<image>(?!\n)|<image>"), "keep": re.compile("<image>")}
# Keys that other trainers render into a prompt and nothing here does.
UNREAD = {
    "tools": "Leave such rows out, or write the tools into the system turn as the model shall see them",
    "videos": "Leave such rows out, or give frames of the video as pictures",
    "audios": "Leave such rows out",
}
UNREAD_OF_MS_SWIFT = UNREAD | {"objects": "Write names and boxes into the text, where <ref-object> and <bbox> stand"}


class BadRow(ValueError):
    """A row that cannot be used: what was found in it, what is expected, and what to do.

    `expected` is the same text for all rows with the same fault, so that rows can be counted by it.
    """

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(found, expected, remedy)  # all three, or it could not be sent to another process
        self.expected = expected

    def __str__(self):
        found, expected, remedy = self.args
        return f"found {found}; expected {expected}. {remedy}."


class Words(NamedTuple):
    """What a shape calls the parts of a conversation, for reading it and for its errors."""

    turns: str
    role: str
    content: str
    naming: str
    roles: dict[str, str]
    roles_in_words: str
    user: str
    assistant: str
    takes_parts: bool


LLAVA = Words(
    turns="conversations",
    role="from",
    content="value",
    naming="from",
    roles={"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    roles_in_words="human or user, gpt or assistant, or system",
    user="human",
    assistant="gpt",
    takes_parts=False,
)
CHAT = Words(
    turns="messages",
    role="role",
    content="content",
    naming="with the role",
    roles={"user": "user", "assistant": "assistant", "system": "system"},
    roles_in_words="user, assistant or system",
    user="user",
    assistant="assistant",
    takes_parts=True,
)


class Shape(NamedTuple):
    """A shape of rows: the keys that tell it, how its turns are read, and what it takes from a row.

    `columns` become messages and images; all others stay with the row. Where `unmarked` is set, pictures of a row
    whose texts hold no `<image>` stand in front of its first user turn, as in the trainer that the shape comes from.
    """

    keys: tuple[str, ...]
    read: Callable[[dict], list[dict]]
    columns: frozenset[str]
    words: Words = CHAT
    unread: dict[str, str] = UNREAD
    unmarked: bool = True


def read_conversations(record: dict) -> list[dict]:
    """Read LLaVA's and ShareGPT's rows: `conversations`, a list of `from` and `value`.

    Sources: LLaVA, docs/Finetune_Custom_Data.md; LLaMA-Factory, data/README.md, "Sharegpt Format" (with `system` and
    `tools` beside the turns) and "Multimodal Image Dataset" (with `images`, as many as there are `<image>`).
    """
    return _read_turns(record["conversations"], LLAVA)


def read_messages(record: dict) -> list[dict]:
    """Read LLaMA-Factory's, ms-swift's and TRL's rows: `messages`, a list of `role` and `content`.

    Sources: LLaMA-Factory, data/README.md, "OpenAI Format"; ms-swift, docs/source_en/Customization/Custom-dataset.md,
    "Multimodal" (`<image>` in the text; tags that lack are put in front of the first turn); TRL,
    docs/source/dataset_formats.md and `prepare_multimodal_messages` (strings: all pictures in front of the first user
    turn; lists: where `{"type": "image"}` stands).
    """
    return _read_turns(record["messages"], CHAT)


def read_prompt_completion(record: dict) -> list[dict]:
    """Read TRL's rows: `prompt` and `completion`, each a list of `role` and `content` or a string.

    TRL trains the completion alone. Here every assistant turn of a row is trained unless `train_on` says otherwise,
    so a prompt with answers of its own is refused: as `messages`, it says itself what shall train. A string is a user
    turn or an answer; TRL feeds strings without a chat template, here every row gets the model's.

    Source: TRL, docs/source/dataset_formats.md, "Prompt-completion", and `DataCollatorForVisionLanguageModeling`.
    """
    turns = {}
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[name]
        turns[name] = [{"role": role, "content": value}] if isinstance(value, str) else value
        if not isinstance(turns[name], list) or not all(isinstance(turn, dict) for turn in turns[name]):
            raise BadRow(
                f"{name!r}: {repr(value)[:80]}",
                "a string or a list of turns with 'role' and 'content'",
                "Write the text in quotes, or the turns in a list",
            )
    if any(turn.get("role") == "assistant" for turn in turns["prompt"]):
        raise BadRow(
            "an assistant turn in 'prompt'",
            "answers in 'completion' alone, since TRL trains nothing else",
            "Write both as one list 'messages'; --train_on last_assistant then trains the completion alone",
        )
    if [turn.get("role") for turn in turns["completion"]] != ["assistant"]:
        raise BadRow(
            f"the roles {[turn.get('role') for turn in turns['completion']]} in 'completion'",
            "one assistant turn in 'completion'",
            "Write prompt and completion as one list 'messages'; every assistant turn of it is trained",
        )
    return _read_turns(turns["prompt"] + turns["completion"], CHAT)


def read_query_response(record: dict) -> list[dict]:
    """Read ms-swift's older rows: `query`, `response` and `history`, a list of earlier [query, response] pairs.

    Source: ms-swift, docs/source_en/Customization/Custom-dataset.md, "Query-Response format"; its responses in
    `history` are trained, as here.
    """
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow(
            f"'history': {repr(history)[:80]}",
            "a list of [query, response] pairs",
            "Write every earlier question with its answer, oldest first",
        )
    turns = []
    for query, response in [*history, (record["query"], record["response"])]:
        for name, role, text in (("query", "user", query), ("response", "assistant", response)):
            if not isinstance(text, str):
                raise BadRow(f"a {name} of type {type(text).__name__}", "a string", "Write the text in quotes")
            turns.append({"role": role, "content": text})
    return _read_turns(turns, CHAT)


# `messages` beside another shape can only be null: rows of two shapes are refused.
BESIDE = frozenset({"system", "image", "images", "messages"})
SHAPES = (
    Shape(("conversations",), read_conversations, BESIDE | {"conversations"}, words=LLAVA, unmarked=False),
    Shape(("messages",), read_messages, BESIDE, unread=UNREAD_OF_MS_SWIFT),
    Shape(("prompt", "completion"), read_prompt_completion, BESIDE | {"prompt", "completion"}),
    Shape(
        ("query", "response"),
        read_query_response,
        BESIDE | {"query", "response", "history"},
        unread=UNREAD_OF_MS_SWIFT,
    ),
)
ALL_KEYS = "; ".join(" and ".join(map(repr, shape.keys)) for shape in SHAPES)


def find_shape(record: Mapping) -> Shape:
    """The shape whose keys a row (or the features of a dataset) has.

    Raises:
        BadRow: it has the keys of none, or of two.
    """
    found = [
        shape for shape in SHAPES if record.get(shape.keys[0]) is not None and record.get(shape.keys[-1]) is not None
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadRow(
            f"the keys {_name(found[0])}, and also {_name(found[1])}",
            "the keys of one shape",
            "Rename or remove those that are not the conversation",
        )
    known = ("conversations", "messages", "completion", "response")
    for key in record:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close and close[0] not in record:
            raise BadRow(f"the key {key!r}", f"the key {close[0]!r}", "Rename the key")
    for shape in SHAPES:
        if empty := [key for key in shape.keys if key in record and record[key] is None]:
            raise BadRow(f"{empty[0]!r}: null", "a conversation", "Write it, or leave the row out")
    raise BadRow(f"the keys {list(record)}", f"the keys of one shape ({ALL_KEYS})", "Give the row its conversation")


class RowReader:
    """Reads the rows of one file or dataset, which must all have the shape of the first.

    Args:
        placement: `"front"` or `"keep"`, a key of `MARKERS`.
    """

    def __init__(self, placement: str):
        self.marker = MARKERS[placement]
        self.shape: Shape | None = None

    def __call__(self, record: dict, pictures: int) -> list[dict]:
        """Read a row that has so many pictures.

        Returns:
            Messages with `role` and `content`, a list of `{"type": "text", "text"}` and
            `{"type": "image", "text": None}`.

        Raises:
            BadRow: the row is not of its shape, its shape is not that of the rows before, or it does not have one
                `<image>` for each picture.
        """
        shape = find_shape(record)
        self.shape = self.shape or shape
        if shape.keys != self.shape.keys:  # no `is`: a loader's worker has a copy of this reader
            raise BadRow(
                f"the keys {_name(shape)} behind rows with {_name(self.shape)}",
                "rows of one shape",
                "Give each shape a file of its own",
            )
        for key, remedy in shape.unread.items():
            value = record.get(key)
            if any(value.values()) if isinstance(value, dict) else value:
                raise BadRow(f"the key {key!r}", "a conversation with pictures alone", remedy)
        turns = _with_system(record, shape.read(record))
        unmarked = shape.unmarked and all(isinstance(turn["content"], str) for turn in turns if turn["role"] == "user")
        messages = [{"role": turn["role"], "content": self._split(turn["content"])} for turn in turns]
        markers = sum(part["type"] == "image" for message in messages for part in message["content"])
        if pictures and not markers and unmarked:
            first = next(message for message in messages if message["role"] == "user")
            texts = [part for part in first["content"] if part["text"]]
            first["content"] = [{"type": "image", "text": None} for _ in range(pictures)] + texts
        elif markers != pictures:
            raise BadRow(
                f"{markers} <image> in the {shape.words.user} turns and {pictures} in 'image' or 'images'",
                "as many <image> as pictures",
                "Write one <image> where each picture belongs, or name the missing picture",
            )
        return messages

    def _split(self, content: str | list[dict]) -> list[dict]:
        if isinstance(content, list):
            return content
        if "<image>" not in content:
            return [{"type": "text", "text": content}]
        parts = []
        for position, text in enumerate(self.marker.split(content)):
            if position:
                parts.append({"type": "image", "text": None})
            if text:
                parts.append({"type": "text", "text": text})
        return parts


def _name(shape: Shape) -> str:
    return " and ".join(map(repr, shape.keys))


def _with_system(record: dict, turns: list[dict]) -> list[dict]:
    system = record.get("system")
    if not system:
        return turns
    if not isinstance(system, str):
        raise BadRow(f"'system' of type {type(system).__name__}", "a string in 'system'", "Write the text in quotes")
    if "<image>" in system:
        raise BadRow("<image> in 'system'", "<image> in user turns only", "Move or remove it")
    if turns[0]["role"] == "system":
        raise BadRow("'system' and a system turn", "one of the two", "Remove the other")
    return [{"role": "system", "content": system}, *turns]


def _read_turns(turns, words: Words) -> list[dict]:
    if not isinstance(turns, list):
        raise BadRow(f"{words.turns!r} of type {type(turns).__name__}", "a list of turns", "Put the turns in a list")
    keys = {words.role, words.content}
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRow(
                f"turn {number} of type {type(turn).__name__}",
                "an object",
                f'Write {{"{words.role}": ..., "{words.content}": ...}}',
            )
        if turn.keys() != keys and {key for key in turn if turn[key] is not None or key in keys} != keys:
            raise BadRow(
                f"turn {number} with the keys {list(turn)}",
                f"{words.role!r} and {words.content!r} alone",
                f"Rename or remove the keys; what belongs to the whole row may stand beside {words.turns!r}",
            )
        speaker, content = turn[words.role], turn[words.content]
        role = words.roles.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise BadRow(f"turn {number} {words.naming} {speaker!r}", words.roles_in_words, "Rename it")
        if isinstance(content, list) and words.takes_parts:
            content = [_read_part(number, part) for part in content]
        elif not isinstance(content, str):
            raise BadRow(
                f"turn {number} with a {words.content} of type {type(content).__name__}",
                "a string or a list of parts" if words.takes_parts else "a string",
                "Write the text in quotes",
            )
        if role != "user" and _has_picture(content):
            raise BadRow(
                f"<image> in turn {number} ({speaker})", f"<image> in {words.user} turns only", "Move or remove it"
            )
        messages.append({"role": role, "content": content})

    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise BadRow(
            f"the order {', '.join(turn[words.role] for turn in turns)[:200] or 'of no turns'}",
            f"an optional system turn, then {words.user} and {words.assistant} in alternation, {words.user} first and "
            f"{words.assistant} last",
            "Remove or merge the turns that break the order",
        )
    return messages


def _read_part(number: int, part) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str) and "<image>" not in part["text"]:
        return {"type": "text", "text": part["text"]}
    # llava-instruct-mix-vsft numbers its image parts with `index`.
    if kind == "image" and {key for key in part if part[key] is not None} <= {"type", "index"}:
        return {"type": "image", "text": None}
    raise BadRow(
        f"the part {repr(part)[:80]} in turn {number}",
        'parts {"type": "text", "text": ...} without <image>, and {"type": "image"}',
        "Name the pictures in 'images', in the order of the image parts",
    )


def _has_picture(content: str | list[dict]) -> bool:
    if isinstance(content, str):
        return "<image>" in content
    return any(part["type"] == "image" for part in content)
