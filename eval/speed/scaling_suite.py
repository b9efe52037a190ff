"""The axis `models` of `scaling.py`: what an evaluation of so many models of one size costs.

    python eval/speed/scaling_suite.py MODEL FILE COUNT PROMPTS

Every model answers the same prompts. The models are one folder under several names, so nothing is reused but the
engine.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import resident

from minillm.evaluation.config import Suite
from minillm.evaluation.suite import run_suite

# `scaling_plan.plan_models` plans with the same settings.
SETTINGS: dict[str, Any] = {"max_new_tokens": 64, "max_prompt_tokens": 128, "seeds": [10, 20]}


def measure_models(model: str, file: str, count: int, prompts: int) -> dict[str, Any]:
    """Evaluate models in this process.

    Args:
        model: Folder of the model.
        file: JSONL file of the prompts.
        count: How many models there are.
        prompts: How many prompts each answers.

    Returns:
        `seconds` of the whole evaluation, with the start of the engine; and `peak_bytes` of the process.
    """
    with tempfile.TemporaryDirectory() as out:
        sets = {"prompts": {"file": Path(file).absolute(), "limit": prompts}}
        suite = Suite.model_validate({"out": out, "sets": sets, "engine": "vllm", **SETTINGS})
        start = time.perf_counter()
        run_suite(suite, {f"model{number}": model for number in range(count)})
        return {"seconds": time.perf_counter() - start, "peak_bytes": resident("VmHWM"), "phases": {}}


if __name__ == "__main__":
    print(json.dumps(measure_models(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
