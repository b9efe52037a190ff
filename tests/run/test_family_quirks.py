"""Each family's recipe at what is peculiar about its published models: tokenizer, special tokens, windows, caps, padding.

With MINILLM_FAMILY_TABLE=FILE the rows of the table in eval/README.md are written to a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.models.configs import text_config
from minillm.models.load import load_tokenizer
from minillm.rollout.engines.vllm_memory import NOT_ON_CPUS, vllm_is_installed
from minillm.run import runner
from minillm.run.context import Run
from minillm.run.recipe_file import load_recipe
from tests.run.family_quirks import FAMILIES, Quirks, save_model

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = {"gemma3", "llama", "qwen2"}
ON_VLLM = [name for name in FAMILIES if {"pythia": "gpt_neox"}.get(name, name) not in NOT_ON_CPUS]


def run_chain(name: str, folder: Path, *overrides: str, engine: str = "transformers") -> Run:
    """The recipe of a family, through all stages, on small models; a third of the prompts is longer than the windows."""
    quirks = FAMILIES[name]
    # The student's head is narrower than the teacher's, but for what their tokenizers have.
    teacher = save_model(quirks, folder / "teacher", layers=3, seed=1)
    student = save_model(quirks, folder / "student", layers=2, seed=2, padding=quirks.padding // 2)
    data = folder / "data.jsonl"
    rows = [
        {"instruction": " ".join(f"w{(i * j) % 28}" for j in range(1 + 3 * (i % 8))), "output": f"w{i}"}
        for i in range(16)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": row["instruction"] + " w5 w6 w7"}) + "\n" for row in rows))
    small = ["responses_per_update=null", "use_cpu=true", "disable_tqdm=true", "bf16=false"]
    sections = {
        part: ["num_train_epochs=1", "per_device_train_batch_size=8", *small]
        for part in ("finetune", "sft", "warmup.training")
    }
    sections["training"] = [
        "max_steps=2", "per_device_train_batch_size=4", "eval_steps=1", "save_steps=1", "warmup_steps=0", *small,
    ]  # fmt: skip
    reads_text = load_recipe(RECIPES / f"{quirks.recipe}.yaml").data.text is not None
    template = (
        []
        if quirks.template or load_recipe(RECIPES / f"{quirks.recipe}.yaml").data.template != "chat"
        else ["data.template=alpaca"]
    )
    return runner.run_recipe(
        load_recipe(
            RECIPES / f"{quirks.recipe}.yaml",
            [
                *(f"data.{key}={data}" for key in ("train", "heldout", "validation")),
                f"data.text={text if reads_text else 'null'}", "data.validation_limit=2", "data.limit=16",
                "data.max_prompt_tokens=200", f"run_dir={folder / 'run'}", f"teacher.source={teacher}",
                f"student.source={student}", "responses.max_new_tokens=6", "rollout.num_rollouts=8",
                "rollout.max_new_tokens=6", f"rollout.engine={engine}", "objective.language_model_block=16",
                "evaluate.seeds=[1, 2]", "evaluate.max_new_tokens=6", "evaluate.bootstrap=100", *template,
                *(f"{section}.{setting}" for section, settings in sections.items() for setting in settings), *overrides,
            ],
        )
    )  # fmt: skip


def check(name: str, run: Run) -> float:
    """What must hold of a run of a family's models; returns the greatest engine mismatch."""
    quirks = FAMILIES[name]
    tokenizer, special = run.conventions.tokenizer, quirks.special
    assert list(run.conventions.eos_ids) == quirks.all_ends
    assert run.conventions.vocab_size == len(tokenizer)
    bos = [] if quirks.bos is None else [special.index(quirks.bos)]
    # The paper's recipes warm up on the data's answers and have no stage `responses`; the others have no references to
    # train on but what that stage writes.
    samples = run.dir / "responses.jsonl"
    assert samples.is_file() == ("responses" in run.recipe.stages)
    written = [json.loads(line) for line in samples.read_text().splitlines()] if samples.is_file() else []
    rows = [*written, *run.references]
    prompts = [
        *(row["prompt_ids"] for row in rows),
        *(p.ids for p in run.train_prompts),
        *(p.ids for p in run.heldout_prompts),
    ]
    template = quirks.template if run.recipe.data.template == "chat" else None
    writes = quirks.adds_bos if template is None else "bos_token" in template
    for ids in prompts:
        if writes:
            assert ids[:1] == bos
            assert ids[1:].count(bos[0]) == 0
        elif bos and str(quirks.bos) not in (template or ""):
            assert bos[0] not in ids
    assert max(map(len, prompts)) > 32 > 16  # longer than the windows; with a template none is shorter
    for row in rows:
        assert all(0 <= token < len(tokenizer) for token in row["response_ids"])
    for ids in (row["response_ids"] for row in rows):
        assert ids[-1] in quirks.all_ends or len(ids) == 6
        assert not set(ids[:-1]) & set(quirks.all_ends)
    for stage_folder in {run.teacher, run.warmed, run.student}:
        saved: Any = AutoTokenizer.from_pretrained(stage_folder)
        assert saved("w1 w12")["input_ids"] == load_tokenizer(run.untuned)("w1 w12")["input_ids"]
    student = AutoModelForCausalLM.from_pretrained(run.student)
    assert student.config.get_text_config().vocab_size == text_config(run.start).vocab_size
    ends = student.generation_config.eos_token_id
    assert sorted([ends] if isinstance(ends, int) else ends) == quirks.all_ends
    before = AutoModelForCausalLM.from_pretrained(run.warmed).state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    logged = json.loads((Path(run.student) / "trainer_state.json").read_text())["log_history"]
    mismatch = max(entry["engine_mismatch"] for entry in logged if "engine_mismatch" in entry)
    assert mismatch < 1e-3
    results = json.loads((run.dir / "results.json").read_text())["models"]
    assert set(results) == {"teacher", "student", "warmed", "minillm"}
    write_row(name, quirks, run, mismatch)
    return mismatch


def write_row(name: str, quirks: Quirks, run: Run, mismatch: float) -> None:
    """A row of the table in eval/README.md."""
    if file := os.environ.get("MINILLM_FAMILY_TABLE"):
        begins = f"`{quirks.bos}`" if quirks.adds_bos else "none"
        ends = ", ".join(f"`{quirks.special[token]}`" for token in quirks.all_ends)
        engine = json.loads((run.dir / "evaluate" / "minillm.json").read_text())["engine"]
        with Path(file).open("a", encoding="utf-8") as opened:
            opened.write(
                f"| {name} | {run.recipe.data.template}, {engine} | {mismatch:.0e} | {begins} | {ends} | "
                f"{quirks.padding} | {', '.join(quirks.facts)} |\n"
            )


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)
def test_a_familys_chain_at_what_is_peculiar_about_it(name: str, tmp_path: Path) -> None:
    check(name, run_chain(name, tmp_path))


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
@pytest.mark.parametrize("name", ON_VLLM)
def test_the_same_with_vllm(name: str, tmp_path: Path) -> None:
    check(name, run_chain(name, tmp_path, engine="vllm"))


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_with_lora(name: str, tmp_path: Path) -> None:
    run = run_chain(name, tmp_path, "student.lora.rank=4")
    check(name, run)
    assert (Path(run.student) / "adapter" / "adapter_model.safetensors").is_file()
