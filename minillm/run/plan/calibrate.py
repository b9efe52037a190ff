"""Measures this machine for `minillm plan`: matrix products, memory, and one small weight update."""

from __future__ import annotations

import datetime
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from minillm.data.batches import pad
from minillm.errors import InputError
from minillm.loss.in_forward import Scoring, bind_scoring, score
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, TokenScores
from minillm.models.device import cpu_multiplies_bfloat16, release_memory
from minillm.models.flops import dimensions_of, update_flops
from minillm.models.hardware import measured_flops, reading_speed
from minillm.models.head import TeacherStates
from minillm.run.plan.calibration import Calibration, Measured
from minillm.teacher.local import LocalTeacher

_SECONDS = 3.0  # for the products of one dtype
_UPDATES, _MOST_SECONDS = 3, 30.0  # updates that are measured, fewer if they take this long


@dataclass(frozen=True)
class _Sizes:
    """The random model and the batch of the small update."""

    hidden: int
    inner: int
    layers: int
    heads: tuple[int, int]
    vocab: int
    prompts: int
    tokens: int
    """Tokens of each prompt, and of each response."""


# As wide as the models that are trained on such devices, because narrow products are slower; but with few layers.
_ON_CPU = _Sizes(hidden=576, inner=1536, layers=6, heads=(9, 3), vocab=16384, prompts=8, tokens=64)
_ON_GPU = _Sizes(hidden=2048, inner=8192, layers=6, heads=(32, 8), vocab=32768, prompts=16, tokens=256)


def calibrate(gpu: bool) -> str:
    """Measure this machine and keep the result; this takes less than two minutes.

    Nothing else should run meanwhile. If it is interrupted, an earlier calibration remains as it was.

    Args:
        gpu: Whether to measure the first GPU, rather than the processor.

    Returns:
        What was measured, in a line.

    Raises:
        InputError: There is no GPU, or the file cannot be written.
    """
    if gpu and not torch.cuda.is_available():
        raise InputError("--calibrate: there is no GPU here; with --gpus 0 the processor is measured")
    busy = "" if gpu else _others_at_work()
    device, sizes = torch.device("cuda" if gpu else "cpu"), _ON_GPU if gpu else _ON_CPU
    bf16 = gpu or cpu_multiplies_bfloat16()
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.device("meta"):
        products = dimensions_of(_model(sizes)).products(1024)
    float32 = measured_flops(device, torch.float32, products, _SECONDS)
    flops = measured_flops(device, dtype, products, _SECONDS) if bf16 else float32
    bandwidth = _copying_speed(device) if gpu else reading_speed()
    utilisation = _update_speed(device, dtype, sizes) / flops
    release_memory()
    found = Calibration(flops, float32, bandwidth, utilisation, datetime.date.today().isoformat())
    of = Measured.here(gpu)
    file = found.save(of)
    return (
        f"calibrated {of}: {flops:.2e} operations a second in {str(dtype).removeprefix('torch.')}, {float32:.2e} in "
        f"float32, {bandwidth / 1e9:.0f} GB/s, a small update reaches {utilisation:.0%}; kept in {file}{busy}"
    )


def _others_at_work() -> str:
    """A remark for a processor that other processes use, which makes it look slower; empty if it is idle."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return ""
    if load < 0.5 * (os.cpu_count() or 1):
        return ""
    return f". The load of this machine was {load:.1f} when this began: calibrate again when nothing else runs"


def _model(sizes: _Sizes) -> Any:
    """A model with random weights in float32."""
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads[0],
        num_key_value_heads=sizes.heads[1],
        max_position_embeddings=2 * sizes.tokens,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _update_speed(device: torch.device, dtype: torch.dtype, sizes: _Sizes) -> float:
    """Operations per second of the fastest of a few weight updates on given responses, with the teacher's forward."""
    student = bind_scoring(_model(sizes).to(device))
    teacher = LocalTeacher(_model(sizes).to(device, dtype))
    generator = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(1, sizes.vocab, (2, sizes.prompts, sizes.tokens), generator=generator).tolist()
    batch, share = pad(prompts, responses, device), 1 / (sizes.prompts * sizes.tokens)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def loss_fn(part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        return scores.reverse_kl.sum() * share, ScoreGradients(reverse_kl=torch.full_like(scores.reverse_kl, share))

    def update() -> None:
        states = TeacherStates(torch.cat(teacher.hidden(prompts, responses)), teacher.head)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = score(student, Scoring(batch, ScoringSettings(), states, loss_fn))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    update()  # compiles, and allocates the moments
    _wait_for(device)
    taken: list[float] = []
    while not taken or (len(taken) < _UPDATES and sum(taken) < _MOST_SECONDS):
        start = time.perf_counter()
        update()
        _wait_for(device)
        taken.append(time.perf_counter() - start)
    lengths = [[float(sizes.tokens)] * sizes.prompts] * 2
    counted = update_flops(dimensions_of(student), dimensions_of(teacher.model), lengths[0], lengths[1])
    return (counted.teacher + counted.student + counted.head) / min(taken)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copying_speed(device: torch.device) -> float:
    """Bytes per second that a GPU reads and writes when it copies half a GiB, in the fastest of several copies."""
    source = torch.ones(1 << 27, device=device)
    target, taken = torch.empty_like(source), []
    for _ in range(10):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(taken)
