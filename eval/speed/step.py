"""Benchmark of a whole update: sampling, teacher, training, and new weights for the engine.

    python eval/speed/step.py --student runs/quickstart/student --teacher runs/quickstart/teacher [--json]

Ours is compared with TRL's `DistillationTrainer`. Both have the same pair of models, prompts, tokens, loss (on-policy
reverse KL, no long-term term) and optimiser. Each contender is a process of its own that makes one update on request,
so that they take turns and their memory is separate. The lower bound (`floor`) is the sum of plain vLLM sampling, the
forward pass of the teacher, the forward and backward pass of the student, and four matmuls of the head, each measured
alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import median, seconds
from transformers import TrainerCallback

from minillm.data.batches import pad
from minillm.data.examples import read_examples
from minillm.data.templates import chat_ids
from minillm.models.device import fast_bfloat16, machine, working_dtype
from minillm.models.head import hidden_states
from minillm.models.load import load_model, load_tokenizer

LEARNING_RATE = 1e-5
PHASES = ("rollout_seconds", "teacher_seconds", "update_seconds", "sync_seconds")


def messages(options: argparse.Namespace) -> list[list[dict[str, str]]]:
    """Read as many prompts as an update has responses, so that every update trains on all of them."""
    return [[{"role": "user", "content": e.text}] for e in read_examples(options.prompts, limit=options.sequences)]


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    micro = min(options.sequences, options.micro_batch)
    return {
        "output_dir": folder,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_steps": 1000,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": options.sequences // micro,
        "bf16": fast_bfloat16(),
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
    }


class UpdateOnRequest(TrainerCallback):
    """Makes one update per line of standard input and reports what it took; training stops when the input ends."""

    def __init__(self, model: Any) -> None:
        self._model, self._log = model, {}
        self._before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:  # the log of an update, not the totals of the whole run
            self._log = logs
            self._wait(control, self._report())

    def _report(self) -> dict[str, Any]:
        taken = time.perf_counter() - self._started
        moved = all(not torch.equal(p, self._before[name]) for name, p in self._model.named_parameters())
        return {
            "seconds": taken,
            "moved": moved,
            "loss": self._log.get("loss"),
            "phases": {k: self._log.get(k) for k in PHASES},
        }

    def _wait(self, control: Any, report: dict[str, Any] | None = None) -> None:
        if report is not None:
            print_report(report)
        if not sys.stdin.readline():
            control.should_training_stop = True
        self._started = time.perf_counter()


def print_report(report: dict[str, Any]) -> None:
    """Print a report, with the peak memory of this process, for `Worker` to read."""
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else int(resident.split()[1]) * 1024
    print("REPORT " + json.dumps(report | {"peak_bytes": peak}), file=sys.__stdout__, flush=True)


def optimiser_of(trainer: Any) -> list[Any]:
    [group, *_] = trainer.optimizer.param_groups
    return [type(trainer.optimizer.optimizer).__name__, *(group[key] for key in ("lr", "betas", "eps"))]


def ours(options: argparse.Namespace) -> None:
    from transformers import TrainingArguments

    from minillm.loss.config import Objective
    from minillm.rollout.config import RolloutConfig
    from minillm.train.on_policy import MiniLLMTrainer

    rollout = RolloutConfig(
        engine="vllm",
        num_rollouts=options.sequences,
        inner_epochs=1,
        teacher_mix=0.0,
        max_new_tokens=options.tokens,
        max_prompt_tokens=192,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = MiniLLMTrainer(
            options.student,
            options.teacher,
            TrainingArguments(**settings(options, folder)),
            rollout=rollout,
            objective=Objective.recommended(long_term=0.0),
            train_dataset=[{"prompt": m} for m in messages(options)],
        )
        trainer.sampling = replace(trainer.sampling, eos_ids=())  # every response has all its tokens
        trainer.add_callback(UpdateOnRequest(trainer.model))
        trainer.train()
        lengths = {len(r.response_ids) for r in trainer.rollouts}
        print_report({"lengths": sorted(lengths), "optimiser": optimiser_of(trainer)})
        trainer.close()


def trl(options: argparse.Namespace) -> None:
    from datasets import Dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    student: Any = load_model(options.student, torch.float32)
    teacher: Any = load_model(options.teacher, working_dtype())
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            **settings(options, folder),
            max_completion_length=options.tokens,
            temperature=1.0,
            beta=1.0,
            generation_kwargs={"min_new_tokens": options.tokens},
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            processing_class=load_tokenizer(options.student),
            train_dataset=Dataset.from_list([{"prompt": m} for m in messages(options)]),
        )
        trainer.add_callback(UpdateOnRequest(student))
        lengths: set[int] = set()
        original = trainer._compute_loss

        def keep(model: Any, inputs: Any, *rest: Any) -> Any:
            lengths.update(inputs["completion_mask"].sum(1).tolist())
            return original(model, inputs, *rest)

        trainer._compute_loss = keep  # pyright: ignore[reportAttributeAccessIssue]
        trainer.train()
        print_report({"lengths": sorted(lengths), "optimiser": optimiser_of(trainer)})


def floor(options: argparse.Namespace) -> None:
    from minillm.data.sampling import Sampling
    from minillm.rollout.engines.base import EngineSizing
    from minillm.rollout.engines.vllm import VLLMEngine
    from minillm.teacher.local import LocalTeacher

    tokenizer = load_tokenizer(options.student)
    dtype = working_dtype()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = [chat_ids(m, tokenizer) for m in messages(options)]
    g = torch.Generator().manual_seed(0)
    responses = torch.randint(3, 1000, (len(prompts), options.tokens), generator=g).tolist()
    student: Any = load_model(options.student, torch.float32)
    teacher_model: Any = load_model(options.teacher, dtype)
    student, teacher_model = student.to(device), teacher_model.to(device)
    teacher, engine = (
        LocalTeacher(teacher_model),
        VLLMEngine(options.student, EngineSizing(192 + options.tokens, dtype)),
    )
    sampling = Sampling(options.tokens, (), len(tokenizer))
    micro = min(options.sequences, options.micro_batch)
    weights = [m.get_output_embeddings().weight.detach().to(dtype) for m in (student, teacher_model)]

    def train() -> None:
        for start in range(0, len(prompts), micro):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                hidden = hidden_states(
                    student, pad(prompts[start : start + micro], responses[start : start + micro], device)
                )
            hidden.float().square().mean().backward()

    def heads() -> None:
        for _ in range(len(prompts) * options.tokens // 512):
            states = [torch.randn(512, w.shape[1], device=device).to(dtype) for w in weights]
            logits = states[0] @ weights[0].t()
            torch.mm(states[1], weights[1].t())
            torch.mm(logits, weights[0])
            torch.mm(logits.t(), states[0])

    parts: dict[str, Callable[[], Any]] = {
        "sampling": lambda: engine.generate(prompts, sampling, list(range(len(prompts)))),
        "teacher": lambda: teacher.hidden(prompts, responses),
        "student": train,
        "head": heads,
    }
    while sys.stdin.readline():
        taken = {name: seconds(part) for name, part in parts.items()}
        print_report({"seconds": sum(taken.values()), "phases": taken, "moved": True})
    print_report({})
    engine.close()


def same_loss() -> float:
    """Compute the relative difference of the values and gradients of the two losses on the same hidden states."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    from minillm.loss.token_scores import ScoreGradients, token_scores
    from minillm.models.head import Head, TeacherStates

    g = torch.Generator().manual_seed(0)
    draw: Any = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    hidden, weight, teacher_hidden, teacher_weight = (
        draw(64, 16).requires_grad_(),
        draw(300, 16),
        draw(64, 16),
        draw(300, 16),
    )
    share = torch.full((64,), 1 / 64)
    mine, _ = token_scores(
        hidden, Head(weight), torch.zeros(64, dtype=torch.long), TeacherStates(teacher_hidden, Head(teacher_weight)),
        loss_fn=lambda part, s: ((share[part] * s.reverse_kl).sum(), ScoreGradients(reverse_kl=share[part])),
    )  # fmt: skip
    theirs: Any = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 1.0)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (mine, theirs[0].mean())]
    values = [float(loss.detach()) for loss in (mine, theirs[0].mean())]
    return max(abs(values[0] - values[1]) / values[0], float((grads[0] - grads[1]).norm() / grads[0].norm()))


