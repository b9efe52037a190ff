"""What the long-term term of each preset estimates, and what it does in worlds in which everything is known.

    python -m eval.credit                     # all three tables; an hour or two on one core
    python -m eval.credit --worlds 2 --updates 100 --out /tmp/credit.json
    python -m eval.credit --show              # the tables of what is finished

What is finished is kept in the output file, and is not computed again; remove the file to begin anew. Run it at the
root of the repository, because it takes the enumerated worlds from the tests. The three tables:

1. Worlds of at most three tokens, by enumeration of all responses: the bias of each preset against three objectives, at
   three shares of the teacher, the variance, how far the field of updates is from being a gradient, and what the
   long-term term does to the length.
2. Worlds of up to 160 tokens, by Monte Carlo at the warmed-up student: the size of the long-term term, its signal in a
   batch, and its direction, compared with exact gradients.
3. Worlds of up to 64 and of up to 160 tokens after training, for all worlds that every method has finished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable
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
    "reference, not whitened": {"preset": "reference", "baseline": "none"},
    "recommended": {"preset": "recommended"},
    "exact": {"preset": "exact"},
    "rate": {"preset": "rate"},
    "rate, γ 0.9": {"preset": "rate", "discount": 0.9},
    "words": {"preset": "words"},
    "words, γ 0.9": {"preset": "words", "discount": 0.9},
    "fixed advantage": {"preset": "fixed_advantage"},
}
"""Methods of all three tables. Whitening is left out of `reference`, because a single response has none."""
VARIANTS: dict[str, dict[str, Any]] = {
    "rate per prompt, γ 0.9": {"preset": "rate", "discount": 0.9, "credit_offset": "rate_per_prompt"},
    "words, γ 0.9, position": {"preset": "words", "discount": 0.9, "baseline": "position"},
    "words, γ 0.9, prompt and position": {"preset": "words", "discount": 0.9, "baseline": "prompt_position"},
    "words, value, λ 0.9": {"preset": "words", "baseline": "value", "trace": 0.9},
}
"""Ways to lower the variance, in the long worlds only."""
ALPHAS = (0.0, 0.2, 0.5)
LIMITS = {64: 20.0, 160: 40.0}  # the longest response of a long world, and the teacher's mean length
SMALL_WORLDS, ASYMMETRY_WORLDS = 20, 3
BATCHES, RESPONSES = 110, 64
_STEP = 1e-5  # of finite differences
# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom; the last one serves for more, too.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def flat(gradients: list[Tensor]) -> Tensor:
    """Several gradients as one vector."""
    return torch.cat([grad.flatten() for grad in gradients])


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of two vectors; NaN where one is 0."""
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else float("nan")


def price(world: World, alpha: float) -> float:
    """κ of a large batch: KL per token of responses that a mixture with this share of the teacher samples."""
    logq, logp = world.logq().detach(), world.logp()
    kl, mixed = (logq.exp() * (logq - logp)).sum(-1), ((1 - alpha) * logq.exp() + alpha * logp.exp()).log()
    total = length = 0.0
    for y in world.responses():
        rows, ids = torch.tensor(world.rows(y)), torch.tensor(y)
        probability = float(mixed[rows, ids].sum().exp())
        total, length = total + probability * float(kl[rows].sum()), length + probability * len(y)
    return total / length


def known(world: World, objective: Objective, alpha: float = 0.0) -> dict[str, float]:
    """The price of tokens and the baseline that a large batch would have."""
    if not objective.long_term:
        return {}
    found = {} if objective.credit_offset == "none" else {"offset": price(world, alpha)}
    return found | ({"baseline": world.mean_return(objective, alpha)} if objective.baseline == "centre" else {})


def expected_length(world: World) -> Tensor:
    """E[T], with its autograd graph."""
    logq = world.logq()
    indices = [(torch.tensor(world.rows(y)), torch.tensor(y)) for y in world.responses()]
    return torch.stack([logq[index].sum().exp() * len(index[1]) for index in indices]).sum()


def field(world: World, objective: Objective) -> Tensor:
    """The expected estimate. For KL per token it is divided by E[T], as the loss divides by the number of tokens."""
    got = flat(world.expectation(objective, 0.0, **known(world, objective)))
    return got if objective.credit_offset == "none" else got / float(expected_length(world).detach())


