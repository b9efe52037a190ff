"""Conformance tests of every engine: the model itself, vLLM in this process, and a real vLLM server.

Each engine is started once for this file, on a tiny model whose possible responses can be enumerated. All but one hold
a teacher beside it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import TrainingArguments

from minillm.data.sampling import Sampling, StopStrings
from minillm.errors import EngineError
from minillm.loss.config import Objective
from minillm.models.load import load_model
from minillm.models.weights import plain_weights
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine, EngineSizing
from minillm.rollout.engines.local_server import LocalServer
from minillm.rollout.engines.server import VLLMServerEngine
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.engines.vllm_memory import vllm_is_installed
from minillm.teacher.local import LocalTeacher
from minillm.teacher.served import ServedTeacher
from minillm.teacher.served_logprobs import ServedLogprobs
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import save, tiny_llama
from tests.rollout.mixture import PROMPT, SAMPLING, enumerate_mixture, fits

LENGTH = 96
needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")]


def start_server(
    folder: str, log: Path, *flags: str, port: int = 0, **environment: str
) -> tuple[subprocess.Popen[bytes], str]:
    """Start a stock server on a loopback port, by default a free one; the server is not up yet."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    options = (
        f"--model {folder} --host 127.0.0.1 --port {port} --max-model-len {LENGTH} --dtype float32 --enforce-eager "
        "--block-size 32 --max-num-seqs 64 --no-enable-chunked-prefill --max-num-batched-tokens 4096 "
        f"--kv-cache-memory-bytes {1 << 28}"
    )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split(), *flags]
    settings = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=settings, stdout=out, stderr=out, start_new_session=True)
    return process, f"http://127.0.0.1:{port}"


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """Kill a server and the processes that it started, which would outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@pytest.fixture(scope="module")
def student() -> Any:
    return tiny_llama(3, layers=1, vocab=32, scale=0.4)


@pytest.fixture(scope="module")
def folder(student: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with sampling settings of its own, as instruct models have them; every engine must ignore them."""
    student.generation_config.update(do_sample=True, top_p=0.5, top_k=2, repetition_penalty=1.5)
    return save(student, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    return LocalTeacher(tiny_llama(4, layers=2, vocab=32, scale=0.4))


@pytest.fixture(
    scope="module",
    params=["transformers", *(pytest.param(name, marks=needs_vllm) for name in ("vllm", "vllm pair", "server"))],
)
def engine(
    request: pytest.FixtureRequest, folder: str, teacher: LocalTeacher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    if request.param == "transformers":
        yield TransformersEngine(tiny_llama(3, layers=1, vocab=32, scale=0.4), teacher=teacher)
    elif request.param.startswith("vllm"):
        in_process = VLLMEngine(
            folder,
            EngineSizing(LENGTH, torch.float32),
            tokenizer=folder,
            teacher=teacher if request.param == "vllm pair" else None,
            options={"max_num_seqs": 63},
        )
        assert in_process._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 63
        yield in_process
        in_process.close()
    else:
        work = tmp_path_factory.mktemp("server")
        os.environ["VLLM_API_KEY"] = "secret"
        own = LocalServer(folder, work / "log", EngineSizing(LENGTH, torch.float32), teacher.folder(work / "teacher"))
        try:
            served = VLLMServerEngine(
                [own.url], work / "weights", max_length=LENGTH, head_width=32, patience=900, mixes=True, own=own
            )
            yield served
            assert served._servers.each[0].started_at is not None  # a real server's metrics report its start
            assert served._servers.each[0].started_at > time.time() - 3600
            served.close()
            assert own.process.poll() is not None
        except EngineError as error:
            raise AssertionError(f"{error}\n{own.log_tail()}") from error
        finally:
            del os.environ["VLLM_API_KEY"]
            own.stop()


@pytest.fixture
def as_saved(engine: Engine, student: Any) -> Engine:
    engine.update_weights(plain_weights(student, torch.float32), engine.version + 1)
    return engine


def own_logprobs(model: Any, prompt: list[int], response: list[int], sampling: Sampling) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : sampling.vocab_size]
    return torch.log_softmax(logits / sampling.temperature, -1).gather(1, torch.tensor(response)[:, None])[:, 0]


def test_logprobs_are_those_that_tokens_were_sampled_with(as_saved: Engine, student: Any) -> None:
    sampling = Sampling(12, (1, 7), 20, temperature=0.8)
    prompts = [[2], [3, 5, 4, 2], [9] * 40, [1, 0, 1]]  # padding and end tokens have no special role in a prompt
    rollouts = as_saved.generate(prompts, sampling, [1, 2, 3, 4])
    for prompt, r in zip(prompts, rollouts, strict=True):
        assert r.prompt_ids == prompt
        torch.testing.assert_close(
            r.student_logprobs, own_logprobs(student, r.prompt_ids, r.response_ids, sampling), atol=1e-4, rtol=1e-4
        )
        assert max(r.response_ids) < 20  # the remaining rows of the head count as padding
        assert r.finished == (r.response_ids[-1] in (1, 7))
        assert not any(token in (1, 7) for token in r.response_ids[:-1])
        assert r.finished or len(r.response_ids) == 12
    assert [r.response_ids for r in as_saved.generate(prompts, sampling, [1, 2, 3, 4])] == [
        r.response_ids for r in rollouts
    ]
    assert [r.response_ids for r in as_saved.generate(prompts, sampling, [5, 6, 7, 8])] != [
        r.response_ids for r in rollouts
    ]


def test_an_end_token_that_was_not_requested_does_not_end_a_response(as_saved: Engine) -> None:
    """In the model's own config 1 ends a response; here only 7 does."""
    rollouts = as_saved.generate([[2]] * 30, Sampling(12, (7,), 20), list(range(30)))
    assert any(1 in r.response_ids[:-1] for r in rollouts)
    assert all(len(r.response_ids) == 12 or r.response_ids[-1] == 7 for r in rollouts)


def test_stop_strings_end_a_response(as_saved: Engine, tokenizer: Any) -> None:
    """A string of one token acts as one more end token."""
    prompts, seeds = [[2], [3, 4]] * 8, list(range(16))
    for alpha in (0.0, 0.5) if as_saved.capabilities.mixes_teacher else (0.0,):
        plain = Sampling(12, (1,), 20, teacher_mix=alpha)
        stopped, ended = (
            as_saved.generate(prompts, sampling, seeds)
            for sampling in (replace(plain, stop=StopStrings(tokenizer, ["w9"])), replace(plain, eos_ids=(1, 13)))
        )
        assert [r.response_ids for r in stopped] == [r.response_ids for r in ended]
        assert [r.finished for r in stopped] == [r.finished for r in ended]
        assert {r.response_ids[-1] for r in stopped} >= {13}
        for a, b in zip(stopped, ended, strict=True):
            torch.testing.assert_close(a.behaviour_logprobs, b.behaviour_logprobs, atol=1e-5, rtol=1e-5)
            assert b.teacher is None or torch.allclose(a.teacher.hidden, b.teacher.hidden, atol=1e-5)  # pyright: ignore
        # Take a pair of tokens that occurs in these responses: a response must end where the pair is complete.
        responses = [r.response_ids for r in as_saved.generate(prompts, plain, seeds)]
        pair = next(
            tokenizer.decode(ids[i : i + 2])
            for ids in responses
            for i in range(1, len(ids) - 1)
            if min(ids[i : i + 2]) > 3
        )
        cut = as_saved.generate(prompts, replace(plain, stop=StopStrings(tokenizer, [pair])), seeds)
        assert any(pair in tokenizer.decode(r.response_ids) for r in cut)
        for r in cut:
            assert pair not in tokenizer.decode(r.response_ids[:-1])
            assert r.finished == (pair in tokenizer.decode(r.response_ids) or r.response_ids[-1] == 1)


def test_top_logprobs_are_returned(as_saved: Engine, student: Any) -> None:
    [r] = as_saved.generate([[2, 3]], Sampling(6, (1,), 20, temperature=0.8, top_logprobs=4), [0])
    assert r.top_logprobs is not None
    assert len(r.top_logprobs) == len(r.response_ids)
    for position, table in enumerate(r.top_logprobs):
        prefix = [2, 3, *r.response_ids[:position]]
        want = torch.stack(
            [own_logprobs(student, prefix, [token], Sampling(6, (1,), 20, 0.8))[0] for token in range(20)]
        )
        assert set(want.topk(4).indices.tolist()) | {r.response_ids[position]} <= table.keys()
        for token, value in table.items():
            assert value == pytest.approx(float(want[token]), abs=1e-3)


def test_mixed_tokens_come_with_both_log_probabilities(as_saved: Engine, student: Any, teacher: LocalTeacher) -> None:
    """Before and after new weights; plain sampling between two mixed calls leaves no cache without the teacher."""
    if not as_saved.capabilities.mixes_teacher:
        with pytest.raises(EngineError, match="started without a teacher"):
            as_saved.generate([PROMPT], replace(SAMPLING, teacher_mix=0.5), [0])
        return
    sampling = Sampling(12, (1,), 20, temperature=0.8, teacher_mix=0.4)
    prompts = [[2], [3, 5, 4, 2, 2], [9] * 70] * 4
    moved = tiny_llama(8, layers=1, vocab=32, scale=0.4)
    for model in (student, moved):
        as_saved.update_weights(plain_weights(model, torch.float32), as_saved.version + 1)
        as_saved.generate(prompts, replace(sampling, teacher_mix=0.0), list(range(12)))
        rollouts = as_saved.generate(prompts, sampling, list(range(12)))
        hidden = teacher.hidden(prompts, [r.response_ids for r in rollouts])
        for r, states in zip(rollouts, hidden, strict=True):
            logq = own_logprobs(model, r.prompt_ids, r.response_ids, sampling)
            logp = teacher.token_logprobs(states, r.response_ids, sampling)
            torch.testing.assert_close(r.student_logprobs, logq, atol=1e-3, rtol=1e-3)
            mixture = (0.6 * logq.exp() + 0.4 * logp.exp()).log()
            torch.testing.assert_close(r.behaviour_logprobs, mixture, atol=1e-3, rtol=1e-3)
            assert r.weights_version == as_saved.version
            if isinstance(as_saved, VLLMServerEngine):
                assert r.teacher is None  # states do not come back over HTTP
                continue
            assert r.teacher is not None
            assert r.teacher.hidden is not None
            torch.testing.assert_close(r.teacher.hidden, states, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(r.teacher.token_logprobs, logp, atol=1e-3, rtol=1e-3)
        alone = [as_saved.generate([prompt], sampling, [i])[0] for i, prompt in enumerate(prompts)]
        assert [r.response_ids for r in alone] == [r.response_ids for r in rollouts]
    here = TransformersEngine(moved, teacher=teacher)
    assert [r.response_ids for r in here.generate(prompts, sampling, list(range(12)))] == [
        r.response_ids for r in rollouts
    ]


def test_new_weights_arrive_even_when_the_tied_embedding_alone_moves(as_saved: Engine) -> None:
    moved = tiny_llama(3, layers=1, vocab=32, scale=0.4)
    with torch.no_grad():
        moved.model.embed_tokens.weight.mul_(1.5)
    sampling, before = Sampling(8, (1,), 32), as_saved.version
    prompt = [2, 3, 4] * 25  # a prefix cache keeps full blocks of 32 tokens
    as_saved.generate([prompt], sampling, [0])
    as_saved.update_weights(plain_weights(moved, torch.float32), before + 7)
    [r] = as_saved.generate([prompt], sampling, [0])
    assert r.weights_version == before + 7
    torch.testing.assert_close(
        r.student_logprobs, own_logprobs(moved, r.prompt_ids, r.response_ids, sampling), atol=1e-4, rtol=1e-4
    )


def test_the_head_reads_contiguous_rows() -> None:
    """For rows that are not contiguous, PyTorch copies the head's weights once per row: 0.9 GB for 16 rows of SmolLM2
    in bfloat16."""
    model: Any = tiny_llama(3, layers=1, vocab=32, scale=0.4)
    together: list[bool] = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, states: together.append(states[0].is_contiguous())
    )
    engine = TransformersEngine(model)
    engine.generate([PROMPT, PROMPT, PROMPT], SAMPLING, [1, 2, 3])
    assert len(together) > 1
    assert all(together)


def test_more_prompt_tokens_than_fit_into_one_scheduler_step(as_saved: Engine) -> None:
    """A seeded request that is prefilled in chunks fails on vLLM's CPU build, so no request may be."""
    rollouts = as_saved.generate([[2] * 90] * 100, Sampling(2, (1,), 32), list(range(100)))
    assert len(rollouts) == 100


@pytest.mark.parametrize("engine", [pytest.param("server", marks=needs_vllm)], indirect=True)
def test_a_served_teacher_scores_as_a_local_one(as_saved: Engine, student: Any, tmp_path: Path, folder: str) -> None:
    """The server of this file acts as a teacher; then a student trains on its log-probabilities of sampled tokens."""
    assert isinstance(as_saved, VLLMServerEngine)
    url = as_saved._servers.each[0].url
    sampling = Sampling(12, (1,), 32, top_logprobs=5)
    other = TransformersEngine(tiny_llama(5, layers=1, vocab=32, scale=0.4))
    rollouts = other.generate([[2], [3, 4, 5], [9] * 40], sampling, [1, 2, 3])
    here = LocalTeacher(student)
    for k in (5, 0):
        teacher = ServedTeacher([url], folder, top_k=k, patience=10).attach(80)
        assert isinstance(teacher, ServedLogprobs)
        for r, targets in zip(rollouts, teacher.score(rollouts, sampling), strict=True):
            rows = targets.rows
            assert rows is not None
            want = here.distribution(here.hidden([r.prompt_ids], [r.response_ids])[0], sampling)
            torch.testing.assert_close(rows.logprobs, want.gather(1, rows.ids), atol=1e-4, rtol=1e-4)
            assert rows.ids[:, 0].tolist() == r.response_ids
            assert r.top_logprobs is not None
            for position, (ids, table) in enumerate(zip(rows.ids.tolist(), r.top_logprobs, strict=True)):
                top_logprobs = sorted(table, key=lambda token: -table[token])[:k]
                assert set(ids) == {r.response_ids[position], *top_logprobs}
        with pytest.raises(ValueError, match=r"of temperature 1, not 0\.7"):
            teacher.score(rollouts, replace(sampling, temperature=0.7))
        teacher.close()
    with pytest.raises(EngineError, match="serves 96 tokens; prompt and response need 97"):
        ServedTeacher([url], folder, patience=5).attach(96)
    # In training, the long-term term with sampled rewards is exact.
    start, weights = save(tiny_llama(6), tmp_path / "start"), []
    rollout = RolloutConfig(
        engine="transformers", num_rollouts=8, teacher_mix=0.0, max_new_tokens=10, max_prompt_tokens=8
    )
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(8)]
    objective = Objective.paper(single_step=0.0, language_model=0.1, language_model_block=16)
    for teacher in (student, ServedTeacher([url], folder, top_k=0)):
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=3,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            optim="sgd",
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        prompts = [{"prompt_ids": [2, i, 3]} for i in range(4, 20)]
        trainer = MiniLLMTrainer(
            start, teacher, arguments, objective=objective, rollout=rollout, train_dataset=prompts, text_dataset=text
        )
        trainer.train()
        trainer.close()
        weights.append(trainer.model.state_dict())  # pyright: ignore[reportOptionalMemberAccess]
    before = load_model(start, torch.float32).state_dict()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-6)
        assert "layernorm" in name or not torch.equal(before[name], value), name


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_frequencies(as_saved: Engine, student: Any, teacher: LocalTeacher, alpha: float) -> None:
    check_frequencies(as_saved, student, teacher, alpha, 2000)


