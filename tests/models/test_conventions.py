"""Where an answer ends is one fact, in every stage and in what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments

from minillm.models.conventions import settle, settle_run
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import tiny_llama, tiny_tokenizer

TURNS = (
    "{% for m in messages %}<user> {{ m['content'] }} {% if m['role'] == 'assistant' %}<bot> {% endif %}{% endfor %}"
)


def save(folder: Path, seed: int, eos: int, template: str | None = None) -> str:
    """A model of 32 tokens that says its answers end with `eos`."""
    model = tiny_llama(seed)
    model.config.eos_token_id = model.generation_config.eos_token_id = eos  # pyright: ignore[reportOptionalMemberAccess]
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = tokenizer.convert_ids_to_tokens(eos), template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_base_student_ends_where_its_chat_teacher_does(tmp_path: Path) -> None:
    chat, base = save(tmp_path / "chat", 1, 3, TURNS), save(tmp_path / "base", 2, 1)
    found = settle_run(chat, base)
    assert (found.eos_ids, found.tokenizer.eos_token_id, found.context) == ((3,), 3, 256)
    assert settle_run(base, chat).eos_ids == (
        1,
        3,
    )  # the teacher's, and the end of the template's turn, which it takes from the student
    args = TrainingArguments(
        str(tmp_path / "work"),
        use_cpu=True,
        report_to="none",
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
    )
    rollout = RolloutConfig(engine="transformers", num_rollouts=2, max_new_tokens=4, teacher_mix=0, max_prompt_tokens=8)
    trainer = MiniLLMTrainer(
        base,
        chat,
        args,
        rollout=rollout,
        train_dataset=[{"prompt_ids": [4]}] * 2,
        processing_class=found.tokenizer,
        conventions=found,
    )
    assert trainer.sampling.eos_ids == (3,)
    trainer.save_student(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 3
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (saved.eos_token_id, saved.chat_template) == (3, TURNS)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config
    assert (config.eos_token_id, config.pad_token_id) == (3, saved.pad_token_id)


def test_a_stop_string_that_is_a_special_token_means_the_token(tmp_path: Path) -> None:
    found = settle_run(save(tmp_path / "a", 1, 1))
    sampling = found.sampling(8, stop=["<user>", "w3 w4"])
    assert sampling.eos_ids == (1, 2)
    assert sampling.stop is not None
    assert sampling.stop.strings == ("w3 w4",)
    assert sampling.stop.length(found.tokenizer("w1 w3 w4 w5")["input_ids"]) == 3


def test_an_answer_that_nothing_ends_is_refused(tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "a", 1, 1))
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # pyright: ignore[reportOptionalMemberAccess]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match=r"a: no end token: neither generation_config\.json nor the tokenizer names one"
    ):
        settle(tokenizer, model)
