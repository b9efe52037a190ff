"""MiniLLM: distil a large causal language model into a small one on the student's own samples.

The names below load on first use, so that `import minillm` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.loss.config import Objective
    from minillm.rollout.config import RolloutConfig
    from minillm.teacher.served import ServedTeacher
    from minillm.teacher.store import TargetStore
    from minillm.train.on_policy import MiniLLMTrainer
    from minillm.train.pretraining import PretrainingTrainer
    from minillm.train.supervised import SupervisedTrainer

__version__ = "0.1.0"
__all__ = [
    "MiniLLMTrainer",
    "Objective",
    "PretrainingTrainer",
    "RolloutConfig",
    "ServedTeacher",
    "SupervisedTrainer",
    "TargetStore",
]

_HOME = {
    "MiniLLMTrainer": "minillm.train.on_policy",
    "ServedTeacher": "minillm.teacher.served",
    "PretrainingTrainer": "minillm.train.pretraining",
    "TargetStore": "minillm.teacher.store",
    "SupervisedTrainer": "minillm.train.supervised",
    "Objective": "minillm.loss.config",
    "RolloutConfig": "minillm.rollout.config",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'minillm' has no attribute {name!r}")
