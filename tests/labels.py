"""What a batch must train, worked out from the prompts of inference instead of the collator's masks."""

import tiny
from collators import load_image, read_row


def check_labels(collator, rows: list[dict]) -> None:
    """Answers and stop tokens train, nothing else, in a batch as alone, each behind the ids that inference feeds."""
    processor = collator.processor
    batch = collator(rows)
    for index, row in enumerate(rows):
        kept = batch["attention_mask"][index].bool()
        ids, labels = batch["input_ids"][index][kept].tolist(), batch["labels"][index][kept].tolist()
        alone = collator([row])
        assert (ids, labels) == (alone["input_ids"][0].tolist(), alone["labels"][0].tolist())
        conversation = read_row(row, processor.image_token, placement=collator.placement)
        expected = [-100] * len(ids)
        for turn, message in enumerate(conversation["messages"]):
            if message["role"] != "assistant":
                continue
            prompt = conversation["messages"][:turn]
            pictures = sum(part["type"] == "image" for said in prompt for part in said["content"])
            images = [load_image(source) for source in conversation["images"][:pictures]]
            asked = processor.apply_chat_template(
                [prompt],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"images": [images]} if images else {},
            )["input_ids"][0]
            start = len(asked)
            if "Onevision" in type(processor).__name__ and len(images) == 1 < len(conversation["images"]):
                # A picture alone is cut into tiles, one of several is not: here a later turn brings another.
                start += tiny.IMAGE_TOKENS + 1 - asked.count(processor.image_token_id)
            else:
                assert ids[:start] == asked
            end = next(place for place in range(start, len(ids)) if ids[place] in collator.stop_token_ids) + 1
            assert processor.decode(ids[start : end - 1]).strip() == message["content"][0]["text"]
            expected[start:end] = ids[start:end]
        assert labels == expected
