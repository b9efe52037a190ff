"""The student: with an adapter, quantised, under its own base as the teacher, validated, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from minillm.data.seeding import seed_of
from minillm.evaluation.metrics import rouge_l
from minillm.models.config import AdapterConfig
from minillm.models.load import load_model
from minillm.models.lora import load_student
from minillm.models.saving import save_plain
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import save, tiny_llama, tiny_tokenizer
from tests.train.common import PROMPTS, ROLLOUT, arguments, train


def test_bfloat16_sampling_leaves_the_float32_masters_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path, bf16=True), rollout=ROLLOUT, train_dataset=PROMPTS)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}  # pyright: ignore
    trainer.sync()
    after = trainer.model.state_dict()  # pyright: ignore
    assert all(value.dtype == torch.float32 and torch.equal(value, after[name]) for name, value in before.items())


def test_an_adapter_trains_and_its_base_does_not(pair: tuple[str, str], tmp_path: Path) -> None:
    base = load_model(pair[0], torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    student: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))  # pyright: ignore
    trainer = train((student, pair[1]), tmp_path / "run", processing_class=tiny_tokenizer())
    save_plain(student, tmp_path / "plain")
    merged = load_model(tmp_path / "plain", torch.float32).state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, merged[name])}
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["engine_mismatch"] < 1e-5


def test_a_quantised_base_and_a_quantised_teacher(pair: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (minillm-distill[quantized])")
    student = load_student(pair[0], AdapterConfig(rank=4, quantization="4bit"))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher = load_model(pair[1], torch.float32, "8bit")
    pieces: Any = (student, teacher)
    trainer = train(pieces, tmp_path / "run", processing_class=tiny_tokenizer())
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["engine_mismatch"] < 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_students_own_base_teaches_as_a_copy_of_it_does(
    pair: tuple[str, str], tmp_path: Path, checkpointing: bool
) -> None:
    weights = []
    for teacher in (None, pair[0]):
        student = load_student(pair[0], AdapterConfig(rank=4))
        torch.manual_seed(1)
        for name, value in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.3)
        models: Any = (student, teacher)
        trainer = train(models, tmp_path, processing_class=tiny_tokenizer(), gradient_checkpointing=checkpointing)
        assert next(entry for entry in trainer.state.log_history if "loss" in entry)["reverse_kl"] > 1e-3
        assert student.training
        weights.append({name: value for name, value in student.state_dict().items() if "lora_" in name})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    with pytest.raises(
        ValueError, match=r"None takes the student's base model as the teacher, .* this student has no adapter"
    ):
        MiniLLMTrainer(pair[0], None, arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS)


def test_padded_rows_of_the_heads_have_no_part_in_it(tmp_path: Path) -> None:
    """With 32 tokens and heads of 40 and 48 rows, the update does not depend on the padded rows."""
    logs = []
    for factor in (1.0, 30.0):
        folders = []
        for name, seed, vocab in (("student", 1, 40), ("teacher", 2, 48)):
            model = tiny_llama(seed, vocab=vocab, tied=False)
            with torch.no_grad():
                model.lm_head.weight[32:].mul_(factor)
            folders.append(save(model, tmp_path / f"{name}-{factor}"))
        trainer = train((folders[0], folders[1]), tmp_path / "run", max_steps=2)
        assert max(max(r.response_ids) for r in trainer.rollouts) < 32
        logs.append([e for e in trainer.state.log_history if "loss" in e])
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "reverse_kl", "forward_kl", "entropy", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_validation_samples_the_pure_student_and_the_best_checkpoint_is_kept(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    rows = [{"prompt_ids": [2, 4 + i, 3], "references": ["w3 w4 w5", "w8 w9"]} for i in range(9)]
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
    }
    settings |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "reverse_kl",
        "greater_is_better": False,
        "learning_rate": 3e-3,
    }
    trainer = train(pair, tmp_path, eval_dataset=rows, **settings)
    found = [e for e in trainer.state.log_history if "eval_reverse_kl" in e]
    assert [e["step"] for e in found] == [2, 4, 6]
    best = min(e["eval_reverse_kl"] for e in found)
    assert trainer.state.best_metric == best
    # The best student is kept: its samples are drawn here again with the seeds of validation.
    again = trainer.evaluate()
    assert again["eval_reverse_kl"] == pytest.approx(best, rel=1e-4)
    model: Any = load_model(pair[1], torch.float32)
    student: Any = trainer.model
    total, tokens, rouge = 0.0, 0, 0.0
    for row in rows:
        [r] = TransformersEngine(student).generate(
            [row["prompt_ids"]], trainer.sampling, [seed_of("validation", *row["prompt_ids"])]
        )
        ids, first = torch.tensor([r.prompt_ids + r.response_ids]), len(r.prompt_ids) - 1
        with torch.no_grad():
            logq, logp = (torch.log_softmax(m(ids).logits[0, first:-1], -1) for m in (student, model))
        total, tokens = total + float((logq.exp() * (logq - logp)).sum()), tokens + len(r.response_ids)
        rouge += rouge_l(tiny_tokenizer().decode(r.response_ids, skip_special_tokens=True), row["references"])
    assert again["eval_reverse_kl"] == pytest.approx(total / tokens, rel=1e-4)
    assert again["eval_rouge_l"] == pytest.approx(rouge / 9)
    assert again["eval_length"] == pytest.approx(tokens / 9)


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_nothing(pair: tuple[str, str], tmp_path: Path, adapter: bool) -> None:
    weights = []
    for checkpointing in (False, True):
        student: Any = pair[0]
        if adapter:
            student = load_student(pair[0], AdapterConfig(rank=4))
        trainer = train(
            (student, pair[1]), tmp_path, gradient_checkpointing=checkpointing, processing_class=tiny_tokenizer()
        )
        trained: Any = trainer.model
        assert any(getattr(module, "gradient_checkpointing", False) for module in trained.modules()) == checkpointing
        weights.append(trained.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)
