"""What a command shows: headings, progress, warnings and results, in a terminal, in a file, or as JSON lines.

The library shows things through `current()`. What libraries print is another matter (`minillm.capture`). It imports no
torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

Mode = Literal["plain", "quiet", "json"]
_REDRAW = 0.25  # seconds between two states of the line in a terminal
_EVERY = 60.0  # seconds between two lines of progress, where lines stay: at least, and a tenth of the time in all
RESPONSES = "responses"
"""The unit of tasks that sample."""
PART = "MINILLM_PART"  # set for a process that is a part of a command: how it shows what it does


class Terminal:
    """Where a command shows what it does.

    Args:
        mode: `plain`; `quiet`: errors and the last line only; `json`: one object a line, and nothing else on standard
            output.
        out, err: where to write; by default standard output and standard error at that moment.

    Attributes:
        heading: what a line of progress begins with.
        part: whether this process is a part of a command that shows headings and results itself.
        rest: estimates the seconds of everything after the present task, if anything can.
        whole: the progress of a task that later ones with the same unit are parts of.
    """

    def __init__(self, mode: Mode = "plain", out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.mode, self._out, self._err = mode, out, err
        self.heading, self.part = "", False
        self.rest: Callable[[], float | None] = lambda: None
        self.whole: Progress | None = None
        self._lock, self._line, self._passed = threading.RLock(), "", time.monotonic()

    @property
    def out(self) -> TextIO:
        """Standard output, wherever libraries write."""
        return self._out or sys.stdout

    @property
    def err(self) -> TextIO:
        """Standard error, wherever libraries write."""
        return self._err or sys.stderr

    @property
    def interactive(self) -> bool:
        """Whether a line can be written over."""
        return self.mode == "plain" and self.out.isatty()

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none (`COLUMNS` says another number)."""
        return shutil.get_terminal_size((80, 24)).columns

    def say(self, text: str) -> None:
        """Show a line about what is done now."""
        if self.mode == "plain":
            if self._line:  # which was about something else
                self._draw("")
            self._write(self.out, f"\x1b[1;36m{text}\x1b[0m" if self._colours else text)
        self._note(text)

    def show(self, text: str) -> None:
        """Show a part of the results."""
        if self.mode == "plain":
            self._write(self.out, text)

    def end(self, text: str) -> None:
        """Show the last line, where the results are; it is shown if `quiet`, too."""
        if self.mode != "json" and not self.part:
            self._write(self.out, text)

    def warn(self, text: str) -> None:
        """Show a line on standard error."""
        if self.mode != "quiet":
            self._write(self.err, text)

    def pass_by(self, text: str) -> None:
        """Show a state that the next one replaces: in a terminal over the line before, elsewhere now and then."""
        now = time.monotonic()
        if self.mode != "plain" or now - self._passed < (_REDRAW if self.interactive else _EVERY):
            return
        self._passed = now
        if self.interactive:
            self._draw(text)
        else:
            self._write(self.out, text)

    def event(self, kind: str, **facts: Any) -> None:
        """Write a JSON object in a line of its own, where that is asked for."""
        if self.mode == "json" and not self.part:
            self._write(self.out, json.dumps({"event": kind, **facts}, ensure_ascii=False, default=str))

    @property
    def _colours(self) -> bool:
        return self.interactive and "NO_COLOR" not in os.environ

    def _write(self, stream: TextIO, text: str) -> None:
        with self._lock:
            if self._line:
                self.out.write("\r\x1b[K")
            stream.write(f"{text}\n")
            stream.flush()
            if self._line:
                self._draw(self._line)

    def _draw(self, line: str) -> None:
        """Write a line over the one that is there; an empty one takes it away."""
        with self._lock:
            self._line = line[: max(self.width - 1, 1)]
            self.out.write(f"\r\x1b[K{self._line}")
            self.out.flush()

    def _note(self, text: str) -> None:
        """Write a line that has been shown to the log, where there is one."""

    def environment(self) -> dict[str, str]:
        """What tells a process that is started as a part of this command how to show what it does."""
        return {PART: json.dumps({"mode": self.mode, "heading": self.heading, "rest": self.rest()})}

    def streams(self) -> dict[str, Any]:
        """Standard output and standard error for a process that is started as a part, for `subprocess`."""
        return {} if self._out is None else {"stdout": self.out.fileno(), "stderr": self.err.fileno()}


