"""Failures of servers, produced by fake servers: which requests they get, the retries, and the weights they hold."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm.data.sampling import Sampling
from minillm.errors import EngineError
from minillm.models import servers as serving
from minillm.models.weights import plain_weights
from minillm.rollout.engines.server import VLLMServerEngine
from tests.conftest import tiny_llama
from tests.loopback import LoopbackServer, short_backoff  # noqa: F401

SAMPLING = Sampling(4, (1,), 30)


class FakeServer(LoopbackServer):
    """Answers with tokens that encode its weights and the seed.

    Each of `faults` answers one completion instead, in order; `resets` are the results of /reset_prefix_cache.
    """

    def __init__(self) -> None:
        self.weights, self.seeds, self.faults = -1.0, Counter(), []
        self.bodies, self.resets = list[dict[str, Any]](), list[bool]()
        self.lock, self.down_until, self.raw = threading.Lock(), 0.0, False
        self.started: float | None = 1.7e9
        super().__init__()

    def get(self, handler: Any) -> None:
        if handler.path == "/metrics":
            metric = b"" if self.started is None else b"process_start_time_seconds %.2f\n" % self.started
            handler.say(200, b"# HELP process_start_time_seconds Start time.\n" + metric)
        else:
            handler.say(200, {"data": [{"id": "tiny", "max_model_len": 64}]})

    def post(self, handler: Any, body: dict[str, Any]) -> None:
        if handler.path == "/collective_rpc":
            self.call(handler, **body)
        elif handler.path == "/reset_prefix_cache?reset_running_requests=true":
            handler.say(200, {"success": self.resets.pop(0) if self.resets else True})
        elif time.monotonic() < self.down_until:
            hanging_up(handler, body)
        else:
            with self.lock:
                fault = self.faults.pop(0) if self.faults and "logprob_token_ids" not in body else None
            if fault is not None:
                fault(handler, body)
            else:
                self.complete(handler, body)

    def call(self, handler: Any, method: str, args: Sequence[str] = (), kwargs: dict[str, str] | None = None) -> None:
        """Call a method of vLLM's workers. To one that they do not have, this is vLLM's answer."""
        if method == "reload_weights" and kwargs is not None:
            self.weights = float(load_file(Path(kwargs["weights_path"]) / "model.safetensors")["w"])
            handler.say(200, {"results": [None]})
        else:
            message = f"Call to collective_rpc method failed: Method '{method}' is not implemented."
            handler.say(500, {"error": {"message": message, "type": "InternalServerError", "code": 500}})

    def complete(self, handler: Any, body: dict[str, Any]) -> None:
        divisor, jitter = (1.0, 1e-4 * body["temperature"]) if self.raw else (body["temperature"], 0.0)
        table = {
            f"token_id:{token}": -token / divisor + jitter * token for token in body.get("logprob_token_ids") or []
        }
        with self.lock:
            if "seed" in body:
                self.seeds[body["seed"]] += 1
                self.bodies.append(body)
        ids = [2, int(self.weights) + 10, body.get("seed", 0) % 7 + 3, 1]
        handler.say(200, answer(ids, [-0.5] * 4, table))


def answer(
    ids: list[int], logprobs: list[float], table: dict[str, float] | None = None, why: str = "stop"
) -> dict[str, Any]:
    tables = [table or {}] * len(ids)
    return {
        "choices": [
            {"token_ids": ids, "finish_reason": why, "logprobs": {"token_logprobs": logprobs, "top_logprobs": tables}}
        ]
    }


def failing(status: int) -> Callable[[Any, Any], None]:
    return lambda handler, body: handler.say(status, {"error": "no"})


def saying(body: Any) -> Callable[[Any, Any], None]:
    return lambda handler, _: handler.say(200, body)


def hanging_up(handler: Any, body: Any) -> None:
    handler.connection.close()


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    started = [FakeServer(), FakeServer()]
    yield started
    for server in started:
        server.close()


def attach(servers: list[FakeServer], folder: Path, **settings: Any) -> VLLMServerEngine:
    options: dict[str, Any] = {"max_length": 64, "head_width": 32, "patience": 5} | settings
    return VLLMServerEngine([server.url for server in servers], folder, **options)


def weights(value: float) -> list[tuple[str, torch.Tensor]]:
    return [("w", torch.tensor(value))]


def test_requests_are_spread_and_every_server_gets_the_weights(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers, tmp_path)
    engine.update_weights(weights(3.0), 7)
    rollouts = engine.generate([[i] for i in range(40)], SAMPLING, range(40))
    assert [r.response_ids for r in rollouts] == [[2, 13, i % 7 + 3, 1] for i in range(40)]
    assert {r.weights_version for r in rollouts} == {7}
    assert all(r.finished for r in rollouts)
    assert all(sum(server.seeds.values()) >= 5 for server in servers)
    body = servers[0].bodies[0]
    assert body["logit_bias"] == {"30": -100.0, "31": -100.0}  # the padding of the head
    # Whatever sampling settings the served folder has.
    assert (body["top_p"], body["top_k"], body["repetition_penalty"]) == (1.0, 0, 1.0)
    assert (body["max_tokens"], body["stop_token_ids"], body["temperature"]) == (4, [1], 1.0)
    engine.update_weights(weights(4.0), 8)
    assert [server.weights for server in servers] == [4.0, 4.0]
    assert [path.name for path in tmp_path.iterdir()] == ["weights-8"]  # previous weights are deleted
    engine.close()
    assert not list(tmp_path.iterdir())


BAD = {
    "an error": failing(500),
    "too busy": failing(429),
    "a closed connection": hanging_up,
    "no JSON": saying(b"<html>"),
    "other JSON": saying({"hello": 1}),
    "fewer log-probabilities than tokens": saying(answer([2, 3], [-0.5])),
    "an invalid log-probability": saying(answer([2], [float("nan")])),
    "an aborted answer": saying(answer([2, 3], [-0.5, -0.5], why="abort")),
    "no tokens": saying(answer([], [])),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_retried_and_nothing_is_sampled_twice(servers: list[FakeServer], tmp_path: Path, fault: str) -> None:
    engine = attach(servers[:1], tmp_path)
    engine.update_weights(weights(1.0), 1)
    servers[0].faults = [BAD[fault]] * 3
    rollouts = engine.generate([[i] for i in range(10)], SAMPLING, range(10))
    assert [r.response_ids[2] for r in rollouts] == [i % 7 + 3 for i in range(10)]
    assert set(servers[0].seeds.values()) == {1}
    assert len(servers[0].seeds) == 10


def test_a_restarted_server_gets_the_weights_before_it_answers_again(servers: list[FakeServer], tmp_path: Path) -> None:
    """It restarts with other weights, and what it samples with those must not count as the student's responses."""
    engine = attach(servers, tmp_path)
    engine.update_weights(weights(5.0), 1)

    def restart(handler: Any, body: Any) -> None:
        # Requests in flight reach the new process before the restart is noticed.
        servers[0].weights, servers[0].started, servers[0].down_until = -1.0, 1.8e9, time.monotonic() + 0.3
        hanging_up(handler, body)

    servers[0].faults = [restart]
    rollouts = engine.generate([[i] for i in range(60)], SAMPLING, range(60))
    assert {r.response_ids[1] for r in rollouts} == {15}
    assert servers[0].weights == 5.0


