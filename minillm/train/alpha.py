"""The teacher's share of a loss on text, and how it changes over a training. A light module: recipes read it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from minillm.config import Section, Share
from minillm.errors import InputError

_UNTIL = ("linear_to_zero",)
_WARM = ("wsd",)


class AlphaConfig(Section):
    """α in L = (1−α)·L_lm + α·L_kd. It follows from the number of the update alone, so a resume cannot change it.

    u is the share of the training that has passed. `linear_to_zero` with `until` is Knowledge Inheritance
    (arXiv 2105.13880), whose α is α₀·max(1 − u/until, 0). `wsd` (arXiv 2410.16215) rises over `warmup`, stays, and
    falls over `decay` as half a cosine.
    """

    value: Share = 0.9
    """The largest α. 0: no teacher is loaded and no store is read."""
    schedule: Literal["constant", "linear_up", "linear_down", "cosine", "wsd", "linear_to_zero"] = "constant"
    """The shape over the training."""
    warmup: Share = 0.1
    """For `wsd`, the share of the training over which α rises from 0."""
    decay: Share = 0.1
    """For `wsd`, the share of the training over which α falls at the end."""
    floor: Share = 0.0
    """For `cosine` and `wsd`, what is left of α at the end, as a share of `value`."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """For `linear_to_zero`, the share of the training after which α is 0, and the teacher is not read any more."""
    until_passed: bool = False
    """α is 0 for good once a validation on held-out text finds the student's loss below the teacher's, whatever the
    schedule says. A teacher that the student has passed holds it back (arXiv 2502.08606)."""

    @model_validator(mode="after")
    def _check(self) -> AlphaConfig:
        # A resolved recipe names every setting, so one that has its default is not refused.
        fields = type(self).model_fields
        given = {key for key in self.model_fields_set if getattr(self, key) != fields[key].default}
        for names, keys in ((_UNTIL, {"until"}), (_WARM, {"warmup", "decay"}), (("cosine", "wsd"), {"floor"})):
            if self.schedule not in names and keys & given:
                raise InputError(f"{' and '.join(sorted(keys & given))}: read with schedule: {' or '.join(names)} only")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise InputError(
                f"warmup + decay ({self.warmup:g} + {self.decay:g}) are longer than the training, whose length is 1"
            )
        return self

    def at(self, update: int, updates: int) -> float:
        """Return α of an update.

        Args:
            update: Its number, counted from 0.
            updates: Number of updates of the training.
        """
        return self.value * self._shape(min(update / max(updates, 1), 1.0))

    def _shape(self, u: float) -> float:
        if self.schedule == "linear_up":
            return u
        if self.schedule == "linear_down":
            return 1 - u
        if self.schedule == "cosine":
            return self._fallen(u)
        if self.schedule == "linear_to_zero":
            return max(1 - u / self.until, 0.0)
        if self.schedule == "wsd":
            if u < self.warmup:
                return u / self.warmup
            return self._fallen((u - 1 + self.decay) / self.decay) if u > 1 - self.decay else 1.0
        return 1.0

    def _fallen(self, x: float) -> float:
        """Half a cosine from 1 to the floor."""
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * x)) / 2
