"""Stage `logits`: the teacher's distributions at every token of the text are written to disk, a few tokens each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minillm.config import LocalPath, Positive, Section
from minillm.errors import InputError
from minillm.run.stages.stage import Stage
from minillm.teacher.config import SamplerConfig

if TYPE_CHECKING:
    from minillm.data.text import TextBlocks
    from minillm.run.context import Run
    from minillm.run.plan.phases import Phase, Planner
    from minillm.run.recipe import Recipe
    from minillm.teacher.store import StoreFacts


class LogitsConfig(Section):
    """A store of the teacher's distributions on `data.text`, for the pretrain stage."""

    folder: LocalPath | None = None
    """The store of another run with the same teacher and text, instead of `logits/` in the run directory. It is
    completed where a block is missing."""
    sampler: SamplerConfig = SamplerConfig()
    """Which tokens of a distribution are kept."""
    seed: int | None = None
    """Seed of the draws; by default that of the recipe. With a seed of its own, one store serves trainings with several
    seeds. Text of more than 20,000 rows is packed in an order that the recipe's seed decides, so there it has to be
    that one."""
    draws: Positive = 1
    """Independent samples of each block. Pass i over the text reads number i mod `draws`, so that several passes do not
    repeat the same noise."""


class Logits(Stage):
    name = "logits"
    fields = {"logits": (LogitsConfig, LogitsConfig(), "The teacher's distributions on disk, for the pretrain stage.")}
    needs = ("finetune",)
    reads = ("data.text", "logits", "pretrain.block", "pretrain.temperature", "teacher.quantization", "seed")
    default = False
    in_every_process = True

    def refusal(self, recipe: Recipe, processes: int) -> str | None:
        if recipe.data.text is None:
            return "stages: logits needs data.text, the text that the teacher reads"
        if recipe.teacher.several:
            return "stages: logits writes the distributions of a single teacher: make a run for each of several"
        return None

    def check_rows(self, run: Run) -> None:
        _ = run.texts

    def run(self, run: Run) -> None:
        import torch

        from minillm.models.device import device, working_dtype
        from minillm.models.head import keeps_sequences_apart
        from minillm.models.load import load_model
        from minillm.run.processes import launched, print_progress, rank, select_device, world_size
        from minillm.teacher.local import LocalTeacher
        from minillm.teacher.store import StoreWriter, summary
        from minillm.teacher.store_writing import Drawing, write_missing

        if refusal := self.refusal(run.recipe, 1):
            raise InputError(refusal)
        recipe, share = run.recipe, (rank(), world_size())
        select_device()
        bits = recipe.teacher.first.quantization
        dtype = working_dtype() if torch.cuda.is_available() else torch.float32
        model = load_model(run.teacher, dtype, bits)
        teacher = LocalTeacher(model if bits else model.to(device()))  # pyright: ignore[reportArgumentType]
        text, facts = text_of(run, several=keeps_sequences_apart(model)), facts_of(run)
        text.require(text.each if "pretrain" in recipe.stages else 1)  # before hours are spent on it
        blocks = range(len(text)) if text.is_whole else range(_updates(run) * text.each)
        temperature, end = recipe.pretrain.temperature, run.conventions.tokenizer.eos_token_id
        drawing = Drawing(recipe.logits.sampler, temperature, facts.vocab_size, facts.seed, end)
        writer = StoreWriter(store_folder(run), facts)
        there = [block for block in blocks if text.is_whole or text.has(block)]
        for draw in range(recipe.logits.draws):
            write_missing(writer, teacher, text, there, draw, drawing, share)
        if share[1] > 1:
            writer.wait(there, recipe.logits.draws, lambda: launched(run))
        if share[0]:
            return
        for draw in range(recipe.logits.draws):  # a torn shard that another process was to write again
            write_missing(writer, teacher, text, there, draw, drawing)
        found = summary(store_folder(run))
        print_progress(
            f"  {found['tokens']:,.0f} tokens, {found['bytes'] / 1e6:.1f} MB, {found['bytes_per_token']:.1f} bytes a "
            f"token; the kept tokens have {found['kept_mass']:.1%} of the probability"
        )

    def phases(self, planner: Planner) -> list[Phase]:
        from minillm.run.plan.pretraining import logits_phases

        return logits_phases(planner)

    def has_made_something(self, run_dir: Path) -> bool:
        return (run_dir / "logits" / "store.json").is_file()

    def discard(self, run: Run, requested: bool) -> None:
        import shutil

        shutil.rmtree(run.dir / "logits", ignore_errors=True)


def store_folder(run: Run) -> Path:
    """The folder of the store that a run writes and reads."""
    return run.recipe.logits.folder or run.dir / "logits"


def _updates(run: Run) -> int:
    from minillm.run.training_arguments import argument

    return max(int(argument(run.recipe.pretrain.training, "max_steps")), 0)


def text_of(run: Run, *, several: bool) -> TextBlocks:
    """The text of a run, packed as the pretrain stage packs it.

    Args:
        run: the run.
        several: whether a block may hold pieces of several documents.

    Raises:
        InputError: a stream, or a large file, without `max_steps`.
    """
    from minillm.data.text import TextBlocks
    from minillm.run.processes import world_size
    from minillm.run.training_arguments import update_sizes

    given = run.recipe.pretrain.training
    micro_batch, accumulation = update_sizes(given, world_size())
    text = TextBlocks(
        run.texts or [],
        run.conventions.tokenizer,
        run.recipe.pretrain.block,
        micro_batch * accumulation * world_size(),
        int(given.get("seed", run.recipe.seed)),
        updates=_updates(run),
        several=several,
    )
    if not text.is_whole and not _updates(run):
        raise InputError(
            "pretrain.training.max_steps is needed where data.text is a data set or has more than 20,000 rows"
        )
    return text


def facts_of(run: Run) -> StoreFacts:
    """What the store of a run is of."""
    from minillm.evaluation.dependencies import digest
    from minillm.teacher.store import StoreFacts
    from minillm.teacher.store_writing import digest_of_files, digest_of_weights

    recipe, tokenizer, source = run.recipe, run.conventions.tokenizer, run.recipe.data.text
    assert source is not None
    content = str(source.dataset) if source.file is None else digest_of_files([Path(source.file)])
    return StoreFacts(
        tokenizer=digest(sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id),
        teacher=digest_of_weights(run.teacher),
        text=digest(content, source.split, sorted(source.columns.items()))[:16],
        block=recipe.pretrain.block,
        vocab_size=run.conventions.vocab_size,
        temperature=recipe.pretrain.temperature,
        sampler=recipe.logits.sampler.model_dump(),
        seed=recipe.seed if recipe.logits.seed is None else recipe.logits.seed,
        draws=recipe.logits.draws,
    )