def asymmetry(fields: dict[str, Any], seed: int) -> dict[str, float]:
    """‖J − Jᵀ‖ / ‖J + Jᵀ‖ of the field's Jacobian J; 0 where the field is the gradient of something."""
    world, objective, rows = World.random(seed), Objective.model_validate(fields), []
    if float(field(world, objective).norm()) < 1e-10:
        return {"asymmetry": float("nan")}
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
    return {"asymmetry": float((jacobian - jacobian.t()).norm() / (jacobian + jacobian.t()).norm())}


def enumerated(fields: dict[str, Any], seed: int, alpha: float) -> dict[str, float]:
    """A method in a small world, by enumeration of all responses, with a share of the teacher in the sampling."""
    world, objective = World.random(seed), Objective.model_validate(fields)
    settings: dict[str, Any] = known(world, objective, alpha)
    estimates = [(p, flat(g)) for p, g in (world.one(y, objective, alpha, **settings) for y in world.responses())]
    got = torch.stack([p * g for p, g in estimates]).sum(0)
    variance = sum(p * float((g - got).square().sum()) for p, g in estimates)
    goals = {"sum": world.exact(), "rate": world.rate("tokens"), "words": world.rate("words")}
    found = {name: float((got - flat(goal)).norm() / flat(goal).norm()) for name, goal in goals.items()}
    single = flat(world.expectation(Objective(long_term=0.0), 0.0))
    found["variance"] = variance / float(single.square().sum())
    if objective.long_term:
        alone = objective.model_copy(update={"single_step": 0.0})
        long = flat(world.expectation(alone, alpha, **settings))
        longer = flat(list(torch.autograd.grad(expected_length(world), [world.states, world.head])))
        found["length"] = cosine(-long, longer)
    return found


def sampled(fields: dict[str, Any], seed: int) -> dict[str, float]:
    """A method's long-term term in a long world at the warmed-up student, by Monte Carlo."""
    world, objective = LongWorld(seed), Objective.model_validate(fields)
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


def trained(fields: dict[str, Any] | None, seed: int, limit: int, updates: int) -> dict[str, float]:
    """The student of a long world after training with a method; before it, without one."""
    world = LongWorld(seed, limit, LIMITS[limit])
    if fields is not None:
        train(world, Objective.model_validate(fields), updates, RESPONSES, seed)
    return world.measures()


Task = tuple[Callable[..., Any], tuple[Any, ...]]


def tasks(worlds: int, updates: int) -> dict[str, Task]:
    """Everything that is computed, by its key in the output file; a world with all methods, then the next world."""
    out: dict[str, Task] = {}
    long_term = {name: fields for name, fields in (METHODS | VARIANTS).items() if fields.get("long_term", 1.0)}
    for name, fields in METHODS.items():
        for alpha in ALPHAS:
            key = f"enumerated {alpha}|{name}"
            out |= {f"{key}|{seed}": (enumerated, (fields, seed, alpha)) for seed in range(SMALL_WORLDS)}
        out |= {f"asymmetry|{name}|{seed}": (asymmetry, (fields, seed)) for seed in range(ASYMMETRY_WORLDS)}
    for seed in range(worlds):
        for limit in LIMITS:
            rows = {"start": None} | METHODS | VARIANTS
            key = f"trained {updates}, {limit}"
            out |= {f"{key}|{name}|{seed}": (trained, (f, seed, limit, updates)) for name, f in rows.items()}
        if seed < 3:
            out |= {f"sampled|{name}|{seed}": (sampled, (fields, seed)) for name, fields in long_term.items()}
    return out


def run_one(task: tuple[str, Task]) -> tuple[str, Any]:
    """Compute one task in a process with one thread."""
    torch.set_num_threads(1)
    key, (function, arguments) = task
    return key, function(*arguments)


def by_method(found: dict[str, Any], kind: str) -> dict[str, dict[int, dict[str, float]]]:
    """What was found, by method and world."""
    out: dict[str, dict[int, dict[str, float]]] = {}
    for key, value in found.items():
        of, name, seed = key.split("|")
        if of == kind:
            out.setdefault(name, {})[int(seed)] = value
    return out


