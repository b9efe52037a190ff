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
from minillm.data.rollouts import Rollout, Sampling
from minillm.models.load import attends_fully
from minillm.models.prune import decoder_layers
from minillm.models.scoring import body, head_of, hidden_states
from minillm.models.weights import is_sharded

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


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Deal a frozen model's blocks out over all processes (FSDP2), each block put together for its own forward; what is no block, the
    embeddings and the head among it, stays whole in each. Every process must then call as many forwards as the others.
    """
    from torch.distributed.fsdp import fully_shard

    _, blocks = decoder_layers(model)
    for block in blocks:
        fully_shard(block.to(device))  # one after another: the whole model is never on a device
    parts = {id(parameter) for parameter in blocks.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in parts:
                getattr(module, name).data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


class TeacherStream:
    """The teacher reading B sequences that grow, and sometimes shrink, at their ends.

    The key-value cache is append-only: tokens taken back keep their slots and are masked out, while the positions the
    model sees count valid tokens only. (Models with a sliding window count slots, so they are refused.) Sequences are
    read in groups that began with like lengths, each with a cache of its own, so that padding is small.

    Args:
        lengths: tokens of each sequence's first reading.
    """

    def __init__(self, teacher: LocalTeacher, lengths: Sequence[int]) -> None:
        if not attends_fully(teacher.model.config.get_text_config()):
            raise ValueError(
                f"teacher-mixed sampling needs a teacher whose every layer is full attention ({type(teacher.model).__name__} has sliding "
                "windows): set rollout.teacher_mix: 0"
            )
        self._groups = [_Group(teacher, rows) for rows in teacher.groups(lengths)]

    def extend(self, feeds: Sequence[list[int]]) -> list[Tensor]:
        """Read more tokens of every row; returns their final states, [len(feed), H] each."""
        states: dict[int, Tensor] = {}
        for group in self._groups:
            states |= zip(group.rows, group.extend([feeds[row] for row in group.rows]), strict=True)
        return [states[row] for row in range(len(feeds))]

    def retract(self, row: int, count: int) -> None:
        """Take back the last `count` tokens of a row."""
        for group in self._groups:
            if row in group.rows:
                group.retract(group.rows.index(row), count)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget every other row; those kept are counted from 0 again, in order."""
        place = {row: new for new, row in enumerate(rows)}
        for group in self._groups:
            group.keep([i for i, row in enumerate(group.rows) if row in place])
            group.rows = [place[row] for row in group.rows]
        self._groups = [group for group in self._groups if group.rows]


class _Group:
    """Sequences that are read together: one cache, one mask over its slots."""

    def __init__(self, teacher: LocalTeacher, rows: list[int]) -> None:
        self.rows = rows
        self._teacher, self._model = teacher, teacher.model
        self._cache: Any = None
        self._mask = torch.zeros(len(rows), 0, dtype=torch.long, device=teacher.model.device)

    @torch.no_grad()
    def extend(self, feeds: Sequence[list[int]]) -> list[Tensor]:
        width = max(map(len, feeds))
        device = self._model.device
        ids = torch.tensor([[*feed, *[0] * (width - len(feed))] for feed in feeds], device=device)
        block = torch.tensor([[1] * len(feed) + [0] * (width - len(feed)) for feed in feeds], device=device)
        positions = (self._mask.sum(1, keepdim=True) + block.cumsum(1) - 1).clamp(min=0)
        self._mask = torch.cat([self._mask, block], dim=1)
        with self._teacher.reading():
            out = body(self._model)(
                input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache, use_cache=True
            )
        self._cache = out.past_key_values
        return [states[: len(feed)] for states, feed in zip(out.last_hidden_state, feeds, strict=True)]

    def retract(self, index: int, count: int) -> None:
        if count:
            self._mask[index, self._mask[index].nonzero()[-count:, 0]] = 0

    def keep(self, indices: list[int]) -> None:
        if indices and len(indices) < len(self.rows):
            chosen = torch.tensor(indices, device=self._mask.device)
            self._mask = self._mask[chosen]
            self._cache.batch_select_indices(chosen)
        self.rows = [self.rows[i] for i in indices]
