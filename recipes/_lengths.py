"""How many tokens rows have, without a pixel decoded: the rendered text is tokenised, pictures are counted by size.

A file of its own beside `_doctor.py`: arithmetic over a whole file, while that is a report.
"""

import numpy as np
import torch
from transformers import LlavaProcessor
from transformers.trainer_pt_utils import get_length_grouped_indices

SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


class LengthCounter:
    """Counts the tokens of conversations as the collator would see them.

    Args:
        processor: A Llava-family processor.
        chat_template: Rendered instead of the processor's own.

    Attributes:
        needs_sizes: Whether a picture's number of tokens depends on its size.
    """

    def __init__(self, processor, chat_template: str):
        self.processor = processor
        self.chat_template = chat_template
        self.needs_sizes = type(processor) is not LlavaProcessor
        self._tokens: dict[tuple[int, int], int] = {}
        # Its processor tiles a picture that is alone in its row and shows each of several as one.
        self._one_each = getattr(processor, "num_image_tokens", None)

    def count(
        self, conversations: list[list[dict]], sizes: list[list[tuple[int, int]]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count tokens.

        Args:
            conversations: Messages with list contents, as `read_row` returns.
            sizes: Width and height of each conversation's pictures, as they are shown.

        Returns:
            Tokens of each conversation, and how many of these are image tokens; int64 `(conversations,)` each.
        """
        encoded = self.encode(self.processor.apply_chat_template(conversations, chat_template=self.chat_template))
        images = np.array([self._image_tokens(pictures) for pictures in sizes], dtype=np.int64)
        placeholders = np.array([len(pictures) for pictures in sizes], dtype=np.int64)
        return np.array([len(ids) for ids in encoded], dtype=np.int64) - placeholders + images, images

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise rendered text as the processor does, each image token once."""
        tokenizer, bos = self.processor.tokenizer, self.processor.tokenizer.bos_token
        # The template writes BOS into all texts; one that begins with it by itself is a row that is refused.
        adds_special_tokens = not (bos and all(text.startswith(bos) for text in texts))
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=adds_special_tokens)
        return [row.ids for row in encoded]

    def _image_tokens(self, sizes: list[tuple[int, int]]) -> int:
        if self._one_each is not None and len(sizes) > 1:
            return len(sizes) * (self._one_each + 1)  # a newline behind each
        return sum(self._of_one(size) for size in sizes)

    def _of_one(self, size: tuple[int, int]) -> int:
        key = size if self.needs_sizes else (0, 0)
        if key not in self._tokens:
            width, height = size
            (self._tokens[key],) = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])[
                "num_image_tokens"
            ]
        return self._tokens[key]


def percentiles(values: np.ndarray) -> dict[str, int]:
    """Median, 95th and 99th percentile and maximum, each a value that occurs."""
    return {name: int(np.quantile(values, share, method="higher")) for name, share in SHARES.items()}


def padding_shares(
    tokens: np.ndarray, has_picture: np.ndarray, batch_size: int, length: int, accumulation: int = 1
) -> dict[str, float]:
    """Share of padding in the batches of one epoch under four ways to form them.

    Args:
        tokens: Of each row.
        has_picture: Of each row.
        batch_size: Rows of one device's batch.
        length: Of a packed sequence, in tokens.
        accumulation: Batches of one step, among which `Trainer` groups too.

    Returns:
        `"random"`; `"length grouped"`: as `--train_sampling_strategy group_by_length` does; `"modality and length
        grouped"`: rows with and without pictures apart, then by length (LLaVA's sampler); `"packed"`: whole rows
        by best fit, longest first, in sequences of `length`. The seed is fixed.
    """
    rows, step = np.arange(len(tokens)), batch_size * accumulation
    order = torch.randperm(len(tokens), generator=_seeded()).numpy()
    kinds = [kind for kind in (rows[has_picture], rows[~has_picture]) if len(kind)]
    grouped = [_group(tokens, kind, step) for kind in kinds]
    return {
        "random": _padding(tokens, [order], batch_size),
        "length grouped": _padding(tokens, [_group(tokens, rows, step)], batch_size),
        "modality and length grouped": _padding(tokens, grouped, batch_size),
        "packed": (packed := _packed_room(tokens, length)) / (packed + int(tokens.sum())),
    }


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _group(tokens: np.ndarray, rows: np.ndarray, step: int) -> np.ndarray:
    return rows[get_length_grouped_indices(tokens[rows].tolist(), step, generator=_seeded())]


def _padding(tokens: np.ndarray, orders: list[np.ndarray], batch_size: int) -> float:
    padded = 0
    for order in orders:
        for start in range(0, len(order), batch_size):
            batch = tokens[order[start : start + batch_size]]
            padded += int(batch.max()) * len(batch)
    return 1 - int(tokens.sum()) / padded


def _packed_room(tokens: np.ndarray, length: int) -> int:
    """Tokens of room that best-fit decreasing leaves: a row goes where the least is left. The last room is free."""
    room = np.zeros(length + 1, dtype=np.int64)  # how many sequences have so much room left
    for size in np.sort(tokens)[::-1].tolist():
        places = np.flatnonzero(room[size:])
        left = length - size
        if len(places):
            left = places[0]
            room[size + left] -= 1
        room[left] += 1
    return int((room * np.arange(length + 1)).sum()) - int(np.flatnonzero(room)[-1])


def histogram(tokens: np.ndarray, bins: int = 40) -> list[list[int]]:
    """`[from, to, rows]` of bins of equal width."""
    counts, edges = np.histogram(tokens, bins=min(bins, max(int(tokens.max()), 1)), range=(0, int(tokens.max()) + 1))
    return [
        [round(low), round(high), int(count)] for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
