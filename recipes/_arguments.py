"""The command line that the training recipes share: data flags, parser, datasets.

Here because every training recipe needs the same block, and because TRL's parser drops unknown keys in silence.
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, ScriptArguments, TrlParser

from _faults import claim, resumes
from _processor import IMAGE_ASPECT_RATIOS
from _trainer import LlavaSFTConfig
from collators import load_rows

SHUFFLE_BUFFER = 10_000  # rows of a stream that --shuffle_dataset draws from


@dataclass
class LlavaScriptArguments(ScriptArguments):
    """TRL's `ScriptArguments` and what a row with pictures needs besides."""

    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative picture paths start. Default: the folder of the JSON file."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "JSON or Parquet file or dataset for evaluation. Default: --dataset_test_split of --dataset_name."
        },
    )
    train_on: str = field(
        default="assistant",
        metadata={"help": "Tokens that carry loss.", "choices": ["assistant", "last_assistant", "all"]},
    )
    placement: str = field(
        default="front",
        metadata={"help": "Pictures before a turn's text, or where they stand in it.", "choices": ["front", "keep"]},
    )
    max_images: int | None = field(
        default=None, metadata={"help": "Most pictures of a row; one with more loses whole exchanges from its end."}
    )
    overlong: str = field(
        default="raise",
        metadata={
            "help": "A row whose first exchange exceeds --max_length or --max_images: stop, or leave it out.",
            "choices": ["raise", "drop"],
        },
    )
    on_bad_row: str = field(
        default="raise",
        metadata={
            "help": "A row or picture to train on that cannot be used: stop, or leave it out, name it in "
            "skipped_rows.jsonl in --output_dir, and stop when more than 1 % of the rows are bad. One to evaluate on "
            "always stops.",
            "choices": ["raise", "skip"],
        },
    )
    allow_external_images: bool = field(
        default=False, metadata={"help": "Accept pictures outside of --image_folder (absolute paths, .., links)."}
    )
    allow_remote_images: bool = field(
        default=False, metadata={"help": "Fetch pictures that rows name by an http(s) URL: 20 MB, 20 s at most."}
    )
    allow_pickled_weights: bool = field(
        default=False, metadata={"help": "Load a checkpoint whose weights are no safetensors (pytorch_model.bin)."}
    )
    image_tag_format: str | None = field(
        default=None, metadata={"help": "Words around each picture: '<Image>{}</Image>'. Saved in the chat template."}
    )
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={
            "help": "How a picture becomes square. Default: as the checkpoint does.",
            "choices": list(IMAGE_ASPECT_RATIOS),
        },
    )


def recipe_parser(recipe: dict, script_arguments: type = LlavaScriptArguments) -> TrlParser:
    """Build the parser of a training recipe: `recipe` < `--config file.yaml` < command line.

    Args:
        recipe: Default values by flag name.
        script_arguments: `LlavaScriptArguments` or a subclass with the recipe's own flags.

    Returns:
        A parser of `(script_arguments, LlavaSFTConfig, ModelConfig)`; `--model_name_or_path` and `--dataset_name` are
        required, abbreviated flags are refused.

    Raises:
        ValueError: `recipe` has a key that is no flag.
    """
    parser = TrlParser((script_arguments, LlavaSFTConfig, ModelConfig), allow_abbrev=False)
    for action in parser._actions:
        action.required |= action.dest in ("model_name_or_path", "dataset_name")
    if leftovers := parser.set_defaults_with_config(**recipe):
        raise ValueError(f"RECIPE has keys that are no flags: {' '.join(leftovers)}")
    return parser


def load_datasets(script_args: LlavaScriptArguments, training_args: LlavaSFTConfig) -> tuple:
    """Load the rows to train on and, if `--eval_strategy` asks for them, those to evaluate on.

    `--on_bad_row skip` is for the rows to train on. A slice of their file to evaluate on is cut from the rows that it
    leaves. Every process must call this: the first one claims `--output_dir` (`_faults.claim`), unless for a dry run.

    Returns:
        `(train_dataset, eval_dataset)`; the second is None without evaluation.

    Raises:
        ValueError: Evaluation is asked for, the data is one split (a JSON or Parquet file, a saved `Dataset`), and
            neither `--eval_dataset_name` nor a slice such as `--dataset_test_split train[90%:]` of the file is given;
            the data is streamed and `--max_steps` is not; or another run writes to `--output_dir`.
    """
    options = {
        "image_folder": script_args.image_folder,
        "name": script_args.dataset_config,
        "streaming": script_args.dataset_streaming,
        "placement": script_args.placement,
        "on_bad_row": script_args.on_bad_row,
        "allow_external_images": script_args.allow_external_images,
        "allow_remote_images": script_args.allow_remote_images,
        "number_rows": True,  # by which errors and skipped_rows.jsonl name a row
    }
    if script_args.dataset_streaming and training_args.max_steps <= 0:
        raise ValueError("--dataset_streaming has no length: pass --max_steps, so that the schedule knows its end")
    strict = {**options, "on_bad_row": "raise"}
    if not training_args.dry_run:
        if training_args.process_index == 0:
            claim(training_args.output_dir)
            if script_args.on_bad_row == "skip":
                options["skipped_rows"] = Path(training_args.output_dir, "skipped_rows.jsonl")
                if not resumes(training_args.resume_from_checkpoint):
                    options["skipped_rows"].unlink(missing_ok=True)  # of an earlier run
        training_args.distributed_state.wait_for_everyone()  # nobody counts the rows of the earlier run
    train = load_rows(script_args.dataset_name, split=script_args.dataset_train_split, **options)
    if script_args.dataset_streaming and training_args.shuffle_dataset:
        train = train.shuffle(seed=training_args.seed, buffer_size=SHUFFLE_BUFFER)
    if training_args.eval_strategy == "no":
        return train, None
    if script_args.eval_dataset_name:
        return train, load_rows(script_args.eval_dataset_name, split=script_args.dataset_test_split, **strict)
    is_file = script_args.dataset_name.lower().endswith((".json", ".jsonl", ".parquet"))
    is_single = Path(script_args.dataset_name, "state.json").is_file()
    if is_single or (is_file and "[" not in script_args.dataset_test_split):
        raise ValueError(
            f"--eval_strategy {training_args.eval_strategy.value}: {script_args.dataset_name} has no test split; pass "
            "--eval_dataset_name with held-out rows"
        )
    names = {split.partition("[")[0] for split in (script_args.dataset_train_split, script_args.dataset_test_split)}
    of_the_same_rows = is_file or len(names) == 1
    return train, load_rows(
        script_args.dataset_name,
        split=script_args.dataset_test_split,
        **(options if of_the_same_rows else strict),
    )