def test_a_restart_between_two_requests_is_noticed(servers: list[FakeServer], tmp_path: Path) -> None:
    """No request fails; only the start time in the metrics shows it."""
    engine = attach(servers[:1], tmp_path)
    engine.update_weights(weights(5.0), 1)
    assert engine.generate([[1]], SAMPLING, [1])[0].response_ids[1] == 15
    servers[0].weights, servers[0].started = -1.0, 1.8e9
    assert {r.response_ids[1] for r in engine.generate([[i] for i in range(6)], SAMPLING, range(6))} == {15}
    assert servers[0].weights == 5.0
    before = sum(servers[0].seeds.values())
    engine.generate([[1]], SAMPLING, [1])
    assert sum(servers[0].seeds.values()) == before + 1  # the request is not repeated


def test_an_answer_to_a_request_from_before_a_restart_is_discarded(servers: list[FakeServer], tmp_path: Path) -> None:
    """The process was replaced, and got the weights through another request, while this request was in flight."""
    engine = attach(servers[:1], tmp_path)
    engine.update_weights(weights(5.0), 1)
    [server] = engine._servers.each
    answers = []

    def swapped(handler: Any, body: Any) -> None:
        servers[0].started = 1.8e9
        server.has_current_weights = False
        engine._refresh(server)  # as another thread does when its request fails
        servers[0].weights = -1.0  # the weights that the new process started with and answered this request with
        answers.append(body["seed"])
        servers[0].complete(handler, body)
        servers[0].weights = 5.0

    servers[0].faults = [swapped]
    [rollout] = engine.generate([[1]], SAMPLING, [1])
    assert rollout.response_ids[1] == 15
    assert answers == [1]
    assert servers[0].seeds[1] == 2