class Progress:
    """The progress of one task: in a terminal a line that is written over, elsewhere a line now and then.

    Inside of `whole`, a task with its unit counts there.

    Args:
        total: units in all; 0 if that is not known.
        unit: what is counted.
        doing: what is done, where the heading does not say it.
        hidden: show nothing.
    """

    def __init__(self, total: int, unit: str, doing: str = "", *, hidden: bool = False) -> None:
        self.total, self.unit, self.doing, self.done, self.note = total, unit, doing, 0, ""
        self._first, self._begun = 0, time.monotonic()
        self._terminal, self._shown = current(), self._begun
        whole = self._terminal.whole
        self._hidden = hidden or self._terminal.mode != "plain"
        self._within = whole if whole is not None and whole.unit == unit else None

    def start_at(self, done: int) -> None:
        """Count from here; what was done before says nothing of the speed."""
        self.done = self._first = done

    def update(self, number: int = 1, note: str = "") -> None:
        """Count some more, and show it if it is time. `note` follows at the end of the line until another is given."""
        self.done, self.note = self.done + number, note or self.note
        if self._hidden:
            return
        if self._within is not None:
            self._within.update(number, note)
            return
        terminal, now = self._terminal, time.monotonic()
        wait = _REDRAW if terminal.interactive else max(_EVERY, 0.1 * self._expected(now))
        if now - self._shown < wait:
            return
        self._shown = now
        if terminal.interactive:
            terminal._draw(self.text(now))
        else:
            terminal._write(terminal.out, self.text(now))

    def close(self) -> None:
        """Take the line away."""
        if self._terminal.interactive and not self._hidden and self._within is None:
            self._terminal._draw("")

    def seconds_left(self, now: float) -> float | None:
        """The rest of the task at the speed so far; None while nothing has been done."""
        done = self.done - self._first
        return (self.total - self.done) * (now - self._begun) / done if done > 0 and self.total else None

    def _expected(self, now: float) -> float:
        return (now - self._begun) + (self.seconds_left(now) or 0.0)

    def text(self, now: float) -> str:
        """The line."""
        share = f"/{self.total} {self.unit}, {self.done / self.total:.0%}" if self.total else f" {self.unit}"
        left, parts = self.seconds_left(now), [f"{self.done}{share}"]
        if left is not None:
            rest = self._terminal.rest()
            parts.append(f"{duration(left)} left" + (f" (run: {duration(left + rest)})" if rest is not None else ""))
        parts += [self.note] if self.note else []
        return " ".join(part for part in (self._terminal.heading, self.doing, ", ".join(parts)) if part)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def whole(total: int, unit: str, done: int = 0) -> Iterator[None]:
    """Count the tasks with this unit as parts of one.

    Args:
        total: units in all.
        unit: what is counted.
        done: how many were done before.
    """
    terminal = current()
    with Progress(total, unit) as progress:
        progress.start_at(done)
        terminal.whole = progress
        try:
            yield
        finally:
            terminal.whole = None


class Bar:
    """What libraries use of a tqdm bar, shown as `Progress`.

    Args:
        iterable: a bar over something shows nothing: that takes a moment only.
        total: units in all.
    """

    def __init__(self, iterable: Any = None, *, total: int = 0, **_: Any) -> None:
        self.n, self.postfix, self._iterable, self._begun = 0, "", iterable, time.monotonic()
        self._progress = Progress(total, RESPONSES)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    @property
    def format_dict(self) -> dict[str, float]:
        """`elapsed`: seconds since the beginning."""
        return {"elapsed": max(time.monotonic() - self._begun, 1e-9)}

    def update(self, number: int = 1) -> None:
        """Count some more."""
        self.n += number
        self._progress.update(number)

    def refresh(self) -> None:
        """Nothing: the line is drawn when it is time."""

    def close(self) -> None:
        """Take the line away."""
        self._progress.close()


def duration(seconds: float) -> str:
    """A time in words: `1 h 05 min`, `3 min`, `40 s`."""
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


_current = Terminal()


def current() -> Terminal:
    """Where to show something now."""
    return _current


def use(terminal: Terminal) -> Terminal:
    """Show things there from now on; returns where they were shown before."""
    global _current
    before, _current = _current, terminal
    return before
