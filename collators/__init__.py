"""What stands between a row on disk and a training batch. See `collators/llava.py` first."""

from collators.llava import IGNORE_INDEX, LlavaDataCollator, load_image
from collators.templates import chat_template_path, training_chat_template

__all__ = ["IGNORE_INDEX", "LlavaDataCollator", "chat_template_path", "load_image", "training_chat_template"]
