"""Every error that a person can mend, under one base class.

The command line prints a `MinillmError` as one line; anything else is a defect, ours or another library's, and keeps
its traceback. Each class also derives from the built-in exception that callers of the library would expect.
"""

from __future__ import annotations


class MinillmError(Exception):
    """Base of every error whose message tells a person what was wrong, where, and what is allowed."""


class InputError(MinillmError, ValueError):
    """A setting, an argument or a model that cannot be used, or cannot be combined with the others."""


class RecipeError(InputError):
    """A recipe that cannot run; the message has one line per fault, with file, line and key."""


class DataError(InputError):
    """A data file that cannot be used; the message names the file and the line."""


class VocabularyError(InputError):
    """Student and teacher do not share a vocabulary."""


class TrainingDiverged(InputError):
    """Numbers that no student can be trained on: not finite, or of an engine that samples another model."""


class OutOfMemory(MinillmError, RuntimeError):
    """The memory of a device does not hold what a setting asks for; the message names the setting."""


class MissingError(MinillmError, FileNotFoundError):
    """A file, a model or a package that is not there."""


class NotAFolderError(MinillmError, NotADirectoryError):
    """A file in the place of a folder."""


class SourceError(MinillmError, OSError):
    """A model that the hub does not give, or that cannot be read."""


class RunError(MinillmError, RuntimeError):
    """A run directory that does not fit the recipe, or lacks what a stage needs."""


class LengthError(RunError):
    """A training that cannot go on for longer as it is asked to; it is still what it was."""


class EngineError(MinillmError, RuntimeError):
    """What samples or scores rollouts is not available, or has stopped answering."""


class JobError(MinillmError, RuntimeError):
    """Jobs that failed, with the paths of their logs."""


class Interrupted(MinillmError):
    """Ctrl-C, after the work done so far was saved."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The text of another library's error, for a message of ours: on one line, and cut after `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} …"
