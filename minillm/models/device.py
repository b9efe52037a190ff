"""The device and dtype that this machine computes with, and how memory returns to it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch


def device() -> torch.device:
    """Return the device for a model that is not trained: the accelerator if there is one, otherwise the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 natively.

    A CPU without AVX-512 or similar instructions emulates it, 5 to 180 times slower than it multiplies float32.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextlib.contextmanager
def float32_from_bfloat16_products(enabled: bool = True) -> Iterator[None]:
    """On a CPU that multiplies bfloat16, have products of float32 matrices round their factors to bfloat16.

    The products are summed and returned in float32, as `out_dtype` does it on a GPU. A product of bfloat16 matrices
    would be rounded to bfloat16 as well, by which a logit of 20 is off by up to 0.06. On other CPUs, and for products
    on other devices, nothing changes. The setting is one of the whole process, so the context should hold nothing but
    the products.

    Args:
        enabled: Whether to do so; otherwise the context changes nothing.
    """
    if not (enabled and cpu_multiplies_bfloat16()):
        yield
        return
    setting: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def fast_bfloat16() -> bool:
    """Return whether bfloat16 is fast on the device of this machine."""
    return device().type != "cpu" or cpu_multiplies_bfloat16()


def working_dtype() -> torch.dtype:
    """Return the dtype for models if none is asked for: bfloat16, or float32 if bfloat16 is emulated."""
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def release_memory() -> None:
    """Collect garbage, empty the CUDA cache and trim the glibc heap.

    Models and caches that are no longer needed can refer to each other in cycles, so that their memory is not freed
    without a collection.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # vLLM could not use memory that PyTorch keeps for itself
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise glibc keeps freed blocks


def release_cpu_memory(device: torch.device) -> None:
    """On a CPU, return freed memory: sampling and updates allocate different sizes, which fragments the heap."""
    if device.type == "cpu":
        release_memory()


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """On a CPU with glibc, keep large freed blocks in the process inside the context, and return them at its end.

    Otherwise each block returns to the kernel at once, and every page of the next one is faulted in anew. That was a
    third of the time of TRL's fine-tuning, which allocates and frees the same half gigabyte again and again. If blocks
    of many sizes are allocated, holes that no block fits into add up instead: the quickstart's minillm stage grew from
    5.7 to 10.9 GB in 24 updates, and was hardly faster.
    """
    if torch.cuda.is_available():
        yield
        return
    try:
        with large_blocks_kept():
            yield
    finally:
        release_memory()


@contextlib.contextmanager
def large_blocks_kept(enabled: bool = True) -> Iterator[None]:
    """With glibc, keep large freed blocks for the next ones inside the context: for a loop over equal sizes.

    At the end nothing is collected or returned but what lies at the end of the heap.

    Args:
        enabled: Whether to do so; otherwise the context changes nothing.
    """
    if not enabled:
        yield
        return
    _set_malloc(0, 2**31 - 1)
    try:
        yield
    finally:
        # Once it is set, glibc no longer adapts the size from which blocks are mapped one by one: it gets the largest
        # that it would adapt itself to.
        _set_malloc(65536, 64 << 20)


def _set_malloc(mapped: int, spare: int) -> None:
    """Set how many blocks may be mapped one by one, and how many free bytes the heap may keep."""
    mmap_threshold, mmap_max, trim_threshold = -3, -4, -1  # M_MMAP_THRESHOLD, M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(mmap_max, mapped)
        libc.mallopt(trim_threshold, spare)


def machine() -> str:
    """Return the name of the hardware for measurements: the accelerator, or the processor and the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """Return the name of the processor; `CPU` if the system does not say it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
