"""The base class of the mixins of this room.

A mixin is combined with a `transformers.Trainer`, or a subclass of it, and uses its attributes. Type checkers therefore
see `TrainerPart` as the `Trainer` itself; when the code runs it is an empty class, so that the mixin can be combined
with any trainer.
"""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as TrainerPart
else:

    class TrainerPart(ABC):  # noqa: B024 (its subclasses have the abstract methods)
        """Has nothing of its own."""


__all__ = ["TrainerPart"]
