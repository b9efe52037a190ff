"""Every error that a person can mend, under one base class."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run directory that does not fit the recipe, or lacks what a stage needs."""


class Interrupted(Exception):
    """Ctrl-C, after what was done has been saved."""


class JobError(RuntimeError):
    """Pieces of work that failed, with where their logs are."""


class RecipeError(ValueError):
    """A recipe that cannot run; its text is one line per fault."""


class TrainingDiverged(ValueError):
    """A loss, a gradient norm, a weight or an optimiser's state is not finite."""


class VocabularyError(ValueError):
    """Student and teacher do not share a vocabulary."""


class DataError(ValueError):
    """A data file that cannot be used; the text names the file and the line."""


class EngineError(RuntimeError):
    """What draws or scores rollouts is not to be had, or has stopped answering."""
