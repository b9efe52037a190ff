"""The teacher as a model in this process: final hidden states once, log-probabilities from them as often as needed.

A final state is H numbers where a row of logits is V: 10 KB a token for a 13B teacher instead of 100 to 600.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.data.batches import bucket, pad
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.models.head import head_of, hidden_states
from minillm.models.shards import is_sharded

_ROWS = 256  # rows of logits alive at once on a CPU
# A GPU waits for launches unless it gets more at a time: so many logits (half a GiB in float32), tokens, sequences.
_GPU_LOGITS, _GPU_TOKENS, _GPU_SEQUENCES = 1 << 27, 1 << 15, 256


class LocalTeacher:
    """Args:
    model: frozen here; it keeps its own dtype.
    batch_size: sequences in one forward; on a GPU more, where they are short.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 16) -> None:
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.sharded = is_sharded(model)

    def reading(self) -> AbstractContextManager[Any]:
        """What a forward happens in."""
        return nullcontext()

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which sequences go through the model together, like lengths with like."""
        size = self.batch_size
        if self.model.device.type != "cpu" and not self.sharded:  # with shards every process must make as many forwards
            size = max(size, min(_GPU_TOKENS // max(lengths, default=1), _GPU_SEQUENCES))
        return bucket(lengths, size)

    def hidden(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Tensor]:
        """Final states [T_i, H] that predict each response's tokens: one forward, no gradient."""
        out: list[Tensor | None] = [None] * len(prompts)
        for group in self.groups([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]):
            with torch.no_grad(), self.reading():
                batch = pad([prompts[i] for i in group], [responses[i] for i in group], self.model.device)
                states = hidden_states(self.model, batch).split(batch.lengths.tolist())
            for i, state in zip(group, states, strict=True):
                out[i] = state
        return [state for state in out if state is not None]

    def score(self, rollouts: Sequence[Rollout], sampling: Sampling) -> None:
        """Fill in what the rollouts lack of `teacher_hidden` and `teacher_logprobs`."""
        missing = [rollout for rollout in rollouts if rollout.teacher_hidden is None]
        hidden = self.hidden([r.prompt_ids for r in missing], [r.response_ids for r in missing])
        for rollout, states in zip(missing, hidden, strict=True):
            rollout.teacher_hidden = states
            rollout.teacher_logprobs = self.token_logprobs(states, rollout.response_ids, sampling)

    def token_logprobs(self, hidden: Tensor, ids: Sequence[int], sampling: Sampling) -> Tensor:
        """log p of each of `ids` [T] given its state, float32 on the CPU."""
        rows = _ROWS if hidden.device.type == "cpu" else max(_ROWS, _GPU_LOGITS // sampling.vocab_size)
        tokens = torch.tensor(list(ids), device=hidden.device)[:, None]
        out = [
            self.distribution(states, sampling).gather(1, part)[:, 0]
            for states, part in zip(hidden.split(rows), tokens.split(rows), strict=True)
        ]
        return torch.cat(out).cpu() if len(ids) else torch.zeros(0)

    @torch.no_grad()
    def distribution(self, hidden: Tensor, sampling: Sampling) -> Tensor:
        """log p over the shared vocabulary [T, V], float32."""
        head = head_of(self.model).narrow(sampling.vocab_size)
        return torch.log_softmax(head.logits(hidden, sampling.temperature), dim=-1)


class AdapterOff(LocalTeacher):
    """The base of a student with an adapter, as it is with the adapter switched off: a teacher that takes no memory of its own."""

    def __init__(self, student: Any, batch_size: int = 16) -> None:
        self._student = student
        self.model, self.batch_size, self.sharded = student.get_base_model(), batch_size, False

    @contextmanager
    def reading(self) -> Iterator[None]:
        training = self._student.training
        self._student.eval()  # in training, checkpointed layers keep no keys and values
        try:
            with self._student.disable_adapter():
                yield
        finally:
            self._student.train(training)
