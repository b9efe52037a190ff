"""`model_flops_utilization`: the operations that a trainer counts in each update, and what it divides them by."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillm.data.batches import pad
from minillm.loss.config import Objective
from minillm.models.flops import Dimensions, dimensions_of, update_flops
from minillm.models.load import load_model
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import save, tiny_llama
from tests.train.common import PROMPTS, ROLLOUT, OwnEngine, arguments, train

PEAK, SECONDS = 1e9, 2.0
PLAIN = ROLLOUT.model_copy(update={"teacher_mix": 0.0, "inner_epochs": 1})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every update takes two seconds of a device with a known peak."""
    monkeypatch.setattr("minillm.train.utilisation.peak_flops", lambda *_: PEAK)
    monkeypatch.setattr(
        "minillm.train.utilisation.time", SimpleNamespace(perf_counter=itertools.count(0.0, SECONDS).__next__)
    )


def logged(trainer: Any) -> list[float]:
    """Operations of each logged update, from the utilisation in the log."""
    key = "model_flops_utilization"
    return [entry[key] * PEAK * SECONDS for entry in trainer.state.log_history if key in entry]


def sizes(pair: tuple[str, str]) -> tuple[Dimensions, Dimensions]:
    student, teacher = (dimensions_of(load_model(folder, torch.float32)) for folder in pair)
    return student, replace(teacher, trained=0.0, frozen=teacher.weights, head_trained=False)


def lengths(rollouts: Any) -> tuple[list[float], list[float]]:
    return [len(r.prompt_ids) for r in rollouts], [len(r.response_ids) for r in rollouts]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_an_update_on_policy(pair: tuple[str, str], tmp_path: Path, mix: float) -> None:
    rollout = PLAIN.model_copy(update={"teacher_mix": mix})
    batch: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = train(pair, tmp_path, max_steps=1, rollout=rollout, objective=Objective.paper(), **batch)
    student, teacher = sizes(pair)
    expected = update_flops(student, teacher, *lengths(trainer.rollouts), width=trainer.width, mixed=mix > 0)
    assert logged(trainer) == [pytest.approx(expected.total)]


@pytest.mark.usefixtures("clock")
def test_sampling_counts_in_the_first_update_on_a_batch(pair: tuple[str, str], tmp_path: Path) -> None:
    """Two updates of four responses on a batch; the log of both together is their mean."""
    trainer = train(pair, tmp_path, max_steps=2, rollout=PLAIN, objective=Objective.paper())
    student, teacher = sizes(pair)
    whole = update_flops(student, teacher, *lengths(trainer.rollouts), width=trainer.width)
    first, second = logged(trainer)
    assert first + second == pytest.approx(whole.total)
    assert first - second > 0.8 * (whole.sampling + whole.teacher)
    both = train(pair, tmp_path, max_steps=2, rollout=PLAIN, objective=Objective.paper(), logging_steps=2)
    assert logged(both) == [pytest.approx(whole.total / 2)]


@pytest.mark.usefixtures("clock")
def test_a_prompt_of_several_responses_is_read_once(pair: tuple[str, str], tmp_path: Path) -> None:
    rollout = PLAIN.model_copy(update={"samples_per_prompt": 4})
    batch: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = train(pair, tmp_path, max_steps=1, rollout=rollout, objective=Objective.paper(), **batch)
    student, teacher = sizes(pair)
    prompts, responses = lengths(trainer.rollouts)
    whole = update_flops(student, teacher, prompts, responses, width=trainer.width)
    assert len({tuple(r.prompt_ids) for r in trainer.rollouts}) == 2
    assert len(set(prompts)) == 1
    assert logged(trainer) == [pytest.approx(whole.total - 6 * student.forward([prompts[0] - 1]))]


@pytest.mark.usefixtures("clock")
def test_rescoring_and_text_count_and_other_processes_do_not(pair: tuple[str, str], tmp_path: Path) -> None:
    batch = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "rollout": PLAIN}
    objective = Objective.paper()
    student, teacher = sizes(pair)

    def extra(**changes: Any) -> tuple[float, Any]:
        """Operations beyond those of an update by `update_flops`."""
        trainer = train(pair, tmp_path, **batch, **changes)
        plain = update_flops(student, teacher, *lengths(trainer.rollouts), width=trainer.width)
        return logged(trainer)[0] - plain.total, trainer

    found, trainer = extra(objective=objective.model_copy(update={"old_logprobs": "trainer"}))
    prompts, responses = lengths(trainer.rollouts)
    reading = student.forward(map(sum, zip(prompts, responses, strict=True)))
    assert found == pytest.approx(reading + student.head(sum(responses), trainer.width))

    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(20))} for i in range(8)]
    settings = {"language_model": 1.0, "language_model_block": 16}
    found, trainer = extra(objective=objective.model_copy(update=settings), text_dataset=text)
    pieces = [len(ids) for block in trainer.text.of_update(0) for ids in trainer.text.pieces(block)]
    tokens = sum(pieces) - len(pieces)
    trained = student.forward(pieces) + student.backward(pieces)
    assert found == pytest.approx(trained + student.head_training(tokens, trainer.width, teacher.hidden))
    settings["language_model_distill"] = 1.0
    distilled, _ = extra(objective=objective.model_copy(update=settings), text_dataset=text)
    assert distilled == pytest.approx(found + teacher.forward(pieces))

    class Elsewhere(OwnEngine):
        capabilities = replace(OwnEngine.capabilities, supports_overlap=True)

    engine = Elsewhere(pair, [])
    other = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, **{key: value for key, value in batch.items() if key != "rollout"}),
        rollout=PLAIN,
        objective=objective,
        train_dataset=PROMPTS,
        engine=engine,
    )
    other.train()
    plain = update_flops(student, teacher, *lengths(other.rollouts), width=other.width)
    assert logged(other) == [pytest.approx(plain.total - plain.sampling)]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("cross_entropy", [0.5, 1.0])
