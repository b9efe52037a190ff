"""A recipe with several teachers on tiny models: every stage, what is refused, and what a change of settings means."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minillm.data.files import read_jsonl
from minillm.data.seeding import seed_of
from minillm.errors import DataError, InputError, RecipeError, RunError
from minillm.models import load
from minillm.run import runner
from minillm.run.context import Run
from minillm.run.directory import RunState
from minillm.run.experiments.compare import compare
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import plan
from minillm.run.recipe_file import load_comparison, load_recipe
from minillm.run.stages import stage_named
from minillm.teacher.config import TeachersConfig
from tests.conftest import save, tiny_llama, tiny_tokenizer
from tests.run.tiny_recipe import RECIPE

NAMES = ["math", "chat", "chat"]
COLUMNS = "{{file: {data}, columns: {{teacher: domain}}}}"
TEXT = RECIPE.replace(
    "{{train: {data}, heldout: {data}, max", f"{{{{train: {COLUMNS}, heldout: {COLUMNS}, max"
).replace("teacher: {{source: {teacher}}}", "teacher: {{math: {{source: {teacher}}}, chat: {{source: {chat}}}}}")
MIX = "rollout: {{engine: transformers, "


def rows(column: str = "domain") -> list[dict[str, Any]]:
    return [{"instruction": f"w{i} w{i + 3}", "output": f"w{i}", column: NAMES[i % 3]} for i in range(10)]


def write(file: Path, data: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    return file


@pytest.fixture(scope="module")
def file(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose teachers are `pair`'s and another of another width."""
    root = tmp_path_factory.mktemp("several")
    chat = save(tiny_llama(5, width=96, scale=0.4), root / "chat")
    data = write(root / "prompts.jsonl", rows())
    text = TEXT.replace(MIX, MIX + "teacher_mix: 0, ")
    (root / "recipe.yaml").write_text(text.format(run=root / "run", data=data, teacher=pair[1], chat=chat))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def run(file: Path) -> Path:
    """The folder of the finished run, validated in training, with the `sft` stage beside the others."""
    validated = "{max_steps: 2, per_device_train_batch_size: 4, use_cpu: true, eval_strategy: steps, eval_steps: 1}"
    stages = "[teacher, student, responses, warmup, sft, minillm, evaluate, report]"
    column = f"data.validation={{file: {file.parent / 'prompts.jsonl'}, columns: {{teacher: domain}}}}"
    words = [f"sft={validated}", f"training={validated}", f"stages={stages}", column]
    runner.run_recipe(load_recipe(file, words))
    return file.parent / "run"


