"""Stage 2 by adapters: LoRA, QLoRA, DoRA or QDoRA on the language model, the projector whole beside them.

Trains: adapters on every linear layer of language_model; multi_modal_projector, unless --freeze_projector; with
        --lora_vision_tower adapters on the vision tower too, up to the layer whose features are used.
Frozen: all else; language_model in 4-bit NF4, unless --load_in_4bit False. vision_tower, multi_modal_projector and
        lm_head keep their dtype.
Data:   LLaVA JSON conversations with pictures, without, or mixed; or a dataset with `messages` and `images`.

    python recipes/sft_qlora.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name data/train.json
    accelerate launch recipes/sft_qlora.py --model_name_or_path llava-hf/llava-1.5-7b-hf --load_in_4bit False \
        --use_dora --dataset_name llava_v1_5_mix665k.json --image_folder images

Writes adapter, projector, processor to --output_dir, which PEFT, evaluate.py and chat.py load as it is (the auto class
too, but for DoRA); merge_adapter.py makes a checkpoint of it. Measured: not yet on a GPU (digits: quickstart.py).
"""

from dataclasses import dataclass, field

from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from _arguments import LlavaScriptArguments, load_datasets, recipe_parser
from _parts import adapter_config, add_adapters, quantised_loading
from _processor import prepare_processor
from _trainer import LlavaTrainer, stop_token_ids
from _weights import safe_weights
from collators import LlavaDataCollator, fetch_image

# LLaVA-1.5's LoRA values (its finetune_lora.sh): a global batch of 128 rows = 16 a device × 8 GPUs.
RECIPE = dict(
    output_dir="outputs/llava-qlora",
    use_peft=True,
    lora_r=128,
    lora_alpha=256,
    lora_dropout=0.05,
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    use_bnb_nested_quant=True,  # QLoRA's double quantisation (arXiv:2305.14314)
    dtype="bfloat16",  # of the frozen parts; what trains is kept in float32
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=2e-4,
    projector_learning_rate=2e-5,
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
    freeze_projector: bool = field(default=False, metadata={"help": "Train the adapters alone."})
    lora_vision_tower: bool = field(default=False, metadata={"help": "Adapters on the vision tower too."})


def make_parser():
    return recipe_parser(RECIPE, Arguments)


def main(argv=None):
    script_args, training_args, model_args = make_parser().parse_args_and_config(argv)
    if not model_args.use_peft:
        raise ValueError("this recipe trains adapters: drop --use_peft False, or take recipes/sft_full.py")

    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path, **source)
    prepare_processor(processor, script_args, training_args)
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        **source,
        **safe_weights(model_args.model_name_or_path, model_args.model_revision, script_args.allow_pickled_weights),
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        **quantised_loading(model_args, training_args),
    )
    set_seed(training_args.seed)  # the trainer would seed after the adapters have drawn their first values
    model = add_adapters(
        model,
        adapter_config(model_args),
        freeze_projector=script_args.freeze_projector,
        lora_vision_tower=script_args.lora_vision_tower,
    )

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
