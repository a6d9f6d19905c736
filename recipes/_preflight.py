"""The cheap part of the doctor, before step 0 of every training run: the first rows, and the model as it will train.

A file of its own: `_trainer.py` calls it, and it draws on the doctor's checks, which know no trainer.
"""

import copy
from itertools import islice

from accelerate.utils import broadcast_object_list
from rich.console import Console

from _findings import Findings, Place
from _label_checks import LabelChecks
from _lengths import LengthCounter
from _model_checks import check_config, check_model
from _row_checks import PictureChecks, RowChecks, template_words
from _start_report import first_rows
from collators import LlavaDataCollator

ROWS = 256  # whose texts and picture headers are looked at
ROWS_COLLATED = 8


def preflight(trainer) -> None:
    """Check the first rows and the model; print warnings once, on the main process.

    Every process must call it. With `on_bad_row="skip"` a row that cannot be used is a warning.

    Args:
        trainer: A built `LlavaTrainer` before its first step.

    Raises:
        ValueError: On every process: an error was found; all are listed, each with its first row.
    """
    errors = []
    if trainer.is_world_process_zero():
        findings = _look(trainer)
        errors = findings.lines("error")
        warnings = findings.lines("warning")
        console = Console(markup=False, highlight=False, soft_wrap=True)
        if warnings:
            console.print(f"pre-flight over the first {ROWS} rows: {len(warnings)} kind(s) of warnings")
        for line in warnings:
            console.print(f"  {line}")
    if trainer.args.world_size > 1:
        told = [errors]
        broadcast_object_list(told)
        (errors,) = told
    if errors:
        raise ValueError(
            "\n  ".join([f"pre-flight: {len(errors)} kind(s) of errors", *errors])
            + "\nrecipes/inspect_data.py looks at all rows; --skip_preflight starts all the same."
        )


def _look(trainer) -> Findings:
    collator, processor = trainer.data_collator, trainer.processing_class
    findings = Findings(skips_rows=getattr(collator, "on_bad_row", "raise") == "skip")
    model, data = trainer.accelerator.unwrap_model(trainer.model), "training data"
    name = Place(getattr(model.config, "name_or_path", "") or type(model).__name__)
    check_config(findings, name, model.config, processor)
    check_model(findings, name, model)

    chat_template = getattr(collator, "chat_template", None) or processor.chat_template
    checks = RowChecks(findings, template_words(processor, chat_template))
    pictures = PictureChecks(findings)  # URLs wait until a batch needs them
    rows = []
    for number, row in enumerate(islice(iter(first_rows(trainer)), ROWS)):
        place = Place(data, row.get("_row", number), row.get("id"))
        rows.append((place, row))
        if isinstance(row.get("messages"), list) and isinstance(row.get("images"), list):
            checks(place, row)
            pictures(place, row["images"])
    if isinstance(collator, LlavaDataCollator):
        trained = copy.copy(collator)
        trained.on_bad_row = "raise"  # nothing is skipped yet
        strict = trained
        if trained.train_on != "assistant":
            strict = copy.copy(trained)
            strict.train_on = "assistant"
        counter = LengthCounter(processor, chat_template)
        LabelChecks(findings, trained, strict, counter, show=False)(rows[:ROWS_COLLATED])
    return findings
