"""What a training stage leaves in the run directory while it trains: its log, and a report that is written again."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback

from minillm.data.files import finite
from minillm.run.progress import log_file
from minillm.run.report import write_run_report
from minillm.terminal import Progress
from minillm.train.samples import drop_later_lines

logger = logging.getLogger(__name__)

_SECONDS = 60.0
_SHARE = 50  # a report takes at most one part in so many of the time


class LiveLog(TrainerCallback):
    """Writes each entry of the log at once, with `time` and `max_steps`, to `logs/STAGE.jsonl` of the run directory.

    The trainer's own log reaches the disk with its checkpoints only.

    Args:
        run_dir: The run directory.
        stage: The stage's name.
    """

    def __init__(self, run_dir: Path, stage: str) -> None:
        self._file, self._begun = log_file(run_dir, stage), False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the entries of updates that will be made again."""
        if state.is_world_process_zero and not self._begun:
            self._begin(state)

    def _begin(self, state: Any) -> None:
        self._begun = True
        self._file.parent.mkdir(parents=True, exist_ok=True)
        drop_later_lines(self._file, "step", state.global_step if state.global_step else -1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append an entry."""
        if state.is_world_process_zero:
            if not self._begun:  # another callback logs when training begins, before this one is told of it
                self._begin(state)
            entry = {**(logs or {}), "step": state.global_step, "max_steps": state.max_steps, "time": time.time()}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(entry), ensure_ascii=False, default=float) + "\n")


class LiveProgress(TrainerCallback):
    """Shows the updates of a stage, the time left, and the metric that it minimises."""

    _METRICS: ClassVar = {"reverse_kl": "KL(q‖p)", "forward_kl": "KL(p‖q)", "loss": "loss"}
    _progress: Progress | None = None
    _note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to count, after the updates that were made before."""
        if state.is_world_process_zero:
            self._progress = Progress(state.max_steps, "updates")
            self._progress.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count an update."""
        if self._progress is not None:
            self._progress.update(note=self._note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Remember what to show beside the numbers."""
        key = next((key for key in self._METRICS if (logs or {}).get(key) is not None), None)
        if key is not None:
            self._note = f"{self._METRICS[key]} {float(logs[key]):.3g}"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the line away."""
        if self._progress is not None:
            self._progress.close()


def keep_events(trainer: Any, run_dir: Path, stage: str) -> None:
    """Have TensorBoard's events written to `tensorboard/STAGE` of the run directory.

    They would go to the stage's working folder, which is deleted at its end. `TENSORBOARD_LOGGING_DIR` has its way.

    Args:
        trainer: The stage's trainer.
        run_dir: The run directory.
        stage: The stage's name.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(run_dir / "tensorboard" / stage)


class LiveReport(TrainerCallback):
    """Writes the report again while a stage trains: at most once a minute, and for at most a fiftieth of the time.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._wait, self._last = run_dir, _SECONDS, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the report, if it is time. A report that fails is told of once, and training goes on."""
        started = time.monotonic()
        if not state.is_world_process_zero or started - self._last < self._wait:
            return
        try:
            write_run_report(self._run_dir, training=True)
        except Exception as error:
            logger.warning("the report could not be written while training: %s", error, exc_info=error)
            self._wait = float("inf")
            return
        self._last = time.monotonic()
        self._wait = max(_SECONDS, _SHARE * (self._last - started))
