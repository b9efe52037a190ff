"""Independent jobs, several at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from minillm.errors import JobError
from minillm.terminal import Progress


@dataclass(frozen=True)
class Job:
    """A call of a function that another process can import."""

    name: str
    """The name of the job in messages, and of its process."""
    function: Callable[..., object]
    """The function to call."""
    arguments: tuple[Any, ...]
    """Its positional arguments."""
    log: Path
    """The file that gets the output of the job, where it has a process of its own."""


def run_jobs(jobs: Sequence[Job], at_once: int, after: Callable[[], object] = lambda: None) -> None:
    """Run all jobs.

    Args:
        jobs: the jobs.
        at_once: how many run at the same time. With 1 they run in this process, in order. With more, each has a process
            of its own with an equal share of the CPU's cores, or with one of the GPUs, which are given out in turns.
        after: called in this process after every job that succeeds.

    Raises:
        JobError: jobs failed in processes of their own; all others are done.
        KeyboardInterrupt: Ctrl-C, which the running processes get as well. They have ended, and no other was started.
    """
    if at_once == 1 or not jobs:
        for job in jobs:
            job.function(*job.arguments)
            after()
        return
    context = multiprocessing.get_context("spawn")
    waiting, free_slots, failed = deque(jobs), deque(range(at_once)), []
    running: dict[int, tuple[SpawnProcess, Job, int]] = {}
    try:
        with Progress(len(jobs), "runs", f"{at_once} at a time:") as shown:
            while waiting or running:
                while waiting and free_slots:
                    job, slot = waiting.popleft(), free_slots.popleft()
                    arguments = (job, gpu_of_slot(slot), cores_of_slot(slot, at_once))
                    process = context.Process(target=_run_in_process, args=arguments, name=job.name)
                    process.start()
                    running[process.sentinel] = (process, job, slot)
                for sentinel in wait(list(running)):
                    assert isinstance(sentinel, int)
                    process, job, slot = running.pop(sentinel)
                    process.join()
                    free_slots.append(slot)
                    if process.exitcode:
                        failed.append(job)
                    else:
                        after()
                    shown.update()
    finally:
        for process, _, _ in running.values():
            process.join()
    if failed:
        names = ", ".join(f"{job.name} ({job.log})" for job in failed)
        raise JobError(
            f"{len(failed)} of {len(jobs)} failed, and their logs say why: {names}. The others are done; the same "
            "command continues"
        )


def gpu_of_slot(slot: int) -> str | None:
    """Choose the GPU of a process. GPUs are given out in turns.

    Args:
        slot: number of the process among those that run at the same time.

    Returns:
        The value of CUDA_VISIBLE_DEVICES for the process; None if there are no GPUs.
    """
    count = torch.cuda.device_count()
    if not count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(count)])[slot % count]


def cores_of_slot(slot: int, at_once: int) -> list[int]:
    """Choose the CPU cores of a process. Processes share cores only if there are fewer cores than processes.

    Args:
        slot: number of the process among those that run at the same time.
        at_once: how many processes run at the same time.

    Returns:
        The numbers of the cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = len(cores) // at_once
    return cores[slot * each : (slot + 1) * each] if each else [cores[slot % len(cores)]]


def _run_in_process(job: Job, gpu: str | None, cores: list[int]) -> None:
    """Run a job in the process that was started for it, and exit with 1 where it fails."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # nothing has used CUDA in this process before
    elif hasattr(os, "sched_setaffinity"):
        # Otherwise the threads of two processes wait for each other on one core while another core is idle.
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        job.function(*job.arguments)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
