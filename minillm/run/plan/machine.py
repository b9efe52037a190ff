"""The hardware that a recipe is planned for, and its speed.

The speed of a GPU is looked up by its name, and that of this machine's CPU is measured (`minillm.models.hardware`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minillm.errors import InputError
from minillm.models.device import cpu_multiplies_bfloat16
from minillm.models.hardware import Card, card_like, card_named, multiplication_speed, reading_speed
from minillm.models.shape import Shape
from minillm.rollout.engines.vllm_memory import GIB, sequences_at_once, vllm_is_installed
from minillm.run.plan.calibration import Calibration, Measured, find_calibration

__all__ = ["GIB", "Machine", "machine_for"]

# Lower bounds in seconds, however small the model is, as measured on an H100: the forward and backward of one layer
# (limited by PyTorch's kernel launches), and one decoding step of vLLM.
_LAYER_SECONDS, _DECODING_STEP_SECONDS = 4e-3, 12e-3
# The share of a CPU's matrix multiplication speed that weight updates, sampling and scoring reach, where the CPU is not
# calibrated (`minillm plan --calibrate`). It was measured on the student of the quickstart in float32, and by timing
# the phases of the quickstart (docs/tutorials/quickstart.md) against the bfloat16 products of eval/speed/head.py.
_CPU_UTILISATION = 0.6


@dataclass(frozen=True)
class Machine:
    """The hardware that a recipe is launched on: one GPU for each process, or this machine's CPU for all of them."""

    processes: int = 1
    """How many processes are launched."""
    memory: int = 80 * GIB
    """Bytes of memory that one process may use: of its GPU, or of the machine."""
    gpu: bool = True
    """Whether the processes use GPUs."""
    bf16: bool = True
    """Whether the hardware multiplies bfloat16. A CPU that does not computes in float32, whatever the recipe says."""
    shard: bool = False
    """Whether the student is sharded (FSDP2, ZeRO-3)."""
    flops: float = 989e12
    """Operations per second of one GPU in bfloat16; the default is an H100."""
    utilisation: float = 0.35
    """The share of these operations that training and scoring reach (model FLOPs utilisation, MFU)."""
    bandwidth: float = 3.35e12
    """Bytes per second that are read from memory. This bounds decoding, which reaches half of it."""
    float32: float = 67e12
    """Operations per second of one GPU in float32."""
    vllm: bool = True
    """Whether vLLM is installed, for `rollout.engine: auto`."""
    nodes: int = 1
    """How many machines the processes are on, equally many on each."""
    link: float = 12.5e9
    """Bytes per second that a machine sends to the others, and as many that it receives; the default is 100 Gbit/s."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that no training setting gives a dtype."""
        return 2 if self.bf16 else 4

    def seconds(self, flops: float, size: int) -> float:
        """The time for a number of operations that all processes share.

        Args:
            flops: operations of all processes together.
            size: bytes of the numbers that are computed with: 2 for bfloat16 and float16, 4 for float32.

        Returns:
            The time in seconds.
        """
        return flops / (self.processes * (self.flops if size == 2 else self.float32) * self.utilisation)

    def training_seconds(self, flops: float, size: int, layers: float) -> float:
        """The time for a number of training operations, which kernel launches bound from below on a GPU.

        Args:
            flops: operations of all processes together.
            size: bytes of the numbers that are computed with.
            layers: how many times each process runs the forward and backward of one layer.

        Returns:
            The time in seconds.
        """
        return max(self.seconds(flops, size), layers * _LAYER_SECONDS if self.gpu else 0.0)

    def decoding_seconds(
        self, model: Shape, size: int, sequences: int, new_tokens: int, length: float, mixed: Shape | None = None
    ) -> float:
        """The time to decode a batch of responses, without its arithmetic.

        Weights and cache are read once per token, at half of the memory's bandwidth.

        Args:
            model: the model that is sampled.
            size: bytes of a weight and of a number in the cache.
            sequences: responses in the batch. Those that the engine has no room for wait for the others.
            new_tokens: decoding steps, which the longest response needs.
            length: tokens of prompt and response when the response is finished.
            mixed: a teacher that is mixed in, and decodes the same tokens.

        Returns:
            The time in seconds.
        """
        at_once = min(sequences, sequences_at_once(sequences, self.gpu))
        models = [model] if mixed is None else [model, mixed]
        bytes_read = sum(each.parameters * size + at_once * length / 2 * each.cached(size) for each in models)
        step = max(2 * bytes_read / self.bandwidth, _DECODING_STEP_SECONDS if self.gpu else 0.0)
        return new_tokens * -(-sequences // max(at_once, 1)) * step


def machine_for(
    gpus: int | None = None,
    memory: int | None = None,
    flops: float | None = None,
    utilisation: float | None = None,
    shard: bool = False,
    nodes: int = 1,
    link: float | None = None,
    card: str | None = None,
) -> tuple[Machine, str]:
    """Describe the machine to plan for; what the arguments leave out is taken from the hardware of this machine.

    Args:
        gpus: number of processes with a GPU each, on all machines together; 0 plans for this machine's CPU, with one
            process on each machine; None for as many GPUs on each machine as this one has, or for eight H100 on each
            where it has none.
        memory: bytes of memory of one GPU, or of the machine.
        flops: operations per second of one GPU, or of the CPU, in every dtype.
        utilisation: the share of `flops` that is reached.
        shard: whether the student is sharded.
        nodes: number of machines, all like this one.
        link: bytes per second between machines, in each direction.
        card: the name of a GPU whose numbers are to be taken, instead of the GPUs that are here; one on each machine
            where `gpus` says no other number.

    A calibration of this machine (`minillm plan --calibrate`) replaces the maker's numbers, the measurement of a CPU,
    and the default share.

    Returns:
        The machine, and a phrase that says where the numbers of its speed come from.

    Raises:
        InputError: The GPUs cannot be spread equally over the machines, or the card is not known.
    """
    if gpus and gpus % nodes:
        raise InputError(f"--nodes {nodes}: --gpus {gpus} counts the GPUs of all nodes, and must be a multiple of it")
    if card is not None and gpus == 0:
        raise InputError(f"--card {card}: --gpus 0 plans for a CPU; leave one of them out")
    if card is not None:
        machine, source = _machine_of_card(card, gpus or nodes, memory, flops, utilisation)
    else:
        machine, source = _machine_for(gpus, memory, flops, utilisation, nodes)
    return replace(machine, shard=shard, nodes=nodes, link=link or machine.link), source


def _machine_for(
    gpus: int | None, memory: int | None, flops: float | None, utilisation: float | None, nodes: int
) -> tuple[Machine, str]:
    """The machine as far as its processes and their speed go; see `machine_for`."""
    if gpus == 0:
        return _cpu_machine(memory, flops, utilisation, nodes)
    default, count = Machine(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.cuda.get_device_properties(number) for number in range(count)]
    name = cards[0].name if cards else "H100"
    known = card_named(name)
    speed = known or Card(default.flops, default.float32, default.bandwidth)
    machine = Machine(
        processes=gpus or nodes * (len(cards) or 8),
        memory=memory or min((card.total_memory for card in cards), default=default.memory),
        flops=flops or speed.flops,
        utilisation=utilisation or default.utilisation,
        bandwidth=speed.bandwidth,
        float32=flops or speed.float32,
        bf16=all(map(_multiplies_bfloat16, cards)),
    )
    if not cards:
        return machine, "the speed of an H100: no GPU is here to look at (--gpus 0 plans for this machine's CPU)"
    calibration, unused = (None, "") if flops else find_calibration(Measured.here(gpu=True))
    if calibration is not None:
        return _calibrated(machine, calibration, utilisation), f"{name}, which is here, {_as_calibrated(calibration)}"
    return machine, _source_of_card(name, known) + (f"; {unused}" if unused else "")


def _multiplies_bfloat16(card: Any) -> bool:
    """Whether a GPU that is here multiplies bfloat16: NVIDIA's do since Ampere, AMD's that PyTorch runs on all do."""
    return torch.version.hip is not None or card.major >= 8


def _machine_of_card(
    name: str, processes: int, memory: int | None, flops: float | None, utilisation: float | None
) -> tuple[Machine, str]:
    """The machine with GPUs of this name, by their maker's numbers."""
    full, card = card_like(name)
    machine = Machine(
        processes=processes,
        memory=memory or card.memory * GIB,
        flops=flops or card.flops,
        utilisation=utilisation or Machine.utilisation,
        bandwidth=card.bandwidth,
        float32=flops or card.float32,
        bf16=card.bf16,
    )
    return machine, f"the maker's numbers for {full}"


def _source_of_card(name: str, known: Card | None) -> str:
    """Where the numbers of a GPU that is here come from, if it is not calibrated."""
    if known is None:
        return f"the speed of an H100: the speed of {name}, which is here, is not known; give it as --flops"
    return f"the maker's numbers for {name}, which is here"


def _calibrated(machine: Machine, found: Calibration, utilisation: float | None) -> Machine:
    """A machine with the speed that was measured; `utilisation` is the share that the user gave, if any."""
    share = utilisation or found.utilisation
    return replace(machine, flops=found.flops, float32=found.float32, bandwidth=found.bandwidth, utilisation=share)


def _as_calibrated(found: Calibration) -> str:
    return f"as calibrated on {found.date} (minillm plan --calibrate measures again)"


def _cpu_machine(memory: int | None, flops: float | None, utilisation: float | None, nodes: int) -> tuple[Machine, str]:
    """The CPU of this machine, and of others like it, as one process each; and where its speed comes from."""
    bf16 = cpu_multiplies_bfloat16()
    machine = Machine(
        processes=nodes,
        memory=memory or machine_memory(),
        gpu=False,
        bf16=bf16,
        utilisation=utilisation or _CPU_UTILISATION,
        vllm=vllm_is_installed(),
    )
    calibration, unused = (None, "") if flops else find_calibration(Measured.here(gpu=False))
    if calibration is not None:
        machine, how = _calibrated(machine, calibration, utilisation), _as_calibrated(calibration)
    else:
        float32 = flops or multiplication_speed(torch.float32)
        fastest = flops or (multiplication_speed(torch.bfloat16) if bf16 else float32)
        machine = replace(machine, flops=fastest, float32=float32, bandwidth=reading_speed())
        how = ("as given" if flops else "as measured just now") + (f"; {unused}" if unused else "")
    threads, dtype = torch.get_num_threads(), "bfloat16" if bf16 else "float32"
    return machine, f"this CPU ({threads} threads): {machine.flops:.1e} operations a second in {dtype}, {how}"


def machine_memory() -> int:
    """Bytes of this machine's memory, or the limit of its container where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # a container without a limit says "max"
            total = min(total, int(Path(file).read_text()))
    return total
