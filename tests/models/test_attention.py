"""The implementation of attention that a student trains with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.models.attention import training_attention
from minillm.models.load import load_model
from minillm.models.shape import kept_bytes, shape_of
from minillm.train.on_policy import MiniLLMTrainer
from tests.train.common import PROMPTS, ROLLOUT, arguments


def test_fused_attention_is_left_only_where_it_is_slow() -> None:
    assert training_attention("cpu", torch.bfloat16, 256) == "eager"
    assert training_attention("cpu", torch.bfloat16, 1024) is None
    assert training_attention("cpu", torch.float32, 256) is None
    assert training_attention("cuda", torch.bfloat16, 256) is None


@pytest.mark.parametrize(("bf16", "want"), [(True, "eager"), (False, "sdpa")])
def test_a_student_given_by_name_trains_with_the_chosen_attention(
    pair: tuple[str, str], tmp_path: Path, bf16: bool, want: str
) -> None:
    args = arguments(tmp_path, max_steps=1, bf16=bf16)
    trainer = MiniLLMTrainer(*pair, args, rollout=ROLLOUT, train_dataset=PROMPTS)
    student: Any = trainer.model
    assert student.config._attn_implementation == want
    trainer.save_student(tmp_path / "saved")
    assert load_model(tmp_path / "saved").config._attn_implementation == "sdpa"


def test_a_model_object_keeps_its_attention(pair: tuple[str, str], tmp_path: Path, tokenizer: Any) -> None:
    args, student = arguments(tmp_path, max_steps=1, bf16=True), load_model(pair[0], torch.float32)
    trainer = MiniLLMTrainer(student, pair[1], args, rollout=ROLLOUT, train_dataset=PROMPTS, processing_class=tokenizer)
    kept: Any = trainer.model
    assert kept.config._attn_implementation == "sdpa"


def test_the_probabilities_that_eager_attention_keeps_are_planned(pair: tuple[str, str]) -> None:
    """They grow with the square of the length."""
    shape = shape_of(pair[0])

    def more(length: int) -> float:
        fused, eager = (
            kept_bytes(shape, 2, length, half=False, checkpointing=False, attention=attention)
            for attention in (None, "eager")
        )
        return eager - fused

    assert more(160) > 3.5 * more(80) > 0
