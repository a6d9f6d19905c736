"""What befalls a run while it trains, and what is done about it; for its user: docs/interrupted_runs.md.

A file of its own beside `_trainer.py`: that mends what upstream computes wrongly, this stands between a run and the
world around it: kills, full disks, other data, dead workers, schedulers, a second run, bad rows.
"""

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
import xxhash
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import get_worker_info
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from _start_report import FIRST_ROWS, first_rows
from collators.llava_json import MAX_BAD_SHARE

logger = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM  # exit status, as a shell gives it
SAME_REQUEST = 5  # seconds: a scheduler signals all processes of a job, and their launcher passes its own signal on
HASHED_AT_ONCE = 10_000  # rows
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError, CheckpointException)
# What a RuntimeError of torch.save has in it when a write failed; others may come out of anywhere (torch 2.13).
FAILED_WRITES = ("inline_container", "PytorchStreamWriter", "iostream")


# Checkpoints


def find_fault(checkpoint: str | os.PathLike) -> str | None:
    """Say what keeps a run from going on from a checkpoint, without loading it; None if nothing does.

    A killed save lacks `trainer_state.json`, which is written last. A full disk, a power cut or a copy under way leave
    files cut short: safetensors tell their length in their header, torch's files are zip archives with their table at
    the end.

    Returns:
        A predicate to put behind the checkpoint's name, such as `"holds no trainer_state.json (…)"`.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "does not exist"
    state = folder / "trainer_state.json"
    if not state.is_file():
        return "holds no trainer_state.json, which is written last (the save was cut short)"
    try:
        if "global_step" not in json.loads(state.read_text("utf-8")):
            return "holds a trainer_state.json without global_step"
    except (ValueError, TypeError) as error:
        return f"holds a trainer_state.json that is cut short ({error})"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                return f"holds a {file.name} that is cut short ({error})"
        elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            return f"holds a {file.name} that is cut short"
        elif file.name.endswith(".index.json"):
            try:
                shards = set(json.loads(file.read_text("utf-8"))["weight_map"].values())
            except (ValueError, TypeError, KeyError) as error:
                return f"holds a {file.name} that is cut short ({error})"
            if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
                return f"lacks {', '.join(missing)}, which {file.name} names"
    zero = (folder / "latest").is_file()  # ZeRO keeps all in a folder that this file names
    if not (zero or list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*"))):
        return "holds no adapter_model.safetensors and no model.safetensors"
    optimizer = any((folder / name).is_file() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"))
    # Trainer loads neither optimizer nor scheduler if one of them is missing, and says nothing (transformers 5.23).
    if not zero and not (optimizer and (folder / "scheduler.pt").is_file()):
        return (
            "holds no optimizer state (cut short while it was written, or written with --save_only_model), so a "
            "resumed run would differ in silence; to start a new run from it pass it as --model_name_or_path"
        )
    return None


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The `checkpoint-N` folders, the newest (highest N) first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def newest_complete(output_dir: str | os.PathLike) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint without a fault, and describe the faults of those that are newer."""
    faults = []
    for folder in list_checkpoints(output_dir):
        fault = find_fault(folder)
        if fault is None:
            return folder, faults
        faults.append(f"{folder} {fault}")
    return None, faults


def resumes(wanted: str | bool | None) -> bool:
    """Whether a value of `--resume_from_checkpoint` asks for one."""
    return str(wanted).lower() not in ("none", "false")


def choose_checkpoint(wanted: str | bool | None, output_dir: str, *, log: bool) -> str | None:
    """Resolve `--resume_from_checkpoint`: a path, "True" or "last" for the newest complete one, "False" or None.

    Args:
        wanted: The flag's value, or a bool from Python.
        output_dir: Where "True" looks.
        log: Whether this process names checkpoints that are passed over, or in the way of a fresh start.

    Raises:
        ValueError: The checkpoint at the path is not complete, or there is no complete one.
    """
    if not resumes(wanted):
        if log and (present := list_checkpoints(output_dir)):
            logger.warning(
                "%s holds %s from an earlier run: a later --resume_from_checkpoint True takes the highest number, "
                "whichever run wrote it. Move the old ones away, or take another --output_dir.",
                output_dir,
                ", ".join(folder.name for folder in present[:5]),
            )
        return None
    if str(wanted).lower() in ("true", "last"):
        newest, faults = newest_complete(output_dir)
        if newest is None:
            found = "".join(f"\n  {fault}" for fault in faults)
            raise ValueError(
                f"--resume_from_checkpoint: {output_dir} holds no complete checkpoint; start without the flag{found}"
            )
        for fault in faults if log else []:
            logger.warning("%s; resuming from %s instead", fault, newest)
        return str(newest)
    if fault := find_fault(wanted):
        newest, _ = newest_complete(Path(wanted).parent)
        remedy = f"the newest complete checkpoint beside it is {newest}" if newest else "none beside it is complete"
        raise ValueError(f"--resume_from_checkpoint: {wanted} {fault}; {remedy}")
    return str(wanted)


