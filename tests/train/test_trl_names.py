"""What a script for TRL brings along: `teacher_model`, `peft_config`, and rows in TRL's forms and in recipes'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from minillm.data.templates import chat_ids
from minillm.errors import DataError, InputError
from minillm.models.load import load_model, load_tokenizer
from minillm.train.datasets import tokenize_answered, tokenize_prompts, tokenize_validation
from minillm.train.finetune import FineTuner
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import tiny_tokenizer
from tests.train.common import OFF_POLICY, PROMPTS, ROLLOUT, arguments

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
SAID = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


def test_a_script_for_trl_trains_an_adapter(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(
        model=pair[0],
        teacher_model=pair[1],
        args=arguments(tmp_path, max_steps=2, learning_rate=1e-2),
        train_dataset=PROMPTS,
        rollout=ROLLOUT,
        peft_config=LORA,
    )
    trainer.train()
    before: Any = load_model(pair[0], torch.float32)
    trained: Any = trainer.model
    named = dict(trained.get_base_model().named_parameters())
    changed = {name for name, value in named.items() if "lora" in name and "lora_B" in name and value.abs().sum() > 0}
    assert changed
    assert all("q_proj" in name for name in changed)
    norm = before.model.layers[0].mlp.up_proj.weight
    assert torch.equal(trained.get_base_model().model.layers[0].mlp.up_proj.weight.cpu(), norm)
    assert {name for name, value in trained.named_parameters() if value.requires_grad} == {
        name for name, _ in trained.named_parameters() if "lora_" in name
    }


def test_names_that_contradict_each_other_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    given: dict[str, Any] = {"args": arguments(tmp_path), "train_dataset": PROMPTS, "rollout": ROLLOUT}
    with pytest.raises(InputError, match="teacher_model: another name of teacher, which is given too"):
        MiniLLMTrainer(pair[0], pair[1], teacher_model=pair[1], **given)
    with pytest.raises(InputError, match="peft_config: a configuration of PEFT is needed"):
        MiniLLMTrainer(pair[0], teacher_model=pair[1], peft_config={"r": 2}, **given)
    from peft import get_peft_model

    adapted: Any = get_peft_model(load_model(pair[0], torch.float32), LORA)
    with pytest.raises(InputError, match="has an adapter already"):
        MiniLLMTrainer(
            adapted, teacher_model=pair[1], peft_config=LORA, processing_class=load_tokenizer(pair[0]), **given
        )


def test_prompts_are_the_same_in_every_form(pair: tuple[str, str]) -> None:
    tokenizer = load_tokenizer(pair[0])
    wanted = chat_ids(SAID[:1], tokenizer)
    rows: list[dict[str, Any]] = [
        {"prompt": SAID[:1]},
        {"messages": SAID},  # TRL's: what comes before the last answer
        {"messages": SAID[:1]},
        {"instruction": "w1 w2", "output": "w3"},
        {"prompt_ids": wanted},
    ]
    assert list(tokenize_prompts(rows, tokenizer, 32)) == [wanted] * len(rows)
    more = [*SAID, {"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]
    assert tokenize_prompts([{"messages": more}], tokenizer, 32)[0] == chat_ids(more[:3], tokenizer)
    with pytest.raises(InputError, match="or messages, or instruction; it has text"):
        tokenize_prompts([{"text": "w1"}], tokenizer, 32)
    with pytest.raises(DataError, match="a row of train_dataset: messages holds no message of the user"):
        tokenize_prompts([{"messages": []}], tokenizer, 32)


def test_answers_are_the_same_in_every_form() -> None:
    tokenizer = tiny_tokenizer()
    rows: list[dict[str, Any]] = [
        {"messages": SAID},
        {"prompt": SAID[:1], "completion": SAID[1:]},
        {"instruction": "w1 w2", "output": ["w3", "w9"]},
    ]
    found = tokenize_answered(rows, tokenizer)
    assert found[0]["prompt_ids"] == chat_ids(SAID[:1], tokenizer)
    assert found[0]["response_ids"][0] == tokenizer.convert_tokens_to_ids("w3")
    assert found[0]["response_ids"][-1] == tokenizer.eos_token_id
    assert found == [found[0]] * 3
    [plain] = tokenize_answered([{"prompt": "w1", "completion": " w2", "teacher": "math"}], tokenizer)
    assert tokenizer.decode(plain["response_ids"]).split()[0] == "w2"
    assert (plain["response_ids"][-1], plain["teacher"]) == (tokenizer.eos_token_id, "math")
    assert tokenize_answered(found, tokenizer) is found
    with pytest.raises(InputError, match="train_dataset row 1: there is no answer in it"):
        tokenize_answered([rows[0], {"instruction": "w1"}], tokenizer)
    with pytest.raises(InputError, match="train_dataset row 0: a row needs prompt_ids and response_ids, or prompt and"):
        tokenize_answered([{"text": "w1"}], tokenizer)


def test_supervised_training_reads_chats(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = SupervisedTrainer(
        pair[0], teacher_model=pair[1], args=arguments(tmp_path, max_steps=1), train_dataset=[{"messages": SAID}] * 4
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_fine_tuning_takes_an_adapter_and_chats(pair: tuple[str, str], tmp_path: Path) -> None:
    def trained(folder: str) -> Any:
        trainer = FineTuner(
            pair[0],
            arguments(tmp_path / folder, max_steps=2, learning_rate=1e-2, eval_strategy="steps", eval_steps=2),
            teacher_model=pair[1],
            peft_config=LORA,
            train_dataset=[{"messages": SAID}] * 8,
            eval_dataset=[{"prompt": "w1", "completion": " w2"}, {"messages": SAID}],
            rollout=ROLLOUT,
        )
        trainer.train()
        return trainer

    trainer = trained("one")
    weights = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert weights
    assert all("lora_" in name for name in weights)
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in weights.items())
    assert any("eval_reverse_kl" in entry for entry in trainer.state.log_history)
    torch.manual_seed(123)
    again = dict(trained("two").model.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in weights.items())  # the adapter's seed is args.seed
    with pytest.raises(InputError, match="teacher_model: another name of teacher, which is given too"):
        FineTuner(pair[0], arguments(tmp_path), teacher=pair[1], teacher_model=pair[1], train_dataset=[])


def test_rows_for_validation_are_the_same_in_every_form() -> None:
    tokenizer = tiny_tokenizer()
    rows: list[dict[str, Any]] = [
        {"messages": SAID},
        {"prompt": SAID[:1], "completion": SAID[1:]},
        {"instruction": "w1 w2", "output": ["w3"]},
    ]
    wanted = {"prompt_ids": chat_ids(SAID[:1], tokenizer), "references": ["w3"]}
    assert tokenize_validation(rows, tokenizer) == [wanted] * 3
    assert tokenize_validation([wanted], tokenizer) == [wanted]
    assert tokenize_validation(None, tokenizer) is None
    [plain] = tokenize_validation([{"prompt": "w1", "completion": " w2", "teacher": "math"}], tokenizer)
    assert (plain["references"], plain["teacher"]) == (["w2"], "math")
    with pytest.raises(InputError, match="eval_dataset row 1: there is no answer in it"):
        tokenize_validation([rows[0], {"instruction": "w1"}], tokenizer)


def test_a_stream_of_prompts_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    stream: Any = Dataset.from_list(PROMPTS).to_iterable_dataset()
    with pytest.raises(InputError, match="train_dataset: rows with a length are needed, not a stream"):
        MiniLLMTrainer(*pair, arguments(tmp_path), train_dataset=stream)


def test_columns_that_a_row_does_not_fill_are_left_out(pair: tuple[str, str]) -> None:
    """A `datasets.Dataset` has None there."""
    tokenizer = load_tokenizer(pair[0])
    rows: Any = Dataset.from_list(
        [
            {"instruction": "w1 w2", "output": "w3", "messages": None},
            {"instruction": None, "output": None, "messages": SAID},
        ]
    )
    assert rows[0]["messages"] is None
    assert tokenize_prompts(rows, tokenizer, 32) == [chat_ids(SAID[:1], tokenizer)] * 2
    one, other = tokenize_answered(rows, tokenizer)
    assert one == other


def test_given_responses_are_read_in_every_form(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, max_steps=1),
        objective=OFF_POLICY,
        rollout=ROLLOUT.model_copy(update={"on_policy": 0.5, "teacher_mix": 0.0}),
        train_dataset=PROMPTS,
        responses=[{"messages": SAID}] * 4,
    )
    trainer.train()
    given = [one for one in trainer.rollouts if trainer.source.others.is_given(one)]
    assert len(given) == 4
    assert given[0].prompt_ids == chat_ids(SAID[:1], tiny_tokenizer())
