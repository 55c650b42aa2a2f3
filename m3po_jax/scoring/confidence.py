"""Confidence of the model in its own answers (docs/method.md): pure NumPy on one prompt's candidates.

Token log-probs are those that generation records: natural logarithms at temperature 1, from the distribution
before truncation, EOS included. An empty answer is therefore one token long (EOS) and has every variant. An
answer without any recorded token has none: its confidence is NaN, which selection treats as absent.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from m3po_jax.errors import UserError, nearest

Confidence = Float[np.ndarray, " candidates"]

VARIANTS = ("sum", "mean", "tail", "cluster", "prior", "visual")

# Numbers keep sign, point and separators ("-3.5", "10:30"); scripts written without spaces count by
# character; other words are runs of letters and digits; a symbol other than punctuation (an emoji) is a word.
_WORD = re.compile(
    r"(?<!\w)[-−]?\d+(?:[.,:/]\d+)*(?!\w)"
    r"|[぀-ヿ㐀-䶿一-鿿가-힯]"
    r"|[^\W_぀-ヿ㐀-䶿一-鿿가-힯]+"
    r"|[^\w\s]"
)
_ARTICLES = frozenset({"a", "an", "the"})
# Where one claim of a long answer ends and the next begins.
_CLAUSE = re.compile(r"[.!?;,:\n]+(?=\s|$)|\s+(?:and|but|while|with)\s+", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Words of a text for comparison: Unicode-normalised, case-folded, without punctuation."""
    runs = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [word for word in runs if len(word) > 1 or not unicodedata.category(word).startswith("P")]


def normalised_text(text: str) -> str:
    """The text up to case, punctuation, spacing and English articles: answers equal in it say the same."""
    return " ".join(word for word in words(text) if word not in _ARTICLES)


def clause_claims(text: str) -> frozenset[str]:
    """A long answer as a set of claims: its clauses, normalised: cheap, and enough to compare samples."""
    return frozenset(filter(None, map(normalised_text, _CLAUSE.split(text))))


def text_similarity(first: str, second: str) -> float:
    """Dice overlap of the multisets of word unigrams and bigrams, in [0, 1], symmetric.

    ROUGE-1 and ROUGE-2 F1 (Lin 2004) in one number: one word changed in twenty gives about 0.92, and a
    changed order lowers it too. Linear in length. Two texts without words are equal.
    """

    def grams(text: str) -> Counter[tuple[str, ...]]:
        unigrams = words(text)
        return Counter([(word,) for word in unigrams] + list(itertools.pairwise(unigrams)))

    a, b = grams(first), grams(second)
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def _ragged(token_logprobs: Sequence[ArrayLike]) -> list[np.ndarray]:
    return [np.asarray(values, np.float64).reshape(-1) for values in token_logprobs]


def sum_confidence(token_logprobs: Sequence[ArrayLike]) -> Confidence:
    """Σ_t log π(y_t), nats, [candidates]."""
    return np.array([v.sum() if v.size else np.nan for v in _ragged(token_logprobs)], np.float64)


def mean_confidence(token_logprobs: Sequence[ArrayLike], alpha: float = 1.0) -> Confidence:
    """|y|^(−α) · Σ_t log π(y_t), nats per token at α = 1, [candidates]."""
    rows = _ragged(token_logprobs)
    return np.array([v.sum() * float(v.size) ** -alpha if v.size else np.nan for v in rows], np.float64)


def tail_confidence(token_logprobs: Sequence[ArrayLike], fraction: float = 0.2) -> Confidence:
    """Mean log-prob of the least likely `fraction` of tokens (rounded down, at least one), [candidates].

    Where one wrong word matters, it is not diluted by the sure words around it.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}")

    def tail(values: np.ndarray) -> float:
        count = max(1, int(values.size * fraction + 1e-9))
        return float(np.sort(values)[:count].mean()) if values.size else np.nan

    return np.array([tail(v) for v in _ragged(token_logprobs)], np.float64)


def agreement(
    first: str, second: str, *, short: int = 5, claims: Callable[[str], Collection[str]] = clause_claims
) -> float:
    """How far two answers agree, in [0, 1], symmetric.

    Two short answers (at most `short` words each, articles aside) agree if equal after normalisation;
    otherwise agreement is the Jaccard overlap of their claims.
    """
    a, b = normalised_text(first), normalised_text(second)
    if a == b:
        return 1.0
    if max(len(a.split()), len(b.split())) <= short:
        return 0.0
    left, right = set(claims(first)), set(claims(second))
    return len(left & right) / len(left | right) if left | right else 1.0


def cluster_confidence(
    texts: Sequence[str], *, short: int = 5, claims: Callable[[str], Collection[str]] = clause_claims
) -> Confidence:
    """Self-consistency: the share of the K samples that agree with each one, itself included, in [1/K, 1].

    Args:
        texts: The K answers to one prompt.
        short: See `agreement`.
        claims: Splits a long answer into comparable claims.
    """
    count = len(texts)
    table = np.eye(count)
    for i in range(count):
        for j in range(i):
            table[i, j] = table[j, i] = agreement(texts[i], texts[j], short=short, claims=claims)
    return table.sum(axis=1) / max(count, 1)


def visual_confidence(confidence: ArrayLike, prior: ArrayLike) -> Confidence:
    """c − prior, nats per token: what the image adds to the language prior's own liking of the answer.

    Args:
        confidence: `mean_confidence` with the image.
        prior: `mean_confidence` of the same tokens with the image blanked.
    """
    confidence, prior = np.asarray(confidence, np.float64), np.asarray(prior, np.float64)
    if confidence.shape != prior.shape:
        raise ValueError(f"confidence has shape {confidence.shape}, prior {prior.shape}")
    return confidence - prior


def confidence_variants(
    names: Sequence[str],
    token_logprobs: Sequence[ArrayLike],
    texts: Sequence[str],
    blank_token_logprobs: Sequence[ArrayLike] | None = None,
) -> dict[str, Confidence]:
    """The named variants for one prompt's candidates.

    Args:
        names: From `VARIANTS`.
        blank_token_logprobs: Log-probs of the same tokens under a blank image, for ``prior`` and ``visual``.

    Raises:
        UserError: an unknown name, or a variant whose input is absent.
    """
    variants: dict[str, Confidence] = {}
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"unknown confidence variant {name!r}{nearest(name, VARIANTS)}", where="score.confidence")
        if name in {"prior", "visual"} and blank_token_logprobs is None:
            raise UserError(f"confidence variant {name!r} needs log-probs under a blank image", where="score")
        if name == "sum":
            variants[name] = sum_confidence(token_logprobs)
        elif name == "mean":
            variants[name] = mean_confidence(token_logprobs)
        elif name == "tail":
            variants[name] = tail_confidence(token_logprobs)
        elif name == "cluster":
            variants[name] = cluster_confidence(texts)
        else:
            assert blank_token_logprobs is not None
            prior = mean_confidence(blank_token_logprobs)
            variants[name] = prior if name == "prior" else visual_confidence(mean_confidence(token_logprobs), prior)
    return variants
