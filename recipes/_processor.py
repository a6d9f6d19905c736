"""The processor's side of a run: its chat template, and how a picture becomes square.

A file of its own: the training recipes and `build_llava.py` make the same choices, and what is chosen is saved with
the processor, so that inference does as training did.
"""

from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from collators import tag_images, training_chat_template

IMAGE_ASPECT_RATIOS = ("pad", "crop", "resize")


def prepare_processor(processor, script_args, training_args) -> None:
    """Set the chat template, with `--image_tag_format`, and `--image_aspect_ratio` on a loaded processor, in place.

    Raises:
        ValueError: a template that cannot train or places pictures otherwise (`training_chat_template`), tags that
            cannot be put into it (`tag_images`), or a processor that cuts pictures into tiles.
    """
    template = training_chat_template(processor, training_args.chat_template_path, placement=script_args.placement)
    if script_args.image_tag_format is not None:
        template = tag_images(processor, template, script_args.image_tag_format)
    processor.chat_template = template
    if script_args.image_aspect_ratio is not None:
        if type(processor) is not LlavaProcessor:
            raise ValueError(
                f"--image_aspect_ratio {script_args.image_aspect_ratio}: {type(processor).__name__} cuts a picture of "
                "any shape into tiles; leave the flag out"
            )
        own = processor.image_processor
        square = own.crop_size if own.do_center_crop else own.size  # what the tower gets
        side = min(edge for edge in dict(square).values() if edge)
        processor.image_processor = square_image_processor(script_args.image_aspect_ratio, side, own)


def square_image_processor(image_aspect_ratio: str, side: int, own) -> LlavaImageProcessorPil:
    """How a picture of any shape becomes the square that a CLIP or SigLIP tower takes.

    Args:
        image_aspect_ratio: `"pad"`: padded to a square in the mean colour, then resized, as LLaVA-1.5 was trained.
            `"crop"`: resized, then the centre is cut out (the default of transformers; a quarter of a 4:3 picture is
            never seen). `"resize"`: squeezed into the square (Prismatic found it no worse, arXiv:2402.07865).
        side: of the square, in pixels.
        own: the tower's image processor, of which resampling, mean and standard deviation are kept.

    Raises:
        ValueError: `image_aspect_ratio` is none of these.
    """
    if image_aspect_ratio not in IMAGE_ASPECT_RATIOS:  # argparse checks no choices in a YAML file
        raise ValueError(f"image_aspect_ratio {image_aspect_ratio!r}: expected {', '.join(IMAGE_ASPECT_RATIOS)}")
    square = {"height": side, "width": side}
    return LlavaImageProcessorPil(
        do_pad=image_aspect_ratio == "pad",
        do_center_crop=image_aspect_ratio != "resize",
        size=square if image_aspect_ratio == "resize" else {"shortest_edge": side},
        crop_size=square,
        resample=own.resample,
        image_mean=own.image_mean,
        image_std=own.image_std,
    )
