"""Sequences whose items are made when they are asked for, for data sets that are too large to be kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Generic, TypeVar, overload

IN_MEMORY = 20_000
"""Rows of the largest data set that is read, rendered and tokenised as a whole before training begins.

Most data sets for distillation are smaller. At 0.3 to 0.8 ms a row and a few KB, this many cost seconds and megabytes,
and every row that a template refuses or that is too long is known before the first update. Rows of larger data sets are
made when they are asked for."""
_KEPT = 1024  # items that are kept because an update asks for them several times

T = TypeVar("T")
S = TypeVar("S")


class LazySequence(Sequence[T], Generic[T]):
    """A sequence that makes its items when they are asked for, and keeps the last ones.

    Args:
        length: Number of items.
        read: Makes the item of a number, the same one each time.
        longest: An upper bound of the tokens of an item, if one is known without making them all.
    """

    def __init__(self, length: int, read: Callable[[int], T], longest: int | None = None) -> None:
        self.longest = longest
        self._length, self._read = length, read
        self._kept = lru_cache(maxsize=_KEPT)(read)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        numbers = range(self._length)[index]  # raises IndexError as a list does
        return self._kept(numbers) if isinstance(numbers, int) else [self._kept(number) for number in numbers]

    def __reduce__(self) -> tuple[type[LazySequence[T]], tuple[int, Callable[[int], T], int | None]]:
        """Pickle without what is kept, for the worker processes of a data loader."""
        return LazySequence, (self._length, self._read, self.longest)


class _Mapped(Generic[S, T]):
    """Applies a function to an item of a sequence; a class, because a closure cannot be pickled."""

    def __init__(self, items: Sequence[S], function: Callable[[S], T]) -> None:
        self._items, self._function = items, function

    def __call__(self, number: int) -> T:
        return self._function(self._items[number])


def mapped(items: Sequence[S], function: Callable[[S], T], longest: int | None = None) -> Sequence[T]:
    """Apply a function to every item: now to those of a list, and when they are asked for to those of a lazy sequence.

    Args:
        items: The items.
        function: What is applied.
        longest: As for `LazySequence`.
    """
    if isinstance(items, LazySequence):
        return LazySequence(len(items), _Mapped(items, function), longest)
    return [function(item) for item in items]
