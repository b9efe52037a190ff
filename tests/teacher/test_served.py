"""A served teacher: exact by the states of a real vLLM server, and what fake servers do wrong."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.errors import EngineError, InputError
from minillm.loss.config import Objective
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.vllm_memory import vllm_is_installed
from minillm.run import runner
from minillm.run.recipe_file import load_recipe
from minillm.teacher.base import score_missing
from minillm.teacher.local import LocalTeacher
from minillm.teacher.served import ServedTeacher
from minillm.teacher.served_logprobs import ServedLogprobs
from minillm.teacher.served_states import ServedStates
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.pair import load_pair
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import tiny_llama
from tests.loopback import LoopbackServer, short_backoff  # noqa: F401
from tests.rollout.test_engines import start_server, stop_server
from tests.run.test_stages import RECIPE
from tests.train.common import PROMPTS, arguments

PROMPT_IDS, RESPONSE_IDS = [[2], [3, 4, 5], [9] * 40], [[5, 6, 1], [7] * 20, [8, 1]]
SAMPLING = Sampling(20, (1,), 30, temperature=0.7)


class FakeServer(LoopbackServer):
    """Returns the states of a model, as vLLM's pooling runner does. Each of `faults` answers one request instead."""

    def __init__(self, model: Any, *, states: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self.teacher, self.dtype = LocalTeacher(model), dtype
        self.started: float | None = 1.7e9
        self.faults = list[Callable[[Any, Any], None]]()
        self.change: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
        self.bodies = list[dict[str, Any]]()
        self.states, self.lock = states, threading.Lock()
        super().__init__()

    def get(self, handler: Any) -> None:
        if handler.path == "/metrics":
            handler.say(200, b"" if self.started is None else b"process_start_time_seconds %.2f\n" % self.started)
        elif handler.path == "/pooling":
            handler.say(405 if self.states else 404, {})
        else:
            handler.say(200, {"data": [{"id": "tiny", "max_model_len": 64}]})

    def post(self, handler: Any, body: dict[str, Any]) -> None:
        with self.lock:
            self.bodies.append(body)
            fault = self.faults.pop(0) if self.faults else None
            if fault is not None:
                fault(handler, body)
                return
            say_states(handler, self.states_of(body["input"]), body["embed_dtype"])

    def states_of(self, ids: list[int]) -> torch.Tensor:
        [states] = self.teacher.hidden([ids[:1]], [[*ids[1:], 0]])
        return self.change(states.to(self.dtype).float())


def say_states(handler: Any, states: torch.Tensor, dtype: str) -> None:
    values = states.to(getattr(torch, dtype)).flatten().contiguous().view(torch.uint8)
    handler.say(200, values.numpy().tobytes(), "application/octet-stream")


@pytest.fixture
def fakes() -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers, by default of the teacher of `pair`."""
    started = []

    def start(model: Any = None, **options: Any) -> FakeServer:
        started.append(FakeServer(tiny_llama(2, layers=3) if model is None else model, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def attach(servers: list[FakeServer], source: str, patience: float = 5.0) -> ServedStates:
    teacher = ServedTeacher([server.url for server in servers], source, patience=patience).attach(64)
    assert isinstance(teacher, ServedStates)
    return teacher


def assert_scores_as(teacher: ServedStates, model: Any, tolerance: float = 1e-5) -> None:
    zeros = torch.zeros(1)
    rollouts = [Rollout(p, r, zeros, zeros, 0, True) for p, r in zip(PROMPT_IDS, RESPONSE_IDS, strict=True)]
    targets = []
    for scoring in (LocalTeacher(model), teacher):
        score_missing(scoring, rollouts, SAMPLING)
        scoring.add_token_logprobs(rollouts, SAMPLING)
        targets.append([rollout.teacher for rollout in rollouts if rollout.teacher is not None])
        for rollout in rollouts:
            rollout.teacher = None
    for here, there in zip(*targets, strict=True):
        assert here.token_logprobs is not None
        torch.testing.assert_close(there.hidden, here.hidden, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(there.token_logprobs, here.token_logprobs, rtol=tolerance, atol=tolerance)


def test_states_are_scored_as_those_of_a_teacher_in_this_process(
    fakes: Callable[..., FakeServer], pair: tuple[str, str]
) -> None:
    servers = [fakes(), fakes()]
    teacher = attach(servers, pair[1])
    assert_scores_as(teacher, tiny_llama(2, layers=3))
    assert [len(states) for states in teacher.hidden([[2], [3]], [[], [4, 5]])] == [0, 2]
    body = servers[0].bodies[-1] if servers[0].bodies else servers[1].bodies[-1]
    assert (body["task"], body["use_activation"], body["add_special_tokens"]) == ("token_embed", False, False)
    teacher.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_sent_in_the_fewest_bytes_that_lose_nothing(
    fakes: Callable[..., FakeServer], pair: tuple[str, str], dtype: torch.dtype
) -> None:
    server = fakes(dtype=dtype)
    teacher = attach([server], pair[1])
    [states] = teacher.hidden([[2, 3]], [[4, 5, 6]])
    assert server.bodies[-1]["embed_dtype"] == str(dtype).removeprefix("torch.")
    assert torch.equal(states, server.states_of([2, 3, 4, 5])[1:])
    teacher.close()
    both = attach([server, fakes()], pair[1])
    assert both.dtype == torch.float32
    both.close()


def with_nan(handler: Any, body: Any) -> None:
    say_states(handler, torch.full((len(body["input"]), 64), math.nan), body["embed_dtype"])


def with_a_row_missing(handler: Any, body: Any) -> None:
    say_states(handler, torch.zeros(len(body["input"]) - 1, 64), body["embed_dtype"])


def hanging_up(handler: Any, _: Any) -> None:
    handler.connection.close()


BAD: dict[str, Callable[[Any, Any], None]] = {
    "an error": lambda handler, _: handler.say(500, {"error": "no"}),
    "a closed connection": hanging_up,
    "JSON": lambda handler, _: handler.say(200, {"data": []}),
    "a row missing": with_a_row_missing,
    "numbers that are not finite": with_nan,
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_retried(fakes: Callable[..., FakeServer], pair: tuple[str, str], fault: str) -> None:
    server = fakes()
    server.faults = [BAD[fault]]  # while the teacher attaches
    teacher = attach([server], pair[1])
    server.faults = [BAD[fault]] * 3
    assert_scores_as(teacher, tiny_llama(2, layers=3))
    assert not server.faults
    server.faults = [BAD[fault]] * 10_000
    teacher._servers._patience = 0.2
    with pytest.raises(EngineError, match=rf"{server.url}: .*tried for 0\.2 s"):
        teacher.hidden([[2]], [[3]])
    teacher.close()


def test_a_server_that_restarts_with_the_same_weights_goes_on(
    fakes: Callable[..., FakeServer], pair: tuple[str, str]
) -> None:
    server = fakes()
    teacher = attach([server], pair[1])
    server.started = 1.8e9
    assert_scores_as(teacher, tiny_llama(2, layers=3))
    assert teacher._servers.each[0].started_at == 1.8e9
    teacher.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_server_that_restarts_with_other_weights_is_found(
    fakes: Callable[..., FakeServer], pair: tuple[str, str], fails: bool
) -> None:
    """Also if no request fails, so that only the start time of its process shows it."""
    server = fakes()
    teacher = attach([server], pair[1])
    server.teacher, server.started = LocalTeacher(tiny_llama(4, layers=3)), 1.8e9
    server.faults = [hanging_up] * fails
    with pytest.raises(EngineError, match=rf"{server.url}: its states of a fixed prompt differ by \d+"):
        teacher.hidden([[2]], [[3]])
    teacher.close()


def scaled(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Changes states in bfloat16 by a share of their size, as other weights do."""
    return lambda states: (states * factor).to(torch.bfloat16).float()


def test_other_weights_of_one_server_are_told_from_two_servers_that_round(
    fakes: Callable[..., FakeServer], pair: tuple[str, str]
) -> None:
    """In bfloat16, the states of two checkpoints differ as little as those of two kinds of hardware."""
    first, second = fakes(dtype=torch.bfloat16), fakes(dtype=torch.bfloat16)
    second.change = scaled(1.03)
    teacher = attach([first, second], pair[1])
    for server in (first, second):
        server.started, server.change = 1.8e9, scaled(1.003) if server is first else scaled(1.033)
    assert len(teacher.hidden([[2]] * 8, [[3]] * 8)) == 8
    second.started, second.change = 1.9e9, scaled(1.0)
    teacher.hidden([[2]] * 8, [[3]] * 8)
    assert not teacher._servers.each[1].has_current_weights  # the first goes on without it
    first.started, first.change = 1.9e9, scaled(1.02)
    teacher._servers._patience = 0.3
    with pytest.raises(
        EngineError, match=r"fixed prompt differ by [12]\.\d+% from those that it returned before: it was"
    ):
        teacher.hidden([[2]] * 8, [[3]] * 8)
    first.change = scaled(1.003)  # as after rounding that other requests have caused
    assert len(teacher.hidden([[2]] * 8, [[3]] * 8)) == 8
    teacher.close()


def test_a_server_whose_restarts_are_not_seen_is_named_once(
    fakes: Callable[..., FakeServer], pair: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    servers = [fakes(), fakes()]
    servers[1].started = None
    teacher = attach(servers, pair[1])
    servers[1].faults = [hanging_up] * 2
    teacher.hidden([[2]] * 8, [[3]] * 8)
    warned = [record.getMessage() for record in caplog.records if "a restart during which" in record.getMessage()]
    assert [message.split(": ")[0] for message in warned] == [servers[1].url]
    teacher.close()


def test_a_served_teacher_is_not_sharded(
    fakes: Callable[..., FakeServer], pair: tuple[str, str], tmp_path: Path, tokenizer: Any
) -> None:
    """A recipe may name servers for a teacher that is sharded where it is loaded."""
    args = arguments(tmp_path)
    served = load_pair(pair[0], ServedTeacher([fakes().url], pair[1], timeout=12.0), args, tokenizer, None)
    teacher = served.teacher(args, sharded=True, longest=32)
    assert isinstance(teacher, ServedStates)
    assert teacher._servers._client.timeout.read == 12.0
    teacher.close()


def reversed_rows(states: torch.Tensor) -> torch.Tensor:
    return states.flip(0)


def normalised(states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(states, dim=-1)


@pytest.mark.parametrize(
    ("change", "message"), [(reversed_rows, "depend on later tokens"), (normalised, "its states are normalised")]
)
def test_states_of_another_kind_are_refused(
    fakes: Callable[..., FakeServer], pair: tuple[str, str], change: Any, message: str
) -> None:
    server = fakes()
    server.change = change
    with pytest.raises(EngineError, match=rf"{server.url}: .*{message}"):
        attach([server], pair[1])


def test_servers_that_differ_are_refused_by_name(fakes: Callable[..., FakeServer], pair: tuple[str, str]) -> None:
    good, other = fakes(), fakes(tiny_llama(4, layers=3))
    with pytest.raises(EngineError, match=rf"{other.url}: its states .* that {good.url} returned"):
        attach([good, other], pair[1])
    generating = fakes(states=False)
    with pytest.raises(EngineError, match=rf"{generating.url} do not return states, .*--runner pooling"):
        attach([good, generating], pair[1])
    wide = fakes(tiny_llama(4, width=96))
    with pytest.raises(EngineError, match=rf"{wide.url} returns states of 96 numbers, and the head .* takes 64"):
        attach([wide], pair[1])
    refusing = fakes()
    refusing.faults = [lambda handler, _: handler.say(400, {"error": "Try switching"})] * 10
    with pytest.raises(EngineError, match=r"Try switching.*started with vllm serve TEACHER --runner pooling"):
        attach([refusing], pair[1])
    with pytest.raises(EngineError, match="serves 64 tokens; prompt and response need 65"):
        ServedTeacher([good.url], pair[1]).attach(65)


def train(pair: tuple[str, str], teacher: Any, folder: Path, **changes: Any) -> MiniLLMTrainer:
    """Train two updates with everything that log-probabilities of a few tokens cannot give."""
    settings: dict[str, Any] = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    rollout = RolloutConfig(
        engine="transformers",
        num_rollouts=8,
        teacher_mix=0.0,
        max_new_tokens=10,
        max_prompt_tokens=8,
        temperature=0.7,
        on_policy=0.5,
    )
    objective = Objective.recommended(
        long_term=0.0,
        single_step_weight="none",
        divergence={"name": "skew_reverse_kl", "skew": 0.1},
        language_model=0.1,
        language_model_distill=0.5,
        language_model_block=16,
        reward="expected",
    )
    options: dict[str, Any] = {
        "rollout": rollout,
        "objective": objective,
        "text_dataset": [{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(8)],
        "responses": [{"prompt_ids": [2, i, 3], "response_ids": [i + 1, 5, 1]} for i in range(4, 12)],
        "eval_dataset": [{"prompt_ids": [2, 7, 3], "references": ["w5"]}],
    }
    trainer = MiniLLMTrainer(
        pair[0], teacher, arguments(folder, **settings), train_dataset=PROMPTS, **(options | changes)
    )
    trainer.train()
    trainer.evaluate()
    trainer.close()
    return trainer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"rollout\.temperature: 0\.7"),
        ({"rollout": {"on_policy": 0.5}}, r"rollout\.on_policy below 1"),
        (
            {
                "rollout": {},
                "objective": Objective.recommended(
                    language_model=0.1, language_model_distill=0.5, language_model_block=16
                ),
            },
            "language_model_distill",
        ),
    ],
)
def test_what_log_probabilities_cannot_do_is_refused_before_anything_is_sampled(
    fakes: Callable[..., FakeServer],
    pair: tuple[str, str],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    teacher = ServedTeacher([fakes(states=False).url], pair[1])
    if "rollout" in changes:
        settings = {"engine": "transformers", "num_rollouts": 8, "teacher_mix": 0.0, "max_prompt_tokens": 8}
        changes = changes | {"rollout": RolloutConfig(max_new_tokens=10, **settings, **changes["rollout"])}
    with pytest.raises(InputError, match=message + ".*, or start servers that return states: vllm serve TEACHER"):
        train(pair, teacher, tmp_path, **changes)
    assert "the student's 16 most likely tokens" in caplog.text
    assert "65 % with 16" in caplog.text


def test_the_best_checkpoint_and_supervised_training_need_states(
    fakes: Callable[..., FakeServer], pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = ServedTeacher([fakes(states=False).url], pair[1])
    assert isinstance(teacher.attach(32), ServedLogprobs)
    caplog.clear()
    ServedTeacher(teacher.urls, pair[1], top_k=0).attach(32).close()
    assert "only those of the sampled tokens are used" in caplog.text
    assert "KL" not in caplog.text
    best = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, "save_steps": 1}
    args = arguments(tmp_path, **best, metric_for_best_model="reverse_kl")
    rollout = RolloutConfig(
        engine="transformers", num_rollouts=8, teacher_mix=0.0, max_new_tokens=10, max_prompt_tokens=8
    )
    validation = [{"prompt_ids": [2, 7, 3], "references": ["w5"]}]
    with pytest.raises(InputError, match=r"metric_for_best_model: reverse_kl needs the teacher's states"):
        MiniLLMTrainer(pair[0], teacher, args, rollout=rollout, train_dataset=PROMPTS, eval_dataset=validation)
    rows = [{"prompt_ids": [2, i, 3], "response_ids": [i + 1, 5, 1]} for i in range(4, 12)]
    with pytest.raises(InputError, match="log-probabilities of some tokens only: start servers that return states"):
        SupervisedTrainer(pair[0], teacher, arguments(tmp_path), train_dataset=rows)


def test_the_stages_of_a_recipe_read_the_servers(
    fakes: Callable[..., FakeServer], pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up and minillm stages leave the student that a teacher in their process makes."""
    timeouts = []
    monkeypatch.setattr(
        "minillm.run.stages.shared.ServedTeacher",
        lambda *args, **settings: (timeouts.append(settings["timeout"]), ServedTeacher(*args, **settings))[1],
    )
    data, file, server = tmp_path / "prompts.jsonl", tmp_path / "recipe.yaml", fakes()
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(10)))
    file.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=pair[1]))
    students, requests = [], [0]
    for name, servers in (("here", "[]"), ("served", f"[{server.url}]")):
        words = [f"run_dir={tmp_path / name}", "rollout.teacher_mix=0", "rollout.temperature=0.7"]
        words += [
            f"teacher.servers={servers}",
            "rollout.server_timeout=77",
            "training.optim=sgd",
            "warmup.training.optim=sgd",
        ]
        for stages in ("[teacher, student, responses, warmup]", "[minillm]"):
            runner.run_recipe(load_recipe(file, [*words, f"stages={stages}"]))
            requests.append(len(server.bodies))
        students.append(load_model(tmp_path / name / "student", torch.float32).state_dict())
    assert requests[1] == requests[2] == 0 < requests[3] < requests[4]
    assert set(timeouts) == {77.0}
    for name, value in students[0].items():
        torch.testing.assert_close(students[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_a_real_server_gives_the_local_teachers_loss_and_gradient(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its prompts are read in chunks, with a prefix cache. Updates are plain gradient steps, so weights show gradients."""
    flags = ["--runner", "pooling", "--pooler-config", '{"task": "token_embed"}']
    flags += [
        "--enable-chunked-prefill",
        "--enable-prefix-caching",
        "--max-num-batched-tokens",
        "32",
        "--max-num-seqs",
        "8",
    ]
    process, url = start_server(pair[1], tmp_path / "log", *flags)
    try:
        served = ServedTeacher([url], pair[1], patience=600)
        teacher = served.attach(96)
        assert isinstance(teacher, ServedStates)
        assert teacher._servers.each[0].started_at is not None
        model = load_model(pair[1], torch.float32)
        for _ in range(2):  # the second time, the prefixes are in the server's cache
            assert_scores_as(teacher, model, 1e-4)
        teacher.close()
        caplog.set_level(logging.WARNING)
        trained = train(pair, served, tmp_path / "served")
        assert "log-probabilities" not in caplog.text
        here = train(pair, pair[1], tmp_path / "local")
        start = load_model(pair[0], torch.float32).state_dict()
        theirs: Any = trained.model
        for name, value in here.model.state_dict().items():  # pyright: ignore[reportOptionalMemberAccess]
            moved = float((value - start[name]).norm())
            assert moved > 0, name
            assert float((theirs.state_dict()[name] - value).norm()) <= 1e-3 * moved, name
        compared = ("loss", "eval_reverse_kl", "language_model_loss", "reverse_kl")
        for ours, other in zip(here.state.log_history, trained.state.log_history, strict=True):
            for key in set(compared) & ours.keys():
                assert other[key] == pytest.approx(ours[key], rel=1e-4), key
        rows = [{"prompt_ids": [2, i, 3], "response_ids": [i + 1, 5, 1]} for i in range(4, 12)]
        losses = []
        for given in (served, pair[1]):
            supervised = SupervisedTrainer(
                pair[0], given, arguments(tmp_path / "warm", max_steps=1), train_dataset=rows, temperature=2.0
            )
            supervised.train()
            supervised.close()
            losses.append(supervised.state.log_history[0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    except EngineError as error:
        raise AssertionError(f"{error}\n{(tmp_path / 'log').read_text()[-3000:]}") from error
    finally:
        stop_server(process)
