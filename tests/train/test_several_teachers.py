"""Trainers with several teachers, against plain loops in which every response meets its own teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.loss.config import Objective
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.teacher.routed import RoutedTeacher
from minillm.teacher.served import ServedTeacher
from minillm.train import pair as pairs
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import save, tiny_llama, tiny_tokenizer
from tests.loopback import short_backoff  # noqa: F401
from tests.teacher.test_served import FakeServer
from tests.train.common import OFF_POLICY, PROMPTS, arguments, train

NAMES = ["math", "chat", "chat"]
ROWS = [{**row, "teacher": NAMES[i % 3]} for i, row in enumerate(PROMPTS)]
VALIDATION = [
    {"prompt_ids": [2, i, 3], "references": ["w5"], "teacher": NAMES[i % 3]} for i in range(5, 10)
]  # one process samples them all
ROLLOUT = RolloutConfig(
    engine="transformers",
    num_rollouts=8,
    inner_epochs=2,
    teacher_mix=0.0,
    max_new_tokens=10,
    max_prompt_tokens=8,
    temperature=0.7,
)
# One micro-batch, which holds responses of both teachers.
PLAIN_STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
PLAIN_STEP |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher of another width than that of `pair`."""
    return save(tiny_llama(5, width=96, scale=0.3), tmp_path_factory.mktemp("chat"))


@pytest.fixture(params=["local", "served"])
def teachers(request: pytest.FixtureRequest, pair: tuple[str, str], chat: str) -> Iterator[dict[str, Any]]:
    """Two teachers, both in this process, or one of them behind a server."""
    if request.param == "local":
        yield {"math": pair[1], "chat": load_model(chat, torch.float32)}
        return
    server = FakeServer(tiny_llama(5, width=96, scale=0.3))
    yield {"math": pair[1], "chat": ServedTeacher([server.url], chat, patience=5)}
    assert server.bodies
    server.close()


