"""Stage 2, visual instruction tuning: teach the whole model to answer questions about pictures.

Trains: multi_modal_projector, language_model; with --train_vision_tower the vision tower too, up to the layer whose
        features are used (Prismatic found that harmful in this recipe, arXiv:2402.07865).
Frozen: vision_tower.
Data:   LLaVA JSON conversations with pictures, without, or mixed; or a dataset with `messages` and `images`.

    python recipes/sft_full.py --model_name_or_path llava-hf/llava-interleave-qwen-0.5b-hf \
        --dataset_name data/train.json
    accelerate launch recipes/sft_full.py --model_name_or_path outputs/llava-stage1 \
        --chat_template_path collators/chat_templates/vicuna_v1.jinja --dataset_name llava_v1_5_mix665k.json \
        --image_folder images --per_device_train_batch_size 16

Writes a full checkpoint that stock classes load, its training chat template inside, to --output_dir. Takes 16 bytes a
trained parameter a GPU (float32 weights, gradients, two AdamW moments), activations besides.
Measured: not measured yet on a GPU; LLaVA-1.5 reports 10 hours for 665K rows on 8 A100 with the values below.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForImageTextToText, AutoProcessor

from _arguments import LlavaScriptArguments, load_datasets, recipe_parser
from _parts import train_only
from _processor import prepare_processor
from _trainer import LlavaTrainer, stop_token_ids
from _weights import safe_weights
from collators import LlavaDataCollator, fetch_image

# LLaVA-1.5's stage 2 (arXiv:2310.03744, table 9): a global batch of 128 rows = 16 a device × 8 GPUs.
RECIPE = dict(
    output_dir="outputs/llava-sft",
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=2e-5,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,  # a share of all steps
    max_length=2048,
    dataloader_num_workers=4,
    remove_unused_columns=False,  # keeps `id`, by which errors name a row
    save_strategy="steps",
    save_steps=500,
    save_total_limit=2,
)


@dataclass
class Arguments(LlavaScriptArguments):
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower too."})


def make_parser():
    return recipe_parser(RECIPE, Arguments)


def main(argv=None):
    script_args, training_args, model_args = make_parser().parse_args_and_config(argv)
    if model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("this recipe trains whole parts: drop --use_peft and --load_in_*bit, or take sft_qlora.py")

    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, **source)
    prepare_processor(processor, script_args, training_args)
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        **source,
        **safe_weights(model_args.model_name_or_path, model_args.model_revision, script_args.allow_pickled_weights),
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
    )
    vision_tower = ["vision_tower"] if script_args.train_vision_tower else []
    train_only(model, ["multi_modal_projector", "language_model", *vision_tower])

    train_dataset, eval_dataset = load_datasets(script_args, training_args)
    collator = LlavaDataCollator(
        processor,
        train_on=script_args.train_on,
        max_length=training_args.max_length,
        max_images=script_args.max_images,
        placement=script_args.placement,
        overlong=script_args.overlong,
        on_bad_row=script_args.on_bad_row,
        skipped_rows=f"{training_args.output_dir}/skipped_rows.jsonl",
        fetch_image=fetch_image if script_args.allow_remote_images else None,
        stop_token_ids=stop_token_ids(model, processor),
        pad_to_multiple_of=training_args.pad_to_multiple_of,
    )
    trainer = LlavaTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    if training_args.dry_run:
        return trainer.dry_run()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # the first process may still be writing
    trainer.end()


if __name__ == "__main__":
    main()
