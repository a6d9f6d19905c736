"""What befalls a run: kills, a full disk, other data, dead workers, NaN, SIGTERM, a second run, bad rows."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import psutil
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import sft_full
import tiny
from _arguments import load_datasets
from _faults import (
    SkippedRows,
    StopConditions,
    check_data,
    choose_checkpoint,
    find_fault,
    identify,
    list_checkpoints,
    lone_run,
    newest_complete,
)
from _parts import train_only
from _start_report import first_rows
from _trainer import LlavaSFTConfig, LlavaTrainer
from collators import LlavaDataCollator, chat_template_path
from launch import DEADLINE, accelerate
from runs import command, losses

STEPS = 60
# At a constant rate a run of a few steps has the first losses of one of many.
FLAGS = ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", "3e-3", "--save_steps", "2"]
FLAGS += ["--save_total_limit", "100"]
RESUME = ["--resume_from_checkpoint", "True"]


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """The losses of a run that nothing befell."""
    out = tmp_path_factory.mktemp("whole")
    sft_full.main(command("sft_full", base(), data, out, *FLAGS, "--save_strategy", "no", "--max_steps", str(STEPS)))
    assert len(losses(out)) == STEPS
    return losses(out)


@pytest.fixture(scope="module")
def saved(base, data, tmp_path_factory):
    """The folder of a run of four steps: checkpoint-2 and checkpoint-4."""
    out = tmp_path_factory.mktemp("saved")
    sft_full.main(command("sft_full", base(), data, out, *FLAGS, "--max_steps", "4"))
    return out


@pytest.fixture
def run(saved, tmp_path):
    """A copy of `saved`, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


class Run(subprocess.Popen):
    """The recipe in a process of its own, its output in a file; killed when its block ends."""

    def __init__(self, argv: list[str], log: Path):
        self._log = log
        with log.open("w") as file:
            super().__init__([sys.executable, sft_full.__file__, *argv], stdout=file, stderr=subprocess.STDOUT)

    def __exit__(self, *error):
        self.kill()
        super().__exit__(*error)

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + DEADLINE
        while not path.exists():
            assert self.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.001)


# Killed


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_from_its_newest_complete_checkpoint(base, data, whole, tmp_path):
    """SIGKILL of real processes, one after the other on one folder: between saves, and twice while one is written."""
    out, log, chance = tmp_path / "out", tmp_path / "log", random.Random(0)
    argv = command("sft_full", base(), data, out, *FLAGS, "--max_steps", str(STEPS))
    for within_a_save in (False, True, True, False):
        before, passed_over = newest_complete(out)
        step = 4 + (int(before.name.rpartition("-")[2]) if before else 0)
        with Run([*argv, *(RESUME if before else [])], log) as process:
            folder = out / f"checkpoint-{step}"
            shutil.rmtree(folder, ignore_errors=True)  # of the process before, cut short
            process.wait_for(folder if within_a_save else folder / "trainer_state.json")
            delay = chance.uniform(0, 0.03 if within_a_save else 0.3)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        print(f"SIGKILL {delay:.3f} s after {folder.name}; then {newest_complete(out)}")
        assert process.returncode == -signal.SIGKILL
        for fault in passed_over:
            assert f"{fault}; resuming from {before} instead" in process.printed
    assert not (out / f"checkpoint-{STEPS}").exists()
    sft_full.main([*argv, *RESUME])
    assert losses(out) == whole


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def name_a_missing_shard(folder: Path) -> None:
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))


TEARS = {
    "no trainer_state.json, which is written last": lambda folder: (folder / "trainer_state.json").unlink(),
    "a trainer_state.json that is cut short": lambda folder: cut(folder / "trainer_state.json"),
    "a trainer_state.json without global_step": lambda folder: (folder / "trainer_state.json").write_text("{}"),
    "a model.safetensors that is cut short": lambda folder: cut(folder / "model.safetensors", 0.999),
    "model-00002-of-00002.safetensors, which model.safetensors.index.json names": name_a_missing_shard,
    "a optimizer.pt that is cut short": lambda folder: cut(folder / "optimizer.pt", 0.999),
    "no optimizer state": lambda folder: (folder / "optimizer.pt").unlink(),
    "no optimizer state (cut": lambda folder: (folder / "scheduler.pt").unlink(),
    "no adapter_model.safetensors and no model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "not exist": shutil.rmtree,
}


