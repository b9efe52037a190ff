"""`minillm` in several processes on CPUs, started by accelerate launch with a shipped file; sees that every update is one in shards where
the file says so. Variables name the stage that dies after its third update (`DIES_IN`), in which one process alone hears Ctrl-C then
(`CTRL_C_IN`), or that dies when it is trained and not saved (`DIES_AFTER`).
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from transformers import TrainerCallback

from minillm.cli import main
from minillm.models.shards import is_sharded
from minillm.train import resume as resumable
from tests.train.two_processes import shard_on_cpus

SHARDS = "ACCELERATE_USE_FSDP" in os.environ or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


class _Watches(TrainerCallback):
    def __init__(self, stage: str) -> None:
        self._stage = stage

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert is_sharded(given["model"]) == SHARDS
        if state.global_step == 3 and os.environ.get("DIES_IN") == self._stage:
            os._exit(9)
        if state.global_step == 3 and os.environ.get("CTRL_C_IN") == self._stage and os.environ["RANK"] == "1":
            for _ in range(2):  # as from the terminal, and from the launcher
                os.kill(os.getpid(), signal.SIGINT)


def watch() -> None:
    train = resumable.train

    def watched(trainer: Any, folder: str, name: str, *more: Any, **others: Any) -> None:
        trainer.add_callback(_Watches(name))
        policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
        assert policy is None or policy.reduce_dtype == torch.float32  # as DDP sums gradients
        if name == os.environ.get("DIES_AFTER"):
            trainer.save_student = lambda *_: os._exit(9)
        train(trainer, folder, name, *more, **others)

    resumable.train = watched


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpus()
    watch()
    main()