@contextlib.contextmanager
def explained_save(trainer, folder: str | os.PathLike, *, unfinished: bool) -> Iterator[None]:
    """Turn the error of a save that failed into one that says where, why and what to type.

    torch.save's own message for a full disk is "unexpected pos 704 vs 598" (torch 2.13).

    Args:
        trainer: The `LlavaTrainer` that saves.
        folder: Where to.
        unfinished: Remove the folder, unless all of it has been written.

    Raises:
        OSError: The save failed.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in FAILED_WRITES):
            raise
        output_dir = Path(trainer.args.output_dir)
        free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else 0
        if unfinished and trainer.args.should_save and find_fault(folder):
            shutil.rmtree(folder, ignore_errors=True)
        newest, _ = newest_complete(output_dir)
        remedy = "No checkpoint is complete, so start again"
        if newest:
            remedy = f"{newest} is complete, so give the same command with --resume_from_checkpoint True"
        reason = " ".join(str(error).split())
        raise OSError(
            f"{folder} could not be saved ({type(error).__name__}: {reason}). The disk has {free:,} bytes free; a "
            f"quota may leave less. Make room, for example with a lower --save_total_limit. {remedy}."
        ) from error


# The rows that a run trains on


class TrainingData(TrainerCallback, ExportableState):
    """Keeps in each checkpoint's `trainer_state.json` which rows were trained on.

    Args:
        rows: How many; None for a stream.
        digest: Their hash.
    """

    def __init__(self, rows: int | None, digest: str):
        self.rows = rows
        self.digest = digest

    def state(self) -> dict:
        return {"args": {"rows": self.rows, "digest": self.digest}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed state knows the callbacks of its checkpoint alone; Trainer fails on any other while it saves
        # (KeyError in `_save_checkpoint`, transformers 5.23).
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def __str__(self) -> str:
        return f"{'a stream' if self.rows is None else f'{self.rows:,} rows'}, hash {self.digest}"


def identify(dataset) -> TrainingData:
    """Hash the `messages` of all rows, and `image` or `images` where they are paths; of a stream its first rows.

    Row after row by value, whatever file or cache they lie in: a million rows of 1 KB take about a second.
    """
    digest = xxhash.xxh3_64()
    if not isinstance(dataset, Dataset):
        rows = [row.get("messages") for row in islice(iter(dataset), FIRST_ROWS)]
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
        return TrainingData(None, digest.hexdigest())
    table = dataset.data.table
    paths = [name for name in ("image", "images") if name in table.column_names and _holds_text(table[name].type)]
    _hash_table(table.select(["messages", *paths] if "messages" in table.column_names else paths), digest)
    if dataset._indices is not None:
        _hash_table(dataset._indices.table, digest)
    return TrainingData(len(dataset), digest.hexdigest())


def _holds_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind)


def _hash_table(table: pa.Table, digest) -> None:
    digest.update(str(table.schema.remove_metadata()).encode())
    for start in range(0, table.num_rows, HASHED_AT_ONCE):
        # Copied in pieces of one length: how the rows lie in a file, and what is beside them, stays out of the hash.
        piece = table.slice(start, HASHED_AT_ONCE).combine_chunks()
        for batch in piece.take(pa.array(range(len(piece)))).to_batches():
            digest.update(batch.serialize())


def check_data(trainer, checkpoint: str | None) -> None:
    """Refuse to resume on other rows than the checkpoint was trained on, and note the rows for the next checkpoints.

    Trainer skips as many batches as were trained, of whatever data it is given: some rows would train twice, others
    never. Every process must call this.

    Raises:
        ValueError: The rows differ, and `allow_changed_data` is not set; or those of the processes differ.
    """
    data = _identify_everywhere(trainer)
    trainer.remove_callback(TrainingData)  # of an earlier call of `train`
    trainer.add_callback(data)
    if checkpoint is None:
        return
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text("utf-8"))
    known = state.get("stateful_callbacks", {}).get(TrainingData.__name__)
    if known is None:
        if trainer.is_world_process_zero():
            logger.warning("%s does not say which rows it was trained on; they are not compared", checkpoint)
        return
    before = TrainingData(**known["args"])
    if str(before) == str(data):
        return
    change = f"{checkpoint} was trained on {before}; the training data now is {data}"
    if not trainer.args.allow_changed_data:
        raise ValueError(
            f"{change}. Trainer skips rows by their number, so a resumed run would train some rows twice and others "
            "never. Restore the data and its flags; or start a new run with the checkpoint as --model_name_or_path; "
            "or, if the change is meant, pass --allow_changed_data True."
        )
    if trainer.is_world_process_zero():
        logger.warning("%s; resuming all the same (--allow_changed_data)", change)


def _identify_everywhere(trainer) -> TrainingData:
    """As `identify`, agreed over all processes; a stream, which may be slow to open, is read by the first one alone.

    A process with fewer rows, because pictures are missing on its machine, would end an epoch before the others, which
    then wait for it without end.
    """
    if not isinstance(trainer.train_dataset, Dataset):
        box = [identify(first_rows(trainer)) if trainer.is_world_process_zero() else None]
        return broadcast_object_list(box)[0]
    data = identify(trainer.train_dataset)
    if trainer.args.world_size > 1:
        everywhere = gather_object([str(data)])
        if other := [f"process {place}: {found}" for place, found in enumerate(everywhere) if found != everywhere[0]]:
            raise ValueError(
                f"the processes have different training rows: process 0: {everywhere[0]}; {'; '.join(other[:5])} "
                f"({len(other)} of {len(everywhere)} differ from process 0). Look for a file or a picture that is "
                "missing, or another one, on one of the machines."
            )
    return data


# Loader workers


class LoaderCollator:
    """What the data loader calls: a collator's batch, and `row_numbers`, int64 `(rows,)`, if all rows have a `_row`.

    Args:
        collator: Makes the batch.
    """

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if get_worker_info() is not None:
            _heed_parent_alone()
        batch = self.collator(rows)
        numbers = [row.get("_row") for row in rows]
        if None not in numbers:
            batch["row_numbers"] = torch.tensor(numbers, dtype=torch.int64)
        return batch


@functools.cache
def _heed_parent_alone() -> None:
    """In a loader worker: end at the parent's SIGTERM, but at nobody else's.

    SLURM and systemd signal all processes of a job at once. A worker that died of it would end the run with an error
    before the step is finished and saved.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def explained_worker_death() -> Iterator[None]:
    """Say what to do about a data loader worker that died, which torch notices at once but does not explain."""
    try:
        try:
            yield
        except (ConnectionError, EOFError):
            # The pipe broke first. Torch's error comes a moment later, out of a signal handler, wherever the process
            # is by then: while it prints its last traceback, for one, which is lost (torch 2.13).
            time.sleep(1)
            raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            error.add_note(
                "A process that reads rows died. Killed: the machine ran out of memory, most often; pass a lower "
                "--dataloader_num_workers, or 0 to see the error of a row that crashes its reader. Then go on with "
                "the same command and --resume_from_checkpoint True."
            )
        raise


