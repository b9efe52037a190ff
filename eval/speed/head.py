"""Benchmark of the output head: reverse KL and its gradient from hidden states.

    python eval/speed/head.py [--json]
    python eval/speed/head.py --tokens 8192 --vocab 151936 --width 1536 --teacher-width 3584   # a size for GPUs

Ours is compared with full logits, with TRL's chunked kernel and, on a GPU, with Liger's kernel. All contenders have the
same inputs and take turns, and their gradients are compared. The lower bound (`floor`) is the four matmuls that no
implementation can avoid.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import alternate, in_fresh_process, median, peak_extra_bytes
from torch import Tensor

from minillm.loss.elementwise import Precision
from minillm.loss.token_scores import ScoreGradients, TokenScores, chunk_of, token_scores
from minillm.models.device import cpu_multiplies_bfloat16, float32_from_bfloat16_products, large_blocks_kept, machine
from minillm.models.head import Head, TeacherStates, project, project_back


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor

    @classmethod
    def make(cls, options: argparse.Namespace) -> Problem:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) * scale).to(getattr(torch, options.dtype))

        n, v, h, hp = options.tokens, options.vocab, options.width, options.teacher_width
        # Logits with a standard deviation of 3 give entropies and divergences as large as those of language models.
        return cls(
            hidden=draw(n, h, scale=1.0).requires_grad_(),
            weight=draw(v, h, scale=3 * h**-0.5).requires_grad_(),
            teacher_hidden=draw(n, hp, scale=1.0),
            teacher_weight=draw(v, hp, scale=3 * hp**-0.5),
            targets=torch.randint(v, (n,), generator=g, device=device),
        )

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None


def ours(p: Problem) -> None:
    weight = torch.full((len(p.targets),), 1 / len(p.targets), device=p.targets.device)

    def loss_fn(part: slice, scores: TokenScores) -> tuple[Tensor, ScoreGradients]:
        return (weight[part] * scores.reverse_kl).sum(), ScoreGradients(reverse_kl=weight[part])

    loss, _ = token_scores(
        p.hidden, Head(p.weight), p.targets, TeacherStates(p.teacher_hidden, Head(p.teacher_weight)), loss_fn=loss_fn
    )
    loss.backward()


def multiplied(tensor: Tensor) -> Tensor:
    """Convert a tensor to the dtype of the matmuls: float32 on a CPU that emulates bfloat16, otherwise unchanged.

    On a CPU that multiplies bfloat16, these matmuls round their results to bfloat16 as well, as PyTorch's own do. Ours
    keeps float32 results there (`float32_from_bfloat16_products`), which takes longer. TRL's kernel multiplies in
    float32 on every CPU. `gradient_error` tells the difference.
    """
    return tensor.float() if not tensor.is_cuda and not cpu_multiplies_bfloat16() else tensor


def full(p: Problem) -> None:
    logq = torch.log_softmax((multiplied(p.hidden) @ multiplied(p.weight).t()).float(), -1)
    with torch.no_grad():
        logp = torch.log_softmax((multiplied(p.teacher_hidden) @ multiplied(p.teacher_weight).t()).float(), -1)
    (logq.exp() * (logq - logp)).sum(-1).mean().backward()


def trl(p: Problem) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence: Any = ChunkedDivergenceFunction.apply(
        p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None, 1.0
    )
    divergence[0].mean().backward()


def liger(p: Problem) -> None:
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    LigerFusedLinearJSD(jsd_beta=1.0)(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, None).backward()


def floor(p: Problem) -> None:
    """Compute the logits of both models and the two matmuls of the gradient, in chunks and with products as in ours."""
    precision, vocabulary = Precision.of(p.hidden), p.weight.shape[0]
    weight, teacher_weight = precision.factor(p.weight), precision.factor(p.teacher_weight)
    total = torch.zeros_like(p.weight, dtype=precision.wide)
    states, teacher_states = (each.detach().to(precision.matmul) for each in (p.hidden, p.teacher_hidden))
    size = chunk_of(vocabulary, gpu=p.hidden.is_cuda)
    on_cpu = not p.hidden.is_cuda
    with float32_from_bfloat16_products(on_cpu and precision.rounded), large_blocks_kept(on_cpu):
        for own, others in zip(states.split(size), teacher_states.split(size), strict=True):
            logits = project(own, weight)
            project(others, teacher_weight)
            grad = logits.to(precision.matmul)
            project_back(grad, weight)
            if grad.dtype == total.dtype:
                total.addmm_(grad.t(), own)
            else:
                total += grad.t() @ own


def contenders() -> dict[str, Callable[[Problem], None]]:
    out = {"ours": ours, "full": full, "trl": trl, "floor": floor}
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        out["liger"] = liger
    return out


def gradient_errors(p: Problem) -> dict[str, float]:
    """Compute the relative error of each contender's gradient of the head, against full logits in float32."""
    exact = Problem(
        hidden=p.hidden.detach().float().requires_grad_(),
        weight=p.weight.detach().float().requires_grad_(),
        teacher_hidden=p.teacher_hidden.float(),
        teacher_weight=p.teacher_weight.float(),
        targets=p.targets,
    )
    full(exact)
    want = exact.weight.grad
    assert want is not None
    out = {}
    for name, run in contenders().items():
        if name != "floor":
            p.forget()
            run(p)
            assert p.weight.grad is not None
            out[name] = float((p.weight.grad.float() - want).norm() / want.norm())
    p.forget()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--teacher-width", type=int, default=576)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    problem = Problem.make(options)

    def fresh(run: Callable[[Problem], None]) -> Callable[[], None]:
        return lambda: (problem.forget(), run(problem))[1]

    if options.memory_of:
        print(peak_extra_bytes(fresh(contenders()[options.memory_of])))
        return
    errors = gradient_errors(problem)
    times = {
        name: median(taken)
        for name, taken in alternate({n: fresh(r) for n, r in contenders().items()}, options.repeats).items()
    }
    shape = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in vars(options).items()
        if key not in ("json", "memory_of", "repeats")
    ]
    memory = {name: in_fresh_process(__file__, *shape, f"--memory-of={name}") for name in times if name != "floor"}
    result = {
        "vs_trl": times["trl"] / times["ours"],
        "vs_full": times["full"] / times["ours"],
        "vs_floor": times["ours"] / times["floor"],
        "memory_vs_trl": memory["ours"] / memory["trl"],
        "memory_vs_full": memory["ours"] / memory["full"],
        "seconds": times,
        "peak_extra_bytes": memory,
        "gradient_error": errors,
        "tokens": options.tokens,
        "vocab": options.vocab,
        "widths": [options.width, options.teacher_width],
        "dtype": options.dtype,
        "machine": machine(),
        "torch": torch.__version__,
    }
    if "liger" in times:
        result |= {"vs_liger": times["liger"] / times["ours"], "memory_vs_liger": memory["ours"] / memory["liger"]}
    if options.json:
        print(json.dumps(result))
        return
    widths = f"widths {options.width} and {options.teacher_width}"
    print(f"{options.tokens} tokens × {options.vocab}, {widths}, {options.dtype}, {machine()}")
    print(f"{'':8}{'seconds':>10}{'ours is':>12}{'peak MB':>10}{'gradient error':>16}")
    for name, taken in times.items():
        peak = f"{memory[name] / 1e6:.0f}" if name in memory else ""
        error = f"{errors[name]:.4f}" if name in errors else ""
        print(f"{name:8}{taken:>10.3f}{taken / times['ours']:>11.2f}x{peak:>10}{error:>16}")


if __name__ == "__main__":
    main()