@pytest.mark.parametrize("fault", TEARS)
def test_a_torn_checkpoint_is_passed_over_and_refused(fault, run, caplog):
    assert find_fault(run / "checkpoint-4") is None
    TEARS[fault](run / "checkpoint-4")
    assert fault in find_fault(run / "checkpoint-4")
    assert choose_checkpoint("True", str(run), log=True) == str(run / "checkpoint-2")
    assert (f"{run}/checkpoint-4" in caplog.text) == (fault != "not exist")
    with pytest.raises(ValueError) as error:
        choose_checkpoint(str(run / "checkpoint-4"), "elsewhere", log=False)
    assert fault in str(error.value)
    assert str(error.value).endswith(f"the newest complete checkpoint beside it is {run}/checkpoint-2")


def test_if_all_are_torn_each_is_named(run):
    cut(run / "checkpoint-2" / "model.safetensors")
    cut(run / "checkpoint-4" / "trainer_state.json")
    with pytest.raises(ValueError, match="no complete checkpoint.*without the flag\n.*-4 holds.*\n.*-2 holds a model"):
        choose_checkpoint(True, str(run), log=False)


def test_a_fresh_start_beside_old_checkpoints_warns(run, tmp_path, caplog):
    assert choose_checkpoint(None, str(run), log=False) is None and not caplog.text
    assert choose_checkpoint("false", str(tmp_path / "new"), log=True) is None and not caplog.text
    assert choose_checkpoint(None, str(run), log=True) is None
    assert "holds checkpoint-4, checkpoint-2 from an earlier run" in caplog.text


def test_a_save_cut_short_over_an_older_checkpoint_is_torn(run, base, data, monkeypatch):
    def die(self, folder):
        raise KeyboardInterrupt

    assert find_fault(run / "checkpoint-4") is None
    monkeypatch.setattr(LlavaTrainer, "_save_optimizer_and_scheduler", die)
    with pytest.raises(KeyboardInterrupt):
        sft_full.main(command("sft_full", base(), data, run, *FLAGS, "--max_steps", "4", "--save_steps", "4"))
    assert "no trainer_state.json, which is written last" in find_fault(run / "checkpoint-4")


# A full disk


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_a_full_disk_while_saving(file, base, data, whole, tmp_path, monkeypatch):
    """ENOSPC from the system itself, in the middle of a save."""
    argv = command("sft_full", base(), data, tmp_path, *FLAGS, "--max_steps", "6")

    def fill(self, folder, save=LlavaTrainer._save_optimizer_and_scheduler):
        if folder.endswith("checkpoint-4"):
            (tmp_path / "checkpoint-4" / file).symlink_to("/dev/full")
        save(self, folder)

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(LlavaTrainer, "_save_optimizer_and_scheduler", fill)
        sft_full.main(argv)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/checkpoint-4 could not be saved (")
    assert " bytes free" in message and "--save_total_limit" in message
    assert f"{tmp_path}/checkpoint-2 is complete, so give the same command with --resume_from" in message
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    sft_full.main([*argv, *RESUME])
    assert losses(tmp_path) == {step: whole[step] for step in range(1, 7)}


def test_a_full_disk_at_the_last_save(base, data, tmp_path):
    (tmp_path / "training_args.bin").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not be saved \(.*checkpoint-2 is complete"):
        sft_full.main(command("sft_full", base(), data, tmp_path, *FLAGS, "--max_steps", "2"))
    assert (tmp_path / "model.safetensors").exists()  # what is not a checkpoint is left alone


# Other data


def test_rows_are_known_by_their_values_alone(tmp_path):
    rows = {
        "messages": [[{"role": "user", "content": f"{i}?"}] for i in range(100)],
        "images": [["a.png"] * (i % 3) for i in range(100)],
    }
    dataset = datasets.Dataset.from_dict(rows)
    same = str(identify(dataset))
    dataset.to_parquet(tmp_path / "rows.parquet", batch_size=7)
    for other in (
        datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path)),
        datasets.concatenate_datasets([dataset.select(range(33)), dataset.select(range(33, 100))]),
        dataset.add_column("_row", list(range(100))),
    ):
        assert str(identify(other)) == same
    renamed = {**rows, "images": [*rows["images"][:-1], ["b.png"]]}
    for other in (dataset.select(range(99)), dataset.shuffle(seed=1), datasets.Dataset.from_dict(renamed)):
        assert str(identify(other)) != same
    stream = str(identify(dataset.to_iterable_dataset()))
    assert stream == str(identify(dataset.remove_columns("images").to_iterable_dataset())) != same


