"""Checks of settings that belong to several rooms."""

from __future__ import annotations

from minillm.errors import InputError
from minillm.loss.config import Objective
from minillm.rollout.config import RolloutConfig


def check_off_policy(rollout: RolloutConfig, objective: Objective) -> None:
    """Responses that the student did not draw, or not as it is, carry no long-term term.

    Raises:
        ValueError: naming the setting to change.
    """
    for name, value in (("on_policy", rollout.on_policy < 1), ("replay", rollout.replay > 0)):
        if value and (objective.long_term or objective.single_step_weight != "none"):
            raise InputError(
                f"rollout.{name} trains on responses that the student did not draw as it is, which the long-term term and its "
                "weights cannot take: set objective.long_term: 0 and objective.single_step_weight: none"
            )


def check_served_teacher(rollout: RolloutConfig, objective: Objective) -> None:
    """What a teacher that is only asked for log-probabilities cannot do.

    Raises:
        ValueError: naming the setting to change.
    """
    if rollout.temperature != 1.0:
        raise InputError(
            f"rollout.temperature: {rollout.temperature:g} with a served teacher: its log-probabilities are of temperature 1, and "
            "those of another need every logit for their sum; set 1"
        )
    if rollout.on_policy < 1:
        raise InputError(
            "rollout.on_policy with a served teacher: of given responses the student's likeliest tokens are not known; set 1"
        )
    if rollout.teacher_mix:
        raise InputError("rollout.teacher_mix with a served teacher: mixing draws from the teacher's whole rows; set 0")
    if objective.language_model and objective.language_model_distill:
        raise InputError("objective.language_model_distill with a served teacher: text is not scored by it; set 0")


def check_sharded_teacher(rollout: RolloutConfig, objective: Objective, text: bool) -> None:
    """What a teacher in shards cannot do, whose every reading is done by all processes together.

    Raises:
        ValueError: naming the setting to change.
    """
    if rollout.teacher_mix:
        raise InputError(
            "teacher.shard: teacher mixing reads in rounds that differ between processes: set rollout.teacher_mix: 0"
        )
    if text and objective.language_model and objective.language_model_distill:
        raise InputError(
            "teacher.shard: processes read text in different numbers of pieces and would wait for each other for ever: set "
            "objective.language_model_distill: 0"
        )