class Worker:
    """A contender in a process of its own, which makes an update whenever it is asked to."""

    def __init__(self, name: str, options: list[str]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *options, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def update(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        out = self._read()
        self._process.wait(60)
        return out

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("REPORT "):
                return json.loads(line.removeprefix("REPORT "))
        self._log.seek(0)
        raise SystemExit(f"{self.name} ended:\n{self._log.read()[-3000:]}")


def measure(options: argparse.Namespace, sequences: int) -> dict[str, Any]:
    """Measure every contender at one batch size.

    Returns:
        Medians of the seconds of an update and of its phases, and the peak memory in bytes, by contender.
    """
    given = [
        f"--{name}={getattr(options, name.replace('-', '_'))}"
        for name in ("student", "teacher", "prompts", "tokens", "micro-batch")
    ]
    workers = [Worker(name, [*given, f"--sequences={sequences}"]) for name in ("ours", "trl", "floor")]
    reports: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for turn in range(1 - options.warm_up, options.repeats + 1):
        for worker in workers:
            report = worker.update()
            print(
                f"{sequences} responses, round {turn} of {options.repeats}, {worker.name}: {report['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            if turn > 0:
                reports[worker.name].append(report)
    ends = {worker.name: worker.end() for worker in workers}
    assert ends["ours"]["lengths"] == ends["trl"]["lengths"] == [options.tokens], ends
    assert ends["ours"]["optimiser"] == ends["trl"]["optimiser"], ends
    assert all(report["moved"] for some in reports.values() for report in some)
    taken = {name: median([report["seconds"] for report in some]) for name, some in reports.items()}
    phases = {
        name: {phase: median([report["phases"][phase] or 0.0 for report in some]) for phase in some[0]["phases"]}
        for name, some in reports.items()
        if name != "trl"
    }
    return {"seconds": taken, "phases": phases, "peak_bytes": {name: end["peak_bytes"] for name, end in ends.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/quickstart/student")
    parser.add_argument("--teacher", default="runs/quickstart/teacher")
    parser.add_argument("--prompts", default="recipes/quickstart/train.jsonl")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[16, 64], help="responses in an update; each is a comparison"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each response")
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=8,
        help="three processes are alive at once: with 16, each takes 9 GB in float32",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--warm-up", type=int, default=1, help="rounds before; with 0, the time that ours needs to compile is included"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--worker", choices=["ours", "trl", "floor"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        logging.disable(logging.WARNING)
        [options.sequences] = options.sequences
        {"ours": ours, "trl": trl, "floor": floor}[options.worker](options)
        return
    difference = same_loss()
    assert difference < 1e-4, difference
    found = {n: measure(options, n) for n in options.sequences}
    result: dict[str, Any] = {f"vs_trl_{n}": f["seconds"]["trl"] / f["seconds"]["ours"] for n, f in found.items()}
    first = found[options.sequences[0]]
    result |= {
        "vs_floor": max(f["seconds"]["ours"] / f["seconds"]["floor"] for f in found.values()),
        "memory_vs_trl": first["peak_bytes"]["ours"] / first["peak_bytes"]["trl"],
        "phases": {str(n): f["phases"] for n, f in found.items()},
        "seconds": {str(n): f["seconds"] for n, f in found.items()},
        "peak_bytes": {str(n): f["peak_bytes"] for n, f in found.items()},
        "loss_difference": difference,
        "tokens": options.tokens,
        "warm_up": options.warm_up,
        "repeats": options.repeats,
        "dtype": str(working_dtype()),
        "machine": machine(),
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"updates of {options.tokens} tokens a response, {working_dtype()}, {machine()}")
    for n, f in found.items():
        print(f"{n} responses: " + ", ".join(f"{name} {value:.1f} s" for name, value in f["seconds"].items()))
        for name, phases in f["phases"].items():
            print(f"  {name}: " + ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items()))
    print({key: round(value, 3) for key, value in result.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
