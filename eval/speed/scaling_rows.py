"""The axis `rows` of `scaling.py`: what data of so many rows costs before the first update, and in each batch after it.

    python eval/speed/scaling_rows.py TOKENIZER FILE [BATCH]

It goes the way of the minillm stage and its trainer: rows are read, rendered and tokenised, the trainer takes over the
prompts, and each batch asks for its rows in the shuffled order. No model is loaded.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import median, resident

from minillm.data.examples import read_examples
from minillm.data.templates import render_all
from minillm.models.load import load_tokenizer
from minillm.rollout.config import RolloutConfig
from minillm.rollout.replay import ReplayedAndGiven
from minillm.rollout.source import RolloutSource
from minillm.rollout.worker import Worker
from minillm.train.datasets import tokenize_prompts

_LONGEST, _BATCHES = 256, 20


def write_rows(file: Path, source: str, count: int) -> None:
    """Write a file of `count` different rows, made from those of `source`. It is replaced as a whole."""
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    part = file.with_name(file.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = rows[number % len(rows)]
            out.write(json.dumps(row | {"instruction": f"{number}. {row['instruction']}"}, ensure_ascii=False) + "\n")
    part.replace(file)


def measure_rows(source: str, file: str, batch: int) -> dict[str, Any]:
    """Measure the way from a file to the rows of the batches.

    Args:
        source: Folder of the tokenizer.
        file: JSONL file.
        batch: Responses of a batch.

    Returns:
        `seconds` until the first batch and the `phases` of that, `batch_seconds` of each later one, and memory in
        bytes: of the process at its peak, and how much of it is above what the process had before (`own_bytes`).
    """
    tokenizer: Any = load_tokenizer(source)
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True)  # what is made at first use
    before, phases = resident("VmRSS"), {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        phases[name] = time.perf_counter() - start

    with phase("read"):
        examples = read_examples(file)
    with phase("tokenise"):
        prompts, _ = render_all(examples, "chat", tokenizer, _LONGEST)
    with phase("hand over"):
        ids = tokenize_prompts([{"prompt_ids": prompt.ids} for prompt in prompts], tokenizer, _LONGEST)
        config, worker = RolloutConfig(num_rollouts=batch, max_prompt_tokens=_LONGEST), Worker()
        others = ReplayedAndGiven(config, [], (), worker)
        rows = RolloutSource(config, ids, others, score_given=lambda given: [], worker=worker)
    with phase("first batch"):
        rows.prompt_rows(0)
    taken = []
    for number in range(1, 1 + _BATCHES):
        start = time.perf_counter()
        rows.prompt_rows(number)
        taken.append(time.perf_counter() - start)
    rows.close()
    peak = resident("VmHWM")
    return {
        "seconds": sum(phases.values()),
        "phases": phases,
        "batch_seconds": median(taken),
        "peak_bytes": peak,
        "own_bytes": max(peak - before, 0),
        "rows": len(ids),
    }


if __name__ == "__main__":
    print(json.dumps(measure_rows(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 8)))
