"""Answers of the teacher as references of held-out prompts that have none, for `eval/long_term.yaml`.

    python -m eval.references recipes/quickstart runs/long_term_data

The second folder gets the `train.jsonl` of the first, and its `heldout.jsonl` with three sampled answers of the teacher
as `output` of each row. Their seeds are not those of the comparison's suite.
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import closing
from pathlib import Path

from minillm.data.files import read_jsonl, write_jsonl
from minillm.evaluation.evaluator import Evaluator
from minillm.evaluation.sets import check_suite
from minillm.models.conventions import settle
from minillm.rollout.config import RolloutConfig
from minillm.run.recipe_file import load_comparison

SEEDS = (1, 2, 3)


def main() -> None:
    """Answer the held-out prompts of a folder, and write both files to another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of train.jsonl and heldout.jsonl")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    comparison = load_comparison(Path("eval/long_term.yaml"), [f"data_dir={args.data}"])
    suite, source = comparison.suite, comparison.recipe["teacher"]["source"]
    [name] = suite.sets
    _, [teacher] = check_suite(suite.model_copy(update={"teacher": None}), {"teacher": source})
    prompts = teacher.prompts[name]
    with closing(Evaluator(RolloutConfig(engine=suite.engine), suite.max_prompt_tokens + suite.max_new_tokens)) as by:
        model = by.load(teacher.folder)
        conventions = settle(teacher.tokenizer, model, template=suite.template == "chat")
        sampling = conventions.sampling(suite.max_new_tokens, suite.temperature)
        answers = by.answer(model, teacher.folder, prompts, sampling, SEEDS, teacher.tokenizer)
    texts: dict[int, list[str]] = {}
    for row in (row for rows in answers.values() for row in rows):
        texts.setdefault(row["row"], []).append(row["text"])
    rows = read_jsonl(args.data / "heldout.jsonl")
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.data / "train.jsonl", args.out / "train.jsonl")
    write_jsonl(args.out / "heldout.jsonl", [{**row, "output": texts[i]} for i, row in enumerate(rows) if i in texts])


if __name__ == "__main__":
    main()
