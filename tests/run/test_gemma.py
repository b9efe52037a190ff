"""The whole chain on real weights that are not SmolLM2's: Gemma 3 270M, whose windows are 512 tokens wide.

`make gemma` fetches its file; without it these tests are skipped. All of it is computed in float32, so that an engine
that reads other positions, another window or no BOS is far outside the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.data.logprobs import mixture_logprobs
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.models.load import load_model
from minillm.rollout.engines.base import Engine, EngineSizing
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.engines.vllm_memory import vllm_is_installed
from minillm.run import runner
from minillm.run.context import Run
from minillm.run.recipe_file import load_recipe
from minillm.teacher.base import score_missing
from minillm.teacher.local import LocalTeacher
from minillm.teacher.served import ServedTeacher
from minillm.train.on_policy import MiniLLMTrainer
from tests.gemma import needs_gemma
from tests.rollout.test_engines import own_logprobs, start_server, stop_server

RECIPE = Path(__file__).parents[2] / "recipes" / "gemma" / "gemma3-270m-cpu.yaml"
WINDOW, LONGEST = 512, 640
BOS = 2
TOLERANCE = 2e-3  # float32, summed in another order: hidden states of Gemma reach some hundreds
pytestmark = [pytest.mark.full, needs_gemma]
needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")]


def run_chain(folder: Path, *overrides: str) -> Run:
    """The recipe with a few rows and updates; every fourth prompt is longer than the windows."""
    folder.mkdir(exist_ok=True)
    data = folder / "data.jsonl"
    questions = ["Name a colour.", "What is the capital of France?", "How many legs has a spider?"]
    asked = [*questions, "Repeat this word:" + " apple" * 480] * 2
    rows = [{"instruction": text} | ({"output": f"Answer {i}."} if i < 4 else {}) for i, text in enumerate(asked)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"per_device_train_batch_size": 4, "responses_per_update": 4, "bf16": "false", "use_cpu": "true"}
    sections = {
        "finetune": short | {"num_train_epochs": 1},
        "warmup.training": short | {"max_steps": 1},
        "training": short | {"max_steps": 3, "save_steps": 1},
    }
    return runner.run_recipe(
        load_recipe(
            RECIPE,
            [
                f"run_dir={folder / 'run'}", f"data.train={data}", f"data.heldout={data}", "student.keep_layers=12",
                f"data.max_prompt_tokens={LONGEST}", "student.probe_prompts=4", "responses.max_new_tokens=6",
                "rollout.max_new_tokens=6", "rollout.num_rollouts=8", "rollout.engine=transformers",
                "evaluate.seeds=[1, 2]", "evaluate.max_new_tokens=6", "evaluate.bootstrap=100",
                *(f"{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()),
                *overrides,
            ],
        )
    )  # fmt: skip


def history(run: Run) -> list[dict[str, Any]]:
    return json.loads((Path(run.student) / "trainer_state.json").read_text())["log_history"]


def assert_ran(run: Run) -> None:
    prompts = [prompt.ids for prompt in (*run.train_prompts, *run.heldout_prompts)]
    assert all((ids[0], ids.count(BOS)) == (BOS, 1) for ids in prompts)
    assert min(map(len, prompts)) < 100 < WINDOW < max(map(len, prompts)) <= LONGEST
    assert max(entry["engine_mismatch"] for entry in history(run) if "engine_mismatch" in entry) < TOLERANCE
    results = json.loads((run.dir / "results.json").read_text())["models"]
    assert set(results) == {"teacher", "student", "warmed", "minillm"}
    before, after = (load_model(folder, torch.float32).state_dict() for folder in (run.warmed, run.student))
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that dies after two of its three updates, and goes on."""
    folder, updates = tmp_path_factory.mktemp("gemma") / "chain", list[int]()
    step = MiniLLMTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        updates.append(self.state.global_step)
        if updates == [0, 1, 2]:
            raise MemoryError("the machine goes off")
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MiniLLMTrainer, "training_step", counted)
        with pytest.raises(MemoryError, match="goes off"):
            run_chain(folder)
        run = run_chain(folder)
    assert updates == [0, 1, 2, 2]  # nothing is lost, nothing is done twice
    return run


def test_the_recipe_runs_all_its_stages_and_resumes(done: Run) -> None:
    assert_ran(done)
    assert [entry["step"] for entry in history(done) if "loss" in entry] == [1, 2, 3]


