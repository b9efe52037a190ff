"""What this machine computes on, and in which dtype it is quick."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch


def device() -> torch.device:
    """Where a model that is not trained runs: the accelerator, if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@cache
def cpu_multiplies_bfloat16() -> bool:
    """A CPU without AVX-512 or its like emulates it, 5 to 180 times slower than it multiplies float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_bfloat16() -> bool:
    """Whether bfloat16 is worth computing in here."""
    return device().type != "cpu" or cpu_multiplies_bfloat16()


def working_dtype() -> torch.dtype:
    """What models run in where nothing else is asked for: bfloat16, or float32 where that is emulated."""
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def release_memory() -> None:
    """Models and caches that are done with, which hold each other in cycles, go back to the system, or to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what PyTorch keeps for itself vLLM could not have
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps freed blocks otherwise


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """On a CPU with glibc: large blocks that are freed stay with the process inside, and go back to the system at the end.

    Otherwise each goes back to the kernel at once, and every page of the next one is faulted in anew. That was a third of the time
    of TRL's fine-tuning, which makes and frees the same half gigabyte again and again. Where blocks of many sizes come and go, holes
    that nothing fits into add up instead: the quickstart's minillm stage grew from 5.7 to 10.9 GB in 24 updates, and was hardly faster.
    """
    mmap_max, trim_threshold = -4, -1  # of malloc.h

    def allow(mapped: int, spare: int) -> None:
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(mmap_max, mapped)
            libc.mallopt(trim_threshold, spare)

    if torch.cuda.is_available():
        yield
        return
    allow(0, 2**31 - 1)
    try:
        yield
    finally:
        allow(
            65536, 64 << 20
        )  # glibc no longer moves the size from which blocks are mapped one by one, which costs memory, not time
        release_memory()


def machine() -> str:
    """What measured something: the accelerator's name, or the processor's and the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"
