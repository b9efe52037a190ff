"""MiniLLMTrainer on tiny models: what an update trains on, what changes, and what a resume continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from minillm import MiniLLMTrainer, Objective, RolloutConfig
from minillm.models.load import load_model
from minillm.models.weights import save_plain
from tests.conftest import tiny_llama, tiny_tokenizer

PROMPTS = [{"prompt": f"<user> w{i} w{i + 1} <bot>"} for i in range(12)]
ROLLOUT = RolloutConfig(
    engine="transformers", num_rollouts=8, inner_epochs=2, teacher_mix=0.3, max_new_tokens=10, max_prompt_tokens=8, draft_tokens=4
)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": "none",
        "logging_steps": 1, "use_cpu": True, "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


def train(pair: tuple[str, str], folder: Path, *, resume: str | None = None, stop: int | None = None, **changes: Any) -> MiniLLMTrainer:
    keys = ("objective", "rollout", "train_dataset", "text_dataset", "processing_class")
    options = {key: changes.pop(key) for key in keys if key in changes}
    options = {"rollout": ROLLOUT, "train_dataset": PROMPTS} | options
    trainer = MiniLLMTrainer(*pair, arguments(folder, **changes), **options)
    if stop is not None:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                if state.global_step == stop:
                    control.should_save = control.should_training_stop = True
                return control

        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_layer_moves_and_the_teacher_does_not(pair: tuple[str, str], tmp_path: Path) -> None:
    before = load_model(pair[0], torch.float32).state_dict()
    trainer = train(pair, tmp_path)
    after = trainer.model.state_dict()  # pyright: ignore
    unmoved = [name for name, value in before.items() if torch.equal(value, after[name]) and "rotary" not in name]
    assert not unmoved
    teacher = load_model(pair[1], torch.float32).state_dict()
    for name, value in trainer.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[name])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for key in ("reverse_kl", "sampled_reverse_kl", "forward_kl", "entropy", "importance_weight", "clipped", "advantage_std", "grad_norm"):
        assert all(key in entry for entry in logged), key
    for key in ("response_length", "finished", "acceptance", "engine_mismatch"):  # once a rollout batch: updates 1 of 4
        assert [key in entry for entry in logged] == [True, False, False, False], key
    assert logged[0]["engine_mismatch"] < 1e-5  # engine and trainer are one model here


def test_a_learning_rate_of_zero_changes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    before = load_model(pair[0], torch.float32).state_dict()
    after = train(pair, tmp_path, learning_rate=0.0).model.state_dict()  # pyright: ignore
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_training_lowers_the_reverse_kl(pair: tuple[str, str], tmp_path: Path) -> None:
    rollout = ROLLOUT.model_copy(update={"num_rollouts": 32})
    logs = train(
        pair, tmp_path, max_steps=60, rollout=rollout, per_device_train_batch_size=16, gradient_accumulation_steps=1
    ).state.log_history
    kl = [entry["reverse_kl"] for entry in logs if "reverse_kl" in entry]
    assert sum(kl[-8:]) < 0.7 * sum(kl[:8])


def test_batch_split_and_padding_do_not_change_the_update(pair: tuple[str, str], tmp_path: Path) -> None:
    runs = [
        train(pair, tmp_path / f"{micro}", max_steps=2, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro)
        for micro in (1, 8)
    ]
    one, eight = (run.state.log_history for run in runs)
    for a, b in zip(one, eight, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for (name, x), y in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(pair: tuple[str, str], tmp_path: Path, stop: int) -> None:
    """Stops between inner epochs (2), inside one (3) and between rollout batches (4)."""
    whole = train(pair, tmp_path / "whole", max_steps=6)
    train(pair, tmp_path / "cut", max_steps=6, stop=stop)
    resumed = train(pair, tmp_path / "cut", max_steps=6, resume=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 6
    for (name, x), y in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)


def test_an_epoch_is_a_pass_over_the_prompts(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path), rollout=ROLLOUT.model_copy(update={"num_rollouts": 4}), train_dataset=PROMPTS)
    rows = [row for number in range(3) for row in trainer._prompt_rows(number)]
    assert sorted(rows) == list(range(12))
    assert [row for number in range(3, 6) for row in trainer._prompt_rows(number)] != rows
    assert trainer.updates_per_epoch() == 3 * 1 * ROLLOUT.inner_epochs


def test_text_joins_the_update(pair: tuple[str, str], tmp_path: Path) -> None:
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(30))} for i in range(6)]
    objective = Objective.recommended(language_model=0.5, language_model_distill=0.5, language_model_block=16)
    logged = [e for e in train(pair, tmp_path, objective=objective, text_dataset=text).state.log_history if "loss" in e]
    assert all(e["language_model_loss"] > 0 and e["text_nll"] > 0 for e in logged)
    total = logged[0]["policy_loss"] + logged[0]["single_step_loss"] + logged[0]["language_model_loss"]
    assert logged[0]["loss"] == pytest.approx(total, rel=1e-3)


def test_bfloat16_sampling_leaves_the_float32_masters_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path, bf16=True), rollout=ROLLOUT, train_dataset=PROMPTS)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}  # pyright: ignore
    trainer._sync()
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


@pytest.mark.parametrize("preset", ["paper", "reference", "recommended", "exact"])
def test_every_preset_trains(pair: tuple[str, str], tmp_path: Path, preset: str) -> None:
    logged = [
        e
        for e in train(pair, tmp_path, objective=Objective.model_validate({"preset": preset}), max_steps=2).state.log_history
        if "loss" in e
    ]
    assert all(torch.isfinite(torch.tensor(e["grad_norm"])) and e["grad_norm"] > 0 for e in logged)


def test_the_teacher_reads_a_rollout_once(pair: tuple[str, str], tmp_path: Path) -> None:
    """Without mixing: one forward of the teacher a batch of rollouts, whatever the inner epochs."""
    rollout = ROLLOUT.model_copy(update={"teacher_mix": 0.0, "inner_epochs": 3, "num_rollouts": 4})
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path, max_steps=3), rollout=rollout, train_dataset=PROMPTS)
    trainer.teacher.batch_size = 4
    calls = []
    trainer.teacher.model.model.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    trainer.train()
    assert len(calls) == 1


def test_wrong_sizes_are_refused_by_name(pair: tuple[str, str], tmp_path: Path) -> None:
    def make(**changes: Any) -> None:
        rollout = ROLLOUT.model_copy(update=changes.pop("rollout", {}))
        MiniLLMTrainer(*pair, arguments(tmp_path), rollout=rollout, train_dataset=changes.pop("train_dataset", PROMPTS))

    with pytest.raises(ValueError, match=r"num_rollouts \(6\) must be a multiple"):
        make(rollout={"num_rollouts": 6})
    with pytest.raises(ValueError, match=r"row 1 has 9 prompt tokens; rollout.max_prompt_tokens is 8"):
        make(train_dataset=[PROMPTS[0], {"prompt": " ".join(["w1"] * 9)}])
    with pytest.raises(ValueError, match="exceed the student's context of 256"):
        make(rollout={"max_new_tokens": 250})
    with pytest.raises(ValueError, match="a row needs prompt or prompt_ids; it has text"):
        make(train_dataset=[{"text": "w1"}])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make(train_dataset=[])


def test_different_tokenizers_are_refused_before_weights_load(pair: tuple[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_llama(3).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="id 32 is None for the student and 'extra' for the teacher"):
        MiniLLMTrainer(pair[0], str(other), arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS)
