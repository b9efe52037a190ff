"""Checks that student and teacher have the same token for each id."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from minillm.errors import VocabularyError


def head_width(model: PreTrainedModel) -> int:
    """Return the number of rows of the output head. Models of one family may pad their heads to different widths."""
    head: Any = model.get_output_embeddings()
    return head.weight.shape[0]


def token_count(tokenizer: Any) -> int:
    """Return one more than the highest id that is a token. Rows of a head beyond it are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def first_difference(one: Any, other: Any) -> tuple[int, str | None, str | None] | None:
    """Compare two tokenizers.

    Args:
        one: A tokenizer.
        other: The tokenizer to compare it with.

    Returns:
        The lowest id for which they have different tokens, and the token of each for it (None if it has none). None if
        all tokens agree.
    """
    ours, theirs = ({i: t for t, i in tok.get_vocab().items()} for tok in (one, other))
    differing = (i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i))
    token_id = next(differing, None)
    return None if token_id is None else (token_id, ours.get(token_id), theirs.get(token_id))


def check_tokenizer_fits(tokenizer: Any, config: Any, who: str) -> None:
    """Refuse a tokenizer with tokens that its model has no embedding for.

    Args:
        tokenizer: The tokenizer.
        config: Config of the model.
        who: `student` or `teacher`, for the error message.

    Raises:
        VocabularyError: With the number of tokens and of embedding rows.
    """
    tokens, rows = token_count(tokenizer), config.get_text_config().vocab_size
    if tokens > rows:
        raise VocabularyError(
            f"the {who}'s tokenizer has tokens up to id {tokens - 1} and its model {rows} embedding rows "
            f"({tokenizer.name_or_path}): use the tokenizer that the model was trained with, or give the model rows "
            f"for all (resize_token_embeddings({tokens}))"
        )


def check_same_tokens(student_tokenizer: Any, teacher_tokenizer: Any, teacher: str = "teacher") -> None:
    """Refuse student and teacher if their tokenizers have different tokens for an id.

    Args:
        student_tokenizer: Tokenizer of the student.
        teacher_tokenizer: Tokenizer of the teacher.
        teacher: What the message calls the teacher.

    Raises:
        VocabularyError: Naming the first id that differs.
    """
    if difference := first_difference(student_tokenizer, teacher_tokenizer):
        token_id, ours, theirs = difference
        raise VocabularyError(
            f"student and {teacher} have different tokenizers: id {token_id} is {ours!r} for the student and "
            f"{theirs!r} for the {teacher}. Reverse KL needs one vocabulary; train the student on the teacher's "
            "answers as text instead (sequence-level distillation), which does not need a common vocabulary."
        )