def test_an_address_with_changing_processes_is_refused(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers[:1], tmp_path, patience=0.5)
    engine.update_weights(weights(5.0), 1)
    complete = servers[0].complete

    def alternating(handler: Any, body: Any) -> None:
        servers[0].started = (servers[0].started or 0) + 1
        complete(handler, body)

    servers[0].complete = alternating
    with pytest.raises(EngineError, match="an address must be one server, not several behind a balancer"):
        engine.generate([[1]], SAMPLING, [1])


def test_one_restart_is_forgiven_however_long_the_requests_took(servers: list[FakeServer], tmp_path: Path) -> None:
    """A long batch is longer than the patience; the time in which processes change counts from the first restart."""
    engine = attach(servers[:1], tmp_path, patience=0.1)
    engine.update_weights(weights(5.0), 1)

    def slow(handler: Any, body: Any) -> None:
        time.sleep(0.3)
        servers[0].started = 1.8e9
        servers[0].complete(handler, body)

    servers[0].faults = [slow]
    [rollout] = engine.generate([[1]], SAMPLING, [1])
    assert rollout.response_ids[1] == 15
    assert servers[0].seeds[1] == 2


def test_a_fault_without_a_restart_sends_no_weights_again(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers[:1], tmp_path)
    engine.update_weights(weights(5.0), 1)
    servers[0].weights = 6.0  # sending the weights again would overwrite this
    servers[0].faults = [failing(500), failing(429), hanging_up]
    assert {r.response_ids[1] for r in engine.generate([[i] for i in range(8)], SAMPLING, range(8))} == {16}


def test_weights_go_to_whichever_server_comes_back(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers, tmp_path, patience=3)
    engine.update_weights(weights(5.0), 1)
    servers[0].close()
    servers[1].resets = [False, False]
    engine.update_weights(weights(6.0), 2)
    assert servers[1].weights == 6.0
    assert servers[1].resets == []


def test_a_failure_to_write_weights_still_gathers_every_shard(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers[:1], tmp_path / "weights")
    gathered = []

    def shards() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(3):
            gathered.append(i)
            yield f"w{i}", torch.zeros(1)

    (tmp_path / "weights").write_text("a file in the place of a folder")
    with pytest.raises(EngineError, match="the weights cannot be written for the servers"):
        engine.update_weights(shards(), 1)
    assert gathered == [0, 1, 2]  # gathering each is a collective operation, in which all processes take part


def test_a_server_whose_metrics_report_no_start_time_is_trusted(servers: list[FakeServer], tmp_path: Path) -> None:
    servers[0].started = None
    engine = attach(servers[:1], tmp_path)
    engine.update_weights(weights(5.0), 1)
    assert engine.generate([[1]], SAMPLING, [1])[0].response_ids[1] == 15


def test_the_requests_of_an_unreachable_server_go_to_the_other(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers, tmp_path)
    engine.update_weights(weights(1.0), 1)
    servers[0].faults = [hanging_up] * 10_000
    rollouts = engine.generate([[i] for i in range(30)], SAMPLING, range(30))
    assert len(rollouts) == 30
    assert sum(servers[1].seeds.values()) == 30
    servers[0].close()
    engine.update_weights(weights(2.0), 2)  # an unreachable server does not delay new weights either
    assert {r.response_ids[1] for r in engine.generate([[i] for i in range(8)], SAMPLING, range(8))} == {12}


def test_a_prefix_cache_that_was_not_dropped_is_not_used(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers[:1], tmp_path)
    servers[0].resets = [False, False]
    engine.update_weights(weights(2.0), 1)
    assert servers[0].resets == []