def middle(values: Iterable[float]) -> str:
    """The median over worlds."""
    kept = [value for value in values if value == value]
    return f"{median(kept):.2g}" if kept else "–"


def spread(values: list[float]) -> str:
    """The mean over worlds and its 95 % interval, by Student's t."""
    if len(values) < 2:
        return "–"
    half = _T[min(len(values) - 1, len(_T)) - 1] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} [{mean(values) - half:.3f}, {mean(values) + half:.3f}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def small_table(found: dict[str, Any]) -> str:
    """The table of enumerated worlds: medians, and for biases those of all shares of the teacher."""
    kinds = [by_method(found, f"enumerated {alpha}") for alpha in ALPHAS]
    skew = by_method(found, "asymmetry")
    rows = []
    for name in kinds[0]:
        at = [kind.get(name, {}).values() for kind in kinds]
        cells = [" / ".join(middle(w[goal] for w in worlds) for worlds in at) for goal in ("sum", "rate", "words")]
        cells.append(" / ".join(middle(w["variance"] for w in worlds) for worlds in at))
        cells.append(middle(w["asymmetry"] for w in skew.get(name, {}).values()))
        cells.append(middle(w["length"] for w in at[0] if "length" in w))
        rows.append([name, *cells])
    shares = " / ".join(f"{alpha:g}" for alpha in ALPHAS)
    header = ["method", f"bias to ∇sum, α = {shares}", "to ∇rate", "to ∇words", "variance", "asymmetry", "longer"]
    return markdown(header, rows)


def long_table(found: dict[str, Any]) -> str:
    """The table of the long-term term at the warmed-up student, medians."""
    columns = {
        "share": "long / single, squared norm",
        "signal": f"signal in {RESPONSES} answers",
        "cosine": "cosine to its objective's",
        "length": "longer",
    }
    rows = []
    for name, worlds in by_method(found, "sampled").items():
        rows.append([name, *(middle(w[column] for w in worlds.values()) for column in columns)])
    return markdown(["method", *columns.values()], rows)


def trained_table(found: dict[str, Any], updates: int, limit: int) -> str:
    """The table of trained students: means over the worlds that all methods have finished, and intervals."""
    methods = by_method(found, f"trained {updates}, {limit}")
    worlds = sorted(set.intersection(*(set(w) for w in methods.values()))) if methods else []
    columns = {
        "rate_mean": "mean over prompts",
        "answer": "KL an answer",
        "forward": "forward KL",
        "length": "length / teacher's",
        "log_length": "\\|log of it\\|, over prompts",
        "finished": "finished",
    }
    rows = []
    for name, of in methods.items():
        rates, others = ([m[w]["rate"] for w in worlds] for m in (of, methods["single step"]))
        against = spread([a - b for a, b in zip(rates, others, strict=True)]) if name != "single step" else "–"
        means = [f"{mean(of[w][column] for w in worlds):.3f}" if worlds else "–" for column in columns]
        rows.append([name, spread(rates), against, *means])
    header = ["method", "KL a token, ratio of sums", "against the single step, paired", *columns.values()]
    return f"{len(worlds)} worlds of up to {limit} tokens, {updates} updates\n\n{markdown(header, rows)}"


def tables(found: dict[str, Any], updates: int) -> str:
    """All tables."""
    after = [trained_table(found, updates, limit) for limit in LIMITS]
    return "\n\n".join([small_table(found), long_table(found), *after])


def main() -> None:
    """Compute what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=10, help="number of long worlds")
    parser.add_argument("--updates", type=int, default=400, help="updates of 64 responses in a long world")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("eval/results/credit.json"))
    parser.add_argument("--show", action="store_true", help="only print the tables of what is finished")
    args = parser.parse_args()
    wanted = tasks(args.worlds, args.updates)
    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    missing = [] if args.show else [(key, task) for key, task in wanted.items() if key not in found]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if missing:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for number, (key, value) in enumerate(pool.imap(run_one, missing), start=1):
                found[key] = value
                args.out.write_text(json.dumps(found, indent=0), encoding="utf-8")
                print(f"{number} of {len(missing)}: {key}", flush=True)
    print(tables({key: found[key] for key in wanted if key in found}, args.updates))


if __name__ == "__main__":
    main()
