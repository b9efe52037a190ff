"""Failures of servers that hold a teacher beside the student, produced by fake servers; how such a server is started."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm.data.rollouts import Rollout
from minillm.errors import EngineError
from minillm.rollout.engines import local_server, server
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.vllm_plugin import PAIR_WORKER, pair_overrides
from tests.conftest import tiny_llama
from tests.loopback import short_backoff  # noqa: F401
from tests.rollout.test_vllm_server import SAMPLING, FakeServer, answer, attach, failing, hanging_up, saying, weights

MIXED = replace(SAMPLING, teacher_mix=0.4)
LOGQ, LOGP = -0.5, -1.5
MIXTURE = math.log(0.6 * math.exp(LOGQ) + 0.4 * math.exp(LOGP))
START_FAULTS: dict[str, Callable[[Any, Any], None]] = {
    "ending": lambda handler, _: handler.say(500, {"error": {"message": "Server shutting down"}}),
    "a gateway without a server": failing(502),
    "starting": failing(503),
    "too slow": failing(408),
    "too busy": failing(429),
    "a closed connection": hanging_up,
}


class FakePair(FakeServer):
    """Holds a teacher too. After a start, vLLM's own sampler answers until `minillm_start`.

    Each of `start_faults` answers one call of `minillm_start` instead, in order. `likeliest` is the token that vLLM's
    own sampler reports as the most likely one.
    """

    def __init__(self) -> None:
        self.mixes, self.likeliest = False, 29
        self.start_faults: list[Callable[[Any, Any], None]] = []
        super().__init__()

    def call(self, handler: Any, method: str, args: Sequence[str] = (), kwargs: dict[str, str] | None = None) -> None:
        if method == "minillm_start" and self.start_faults:
            self.start_faults.pop(0)(handler, None)
        elif method == "minillm_start":
            self.mixes = True
            handler.say(200, {"results": ["StudentAndTeacher"]})
        elif method == "minillm_load_student":
            self.weights = float(load_file(Path(args[0]) / "model.safetensors")["w"])
            handler.say(200, {"results": [None]})
        else:
            super().call(handler, method, args, kwargs)

    def complete(self, handler: Any, body: dict[str, Any]) -> None:
        if "vllm_xargs" not in body:
            super().complete(handler, body)
            return
        with self.lock:
            self.seeds[body["seed"]] += 1
        ids = [2, int(self.weights) + 10, body["seed"] % 7 + 3, 1]
        said = answer(ids, [LOGQ] * 4)
        said["choices"][0]["logprobs"]["top_logprobs"] = [
            {f"token_id:{(token + 1) % 30 if self.mixes else self.likeliest}": LOGP} | {f"token_id:{token}": LOGQ}
            for token in ids
        ]
        handler.say(200, said)

    def restart(self) -> None:
        self.weights, self.mixes = -1.0, False
        if self.started is not None:
            self.started += 60


@pytest.fixture
def pair() -> Iterator[FakePair]:
    started = FakePair()
    yield started
    started.close()


def check_mixed(rollouts: Sequence[Rollout], token: int) -> None:
    """Check that responses come from the mixture, and from the weights that `token` stands for."""
    for rollout in rollouts:
        assert rollout.response_ids[1] == token
        torch.testing.assert_close(rollout.student_logprobs, torch.full((4,), LOGQ))
        torch.testing.assert_close(rollout.behaviour_logprobs, torch.full((4,), MIXTURE))


def test_a_pair_samples_the_mixture_with_the_weights_that_it_gets(pair: FakePair, tmp_path: Path) -> None:
    engine = attach([pair], tmp_path, mixes=True)
    engine.update_weights(weights(3.0), 1)
    rollouts = engine.generate([[i] for i in range(8)], MIXED, range(8))
    check_mixed(rollouts, 13)
    assert [rollout.response_ids[2] for rollout in rollouts] == [i % 7 + 3 for i in range(8)]
    assert {rollout.weights_version for rollout in rollouts} == {1}


@pytest.mark.parametrize("held", ["an unknown method", "another model", "no results", "no developer mode"])
def test_a_server_without_a_teacher_is_refused_at_once(pair: FakePair, tmp_path: Path, held: str) -> None:
    plain, start = FakeServer(), time.monotonic()
    faults = {
        "another model": (saying({"results": ["LlamaForCausalLM"]}), r"\(LlamaForCausalLM\)"),
        "no results": (saying(None), r"\(None\)"),
        "no developer mode": (failing(404), "VLLM_SERVER_DEV_MODE=1"),
    }
    fault, reason = faults.get(held, (None, "Method 'minillm_start' is not implemented"))
    pair.start_faults = [fault] if fault is not None else []
    try:
        with pytest.raises(EngineError, match=f"holds no teacher to mix in .*{reason}.*: start it where minillm is"):
            attach([plain if fault is None else pair], tmp_path, mixes=True, patience=60)
    finally:
        plain.close()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("fault", START_FAULTS)
def test_a_fault_while_a_pair_starts_is_retried(pair: FakePair, tmp_path: Path, fault: str) -> None:
    """When training attaches, and above all when a server has just been restarted."""
    pair.start_faults = [START_FAULTS[fault]] * 2
    engine = attach([pair], tmp_path, mixes=True)
    engine.update_weights(weights(5.0), 1)
    pair.restart()
    pair.start_faults = [START_FAULTS[fault]] * 2
    check_mixed(engine.generate([[i] for i in range(6)], MIXED, range(6)), 15)
    assert pair.start_faults == []


def test_a_server_that_is_restarted_without_a_teacher_ends_the_run(pair: FakePair, tmp_path: Path) -> None:
    engine = attach([pair], tmp_path, mixes=True, patience=60)
    engine.update_weights(weights(5.0), 1)
    pair.restart()
    pair.start_faults = [saying({"results": ["LlamaForCausalLM"]})]
    with pytest.raises(EngineError, match="holds no teacher to mix in"):
        engine.generate([[1]], MIXED, [1])


@pytest.mark.parametrize("likeliest", [2, 29])
def test_answers_of_vllms_own_sampler_are_not_taken_for_the_mixture(
    pair: FakePair, tmp_path: Path, likeliest: int
) -> None:
    """The restart shows in nothing else: no request fails, and the metrics report no start time.

    The most likely token stands in the place of log p, or nothing does where it is the sampled one (2).
    """
    pair.started, pair.likeliest = None, likeliest
    engine = attach([pair], tmp_path, mixes=True)
    engine.update_weights(weights(5.0), 1)
    pair.restart()
    check_mixed(engine.generate([[i] for i in range(6)], MIXED, range(6)), 15)


def documented_flags(teacher: str, length: int) -> list[str]:
    """Return the flags of `vllm serve` that the engine's module gives for a server that holds a teacher."""
    lines = [line.strip() for line in (server.__doc__ or "").splitlines() if line.startswith("    ")]
    words = shlex.split(" ".join(lines))
    assert words[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "MODEL"]
    return [str(length) if word == "N" else word.replace("TEACHER", teacher) for word in words[4:]]


def test_the_documented_flags_are_those_of_a_server_of_the_runs_own(tmp_path: Path) -> None:
    """tests/train/test_served.py starts a server with them."""
    student, teacher = tiny_llama(0), tiny_llama(1, layers=3)
    student.config.architectures = ["LlamaForCausalLM"]
    for model, name in ((student, "student"), (teacher, "teacher")):
        model.config.save_pretrained(tmp_path / name)
    source = str(tmp_path / "teacher")
    flags = documented_flags(source, 64)
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    command = local_server._command(tmp_path / "student", 8000, EngineSizing(64, torch.float32), source)
    own = {flag: command[command.index(flag) + 1] for flag in given}
    overrides = "--hf-overrides"
    assert json.loads(given.pop(overrides)) == json.loads(own.pop(overrides))
    assert (
        given
        == own
        == {
            "--logprobs-mode": "processed_logprobs",
            "--max-model-len": "64",
            "--worker-extension-cls": PAIR_WORKER,
        }
    )
    assert json.loads(flags[flags.index(overrides) + 1]) == pair_overrides(
        ["LlamaForCausalLM"], source, loads_teacher=True
    )
