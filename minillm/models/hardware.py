"""The speed of this machine's hardware: a GPU's is looked up by its name, and a CPU's is measured."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minillm.errors import InputError

# Sizes of the matrices that are measured: wider ones take memory and are not faster, narrower ones are slower.
_WIDEST, _NARROWEST = 1 << 14, 128


class Card(NamedTuple):
    """The speed of a GPU as its maker states it."""

    flops: float
    """Operations per second in bfloat16 without sparsity (in float16 for a card that has no bfloat16)."""
    float32: float
    """Operations per second in float32."""
    bandwidth: float
    """Bytes per second that are read from the card's memory."""
    memory: int = 80
    """GiB of memory. Of a card that is sold with several sizes it is the smallest."""
    bf16: bool = True
    """Whether it multiplies bfloat16."""


# The keys are regular expressions; the first one that occurs in the name of a card applies.
_CARDS = {
    "B200": Card(2250e12, 80e12, 8.0e12, 180),
    "GH200": Card(989e12, 67e12, 4.0e12, 96),
    "H200": Card(989e12, 67e12, 4.8e12, 141),
    "H100 NVL": Card(835e12, 60e12, 3.9e12, 94),
    "H100 PCIe": Card(756e12, 51e12, 2.0e12, 80),
    "H100": Card(989e12, 67e12, 3.35e12, 80),
    "H20": Card(148e12, 44e12, 4.0e12, 96),
    "A100.*40GB": Card(312e12, 19.5e12, 1.56e12, 40),
    "A100": Card(312e12, 19.5e12, 2.0e12, 80),
    "L40S": Card(362e12, 92e12, 0.86e12, 48),
    "L40": Card(181e12, 90e12, 0.86e12, 48),
    "L4": Card(121e12, 30e12, 0.3e12, 24),
    "A10G": Card(70e12, 31e12, 0.6e12, 24),
    "A10": Card(125e12, 31e12, 0.6e12, 24),
    "RTX A6000": Card(155e12, 39e12, 0.77e12, 48),
    "RTX 6000 Ada": Card(364e12, 91e12, 0.96e12, 48),
    "RTX 5090": Card(210e12, 105e12, 1.79e12, 32),
    "RTX 4090": Card(165e12, 83e12, 1.01e12, 24),
    "RTX 3090": Card(71e12, 36e12, 0.94e12, 24),
    "V100": Card(125e12, 16e12, 0.9e12, 16, bf16=False),
    "T4": Card(65e12, 8e12, 0.32e12, 16, bf16=False),
    "MI300X": Card(1307e12, 163e12, 5.3e12, 192),
}


def card_named(name: str) -> Card | None:
    """Return the speed of a GPU, or None if it is not known.

    Args:
        name: What PyTorch calls the GPU.
    """
    return next((card for pattern, card in _CARDS.items() if re.search(rf"\b{pattern}\b", name)), None)


def card_like(name: str) -> tuple[str, Card]:
    """Return the GPU that a user names, with its speed and its memory.

    Args:
        name: Its name, or words of it: `RTX 4090`, `4090`, `a100`.

    Raises:
        InputError: No card of the list has this name.
    """
    cards, wanted = {pattern.replace(".*", " "): card for pattern, card in _CARDS.items()}, name.strip().lower()
    near = [each for each in cards if wanted and re.search(rf"\b{re.escape(wanted)}\b", each.lower())]
    for each in sorted(near, key=lambda each: each.lower() != wanted):
        return each, cards[each]
    raise InputError(f"--card {name}: no such card is known; allowed: {', '.join(cards)}")


