"""Starts recipes as a user does, in processes of their own, on the CPU; kills what hangs."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
DEADLINE = 180  # seconds; a start takes about ten


@dataclass
class Launch:
    """A command in the background, its output in a file.

    Args:
        command: `accelerate launch …` or `torchrun …` without the Python in front.
        out: the run's --output_dir; log and sharding record lie beside it.
    """

    command: list[str]
    out: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.record = self.out.with_suffix(".record")
        self.record.mkdir(parents=True, exist_ok=True)
        self._log = self.out.with_suffix(".log")
        self._deadline = time.monotonic() + DEADLINE
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        path = os.pathsep.join([str(ROOT / "tests" / "on_cpu"), str(ROOT)])
        environment = {**kept, "PYTHONPATH": path, "SHARDING_RECORD": str(self.record), **self.environment}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> None:
        """Wait for the end. The exit status says nothing: leaving a gloo group aborts now and then (torch 2.13)."""
        self._wait(lambda: self._process.poll() is not None)

    def wait_for(self, path: Path) -> None:
        self._wait(path.exists)
        assert self._process.poll() is None, f"ended before it could be killed:\n{self.printed[-3000:]}"

    def kill(self) -> None:
        """SIGKILL to the launcher and, since they are sessions of their own, to all the processes it started."""
        launcher = psutil.Process(self._process.pid)
        family = [*launcher.children(recursive=True), launcher] if launcher.is_running() else []
        for process in family:
            process.kill()
        psutil.wait_procs(family)
        self._process.wait()

    def sharding(self) -> list[dict]:
        """What each process held of the model, by rank (tests/on_cpu/sitecustomize.py)."""
        return [json.loads(path.read_text()) for path in sorted(self.record.glob("*.json"))]

    def _wait(self, done) -> None:
        while not done():
            if time.monotonic() > self._deadline:
                self.kill()
                raise AssertionError(f"hung for {DEADLINE} s, killed:\n{self.printed[-3000:]}")
            if self._process.poll() is not None and not done():
                raise AssertionError(f"ended too early:\n{self.printed[-3000:]}")
            time.sleep(0.002)


def accelerate(config: str, recipe: str, flags: list[str], out: Path, **environment: str) -> Launch:
    """`accelerate launch --config_file accelerate_configs/CONFIG.yaml recipes/RECIPE.py …`."""
    file = f"accelerate_configs/{config}.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", file]
    return Launch([*launcher, f"recipes/{recipe}.py", *flags], out, environment)