def test_the_saved_student_is_whole(done: Run) -> None:
    saved: Any = AutoModelForCausalLM.from_pretrained(done.student, dtype=torch.float32)
    assert saved.config.num_hidden_layers == 12
    assert saved.config.sliding_window == WINDOW
    assert set(saved.config.layer_types) == {"sliding_attention", "full_attention"}
    assert saved.get_output_embeddings().weight is saved.get_input_embeddings().weight
    ends = saved.generation_config.eos_token_id
    assert sorted([ends] if isinstance(ends, int) else ends) == list(done.conventions.eos_ids)
    tokenizer: Any = AutoTokenizer.from_pretrained(done.student)
    for text in ("a spider", " two  spaces\n\n", "<end_of_turn>", "é 漢"):
        assert tokenizer(text)["input_ids"] == done.conventions.tokenizer(text)["input_ids"]
        assert tokenizer(text)["input_ids"][0] == BOS


def test_the_recipe_with_lora(done: Run, tmp_path: Path) -> None:
    stages = "stages=[student, responses, warmup, minillm, evaluate, report]"
    adapted = run_chain(tmp_path, stages, f"teacher.source={done.teacher}", "student.lora.rank=4")
    assert_ran(adapted)
    assert (Path(adapted.student) / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=needs_vllm)])
def engine(request: pytest.FixtureRequest, done: Run) -> Iterator[Engine]:
    teacher = LocalTeacher(load_model(done.teacher, torch.float32))
    if request.param == "transformers":
        made: Engine = TransformersEngine(load_model(done.student, torch.float32), teacher=teacher)
    else:
        made = VLLMEngine(done.student, EngineSizing(LONGEST + 16, torch.float32, 8), teacher=teacher)
    yield made
    made.close()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_engines_draw_what_the_trainer_scores_within_and_beyond_the_windows(
    alpha: float, engine: Engine, done: Run
) -> None:
    """The third prompt ends within the window, and its answer beyond it."""
    words = [BOS, *range(1000, 1000 + LONGEST)]  # no two are the same, so that each token that is left out counts
    prompts = [words[:12], words[:LONGEST], words[: WINDOW - 6]]
    sampling = Sampling(12, tuple(done.conventions.eos_ids), done.conventions.vocab_size, 0.7)
    student, teacher = (load_model(folder, torch.float32) for folder in (done.student, done.teacher))
    wide: Any = AutoModelForCausalLM.from_pretrained(done.student, dtype=torch.float32, sliding_window=2 * LONGEST)
    rollouts = engine.generate(prompts, replace(sampling, teacher_mix=alpha), [1, 2, 3])
    for prompt, r in zip(prompts, rollouts, strict=True):
        assert r.prompt_ids == prompt
        logq, logp, other = (own_logprobs(m, prompt, r.response_ids, sampling) for m in (student, teacher, wide))
        torch.testing.assert_close(r.student_logprobs, logq, atol=TOLERANCE, rtol=TOLERANCE)
        mixed = mixture_logprobs(logq, logp, alpha)
        torch.testing.assert_close(r.behaviour_logprobs, mixed, atol=TOLERANCE, rtol=TOLERANCE)
        without_windows = float((other - logq).abs().max())
        if len(prompt) <= 12:
            assert without_windows < TOLERANCE
        elif len(prompt) > WINDOW:
            assert without_windows > 10 * TOLERANCE  # another window is noticed


@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
def test_a_served_teacher_scores_as_one_in_this_process(done: Run, tmp_path: Path) -> None:
    flags = ["--runner", "pooling", "--pooler-config", '{"task": "token_embed"}', "--max-model-len", str(LONGEST + 16)]
    process, url = start_server(str(done.teacher), tmp_path / "log", *flags)
    try:
        served = ServedTeacher([url], str(done.teacher), patience=900).attach(LONGEST + 8)
        local = LocalTeacher(load_model(done.teacher, torch.float32))
        sampling = Sampling(8, tuple(done.conventions.eos_ids), done.conventions.vocab_size, 0.7)
        ids = [BOS, *range(1000, 1000 + LONGEST)]
        zeros, targets = torch.zeros(1), []
        teacher: Any
        for teacher in (local, served):
            rollouts = [Rollout(ids[:n], ids[n : n + 8], zeros, zeros, 0, True) for n in (12, WINDOW - 4, LONGEST - 8)]
            score_missing(teacher, rollouts, sampling)
            teacher.add_token_logprobs(rollouts, sampling)
            targets.append([rollout.teacher.token_logprobs for rollout in rollouts if rollout.teacher is not None])
        for here, there in zip(*targets, strict=True):
            torch.testing.assert_close(there, here, atol=TOLERANCE, rtol=TOLERANCE)
        served.close()
    finally:
        stop_server(process)