def test_a_run_leaves_the_results_of_each_teacher(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert list(results["models"]) == ["teacher math", "teacher chat", "pruned", "warmed", "sft", "minillm"]
    for name, scores in results["models"].items():
        assert (scores["reverse_kl"]["mean"] == 0) == name.startswith("teacher"), name
    for name in ("math", "chat"):
        answered = {row["row"] for row in read_jsonl(run / "evaluate" / f"teacher {name}.jsonl")}
        assert answered == {i for i in range(10) if NAMES[i % 3] == name}
    assert {row["row"] for row in read_jsonl(run / "evaluate" / "minillm.jsonl")} == set(range(10))
    assert "w0 w3" in (run / "report.html").read_text()
    responses = read_jsonl(run / "responses.jsonl")
    assert [row["teacher"] for row in responses] == [NAMES[row["row"] % 3] for row in responses]
    assert [row["teacher"] for row in responses] == ["math"] * 4 + ["chat"] * 6
    for folder in ("sft", "student"):
        state = json.loads((run / folder / "trainer_state.json").read_text())
        assert sum("eval_reverse_kl" in entry for entry in state["log_history"]) == 2
    card = (run / "student" / "README.md").read_text()
    assert f"and `{run.parent / 'chat'}` by minimising" in card
    assert "see that of `" in card


def test_the_teacher_of_each_row_answers_it(run: Path, file: Path) -> None:
    """Each response is what its own teacher samples with the row's seed, and no other."""
    this = Run(load_recipe(file))
    responses = read_jsonl(run / "responses.jsonl")
    differing = 0
    for name, folder in this.teachers.items():
        engine = this.engine(folder, 8)
        seeds = [seed_of(0, "responses", row["row"], 0) for row in responses]
        sampled = engine.generate([row["prompt_ids"] for row in responses], this.sampling(8, 1.0), seeds)
        for row, rollout in zip(responses, sampled, strict=True):
            if row["teacher"] == name:
                assert rollout.response_ids == row["response_ids"]
            else:
                differing += rollout.response_ids != row["response_ids"]
        engine.close()
    assert differing > 5


def test_responses_of_another_run_are_routed_too(run: Path, file: Path, tmp_path: Path) -> None:
    given = run / "responses.jsonl"
    words = [f"responses.file={given}", "stages=[teacher, student, warmup]"]
    runner.run_recipe(load_recipe(file, [*words, f"run_dir={tmp_path / 'a'}"]))
    one, other = (load.load_model(folder / "warmed").state_dict() for folder in (run, tmp_path / "a"))
    for name, value in one.items():  # the same responses, in the same order
        assert torch.equal(value, other[name]), name
    plain = write(tmp_path / "plain.jsonl", [{**row, "teacher": None} for row in read_jsonl(given)])
    with pytest.raises(DataError, match=r"plain\.jsonl:1: teacher names none of math, chat"):
        Run(load_recipe(file, [words[1], f"responses.file={plain}", f"run_dir={tmp_path / 'b'}"]))


def test_heldout_rows_without_the_column_leave_the_divergence_out_and_say_so(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = write(tmp_path / "plain.jsonl", [{"instruction": f"w{i}"} for i in range(4)])
    caplog.set_level(logging.WARNING)
    words = [f"data.heldout={plain}", "stages=[teacher, student, evaluate]"]
    run_dir = runner.run_recipe(load_recipe(file, [*words, f"run_dir={tmp_path / 'run'}"])).dir
    assert caplog.text.count("KL(q‖p) is left out") == 1
    results = json.loads((run_dir / "results.json").read_text())
    assert list(results["models"]) == ["teacher math", "teacher chat", "pruned"]
    for name, scores in results["models"].items():
        assert set(scores) == {"rouge_l", "finished", "length"}
        assert len(read_jsonl(run_dir / "evaluate" / f"{name}.jsonl")) == 8


def test_overrides_reach_each_teacher_and_faults_have_their_place(file: Path) -> None:
    recipe = load_recipe(file, ["teacher.math.source=org/other", "teacher.code.source=org/code"])
    assert isinstance(recipe.teacher, TeachersConfig)
    assert recipe.teacher.first.source == "org/other"
    assert list(recipe.teacher.by_name) == ["math", "chat", "code"]
    for word, message in (
        ("teacher.math.sorce=x", r"command line: teacher\.math\.sorce: unknown key; did you mean source\?"),
        ("teacher.code.quantization=4bit", r"command line: teacher\.code\.source: needed, and not given"),
        ("teacher.math.quantization=2bit", r"command line: teacher\.math\.quantization: Input should be '8bit' or"),
        ("teacher.source=x", r"command line: teacher: math, chat beside source: .* leave out one of the two"),
        ("teacher={a b: {source: x}}", "teacher: 'a b': the name of a teacher consists of letters"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(file, [word])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.teacher_mix=0.2"], r"rollout\.teacher_mix with several teachers: .*: set 0"),
        (
            ["data.text={dataset: some}", "objective.language_model=1", "objective.language_model_distill=0.5"],
            r"objective\.language_model_distill with several teachers: .*: set 0",
        ),
        (["teacher.math.shard=true"], r"teacher: math\.shard with several teachers"),
        (["teacher.chat.adapter=some/adapter"], r"teacher: chat\.adapter with several teachers: merge it beforehand"),
    ],
)
def test_what_needs_one_teacher_is_refused_in_a_recipe(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(file, words)


def test_what_a_run_refuses_before_weights_load(
    file: Path, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load, "load_model", lambda *_: pytest.fail("weights were loaded"))
    new = f"run_dir={tmp_path / 'run'}"

    def data(name: str, changed: dict[int, dict[str, Any]], where: str = "train") -> str:
        table = [{**row, **changed.get(i, {})} for i, row in enumerate(rows())]
        return f"data.{where}={{file: {write(tmp_path / name, table)}, columns: {{teacher: domain}}}}"

    bare = write(tmp_path / "bare.jsonl", [{"instruction": "w1", "output": "w2"}])
    for word, message in (
        (data("none.jsonl", {3: {"domain": None}}), r"none\.jsonl:4: domain is missing: .*one of math, chat$"),
        (data("code.jsonl", {3: {"domain": "code"}}), r"code\.jsonl:4: domain is 'code': .*one of math, chat$"),
        (f"data.train={bare}", r"bare\.jsonl:1: teacher is missing: .*; columns: \{teacher: …\} names another column"),
        (f"data.validation={bare}", r"bare\.jsonl:1: teacher is missing"),
        (data("held.jsonl", {3: {"domain": None}}, "heldout"), r"held\.jsonl:4: domain is missing"),
        ("stages=[teacher, finetune]", r"stages: finetune trains a single teacher: fine-tune each of several"),
    ):
        with pytest.raises((DataError, InputError), match=message):
            runner.run_recipe(load_recipe(file, [new, word]))
    with pytest.raises(InputError, match="finetune trains a single teacher"):
        runner.run_recipe(load_recipe(file, [new, "stages=[minillm]"]), "finetune")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    other = save(tiny_llama(1, vocab=33), tmp_path / "other")
    tokenizer.save_pretrained(other)
    for word in (f"teacher.chat.source={other}", f"teacher.more.source={other}"):
        with pytest.raises(ValueError, match=r"student and teacher (chat|more) have different tokenizers: id 32"):
            Run(load_recipe(file, [new, word]))
    short = save(tiny_llama(1), tmp_path / "short")
    config = json.loads((Path(short) / "config.json").read_text())
    (Path(short) / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    with pytest.raises(ValueError, match=r"exceed the teacher chat's context of 16 tokens"):
        Run(load_recipe(file, [new, f"teacher.chat.source={short}"]))
    monkeypatch.setattr("minillm.run.checks.find_gguf", lambda source: source == pair[1])
    with pytest.raises(InputError, match=r"teacher math: .* is a GGUF file, which is read with a single teacher alone"):
        Run(load_recipe(file, [new]))
    monkeypatch.setattr("minillm.run.checks.find_gguf", lambda source: None)
    caplog.set_level(logging.WARNING)
    Run(load_recipe(file, [new, f"teacher.code.source={pair[0]}"]))
    assert "no row names teacher code" in caplog.text


def test_one_teacher_passes_the_column_over_in_silence(
    file: Path, pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = tmp_path / "one.yaml"
    data = write(tmp_path / "prompts.jsonl", rows("teacher"))
    one.write_text(RECIPE.format(run=tmp_path / "run", data=data, teacher=pair[1]))
    caplog.set_level(logging.WARNING)
    this = Run(load_recipe(one))
    assert "teacher" not in caplog.text
    assert all("teacher" not in row for row in this.references)


def test_a_changed_teacher_makes_stages_stale_and_changed_servers_do_not(run: Path, file: Path) -> None:
    recorded = ["training.max_steps=2", "training.eval_strategy=steps", "training.eval_steps=1"]
    column = f"data.validation={{file: {file.parent / 'prompts.jsonl'}, columns: {{teacher: domain}}}}"
    words = [column, "training={max_steps: 2, per_device_train_batch_size: 4, use_cpu: true}", *recorded]
    RunState(load_recipe(file, words)).check("minillm")
    served = ["teacher.math.servers=[http://127.0.0.1:1]", "teacher.chat.top_k=3"]
    RunState(load_recipe(file, [*words, *served])).check("minillm")
    for change, named in (("source=org/x", "source"), ("quantization=4bit", "quantization")):
        with pytest.raises(RunError, match=rf"made with other settings: teacher\.chat\.{named}"):
            RunState(load_recipe(file, [*words, f"teacher.chat.{change}"])).check("minillm")


def test_the_plan_counts_all_teachers_and_the_heads_of_served_ones(file: Path) -> None:
    machine = Machine(gpu=False, bf16=False, vllm=False)
    single = [yaml.safe_dump({"source": folder}).strip() for folder in teachers_of(file)]
    alone = [plan(load_recipe(file, [f"teacher={{{text}}}"]), machine) for text in single]
    both = plan(load_recipe(file), machine)
    parts = [{phase.name: phase.parts for phase in each.phases} for each in (both, *alone)]
    for name in ("warmup", "minillm: update", "evaluate: student"):
        assert parts[0][name]["teacher"] == parts[1][name]["teacher"] + parts[2][name]["teacher"]
    names = [phase.name for phase in both.phases]
    assert [name for name in names if "teacher" in name] == [
        "responses: teacher math",
        "responses: teacher chat",
        "evaluate: teacher math",
        "evaluate: teacher chat",
    ]
    served = plan(load_recipe(file, ["teacher.chat.servers=[http://127.0.0.1:1]"]), machine)
    found = next(phase.parts for phase in served.phases if phase.name == "warmup")
    assert found["teacher"] == parts[1]["warmup"]["teacher"]
    assert found["teacher's head"] == 32 * 96 * 4
    flops = [next(phase.flops for phase in each.phases if phase.name == "minillm: rollouts") for each in (both, *alone)]
    assert flops[1] != flops[2]


def teachers_of(file: Path) -> list[str]:
    return [teacher.source for teacher in load_recipe(file).teacher.by_name.values()]


def test_a_comparison_has_one_teacher(file: Path, tmp_path: Path) -> None:
    shared = yaml.safe_load(file.read_text()) | {"run_dir": str(tmp_path / "compare")}
    shared.pop("stages", None)
    method = {"stage": "minillm"}
    text = {
        "recipe": shared,
        "methods": {"minillm": method},
        "baseline": "minillm",
        "suite": {"sets": {"a": {"file": str(file.parent / "prompts.jsonl")}}},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(RecipeError, match=r"recipe\.teacher: a comparison has one teacher for all methods"):
        compare(load_comparison(tmp_path / "compare.yaml"))


def test_the_stage_that_trains_a_teacher_refuses_several(file: Path) -> None:
    recipe = load_recipe(file)
    assert "tuned/" in str(stage_named("finetune").refusal(recipe, 1))