@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_on_changed_rows_is_refused(streaming, base, data, tmp_path, caplog):
    rows = json.loads((data / "instruct.json").read_text())
    file = data / ("changed.jsonl" if streaming else "changed.json")

    def write(rows):
        file.write_text("\n".join(map(json.dumps, rows)) if streaming else json.dumps(rows))

    flags = [*FLAGS, "--dataset_name", str(file), "--dataset_streaming", str(streaming)]
    argv = command("sft_full", base(), data, tmp_path, *flags)
    write(rows)
    sft_full.main([*argv, "--max_steps", "2"])
    write(rows)  # a new file with the old rows
    sft_full.main([*argv, "--max_steps", "4", *RESUME])
    rows[3]["conversations"][1]["value"] = "changed"
    write(rows)
    with pytest.raises(ValueError, match="checkpoint-4 was trained on .*, hash .*--allow_changed_data True"):
        sft_full.main([*argv, "--max_steps", "6", *RESUME])
    sft_full.main([*argv, "--max_steps", "6", *RESUME, "--allow_changed_data", "True"])
    assert "resuming all the same" in caplog.text
    sft_full.main([*argv, "--max_steps", "8", *RESUME])  # the changed rows are now those of the checkpoint
    assert len(losses(tmp_path)) == 8


def test_a_checkpoint_that_does_not_know_its_rows_is_resumed(run, base, data, caplog):
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["TrainingData"]  # as stock Trainer writes it
    (run / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    sft_full.main(command("sft_full", base(), data, run, *FLAGS, "--max_steps", "6", *RESUME))
    assert "checkpoint-4 does not say which rows it was trained on" in caplog.text
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TrainingData"]["args"]["rows"] == 12


def test_processes_with_different_rows_do_not_train(monkeypatch):
    rows = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "?"}]] * 3})
    trainer = SimpleNamespace(train_dataset=rows, args=SimpleNamespace(world_size=3))
    mine = str(identify(rows))
    monkeypatch.setattr("_faults.gather_object", lambda given: [*given, "2 rows, hash 0", *given])
    with pytest.raises(ValueError) as error:
        check_data(trainer, None)
    assert f"process 0: {mine}; process 1: 2 rows, hash 0 (1 of 3 differ from process 0)" in str(error.value)


def test_a_stream_is_opened_once_before_it_trains(base, tmp_path):
    opened = []

    def read():
        opened.append(len(opened))
        yield from rows

    trainer = make_trainer(base(), tmp_path, max_steps=1)
    rows = list(trainer.train_dataset) * 40
    trainer.train_dataset = datasets.IterableDataset.from_generator(read, features=trainer.train_dataset.features)
    assert len(first_rows(trainer)) == 256 and first_rows(trainer) is first_rows(trainer)
    opened.clear()
    trainer.train()
    assert len(opened) == 2  # for all that is looked at, and to train
    assert trainer._first_rows is None


