"""`LlavaTrainer`, the one `SFTTrainer` subclass; each override names the upstream defect that it mends.

Kills, full disks, dead workers and the like are `_faults.py`'s, which is called from here.
"""

import contextlib
import copy
import logging
import os
import shlex
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import rich
import torch
from datasets import IterableDataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from _distributed import prepare_for_processes
from _faults import (
    LoaderCollator,
    StopConditions,
    check_data,
    check_finite,
    choose_checkpoint,
    explained_save,
    explained_worker_death,
    lone_run,
)
from _parts import PARTS, find_part, list_misfits, part_of
from _preflight import preflight
from _start_report import StartReport, Stop, plan_memory

logger = logging.getLogger(__name__)


@dataclass
class LlavaSFTConfig(SFTConfig):
    """`SFTConfig` with a learning rate for each part of a LLaVA, and what a run needs before it starts or resumes."""

    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. Default: --learning_rate."}
    )
    vision_tower_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: --learning_rate."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Do all up to the first step, print what would train, and stop."}
    )
    skip_preflight: bool = field(
        default=False, metadata={"help": "Start without a look at the first rows and the model."}
    )
    allow_changed_data: bool = field(
        default=False, metadata={"help": "Resume although the training data is not that of the checkpoint."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Put the mean loss in the place of NaN in logs. Without effect: a NaN loss ends the run."},
    )


def stop_token_ids(model, processor) -> list[int]:
    """The ids at which `generate` stops: those of the generation config, else the tokenizer's EOS."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = processor.tokenizer.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


class LlavaTrainer(SFTTrainer):
    """`SFTTrainer` that resumes what it saved, trains parts at their own rates, and leaves a frozen tower alone.

    Args:
        model: A Llava-family model whose parts are frozen, trainable (`_parts.train_only`) or have adapters
            (`_parts.add_adapters`) as wanted.
        args: A `LlavaSFTConfig`.
        **kwargs: As for `SFTTrainer`; `processing_class` and `data_collator` are required.

    Raises:
        ValueError: Several GPUs are visible to a plain `python` start; a flag of TRL's is set that has no effect on a
            collator's rows; `peft_config` is given; the tower has a learning rate but is frozen; the parameters are of
            several dtypes that no autocast joins, or bfloat16 under fp16; the generation config is one that could not
            be saved again; or the launcher cannot train this model (`_distributed.check_launcher`).
    """

    def __init__(self, model, args: LlavaSFTConfig, *, processing_class, data_collator, **kwargs):
        # TRL refuses nn.DataParallel too, after the model is on the GPU and without the line to type (trl 1.16).
        if args.n_gpu > 1 and len(set(getattr(model, "hf_device_map", {}).values())) < 2:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one plain python process. Use them all with\n"
                f"    accelerate launch --multi_gpu --num_processes {args.n_gpu} {shlex.join(sys.argv)}\n"
                f"or one of them with\n    CUDA_VISIBLE_DEVICES=0 python {shlex.join(sys.argv)}"
            )
        if kwargs.get("peft_config") is not None:
            raise ValueError("peft_config: pass a model that has its adapters (_parts.add_adapters) instead")
        _check_flags(args, kwargs.get("train_dataset"))
        _check_dtypes(model, args)
        check_generation_config(model)
        tokenizer = processing_class.tokenizer
        # With a data collator of one's own TRL leaves a missing pad token missing (trl 1.16).
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = stop_token_ids(model, processing_class)
        template = processing_class.chat_template
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        masters = {name: parameter.data for name, parameter in trained.items()} if _is_quantised(model) else {}
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        # TRL reads --chat_template_path again, so that tags put into the template would be lost on saving (trl 1.16).
        processing_class.chat_template = template
        # TRL rounds what trains beside a quantised model to bfloat16, in which most updates vanish (trl 1.16, where it
        # creates the PEFT model; huggingface/trl#4901 for fp16). Delete once it leaves them alone.
        for name, master in masters.items():
            trained[name].data = master
        self._without_gradient = set(trained)
        self._row_numbers = []  # of the batches since the last optimizer step
        self._first_rows = None  # of a stream (`_start_report.first_rows`)
        self._rates = self._part_learning_rates()
        tower = find_part(self.model, "vision_tower")
        tower.forward = types.MethodType(_forward_without_needless_gradients, tower)
        prepare_for_processes(self)
        # First of all, so that a dry run stops before a tracker starts a run of its own.
        self.callback_handler.callbacks.insert(0, StartReport(self))
        self._stop_conditions = StopConditions(self)
        self.add_callback(self._stop_conditions)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`, guarded against what befalls a run (docs/interrupted_runs.md).

        Args:
            resume_from_checkpoint: A checkpoint. True, "True" (from a command line) or "last": the newest complete
                one.
            **kwargs: As for `Trainer.train`.

        Raises:
            ValueError: The checkpoint is not complete (`_faults.choose_checkpoint`); it was trained on other data, or
                the processes have different data (`_faults.check_data`); the first rows or the model have errors
                (`_preflight.preflight`); another run writes to the output folder (`_faults.lone_run`); a loss or a
                gradient is not finite (`_faults.check_finite`); or too many rows were skipped
                (`_faults.StopConditions`).
            OSError: A checkpoint could not be written (`_faults.explained_save`).
            SystemExit: SIGTERM came; a checkpoint has been saved.
        """
        output_dir, is_main, self._first_rows = self.args.output_dir, self.is_world_process_zero(), None
        checkpoint = choose_checkpoint(resume_from_checkpoint, output_dir, log=is_main)
        with lone_run(output_dir, is_main=is_main), self._stop_conditions.listening(), explained_worker_death():
            check_data(self, checkpoint)
            if not self.args.skip_preflight:
                preflight(self)
            self._row_numbers.clear()
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def dry_run(self) -> None:
        """Do what `train` does before its first step, resuming left out, and print what would train; write nothing."""
        if not self.args.skip_preflight:
            preflight(self)
        plan = plan_memory(self) if self.is_world_process_zero() else []
        with contextlib.suppress(Stop):
            super().train()
        for part in plan:
            rich.print(part)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As `SFTTrainer.training_step`; a parameter that trains in name only is an error after the first backward.

        The tower and the projector are judged after the first batch with a picture. Not checked under DeepSpeed, which
        takes the gradients away during the backward pass.
        """
        seen = PARTS if "pixel_values" in inputs else ("language_model",)
        loss = super().training_step(model, inputs, num_items_in_batch)
        # FSDP2 keeps accumulated gradients elsewhere until it reduces them.
        if self._without_gradient and self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    self._without_gradient.discard(name)
            if idle := sorted(name for name in self._without_gradient if part_of(name) in seen):
                raise ValueError(
                    f"{', '.join(idle[:5])} ({len(idle)} in all): set to train, but the loss does not depend on them, "
                    "so they get no gradient; freeze them, or take them out of the adapter's target modules"
                )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `SFTTrainer.compute_loss`; a training loss that is not finite is an error before the backward pass.

        Trainer makes the step all the same, and hides the loss from the log (`logging_nan_inf_filter`, 5.23).
        """
        rows = inputs.pop("row_numbers", None)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            self._row_numbers.append(rows)
            check_finite(self, result[0] if return_outputs else result, "the loss", [rows])
        return result

    def _get_grad_norm(self, model, grad_norm=None):
        """As `Trainer._get_grad_norm`; a norm that is not finite is an error before the optimizer's step (as above).

        Not under fp16, whose scaler finds its scale by such norms and skips their steps, nor under DeepSpeed, which
        has made its step by now.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            check_finite(self, norm, "the norm of the gradient", self._row_numbers)
        self._row_numbers.clear()
        return norm

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        """As `Trainer._get_dataloader`; batches come with the numbers of their rows (`_faults.LoaderCollator`).

        `on_bad_row="skip"` is for training alone: a score over fewer rows would be another score.
        """
        collator = self.data_collator
        used = copy.copy(collator)
        if not is_training and hasattr(used, "on_bad_row"):
            used.on_bad_row = "raise"
        self.data_collator = LoaderCollator(collator if is_training else used)
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Split off parameter groups for parts with a learning rate of their own; the others stay first.

        Done on the finished optimizer, since `optimizers=` breaks FSDP2. Trainer has no per-part rates at all.
        """
        built = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if built:
            return optimizer
        names = {id(parameter): name for name, parameter in (model or self.model).named_parameters()}
        for group in list(optimizer.param_groups):
            by_part = {part: [] for part in PARTS}
            for parameter in group["params"]:
                by_part[part_of(names[id(parameter)])].append(parameter)
            group["params"] = [p for part in PARTS if self._rates[part] is None for p in by_part[part]]
            for part in PARTS:
                if self._rates[part] is not None and by_part[part]:
                    optimizer.add_param_group({**group, "params": by_part[part], "lr": self._rates[part]})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _part_learning_rates(self) -> dict[str, float | None]:
        rates = {
            "vision_tower": self.args.vision_tower_learning_rate,
            "multi_modal_projector": self.args.projector_learning_rate,
            "language_model": None,
        }
        trained = {part_of(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if rates["vision_tower"] is not None and "vision_tower" not in trained:
            raise ValueError(
                f"--vision_tower_learning_rate {rates['vision_tower']}: the vision_tower is frozen in this run; drop "
                "the flag or train the part"
            )
        # No error: a recipe may have a rate for the projector that its user freezes.
        if rates["multi_modal_projector"] is not None and "multi_modal_projector" not in trained:
            logger.warning("the projector is frozen: its learning rate has no effect")
        return rates

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load a checkpoint's weights for real.

        Trainer loads them with `strict=False` under the hub's key names, so that nothing of a Llava matches and the
        run goes on from the base weights with a warning (huggingface/transformers#43701). Delete once that is mended.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As `_load_from_checkpoint`, for `--load_best_model_at_end` (huggingface/transformers#43701)."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        self._load_weights(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model, trial) -> None:
        """As `SFTTrainer._save_checkpoint`; an error says what to do, and takes the unfinished folder away."""
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with explained_save(self, folder, unfinished=True):
            if self.args.should_save:  # an older one's would make a save complete that is cut short
                (folder / "trainer_state.json").unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; an error says what to do."""
        if _internal_call:  # by `_save_checkpoint`
            return super().save_model(output_dir, _internal_call)
        with explained_save(self, output_dir or self.args.output_dir, unfinished=False):
            super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        """As `Trainer._save_rng_state`, then wait: next comes `trainer_state.json`, the mark that all have saved."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_weights(self, folder: str) -> None:
        if isinstance(self.model, PeftModel):
            load_adapter_weights(self.model, folder)
        else:
            load_weights(self.model, folder)


def _forward_without_needless_gradients(self, *args, **kwargs):
    """A vision tower's forward: without gradients as long as nothing in it trains.

    Gradient checkpointing hooks the embeddings of a frozen tower too (`enable_input_require_grads`), which then pays
    for a backward pass (transformers 5.23). Delete once that hooks only what trains.
    """
    trains = any(parameter.requires_grad for parameter in self.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        return type(self).forward(self, *args, **kwargs)


def load_weights(model: torch.nn.Module, folder: str | os.PathLike) -> None:
    """Load the checkpoint in `folder` into `model`, tensor for tensor, through `from_pretrained`.

    Needs host memory for one float32 copy of the model a process, so that no stored precision is lost on the way.

    Raises:
        ValueError: A parameter is missing from the checkpoint, unknown to the model, or of another shape.
    """
    loaded, report = type(model).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if problems:
        listing = "; ".join(f"{kind}: {', '.join(keys[:5])} ({len(keys)} in all)" for kind, keys in problems.items())
        raise ValueError(f"{folder} is no checkpoint of this {type(model).__name__}: {listing}")
    model.load_state_dict(loaded.state_dict(), strict=True)


def load_adapter_weights(model: PeftModel, folder: str | os.PathLike) -> None:
    """Load the adapter (and projector) in `folder` into `model`, tensor for tensor.

    PEFT's own `load_adapter`, which Trainer calls, lets missing keys pass with a warning (peft 0.21).

    Raises:
        ValueError: there is no adapter in `folder`, or it has tensors that the model lacks, lacks some that it has, or
            has some of another shape.
    """
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{folder} holds no {file.name}: expected a checkpoint of a run with adapters")
    found = load_file(file)
    if faults := list_misfits(found, get_peft_model_state_dict(model)):
        raise ValueError(
            f"{file} is not of this run: {'; '.join(faults[:5])} ({len(faults)} in all); resume with the flags that "
            "it was started with"
        )
    set_peft_model_state_dict(model, found)


# What TRL does for rows that it tokenises itself; with a collator of one's own these would be ignored in silence.
IDLE_FLAGS = {
    "assistant_only_loss": "use --train_on",
    "completion_only_loss": "use --train_on",
    "shuffle_dataset": "the sampler shuffles every epoch as it is",
    "pad_token": "set it in the checkpoint's tokenizer",
    "eos_token": "set it in the checkpoint's tokenizer and generation config",
    "model_init_kwargs": "use --dtype, --attn_implementation, --model_revision",
    "dataset_kwargs": "use --dataset_name, --dataset_config and the split flags",
    "dataset_num_proc": "use --dataloader_num_workers",
}


def _check_flags(args, train_dataset) -> None:
    for flag, remedy in IDLE_FLAGS.items():
        if flag == "shuffle_dataset" and isinstance(train_dataset, IterableDataset):
            continue  # load_datasets has shuffled the stream
        if getattr(args, flag):
            raise ValueError(f"--{flag} has no effect on rows with pictures, which the collator reads: {remedy}")


def check_generation_config(model) -> None:
    """Refuse a generation config that `save_pretrained` would refuse after the work is done.

    Raises:
        ValueError: it contradicts itself, such as a temperature without sampling.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint's generation config could not be saved again ({error}): mend its generation_config.json, "
            'for example with "do_sample": true beside a temperature'
        ) from error


def _is_quantised(model) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def _check_dtypes(model, args) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) > 1 and not (args.bf16 or args.fp16):
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"the frozen parts and the trained ones are of several dtypes ({found}), and neither --bf16 nor --fp16 "
            "joins them: pass --dtype float32, or turn --bf16 on"
        )
    if args.fp16 and torch.bfloat16 in dtypes:
        raise ValueError(
            "--fp16 beside bfloat16 weights, which cards without bfloat16 cannot use: pass --dtype float16"
        )
