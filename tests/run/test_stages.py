"""A whole recipe on tiny models, sampling with transformers: stages, continuing, refusing, the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gpt2 import GPT2Config

from minillm.errors import DataError, EngineError, RecipeError, RunError
from minillm.models import load, quantization
from minillm.models.quantization import is_quantized
from minillm.rollout.engines import vllm as vllm_engine
from minillm.run import runner
from minillm.run.context import Run
from minillm.run.directory import RunState
from minillm.run.recipe_file import load_recipe
from minillm.run.stages import stage_named
from minillm.run.stages.shared import training_arguments
from tests.conftest import save, tiny_tokenizer
from tests.run.tiny_recipe import RECIPE, command, run_tiny_recipe
from tests.train.two_processes import deepspeed


@pytest.fixture(scope="module")
def recipe(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny_recipe(tmp_path_factory.mktemp("recipe"), pair[1])


def test_a_run_leaves_its_results(recipe: Path) -> None:
    run = recipe.parent / "run"
    results = json.loads((run / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "pruned", "warmed", "minillm"]
    for folder in ("warmed", "student"):
        assert json.loads((run / folder / "config.json").read_text())["use_cache"]
    for scores in results["models"].values():
        for key in ("rouge_l", "reverse_kl", "finished", "length"):
            assert scores[key]["low"] <= scores[key]["mean"] <= scores[key]["high"]
    assert results["models"]["teacher"]["reverse_kl"]["mean"] == 0
    assert results["models"]["pruned"]["reverse_kl"]["mean"] > 0
    assert len(results["check"]["criteria"]) == 3
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.num_hidden_layers == 2
    assert json.loads((run / "pruned" / "pruning.json").read_text())["kept"] == [0, 2]
    page = (run / "report.html").read_text()
    for part in ("<svg", "Reverse KL", "Importance weights", "Gradient norm", "Response length", "minillm", "w0 w3"):
        assert part in page
    assert "src=" not in page  # self-contained
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    # The last stage can go on; of those that it builds on no checkpoint is left lying.
    assert [str(path.relative_to(run / "work")) for path in (run / "work").glob("*/*")] == ["minillm/checkpoint-3"]


def test_a_lora_student_is_merged_after_every_stage_and_described(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}", "output": f"w{i}"}) + "\n" for i in range(10)))
    teacher = tmp_path / "teacher"
    shutil.copytree(pair[1], teacher)
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    file = tmp_path / "recipe.yaml"
    text = RECIPE.format(run=tmp_path / "run", data=data, teacher=teacher)
    file.write_text(
        text.replace("probe_prompts: 4}", "probe_prompts: 4, lora: {rank: 4, targets: [q_proj, down_proj]}}")
    )
    uploaded: list[tuple[str, str]] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, exist_ok: f"https://hub/{name}")
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, **given: uploaded.append((given["repo_id"], given["folder_path"])),
    )
    names = "[teacher, student, responses, warmup, sft, minillm, evaluate, report]"
    training = "{max_steps: 2, per_device_train_batch_size: 4, use_cpu: true, learning_rate: 1e-2}"
    runner.run_recipe(load_recipe(file, [f"stages={names}", f"sft={training}", "push_to_hub=me/student"]))
    run = tmp_path / "run"
    for folder, before in (("warmed", "pruned"), ("sft", "pruned"), ("student", "warmed")):
        plain: Any = AutoModelForCausalLM.from_pretrained(run / folder, dtype=torch.float32)
        base: Any = AutoModelForCausalLM.from_pretrained(run / before, dtype=torch.float32)
        start = {name: value.clone() for name, value in base.state_dict().items()}
        adapted = PeftModel.from_pretrained(base, str(run / folder / "adapter"))
        moved = adapted.merge_and_unload().state_dict()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(
                value, moved[name], rtol=1e-2, atol=1e-3
            )  # where the base is bfloat16, so is this
            changed = not torch.equal(value, start[name])
            assert changed == any(part in name for part in ("q_proj", "down_proj")), (folder, name)
        card = (run / folder / "README.md").read_text()
        assert "license: apache-2.0" in card
        how = "fine-tuned on the answers in its training data" if folder == "sft" else "distilled from"
        assert f"2 layers of its teacher, {how}" in card
        assert "| minillm | " in card  # the results
        assert "rank: 4" in card
        assert "convert_hf_to_gguf.py" in card
        assert str(run) not in card
    assert uploaded == [("me/student", str(run / "student"))]
    assert (run / "student" / "generation_config.json").is_file()
    assert "chat_template" in "".join(path.name for path in (run / "student").iterdir())


def test_a_quantised_teacher_and_a_qlora_student(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (minillm-distill[quantized])")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i} w{i + 3}"}) + "\n" for i in range(10)))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=pair[1]))
    asked: list[str] = []
    original = quantization.quantization_config
    monkeypatch.setattr(load, "quantization_config", lambda bits, dtype: asked.append(bits) or original(bits, dtype))
    given = ["teacher.quantization=8bit", "student.lora.rank=4", "student.lora.quantization=4bit"]
    runner.run_recipe(load_recipe(file, given))
    assert (
        sorted(asked) == ["4bit"] * 2 + ["8bit"] * 3
    )  # the student is trained twice; the teacher also reads in evaluation
    student = load.load_model(tmp_path / "run" / "student")
    assert not is_quantized(student)
    assert (tmp_path / "run" / "report.html").is_file()
    for wrong, message in (
        (["teacher.shard=true", "rollout.teacher_mix=0"], "quantization with shard"),
        (["teacher.servers=[http://127.0.0.1:1]", "rollout.teacher_mix=0"], "quantization with servers"),
        (["teacher.quantization=2bit"], "Input should be '8bit' or '4bit'"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(file, [*given, *wrong])


def test_finished_stages_are_skipped_and_an_evaluated_model_is_not_evaluated_again(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = recipe.parent / "run" / "student" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    runner.run_recipe(load_recipe(recipe))
    assert capfd.readouterr().out.count("finished before") == 6  # all but the report
    assert weights.stat().st_mtime_ns == before


def test_other_settings_are_refused_and_redo_accepts_them(recipe: Path) -> None:
    with pytest.raises(
        RunError, match=r"stage minillm there was made with other settings: training.max_steps \(there 3, now 2\)"
    ):
        runner.run_recipe(load_recipe(recipe, ["training.max_steps=2"]))
    other = recipe.parent / "other.jsonl"
    other.write_text('{"prompt": "w1"}\n' * 10)
    with pytest.raises(RunError, match=r"stage student there was made with other settings: data\.train"):
        runner.run_recipe(load_recipe(recipe, [f"data.train={other}"]))
    runner.run_recipe(load_recipe(recipe, ["training.max_steps=2"]), "minillm", redo=True)
    state = json.loads((recipe.parent / "run" / "state.json").read_text())["stages"]
    assert state["minillm"]["settings"]["training.max_steps"] == 2
    assert "evaluate" not in state  # it was made from the student that is gone
    runner.run_recipe(load_recipe(recipe), "minillm", redo=True)


def test_redo_throws_away_what_is_named_and_nothing_else(recipe: Path) -> None:
    folder = recipe.parent / "run"
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(
        RunError, match=r"would throw away what builds on warmup: minillm\..* --stage warmup,minillm --redo"
    ):
        runner.run_recipe(load_recipe(recipe), "warmup", redo=True)
    everything = "teacher,student,responses,warmup,minillm"
    with pytest.raises(
        RunError, match=rf"would throw away {everything.replace(',', ', ')}\..* --stage {everything} --redo"
    ):
        runner.run_recipe(load_recipe(recipe), redo=True)
    done = command("run", str(recipe), "--stage", "responses", "--redo")
    assert done.returncode == 2
    assert "--redo would throw away what builds on responses: warmup, minillm. Nothing is deleted" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == kept
    runner.run_recipe(load_recipe(recipe), ["minillm", "warmup"], redo=True)
    again = {file for file, time in kept.items() if file.is_file() and file.stat().st_mtime_ns != time}
    changed = {str(file.relative_to(folder)).split("/")[0] for file in again}
    assert {"warmed", "student"} <= changed
    assert not changed & {"pruned", "responses.jsonl", "evaluate", "results.json"}


def test_a_stage_needs_what_it_builds_on(recipe: Path) -> None:
    with pytest.raises(RunError, match="stage minillm needs stage warmup, which is not finished"):
        runner.run_recipe(load_recipe(recipe, [f"run_dir={recipe.parent / 'fresh'}"]), "minillm")
    occupied = recipe.parent / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty, and not the directory of a minillm run"):
        runner.run_recipe(load_recipe(recipe, [f"run_dir={occupied}"]))


def test_another_tokenizer_is_refused_before_any_stage(recipe: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="id 32 is 'extra' for the student and None for the teacher"):
        runner.run_recipe(load_recipe(recipe, [f"student.source={tmp_path / 'other'}", f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def save_sliding(folder: Path) -> str:
    config = Gemma2Config(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
        sliding_window=16, max_position_embeddings=256, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return save(AutoModelForCausalLM.from_config(config), folder)


def test_what_a_model_cannot_do_is_refused_before_its_weights_load(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_model", lambda *_: pytest.fail("weights were loaded"))
    for setting in ("rollout.max_new_tokens", "responses.max_new_tokens", "evaluate.max_new_tokens"):
        with pytest.raises(
            ValueError,
            match=rf"data\.max_prompt_tokens \+ {setting} \(16 \+ 5000\) exceed the teacher's context of \d+",
        ):
            runner.run_recipe(load_recipe(recipe, [f"{setting}=5000"]))
    with pytest.raises(ValueError, match=r"objective\.language_model_block: 5000 exceeds the teacher's context of \d+"):
        runner.run_recipe(
            load_recipe(recipe, [f"data.text={recipe.parent / 'prompts.jsonl'}", "objective.language_model_block=5000"])
        )
    sliding = save_sliding(recipe.parent / "sliding")
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2, eos_token_id=1, pad_token_id=0)
    gpt2 = save(AutoModelForCausalLM.from_config(config), recipe.parent / "gpt2")
    with pytest.raises(
        ValueError, match=r"student\.lora\.quantization: bitsandbytes stores the layers of gpt2 the other way"
    ):
        runner.run_recipe(
            load_recipe(recipe, [f"student.source={gpt2}", "student.lora.rank=2", "student.lora.quantization=4bit"])
        )
    text = [
        f"data.text={recipe.parent / 'prompts.jsonl'}",
        "objective.language_model=1",
        "objective.language_model_distill=1",
    ]
    with pytest.raises(
        RecipeError, match=r"processes read different numbers of pieces of text.*language_model_distill: 0"
    ):
        load_recipe(recipe, ["teacher.shard=true", "rollout.teacher_mix=0", *text])
    quantised = ["student.lora.rank=2", "student.lora.quantization=4bit"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="a quantised student cannot be sharded over processes"):
        runner.run_recipe(load_recipe(recipe, quantised))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    sharded = recipe.parent / "deepspeed.json"
    sharded.write_text(json.dumps(deepspeed(3)))
    for section in ("sft", "warmup.training", "training"):
        with pytest.raises(ValueError, match="a quantised student cannot be sharded over processes"):
            runner.run_recipe(load_recipe(recipe, [*quantised, f"{section}.deepspeed={sharded}"]))
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(
            ValueError,
            match=r"training\.deepspeed: DeepSpeed is not installed \(pip install 'minillm-distill\[deepspeed\]'\)",
        ):
            runner.run_recipe(load_recipe(recipe, [f"training.deepspeed={sharded}"]))
    with monkeypatch.context() as on_a_cpu:
        on_a_cpu.setattr(torch.cuda, "is_available", lambda: False)
        on_a_cpu.setattr(vllm_engine, "vllm_is_installed", lambda: True)
        with pytest.raises(
            EngineError,
            match=r"rollout\.engine: vLLM on a CPU has no attention for heads of 4 .*set rollout\.engine=auto",
        ):
            runner.run_recipe(load_recipe(recipe, [f"teacher.source={sliding}", "rollout.engine=vllm"]))
    with pytest.raises(
        RecipeError, match=r"an engine in the training process has one GPU; start vllm serve --tensor-parallel-size N"
    ):
        load_recipe(recipe, ["rollout.engine=vllm", "rollout.engine_options={tensor_parallel_size: 16}"])
    with pytest.raises(RecipeError, match=r"targets: lm_head: an adapter on the output head is not scored"):
        load_recipe(recipe, ["student.lora.targets=[q_proj, lm_head]"])
    whole = ["student.source=" + load_recipe(recipe).teacher.first.source, "student.keep_layers=null"]
    for start in ([], whole):  # a pruned one too
        with pytest.raises(ValueError, match=r"student\.lora: Target modules .*c_attn.* not found"):
            runner.run_recipe(load_recipe(recipe, [*start, "student.lora.targets=[c_attn]"]))
    with monkeypatch.context() as bare:
        found = importlib.util.find_spec
        bare.setattr(
            importlib.util, "find_spec", lambda name, *given: None if name == "bitsandbytes" else found(name, *given)
        )
        for setting in ("teacher.quantization=4bit", "student.lora={rank: 2, quantization: 4bit}"):
            with pytest.raises(ValueError, match="4bit needs bitsandbytes, which is not installed"):
                runner.run_recipe(load_recipe(recipe, [*whole, setting]))
    with pytest.raises(DataError, match="nowhere"):  # the corpus too, though only the last stages read it
        runner.run_recipe(
            load_recipe(
                recipe, [f"data.text={{dataset: {recipe.parent / 'nowhere'}}}", "objective.language_model_block=32"]
            )
        )


def test_a_path_is_one_setting_however_it_is_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = f"run_dir={recipe.parent / 'run'}"
    teacher = load_recipe(recipe).teacher.first.source
    monkeypatch.chdir(tmp_path)
    for written in (os.path.relpath(teacher), teacher):
        RunState(load_recipe(recipe, [run_dir, f"teacher.source={written}"])).check("minillm")
    with pytest.raises(RunError, match=r"teacher\.source"):
        RunState(load_recipe(recipe, [run_dir, "teacher.source=another/teacher"])).check("minillm")


def test_accelerates_precision_is_a_stages_own(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minillm.run.stages.shared.fast_bfloat16", lambda: True)
    this = Run(load_recipe(recipe, [f"run_dir={tmp_path / 'run'}"]))
    assert not training_arguments(this, stage_named("minillm"), {"use_cpu": True}).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert training_arguments(this, stage_named("minillm"), {"use_cpu": True}).bf16


def test_errors_on_the_command_line_are_one_line(recipe: Path) -> None:
    done = command("run", str(recipe), "rollout.teacher_mix=7")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: command line: rollout.teacher_mix: Input should be less than 1 (given: 7)"
    done = command("run", str(recipe), "--stage", "slep")
    assert done.returncode == 2
    assert "--stage slep: no such stage; allowed: teacher, finetune" in done.stderr
    done = command("generate", str(recipe.parent / "nowhere"), "w1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    done = command("report", str(recipe.parent))
    assert done.returncode == 2
    assert "not the directory of a run" in done.stderr


def test_what_a_run_prints(recipe: Path) -> None:
    """Of a finished one: a line for each stage, a table that fits, and where the results are."""
    run = recipe.parent / "run"
    done = command("run", str(recipe), COLUMNS="60")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["[1/7] teacher: finished before", "[2/7] student: finished before"]
    assert max(map(len, lines[:-1])) <= 60
    assert len(lines) <= 26
    assert lines[-1] == f"Results: {run} (report.html, results.json, student)"
    assert done.stderr == ""
    done = command("run", str(recipe), "--quiet")
    assert done.stdout.splitlines() == lines[-1:]
    assert done.stderr == ""
    done = command("run", str(recipe), "--json")
    *stages, last = map(json.loads, done.stdout.splitlines())
    assert [event["stage"] for event in stages] == [
        "teacher",
        "student",
        "responses",
        "warmup",
        "minillm",
        "evaluate",
        "report",
    ]
    assert [event["status"] for event in stages] == ["finished before"] * 6 + ["finished"]
    assert (last["event"], last["status"], last["run_dir"]) == ("run", "finished", str(run))
    assert set(last["models"]) == {"teacher", "pruned", "warmed", "minillm"}
    assert (run / "logs" / "run.log").read_text().count("» [7/7] report") >= 3
    done = command("run", str(recipe), "--json", "training.learning_rate=1")
    assert json.loads(done.stdout)["status"] == "failed"
    assert "made with other settings" in done.stderr
    done = command("run", str(recipe), "--json", "--quiet")
    assert "give one of them" in done.stderr


def test_a_run_from_its_beginning_prints_little(pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"instruction": f"w{i}"}) + "\n" for i in range(10)))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(run=tmp_path / "run", data=tmp_path / "prompts.jsonl", teacher=pair[1]))
    done = command("run", str(file), "stages=[teacher,student,responses,warmup,minillm]")
    assert done.returncode == 0, done.stderr
    assert "{" not in done.stdout
    assert len(done.stdout.splitlines()) <= 13
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    assert "it/s" not in done.stdout + done.stderr
    assert "it/s" in (tmp_path / "run" / "logs" / "run.log").read_text()  # the log keeps what it hides


def test_help_and_generate(recipe: Path) -> None:
    done = command("run", "--help", COLUMNS="200")
    assert "accelerate launch" in done.stdout
    assert "--redo" in done.stdout
    done = command("generate", str(recipe.parent / "run" / "student"), "w1 w2", "--max-new-tokens", "5", "--seed", "3")
    assert done.returncode == 0, done.stderr
    again = command("generate", str(recipe.parent / "run" / "student"), "w1 w2", "--max-new-tokens", "5", "--seed", "3")
    assert done.stdout == again.stdout
