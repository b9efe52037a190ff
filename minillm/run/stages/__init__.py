"""The stages of a recipe, in the order in which they build on each other.

A new stage is a file in this folder and an entry of `STAGES`. Everything that lists stages reads this tuple: the fields
of a recipe, `--stage`, the run directory, the runner, `minillm plan`, the report and the model card.
"""

from __future__ import annotations

from minillm.errors import InputError
from minillm.run.stages.evaluate import Evaluate
from minillm.run.stages.finetune import FineTune
from minillm.run.stages.logits import Logits
from minillm.run.stages.minillm import MiniLLM
from minillm.run.stages.pretrain import Pretrain
from minillm.run.stages.report import Report
from minillm.run.stages.responses import Responses
from minillm.run.stages.sft import SFT
from minillm.run.stages.stage import Stage
from minillm.run.stages.student import Student
from minillm.run.stages.teacher import Teacher
from minillm.run.stages.warmup import Warmup

STAGES: tuple[Stage, ...] = (
    Teacher(),
    FineTune(),
    Student(),
    Logits(),
    Pretrain(),
    Responses(),
    Warmup(),
    SFT(),
    MiniLLM(),
    Evaluate(),
    Report(),
)
NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """Find a stage by the name that a recipe or `--stage` uses.

    Raises:
        InputError: there is no such stage.
    """
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise InputError(f"{name}: no such stage; allowed: {', '.join(NAMES)}")
