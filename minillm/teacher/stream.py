"""A teacher that reads growing sequences with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.models.configs import attends_fully
from minillm.models.head import body
from minillm.teacher.local import LocalTeacher

if TYPE_CHECKING:
    from jaxtyping import Float


class TeacherStream:
    """A teacher reading B sequences that grow, and sometimes shrink, at their ends.

    The key-value cache is append-only: retracted tokens keep their slots and are masked out, while the position ids
    that the model sees count valid tokens only. Models with a sliding window count slots, so they are refused.
    Sequences that begin with similar lengths form a group with a cache of its own, so that there is little padding.

    Args:
        teacher: the teacher.
        lengths: the number of tokens that each sequence begins with.

    Raises:
        InputError: the teacher has layers with a sliding window.
    """

    def __init__(self, teacher: LocalTeacher, lengths: Sequence[int]) -> None:
        if not attends_fully(teacher.model.config.get_text_config()):
            raise InputError(
                "teacher-mixed sampling needs a teacher with full attention in every layer "
                f"({type(teacher.model).__name__} has sliding windows): set rollout.teacher_mix: 0"
            )
        self._groups = [_Group(teacher, rows) for rows in teacher.groups(lengths)]

    def extend(self, feeds: Sequence[list[int]]) -> list[Float[Tensor, "tokens hidden"]]:
        """Read more tokens of every sequence.

        Args:
            feeds: for each sequence the tokens to read.

        Returns:
            For each sequence the final hidden states of these tokens, [len(feed), H].
        """
        states: dict[int, Tensor] = {}
        for group in self._groups:
            states |= zip(group.rows, group.extend([feeds[row] for row in group.rows]), strict=True)
        return [states[row] for row in range(len(feeds))]

    def retract(self, row: int, count: int) -> None:
        """Retract the last `count` tokens of a sequence."""
        for group in self._groups:
            if row in group.rows:
                group.retract(group.rows.index(row), count)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, which are then numbered from 0 in the same order."""
        number = {row: new for new, row in enumerate(rows)}
        for group in self._groups:
            group.keep([i for i, row in enumerate(group.rows) if row in number])
            group.rows = [number[row] for row in group.rows]
        self._groups = [group for group in self._groups if group.rows]


class _Group:
    """Sequences that are read together, with one cache and one mask over its slots."""

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
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
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
