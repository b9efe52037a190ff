"""Which sampler the settings ask for."""

from __future__ import annotations

from minillm.errors import InputError
from minillm.rollout.config import RolloutConfig
from minillm.rollout.samplers.base import PlainSampler, Sampler
from minillm.rollout.samplers.teacher_mixed import TeacherMixedSampler
from minillm.teacher.base import Teacher
from minillm.teacher.local import LocalTeacher


def make_sampler(config: RolloutConfig, teacher: Teacher, device_type: str) -> Sampler:
    """The teacher-mixed sampler if `teacher_mix` is positive, otherwise the plain one.

    Args:
        config: settings of the rollouts.
        teacher: the teacher that is mixed in.
        device_type: the kind of device that training runs on, `cpu` or `cuda`; the cost of a draft depends on it.

    Raises:
        InputError: a served teacher cannot be mixed in, because that needs whole distributions.
    """
    if not config.teacher_mix:
        return PlainSampler()
    if not isinstance(teacher, LocalTeacher):
        raise InputError("rollout.teacher_mix needs the teacher's model in this process: set rollout.teacher_mix: 0")
    return TeacherMixedSampler(teacher, config.teacher_mix, config.draft_tokens, device_type)
