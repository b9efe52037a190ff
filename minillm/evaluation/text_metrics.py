"""Scores of one text against its references: Rouge-L and exact match, for any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal

from minillm.evaluation.statistics import check_not_empty

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# Scripts written without spaces: Thai and Lao, Myanmar, Khmer, Hiragana and Katakana, Chinese characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\uaa60-\uaa7f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff"
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Characters that mean the same as another one are replaced by it: dashes and the minus sign, quotes, sentence marks,
# full-width and half-width forms. Characters of zero width are removed.
_EQUIVALENT = {
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFEF)},
    **str.maketrans(
        dict.fromkeys("‐‑‒–—―−", "-") | dict.fromkeys("‘’‚‛‹›ʼ", "'") | dict.fromkeys("“”„‟«»「」『』", '"')
    ),
    **str.maketrans({"…": "...", "。": ".", "।": ".", "۔": ".", "、": ",", "،": ",", "؛": ";", "؟": "?"}),
    **dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF)),
}
_LETTER = r"[^\W\d_]"
_THOUSANDS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
# A text between paired quotes, asterisks or backticks, up to three of them: "quoted", **bold**.
_ENCLOSED = re.compile(r"""(?<![\w"'`*])((["'`*])\2{0,2})(?=\S)((?:(?!\2).)+)(?<=\S)\1(?![\w"'`*])""", re.DOTALL)
# A sentence mark with a space before it.
_DETACHED_MARK = re.compile(r"(?<=[^\W_])\s+([.,;:!?%]+)(?=\s|$)")
# Apostrophes and full stops between letters; hyphens between letters, unless there is a single letter on both sides.
_INNER_MARK = re.compile(
    rf"(?<={_LETTER})['.](?={_LETTER})|(?<={_LETTER}{_LETTER})-(?={_LETTER})|(?<={_LETTER})-(?={_LETTER}{_LETTER})"
)
# Quotes, brackets and sentence marks at the ends of a word; fewer of them after a number.
_OUTER_MARK = re.compile(rf"^[\"'(\[{{¿¡]+(?={_LETTER})|(?<=\d)[.,;?]+$|(?<!\d)[.,;:!?)\]}}\"']+$")


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Compute Rouge-L F1 in percent against the best of several references.

    The package rouge-score computes it with stemming, as in the paper. The tokenizer of that package drops letters
    other than a to z, and splits words at them. Where this affects the prediction or a reference (see `is_latin`), all
    of them are tokenised by `UnicodeTokenizer` instead, which splits English exactly as the package does.

    Args:
        prediction: The text that is scored.
        references: At least one text that would be right.

    Raises:
        InputError: There is no reference.
    """
    check_not_empty(references=references)
    scorer = _scorer(all(map(is_latin, (prediction, *references))))
    return 100 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 100 if the prediction equals one of the references, else 0.

    Texts are compared in lower case, with single spaces, and without punctuation that only separates words:

    * paired quotes, Markdown asterisks and backticks around anything;
    * quotes, brackets and sentence marks around a word; after a number only a full stop, comma, semicolon or question
      mark;
    * apostrophes and full stops between letters, and hyphens in words of more than one letter: don't, U.S., ice-cream;
    * commas between thousands.

    All other marks carry meaning and are kept: symbols (C++, C#, 50 %, <); signs, points and any other mark inside or
    before a number (-5, 3.5, .5, 10:30, 5!); and words that consist of marks only, such as :). All dashes and the minus
    sign are equal, and so are straight and typographic quotes, and full-width and ordinary characters.

    MiniLLM's own evaluation removes all ASCII punctuation everywhere, so that + equals - and 3.5 equals 35; its figure
    therefore counts such answers as matches too. Both evaluations keep articles, which SQuAD's script removes.

    Args:
        prediction: The text that is scored.
        references: At least one text that would be right.

    Raises:
        InputError: There is no reference.
    """
    check_not_empty(references=references)
    return 100.0 * (_normalised(prediction) in map(_normalised, references))


def _normalised(text: str) -> str:
    text = unicodedata.normalize("NFC", text.translate(_EQUIVALENT).lower())
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _DETACHED_MARK.sub(r"\1", _ENCLOSED.sub(r"\3", text))  # a detached mark belongs to the word before it
    return " ".join(
        _OUTER_MARK.sub("", _INNER_MARK.sub("", word)) if any(map(str.isalnum, word)) else word for word in text.split()
    )


def is_latin(text: str) -> bool:
    """Whether the tokenizer of rouge-score loses no letter and no digit of `text`.

    That tokenizer keeps only [a-z0-9] of the lower-cased text. The result is True for English text, whatever its
    quotes, dashes, emoji or fractions, and False for naïve, Straße, Chinese or Russian text.
    """
    return text.isascii() or not any(_is_lost(character, before) for before, character in pairwise(f" {text.lower()}"))


def _is_lost(character: str, before: str) -> bool:
    if character.isascii():
        return False
    category = unicodedata.category(character)
    # A combining accent splits the word that it is in. Variation selectors, such as those of emoji, are no accents.
    accent = (
        category in ("Mn", "Mc")
        and before.isalpha()
        and not unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    )
    return accent or category[0] == "L" or category == "Nd"


class UnicodeTokenizer:
    """Tokenizer for `RougeScorer` that splits text of any script into lower-cased words.

    Scripts that are written without spaces give one token per character. Words of [a-z0-9] only are stemmed as the
    package stems them, so that English inside such a text counts as it does elsewhere.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Split a text into tokens."""
        tokens: list[str] = []
        # Compatibility forms first: é is one character or two, and digits in Chinese text are often full-width.
        for kind, run in groupby(unicodedata.normalize("NFKC", text).lower(), _kind):
            if kind == "character":
                tokens += run
            elif kind == "word":
                word = "".join(run)
                if word.isascii():
                    tokens += self._ascii.tokenize(word)
                elif any(
                    map(str.isalnum, word)
                ):  # otherwise it consists of marks, such as an emoji's variation selector
                    tokens.append(word)
        return tokens


@cache
def _kind(character: str) -> Literal["character", "word", ""]:
    """Whether a character is a token by itself, part of a word, or a separator (empty)."""
    # Marks (category M) are vowels and accents inside words; `\w` would split Hindi and vocalised Arabic at each of
    # them.
    if not character.isalnum() and unicodedata.category(character)[0] != "M":
        return ""
    return "character" if _UNSPACED.match(character) else "word"


@cache
def _scorer(latin: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=None if latin else UnicodeTokenizer())
