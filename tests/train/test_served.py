"""Training with a real vLLM server that holds the teacher beside the student, and is killed twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from minillm.data.logprobs import mixture_logprobs
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.vllm_memory import vllm_is_installed
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import save, tiny_llama
from tests.rollout.test_engines import LENGTH, own_logprobs, start_server, stop_server
from tests.rollout.test_vllm_server_pair import documented_flags
from tests.train.common import PROMPTS, arguments, launch
from tests.train.two_processes import run

pytestmark = [
    pytest.mark.full,
    pytest.mark.vllm,
    pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed"),
]


def test_two_processes_share_a_server_of_their_own(pair: tuple[str, str], tmp_path: Path) -> None:
    """Process 0 starts it, both sample from it, and the weights become those of one process with its own server."""
    launch(pair, tmp_path / "two", "server")
    log = (tmp_path / "two" / "server.log").read_text()
    assert run(*pair, str(tmp_path / "one"), "server") == 1
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("one", "two"))
    assert (one["world"], two["world"]) == (1, 2), log[-1000:]
    start = load_model(pair[0], torch.float32).state_dict()
    for name, value in one["weights"].items():
        moved = float((value - start[name]).norm())
        assert float((value - two["weights"][name]).norm()) <= 0.02 * moved, (
            name
        )  # vLLM's rounding depends on how requests are batched


def timed(owner: Any, name: str) -> list[tuple[float, float]]:
    """The start and the end of every call of one of an object's methods."""
    calls: list[tuple[float, float]] = []
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            calls.append((start, time.perf_counter()))

    setattr(owner, name, watched)
    return calls


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_survives_two_restarts_of_its_server(tmp_path: Path, overlap: bool) -> None:
    student, teacher = save(tiny_llama(1), tmp_path / "student"), save(tiny_llama(2, layers=3), tmp_path / "teacher")
    flags = documented_flags(teacher, LENGTH)  # as the module of the engine names them
    process, url = start_server(student, tmp_path / "log", *flags)
    running = [process]

    def kill() -> None:
        """Kill the server while it samples; seconds later another starts on the same port, with the initial weights."""
        time.sleep(0.02)
        stop_server(running[-1])
        time.sleep(3)
        running.append(start_server(student, tmp_path / "log", *flags, port=int(url.rsplit(":", 1)[1]))[0])

    snapshots: dict[int, dict[str, torch.Tensor]] = {}

    class Snapshots(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            snapshots[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    rollout = RolloutConfig(
        engine="server",
        servers=[url],
        server_patience=900,
        num_rollouts=8,
        inner_epochs=1,
        teacher_mix=0.3,
        max_new_tokens=10,
        max_prompt_tokens=8,
        overlap=overlap,
    )
    trainer = MiniLLMTrainer(
        student, teacher, arguments(tmp_path / "run", max_steps=100), rollout=rollout, train_dataset=PROMPTS
    )
    trainer.add_callback(Snapshots())
    sample = trainer.source.sample

    def disturbed(number: int, *more: Any) -> Any:
        if number in (15, 35):
            threading.Thread(target=kill).start()
        return sample(number, *more)

    trainer.source.sample = disturbed  # pyright: ignore[reportAttributeAccessIssue]
    drawing = timed(trainer.source, "sample")
    updating = timed(trainer, "training_step")
    adopted: list[int] = []
    drawn: list[Any] = []
    original = trainer.use_batch

    def adopt(number: int, rollouts: list[Any]) -> None:
        adopted.append(number)
        drawn.extend(rollouts)
        original(number, rollouts)

    trainer.use_batch = adopt
    try:
        trainer.train()
    finally:
        trainer.close()
        for server in running:
            stop_server(server)
    assert len(running) == 3
    assert trainer.state.global_step == 100
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == list(range(1, 101))
    assert adopted == list(range(50))  # every batch once, in order: 8 rollouts, 4 per update, one epoch
    mismatch = [entry["engine_mismatch"] for entry in trainer.state.log_history if "engine_mismatch" in entry]
    assert len(mismatch) == (1 if overlap else 50)
    lags = [entry["version_lag"] for entry in trainer.state.log_history if "version_lag" in entry]
    assert lags == ([0, 0, *[2] * 98] if overlap else [0] * 100)  # a batch has two updates
    # The next batch is sampled while one trains, but never without `overlap`.
    beside = [
        any(start < end_of_update and start_of_update < end for start_of_update, end_of_update in updating)
        for start, end in drawing
    ]
    assert len(beside) == 50
    assert sum(beside) >= 45 if overlap else not any(beside), beside
    # Every token was sampled from the mixture with the weights of its version, after the restarts too.
    model, teaching = tiny_llama(1), tiny_llama(2, layers=3)
    assert len(drawn) == 400
    for rollout in drawn:
        if rollout.weights_version:
            model.load_state_dict(snapshots[rollout.weights_version])
            want = own_logprobs(model, rollout.prompt_ids, rollout.response_ids, trainer.sampling)
            torch.testing.assert_close(rollout.student_logprobs, want, atol=2e-3, rtol=0)
            logp = own_logprobs(teaching, rollout.prompt_ids, rollout.response_ids, trainer.sampling)
            mixture = mixture_logprobs(want, logp, 0.3)
            torch.testing.assert_close(rollout.behaviour_logprobs, mixture, atol=2e-3, rtol=0)
    assert max(mismatch) < 1e-3
