"""The teacher reading sequences that grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.models.configs import attends_fully
from minillm.models.head import body
from minillm.teacher.local import LocalTeacher


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
            raise InputError(
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