def logprobs(model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float) -> Tensor:
    """Log-probabilities of the whole vocabulary at each token of a response."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_moved_by(trainer: Any, start: Any, gradients: dict[str, Tensor]) -> None:
    """The weights are those at the start, minus the gradients times a learning rate of 1."""
    before, trained = start.state_dict(), trainer.model.state_dict()
    for name, gradient in gradients.items():
        moved = before[name] - trained[name]
        assert float(gradient.norm()) > 0
        assert float((moved - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def models_of(pair: tuple[str, str], chat: str) -> tuple[Any, dict[str, Any]]:
    student: Any = load_model(pair[0], torch.float32).eval()
    return student, {"math": load_model(pair[1], torch.float32), "chat": load_model(chat, torch.float32)}


def test_an_update_is_that_of_a_plain_loop(
    teachers: dict[str, Any], pair: tuple[str, str], chat: str, tmp_path: Path
) -> None:
    objective = Objective.recommended(baseline="none", importance="none", clip=None, dual_clip=None)
    trainer = train(
        (pair[0], teachers),  # pyright: ignore[reportArgumentType]
        tmp_path,
        objective=objective,
        rollout=ROLLOUT.model_copy(update={"num_rollouts": 4}),
        train_dataset=ROWS,
        eval_dataset=VALIDATION,
        **PLAIN_STEP,
    )
    rollouts = trainer.rollouts
    owners = {tuple(trainer.source.prompts[i]): row["teacher"] for i, row in enumerate(ROWS)}
    assert {rollout.teacher_name for rollout in rollouts} == {"math", "chat"}
    student, models = models_of(pair, chat)
    loss, count = torch.zeros(()), sum(len(rollout.response_ids) for rollout in rollouts)
    for rollout in rollouts:
        assert rollout.teacher_name == owners[tuple(rollout.prompt_ids)]
        logq = logprobs(student, rollout.prompt_ids, rollout.response_ids, 0.7)
        with torch.no_grad():
            logp = logprobs(models[str(rollout.teacher_name)], rollout.prompt_ids, rollout.response_ids, 0.7)
        kl = (logq.exp() * (logq - logp)).sum(-1)
        for t, token in enumerate(rollout.response_ids):
            future = -kl[t + 1 :].detach().mean() if t + 1 < len(kl) else torch.zeros(())
            loss = loss + (kl[t] - future * logq[t, token]) / count
    assert_moved_by(trainer, student, gradients_of(student, loss))
    found = trainer.evaluate()["eval_reverse_kl"]
    trained: Any = trainer.model
    total, tokens = 0.0, 0
    for row, answer in zip(VALIDATION, trainer.sample_answers([row["prompt_ids"] for row in VALIDATION]), strict=True):
        with torch.no_grad():
            logq, logp = (
                logprobs(model, answer.prompt_ids, answer.response_ids, 0.7)
                for model in (trained.eval(), models[row["teacher"]])
            )
        total += float((logq.exp() * (logq - logp)).sum())
        tokens += len(answer.response_ids)
    assert found == pytest.approx(total / tokens, rel=1e-4)
    trainer.close()


def test_a_run_continues_in_the_middle_of_a_batch(
    teachers: dict[str, Any], pair: tuple[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"rollout": ROLLOUT, "train_dataset": ROWS, "max_steps": 6, "save_strategy": "no"}
    both: Any = (pair[0], teachers)
    whole = train(both, tmp_path / "whole", **options)
    whole.close()
    train(both, tmp_path / "parts", stop=3, **options).close()
    parts = train(both, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **options)
    parts.close()
    for ours, theirs in zip(whole.rollouts, parts.rollouts, strict=True):
        assert ours.teacher_name == theirs.teacher_name
    ours, theirs = whole.model.state_dict(), parts.model.state_dict()  # pyright: ignore[reportOptionalMemberAccess]
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_replayed_and_given_responses_keep_their_teacher(
    teachers: dict[str, Any], pair: tuple[str, str], chat: str, tmp_path: Path
) -> None:
    given = [
        {"prompt_ids": [2, i, 3], "response_ids": [i + 1, 5, 1], "teacher": NAMES[i % 3]} for i in range(4, 12)
    ]  # prompts that are not among the others
    trainer = train(
        (pair[0], teachers),  # pyright: ignore[reportArgumentType]
        tmp_path,
        objective=OFF_POLICY,
        rollout=ROLLOUT.model_copy(update={"on_policy": 0.5, "replay": 0.5, "inner_epochs": 1}),
        train_dataset=ROWS,
        responses=given,
        max_steps=6,
    )
    owners = {tuple(prompt): row["teacher"] for prompt, row in zip(trainer.source.prompts, ROWS, strict=True)}
    owners |= {tuple(row["prompt_ids"]): row["teacher"] for row in given}
    kinds = [rollout.weights_version < 0 for rollout in trainer.rollouts]
    assert sum(kinds) == 4
    _, models = models_of(pair, chat)
    trainer.teacher.add_token_logprobs(trainer.rollouts, trainer.sampling)  # pyright: ignore
    for rollout in trainer.rollouts:
        assert rollout.teacher_name == owners[tuple(rollout.prompt_ids)]
        with torch.no_grad():
            logp = logprobs(models[str(rollout.teacher_name)], rollout.prompt_ids, rollout.response_ids, 0.7)
        assert rollout.teacher is not None
        assert rollout.teacher.token_logprobs is not None
        want = logp.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(rollout.teacher.token_logprobs, want, rtol=1e-4, atol=1e-4)
    trainer.close()


def test_text_beside_several_teachers_is_trained_on_without_them(
    pair: tuple[str, str], chat: str, tmp_path: Path
) -> None:
    trainer = train(
        (pair[0], {"math": pair[1], "chat": chat}),  # pyright: ignore[reportArgumentType]
        tmp_path,
        objective=Objective.recommended(language_model=0.1, language_model_block=16),
        rollout=ROLLOUT,
        train_dataset=ROWS,
        text_dataset=[{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(8)],
        max_steps=2,
    )
    assert trainer.state.log_history[0]["text_nll"] > 0
    trainer.close()


GIVEN = [
    {"prompt_ids": [2, i, 3], "response_ids": [i + 1, 5, 1][: 1 + i % 3], "teacher": NAMES[i % 3]} for i in range(4, 8)
]


def test_a_supervised_update_is_that_of_a_plain_loop(
    teachers: dict[str, Any], pair: tuple[str, str], chat: str, tmp_path: Path
) -> None:
    trainer = SupervisedTrainer(
        pair[0],
        teachers,
        arguments(tmp_path, **PLAIN_STEP),
        train_dataset=GIVEN,
        cross_entropy=0.25,
        temperature=2.0,
        rollout=ROLLOUT,
    )
    trainer.train()
    student, models = models_of(pair, chat)
    loss, count = torch.zeros(()), sum(len(row["response_ids"]) for row in GIVEN)
    for row in GIVEN:
        prompt, response = row["prompt_ids"], row["response_ids"]
        logq, text_logq = (logprobs(student, prompt, response, t) for t in (2.0, 1.0))
        with torch.no_grad():
            logp = logprobs(models[row["teacher"]], prompt, response, 2.0)
        forward = (logp.exp() * (logp - logq)).sum()
        entropy = -text_logq.gather(1, torch.tensor(response)[:, None]).sum()
        loss = loss + (0.25 * entropy + 0.75 * forward) / count
    assert_moved_by(trainer, student, gradients_of(student, loss))
    trainer.close()


NO_TEACHER = [{key: value for key, value in row.items() if key != "teacher"} for row in ROWS]
TEXT = Objective.recommended(language_model=0.1, language_model_distill=0.5, language_model_block=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": ROLLOUT.model_copy(update={"teacher_mix": 0.2})},
            r"rollout\.teacher_mix with several teachers.*0",
        ),
        ({"objective": TEXT, "text_dataset": [{"text": "w1 w2"}]}, r"language_model_distill with several.*set 0"),
        ({"train_dataset": NO_TEACHER}, "train_dataset row 0 names no teacher; allowed .*: math, chat"),
        (
            {"train_dataset": [*ROWS, {**ROWS[0], "teacher": "code"}]},
            "train_dataset row 12 names teacher 'code'; allowed in its column teacher: math, chat",
        ),
        ({"responses": [*GIVEN, {"prompt_ids": [2], "response_ids": [1]}]}, "responses row 4 names no teacher"),
        ({"eval_dataset": [{"prompt_ids": [2], "references": []}]}, "eval_dataset row 0 names no teacher"),
        ({"teacher": {"math": None}}, "a mapping needs a model, a name or a ServedTeacher for each teacher"),
        ({"teacher": {}}, "a mapping needs a model"),
    ],
)
def test_what_several_teachers_cannot_do_is_refused_before_weights_load(
    pair: tuple[str, str],
    chat: str,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "load_model", lambda *_: pytest.fail("weights were loaded"))
    teacher: Any = {"math": pair[1], "chat": chat}
    options: dict[str, Any] = {"teacher": teacher, "rollout": ROLLOUT, "train_dataset": ROWS} | changes
    if options["teacher"] is not teacher:
        options["train_dataset"] = [{**row, "teacher": "math"} for row in ROWS]
    with pytest.raises(InputError, match=message):
        MiniLLMTrainer(pair[0], args=arguments(tmp_path), **options)


def test_every_teachers_tokenizer_and_servers_are_checked_before_weights_load(
    pair: tuple[str, str], chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "load_model", lambda *_: pytest.fail("weights were loaded"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "other")
    args = arguments(tmp_path)
    with pytest.raises(InputError, match="student and teacher chat have different tokenizers: id 32 is None"):
        SupervisedTrainer(pair[0], {"math": pair[1], "chat": str(tmp_path / "other")}, args, train_dataset=GIVEN)
    server = FakeServer(tiny_llama(2, layers=3), states=False)
    mixed: Any = {"math": ServedTeacher([server.url], pair[1], patience=5), "chat": chat}
    for trainer in (MiniLLMTrainer, SupervisedTrainer):
        options: dict[str, Any] = {"rollout": ROLLOUT, "train_dataset": GIVEN}
        with pytest.raises(
            InputError, match=r"servers of teacher math return log-probabilities of some tokens only.*start servers"
        ):
            trainer(pair[0], mixed, args, **options)
    with pytest.raises(InputError, match="train_dataset row 0 names no teacher"):
        SupervisedTrainer(pair[0], mixed, args, train_dataset=[{"prompt_ids": [2], "response_ids": [1]}])
    server.close()


def test_one_teacher_ignores_the_column_and_heads_may_have_padding(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"rollout": ROLLOUT, "max_steps": 2}
    plain, named = (
        train(pair, tmp_path / str(i), train_dataset=rows, **options)
        for i, rows in enumerate(([{**row, "teacher": "nobody"} for row in PROMPTS], PROMPTS))
    )
    assert {rollout.teacher_name for rollout in named.rollouts} == {None}
    for name, value in plain.model.state_dict().items():  # pyright: ignore[reportOptionalMemberAccess]
        assert torch.equal(value, named.model.state_dict()[name])  # pyright: ignore[reportOptionalMemberAccess]
    caplog.set_level(logging.WARNING)
    wide: Any = {"math": pair[1], "chat": tiny_llama(7, vocab=40)}
    trainer = train((pair[0], wide), tmp_path / "wide", train_dataset=ROWS, **options)  # pyright: ignore[reportArgumentType]
    assert isinstance(trainer.teacher, RoutedTeacher)
    assert "The heads are 32 (student) and 40 (teacher chat) tokens wide; both are used up to 32." in caplog.text
    assert trainer.width == 32


def test_several_teachers_are_not_sharded(pair: tuple[str, str], chat: str, tmp_path: Path) -> None:
    teachers, rows = {"math": pair[1], "chat": chat}, [{**ROWS[0], "prompt_ids": [2], "response_ids": [3, 1]}] * 4
    with pytest.raises(InputError, match=r"shard_teacher with several teachers: .*: leave it out, or serve"):
        MiniLLMTrainer(pair[0], teachers, arguments(tmp_path), rollout=ROLLOUT, train_dataset=ROWS, shard_teacher=True)
    with pytest.raises(InputError, match="shard_teacher with several teachers"):
        SupervisedTrainer(pair[0], teachers, arguments(tmp_path), train_dataset=rows, shard_teacher=True)