def peak_flops(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float | None:
    """Return how many operations per second a device can reach in matrix products.

    Args:
        device: The device. The number for a GPU is its maker's. A CPU is measured, which takes up to 0.3 seconds.
        dtype: Dtype of the matrices.
        shapes: The shapes of the products that a CPU is measured with, as for `measured_flops`.

    Returns:
        Operations per second, or None if they are not known: for other devices, cards that are not in the list, and
        products in float32 that a GPU makes in TF32, of which the list has no number.
    """
    if device.type == "cpu":
        return measured_flops(device, dtype, shapes)
    card = card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card is None or dtype.itemsize == 2:
        return card and card.flops
    return None if torch.backends.cuda.matmul.fp32_precision == "tf32" else card.float32


def measured_flops(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], seconds: float = 0.25
) -> float:
    """Measure how many operations per second a device reaches in matrix products: the fastest product counts.

    Args:
        device: The device, which should have nothing else to do.
        dtype: Dtype of the matrices.
        shapes: Rows, inner size and columns of each product. Sizes above 16,384 are cut to it.
        seconds: How long the measurement may take. Of a product that takes too long, fewer columns are computed.
    """
    end, best = time.perf_counter() + seconds, 0.0
    # A product of moderate size tells how large the others may be.
    tried = [(256, 512, 512), *sorted(shapes, key=lambda shape: shape[0] * shape[1] * shape[2])]
    for index, shape in enumerate(tried):
        rows, inner, columns = (min(size, _WIDEST) for size in shape)
        left = max(end - time.perf_counter(), 0.0)
        own = left / (len(tried) - index)
        # Three calls: to fill the matrices takes about as long as one, one warms up, and one is measured.
        affordable = int(best * own / 3 / (2 * rows * inner)) if best else columns
        columns = min(columns, affordable)
        if columns < _NARROWEST and best:
            continue
        left_matrix = torch.ones(rows, inner, dtype=dtype, device=device)
        right_matrix = torch.ones(columns, inner, dtype=dtype, device=device)
        taken = _fastest_call(lambda a=left_matrix, b=right_matrix: torch.nn.functional.linear(a, b), device, own)
        best = max(best, 2 * rows * inner * columns / taken)
    return best


def _fastest_call(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The time in seconds of the fastest call among at most 20 that fit into a time, after one warm-up call."""
    start = time.perf_counter()
    taken: list[float] = []
    for call in range(21):
        began = time.perf_counter()
        if len(taken) and began + taken[-1] > start + seconds:
            break
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if call:
            taken.append(time.perf_counter() - began)
    return min(taken)


@cache
def multiplication_speed(dtype: torch.dtype) -> float:
    """Operations per second of this CPU's threads, in the fastest of several products of 1,024 × 1,024 matrices."""
    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / _fastest_seconds(lambda: torch.nn.functional.linear(left, right))


@cache
def reading_speed() -> float:
    """Bytes per second that all threads of this CPU read from memory."""
    numbers = torch.ones(1 << 26)
    return numbers.nbytes / _fastest_seconds(numbers.sum)


def _fastest_seconds(run: Callable[[], object]) -> float:
    """The time in seconds of the fastest call among those that fit into 0.3 seconds, after one warm-up call.

    Time that other processes take from the CPU meanwhile does not count: where the CPU time of the threads divided by
    their number is shorter than the elapsed time of a call, it is taken instead.
    """
    run()
    taken: list[float] = []
    end = time.perf_counter() + 0.3
    while not taken or time.perf_counter() < end:
        start, worked = time.perf_counter(), time.process_time()
        run()
        taken.append(min(time.perf_counter() - start, (time.process_time() - worked) / torch.get_num_threads()))
    return min(taken)


def machine_facts() -> dict[str, Any]:
    """What this machine is, for records: its system, processor, memory and GPUs, and the threads that PyTorch uses."""
    cpu = re.search(r"^model name\s*: (.+)$", _text_of("/proc/cpuinfo"), re.M)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _text_of("/proc/meminfo"), re.M)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(number) for number in range(count)]
    return {
        "system": platform.platform(),
        "processor": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": int(memory[1]) * 1024 if memory else None,
        "gpus": [f"{card.name}, {card.total_memory / (1 << 30):.0f} GiB" for card in cards],
        "cuda": torch.version.cuda,
    }


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
