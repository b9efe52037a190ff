"""How long the rest of a run will take: from the plan, and from how long the finished stages took."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import torch

from minillm.run.context import Run
from minillm.run.plan.machine import machine_for
from minillm.run.plan.phases import Planner
from minillm.run.stages import stage_named

logger = logging.getLogger(__name__)

_START = 20.0  # seconds of a stage beside what is planned: to load models, and to start an engine


class Remaining:
    """Estimates the time of the stages that are still to come. The plan is made when it is first asked for.

    Args:
        run: the run, whose state says what is finished, and how long it took.
        stages: the stages that are run, in their order.
        processes: how many processes train.
    """

    def __init__(self, run: Run, stages: Sequence[str], processes: int = 1) -> None:
        self._run, self._stages, self._processes = run, stages, processes

    @cached_property
    def _planned(self) -> dict[str, float]:
        """Seconds of each stage by the plan; empty where a plan cannot be made."""
        try:
            gpus = self._processes if torch.cuda.is_available() else 0
            planner = Planner(self._run.recipe, machine_for(gpus)[0])
            return {
                name: _START + sum(phase.seconds for phase in stage_named(name).phases(planner))
                for name in self._stages
            }
        except Exception as error:  # an estimate that cannot be made must not end a run
            logger.info("No estimate of the time of the run: %s", error)
            return {}

    def after(self, stage: str) -> float | None:
        """Estimate the seconds of the stages after this one.

        The plan is scaled by what it was wrong by in the stages that are finished.

        Args:
            stage: the stage that runs now.
        """
        if not self._planned:
            return None
        done = [(self._run.state.seconds(name), self._planned[name]) for name in self._stages]
        measured = [(seconds, planned) for seconds, planned in done if seconds is not None]
        scale = sum(seconds for seconds, _ in measured) / sum(planned for _, planned in measured) if measured else 1.0
        later = self._stages[self._stages.index(stage) + 1 :]
        return scale * sum(self._planned[name] for name in later if not self._run.state.finished(name))
