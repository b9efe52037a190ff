"""Benchmark of sampling.

    python eval/speed/rollout.py --student runs/quickstart/student --teacher runs/quickstart/teacher [--json]

vLLM is compared with the `generate` of transformers. Teacher-mixed sampling is compared with mixing two models token by
token, as LMOps does it, and with plain sampling followed by scoring with the teacher, which mixing makes unnecessary.
Every number is in seconds per sampled token, because the lengths differ from sample to sample. The contenders take
turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import median, seconds

from minillm.data.examples import read_examples
from minillm.data.logprobs import next_token_logprobs
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.data.templates import render
from minillm.models.device import device, machine, working_dtype
from minillm.models.load import load_model, load_tokenizer
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.samplers.teacher_mixed import TeacherMixedSampler
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
        eos_token_id=list(sampling.eos_ids),
        pad_token_id=sampling.eos_ids[0],
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
        going = ~torch.isin(tokens, torch.tensor(sampling.eos_ids, device=tokens.device))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/quickstart/student")
    parser.add_argument("--teacher", default="runs/quickstart/teacher")
    parser.add_argument("--prompts", default="recipes/quickstart/train.jsonl")
    parser.add_argument("--system", default="Answer in one short sentence.")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument(
        "--draft-tokens", type=int, nargs="*", default=[8, 12], help="draft lengths; each is a contender"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    tokenizer = load_tokenizer(options.student)
    examples = read_examples(options.prompts, limit=options.sequences)
    prompts = [render(example, "chat", tokenizer, options.system) for example in examples]
    dtype = working_dtype()
    models: list[Any] = [load_model(folder, dtype).eval() for folder in (options.student, options.teacher)]
    student, teacher_model = (model.to(device()) for model in models)
    sampling = Sampling(options.max_new_tokens, (tokenizer.eos_token_id,), len(tokenizer), options.temperature)
    limit = max(map(len, prompts)) + options.max_new_tokens
    engine, teacher = VLLMEngine(options.student, EngineSizing(limit, dtype)), LocalTeacher(teacher_model)
    counter = iter(range(1 << 30))
    acceptance: dict[int, float] = {}

    def seeds() -> list[int]:
        start = next(counter) * len(prompts)
        return list(range(start, start + len(prompts)))

    def count(rollouts: Sequence[Rollout]) -> int:
        return sum(len(rollout.response_ids) for rollout in rollouts)

    def mixed(draft: int) -> int:
        sampler = TeacherMixedSampler(teacher, options.alpha, draft)
        drawn = count(sampler.generate(engine, prompts, sampling, seeds()))
        acceptance[draft] = sampler.accepted / sampler.drafted
        return drawn

    def plain_and_scored() -> int:
        rollouts = engine.generate(prompts, sampling, seeds())
        teacher.score(rollouts, sampling)
        return count(rollouts)

    contenders: dict[str, Callable[[], int]] = {
        "plain": lambda: count(engine.generate(prompts, sampling, seeds())),
        "transformers": lambda: generate_with_transformers(student, prompts, sampling),
        "per_token": lambda: mix_per_token(student, teacher_model, options.alpha, prompts, sampling),
        "plain_and_scored": plain_and_scored,
        **{f"mixed_{draft}": lambda draft=draft: mixed(draft) for draft in options.draft_tokens},
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for turn in range(options.repeats + 1):
            for name, run in contenders.items():
                drawn: list[int] = []
                spent = seconds(lambda run=run, drawn=drawn: drawn.append(run()))
                print(
                    f"round {turn} of {options.repeats}, {name}: {drawn[0] / spent:.1f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
                if turn:  # the first turn warms up
                    taken[name].append(spent / drawn[0])
    per_token = {name: median(values) for name, values in taken.items()}
    best = min((f"mixed_{draft}" for draft in options.draft_tokens), key=lambda name: per_token[name])
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "vs_transformers": per_token["transformers"] / per_token["plain"],
        "mixed_vs_per_token": per_token["per_token"] / per_token[best],
        "mixed_vs_plain": per_token[best] / per_token["plain_and_scored"],
        "acceptance": acceptance[int(best.removeprefix("mixed_"))],
        "tokens_per_second": {name: 1 / value for name, value in per_token.items()},
        "draft_tokens": best,
        "peak_bytes": peak,
        "sequences": len(prompts),
        "alpha": options.alpha,
        "machine": machine(),
        "torch": torch.__version__,
    }
    engine.close()
    if options.json:
        print(json.dumps(result))
        return
    print(f"{len(prompts)} sequences, up to {options.max_new_tokens} tokens, α = {options.alpha}, {machine()}")
    for name, value in per_token.items():
        print(f"{name:18}{1 / value:10.1f} tokens/s")
    print({key: round(value, 3) for key, value in result.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
