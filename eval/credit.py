"""What the long-term term of each preset estimates, and what it does in worlds in which everything is known.

    python -m eval.credit                     # all three tables; on two free cores about half an hour
    python -m eval.credit --worlds 2 --updates 100 --out /tmp/credit.json

What is finished is kept in the output file, and is not computed again; remove the file to begin anew. Run it at the
root of the repository, because it takes the enumerated worlds from the tests. The three tables:

1. Worlds of at most three tokens, by enumeration of all responses: the bias of each preset against three objectives,
   the variance, how far the field of updates is from being a gradient, and what it does to the length.
2. Worlds of up to 160 tokens, by Monte Carlo at the warmed-up student: the size of the long-term term, its signal in a
   batch, and its direction, compared with exact gradients.
3. The same worlds after training.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor

from eval.long_worlds import LongWorld, batch_gradients, train
from minillm.loss.config import Objective
from tests.loss.worlds import World

METHODS: dict[str, dict[str, Any]] = {
    "single step": {"long_term": 0.0},
    "paper": {"preset": "paper"},
    "recommended": {"preset": "recommended"},
    "sum": {"preset": "exact"},
    "rate": {"preset": "rate"},
    "rate, γ 0.9": {"preset": "rate", "discount": 0.9},
    "words": {"preset": "words"},
    "words, γ 0.9": {"preset": "words", "discount": 0.9},
    "fixed advantage": {"preset": "fixed_advantage"},
}
"""Methods of all three tables."""
VARIANTS: dict[str, dict[str, Any]] = {
    "rate per prompt, γ 0.9": {"preset": "rate", "discount": 0.9, "credit_offset": "rate_per_prompt"},
    "words, γ 0.9, position": {"preset": "words", "discount": 0.9, "baseline": "position"},
    "words, γ 0.9, prompt and position": {"preset": "words", "discount": 0.9, "baseline": "prompt_position"},
    "words, value, λ 0.9": {"preset": "words", "baseline": "value", "trace": 0.9},
}
"""Ways to lower the variance, in the long worlds only."""
SMALL_WORLDS = 3
BATCHES, RESPONSES = 110, 64
_STEP = 1e-5  # of finite differences


def flat(gradients: list[Tensor]) -> Tensor:
    """Several gradients as one vector."""
    return torch.cat([grad.flatten() for grad in gradients])


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of two vectors; NaN where one is 0."""
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else float("nan")


def known(world: World, objective: Objective) -> dict[str, float]:
    """The price of tokens and the baseline that a large batch would have."""
    if not objective.long_term:
        return {}
    found = {} if objective.credit_offset == "none" else {"offset": world.kappa()}
    return found | ({"baseline": world.mean_return(objective, 0.0)} if objective.baseline == "centre" else {})


def expected_length(world: World) -> Tensor:
    """E[T], with its autograd graph."""
    logq = world.logq()
    indices = [(torch.tensor(world.rows(y)), torch.tensor(y)) for y in world.responses()]
    return torch.stack([logq[index].sum().exp() * len(index[1]) for index in indices]).sum()


def field(world: World, objective: Objective) -> Tensor:
    """The expected estimate. For KL per token it is divided by E[T], as the loss divides by the number of tokens."""
    got = flat(world.expectation(objective, 0.0, **known(world, objective)))
    return got if objective.credit_offset == "none" else got / float(expected_length(world).detach())


def asymmetry(world: World, objective: Objective) -> float:
    """‖J − Jᵀ‖ / ‖J + Jᵀ‖ of the field's Jacobian J; 0 where the field is the gradient of something."""
    rows = []
    for tensor in (world.states, world.head):
        values = tensor.detach().view(-1)
        for i in range(len(values)):
            ends = []
            for sign in (1, -1):
                values[i] += sign * _STEP
                ends.append(field(world, objective))
                values[i] -= sign * _STEP
            rows.append((ends[0] - ends[1]) / (2 * _STEP))
    jacobian = torch.stack(rows)
    return float((jacobian - jacobian.t()).norm() / (jacobian + jacobian.t()).norm())


def enumerated(fields: dict[str, Any], seed: int) -> dict[str, float]:
    """A method in a small world, by enumeration of all responses."""
    world, objective = World.random(seed), Objective.model_validate(fields)
    settings = known(world, objective)
    estimates = [(p, flat(g)) for p, g in (world.one(y, objective, 0.0, **settings) for y in world.responses())]
    got = torch.stack([p * g for p, g in estimates]).sum(0)
    variance = sum(p * float((g - got).square().sum()) for p, g in estimates)
    goals = {"sum": world.exact(), "rate": world.rate("tokens"), "words": world.rate("words")}
    biases = {f"bias_{name}": float((got - flat(goal)).norm() / flat(goal).norm()) for name, goal in goals.items()}
    long = torch.zeros_like(got)
    if objective.long_term:
        alone = objective.model_copy(update={"single_step": 0.0})
        long = flat(world.expectation(alone, 0.0, **settings))
    longer = flat(list(torch.autograd.grad(expected_length(world), [world.states, world.head])))
    size = float(got.square().sum())
    return biases | {
        "variance": variance / size if size > 1e-20 else float("nan"),
        "asymmetry": asymmetry(world, objective) if size > 1e-20 else float("nan"),
        "length": cosine(-long, longer),
    }


