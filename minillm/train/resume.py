"""A training stage that can be interrupted at any time, and continues from its last checkpoint."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from minillm.errors import Interrupted, RunError
from minillm.terminal import current
from minillm.train.lengthened import check_lengthened, updates_of

_MOMENT = 1.0  # seconds; two Ctrl-C within this time count as one


def train(
    trainer: Any, folder: str, stage: str, dtype: torch.dtype | None = None, *, keep_checkpoint: bool = False
) -> None:
    """Train, or continue from the last checkpoint, and save the student, its tokenizer and the log.

    Args:
        trainer: a trainer of this room. It is closed at the end.
        folder: where the trained student is saved.
        stage: the stage's name, for messages.
        dtype: dtype of the saved weights; by default that of training.
        keep_checkpoint: keep the last checkpoint of a finished training, which can then go on for longer.

    Raises:
        Interrupted: Ctrl-C stopped the training, and a checkpoint was saved.
        RunError: the last checkpoint lacks a part that is needed to continue.
        LengthError: the training would go on for longer in a way that its schedule does not allow.
    """
    try:
        _train(trainer, folder, stage, dtype)
        if not keep_checkpoint and trainer.is_world_process_zero():
            shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    finally:
        trainer.close()


def _train(trainer: Any, folder: str, stage: str, dtype: torch.dtype | None) -> None:
    """Train, or only save the student if training had finished before; see `train`."""
    stopping = _StopCleanly()
    trainer.add_callback(_Stop(trainer, stopping))
    work = trainer.args.output_dir
    if os.path.isdir(work) and trainer.is_world_process_zero():
        for left in Path(work).glob("checkpoint-*"):  # its writing was interrupted
            if not (left / TRAINER_STATE_NAME).is_file():
                shutil.rmtree(left, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    last = get_last_checkpoint(work) if os.path.isdir(work) else None
    trainer.add_callback(_NewSteps())
    if last is not None and _is_complete(trainer, last, stage):
        trainer.state = TrainerState.load_from_json(os.path.join(last, TRAINER_STATE_NAME))
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        trainer._load_from_checkpoint(best or last)
    else:
        if last is not None:
            check_checkpoint(Path(last), stage)
        with stopping:
            trainer.train(resume_from_checkpoint=last)
    if stopping.asked and trainer.state.global_step < trainer.state.max_steps:
        trainer.accelerator.wait_for_everyone()  # a process that ends early ends the others too
        raise Interrupted(
            f"stage {stage} stopped after update {trainer.state.global_step}; the same command continues it"
        )
    trainer.save_student(folder, dtype)
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(os.path.join(folder, "trainer_state.json"))
    trainer.accelerator.wait_for_everyone()


def check_checkpoint(checkpoint: Path, stage: str) -> None:
    """Refuse to continue from an incomplete checkpoint: the optimiser would start afresh in the middle of a schedule.

    Args:
        checkpoint: the checkpoint's folder.
        stage: the stage's name, for the message.

    Raises:
        RunError: the message names what is missing.
    """
    wanted = {
        "its optimiser": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*", "*optimizer*.safetensors"),
        "its learning-rate schedule": ("scheduler.pt", "global_step*"),
        "its random states": ("rng_state*.pth",),
        "its weights": ("*.safetensors", "*.bin", "pytorch_model_fsdp*", "global_step*"),
    }
    there = [path.name for path in checkpoint.iterdir() if path.name != "training_args.bin" and not _is_empty(path)]
    missing = [what for what, names in wanted.items() if not any(fnmatch.filter(there, name) for name in names)]
    if missing:
        raise RunError(
            f"{checkpoint}: training cannot go on from here without {', '.join(missing)}, which the checkpoint lacks. "
            f"Delete it to continue from the one before, or make the stage again: --stage {stage} --redo"
        )


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _is_complete(trainer: Any, checkpoint: str, stage: str) -> bool:
    """Whether training had finished, and the run ended before the student was saved."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] >= updates_of(trainer):
        return True
    check_lengthened(trainer, stage, state["global_step"], state["max_steps"])
    return False


class _NewSteps(TrainerCallback):
    """Has a training that is continued log, save and validate as often as it is asked to now.

    transformers takes these numbers from the checkpoint, and warns where its arguments have others.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)


class _StopCleanly:
    """Handles Ctrl-C: the first finishes the update and saves a checkpoint, the second stops at once.

    Under a launcher one Ctrl-C arrives twice, from the terminal and from the launcher, so a second one counts only
    after a moment.
    """

    asked = False
    _received = 0.0

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        before, self._received = self._received, time.monotonic()
        if self.asked and self._received - before > _MOMENT:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked = True
        current().warn("Stopping after this update and saving; Ctrl-C again stops at once.")


class _Stop(TrainerCallback):
    """Saves and stops after the update in which Ctrl-C was received: the same update in all processes."""

    def __init__(self, trainer: Any, stopping: _StopCleanly) -> None:
        self._trainer, self._stopping = trainer, stopping

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        asked = self._stopping.asked
        if self._trainer.accelerator.num_processes > 1:  # any process may have received it
            asked = self._trainer.global_sum(float(asked)) > 0
        if asked:
            self._stopping.asked = True
            control.should_save = control.should_training_stop = True
        return control
