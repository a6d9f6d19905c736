"""What stands between a row on disk and a training batch. See `collators/llava.py` first."""

from collators.llava import IGNORE_INDEX, LlavaDataCollator, load_image, moves_pictures, read_row
from collators.llava_json import load_rows
from collators.templates import chat_template_path, tag_images, training_chat_template

__all__ = [
    "IGNORE_INDEX",
    "LlavaDataCollator",
    "chat_template_path",
    "load_image",
    "load_rows",
    "moves_pictures",
    "read_row",
    "tag_images",
    "training_chat_template",
]
