"""Every shipped family's recipe through all its stages, on tiny random models of its architecture: the same YAML with only sizes and
paths overridden (and, where a test compares closely, `bf16: false`)."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.glm import GlmConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.opt import OPTConfig
from transformers.models.qwen2 import Qwen2Config, Qwen2Tokenizer
from transformers.models.qwen3 import Qwen3Config

from minillm.data.sampling import Sampling
from minillm.models.families import KNOWN
from minillm.models.load import load_model, load_tokenizer
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import EngineSizing
from minillm.rollout.engines.choose import make_engine
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.rollout.engines.vllm_memory import NOT_ON_CPUS, vllm_is_installed
from minillm.run import runner
from minillm.run.context import Run
from minillm.run.recipe_file import load_recipe
from tests.conftest import CHAT, SPECIAL, save
from tests.run.test_recipes import FAMILIES as SHIPPED
from tests.run.test_recipes import commands

RECIPES = Path(__file__).parents[2] / "recipes"
COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.2,
}
BLOCKS: dict[str, Any] = COMMON | {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, Callable[[int], Any]]] = {
    "gpt2": ("gpt2/120m", lambda n: GPT2Config(**COMMON, n_positions=256, n_embd=64, n_layer=n, n_head=2)),
    "opt": (
        "opt/1.3b",
        lambda n: OPTConfig(
            **{key: value for key, value in COMMON.items() if key != "initializer_range"}, hidden_size=64, num_hidden_layers=n,
            num_attention_heads=2, ffn_dim=128, max_position_embeddings=256, word_embed_proj_dim=64, init_std=0.2,
        ),
    ),
    "llama": ("llama/7b", lambda n: LlamaConfig(**BLOCKS, num_hidden_layers=n, tie_word_embeddings=False)),
    "smollm2": ("smollm2/135m", lambda n: LlamaConfig(**BLOCKS, num_hidden_layers=n, tie_word_embeddings=True)),
    "qwen2": ("qwen2.5/0.5b", lambda n: Qwen2Config(**BLOCKS, num_hidden_layers=n, tie_word_embeddings=True)),
    "qwen3": ("qwen3/0.6b", lambda n: Qwen3Config(**BLOCKS, num_hidden_layers=n, tie_word_embeddings=True)),
    "gpt_neox": (
        "pythia/160m",
        lambda n: GPTNeoXConfig(
            **COMMON, hidden_size=64, num_hidden_layers=n, num_attention_heads=2, intermediate_size=128, max_position_embeddings=256
        ),
    ),
    "gemma2": ("gemma/gemma2-2b", lambda n: Gemma2Config(**BLOCKS, num_hidden_layers=n, query_pre_attn_scalar=32, sliding_window=64)),
    "gemma3": ("gemma/gemma3-270m", lambda n: Gemma3TextConfig(**BLOCKS, num_hidden_layers=n, query_pre_attn_scalar=32, sliding_window=64)),
}  # fmt: skip
QUICK = {"gpt2", "opt", "qwen2", "qwen3", "gpt_neox", "gemma3"}  # of the others, what differs is tested elsewhere too


def tiny(config: Any, seed: int, folder: Path) -> str:
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    save(model, folder)
    if config.model_type == "qwen2":
        # Transformers makes its tokenizer anew, of bytes, whatever was saved, and words it has none for are lost.
        signs = [*SPECIAL, "w", "Ġ", *"0123456789", *(f"<{i}>" for i in range(16))]
        vocab = {sign: i for i, sign in enumerate(signs)}
        bytewise: Any = Qwen2Tokenizer(
            vocab=vocab, merges=[], eos_token="<eos>", pad_token="<pad>", unk_token="<0>", chat_template=CHAT,
            additional_special_tokens=["<user>", "<bot>"],
        )  # fmt: skip
        bytewise.save_pretrained(folder)
    assert load_tokenizer(folder)("w1 w12")["input_ids"]
    return str(folder)


def run(
    family: str,
    folder: Path,
    *overrides: str,
    engine: str = "transformers",
    recipe: str | None = None,
    exact: bool = True,
) -> Run:
    """A recipe, by default its family's first, on models of the family in a folder.

    Args:
        exact: without bfloat16, whose rounding hides small faults.
    """
    first, config = FAMILIES[family]
    name = recipe or first
    small_teacher, small_student = config(3), config(2)
    if family == "qwen2":
        small_teacher.vocab_size, small_student.vocab_size = 44, 36  # widths differ inside the family
    teacher, student = tiny(small_teacher, 1, folder / "teacher"), tiny(small_student, 2, folder / "student")
    data = folder / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"instruction": f"w{i} w{i + 3}", "output": f"w{i} w4"}) + "\n" for i in range(16))
    )
    text = folder / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": " ".join(f"w{(i * j) % 28}" for j in range(20))}) + "\n" for i in range(8))
    )
    small = ["responses_per_update=null", "use_cpu=true", "disable_tqdm=true", *(["bf16=false"] if exact else [])]
    sizes = {
        part: ["num_train_epochs=1", "per_device_train_batch_size=8", *small]
        for part in ("finetune", "sft", "warmup.training")
    }
    sizes["training"] = [
        "max_steps=2",
        "per_device_train_batch_size=4",
        "eval_steps=1",
        "save_steps=1",
        "warmup_steps=0",
        *small,
    ]
    reads_text = load_recipe(RECIPES / f"{name}.yaml").data.text is not None
    loaded = load_recipe(
        RECIPES / f"{name}.yaml",
        [
            *(f"data.{key}={data}" for key in ("train", "heldout", "validation")), f"data.text={text if reads_text else 'null'}",
            "data.validation_limit=2",
            "data.limit=16", "data.max_prompt_tokens=96", f"run_dir={folder / 'run'}", f"teacher.source={teacher}",
            f"student.source={student}", "responses.max_new_tokens=6", "rollout.num_rollouts=8",
            "rollout.max_new_tokens=6", f"rollout.engine={engine}", "objective.language_model_block=16", "evaluate.seeds=[1, 2]",
            "evaluate.max_new_tokens=6", "evaluate.bootstrap=100",
            *(f"{section}.{setting}" for section, settings in sizes.items() for setting in settings), *overrides,
        ],
    )  # fmt: skip
    return runner.run_recipe(loaded)


def assert_all_stages_ran(run: Run) -> None:
    done = json.loads((run.dir / "state.json").read_text())["stages"]
    assert list(done) == run.recipe.stages
    assert all(entry["finished"] for entry in done.values())
    tuned = [(run.teacher, run.untuned)] if "finetune" in run.recipe.stages else []
    for folder, start in (*tuned, (run.warmed, run.start), (run.student, run.warmed)):
        before = AutoModelForCausalLM.from_pretrained(start).state_dict()
        after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert before.keys() == after.keys()
        assert any(not torch.equal(value, after[name]) for name, value in before.items())
    for name in ("student", "minillm"):
        sampled = json.loads((run.dir / "evaluate" / f"{name}.json").read_text())
        assert sampled["engine"] == run.recipe.rollout.engine
    results = json.loads((run.dir / "results.json").read_text())
    assert set(results["models"]) == {"teacher", "student", "warmed", "minillm"}
    for scores in results["models"].values():
        assert scores["reverse_kl"]["low"] <= scores["reverse_kl"]["mean"] <= scores["reverse_kl"]["high"]
    logged = json.loads((Path(run.student) / "trainer_state.json").read_text())["log_history"]
    mismatch = [entry["engine_mismatch"] for entry in logged if "engine_mismatch" in entry]
    assert mismatch
    assert max(mismatch) < (5e-2 if run.recipe.training["bf16"] else 1e-3), mismatch
    assert any("text_nll" in entry for entry in logged) == (run.recipe.data.text is not None)


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)
def test_a_familys_recipe_runs_all_its_stages(family: str, tmp_path: Path) -> None:
    assert_all_stages_ran(run(family, tmp_path))


def others() -> list[tuple[str, str]]:
    """The recipes that are not the first of their family, with it."""
    firsts = {name for name, _ in FAMILIES.values()}
    names = [str(path.relative_to(RECIPES).with_suffix("")) for path in SHIPPED]
    kinds = {"gemma3_text": "gemma3"}
    found = []
    for name in set(names) - firsts:
        kind = str(KNOWN[load_recipe(RECIPES / f"{name}.yaml").teacher.first.source]["model_type"])
        found.append((name, "smollm2" if name.startswith("smollm2") else kinds.get(kind, kind)))
    return sorted(found)


def test_the_recipe_of_a_glm_makes_its_student_and_trains_it(tmp_path: Path) -> None:
    kind: str = "glm"
    size: dict[str, Any] = BLOCKS | {"initializer_range": 0.2}
    teacher = tiny(GlmConfig(**size, num_hidden_layers=3), 1, tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"w{i}", "text": f"w{i} w4 w5 " * 4}) + "\n" for i in range(16)))
    recipe = load_recipe(
        RECIPES / "pretraining" / "glm4-1.9b.yaml",
        [
            f"run_dir={tmp_path / 'run'}",
            f"teacher.source={teacher}",
            *(f"data.{name}={data}" for name in ("train", "heldout", "validation", "text")),
            "student.shape={num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 1, num_key_value_heads: 1}",
            "pretrain.block=16",
            *(
                f"pretrain.training.{key}={value}"
                for key, value in {
                    "max_steps": 2,
                    "per_device_train_batch_size": 2,
                    "responses_per_update": 2,
                    "warmup_steps": 0,
                    "use_cpu": "true",
                    "bf16": "false",
                    "gradient_checkpointing": "false",
                }.items()
            ),
        ],
    )
    assert KNOWN["zai-org/glm-4-9b-hf"]["model_type"] == kind
    runner.run_recipe(recipe)
    trained = load_model(recipe.run_dir / "pretrained")
    assert (trained.config.model_type, trained.config.num_hidden_layers) == (kind, 2)


@pytest.mark.full
@pytest.mark.parametrize(("name", "family"), others())
def test_every_other_recipe_runs_all_its_stages(name: str, family: str, tmp_path: Path) -> None:
    assert_all_stages_ran(run(family, tmp_path, recipe=name, exact=False))


@pytest.mark.parametrize(
    ("family", "baseline"),
    [
        pytest.param(family, name, marks=() if (family, name) == ("gpt2", "sft") else pytest.mark.full)
        for family in ("gpt2", "qwen3")
        for name in ("sft", "kd", "seqkd", "gkd", "distillm")
    ],
)
def test_a_baselines_command_trains_and_scores_it(family: str, baseline: str, tmp_path: Path) -> None:
    named = f"recipes/{FAMILIES[family][0]}.yaml", f"run_dir=runs/{FAMILIES[family][0].replace('/', '-')}-{baseline}"
    [overrides] = [words[2:] for words in commands("minillm run ") if tuple(words[:2]) == named]
    done = run(family, tmp_path, *(text for text in overrides if "num_train_epochs" not in text))
    results = json.loads((done.dir / "results.json").read_text())["models"]
    last = {"sft": "sft", "kd": "warmed", "seqkd": "warmed"}.get(baseline, "minillm")
    assert set(results) == {"teacher", "student", "warmed", last} - ({"warmed"} if baseline == "sft" else set())
    folder = list(done.trained().values())[-1]
    trained, before = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, done.start))
    assert any(not torch.equal(value, trained[name]) for name, value in before.items())
    card = (Path(folder) / "README.md").read_text()
    how = {
        "sft": "fine-tuned on the answers in",
        "kd": "forward kl and 0.5 of",
        "seqkd": "fine-tuned on answers of",
        "gkd": "jensen shannon",
    }
    assert how.get(baseline, "skew reverse kl") in card
    assert ("### Response:" in card) == (family == "gpt2")  # asked as it was trained to be
    assert ('"role": "user"' in card) == (family == "qwen3")


@pytest.mark.full
@pytest.mark.parametrize(("name", "family"), [*((name, family) for family, (name, _) in FAMILIES.items()), *others()])
def test_every_recipe_with_lora(name: str, family: str, tmp_path: Path) -> None:
    """With the language-model term where its recipe is without, and without it where it is with."""
    reads_text = load_recipe(RECIPES / f"{name}.yaml").data.text is not None
    other = "null" if reads_text else str(tmp_path / "text.jsonl")
    done = run(family, tmp_path, "student.lora.rank=4", f"data.text={other}", recipe=name)
    assert_all_stages_ran(done)
    assert (Path(done.student) / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.full
@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name != "gpt2"]
)  # whose layers bitsandbytes does not take
def test_with_qlora_and_a_quantised_teacher(family: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (minillm-distill[quantized])")
    lora = ("student.lora.rank=4", "student.lora.quantization=4bit", "teacher.quantization=8bit")
    done = run(family, tmp_path, *lora)
    assert_all_stages_ran(done)
    assert (Path(done.student) / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(not vllm_is_installed(), reason="vLLM is not installed")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_ON_CPUS])
def test_on_vllm(family: str, tmp_path: Path) -> None:
    assert_all_stages_ran(run(family, tmp_path, engine="vllm", exact=False))


@pytest.mark.parametrize("family", sorted(NOT_ON_CPUS))
def test_what_vllm_would_change_on_a_cpu_transformers_samples(family: str, tmp_path: Path) -> None:
    folder = tiny(FAMILIES[family][1](2), 1, tmp_path / "model")
    engine = make_engine(
        RolloutConfig(engine="auto"), folder, EngineSizing(32, torch.float32), model=load_model(folder)
    )
    assert isinstance(engine, TransformersEngine)


@pytest.mark.full
@pytest.mark.vllm
@pytest.mark.skipif(
    not vllm_is_installed() or torch.cuda.is_available(), reason="vLLM is not installed, or not for CPUs"
)
@pytest.mark.parametrize("family", sorted(NOT_ON_CPUS))
def test_vllm_leaves_no_model_of_them_to_transformers(family: str, tmp_path: Path) -> None:
    """When it does, they belong to the others. In a process of its own, which it spoils."""
    folder = tiny(FAMILIES[family][1](2), 1, tmp_path / "model")
    process = multiprocessing.get_context("spawn").Process(target=spoil, args=(folder,))
    process.start()
    process.join(300)
    assert process.exitcode == 0


def spoil(folder: str) -> None:
    engine = VLLMEngine(folder, EngineSizing(32, torch.float32))
    assert engine.generate([[2, 3]], Sampling(4, (1,), 32), [0])
    with pytest.raises(AssertionError, match="vLLM config is not set"):
        load_model(folder)
