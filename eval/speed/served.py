"""Benchmark of a served teacher: states and log-probabilities over loopback, beside the teacher in this process.

    python eval/speed/served.py --student runs/quickstart/student --teacher runs/quickstart/teacher [--json]

The student samples one batch of responses. Every contender scores that batch: the teacher in this process, stock vLLM
as a server of states (exact), and stock vLLM as a server of log-probabilities (an estimate). A server and the teacher
in this process take turns, and the servers run one after the other. Reported are the seconds of a batch, the bytes that
were received and sent per response token, and how far KL(q‖p) and its gradient by the student's weights are from those
with the teacher in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from measure import alternate, median

from minillm.data.batches import pad
from minillm.data.examples import read_examples
from minillm.data.rollouts import Rollout, concatenate_rows
from minillm.data.sampling import Sampling
from minillm.data.templates import chat_ids
from minillm.loss.in_forward import Scoring, bind_scoring, score
from minillm.loss.token_scores import ScoreGradients, ScoringSettings, TokenScores
from minillm.models.device import machine, working_dtype
from minillm.models.head import TeacherStates
from minillm.models.load import load_model, load_tokenizer
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.teacher.base import Teacher
from minillm.teacher.local import LocalTeacher
from minillm.teacher.served import ServedTeacher

STATES = ["--runner", "pooling", "--pooler-config", '{"task": "token_embed"}']
DTYPE = str(working_dtype()).removeprefix("torch.")


@contextlib.contextmanager
def serving(folder: str, length: int, *flags: str) -> Iterator[str]:
    """Run a vLLM server of a model on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", str(length), "--dtype", DTYPE, *flags]
    if not torch.cuda.is_available():
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it started would outlive it
            process.wait(30)


class Traffic:
    """Counts the bytes of the requests and answers of a served teacher, without headers."""

    def __init__(self, teacher: Any) -> None:
        self.sent = self.received = 0
        client, self._request = teacher._servers._client, teacher._servers._client.request

        def request(*args: Any, **kwargs: Any) -> Any:
            answer = self._request(*args, **kwargs)
            self.sent += len(answer.request.content)
            self.received += len(answer.content)
            return answer

        client.request = request


def mean_kl(scores: TokenScores, share: float) -> tuple[torch.Tensor, ScoreGradients]:
    """KL(q‖p) with the same weight for every token, and its derivatives."""
    return scores.reverse_kl.sum() * share, ScoreGradients(reverse_kl=torch.full_like(scores.reverse_kl, share))


class Benchmark:
    """One batch of sampled responses, and what scores it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tokenizer = load_tokenizer(options.student)
        examples = read_examples(options.prompts, limit=options.sequences)
        prompts = [chat_ids([{"role": "user", "content": example.text}], tokenizer) for example in examples]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        student: Any = load_model(options.student, working_dtype())
        self.student = bind_scoring(student.to(device))
        teacher: Any = load_model(options.teacher, working_dtype())
        self.local = LocalTeacher(teacher.to(device))
        self.sampling = Sampling(options.tokens, (), len(tokenizer), top_logprobs=20)
        self.rollouts = TransformersEngine(self.student).generate(prompts, self.sampling, list(range(len(prompts))))
        self.tokens = sum(len(rollout.response_ids) for rollout in self.rollouts)
        self.length = max(map(len, prompts)) + options.tokens + 1

    def score(self, teacher: Teacher) -> list[Rollout]:
        """The rollouts as a teacher scores them."""
        targets = teacher.score(self.rollouts, self.sampling)
        return [replace(rollout, teacher=found) for rollout, found in zip(self.rollouts, targets, strict=True)]

    def divergence(self, teacher: Any) -> tuple[float, torch.Tensor]:
        """KL(q‖p) in nats per token, and its gradient by all the student's weights as one vector."""
        scored, total = self.score(teacher), 0.0
        self.student.zero_grad()
        share = 1 / self.tokens
        for start in range(0, len(scored), self.options.micro_batch):
            group = scored[start : start + self.options.micro_batch]
            batch = pad([r.prompt_ids for r in group], [r.response_ids for r in group], self.student.device)
            targets = [rollout.teacher for rollout in group if rollout.teacher is not None]
            rows = [target.rows for target in targets if target.rows is not None]
            hidden = [target.hidden for target in targets if target.hidden is not None]
            known: Any = concatenate_rows(rows) if rows else TeacherStates(torch.cat(hidden), teacher.head)
            settings = ScoringSettings(width=self.sampling.vocab_size)
            loss, _ = score(self.student, Scoring(batch, settings, known, lambda _, scores: mean_kl(scores, share)))
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat(
            [p.grad.float().flatten().cpu() for p in self.student.parameters() if p.grad is not None]
        )

    def measure(self, flags: list[str], exact: tuple[float, torch.Tensor]) -> dict[str, float]:
        """Measure a server that is started with `flags`, against the teacher in this process."""
        with serving(self.options.teacher, self.length, *flags) as url:
            served = ServedTeacher([url], self.options.teacher, top_k=self.options.top_k)
            teacher = served.attach(self.length - 1, working_dtype(), self.student.device)
            value, gradient = self.divergence(teacher)
            traffic = Traffic(teacher)
            teacher.score(self.rollouts, self.sampling)
            received, sent = traffic.received, traffic.sent
            times = alternate(
                {
                    "served": lambda: teacher.score(self.rollouts, self.sampling),
                    "local": lambda: self.local.score(self.rollouts, self.sampling),
                },
                self.options.repeats,
            )
            teacher.close()
        found = {
            "seconds": median(times["served"]),
            "local_seconds": median(times["local"]),
            "received_bytes_per_token": received / self.tokens,
            "sent_bytes_per_token": sent / self.tokens,
            "kl": value,
            "kl_share": value / exact[0],
            "gradient_error": float((gradient - exact[1]).norm() / exact[1].norm()),
        }
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--prompts", default="recipes/quickstart/train.jsonl")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    benchmark = Benchmark(options)
    exact = benchmark.divergence(benchmark.local)
    found: dict[str, Any] = {
        "machine": machine(),
        "dtype": DTYPE,
        "responses": options.sequences,
        "response_tokens": benchmark.tokens,
        "prompt_tokens": sum(len(rollout.prompt_ids) for rollout in benchmark.rollouts),
        "hidden_size": benchmark.local.head.weight.shape[1],
        "kl": exact[0],
        "states": benchmark.measure(STATES, exact),
        "log_probabilities": benchmark.measure([], exact),
    }
    if options.json:
        print(json.dumps(found))
        return
    print("\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
