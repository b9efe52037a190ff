"""What a trainer measures between two logs: sums, means and the seconds of each phase, over all processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

# Sums that are needed for other metrics, and are not logged by themselves.
_DIVISORS = ("tokens", "text_tokens", "advantage_squared")


class Metrics:
    """Sums and means since the last log.

    Args:
        accelerator: the trainer's accelerator, for sums over processes.
        device: this process's device.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self._accelerator, self._device = accelerator, device
        self._sums: dict[str, float] = defaultdict(float)
        self._means: dict[str, tuple[float, float]] = {}
        self._marked: tuple[dict[str, float], dict[str, tuple[float, float]]] = ({}, {})
        self._seconds: dict[str, float] = defaultdict(float)
        self._phase_tokens: dict[str, float] = defaultdict(float)

    def global_sum(self, value: Tensor | float) -> float:
        """The sum of a number over all processes, each of which must call this."""
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self._device)
        return float(self._accelerator.reduce(tensor, reduction="sum"))  # pyright: ignore[reportArgumentType]

    def gather(self, value: Any) -> list[Any]:
        """The objects that all processes pass, each of which must call this."""
        return gather_object([value]) if self._accelerator.num_processes > 1 else [value]

    def add_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Add sums over tokens; the next log reports their means per token, or per update for losses (`..._loss`)."""
        for name, value in sums.items():
            self._sums[name] += float(value)

    def add_mean(self, name: str, total: float, count: float) -> None:
        """Add a sum and its count; the next log reports their quotient."""
        before = self._means.get(name, (0.0, 0.0))
        self._means[name] = (before[0] + total, before[1] + count)

    def mark(self) -> None:
        """Remember the sums and means of now, for `rewind`."""
        self._marked = dict(self._sums), dict(self._means)

    def rewind(self) -> None:
        """Forget the sums and means since `mark`: those of an update that was not made."""
        sums, means = self._marked
        self._sums, self._means = defaultdict(float, sums), dict(means)

    def add_seconds(self, phase: str, seconds: float, tokens: int = 0) -> None:
        """Add the time that a phase took, and the tokens that it processed."""
        self._seconds[phase] += seconds
        self._phase_tokens[phase] += tokens

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Measure the time of a phase, which processes `tokens` tokens."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels are only queued, and their time belongs to this phase
        self.add_seconds(name, time.perf_counter() - start, tokens)

    def flush(self, updates: int) -> dict[str, float]:
        """Metrics since the last call, which are then reset. Every process must call this.

        Args:
            updates: the number of updates since the last call.

        Returns:
            Means over all processes; seconds of this process; tokens per second of all processes together.
        """
        logged = self._flush_sums(updates)
        for name in self._all_names(self._means):
            total, count = (self.global_sum(x) for x in self._means.get(name, (0.0, 0.0)))
            if count:
                logged[name] = total / count
        for name in self._all_names(self._seconds):
            logged[f"{name}_seconds"] = self._seconds[name]
            tokens = self.global_sum(self._phase_tokens[name])
            if tokens and self._seconds[name]:
                logged[f"{name}_tokens_per_second"] = tokens / self._seconds[name]
        for store in (self._sums, self._means, self._seconds, self._phase_tokens):
            store.clear()
        return logged

    def _flush_sums(self, updates: int) -> dict[str, float]:
        sums = {name: self.global_sum(self._sums[name]) for name in self._all_names(self._sums)}
        logged = {}
        for name in sorted(sums):
            if name.endswith("_loss"):
                logged[name] = sums[name] / max(updates, 1)  # already divided by the update's token count
            elif name not in _DIVISORS:
                logged[name] = sums[name] / max(sums["text_tokens" if name.startswith("text") else "tokens"], 1.0)
        if "advantage" in logged:
            variance = sums["advantage_squared"] / max(sums["tokens"], 1.0) - logged["advantage"] ** 2
            logged["advantage_std"] = max(variance, 0.0) ** 0.5
        return logged

    def _all_names(self, own: Iterable[str]) -> list[str]:
        """The names that any process has. Every process must take part in every sum, even if it lacks the name."""
        if self._accelerator.num_processes == 1:
            return sorted(own)
        return sorted({name for names in gather_object([list(own)]) for name in names})
