"""Nats a token of a text under a model, with the BOS that its tokenizer puts before a text and without.

`python eval/nats.py MODEL [TEXT_FILE]`, by default the first 3,000 characters of this project's README. Both averages
are over the same tokens, those after the first, so that the BOS counts as context alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from minillm.models.load import load_model, load_tokenizer

CHARACTERS = 3000


def nats_per_token(model: Any, ids: list[int], prefix: list[int]) -> float:
    """Mean −log p of all tokens but the first, after a prefix.

    Args:
        model: A causal language model.
        ids: At least two tokens.
        prefix: Tokens before them, which are not counted.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prefix + ids])).logits[0, len(prefix) : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


def main() -> None:
    """Print both averages, and what a greedy answer begins with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a .gguf file or a hub id")
    parser.add_argument("text", nargs="?", type=Path, default=Path(__file__).parents[1] / "README.md")
    given = parser.parse_args()
    tokenizer, model = load_tokenizer(given.model), load_model(given.model, torch.float32)
    inner = tokenizer(given.text.read_text(encoding="utf-8")[:CHARACTERS], add_special_tokens=False)["input_ids"]
    asked = tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    print(f"a text begins with {tokenizer.convert_ids_to_tokens(tokenizer('a')['input_ids'])[:-1] or 'nothing'}")
    sampled: Any = model
    for name, prefix in {"without BOS": [], "with BOS": bos}.items():
        answer: Any = sampled.generate(torch.tensor([prefix + asked]), max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(answer[0, len(prefix) :])
        print(f"{name}: {nats_per_token(model, inner, prefix):.3f} nats a token ({len(inner) - 1} tokens); {text!r}")


if __name__ == "__main__":
    main()
