"""A time limit for templates, which come with models and recipes and may never end."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from minillm.errors import DataError

SECONDS = 10.0
"""That rendering one conversation may take. It takes a thousandth of a second."""

_LOCK = threading.Lock()
_running: dict[int, float] = {}  # by the number of the thread: when its time is over
_watching = False


class _TooSlow(BaseException):
    """Raised in a thread whose time is over; no template can catch it."""


@contextmanager
def time_limited(what: str) -> Iterator[None]:
    """End the body of the `with` statement when it has taken `SECONDS`.

    It works in every thread, and for what Python executes: for the loops of a template, and not within one operation.

    Args:
        what: What is limited, for the error.

    Raises:
        DataError: The time is over.
    """
    me = threading.get_ident()
    try:
        with _LOCK:
            _running[me] = time.monotonic() + SECONDS
            _watch()
        try:
            yield
        finally:
            with _LOCK:
                _running.pop(me, None)
    except _TooSlow:
        raise DataError(f"{what} was not rendered within {SECONDS:g} s: its loops may have no end") from None


def _watch() -> None:
    """Start the one thread that looks at the clock, if it does not run. The lock is held."""
    global _watching
    if not _watching:
        _watching = True
        threading.Thread(target=_look, name="template-limit", daemon=True).start()


def _look() -> None:
    """End what has taken too long; end with the last that is running."""
    global _watching
    while True:
        time.sleep(min(SECONDS / 4, 0.5))
        with _LOCK:
            if not _running:
                _watching = False
                return
            now = time.monotonic()
            for thread in [thread for thread, end in _running.items() if now > end]:
                del _running[thread]
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooSlow))
