"""Scores of generated text, and intervals for their means."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from minillm.errors import InputError
from minillm.evaluation.statistics import PERCENTILES, Floats, check_not_empty, resample

# Scripts written without spaces: Thai and Lao, Myanmar, Khmer, Hiragana and Katakana, Chinese characters.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\uaa60-\uaa7f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff"
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Signs that mean the same, as one: dashes and the minus sign, quotes, sentence marks, full- and half-width forms; signs of no width go.
SAME = {
    **{place: unicodedata.normalize("NFKC", chr(place)) for place in range(0xFF01, 0xFFEF)},
    **str.maketrans(
        dict.fromkeys("‐‑‒–—―−", "-") | dict.fromkeys("‘’‚‛‹›ʼ", "'") | dict.fromkeys("“”„‟«»「」『』", '"')
    ),
    **str.maketrans({"…": "...", "。": ".", "।": ".", "۔": ".", "、": ",", "،": ",", "؛": ";", "؟": "?"}),
    **dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF)),
}
_LETTER = r"[^\W\d_]"
_THOUSANDS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_IN_PAIRS = re.compile(
    r"""(?<![\w"'`*])((["'`*])\2{0,2})(?=\S)((?:(?!\2).)+)(?<=\S)\1(?![\w"'`*])""", re.DOTALL
)  # "quoted", **bold**
_APART = re.compile(r"(?<=[^\W_])\s+([.,;:!?%]+)(?=\s|$)")
_WITHIN = re.compile(
    rf"(?<={_LETTER})['.](?={_LETTER})|(?<={_LETTER}{_LETTER})-(?={_LETTER})|(?<={_LETTER})-(?={_LETTER}{_LETTER})"
)
_AROUND = re.compile(rf"^[\"'(\[{{¿¡]+(?={_LETTER})|(?<=\d)[.,;?]+$|(?<!\d)[.,;:!?)\]}}\"']+$")


def is_latin(text: str) -> bool:
    """True if rouge-score's own tokenizer, which keeps only [a-z0-9] of lower-cased text, loses no letter and no digit of it.

    So it is of English, whatever its quotes, dashes, emoji or fractions, and not of naïve, Straße, Chinese or Russian text.
    """
    return text.isascii() or not any(_is_lost(character, before) for before, character in pairwise(f" {text.lower()}"))


def _is_lost(character: str, before: str) -> bool:
    if character.isascii():
        return False
    category = unicodedata.category(character)
    # An accent that is a character of its own splits a word; variation selectors, as of emoji, are no accents.
    accent = (
        category in ("Mn", "Mc")
        and before.isalpha()
        and not unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    )
    return accent or category[0] == "L" or category == "Nd"


class UnicodeTokenizer:
    """Words of any script, lower-cased, for RougeScorer; scripts without spaces give one token a character.

    Words of [a-z0-9] alone are stemmed as the package stems them, so English within such text counts as it does elsewhere.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        # Compatibility forms first: é is one character or two, and digits beside Chinese are often full-width.
        for kind, run in groupby(unicodedata.normalize("NFKC", text).lower(), _kind):
            if kind == "character":
                tokens += run
            elif kind == "word":
                word = "".join(run)
                if word.isascii():
                    tokens += self._ascii.tokenize(word)
                elif any(map(str.isalnum, word)):  # else marks alone, such as an emoji's variation selector
                    tokens.append(word)
        return tokens


@cache
def _kind(character: str) -> str:
    """`character`: a token by itself; `word`: part of a word; empty: between tokens."""
    # Marks (category M) are vowels and accents within words; `\w` would split Hindi or pointed Arabic at each.
    if not character.isalnum() and unicodedata.category(character)[0] != "M":
        return ""
    return "character" if UNSPACED.match(character) else "word"


@cache
def _scorer(latin: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=None if latin else UnicodeTokenizer())


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L F1 in percent, the best over the references (the paper's setting: rouge-score with stemming).

    Where `is_latin` fails for the prediction or a reference, the package would drop letters, and split words at them; all
    of them are then split by `UnicodeTokenizer`, which makes of English what the package does.
    """
    check_not_empty(references=references)
    scorer = _scorer(all(map(is_latin, (prediction, *references))))
    return 100 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals a reference, else 0.

    Equal in lower case, with single spaces, and without the punctuation that only sets words apart:

    * quotes, Markdown's asterisks and backticks in pairs around anything;
    * quotes, brackets and sentence marks around a word; after a number a full stop, comma, semicolon or question mark;
    * apostrophes and full stops between letters, and hyphens (of words of more than a letter): don't, U.S., ice-cream;
    * commas between thousands.

    What else there is says something, and stays: symbols (C++, C#, 50 %, <), signs, points and whatever is within or
    before a number (-5, 3.5, .5, 10:30, 5!), words that are nothing but marks, as :) is. Dashes and the minus sign are one,
    so are straight and other quotes, and full-width forms and plain ones.

    MiniLLM's evaluation drops all ASCII punctuation everywhere, so that + equals -, and 3.5 equals 35: its figure counts
    such answers besides. Both keep articles, which SQuAD's own script drops.
    """
    check_not_empty(references=references)
    return 100.0 * (_plain(prediction) in map(_plain, references))


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFC", text.translate(SAME).lower())
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _APART.sub(r"\1", _IN_PAIRS.sub(r"\3", text))  # a mark that stands alone belongs to the word before it
    return " ".join(
        _AROUND.sub("", _WITHIN.sub("", word)) if any(map(str.isalnum, word)) else word for word in text.split()
    )


def distinct_n(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """Percent of distinct n-grams among all n-grams of the sequences (token ids) together; nan if there is none.

    It tends to fall as sequences are added, so compare equal numbers of tokens.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, not {n}")
    grams = [tuple(ids[i : i + n]) for ids in sequences for i in range(len(ids) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else float("nan")


def excess_error(own: Sequence[Sequence[float]], oracle: Sequence[Sequence[float]], length: int) -> Floats:
    """Exposure bias: ExAccErr(l) = 100 (R(l) − lε(l)) / lε(l) in percent, l = 1..length (MiniLLM, arXiv 2306.08543;
    Arora and others, 2022).

    R(l) is the sum over t ≤ l of the mean over samples of KL(p‖q) at position t of the student's own responses, lε(l)
    the same along the teacher's. l = 1 is the first response token. The mean at a position is over all samples: a
    response that has ended adds 0. Where lε(l) is 0 the value is nan or inf.

    The authors' script (evaluate_exposure_bias.py) starts at the second token, divides a prompt's sum at a position by
    the number of its samples still going plus 1e-3, and averages over the prompts of one process.

    Args:
        own, oracle: [samples][tokens], KL(p‖q) in nats along responses drawn from the student and from the teacher; the
            two may differ in number.
    """
    check_not_empty(own=own, oracle=oracle)
    return _excess(*(_accumulated(errors, length).mean(0) for errors in (own, oracle)))


def excess_error_spread(
    own: Sequence[Sequence[float]], oracle: Sequence[Sequence[float]], length: int, times: int = 1000, seed: int = 0
) -> Floats:
    """95 % percentile bootstrap intervals [length, 2] of `excess_error`; own and oracle are resampled independently."""
    check_not_empty(own=own, oracle=oracle)
    means = []
    # Equal seeds would draw the same indices for both.
    for errors, each in zip((own, oracle), np.random.SeedSequence(seed).generate_state(2), strict=True):
        n = len(errors)
        counts = np.stack([np.bincount(index, minlength=n) for index in resample(n, times, int(each))])
        means.append(counts @ _accumulated(errors, length) / n)  # [times, length], without [times, n, length]
    return np.percentile(_excess(*means), PERCENTILES, axis=0).T


def _accumulated(errors: Sequence[Sequence[float]], length: int) -> Floats:
    """Sums up to each position [samples, length]."""
    if length < 1:
        raise InputError(f"length must be at least 1, not {length}")
    table = np.zeros((len(errors), length))
    for row, values in zip(table, errors, strict=True):
        row[: len(values)] = values[:length]
    return table.cumsum(-1)


def _excess(own: Floats, oracle: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (own - oracle) / oracle


def calibration_error(confidences: Sequence[float] | Floats, correct: Sequence[bool] | Floats, bins: int = 10) -> float:
    """Expected calibration error, 0..1: |accuracy − mean confidence| of a bin, weighted by its share (Guo and others, 2017).

    Bins are of equal width and closed on the right; a confidence of 0 belongs to the first.
    """
    check_not_empty(confidences=confidences)
    if len(confidences) != len(correct):
        raise InputError(f"{len(confidences)} confidences but {len(correct)} answers marked correct or not")
    if bins < 1:
        raise InputError(f"bins must be at least 1, not {bins}")
    confidence = np.asarray(confidences, np.float64)
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise InputError("confidences must lie between 0 and 1")
    # k / bins is the number nearest to the edge, so a confidence of 5/6 lies on it; linspace's edge is a little lower.
    place = np.searchsorted(np.arange(1, bins) / bins, confidence)
    gaps = np.bincount(place, np.asarray(correct, np.float64) - confidence)
    return float(np.abs(gaps).sum() / len(confidence))
