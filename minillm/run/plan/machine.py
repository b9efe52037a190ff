"""What a recipe is launched on, and how fast that is: by the name of the GPU that is there, or as measured of this CPU."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from minillm.models.device import cpu_multiplies_bfloat16
from minillm.models.shape import Shape
from minillm.rollout.engines.vllm_memory import GIB, sequences_at_once, vllm_is_installed

__all__ = ["GIB", "Machine", "machine_for"]

# Seconds however few the numbers, as measured on an H100: of a layer's forward and backward (PyTorch's launches), and of a step of vLLM.
_LAYER, _STEP = 4e-3, 12e-3
# Of what a CPU reaches in one product of matrices, the share that updates, sampling and scoring reach: that of the quickstart's student in
# float32, and the quickstart's phases as they were timed (README.md) against eval/speed/head.py's products in bfloat16.
_OF_A_CPU = 0.6
# By name: operations a second in bfloat16 without sparsity (float16 where a card has no bfloat16), in float32, bytes a second from its
# memory; the makers' numbers. The first that a name has in it counts.
_CARDS = {
    "B200": (2250e12, 80e12, 8.0e12), "GH200": (989e12, 67e12, 4.0e12), "H200": (989e12, 67e12, 4.8e12),
    "H100 NVL": (835e12, 60e12, 3.9e12), "H100 PCIe": (756e12, 51e12, 2.0e12), "H100": (989e12, 67e12, 3.35e12),
    "H20": (148e12, 44e12, 4.0e12), "A100.*40GB": (312e12, 19.5e12, 1.56e12), "A100": (312e12, 19.5e12, 2.0e12),
    "L40S": (362e12, 92e12, 0.86e12), "L40": (181e12, 90e12, 0.86e12), "L4": (121e12, 30e12, 0.3e12), "A10G": (70e12, 31e12, 0.6e12),
    "A10": (125e12, 31e12, 0.6e12), "RTX A6000": (155e12, 39e12, 0.77e12), "RTX 6000 Ada": (364e12, 91e12, 0.96e12),
    "RTX 5090": (210e12, 105e12, 1.79e12), "RTX 4090": (165e12, 83e12, 1.01e12), "RTX 3090": (71e12, 36e12, 0.94e12),
    "V100": (125e12, 16e12, 0.9e12), "T4": (65e12, 8e12, 0.32e12), "MI300X": (1307e12, 163e12, 5.3e12),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a recipe is launched on; each process has a GPU, or all have this machine's CPU."""

    processes: int = 1
    memory: int = 80 * GIB
    gpu: bool = True
    bf16: bool = True
    """Whether it multiplies bfloat16; a CPU that does not computes in float32 whatever the recipe says."""
    shard: bool = False
    """The student in shards (FSDP2, ZeRO-3)."""
    flops: float = 989e12
    """Of one GPU in bfloat16 (an H100)."""
    utilisation: float = 0.35
    """Share of them that training and scoring reach (MFU)."""
    bandwidth: float = 3.35e12
    """Bytes a second from its memory, which bound decoding, of which it reaches half."""
    float32: float = 67e12
    """Operations a second of one GPU in float32."""
    vllm: bool = True
    """Whether vLLM is there for `rollout.engine: auto`."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight where no training setting says otherwise."""
        return 2 if self.bf16 else 4

    def seconds(self, flops: float, size: int) -> float:
        """Of so many operations of all processes on numbers of `size` bytes."""
        return flops / (self.processes * (self.flops if size == 2 else self.float32) * self.utilisation)

    def training_seconds(self, flops: float, size: int, layers: float) -> float:
        """The same, in so many forwards and backwards of a layer in each process."""
        return max(self.seconds(flops, size), layers * _LAYER if self.gpu else 0.0)

    def decoding_seconds(self, model: Shape, size: int, sequences: int, new_tokens: int, length: float) -> float:
        """Of a batch of answers, beside its arithmetic: weights and cache are read once a token, by half of the memory's bandwidth."""
        at_once = min(sequences, sequences_at_once(sequences, self.gpu))
        read = model.parameters * size + at_once * length / 2 * model.cached(size)
        return (
            new_tokens * -(-sequences // max(at_once, 1)) * max(2 * read / self.bandwidth, _STEP if self.gpu else 0.0)
        )


def machine_for(
    gpus: int | None = None,
    memory: int | None = None,
    flops: float | None = None,
    utilisation: float | None = None,
    shard: bool = False,
) -> tuple[Machine, str]:
    """A machine by what a person said of it, the rest by what is here; and in words what its speed rests on.

    Args:
        gpus: processes, a GPU each; 0 is this machine's CPU; None all GPUs of this machine, or eight H100 where it has none.
        memory: bytes of a GPU, or of the machine.
        flops: operations a second of a GPU, or of the CPU, in whatever dtype.
    """
    if gpus == 0:
        bf16 = cpu_multiplies_bfloat16()
        in_float32 = flops or _multiplied(torch.float32)
        fast = flops or (_multiplied(torch.bfloat16) if bf16 else in_float32)
        said = f"this CPU ({torch.get_num_threads()} threads): {fast:.1e} operations a second in {'bfloat16' if bf16 else 'float32'}"
        machine = Machine(
            1, memory or _ram(), False, bf16, shard, fast, utilisation or _OF_A_CPU, _read(), in_float32, vllm_is_installed()
        )  # fmt: skip
        return machine, said + (", as given" if flops else ", as measured just now")
    default, cards = Machine(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = [torch.cuda.get_device_properties(number) for number in range(cards)]
    name = here[0].name if here else "H100"
    known = next((speed for kind, speed in _CARDS.items() if re.search(rf"\b{kind}\b", name)), None)
    fast, in_float32, bandwidth = known or (default.flops, default.float32, default.bandwidth)
    machine = Machine(
        gpus or len(here) or 8, memory or min((card.total_memory for card in here), default=default.memory), True, True, shard,
        flops or fast, utilisation or default.utilisation, bandwidth, flops or in_float32,
    )  # fmt: skip
    if not here:
        return machine, "an H100's speed: no GPU is here to look at (--gpus 0 plans for this machine's CPU)"
    if known is None:
        return machine, f"an H100's speed: that of {name}, which is here, is not known: say --flops"
    return machine, f"the makers' numbers of {name}, which is here"


def _ram() -> int:
    """Bytes of this machine's memory, or what its container may have of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no limit reads "max"
            total = min(total, int(Path(file).read_text()))
    return total


@cache
def _multiplied(dtype: torch.dtype) -> float:
    """Operations a second that all threads of this CPU did in the best of some products of 1,024 × 1,024."""
    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / _best(lambda: torch.nn.functional.linear(left, right))


@cache
def _read() -> float:
    """Bytes a second that all threads of this CPU read."""
    numbers = torch.ones(1 << 26)
    return numbers.nbytes / _best(numbers.sum)


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest run, of as many as a third of a second takes, after one that warms up.

    What other processes take of the CPU meanwhile does not count: time of the threads is divided by their number.
    """
    run()
    taken: list[float] = []
    end = time.perf_counter() + 0.3
    while not taken or time.perf_counter() < end:
        start, worked = time.perf_counter(), time.process_time()
        run()
        taken.append(min(time.perf_counter() - start, (time.process_time() - worked) / torch.get_num_threads()))
    return min(taken)
