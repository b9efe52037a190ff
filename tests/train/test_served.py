"""Training over a real vLLM server that is killed twice on the way."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from minillm import MiniLLMTrainer, RolloutConfig
from minillm.rollout.vllm_engine import vllm_is_installed
from tests.conftest import save, tiny_llama
from tests.rollout.test_engines import start_server, stop_server
from tests.train.test_on_policy import PROMPTS, arguments

pytestmark = [pytest.mark.full, pytest.mark.vllm, pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")]
FLAGS = ["--logprobs-mode", "processed_logprobs"]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_survives_two_restarts_of_its_server(tmp_path: Path, overlap: bool) -> None:
    student, teacher = save(tiny_llama(1), tmp_path / "student"), save(tiny_llama(2, layers=3), tmp_path / "teacher")
    process, url = start_server(student, tmp_path / "log", *FLAGS)
    running = [process]

    class Kill(TrainerCallback):
        """Hard, amid whatever it does; a new one comes up on the same port some seconds later, with the first weights."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (30, 70):
                stop_server(running[-1])

                def again() -> None:
                    time.sleep(3)
                    running.append(start_server(student, tmp_path / "log", *FLAGS, port=int(url.rsplit(":", 1)[1]))[0])

                threading.Thread(target=again).start()

    rollout = RolloutConfig(
        engine="server", servers=[url], server_patience=240, num_rollouts=8, inner_epochs=1, teacher_mix=0.3, max_new_tokens=10,
        max_prompt_tokens=8, draft_tokens=4, overlap=overlap,
    )  # fmt: skip
    trainer = MiniLLMTrainer(student, teacher, arguments(tmp_path / "run", max_steps=100), rollout=rollout, train_dataset=PROMPTS)
    trainer.add_callback(Kill())
    adopted: list[int] = []
    original = trainer._adopt
    trainer._adopt = lambda number, rollouts: adopted.append(number) or original(number, rollouts)  # pyright: ignore
    try:
        trainer.train()
    finally:
        trainer.close()
        for server in running:
            stop_server(server)
    assert len(running) == 3
    assert trainer.state.global_step == 100
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == list(range(1, 101))
    assert adopted == list(range(50))  # every batch once, in order: 8 rollouts, 4 an update, one epoch
    mismatch = [entry["engine_mismatch"] for entry in trainer.state.log_history if "engine_mismatch" in entry]
    assert len(mismatch) == (1 if overlap else 50)
    assert max(mismatch) < 1e-3  # every token came from the weights it is said to come from
