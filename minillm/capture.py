"""Sends what a command and its libraries write to a log, and shows what a user should see of it.

Whatever writes it: Python, a library in C++, another process that was started. What means nothing (`minillm.noise`) is
in the log only; the rest is shown within a moment. It imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO

from minillm.errors import Interrupted
from minillm.noise import Sieve, download_in, is_noise
from minillm.terminal import PART, Mode, Terminal, current, use

_LOOK = 0.3  # seconds between two looks at what libraries have written
_WAITS = 1.5  # seconds after which a line without an end is taken for a question


class _Captured(Terminal):
    """A terminal beside a log to which the process's standard output and standard error go."""

    def __init__(self, mode: Mode, *, all_lines: bool) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # so that the log has every line at once
        self._saved = os.dup(1), os.dup(2)
        out, err = (open(number, "w", encoding="utf-8", errors="replace", closefd=False) for number in self._saved)  # noqa: SIM115 (open until the command ends)
        super().__init__(mode, out, err)
        self._log: IO[bytes] = tempfile.TemporaryFile("ab+")  # noqa: SIM115
        self.log: Path | None = None
        self._sieve, self._all, self._read, self._rest_of_line = Sieve(), all_lines, 0, b""
        self._question = b"", 0.0  # a line without an end, and when it was begun
        self._connect()
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def keep_log(self, file: Path) -> None:
        """Write the log to a file from here on, after what there is so far."""
        with self._lock:
            self.drain()
            begun = b"" if self.log else os.pread(self._log.fileno(), self._read, 0)
            file.parent.mkdir(parents=True, exist_ok=True)
            log = file.open("ab+")
            log.write(f"» {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode() + begun)
            log.flush()
            self._log.close()
            self._log, self.log, self._read = log, file, log.tell()
            self._connect()

    def _connect(self) -> None:
        for number in (1, 2):
            os.dup2(self._log.fileno(), number)

    def _note(self, text: str) -> None:
        self.drain()
        begin = b"\n" if self._rest_of_line else b""  # after a line that has no end yet
        self._log.write(begin + f"» {text}\n".encode())
        self._log.flush()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK):
            self.drain()
            self._show_question()

    def _show_question(self) -> None:
        """Show a line that has no end: a tracker that wants a key, say, asks and waits."""
        with self._lock:
            text, (before, since) = self._rest_of_line, self._question
            if text != before:
                self._question = text, time.monotonic()
            elif text and time.monotonic() - since > _WAITS and since:
                self._question = text, 0.0  # shown once
                for line in self._sieve.pick([text.decode("utf-8", "replace")]):
                    self.warn(line)

    def drain(self) -> None:
        """Show what should be seen of what has been written since."""
        with self._lock:
            pieces = [self._rest_of_line]
            while piece := os.pread(self._log.fileno(), 1 << 20, self._read):
                pieces.append(piece)
                self._read += len(piece)
            *lines, self._rest_of_line = b"".join(pieces).replace(b"\r", b"\n").split(b"\n")
            texts = [line.decode("utf-8", "replace") for line in lines]
            if (download := download_in(texts)) is not None:
                self.pass_by(download)
            for line in texts if self._all else self._sieve.pick(texts):
                if not (self._all and line.startswith("» ")):
                    self.warn(line)

    def close(self) -> None:
        """Give standard output and standard error back."""
        self._stop.set()
        self._thread.join()
        if self._line:
            self._draw("")
        self.drain()
        for saved, number in zip(self._saved, (1, 2), strict=True):
            os.dup2(saved, number)
        for stream in (self.out, self.err):
            stream.flush()
        for saved in self._saved:
            os.close(saved)
        self._log.close()


@contextmanager
def opened(mode: Mode = "plain", *, all_lines: bool = False) -> Iterator[Terminal]:
    """Show what a command does, and send what libraries write to a log (`keep_log`).

    Where standard output is no real one, as in tests and notebooks, libraries write where they did.

    Args:
        mode: see `Terminal`.
        all_lines: show all that libraries write.
    """
    part = json.loads(os.environ.pop(PART, "null"))
    other = int(os.environ.get("RANK", 0)) > 0  # a process that accelerate has launched beside the one that shows
    mode = part["mode"] if part else "quiet" if other else mode
    os.environ.setdefault("TQDM_MININTERVAL", "10")  # of bars that are in the log only
    terminal: Terminal = _Captured(mode, all_lines=all_lines) if _is_real() else Terminal(mode)
    terminal.part = other
    if part:
        rest: float | None = part["rest"]
        terminal.part, terminal.heading, terminal.rest = True, part["heading"], lambda: rest
    before = use(terminal)
    try:
        yield terminal
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed"
        said = str(error).strip() or type(error).__name__
        terminal._note(f"{status}: {said}")
        terminal.event("run", status=status, error=said)
        if isinstance(terminal, _Captured) and terminal.log is not None and status == "failed":
            terminal.warn(f"What was printed before is in {terminal.log}")
        raise
    finally:
        use(before)
        if isinstance(terminal, _Captured):
            terminal.close()


class WithoutNoise(logging.Filter):
    """Keeps warnings that mean nothing from the terminal, where a command has no log that keeps them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return isinstance(current(), _Captured) or not is_noise(record.getMessage())


def _is_real() -> bool:
    """Whether standard output and standard error are those of the process."""
    with suppress(OSError, ValueError, AttributeError):
        return sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
    return False


def keep_log(file: Path) -> None:
    """Keep the log of the present command in a file, if there is one."""
    terminal = current()
    if isinstance(terminal, _Captured):
        terminal.keep_log(file)
