"""Benchmark of the student's body: forward and backward pass by implementation of attention, compiled or not.

    python eval/speed/body.py --student runs/quickstart/student [--batches 8x63+96 4x63+400] [--json]

`sdpa` and `eager` are transformers' own. With `_compiled`, every decoder layer is compiled by itself, with dynamic
shapes. A batch `8x63+96` has 8 prompts of 63 tokens with responses of 96. All contenders have the same weights in
float32 and the autocast of a run, and take turns. `first_seconds` is the first pass of each, which contains its
compilation; `gradient_difference` is relative, and compares with the first contender.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import alternate, median, seconds

from minillm.data.batches import Padded, pad
from minillm.models.device import device, machine, working_dtype
from minillm.models.head import hidden_states
from minillm.models.layers import decoder_layers
from minillm.models.load import load_model

CONTENDERS = ("sdpa", "eager", "sdpa_compiled", "eager_compiled")


def batch(text: str) -> Padded:
    """Make a batch of random tokens from a text such as `8x63+96`."""
    rows, _, lengths = text.partition("x")
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (
        torch.randint(3, 1000, (int(rows), int(length)), generator=generator).tolist() for length in lengths.split("+")
    )
    return pad(prompts, responses, device())


def contender(name: str, source: str) -> Any:
    """Load the student with an implementation of attention."""
    attention, _, compiled = name.partition("_")
    model: Any = load_model(source, torch.float32)
    model.set_attn_implementation(attention)
    model.to(device()).train()
    if compiled:
        for layer in decoder_layers(model)[1]:
            layer.compile(dynamic=True)
    return model


def update(model: Any, given: Padded) -> None:
    """Run forward and backward; gradients replace those of the last pass."""
    model.zero_grad()
    dtype = working_dtype()
    with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
        states = hidden_states(model, given)
    states.float().square().mean().backward()


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/quickstart/student")
    parser.add_argument("--batches", nargs="+", default=["8x63+96", "8x63+20", "4x63+400"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    models = {name: contender(name, options.student) for name in options.only}
    batches = {text: batch(text) for text in options.batches}
    first_batch = next(iter(batches.values()))
    first = {name: seconds(partial(update, model, first_batch)) for name, model in models.items()}
    reference = gradient(next(iter(models.values())))
    differences = {
        name: float((gradient(model) - reference).norm() / reference.norm()) for name, model in models.items()
    }
    taken: dict[str, dict[str, float]] = {}
    for text, given in batches.items():
        runs: dict[str, Callable[[], Any]] = {name: partial(update, model, given) for name, model in models.items()}
        taken[text] = {name: median(values) for name, values in alternate(runs, options.repeats).items()}
        print(f"{text}: " + ", ".join(f"{n} {value:.2f} s" for n, value in taken[text].items()), file=sys.stderr)
    result = {
        "seconds": taken,
        "first_seconds": first,
        "gradient_difference": differences,
        "dtype": str(working_dtype()),
        "machine": machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