def sampled(fields: dict[str, Any], seed: int) -> dict[str, float]:
    """A method's long-term term in a long world at the warmed-up student, by Monte Carlo."""
    world, objective = LongWorld(seed), Objective.model_validate(fields)
    if not objective.long_term:
        return {}
    alone = objective.model_copy(update={"single_step": 0.0})
    grads = batch_gradients(world, alone, BATCHES, RESPONSES, seed)
    grads = grads[10:]  # a value has settled by then
    total, squares, n = grads.sum(0), float(grads.square().sum()), len(grads)
    signal = float((total.square().sum() - squares) / (n * (n - 1)))
    single = world.exact("single_step").detach()
    kind = "sum" if objective.credit_offset == "none" else "words" if objective.credit_for == "words" else "rate"
    goal = world.exact(kind).detach() - single
    per_token = single / float(world.expected().length.mean())
    return {
        "share": signal / float(per_token.square().sum()),
        "signal": signal / (squares / n),
        "cosine": cosine(total, goal),
        "length": cosine(-total, world.exact("length").detach()),
    }


def trained(fields: dict[str, Any], seed: int, updates: int) -> dict[str, float]:
    """The student of a long world after training with a method."""
    world = LongWorld(seed)
    train(world, Objective.model_validate(fields), updates, RESPONSES, seed)
    return world.measures()


def before(seed: int) -> dict[str, float]:
    """The student of a long world before it is trained."""
    return LongWorld(seed).measures()


def tasks(worlds: int, updates: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Everything that is computed, by its key in the output file."""
    out: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for name, fields in METHODS.items():
        out |= {f"enumerated|{name}|{seed}": (enumerated, (fields, seed)) for seed in range(SMALL_WORLDS)}
    for name, fields in (METHODS | VARIANTS).items():
        if fields.get("long_term", 1.0):
            out |= {f"sampled|{name}|{seed}": (sampled, (fields, seed)) for seed in range(min(worlds, 3))}
    out |= {f"trained {updates}|start|{seed}": (before, (seed,)) for seed in range(worlds)}
    for name, fields in (METHODS | VARIANTS).items():
        out |= {f"trained {updates}|{name}|{seed}": (trained, (fields, seed, updates)) for seed in range(worlds)}
    return out


def run_one(task: tuple[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> tuple[str, Any]:
    """Compute one task in a process with one thread."""
    torch.set_num_threads(1)
    key, (function, arguments) = task
    return key, function(*arguments)


def table(found: dict[str, Any], kind: str, columns: dict[str, str], reduce: Callable[[list[float]], str]) -> str:
    """A table in Markdown: a row for each method, a column for each measure."""
    names = list(dict.fromkeys(key.split("|")[1] for key in found if key.startswith(f"{kind}|")))
    lines = [f"| method | {' | '.join(columns.values())} |", f"|---{'|---' * len(columns)}|"]
    for name in names:
        rows = [value for key, value in found.items() if key.rsplit("|", 1)[0] == f"{kind}|{name}"]
        cells = [reduce([row[column] for row in rows if column in row]) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def middle(values: list[float]) -> str:
    """The median over worlds."""
    kept = [value for value in values if value == value]
    return f"{median(kept):.2g}" if kept else "–"


def spread(values: list[float]) -> str:
    """The mean over worlds and its standard error."""
    kept = [value for value in values if value == value]
    if not kept:
        return "–"
    error = stdev(kept) / len(kept) ** 0.5 if len(kept) > 1 else 0.0
    return f"{mean(kept):.3f} ± {error:.3f}"


def tables(found: dict[str, Any], updates: int) -> str:
    """All three tables."""
    small = {
        "bias_sum": "bias: sum",
        "bias_rate": "bias: rate",
        "bias_words": "bias: words",
        "variance": "variance",
        "asymmetry": "asymmetry",
        "length": "cosine to longer",
    }
    long = {
        "share": "long / single, squared norm",
        "signal": f"signal in {RESPONSES} answers",
        "cosine": "cosine to its objective's",
        "length": "cosine to longer",
    }
    after = {
        "rate": "KL a token, ratio of sums",
        "rate_mean": "mean over prompts",
        "answer": "KL an answer",
        "forward": "forward KL on the teacher's text",
        "length": "length / teacher's",
        "log_length": "|log of it|, mean over prompts",
        "finished": "finished",
    }
    parts = [
        table(found, "enumerated", small, middle),
        table(found, "sampled", long, middle),
        table(found, f"trained {updates}", after, spread),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Compute what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=10, help="number of long worlds")
    parser.add_argument("--updates", type=int, default=400, help="updates of 64 responses in a long world")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("eval/results/credit.json"))
    args = parser.parse_args()
    wanted = tasks(args.worlds, args.updates)
    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    missing = [(key, task) for key, task in wanted.items() if key not in found]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for number, (key, value) in enumerate(pool.imap_unordered(run_one, missing), start=1):
            found[key] = value
            args.out.write_text(json.dumps(dict(sorted(found.items())), indent=0), encoding="utf-8")
            print(f"{number} of {len(missing)}: {key}", flush=True)
    print(tables({key: found[key] for key in wanted}, args.updates))


if __name__ == "__main__":
    main()
