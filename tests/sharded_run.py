"""`minillm` in several processes on CPUs, started by accelerate launch with a shipped file; sees that every update is one in shards where
the file says so, and dies after the third of the stage that `DIES_IN` names, or at the end of the one that `DIES_AFTER` names, which is
not saved then."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from minillm.cli import main
from minillm.models.weights import is_sharded
from minillm.train import resumable
from tests.train.two_processes import shard_on_cpus

SHARDS = "ACCELERATE_USE_FSDP" in os.environ or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


class _Watches(TrainerCallback):
    def __init__(self, dies: bool) -> None:
        self._dies = dies

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert is_sharded(given["model"]) == SHARDS
        if self._dies and state.global_step == 3:
            os._exit(9)


def watch(dies_in: str | None, dies_after: str | None) -> None:
    train = resumable.train

    def watched(trainer: Any, folder: str, name: str) -> None:
        trainer.add_callback(_Watches(name == dies_in))
        if name == dies_after:
            trainer.save_student = lambda *_: os._exit(9)
        train(trainer, folder, name)

    resumable.train = watched


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpus()
    watch(os.environ.get("DIES_IN"), os.environ.get("DIES_AFTER"))
    main()