# Numbers that are not finite


def check_finite(trainer, value: torch.Tensor | float, what: str, batches: list[torch.Tensor | None]) -> None:
    """Stop before a NaN or an infinity reaches the weights, and say where it came from.

    Args:
        trainer: The `LlavaTrainer` that trains.
        value: A loss or a norm.
        what: Its name.
        batches: `row_numbers` of the batches it came from; None where rows have no number.

    Raises:
        ValueError: `value` is not finite.
    """
    value = torch.as_tensor(value).detach().item()
    if math.isfinite(value):
        return
    rows = "rows unknown (the data has no column _row)"
    if batches and all(batch is not None for batch in batches):
        rows = "rows " + ", ".join(str(row) for batch in batches for row in batch.tolist())
    if trainer.args.world_size > 1:
        rows += f" of process {trainer.args.process_index}"
    broken = [name for name, parameter in trainer.model.named_parameters() if not _is_finite(parameter)]
    if broken:
        verdict = (
            f"{broken[0]} ({len(broken)} parameters in all) is not finite either, so an earlier step did the harm: go "
            "back to an older checkpoint with a lower --learning_rate, or with --bf16 in place of --fp16."
        )
    else:
        verdict = (
            "All weights are finite, so look at those rows (numbers from 0 in the training data), and whether "
            "--learning_rate is too high; after that go on with --resume_from_checkpoint True."
        )
    raise ValueError(f"step {trainer.state.global_step + 1}: {what} is {value}; {rows}. {verdict}")


def _is_finite(parameter: torch.nn.Parameter) -> bool:
    """Judge the slice that this process holds: the others may wait elsewhere."""
    local = getattr(parameter, "ds_tensor", parameter)
    local = local.to_local() if hasattr(local, "to_local") else local
    return not local.is_floating_point() or bool(torch.isfinite(local).all())


# Between two steps


