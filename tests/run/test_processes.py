"""A recipe in several processes, as accelerate launches them, and a run that Ctrl-C stops."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillm.models import load
from minillm.models.device import fast_bfloat16
from minillm.rollout.engines.vllm_memory import vllm_is_installed
from minillm.run import runner
from minillm.run.recipe_file import load_recipe
from tests.conftest import save, tiny_llama
from tests.run.tiny_recipe import command, run_tiny_recipe


@pytest.fixture(scope="module")
def recipe(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny_recipe(tmp_path_factory.mktemp("recipe"), pair[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch_trains_in_every_process(recipe: Path, processes: int, tmp_path: Path) -> None:
    """Two CPU processes need --multi_gpu; with --cpu accelerate starts one."""
    flags = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else ["--cpu", "--num_processes", "1"]
    run = tmp_path / "run"
    words = ["run", str(recipe), f"run_dir={run}"]
    assert command(*words, "--stage", "teacher").returncode == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *flags,
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch += ["--main_process_port", "0"] if processes == 2 else []
    whole = [
        *launch,
        "-m",
        "minillm",
        *words,
        "training.per_device_train_batch_size=2",
        "stages=[teacher,student,responses,warmup,minillm]",
    ]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(whole, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((run / "student" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    world = json.loads((run / "state.json").read_text())["stages"]["minillm"]["processes"]
    assert world == processes


@pytest.mark.full
def test_an_update_is_the_same_on_one_process_and_on_two(recipe: Path, tmp_path: Path) -> None:
    """The same responses in the same order, in the warm-up and in updates of whole batches; and JSON lines alone."""
    sizes = [f"{section}.responses_per_update=4" for section in ("warmup.training", "training")]
    settings = [
        *sizes,
        "training.max_steps=4",
        "rollout.inner_epochs=1",
        "stages=[teacher,student,responses,warmup,minillm]",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    tokens: dict[int, list[float]] = {}
    for processes, start in ((1, [sys.executable]), (2, launch)):
        words = [
            *start,
            "-m",
            "minillm",
            "run",
            str(recipe),
            f"run_dir={tmp_path / str(processes)}",
            "--json",
            *settings,
        ]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert [event.get("stage") for event in events] == [
            "teacher",
            "student",
            "responses",
            "warmup",
            "minillm",
            None,
        ]
        assert events[-1]["status"] == "finished"
        history = [
            entry
            for folder in ("warmed", "student")
            for entry in json.loads((tmp_path / str(processes) / folder / "trainer_state.json").read_text())[
                "log_history"
            ]
            if "loss" in entry
        ]
        tokens[processes] = [entry["update_tokens_per_second"] * entry["update_seconds"] for entry in history]
    assert len(tokens[1]) == 6
    assert tokens[2] == pytest.approx(tokens[1])
    for folder in ("warmed", "student"):
        one, two = (
            torch.cat(
                [
                    value.flatten()
                    for value in load.load_model(tmp_path / name / folder, torch.float32).state_dict().values()
                ]
            )
            for name in ("1", "2")
        )
        assert float((one - two).abs().max()) < 1e-4, folder


def test_ctrl_c_keeps_what_was_done(recipe: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "minillm",
        "run",
        str(recipe),
        f"run_dir={tmp_path / 'run'}",
        "training.max_steps=300",
        "training.save_steps=1000",
    ]
    words += ["stages=[teacher,student,responses,warmup,minillm]"]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "logs" / "minillm.jsonl"
    while started.poll() is None and not (log.is_file() and "importance_weight" in log.read_text()):
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    rest = started.communicate()[0]
    assert started.wait(timeout=400) == 130, rest
    assert "the same command continues it" in rest
    stopped = int(rest.split("stopped after update ")[1].split(";")[0])
    assert 0 < stopped < 300
    assert (tmp_path / "run" / "work" / "minillm" / f"checkpoint-{stopped}").is_dir()
    words[words.index("training.max_steps=300")] = f"training.max_steps={stopped + 2}"
    done = subprocess.run([*words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 2  # another length is another setting
    words[words.index(f"training.max_steps={stopped + 2}")] = "training.max_steps=300"
    done = subprocess.run([*words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((tmp_path / "run" / "student" / "trainer_state.json").read_text())["log_history"]
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == list(range(1, 301))  # no update lost, none done twice


ZEROS = [("zero3-8-gpus", False), ("zero3-8-gpus", True), ("zero2-8-gpus", False)]
zero = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (make test-full installs it)"
)
ROOT = Path(__file__).parents[2]


def sharded_run(file: str, precision: str, words: list[str], **dies: str) -> subprocess.CompletedProcess[str]:
    """`minillm` as accelerate launches it by a shipped file, in two processes on the CPU."""
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"recipes/accelerate/{file}.yaml",
        "--num_processes", "2", "--mixed_precision", precision, "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "tests.sharded_run", *words,
    ]  # fmt: skip
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", **dies,
    }  # fmt: skip
    return subprocess.run(launch, capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT)


def sharded_words(recipe: Path, pair: tuple[str, str], run_dir: Path, micro: int, *overrides: str) -> list[str]:
    """A run of every training stage, validated, and evaluated; to be begun in `ROOT`."""
    data = run_dir.parent / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"instruction": f"w{i} w{i + 3}", "output": f"w{i} w{i + 1}"}) + "\n" for i in range(12))
    )
    training = "use_cpu: true, learning_rate: 0.01, adam_epsilon: 1.0e-3, lr_scheduler_type: constant, max_grad_norm: 1.0, save_steps: 2"
    training += ", eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true, metric_for_best_model: "
    read, taught = (
        training + "rouge_l",
        training + "reverse_kl, greater_is_better: true",
    )  # the best must not be the last
    sections = {"finetune": (4, read), "warmup.training": (2, taught), "sft": (2, read), "training": (4, taught)}
    return [
        "run", str(recipe), f"run_dir={run_dir}", "stages=[finetune,responses,warmup,sft,minillm,evaluate,report]",
        f"teacher.source={os.path.relpath(pair[1], ROOT)}", f"student={{source: {pair[0]}}}",
        f"data.train={data}", f"data.heldout={data}", f"data.validation={data}", "data.validation_limit=7",
        "warmup.targets=references", "rollout.teacher_mix=0", "keep_checkpoint=false",
        *(f"{part}={{max_steps: {n}, per_device_train_batch_size: {micro}, {settings}}}" for part, (n, settings) in sections.items()),
        *overrides,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "adapter"),
    [
        ("fsdp2-8-gpus", False), pytest.param("fsdp2-8-gpus", True, marks=pytest.mark.full),
        *(pytest.param(file, adapter, marks=[zero, pytest.mark.full]) for file, adapter in ZEROS),
    ],
)  # fmt: skip
def test_every_training_stage_in_shards_leaves_what_one_process_does(
    recipe: Path, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, adapter: bool
) -> None:
    """Fine-tuning, warm-up and minillm, of each the best of two checkpoints. One stage dies, in one a single process hears Ctrl-C, one
    dies between training and saving; each time the same command goes on."""
    lora = ["student.lora={rank: 4, targets: [q_proj, down_proj]}"] if adapter else []
    for dies, kept in (
        ({"DIES_IN": "finetune"}, [2]),
        ({"CTRL_C_IN": "minillm"}, [2, 3]),
        ({"DIES_AFTER": "minillm"}, [2, 4]),
        ({}, []),
    ):
        done = sharded_run(file, "no", sharded_words(recipe, pair, tmp_path / "two", 2, *lora), **dies)
        assert (done.returncode == 0) == (not dies), done.stdout[-2000:] + done.stderr[-6000:]
        left = sorted(path.name for path in (tmp_path / "two" / "work").glob("*/checkpoint-*"))
        assert left == [f"checkpoint-{step}" for step in kept]
        assert ("the same command continues it" in done.stderr) == ("CTRL_C_IN" in dies)
    monkeypatch.chdir(ROOT)
    runner.run_recipe(load_recipe(recipe, sharded_words(recipe, pair, tmp_path / "one", 4, *lora)[2:]))
    for folder, start in (
        ("tuned", pair[1]),
        ("warmed", pair[0]),
        ("sft", pair[0]),
        ("student", str(tmp_path / "one" / "warmed")),
    ):
        one, two, before = (
            torch.cat([value.flatten() for value in load.load_model(source, torch.float32).state_dict().values()])
            for source in (tmp_path / "one" / folder, tmp_path / "two" / folder, start)
        )
        moved = float((one - before).norm())
        assert moved > 0, folder
        assert float((two - one).norm()) <= 5e-3 * moved, folder
    # Of seven rows one process validates on one more than the other.
    assert set(json.loads((tmp_path / "two" / "results.json").read_text())["models"]) == {
        "teacher",
        "student",
        "warmed",
        "sft",
        "minillm",
    }
    for folder in ("warmed", "student"):
        one, two = (validated(tmp_path / name / folder) for name in ("one", "two"))
        assert one.keys() == two.keys() != set()
        for step, found in one.items():
            assert two[step] == pytest.approx(found, rel=1e-2), (folder, step)


def validated(folder: Path) -> dict[int, float]:
    """KL(q‖p) by update."""
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_reverse_kl"] for entry in logged if "eval_reverse_kl" in entry}


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
@pytest.mark.parametrize(
    ("file", "adapter"),
    [
        ("8-gpus", False),
        ("fsdp2-8-gpus", False),
        ("fsdp2-8-gpus", True),
        pytest.param("zero3-8-gpus", False, marks=zero),
    ],
)
def test_several_processes_with_a_vllm_each_in_bfloat16(
    recipe: Path, pair: tuple[str, str], tmp_path: Path, file: str, adapter: bool
) -> None:
    """Every stage, as the recipes train: in bfloat16, checkpointed, clipped, with a head of its own, or as llama/7b-lora does."""
    untied = save(tiny_llama(5, tied=False), tmp_path / "untied")
    sections, settings = ("finetune", "warmup.training", "sft", "training"), ("bf16", "gradient_checkpointing")
    as_recipes = [f"{section}.{setting}=true" for section in sections for setting in settings]
    overrides = ["rollout.engine=vllm", f"rollout.teacher_mix={0.0 if adapter else 0.2}", *as_recipes]
    if adapter:
        overrides += ["student.lora={rank: 4, targets: [q_proj, v_proj]}", "rollout.lora=adapter"]
    # On a CPU that emulates bfloat16 a run computes in float32, and DeepSpeed refuses a launcher that says otherwise.
    precision = "bf16" if fast_bfloat16() or "zero" not in file else "no"
    done = sharded_run(file, precision, sharded_words(recipe, (untied, pair[1]), tmp_path / "run", 2, *overrides))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    logged = json.loads((tmp_path / "run" / "student" / "trainer_state.json").read_text())["log_history"]
    mismatch = [entry["engine_mismatch"] for entry in logged if "engine_mismatch" in entry]
    assert len(mismatch) == 2  # of each first update on what was drawn: what was trained is what vLLM samples next
    assert max(mismatch) < 0.05, mismatch
    assert set(validated(tmp_path / "run" / "student")) == {2, 4}
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())["models"]) == {
        "teacher",
        "student",
        "warmed",
        "sft",
        "minillm",
    }