def test_a_supervised_update(pair: tuple[str, str], tmp_path: Path, cross_entropy: float) -> None:
    rows = [{"prompt_ids": [2, 5 + i, 3], "response_ids": [7] * (4 + i) + [1]} for i in range(4)]
    trainer = SupervisedTrainer(
        *pair, arguments(tmp_path, max_steps=1), train_dataset=rows, cross_entropy=cross_entropy
    )
    trainer.train()
    student, teacher = sizes(pair)
    whole = [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows]
    tokens, reads = sum(len(row["response_ids"]) for row in rows), cross_entropy < 1
    expected = student.forward(whole) + student.backward(whole)
    expected += student.head_training(tokens, trainer.width, teacher.hidden if reads else None)
    assert logged(trainer) == [pytest.approx(expected + (teacher.forward(whole) if reads else 0))]


@pytest.mark.usefixtures("clock")
def test_an_adapter_whose_base_is_the_teacher(pair: tuple[str, str], tmp_path: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = load_model(pair[0], torch.float32)
    weights = dimensions_of(base).weights
    student: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    rows = [{"prompt_ids": [2, 5, 3], "response_ids": [7] * 6}] * 4
    trainer = SupervisedTrainer(
        student, None, arguments(tmp_path, max_steps=1), train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    sizes = dimensions_of(student)
    assert (sizes.trained, sizes.frozen) == (2 * 4 * 128, weights)
    expected = sizes.forward([9] * 4) + sizes.backward([9] * 4) + sizes.head_training(24, trainer.width, sizes.hidden)
    without = replace(sizes, trained=0.0).forward([9] * 4)
    assert logged(trainer) == [pytest.approx(expected + without)]


def test_the_log_has_a_share_where_the_peak_is_known(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shares() -> list[float]:
        log = train(pair, tmp_path, max_steps=2).state.log_history
        return [entry["model_flops_utilization"] for entry in log if "model_flops_utilization" in entry]

    assert len(found := shares()) == 2
    assert all(0 < share < 1 for share in found)
    monkeypatch.setattr("minillm.train.utilisation.peak_flops", lambda *_: None)
    assert shares() == []


@pytest.mark.parametrize("rows", [None, [0, 0, 1]])
def test_lengths_of_sequences(rows: list[int] | None) -> None:
    batch = pad([[4] * 3, [4], [4] * 2], [[5] * 2, [5] * 7, [5]], rows=rows)
    assert batch.sequence_lengths() == [5, 8, 3]


def test_a_sequence_without_response_has_no_length_here() -> None:
    prompts: list[list[int]] = [[4] * 3, [4], [4] * 2]
    assert pad(prompts, [[5] * 2, [], [5]]).sequence_lengths() == [5, 3]
    assert pad(prompts, [[], [], []]).sequence_lengths() == []


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("on_policy", [False, True])
def test_each_of_several_teachers_counts_for_its_own_responses(
    pair: tuple[str, str], tmp_path: Path, on_policy: bool
) -> None:
    folders = {"one": pair[1], "two": save(tiny_llama(5, width=96), tmp_path / "two")}
    batch: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    names = ["one", "two", "two"]
    trainer: Any
    if on_policy:
        rows = [{**row, "teacher": names[i % 3]} for i, row in enumerate(PROMPTS)]
        trainer = MiniLLMTrainer(
            pair[0],
            folders,
            arguments(tmp_path / "run", **batch),
            rollout=PLAIN,
            objective=Objective.paper(),
            train_dataset=rows,
        )
    else:
        rows = [{"prompt_ids": [2, 5, 3], "response_ids": [7] * (2 + i), "teacher": names[i % 3]} for i in range(8)]
        trainer = SupervisedTrainer(pair[0], folders, arguments(tmp_path / "run", **batch), train_dataset=rows)
    trainer.train()
    if on_policy:
        trained = [(r.prompt_ids, r.response_ids, r.teacher_name) for r in trainer.rollouts]
    else:
        trained = [(row["prompt_ids"], row["response_ids"], row["teacher"]) for row in rows]
    student = sizes(pair)[0]
    expected = student.decoding(*zip(*((len(p), len(r)) for p, r, _ in trained), strict=True)) if on_policy else 0.0
    for prompt, response, name in trained:
        teacher = sizes((pair[0], folders[name]))[1]
        length = len(prompt) + len(response)
        expected += student.forward([length]) + student.backward([length]) + teacher.forward([length])
        expected += student.head_training(len(response), trainer.width, teacher.hidden)
    assert logged(trainer) == [pytest.approx(expected)]
