"""Benchmark of a whole update: sampling, teacher, training, and new weights for the engine.

    python eval/speed/step.py --student runs/quickstart/student --teacher runs/quickstart/teacher [--json]

Ours is compared with TRL's `DistillationTrainer`. Both have the same pair of models, prompts, tokens, loss (on-policy
reverse KL, no long-term term) and optimiser. Each contender is a process of its own that makes one update on request,
so that they take turns and their memory is separate.

`floor` is what the parts of an update take without anything between them: plain vLLM sampling, the forward pass of the
teacher, the forward and backward pass of the student, and the four matmuls of the head. They run in the order of an
update, micro-batch by micro-batch, with the head between the student's forward and backward pass, so that caches are as
cold as in ours. vLLM gets new weights before each round, which is not counted: they empty its prefix cache, as they do
in ours. The student is transformers' own, not compiled. So the floor is what can be reached without another student or
another engine, and not a limit of the hardware.

`of_peak` compares with that limit: operations by formula (`minillm.models.flops`; of an update without padding, and
without anything that is computed twice) / (seconds × peak). The peak is the highest speed of matmuls at the shapes of
the student and of the teacher, in the dtype of the run. Every process measures it before each of its turns, while the
others wait for theirs, and it is not part of the turn; the highest of all these measurements is the peak of all
contenders. Phases of `ours`: rollout is sampling, update is the student with both heads. TRL is given as a whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from typing import Any

import torch
from contenders import Worker, Workload, print_report
from measure import median, seconds

from minillm.data.batches import pad
from minillm.data.templates import chat_ids
from minillm.models.device import device, float32_from_bfloat16_products, machine, working_dtype
from minillm.models.flops import UpdateFlops, update_flops
from minillm.models.head import head_of, hidden_states
from minillm.models.load import load_model, load_tokenizer
from minillm.models.shape import shape_of
from minillm.models.weights import plain_weights

CHUNK = 512  # tokens that the head is multiplied with at once, as in ours


def operations(work: Workload) -> UpdateFlops:
    """Count the operations of an update."""
    tokenizer = load_tokenizer(work.student)
    prompts = [len(chat_ids(message, tokenizer)) for message in work.messages()]
    student, teacher = (shape_of(name).dimensions for name in (work.student, work.teacher))
    width = min(student.vocab, teacher.vocab)
    return update_flops(student, teacher, prompts, [work.tokens] * len(prompts), width=width)


def floor(work: Workload) -> None:
    parts = FloorParts(work)
    while sys.stdin.readline():
        speed = work.peak()
        parts.refresh()
        taken = parts.run()
        print_report({"seconds": sum(taken.values()), "phases": taken, "moved": True, "peak_flops": speed})
    print_report({})
    parts.engine.close()


class FloorParts:
    """The parts of an update, with nothing between them."""

    def __init__(self, work: Workload) -> None:
        from minillm.data.sampling import Sampling
        from minillm.rollout.engines.base import EngineSizing
        from minillm.rollout.engines.vllm import VLLMEngine
        from minillm.teacher.local import LocalTeacher

        tokenizer = load_tokenizer(work.student)
        self.dtype, self.device = working_dtype(), device()
        self.prompts = [chat_ids(m, tokenizer) for m in work.messages()]
        g = torch.Generator().manual_seed(0)
        self.responses = torch.randint(3, 1000, (len(self.prompts), work.tokens), generator=g).tolist()
        student: Any = load_model(work.student, torch.float32)
        teacher: Any = load_model(work.teacher, self.dtype)
        self.student, self.teacher = student.to(self.device), LocalTeacher(teacher.to(self.device))
        sizing = EngineSizing(192 + work.tokens, self.dtype, work.sequences)
        self.engine = VLLMEngine(work.student, sizing)
        self.sampling = Sampling(work.tokens, (), len(tokenizer))
        self.micro_batch = min(work.sequences, work.micro_batch)
        heads = (head_of(self.student), self.teacher.head)
        # On a CPU ours multiplies float32 numbers, rounded to bfloat16 on the way where that is fast.
        self.head_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self.weights = [head.weight.detach().to(self.head_dtype) for head in heads]

    def refresh(self) -> None:
        """Send weights to the engine, which empties its prefix cache, and drop the gradients, as before an update."""
        self.engine.update_weights(plain_weights(self.student, self.dtype), 0)
        self.student.zero_grad()

    def run(self) -> dict[str, float]:
        """Run all parts once, and return the seconds of each."""
        numbers = list(range(len(self.prompts)))
        taken = {"sampling": seconds(lambda: self.engine.generate(self.prompts, self.sampling, numbers))}
        self.engine.sleep()
        taken |= {
            "teacher": seconds(lambda: self.teacher.hidden(self.prompts, self.responses)),
            "student": 0.0,
            "head": 0.0,
        }
        for start in range(0, len(numbers), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            self._train(self.prompts[part], self.responses[part], taken)
        return taken

    def _train(self, prompts: list[list[int]], responses: list[list[int]], taken: dict[str, float]) -> None:
        """Forward, head and backward of a micro-batch; adds their seconds to `taken`."""
        hidden: list[Any] = []

        def forward() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                hidden.append(hidden_states(self.student, pad(prompts, responses, self.device)))

        taken["student"] += seconds(forward)
        # The numbers do not matter to the speed: any states and gradients have the sizes.
        tokens = sum(map(len, responses))
        states = [torch.randn(tokens, w.shape[1], device=self.device).to(self.head_dtype) for w in self.weights]
        with float32_from_bfloat16_products(self.dtype == torch.bfloat16 and self.device.type == "cpu"):
            taken["head"] += seconds(lambda: self._multiply_heads(states))
        taken["student"] += seconds(lambda: hidden[0].float().square().mean().backward())

    def _multiply_heads(self, states: list[torch.Tensor]) -> None:
        student, teacher = self.weights
        for own, others in zip(states[0].split(CHUNK), states[1].split(CHUNK), strict=True):
            logits = own @ student.t()
            torch.mm(others, teacher.t())
            torch.mm(logits, student)
            torch.mm(logits.t(), own)


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


def measure(options: argparse.Namespace, sequences: int) -> dict[str, Any]:
    """Measure every contender at one batch size.

    Returns:
        Medians of the seconds of an update and of its phases, shares of the peak, and the peak memory in bytes, by
        contender; and the operations of an update.
    """
    names = ("student", "teacher", "prompts", "tokens", "micro_batch")
    work = Workload(sequences=sequences, **{name: getattr(options, name) for name in names})
    workers = [Worker("ours", work), Worker("trl", work), Worker("floor", work, __file__)]
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
    counted = operations(work)
    highest = max(report["peak_flops"] for some in reports.values() for report in some)
    return {
        "seconds": taken,
        "phases": phases,
        "peak_bytes": {name: end["peak_bytes"] for name, end in ends.items()},
        "flops": {**asdict(counted), "whole": counted.total},
        "peak_flops": highest,
        "of_peak": {name: shares(counted, value, phases.get(name, {}), highest) for name, value in taken.items()},
    }


def shares(counted: UpdateFlops, whole: float, phases: dict[str, float], peak_flops: float) -> dict[str, float]:
    """Compute the share of the peak that an update and its phases reach.

    Args:
        counted: The operations of the update.
        whole: The seconds of the update.
        phases: The seconds of its phases, by the names of ours or of the floor.
        peak_flops: Operations per second.
    """
    of_phases = {
        "rollout_seconds": ("sampling", counted.sampling),
        "teacher_seconds": ("teacher", counted.teacher),
        "update_seconds": ("update", counted.student + counted.head),
        **{name: (name, value) for name, value in asdict(counted).items()},
    }
    found = {"whole": counted.total / (whole * peak_flops)}
    for name, taken in phases.items():
        if name in of_phases and taken:
            label, flops = of_phases[name]
            found[label] = flops / (taken * peak_flops)
    return found


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
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        logging.disable(logging.WARNING)
        floor(Workload.read(options.worker[1]))
        return
    difference = same_loss()
    assert difference < 1e-4, difference
    found = {n: measure(options, n) for n in options.sequences}
    result: dict[str, Any] = {f"vs_trl_{n}": f["seconds"]["trl"] / f["seconds"]["ours"] for n, f in found.items()}
    first = found[options.sequences[0]]
    result |= {
        "vs_floor": max(f["seconds"]["ours"] / f["seconds"]["floor"] for f in found.values()),
        "memory_vs_trl": first["peak_bytes"]["ours"] / first["peak_bytes"]["trl"],
        **{
            key: {str(n): f[key] for n, f in found.items()}
            for key in ("phases", "seconds", "peak_bytes", "of_peak", "flops", "peak_flops")
        },
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
        print(f"  of the peak of {f['peak_flops']:.2e} operations a second:")
        for name, shared in f["of_peak"].items():
            print(f"    {name}: " + ", ".join(f"{phase} {value:.0%}" for phase, value in shared.items()))
    print({key: round(value, 3) for key, value in result.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
