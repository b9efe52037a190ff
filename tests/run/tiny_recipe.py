"""A whole recipe on tiny models, which samples with transformers, and the command line that runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from minillm.run import runner
from minillm.run.recipe_file import load_recipe

RECIPE = """\
run_dir: {run}
data: {{train: {data}, heldout: {data}, max_prompt_tokens: 16}}
teacher: {{source: {teacher}}}
student: {{keep_layers: 2, probe_prompts: 4}}
responses: {{max_new_tokens: 8}}
warmup: {{training: {{max_steps: 2, per_device_train_batch_size: 4, use_cpu: true}}}}
rollout: {{engine: transformers, num_rollouts: 4, max_new_tokens: 8}}
training: {{max_steps: 3, per_device_train_batch_size: 4, use_cpu: true, learning_rate: 1e-3}}
evaluate: {{seeds: [1, 2], max_new_tokens: 8, bootstrap: 100}}
"""


def run_tiny_recipe(root: Path, teacher: str, *overrides: str) -> Path:
    """Run the whole recipe in a folder; returns its file."""
    data = root / "prompts.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(10)))
    file = root / "recipe.yaml"
    file.write_text(RECIPE.format(run=root / "run", data=data, teacher=teacher))
    runner.run_recipe(load_recipe(file, overrides))
    return file


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minillm", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=900,
    )