# A dead worker, and a second run


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_a_second_run_is_refused(base, data, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    rows = json.loads((data / "instruct.json").read_text()) * 300  # a worker that has read them all is not missed
    (data / "many.json").write_text(json.dumps(rows))
    argv = command("sft_full", base(), data, out, *FLAGS, "--max_steps", "100000", "--dataloader_num_workers", "1")
    argv += ["--dataset_name", str(data / "many.json")]
    with Run(argv, log) as process:
        process.wait_for(out / "checkpoint-2" / "trainer_state.json")
        with pytest.raises(ValueError, match=f"another run is writing to {out}"):
            sft_full.main(argv)
        assert process.poll() is None
        [worker] = psutil.Process(process.pid).children(recursive=True)
        worker.kill()
        assert process.wait(60) == 1
    assert "DataLoader worker" in process.printed and "pass a lower --dataloader_num_workers" in process.printed
    assert newest_complete(out)[0] is not None
    with lone_run(out, is_main=True):
        pass


def test_the_lock_goes_with_the_run_and_a_dry_run_takes_none(run, base, data):
    argv = command("sft_full", base(), data, run, *FLAGS, "--max_steps", "4", "--on_bad_row", "skip")
    skipped = run / "skipped_rows.jsonl"
    skipped.write_text('{"row": 99, "id": null, "reason": "bad"}\n')
    message = r"another run is writing to .*\.run\.lock.*--output_dir"
    with FileLock(run / ".run.lock"):  # as another process would hold it
        sft_full.main([*argv, "--dry_run", "True"])
        with pytest.raises(ValueError, match=message):
            sft_full.main(argv)
        with pytest.raises(ValueError, match=message):
            make_trainer(base(), run).train()
        assert skipped.read_text()
    with pytest.raises(ValueError, match="names 1 rows that were skipped"):
        sft_full.main([*argv, *RESUME])
    sft_full.main([*argv, "--max_steps", "1"])
    assert not skipped.read_text()
    with FileLock(run / ".run.lock", blocking=False):
        pass


# Numbers that are not finite


class PoisonedCollator(LlavaDataCollator):
    """Makes the picture of one row NaN, which no check of a row can see."""

    poisoned = 5

    def __call__(self, rows):
        batch = super().__call__(rows)
        batch["pixel_values"][[row.get("_row") == self.poisoned for row in rows]] = float("nan")
        return batch


def make_trainer(base: str, out: Path, collator=LlavaDataCollator, *, numbered: bool = True, **options):
    processor = AutoProcessor.from_pretrained(base)
    processor.chat_template = chat_template_path("vicuna_v1").read_text()
    model = AutoModelForImageTextToText.from_pretrained(base)
    train_only(model, ["multi_modal_projector", "language_model"])
    row = tiny.row(tiny.user("What is it?", images=1), tiny.assistant("red"), images=[tiny.picture()])
    rows = {"messages": [row["messages"]] * 8, "images": [row["images"]] * 8}
    rows |= {"_row": list(range(8))} if numbered else {}
    given = {"bf16": False, "use_cpu": True, "report_to": "none", "remove_unused_columns": False}
    given |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "save_strategy": "no"}
    return LlavaTrainer(
        model=model,
        args=LlavaSFTConfig(str(out), **given, **options),
        data_collator=collator(processor),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=processor,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loss_that_is_nan_names_its_rows_and_reaches_no_weight(workers, base, tmp_path):
    """The second optimizer step; rows 4 and 5 are its first micro-batch."""
    kwargs = {"multiprocessing_context": "spawn"} if workers else {}
    kwargs = {f"dataloader_{name}": value for name, value in kwargs.items()}
    options = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "dataloader_num_workers": workers, **kwargs}
    trainer = make_trainer(base(), tmp_path, PoisonedCollator, **options)
    assert isinstance(trainer.data_collator, PoisonedCollator)
    with pytest.raises(ValueError, match=r"step 2: the loss is nan; rows 4, 5\. All weights are finite, so look at"):
        trainer.train()
    trained = make_trainer(base(), tmp_path, max_steps=1, gradient_accumulation_steps=2, learning_rate=1e-2)
    trained.train()
    expected = trained.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(("numbered", "rows"), [(True, "rows 0, 1, 2, 3"), (False, r"rows unknown .*_row\)")])
