"""Independent pieces of work, several at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minillm.errors import JobError


@dataclass(frozen=True)
class Job:
    """A call to make, by a function that another process can import."""

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...]
    log: Path
    """Where what it prints goes, in a process of its own."""


def run_jobs(jobs: Sequence[Job], at_once: int, after: Callable[[], object] = lambda: None) -> None:
    """Make every call; `after` is called here whenever one has ended well.

    Args:
        at_once: 1 makes them here, in order. More start so many processes, which share the processor's cores alike; of
            several GPUs each process gets one, in turns.

    Raises:
        JobError: some failed, in processes of their own; all others are done.
        KeyboardInterrupt: after the processes that ran (Ctrl-C reaches them too) have ended; no further one was started.
    """
    if at_once == 1 or not jobs:
        for job in jobs:
            job.function(*job.arguments)
            after()
        return
    context = multiprocessing.get_context("spawn")
    waiting, places, failed = deque(jobs), deque(range(at_once)), []
    running: dict[int, tuple[Any, Job, int]] = {}
    try:
        with tqdm(total=len(jobs), desc=f"{at_once} at a time") as bar:
            while waiting or running:
                while waiting and places:
                    job, place = waiting.popleft(), places.popleft()
                    process = context.Process(
                        target=_work, args=(job, _gpu(place), _cores(place, at_once)), name=job.name
                    )
                    process.start()
                    running[process.sentinel] = (process, job, place)
                for sentinel in wait(list(running)):
                    assert isinstance(sentinel, int)
                    process, job, place = running.pop(sentinel)
                    process.join()
                    places.append(place)
                    if process.exitcode:
                        failed.append(job)
                    else:
                        after()
                    bar.update()
    finally:
        for process, _, _ in running.values():
            process.join()
    if failed:
        names = ", ".join(f"{job.name} ({job.log})" for job in failed)
        raise JobError(
            f"{len(failed)} of {len(jobs)} failed, and their logs say why: {names}. The others are done; the same command goes on"
        )


def _gpu(place: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a process, where there are GPUs."""
    count = torch.cuda.device_count()
    if not count:
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[place % count]


def _cores(place: int, at_once: int) -> list[int]:
    """The cores of a process, by number."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = len(cores) // at_once
    return cores[place * each : (place + 1) * each] if each else [cores[place % len(cores)]]


def _work(job: Job, gpu: str | None, cores: list[int]) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA is first used below
    elif hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # else the threads of two wait for each other on one core while another idles
    torch.set_num_threads(len(cores))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        job.function(*job.arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.exit(1)
