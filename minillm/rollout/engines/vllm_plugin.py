"""What vLLM is told of a pair of student and teacher: its name, its settings, and what a request says.

`register` is a plugin, which makes the pair known to every vLLM on a machine where minillm is installed. vLLM finds it
by the entry point `vllm.general_plugins` of this distribution, and calls it in each of its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

ARCHITECTURE = "MinillmStudentAndTeacher"
"""The architecture under which vLLM loads a student together with a teacher."""

_ARGUMENT = "minillm_mixture"  # the extra argument by which a request asks for the mixture
PAIR_WORKER = "minillm.rollout.engines.vllm_pair.PairWorker"
"""Value of vLLM's `worker_extension_cls` for a server that holds such a pair."""


def register() -> None:
    """Register the architecture, unless it is registered already. Its class is imported when a server loads it."""
    from vllm.model_executor.models.registry import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "minillm.rollout.engines.vllm_pair:StudentAndTeacher")


def pair_overrides(architectures: Sequence[str], teacher: str, *, loads_teacher: bool) -> dict[str, Any]:
    """Return the value of vLLM's `hf_overrides` with which the student's folder is loaded as a pair.

    Args:
        architectures: The student's own architectures.
        teacher: Folder or hub id of the teacher.
        loads_teacher: Whether the teacher's weights are read from there. Otherwise only its config is, and the weights
            arrive from the trainer.
    """
    return {
        "architectures": [ARCHITECTURE],
        "minillm_student": list(architectures),
        "minillm_teacher": teacher,
        "minillm_loads_teacher": loads_teacher,
    }


@dataclass(frozen=True)
class MixtureRequest:
    """What a request says to have its tokens sampled from the mixture.

    Attributes:
        alpha: The teacher's share.
        temperature: What the logits of both are divided by.
        vocab_size: Number of ids that can be sampled.
        seed: Seed of the response.
        record: Number of the `MixtureRecord` that its tokens are added to; 0 for none.
        row: Number of the response in that record.
    """

    alpha: float
    temperature: float
    vocab_size: int
    seed: int
    record: int = 0
    row: int = 0

    def to_extra_args(self) -> dict[str, Any]:
        """Return the request as a value of `SamplingParams.extra_args`."""
        return {_ARGUMENT: list(astuple(self))}

    @classmethod
    def of(cls, params: Any) -> MixtureRequest | None:
        """Return the request in some `SamplingParams`, if there is one."""
        values = (params.extra_args or {}).get(_ARGUMENT)
        return None if values is None else cls(*values)
