"""A teacher that is a GGUF file, in a run: what its header says is known before the first stage."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from minillm.errors import MinillmError
from minillm.models import gguf
from minillm.models.load import load_tokenizer
from minillm.run import runner
from minillm.run.context import Run
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import load_recipe
from tests.gguf_files import write_gguf
from tests.run.tiny_recipe import RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "teacher.gguf", add_bos_token=True, add_space_prefix=False, eot_token_id=4)
    data = tmp_path / "prompts.jsonl"
    rows = [{"instruction": text, "output": text[::-1]} for text in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "hi")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=tmp_path / "teacher.gguf"))
    return file


def loaded(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, ["data.template=plain", *overrides])


def other_blocks(config: Any) -> Any:
    return SimpleNamespace(
        config=config, named_modules=lambda: [], get_decoder=lambda: SimpleNamespace(modules=lambda: [])
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.keep_layers=4"], r"student\.keep_layers: must be between 2 and the teacher's 3 layers"),
        (["rollout.max_new_tokens=250"], r"exceed the teacher's context of 256 tokens"),
        (["teacher.quantization=8bit"], r"teacher\.quantization: .*teacher\.gguf is a GGUF file"),
        (["student.lora.targets=[no_such_layer]"], r"student\.lora: .*no_such_layer"),
        (["student.source=teacher.gguf"], r"student\.source: .*teacher\.gguf is a GGUF file, which is not trained"),
        (
            ["student.lora.rank=600", "rollout.lora=adapter", "rollout.teacher_mix=0", "rollout.engine=vllm"],
            r"rollout\.lora: adapter: vLLM takes ranks up to 512, not 600",
        ),
    ],
)
def test_what_its_header_excludes_is_refused_before_the_first_stage(
    overrides: list[str], message: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minillm.rollout.engines.vllm.vllm_is_installed", lambda: True)
    with pytest.raises(MinillmError, match=message):
        runner.run_recipe(loaded(recipe, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_mixture_that_no_engine_makes_is_refused_before_the_first_stage(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def why_not(student: Any, teacher: Any, gpu: bool) -> str:
        seen.append((student.num_hidden_layers, teacher.num_hidden_layers))
        return "these two cannot be mixed"

    monkeypatch.setattr("minillm.rollout.engines.vllm.vllm_is_installed", lambda: True)
    monkeypatch.setattr("minillm.rollout.engines.vllm.why_not_mixed", why_not)
    with pytest.raises(MinillmError, match="these two cannot be mixed"):
        runner.run_recipe(loaded(recipe, "rollout.engine=vllm", "rollout.teacher_mix=0.2"))
    assert seen == [(3, 3)]
    assert not (tmp_path / "run").exists()


def test_blocks_that_are_not_found_are_refused_before_the_first_stage(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = SimpleNamespace(from_config=other_blocks)
    monkeypatch.setattr("minillm.models.pruning.depth.AutoModelForCausalLM", found)
    with pytest.raises(MinillmError, match="no list of 3 decoder blocks was found"):
        Run(loaded(recipe))
    Run(loaded(recipe, "stages=[teacher]"))
    assert not (tmp_path / "run").exists()


def test_a_run_reads_the_file_once_and_every_stage_begins_with_bos(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            read.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(gguf, "convert_gguf_tokenizer", counted("tokenizer", gguf.convert_gguf_tokenizer))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted("model", AutoModelForCausalLM.from_pretrained))
    settings = ["rollout.teacher_mix=0.2", "objective.preset=recommended"]
    done = runner.run_recipe(loaded(recipe, *settings))
    assert read.count("tokenizer") == 1
    rows = [json.loads(line) for line in (done.dir / "responses.jsonl").read_text().splitlines()]
    asked = json.loads((done.dir / "evaluate" / "prompts.json").read_text())
    assert len(asked) == 8
    for ids in (*(row["prompt_ids"] for row in rows), *(prompt.ids for prompt in done.heldout_prompts)):
        assert (ids[0], ids.count(1)) == (1, 1)
    for folder in (done.teacher, done.start, done.warmed, done.student):
        assert load_tokenizer(folder)("ab")["input_ids"] == done.conventions.tokenizer("ab")["input_ids"]
        assert json.loads((Path(folder) / "generation_config.json").read_text())["eos_token_id"] == [2, 4]
    logged = json.loads((Path(done.student) / "trainer_state.json").read_text())["log_history"]
    assert max(entry["engine_mismatch"] for entry in logged if "engine_mismatch" in entry) < 1e-4
    # The same run again converts the tokenizer, and leaves the weights alone.
    read.clear()
    runner.run_recipe(loaded(recipe, *settings))
    assert read == ["tokenizer"]
