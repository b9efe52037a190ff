"""`minillm` in shards on CPUs, started by accelerate launch; dies after the third update of the stage that `DIES_IN` names."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from minillm.cli import main
from minillm.train import resumable
from tests.train.two_processes import shard_on_cpus


class _Dies(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            os._exit(9)


def die_in(stage: str) -> None:
    train = resumable.train

    def dying(trainer: Any, folder: str, name: str) -> None:
        if name == stage:
            trainer.add_callback(_Dies())
        train(trainer, folder, name)

    resumable.train = dying


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpus()
    if stage := os.environ.get("DIES_IN"):
        die_in(stage)
    main()