@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_gradient_that_is_nan_names_the_rows_of_the_step(clipped, numbered, rows, base, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": clipped}
    trainer = make_trainer(base(), tmp_path, numbered=numbered, **options)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match=rf"step 1: the norm of the gradient is nan; {rows}\. All weights are finite"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_weights_that_are_not_finite_are_told_from_bad_rows(base, data, tmp_path):
    flags = [*FLAGS, "--learning_rate", "1e38", "--max_grad_norm", "0", "--max_steps", "9"]
    with pytest.raises(ValueError, match=r"step \d: the loss is .*\d parameters in all\) is not finite either"):
        sft_full.main(command("sft_full", base(), data, tmp_path, *flags, "--weight_decay", "1"))


def test_evaluation_takes_numbered_rows_and_goes_on_at_nan(base, tmp_path):
    trainer = make_trainer(base(), tmp_path, PoisonedCollator)
    assert str(trainer.evaluate(trainer.train_dataset)["eval_loss"]) == "nan"


# SIGTERM


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_143(base, data, whole, tmp_path):
    """Sent to every process of the run at once, as SLURM does: the loader's worker must outlive the step."""
    out, log = tmp_path / "out", tmp_path / "log"
    argv = command("sft_full", base(), data, out, *FLAGS, "--max_steps", str(STEPS), "--dataloader_num_workers", "1")
    argv += ["--save_steps", "7", "--eval_strategy", "steps", "--eval_steps", "1"]
    argv += ["--eval_dataset_name", str(data / "pretrain.json")]
    with Run(argv, log) as process:
        process.wait_for(out / "checkpoint-7" / "trainer_state.json")
        processes = family(process.pid)
        assert len(processes) == 2
        for member in processes:
            member.terminate()
        assert process.wait(60) == 143, process.printed
    assert not any(member.is_running() for member in processes)
    newest, faults = newest_complete(out)
    step = int(newest.name.rpartition("-")[2])
    assert not faults and 7 < step < STEPS
    assert f"SIGTERM: saved {newest.name}, leaving with status 143" in process.printed
    state = json.loads((newest / "trainer_state.json").read_text())
    assert max(entry["step"] for entry in state["log_history"] if "eval_loss" in entry) == step - 1
    assert not (out / "model.safetensors").exists()
    sft_full.main([*argv, *RESUME, "--eval_strategy", "no"])
    assert losses(out) == whole


@pytest.mark.slow
def test_sigterm_to_a_launcher_and_its_processes(base, data, whole, tmp_path):
    out = tmp_path / "out"
    argv = command("sft_full", base(), data, out, *FLAGS, "--max_steps", str(STEPS), "--save_steps", "7")
    argv += ["--per_device_train_batch_size", "1"]
    run = accelerate("cpu_2proc", "sft_full", argv, out)
    run.wait_for(out / "checkpoint-7" / "trainer_state.json")
    for member in family(run._process.pid):
        member.terminate()
    run.wait()
    newest, faults = newest_complete(out)
    assert not faults and newest.name not in ("checkpoint-7", f"checkpoint-{STEPS}"), run.printed
    assert run.printed.count(f"SIGTERM: saved {newest.name}, leaving with status 143") == 1
    assert {path.name for path in newest.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    run = accelerate("cpu_2proc", "sft_full", [*argv, *RESUME], out)
    run.wait()
    assert (out / "trainer_state.json").exists(), run.printed[-3000:]
    assert losses(out) == pytest.approx(whole, rel=1e-3)


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_what_can_be_resumed_whatever_is_saved_otherwise(base, tmp_path):
    trainer = make_trainer(base(), tmp_path, save_only_model=True)
    trainer.add_callback(Terminate())
    with pytest.raises(SystemExit) as leaving:
        trainer.train()
    assert leaving.value.code == 143
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-1", [])


def test_a_second_sigterm_acts_as_usual(base, tmp_path, monkeypatch):
    heard = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        conditions = StopConditions(make_trainer(base(), tmp_path))
        with conditions.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, at the same time
            assert heard == []
            monkeypatch.setattr("_faults.SAME_REQUEST", 0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, previous)


# Skipped rows


def test_skipped_rows_are_counted_once_each_as_the_file_grows(tmp_path):
    file = tmp_path / "skipped_rows.jsonl"
    skipped = SkippedRows(file)
    assert skipped.count() == 0
    lines = [{"row": row, "id": None, "reason": f"row {row} is bad"} for row in (3, 4)]
    for expected, text in ((1, json.dumps(lines[0]) + "\n"), (1, json.dumps(lines[0]) + "\n"), (1, '{"row": 4, ')):
        with file.open("a") as stream:
            stream.write(text)
        assert skipped.count() == expected
    with file.open("a") as stream:
        stream.write(json.dumps(lines[1])[len('{"row": 4, ') :] + "\n")
    assert skipped.count() == 2
    assert skipped.first_reasons() == "\n  row 3 is bad\n  row 4 is bad"


def test_a_run_stops_when_more_than_a_hundredth_of_its_rows_is_skipped(base, data, tmp_path):
    """One picture of 12 is broken, in the fourth batch at the latest; nothing is saved after it was met."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "7.png").write_bytes(b"no picture")
    argv = command("sft_full", base(), tmp_path / "data", tmp_path / "out", *FLAGS, "--save_steps", "1")
    argv += ["--max_steps", "6", "--train_sampling_strategy", "sequential", "--on_bad_row", "skip"]
    with pytest.raises(ValueError, match=r"skipped_rows.jsonl names 1 rows .* 1% of the 12 .*first:\n.*7\.png"):
        sft_full.main(argv)
    names = {path.name for path in list_checkpoints(tmp_path / "out")}
    assert not names & {"checkpoint-4", "checkpoint-5", "checkpoint-6"}


@pytest.mark.parametrize("harm", [lambda picture: picture.write_bytes(b"no picture"), Path.unlink])
def test_a_bad_row_to_evaluate_on_is_an_error_and_not_counted(harm, base, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    [*_, picture] = sorted((tmp_path / "data").glob("*.png"))
    harm(picture)
    flags = [*FLAGS, "--on_bad_row", "skip", "--max_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1"]
    argv = command("sft_full", base(), data, tmp_path / "out", *flags)
    with pytest.raises(ValueError, match=picture.name):
        sft_full.main([*argv, "--eval_dataset_name", str(tmp_path / "data" / "instruct.json")])
    assert not (tmp_path / "out" / "skipped_rows.jsonl").read_text()


def test_a_slice_to_evaluate_on_is_cut_from_the_rows_that_are_left(base, data, tmp_path):
    rows = json.loads((data / "instruct.json").read_text()) * 10
    rows[5] = {**rows[5], "image": "missing.png"}
    (data / "sliced.json").write_text(json.dumps(rows))
    flags = ["--on_bad_row", "skip", "--eval_strategy", "steps", "--dataset_name", str(data / "sliced.json")]
    flags += ["--dataset_train_split", "train[:100]", "--dataset_test_split", "train[100:]"]
    script_args, training_args, _ = sft_full.make_parser().parse_args_and_config(
        command("sft_full", base(), data, tmp_path, *flags)
    )
    with pytest.warns(UserWarning, match="1 of 120 rows are left out"):
        train, held_out = load_datasets(script_args, training_args)
    assert (len(train), len(held_out), held_out[0]["_row"]) == (100, 19, 101)
    assert SkippedRows(tmp_path / "skipped_rows.jsonl").count() == 1
