"""What a plan consists of: phases, each with its memory, operations and time."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.run.plan.machine import Machine
from minillm.run.plan.memory import Parts


@dataclass
class Phase:
    """One phase of a run: its memory in one process, and its cost in all processes together."""

    name: str
    """The stage, with the part of it that the phase is."""
    parts: Parts = field(default_factory=dict)
    """Bytes in one process by purpose."""
    flops: float = 0.0
    """Floating-point operations of all processes."""
    seconds: float = 0.0
    """The time that the phase takes."""

    @property
    def peak(self) -> float:
        """Bytes of memory in one process."""
        return sum(self.parts.values())


@dataclass
class Plan:
    """The phases of a recipe on a machine."""

    phases: list[Phase]
    """In the order of the stages."""
    machine: Machine
    """The machine that the recipe is planned for."""
    overrides: list[str] = field(default_factory=list)
    """The `section.key=value` settings that `fit_recipe` changed."""

    @property
    def peak(self) -> float:
        """Bytes of memory in one process, in the phase that needs most."""
        return max((phase.peak for phase in self.phases), default=0.0)

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the machine's memory."""
        return self.peak <= self.machine.memory

    @property
    def hours(self) -> float:
        """The time of all phases, in hours."""
        return sum(phase.seconds for phase in self.phases) / 3600
