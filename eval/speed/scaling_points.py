"""The points of `scaling.py`: axes, the settings of each point, and the order in which they are measured.

All axes but `rows` and `models` leave from one point, the real pair at the base settings, and change one setting. A
point that lies on several axes is measured once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

REAL = "real"
MICRO_BATCH = 4
_TRL_EVERY = 3  # of the points of an axis, the first one included


@dataclass(frozen=True)
class Settings:
    """What an update is measured on."""

    tokens: int = 64
    """Tokens of the longest response."""
    sequences: int = 8
    """Responses of the update."""
    student: str = REAL
    """The real student, or the name of a size of `scaling_models`, which then has random weights."""
    teacher: str = REAL
    """The same for the teacher."""
    vocabulary: int | None = None
    """Entries of the vocabulary, with random heads; None leaves the real one."""
    ratio: float = 1.0
    """How many times as long as the shortest response the longest one is. The mean does not depend on it much."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response: equal steps from the shortest to the longest one, of mean `tokens`.

        Neighbours are apart, as in a batch that is sampled.
        """
        shortest, last = 2 * self.tokens / (1 + self.ratio), max(self.sequences - 1, 1)
        ordered = [round(shortest * (1 + (self.ratio - 1) * i / last)) for i in range(self.sequences)]
        step = 5 if self.sequences % 5 else 3 if self.sequences % 3 else 1
        return [max(ordered[i * step % self.sequences], 1) for i in range(self.sequences)]


@dataclass(frozen=True)
class Point:
    """One point of an axis."""

    axis: str
    """The name of the axis."""
    x: float
    """Where the point lies on the axis; for sizes of models it is read off the model that was measured."""
    label: str
    """How the point is named."""
    kind: str
    """`update`, `rows` or `models`: what is measured."""
    settings: Settings | None
    """The settings of an update."""
    trl: bool = False
    """Whether TRL is measured too."""

    @property
    def key(self) -> str:
        """Text that is the same for points that are measured alike."""
        own = asdict(self.settings) if self.settings is not None else {"x": self.x}
        return json.dumps({"kind": self.kind, **own}, sort_keys=True)

    def __str__(self) -> str:
        return f"{self.axis} {self.label}"


Values = tuple[int | float | str, ...]
_FIELDS = {
    "tokens": "tokens",
    "responses": "sequences",
    "vocabulary": "vocabulary",
    "student": "student",
    "teacher": "teacher",
    "padding": "ratio",
    "samples": "samples_per_prompt",
}
_REAL_VOCABULARY = 49_152
_SIZES = {"10M": 10e6, "35M": 35e6, REAL: 135e6, "360M": 360e6, "500M": 500e6, "1700M": 1.7e9}
_FULL: dict[str, Values] = {
    "tokens": (32, 64, 128, 256, 512, 1024),
    "responses": (8, 16, 32, 64, 128, 512),
    "vocabulary": (16_384, 32_768, _REAL_VOCABULARY, 98_304, 131_072, 262_144),
    "student": ("10M", "35M", REAL, "360M", "500M"),
    "teacher": ("10M", "35M", REAL, "360M", "500M"),
    "padding": (1.0, 2.0, 4.0, 8.0, 16.0),
    "samples": (1, 2, 4, 8),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
    "models": (1, 2, 4),
}
_QUICK: dict[str, Values] = {
    "tokens": (32, 64, 256),
    "responses": (8, 16, 64),
    "vocabulary": (16_384, _REAL_VOCABULARY, 131_072),
    "student": ("10M", REAL, "360M"),
    "teacher": ("10M", REAL, "360M"),
    "padding": (1.0, 4.0, 16.0),
    "samples": (1, 4, 8),
    "rows": (1_000, 10_000, 100_000),
    "models": (1, 2, 3),
}
_CORNERS: dict[str, dict[str, int | float | str]] = {
    "long and many": {"tokens": 256, "sequences": 32},
    "large vocabulary, larger student": {"vocabulary": 131_072, "student": "360M"},
    "small student, large teacher, uneven": {
        **{"student": "35M", "teacher": "500M", "ratio": 8.0, "samples_per_prompt": 4, "sequences": 16},
    },
}
AXES = (*_FULL, "corners")
UNITS = {
    "tokens": "tokens of a response",
    "responses": "responses in an update",
    "vocabulary": "entries of the vocabulary",
    "student": "parameters of the student",
    "teacher": "parameters of the teacher",
    "padding": "longest / shortest response",
    "samples": "responses to a prompt",
    "rows": "rows of data",
    "models": "models in an evaluation",
    "corners": "",
}


def points(
    base: Settings, only: Sequence[str] = (), *, quick: bool = False, gpu: bool = False
) -> dict[str, list[Point]]:
    """Return the points of each axis.

    Args:
        base: The point that the axes leave from.
        only: The axes; by default all.
        quick: Whether an axis has three points, and corners are left out.
        gpu: Whether sizes are added that take too long on a processor.
    """
    found = {}
    for axis, values in (_QUICK if quick else _FULL).items():
        larger: Values = ("1700M",) if gpu and axis in ("student", "teacher") and not quick else ()
        found[axis] = [_point(axis, value, base, number) for number, value in enumerate((*values, *larger))]
    if not quick:
        found["corners"] = [
            Point("corners", float(number), label, "update", replace(base, **changes))  # pyright: ignore[reportArgumentType]
            for number, (label, changes) in enumerate(_CORNERS.items(), 1)
        ]
    return {axis: some for axis, some in found.items() if not only or axis in only}


def _point(axis: str, value: int | float | str, base: Settings, number: int) -> Point:
    """Point `number` of an axis."""
    if axis not in _FIELDS:
        return Point(axis, float(value), f"{value:,}", axis, None)
    given = None if axis == "vocabulary" and value == _REAL_VOCABULARY else value
    settings = replace(base, **{_FIELDS[axis]: given})  # pyright: ignore[reportArgumentType]
    x = _SIZES[value] if isinstance(value, str) else float(value)
    label = value if isinstance(value, str) else f"{value:,g}" if isinstance(value, float) else f"{value:,}"
    # TRL's responses all have the same length.
    return Point(axis, x, label, "update", settings, trl=number % _TRL_EVERY == 0 and settings.ratio == 1)


def in_order(axes: Mapping[str, Sequence[Point]]) -> list[Point]:
    """Return each point that has to be measured once, in the order in which they are.

    The first points of all axes come first, so that whatever is measured when time runs out covers all axes. A point
    of several axes is measured with TRL if one of them asks for it.
    """
    rounds = max((len(some) for some in axes.values()), default=0)
    found: dict[str, Point] = {}
    for number in range(rounds):
        for some in axes.values():
            if number < len(some):
                point = some[number]
                before = found.get(point.key)
                found[point.key] = point if before is None else replace(before, trl=before.trl or point.trl)
    return list(found.values())
