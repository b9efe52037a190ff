"""vLLM in the training process, sampling a student with a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.engines.vllm_memory import vllm_is_installed
from minillm.teacher.local import LocalTeacher
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.rollout.test_engines import own_logprobs


def lora_student() -> Any:
    """A student whose adapter has several ranks and scalings."""
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 8},
        alpha_pattern={"q_proj": 5},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(6), config)  # pyright: ignore[reportArgumentType]


def trained(student: Any, teacher: Any, folder: Path, **changes: Any) -> MiniLLMTrainer:
    """Train three updates, each on rollouts of its own, whose log-probabilities the trainer confirms."""
    rollout = RolloutConfig(
        engine="vllm",
        num_rollouts=8,
        inner_epochs=1,
        max_new_tokens=10,
        max_prompt_tokens=8,
        engine_memory=0.1,
        **changes,
    )
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=3,
        learning_rate=0.05,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        logging_steps=1,
    )
    prompts = [{"prompt_ids": [2, i, 3]} for i in range(4, 20)]
    trainer = MiniLLMTrainer(
        student, teacher, arguments, rollout=rollout, train_dataset=prompts, processing_class=tiny_tokenizer()
    )
    trainer.train()
    mismatch = [entry["engine_mismatch"] for entry in trainer.state.log_history if "engine_mismatch" in entry]
    assert len(mismatch) == 3
    assert max(mismatch) < 1e-4, mismatch
    return trainer


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_vllm_samples_a_lora_student_with_its_adapter(tmp_path: Path) -> None:
    """The base model stays in the engine; the adapter is sent for each batch."""
    student = lora_student()
    start = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = trained(student, tiny_llama(2, layers=3), tmp_path, lora="adapter", teacher_mix=0.0)
    sampling = Sampling(10, (1,), 32)
    rollouts = trainer.sync().generate([[2, 3]] * 8, sampling, list(range(8)))
    trainer.close()
    for name, value in student.state_dict().items():
        assert torch.equal(value, start[name]) == ("lora_" not in name), name
    for r in rollouts:
        assert r.weights_version == 3
        torch.testing.assert_close(
            r.student_logprobs, own_logprobs(student, r.prompt_ids, r.response_ids, sampling), atol=1e-4, rtol=1e-4
        )


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_vllm_mixes_a_merged_student_with_its_own_base(tmp_path: Path) -> None:
    student, base = lora_student(), tiny_llama(6)
    trainer = trained(student, None, tmp_path, teacher_mix=0.4)
    sampling = Sampling(10, (1,), 32, teacher_mix=0.4)
    rollouts = trainer.sync().generate([[2, 3]] * 8, sampling, list(range(8)))
    trainer.close()
    states = LocalTeacher(base).hidden([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    for r, expected in zip(rollouts, states, strict=True):
        assert r.teacher is not None
        torch.testing.assert_close(r.teacher.hidden, expected, atol=1e-3, rtol=1e-3)
        for logprobs, model in ((r.student_logprobs, student), (r.teacher.token_logprobs, base)):
            torch.testing.assert_close(
                logprobs, own_logprobs(model, r.prompt_ids, r.response_ids, sampling), atol=1e-4, rtol=1e-4
            )
        assert r.teacher.token_logprobs is not None
        assert not torch.allclose(r.student_logprobs, r.teacher.token_logprobs, atol=1e-2)


def test_what_an_adapter_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora: adapter is for vLLM in the training process"):
        RolloutConfig(engine="server", servers="auto", lora="adapter")
    with pytest.raises(EngineError, match="vLLM takes ranks up to 512, not 600; use merged"):
        VLLMEngine(str(tmp_path), EngineSizing(8, torch.float32), lora_rank=600)
