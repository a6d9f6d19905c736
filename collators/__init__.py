"""What stands between a row on disk and a training batch. See `collators/llava.py` first."""

from collators.llava import IGNORE_INDEX, LlavaDataCollator, load_image, read_row, rendered_placement
from collators.llava_json import load_rows
from collators.remote_images import fetch_image
from collators.templates import chat_template_path, tag_images, training_chat_template

__all__ = [
    "IGNORE_INDEX",
    "LlavaDataCollator",
    "chat_template_path",
    "fetch_image",
    "load_image",
    "load_rows",
    "read_row",
    "rendered_placement",
    "tag_images",
    "training_chat_template",
]
