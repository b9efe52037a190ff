"""Benchmark of sampling.

    python eval/speed/rollout.py --student runs/quickstart/student --teacher runs/quickstart/teacher [--json]

vLLM is compared with the `generate` of transformers. Teacher-mixed sampling, by vLLM and by the transformers engine, is
compared with mixing two models token by token without an engine, as LMOps does it, and with plain sampling followed by
the teacher's forward, which mixing makes unnecessary: up to the states, which is what training without mixing needs
(`plain_and_states`), and up to log p of the tokens, which mixing returns as well (`plain_and_scored`). Every number is
in seconds per sampled token, because the lengths differ from sample to sample. The contenders take turns. Memory is
measured in processes of their own: of plain vLLM with the teacher beside it, and of vLLM that mixes the teacher in.

With `--random`, student and teacher are random weights of the published sizes of two models, which need no download,
and so are the prompts; every answer then has its full length. On a GPU, one line for each pair:

    for pair in "HuggingFaceTB/SmolLM2-135M-Instruct HuggingFaceTB/SmolLM2-135M-Instruct" \\
        "openai-community/gpt2 openai-community/gpt2-medium" "openai-community/gpt2 openai-community/gpt2-xl"; do
        set -- $pair; python eval/speed/rollout.py --random --student $1 --teacher $2 --sequences 256 --json; done
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from measure import median, resident, seconds
from transformers import AutoModelForCausalLM

from minillm.data.examples import read_examples
from minillm.data.logprobs import next_token_logprobs
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.data.templates import render
from minillm.models.device import device, machine, working_dtype
from minillm.models.load import load_model, load_tokenizer
from minillm.models.shape import shape_of
from minillm.models.weights import plain_weights
from minillm.rollout.engines.base import Engine, EngineSizing
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.teacher.base import score_missing
from minillm.teacher.local import LocalTeacher


def left_pad(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device()), mask.to(device())


def generate_with_transformers(model: Any, prompts: Sequence[list[int]], sampling: Sampling) -> int:
    """Sample one batch with `generate` and return the number of sampled tokens."""
    ids, mask = left_pad(prompts)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.eos_ids) or None,
        pad_token_id=next(iter(sampling.eos_ids), 0),
    )
    return sum(_length(row, sampling) for row in out[:, ids.shape[1] :].tolist())


def mix_per_token(student: Any, teacher: Any, alpha: float, prompts: Sequence[list[int]], sampling: Sampling) -> int:
    """Sample one batch from the mixture token by token and return the number of sampled tokens.

    Both models make every step, each with its own cache. Rows that have ended leave the batch.
    """
    feed, mask = left_pad(prompts)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches: list[Any] = [None, None]
    last = torch.tensor([-1], device=feed.device)  # a slice (1) would copy the head once per row, on a CPU in bfloat16
    drawn = 0
    for _ in range(sampling.max_new_tokens):
        rows = []
        for i, model in enumerate((student, teacher)):
            out = model(
                feed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=caches[i],
                use_cache=True,
                logits_to_keep=last,
            )
            caches[i] = out.past_key_values
            rows.append(next_token_logprobs(out.logits[:, -1], sampling).exp())
        tokens = torch.multinomial((1 - alpha) * rows[0] + alpha * rows[1], 1)[:, 0]
        drawn += len(tokens)
        ends = torch.tensor(sampling.eos_ids, dtype=torch.long, device=tokens.device)
        going = ~torch.isin(tokens, ends)
        if not going.any():
            break
        if not going.all():
            for cache in caches:
                cache.batch_select_indices(going.nonzero()[:, 0])
        feed, mask, positions = tokens[going][:, None], mask[going], positions[going][:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return drawn


def _length(row: list[int], sampling: Sampling) -> int:
    return next((i + 1 for i, token in enumerate(row) if token in sampling.eos_ids), len(row))


def parse() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/quickstart/student")
    parser.add_argument("--teacher", default="runs/quickstart/teacher")
    parser.add_argument("--prompts", default="recipes/quickstart/train.jsonl")
    parser.add_argument("--system", default="Answer in one short sentence.")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", help="of these contenders alone, e.g. plain_and_scored mixed; no ratios to the others then"
    )
    parser.add_argument("--random", action="store_true", help="random weights of the published sizes of the two models")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parse().parse_args()
    logging.disable(logging.WARNING)
    if options.memory_of:
        bench = Bench(options, pair=options.memory_of == "mixed")
        with torch.inference_mode():
            for _ in range(2):
                bench.contenders()[options.memory_of]()
        print(f"PEAK {peak_bytes()}")
        return
    result = measure(options)
    result["peak_bytes_plain_and_scored"], result["peak_bytes_mixed"] = (
        memory_of(name) for name in ("plain_and_scored", "mixed")
    )
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['sequences']} sequences, up to {options.max_new_tokens} tokens, α = {options.alpha}, {machine()}")
    for name, value in result["tokens_per_second"].items():
        print(f"{name:18}{value:10.1f} tokens/s")
    print({key: round(value, 3) for key, value in result.items() if isinstance(value, float)})


def memory_of(contender: str) -> int:
    """Return the peak memory in bytes of a process that runs one contender twice."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", contender]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    found = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if not found:
        raise SystemExit(f"{contender} ended:\n{done.stderr[-3000:]}")
    return int(found[0].removeprefix("PEAK "))


def random_prompts(count: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocab_size) for _ in range(draw.randint(32, 160))] for _ in range(count)]


