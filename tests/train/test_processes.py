"""Several processes train as one does, with the student whole or sharded."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm.models.load import load_model
from minillm.train.on_policy import MiniLLMTrainer
from tests.train.common import PROMPTS, ROLLOUT, arguments, launch
from tests.train.two_processes import run


@pytest.mark.parametrize("kind", ["plain", "whitened", "words", "own-base"])
def test_two_processes_train_as_one_does(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Rollouts are the same whichever process samples them, and so are the weights after two updates."""
    launch(pair, tmp_path / "two", kind)
    assert run(*pair, str(tmp_path / "one"), kind) == 1
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("one", "two"))
    moved = {name: float((value - one["before"][name]).norm()) for name, value in one["weights"].items()}
    for name, value in one["weights"].items():
        assert (moved[name] > 0) == ("lora" in name or kind != "own-base"), name
        assert float((value - two["weights"][name]).norm()) <= 1e-3 * moved[name], name
    assert (one["world"], two["world"]) == (1, 2)


deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (make test-full installs it)"
)


@pytest.mark.parametrize(
    "kind", ["fsdp2", "fsdp2-lora", *(pytest.param(kind, marks=deepspeed) for kind in ("zero2", "zero3", "zero3-lora"))]
)
def test_shards_train_and_save_the_student_of_one_process(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The head is scored without being called, and weights are gathered for the engine, for updates and for saving."""
    launch(pair, tmp_path / "two", kind)
    run(*pair, str(tmp_path / "one"), kind)
    start = load_model(pair[0], torch.float32).state_dict()
    one, two = (load_model(tmp_path / name, torch.float32).state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        moved = float((value - start[name]).norm())
        assert moved > 0 or (kind.endswith("-lora") and "_proj" not in name), name
        assert float((value - two[name]).norm()) <= 1e-4 * moved, name


def test_shards_that_would_leave_no_student_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    tuner = (
        "from transformers import TrainingArguments; from minillm.train.finetune import FineTuner; "
        "FineTuner(sys.argv[1], TrainingArguments(sys.argv[3], use_cpu=True{}), train_dataset=[{{'prompt_ids': [2], 'response_ids': [1]}}])"
    )
    run_it = "from tests.train.two_processes import run; run(sys.argv[1], sys.argv[2], sys.argv[3])"
    for what, saved_as, refusal in (
        (run_it, "SHARDED_STATE_DICT", "set fsdp_state_dict_type: FULL_STATE_DICT"),
        (tuner.format(""), "SHARDED_STATE_DICT", "set fsdp_state_dict_type: FULL_STATE_DICT"),
    ):
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": saved_as}
        code = f"import sys; from tests.train.two_processes import shard_on_cpus; shard_on_cpus(); {what}"
        command = [sys.executable, "-c", code, *pair, str(tmp_path)]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=900, env={**os.environ, **environment}, cwd=root
        )
        assert refusal in done.stderr, done.stderr[-2000:]


def test_a_sharded_teacher_does_not_mix(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.shard: .* set rollout\.teacher_mix: 0"):
        MiniLLMTrainer(*pair, arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS, shard_teacher=True)


def test_processes_that_replay_different_rollouts_keep_in_step(pair: tuple[str, str], tmp_path: Path) -> None:
    launch(pair, tmp_path, "replay")
    assert torch.load(tmp_path / "weights.pt", weights_only=True)["world"] == 2
