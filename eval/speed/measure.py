"""Timing side by side, and memory in fresh processes, for the benchmarks in this folder."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def alternate(runs: dict[str, Callable[[], Any]], repeats: int = 5, warm_ups: int = 1) -> dict[str, list[float]]:
    """Measure the seconds of each function. They take turns, so that a slow minute of the machine affects all of them.

    Args:
        runs: the functions, by name.
        repeats: how many times each is measured.
        warm_ups: how many times each runs before that, without being measured.

    Returns:
        The seconds of every repeat, by name.
    """
    for run in runs.values():
        for _ in range(warm_ups):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Measure the peak memory of `run` in bytes, above what the process held before it.

    `run` is called twice and the second call is measured. Memory that the call leaves allocated is included.
    """
    run()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return the resident memory of this process in bytes: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_fresh_process(script: str, *arguments: str) -> Any:
    """Run a script in a process of its own and return the JSON on the last line of its output.

    glibc returns large blocks to the system as soon as they are freed, so that the peak is not that of a
    fragmented heap.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