def random_weights(name: str) -> str:
    """Save a model of the published sizes of `name`, with random weights, and return its folder."""
    folder = Path(tempfile.gettempdir()) / "minillm-random" / name.replace("/", "--")
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(0)
        with torch.device(device()):
            model: Any = AutoModelForCausalLM.from_config(shape_of(name).config, dtype=working_dtype())
        model.save_pretrained(folder, max_shard_size="100GB")
    return str(folder)


class Bench:
    """The models, the engine and the prompts that the contenders share.

    Args:
        options: The command line.
        pair: Whether vLLM holds the teacher beside the student.
    """

    def __init__(self, options: argparse.Namespace, *, pair: bool) -> None:
        dtype, new = working_dtype(), options.max_new_tokens
        if options.random:
            size = min(shape_of(name).config.vocab_size for name in (options.student, options.teacher))
            self.prompts, ends = random_prompts(options.sequences, size), ()
            options.student, options.teacher = (random_weights(name) for name in (options.student, options.teacher))
        else:
            tokenizer = load_tokenizer(options.student)
            examples = read_examples(options.prompts, limit=options.sequences)
            self.prompts = [render(example, "chat", tokenizer, options.system) for example in examples]
            size, ends = len(tokenizer), (tokenizer.eos_token_id,)
        self.alpha, self._folder, self._dtype = options.alpha, options.student, dtype
        self.sampling = Sampling(new, ends, size, options.temperature)
        teacher: Any = load_model(options.teacher, dtype).eval()
        self.teacher = LocalTeacher(teacher.to(device()))
        sizing = EngineSizing(max(map(len, self.prompts)) + new, dtype, options.sequences)
        self.engine = VLLMEngine(options.student, sizing, teacher=self.teacher if pair else None)
        # On a CPU the pair reads without its teacher where nothing is mixed; CUDA graphs of it contain both models.
        alone = pair and torch.cuda.is_available()
        self.plain_engine = VLLMEngine(options.student, sizing) if alone else self.engine
        self._calls = 0

    @cached_property
    def student(self) -> Any:
        model: Any = load_model(self._folder, self._dtype).eval()
        return model.to(device())

    @cached_property
    def by_transformers(self) -> TransformersEngine:
        return TransformersEngine(self.student, teacher=self.teacher)

    def fresh(self) -> None:
        """Drop what the engine has cached of the prompts, as new weights do before every batch in training."""
        for engine in {id(engine): engine for engine in (self.engine, self.plain_engine)}.values():
            engine.update_weights(plain_weights(self.student, self._dtype), 0)

    def sample(self, engine: Engine, alpha: float = 0.0) -> list[Rollout]:
        self._calls += 1
        seeds = range(self._calls * len(self.prompts), (self._calls + 1) * len(self.prompts))
        return engine.generate(self.prompts, replace(self.sampling, teacher_mix=alpha), seeds)

    def plain_and_scored(self, *, logprobs: bool) -> int:
        rollouts = self.sample(self.plain_engine)
        score_missing(self.teacher, rollouts, self.sampling)
        if logprobs:
            self.teacher.add_token_logprobs(rollouts, self.sampling)
        return count(rollouts)

    def contenders(self) -> dict[str, Callable[[], int]]:
        """What samples one batch and returns the number of its tokens, by name."""
        return {
            "plain": lambda: count(self.sample(self.plain_engine)),
            "transformers": lambda: generate_with_transformers(self.student, self.prompts, self.sampling),
            "per_token": lambda: mix_per_token(
                self.student, self.teacher.model, self.alpha, self.prompts, self.sampling
            ),
            "mixed_transformers": lambda: count(self.sample(self.by_transformers, self.alpha)),
            "plain_and_states": lambda: self.plain_and_scored(logprobs=False),
            "plain_and_scored": lambda: self.plain_and_scored(logprobs=True),
            "mixed": lambda: count(self.sample(self.engine, self.alpha)),
        }


def count(rollouts: Sequence[Rollout]) -> int:
    return sum(len(rollout.response_ids) for rollout in rollouts)


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")  # getrusage would give a process the peak of the one that started it


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Have the contenders take turns."""
    bench = Bench(options, pair=True)
    contenders = {name: run for name, run in bench.contenders().items() if name in (options.only or [name])}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for turn in range(options.repeats + 1):
            for name, run in contenders.items():
                bench.fresh()
                drawn: list[int] = []
                spent = seconds(lambda run=run, drawn=drawn: drawn.append(run()))
                print(
                    f"round {turn} of {options.repeats}, {name}: {drawn[0] / spent:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
                if turn:  # the first turn warms up
                    taken[name].append(spent / drawn[0])
    bench.engine.close()
    bench.plain_engine.close()
    per_token = {name: median(values) for name, values in taken.items()}

    def ratio(slow: str, fast: str) -> float | None:
        return per_token[slow] / per_token[fast] if slow in per_token and fast in per_token else None

    return {
        "vs_transformers": ratio("transformers", "plain"),
        "mixed_vs_per_token": ratio("per_token", "mixed"),
        "mixed_vs_plain": ratio("mixed", "plain"),
        "mixed_vs_plain_states": ratio("mixed", "plain_and_states"),
        "mixed_vs_plain_scored": ratio("mixed", "plain_and_scored"),
        "tokens_per_second": {name: 1 / value for name, value in per_token.items()},
        "rounds": {name: [1 / value for value in values] for name, values in taken.items()},
        "peak_bytes": peak_bytes(),
        "sequences": len(bench.prompts),
        "alpha": options.alpha,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
