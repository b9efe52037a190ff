"""The speed of devices: looked up for GPUs by name, measured for CPUs, and None where it is not known."""

from __future__ import annotations

import time

import pytest
import torch

from minillm.errors import InputError
from minillm.models.hardware import card_like, card_named, measured_flops, peak_flops

SHAPES = [(64, 128, 256), (64, 256, 128), (64, 128, 20_000)]


def test_a_cpu_is_measured_within_its_time() -> None:
    start = time.perf_counter()
    found = measured_flops(torch.device("cpu"), torch.float32, [*SHAPES, (512, 1 << 14, 1 << 17)], seconds=0.2)
    assert time.perf_counter() - start < 2  # a busy machine may take longer than what was asked for
    assert 1e8 < found < 1e14


def test_the_fastest_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which every call takes a second."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("minillm.models.hardware.time.perf_counter", lambda: float(next(ticks)))
    found = measured_flops(torch.device("cpu"), torch.float32, SHAPES, seconds=10**5)
    assert found == 2 * 64 * 128 * (1 << 14)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, False, 989e12),
        ("NVIDIA H200", torch.float16, False, 989e12),
        ("NVIDIA H200", torch.float32, False, 67e12),
        ("NVIDIA H200", torch.float32, True, None),
        ("NVIDIA H200", torch.bfloat16, True, 989e12),
        ("A card of tomorrow", torch.bfloat16, False, None),
    ],
)
def test_the_peak_of_a_gpu_is_its_makers(
    name: str, dtype: torch.dtype, tf32: bool, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        assert peak_flops(torch.device("cuda"), dtype, SHAPES) == expected
        assert peak_flops(torch.device("xpu"), dtype, SHAPES) is None
    finally:
        matmul.fp32_precision = before


def test_cards_are_told_apart() -> None:
    speeds = {name: card_named(name) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H100 80GB HBM3")}
    assert [card.flops for card in speeds.values() if card] == [756e12, 835e12, 989e12]
    assert card_named("L400") is None


def test_a_card_is_named_by_its_words() -> None:
    for name, found, memory in (
        ("RTX 4090", "RTX 4090", 24),
        ("4090", "RTX 4090", 24),
        ("a100", "A100", 80),
        ("A100 40GB", "A100 40GB", 40),
        ("h100", "H100", 80),
        ("l4", "L4", 24),
    ):
        full, card = card_like(name)
        assert (full, card.memory) == (found, memory)
    assert not card_like("T4")[1].bf16
    for unknown in ("RTX 9999", "", "40"):
        with pytest.raises(InputError, match=r"no such card is known; allowed: B200, GH200, H200"):
            card_like(unknown)