def test_an_invalid_address_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="localhost:8000 must be a server's address"):
        VLLMServerEngine(["localhost:8000"], tmp_path, max_length=8, head_width=32, patience=60)


def test_a_server_that_reports_raw_logprobs_is_refused(servers: list[FakeServer], tmp_path: Path) -> None:
    """Rounding that depends on the batch must not hide it."""
    servers[0].raw = True
    with pytest.raises(EngineError, match="log-probabilities before temperature: start it with --logprobs-mode"):
        attach(servers[:1], tmp_path)


def test_retries_end_when_the_runs_own_server_has_ended(servers: list[FakeServer], tmp_path: Path) -> None:
    servers[0].close()
    start = time.monotonic()
    engine = serving.Servers(
        [servers[0].url],
        patience=60,
        exit_reason=lambda: "the run's own server ended (exit status 1); log ends with\nno memory",
    )
    with pytest.raises(EngineError, match=r"exit status 1\); log ends with\nno memory"):
        engine.complete_all([({"prompt": [1]}, lambda answer: answer)])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("rank", [0, 1])
def test_process_0_decides_which_servers_have_the_weights(
    servers: list[FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """An unreachable server has the weights in the view of no process, and an error of process 0 is raised in all."""
    engine = attach(servers, tmp_path)
    told: list[list[Any]] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)

    def broadcast(values: list[Any], src: int) -> None:
        assert src == 0
        if rank == 0:
            told.append(list(values))
        else:
            values[:] = told.pop(0)

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    if rank == 0:
        url, servers[0].resets = servers[0].url, [False] * 50
        engine.update_weights(weights(3.0), 1)
        assert told == [[[(server.url != url, 1.7e9) for server in engine._servers.each], None]]
        for server in servers:
            server.resets = [False] * 10_000
        engine._servers._patience = 0.2
        with pytest.raises(EngineError, match="/reset_prefix_cache failed"):
            engine.update_weights(weights(4.0), 2)
        assert "/reset_prefix_cache failed" in told[1][1]
    else:
        told = [[[(False, 1.0), (True, 2.0)], None], [[(False, 1.0), (False, 2.0)], "http://gone: no answer"]]
        engine.update_weights(weights(3.0), 1)
        assert [(server.has_current_weights, server.started_at) for server in engine._servers.each] == [
            (False, 1.0),
            (True, 2.0),
        ]
        assert [server.weights for server in servers] == [-1.0, -1.0]  # only process 0 sends weights
        with pytest.raises(EngineError, match="http://gone: no answer"):
            engine.update_weights(weights(4.0), 2)


def test_the_error_at_the_end_of_patience_names_the_server_and_its_last_error(
    servers: list[FakeServer], tmp_path: Path
) -> None:
    engine = attach(servers[:1], tmp_path, patience=0.3)
    servers[0].faults = [saying({"hello": 1})] * 10_000
    with pytest.raises(
        EngineError,
        match=rf"{servers[0].url}: /v1/completions answered bad JSON \(KeyError: 'choices'\); tried for 0.3 s",
    ):
        engine.generate([[1]], SAMPLING, [0])


def test_permanent_errors_are_not_retried(servers: list[FakeServer], tmp_path: Path) -> None:
    engine = attach(servers[:1], tmp_path, patience=60)
    servers[0].faults = [failing(401)]
    with pytest.raises(EngineError, match=r"answered 401.*\(set VLLM_API_KEY to the server's key\)"):
        engine.generate([[1]], SAMPLING, [0])
    servers[0].faults = [failing(400)]
    with pytest.raises(EngineError, match="answered 400"):
        engine.generate([[1]], SAMPLING, [0])


def test_tied_weights_are_written_under_each_name_and_none_is_left_out(
    servers: list[FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor is gone when the next one comes, so that several get the same place in memory."""
    for tied in (True, False):
        model = tiny_llama(1, tied=tied)
        engine = attach(servers, tmp_path)
        monkeypatch.setattr(engine, "_send_to_all", lambda: None)
        engine.update_weights(plain_weights(model, torch.bfloat16), 1)
        written = load_file(tmp_path / "weights-1" / "model.safetensors")
        assert written.keys() == model.state_dict().keys()
        assert all(torch.equal(written[name], value.bfloat16()) for name, value in model.state_dict().items())
        engine.close()