class SkippedRows:
    """Counts what `on_bad_row="skip"` of the collator has written into its file, reading only what is new.

    Args:
        path: The file; it may not be there yet.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._read = 0
        self._reasons: dict[tuple[str, str, str], None] = {}

    def count(self) -> int:
        """How many rows were skipped: the same row, once an epoch, counts once."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return 0
        if size > self._read:
            with self.path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # another process is writing it
                    self._read += len(line)
                    record = json.loads(line)
                    self._reasons[str(record["row"]), str(record["id"]), record["reason"]] = None
        return len(self._reasons)

    def first_reasons(self) -> str:
        return "".join(f"\n  {reason}" for *_, reason in islice(self._reasons, 3))


class StopConditions(TrainerCallback):
    """After each step, agreed over all processes: stop at SIGTERM, and at too many skipped rows.

    At SIGTERM a checkpoint is saved, no evaluation run, and the process left with status 143, so that a scheduler can
    start the job again. A second one, `SAME_REQUEST` seconds later or more, acts as if nobody listened.

    Args:
        trainer: The `LlavaTrainer` that trains.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._asked = None  # when SIGTERM came
        self._leaving = False
        collator = trainer.data_collator
        skips = getattr(collator, "on_bad_row", None) == "skip" and collator.skipped_rows is not None
        self._skipped = SkippedRows(collator.skipped_rows) if skips else None
        # Rows that load_rows left out, which the data lacks. On a resume also those that the collator has skipped so
        # far: then the limit of `_rows` is a little too high, by one in a hundred at most.
        self._left_out = self._skipped.count() if skips else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGTERM for as long as the block runs; in the main thread, since no other may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._asked, self._leaving, owner = None, False, os.getpid()

        def ask(number, frame):
            now = time.monotonic()
            self._asked = self._asked or now
            if os.getpid() != owner or now - self._asked >= SAME_REQUEST:  # a child has inherited this
                signal.signal(number, previous)
                os.kill(os.getpid(), number)

        previous = signal.signal(signal.SIGTERM, ask) or signal.SIG_DFL
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def on_step_end(self, args, state, control, **kwargs):
        asked, skipped = self._agree(self._asked is not None, self._skipped.count() if self._skipped else 0, args)
        if skipped > MAX_BAD_SHARE * self._rows(args, state):
            raise ValueError(
                f"{self._skipped.path} names {skipped:,} rows that were skipped, more than {MAX_BAD_SHARE:.0%} of the "
                f"{self._rows(args, state):,} to train on, so the data is wrong, not a few rows of it. Nothing was "
                f"saved since. The first:{self._skipped.first_reasons()}"
            )
        if asked:
            control.should_save, control.should_evaluate, self._leaving = True, False, True
            args.save_only_model = False  # the job is to go on from this checkpoint
        return control

    def on_save(self, args, state, control, **kwargs):
        if not self._leaving:
            return
        self.trainer.accelerator.wait_for_everyone()  # a launcher kills the others when the first process ends
        if state.is_world_process_zero:
            logger.warning(
                "SIGTERM: saved checkpoint-%d, leaving with status %d. Go on with the same command and "
                "--resume_from_checkpoint True.",
                state.global_step,
                TERMINATED,
            )
        self.trainer.end()
        raise SystemExit(TERMINATED)

    def _rows(self, args, state) -> int:
        rows = self.trainer.train_dataset
        if isinstance(rows, Dataset):
            return len(rows) + self._left_out
        return state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    @staticmethod
    def _agree(asked: bool, skipped: int, args) -> tuple[bool, int]:
        """The largest of all processes."""
        if args.world_size == 1:
            return asked, skipped
        values = torch.tensor([int(asked), skipped], device=args.device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        asked, skipped = values.tolist()
        return bool(asked), skipped


# Two runs


_LOCKS: dict[Path, FileLock] = {}  # of this process


def claim(output_dir: str | os.PathLike) -> FileLock:
    """Take the lock of an output folder before anything in it is touched; a process may do so more than once.

    The system releases it whatever way a process ends.

    Raises:
        ValueError: Another run holds it.
    """
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _LOCKS.setdefault(folder, FileLock(folder / ".run.lock", blocking=False, thread_local=False))
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run is writing to {output_dir} (it holds .run.lock there): wait for it or end it, or pass "
            "another --output_dir"
        ) from None
    return lock


@contextlib.contextmanager
def lone_run(output_dir: str | os.PathLike, *, is_main: bool) -> Iterator[None]:
    """`claim` an output folder for a block, after which it is free, whoever in this process claimed it before."""
    if not is_main:
        yield
        return
    lock = claim(output_dir)
    try:
        yield
    finally:
        lock.release(force=True)
