"""Stage 1, feature alignment: teach a fresh projector to speak the language model's tongue, on pictures with captions.

Trains: multi_modal_projector.
Frozen: vision_tower, language_model.
Data:   LLaVA JSON, one picture and one caption a row (the question's words are left out: the `plain` template).

    python recipes/pretrain_projector.py --model_name_or_path outputs/llava-init --dataset_name data/pretrain.json
    accelerate launch recipes/pretrain_projector.py --model_name_or_path outputs/llava-init \
        --dataset_name blip_laion_cc_sbu_558k.json --image_folder images --per_device_train_batch_size 32

Writes a full checkpoint to --output_dir, and the projector alone into its folder projector/.
Measured: not measured yet on a GPU (on digits: recipes/quickstart.py). LLaVA-1.5 reports 3.5 hours for 558K rows on
8 A100 with the values below.
"""

from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from _arguments import load_datasets, recipe_parser
from _parts import train_only
from _processor import prepare_processor
from _projector import save_projector
from _trainer import LlavaTrainer, stop_token_ids
from _weights import safe_weights
from collators import LlavaDataCollator, chat_template_path, fetch_image

# LLaVA-1.5's stage 1 (arXiv:2310.03744, table 9): a global batch of 256 rows = 32 a device × 8 GPUs.
RECIPE = dict(
    output_dir="outputs/llava-stage1",
    chat_template_path=str(chat_template_path("plain")),
    dtype="bfloat16",  # of the frozen parts; what trains is kept in float32
    num_train_epochs=1,
    per_device_train_batch_size=32,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,  # a share of all steps
    max_length=2048,
    dataloader_num_workers=4,
    remove_unused_columns=False,  # keeps `id`, by which errors name a row
    save_strategy="steps",
    save_steps=500,
    save_total_limit=2,
)


def make_parser():
    return recipe_parser(RECIPE)


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
    train_only(model, ["multi_modal_projector"])

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
    save_projector(model, Path(training_args.output_dir) / "projector", write=trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()  # the first process may still be writing
    trainer.end()


if __name__ == "__main__":
    main()
