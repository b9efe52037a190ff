"""The protocol of a sampler, and the sampler that samples from the student alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.rollout.engines.base import Engine

if TYPE_CHECKING:
    from jaxtyping import Float

Metrics = dict[str, tuple[float, float]]
"""Sums and counts by metric name; the logged value is their quotient."""


class Sampler(Protocol):
    """Decides which distribution rollouts are sampled from, with an engine that samples from the student."""

    def generate(
        self, engine: Engine, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Sample one response per prompt.

        Args:
            engine: the engine with the student's current weights.
            prompts: token ids.
            sampling: temperature, vocabulary, and where a response ends.
            seeds: one per prompt; the same seed, prompt and weights give the same response.

        Returns:
            The rollouts, in the order of the prompts.
        """
        ...

    def behaviour_logprobs(
        self, student: Float[Tensor, " tokens"], teacher: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Log-probabilities under the distribution that this sampler samples from, given log q and log p."""
        ...

    def metrics(self) -> Metrics:
        """Metrics of the latest `generate` in this process."""
        ...

    def adapt(self, total: Callable[[float], float]) -> None:
        """Adapt to the latest `generate`, before the next one.

        Args:
            total: the sum of a number over all processes, so that all processes adapt alike.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run samples the same tokens."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint, which may hold other keys too."""
        ...


class PlainSampler:
    """Samples from the student alone. It adapts nothing and keeps no state."""

    def generate(
        self, engine: Engine, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Sample one response per prompt from the student; see `Sampler.generate`."""
        return engine.generate(prompts, sampling, seeds)

    def behaviour_logprobs(
        self, student: Float[Tensor, " tokens"], teacher: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Log q, because the student alone samples."""
        return student

    def metrics(self) -> Metrics:
        """No metrics."""
        return {}

    def adapt(self, total: Callable[[float], float]) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