@pytest.mark.full
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])
def test_frequencies_of_many(as_saved: Engine, student: Any, teacher: LocalTeacher, alpha: float) -> None:
    n = 200_000 if isinstance(as_saved, TransformersEngine) else 20_000
    check_frequencies(as_saved, student, teacher, alpha, n)


def check_frequencies(engine: Engine, student: Any, teacher: LocalTeacher, alpha: float, n: int) -> None:
    """Compare samples with the enumerated mixture: χ² within four standard deviations, and a mean importance weight of
    one."""
    if alpha and not engine.capabilities.mixes_teacher:
        pytest.skip("this engine holds no teacher")
    counts, weights = Counter(), []
    for start in range(0, n, 2000):
        seeds = list(range(start, min(start + 2000, n)))
        rollouts = engine.generate([PROMPT] * len(seeds), replace(SAMPLING, teacher_mix=alpha), seeds)
        counts.update(tuple(r.response_ids) for r in rollouts)
        weights += [float((r.student_logprobs - r.behaviour_logprobs).sum().exp()) for r in rollouts]
    assert fits(counts, enumerate_mixture(student, teacher.model, alpha), n)
    importance = torch.tensor(weights, dtype=torch.float64)
    assert abs(float(importance.mean()) - 1) <= 4 * float(importance.std()) / n**0.5 + 1e-5


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_a_server_with_unsuitable_settings_is_refused(folder: str, tmp_path: Path) -> None:
    """Tokens are not sampled from raw log-probabilities, and without dev mode a server accepts no new weights."""
    process, url = start_server(folder, tmp_path / "log", VLLM_SERVER_DEV_MODE="0")
    try:
        with pytest.raises(
            EngineError, match="log-probabilities before temperature: start it with --logprobs-mode processed_logprobs"
        ):
            VLLMServerEngine([url], tmp_path / "weights", max_length=LENGTH, head_width=32, patience=900)
        with pytest.raises(EngineError, match=f"serves {LENGTH} tokens; prompt and response need {LENGTH + 1}"):
            VLLMServerEngine([url], tmp_path / "weights", max_length=LENGTH + 1, head_width=32, patience=10)
        assert httpx.post(url + "/collective_rpc", json={}).status_code == 404
    finally:
        stop_server(process)


def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(
        EngineError, match=r"http://127.0.0.1:9: ConnectError.*tried for 2 s \(rollout.server_patience\)"
    ):
        VLLMServerEngine(["http://127.0.0.1:9/v1"], tmp_path, max_length=8, head_width=32, patience=2)
    assert time.monotonic() - start < 10
