"""Teachers that return final hidden states, from which log-probabilities are computed as often as they are needed.

A final hidden state has H numbers where a row of logits has V: 10 KB per token for a 13B teacher instead of 100 to 600.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling
from minillm.models.head import Head

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_CPU_ROWS = 256  # rows of logits in memory at once on a CPU
# A GPU waits for kernel launches unless each one has more to do: 2^27 logits are half a GiB in float32.
_GPU_LOGITS = 1 << 27


class StatesTeacher(ABC):
    """A frozen teacher whose final hidden states are known, and whose head is in this process.

    Attributes:
        batch_size: sequences that are scored together.
    """

    batch_size: int = 16

    @property
    @abstractmethod
    def head(self) -> Head:
        """The output head."""

    @abstractmethod
    def hidden(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "tokens hidden"]]:
        """Final hidden states that predict each response's tokens, without gradient.

        Args:
            prompts: token ids, at least one per prompt.
            responses: token ids of the response to each prompt.

        Returns:
            For response i of T_i tokens, a tensor [T_i, H] on the device of the head.
        """

    def score(self, rollouts: Sequence[Rollout], sampling: Sampling) -> list[TeacherTargets]:
        """Score responses by their final hidden states alone; see `Teacher.score`."""
        hidden = self.hidden([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
        return [TeacherTargets(None, hidden=states) for states in hidden]

    def add_token_logprobs(self, rollouts: Sequence[Rollout], sampling: Sampling) -> None:
        """Add log p of their tokens to the targets of those rollouts that lack them.

        It costs one product with the head, which the loss makes anyway, so it is only for what has to know log p before
        the loss is computed.
        """
        for rollout in rollouts:
            targets = rollout.teacher
            if targets is not None and targets.token_logprobs is None and targets.hidden is not None:
                targets.token_logprobs = self.token_logprobs(targets.hidden, rollout.response_ids, sampling)

    def token_logprobs(
        self, hidden: Float[Tensor, "tokens hidden"], ids: Sequence[int], sampling: Sampling
    ) -> Float[Tensor, " tokens"]:
        """Log p of one token per hidden state.

        Args:
            hidden: final hidden states.
            ids: the token whose log-probability is wanted at each position.
            sampling: the temperature and the vocabulary.

        Returns:
            float32, on the CPU.
        """
        rows = _CPU_ROWS if hidden.device.type == "cpu" else max(_CPU_ROWS, _GPU_LOGITS // sampling.vocab_size)
        tokens = torch.tensor(list(ids), device=hidden.device)[:, None]
        head = self.head.narrow(sampling.vocab_size).converted_once()
        out = [
            _log_softmax(head, states, sampling).gather(1, part)[:, 0]
            for states, part in zip(hidden.split(rows), tokens.split(rows), strict=True)
        ]
        return torch.cat(out).cpu() if len(ids) else torch.zeros(0)

    def distribution(self, hidden: Float[Tensor, "tokens hidden"], sampling: Sampling) -> Float[Tensor, "tokens vocab"]:
        """Log p over the shared vocabulary at each hidden state, float32."""
        return _log_softmax(self.head.narrow(sampling.vocab_size), hidden, sampling)

    @abstractmethod
    def close(self) -> None:
        """Release connections."""


@torch.no_grad()
def _log_softmax(
    head: Head, hidden: Float[Tensor, "tokens hidden"], sampling: Sampling
) -> Float[Tensor, "tokens vocab"]:
    return torch.log_softmax(head.logits(hidden, sampling.temperature), dim=-1)
