"""Scores of generated answers against references, from the metric packages: BLEU, NIST, METEOR, ROUGE-L and CIDEr.

| metric  | package      | variant                                                                                     |
|---------|--------------|---------------------------------------------------------------------------------------------|
| BLEU    | sacrebleu    | of the corpus, 4-grams, tokenizer 13a, case kept, exponential smoothing; 0 to 100           |
| NIST    | nltk         | of the corpus, 5-grams (Doddington 2002)                                                    |
| METEOR  | nltk         | Lavie and Agarwal 2007 (α 0.9, β 3, γ 0.5): exact, stem, and synonyms if nltk finds WordNet |
| ROUGE-L | rouge-score  | F1 of the longest common subsequence, Porter stemmer, the best reference; mean              |
| CIDEr   | pycocoevalcap| what it calls CIDEr, which is CIDEr-D (clipped, length penalty σ 6), times 10; mean         |

NIST, METEOR and CIDEr get lower-case words of sacrebleu's tokenizer 13a; ROUGE-L has its own tokenizer. Scores of the
other METEOR (the Java program 1.5 with paraphrases, which papers on E2E use) are not comparable with this one's.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from adaptkit.errors import UsageError, install_hint

_NIST_ORDER = 5


@dataclass(frozen=True)
class Scores:
    """Scores of answers against their references; see the module's docstring for the variants.

    Attributes:
        bleu: 0 to 100.
        nist: at least 0, without an upper limit; None if no answer, or no reference, has a word.
        meteor: 0 to 1.
        rouge_l: 0 to 1.
        cider: 0 to 10; None for a single question, whose words are all equally rare, or if no reference has a word.
        meteor_variant: kinds of matches that METEOR counted.
        signature: sacrebleu's signature of BLEU, and the versions of the other packages.
    """

    bleu: float
    nist: float | None
    meteor: float
    rouge_l: float
    cider: float | None
    meteor_variant: str
    signature: str


def require_metrics() -> None:
    """Check that answers can be scored, before hours are spent on generating them.

    Raises:
        UsageError: a metric package is not installed, nltk finds no home folder, or its WordNet cannot be read.
    """
    try:
        import nltk  # noqa: F401
        import pycocoevalcap.cider.cider  # noqa: F401
        import rouge_score.rouge_scorer  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"scoring answers needs the metric packages: {error}",
            hint=install_hint("eval"),
        ) from error
    except ValueError as error:  # such as in a container whose user has no home folder
        raise UsageError(f"nltk, which scores answers, cannot be loaded: {error}", hint="set HOME") from error
    _wordnet()


def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score answers, each against all of its references.

    Args:
        answers: at least one answer; an empty one counts as an answer without words.
        references: references of each answer, at least one.

    Raises:
        ImportError: a metric package is not installed; call ``require_metrics`` first.
        UsageError: nltk's WordNet exists but cannot be read.
        ValueError: there is nothing to score, or an answer has no reference.
    """
    if not answers or len(answers) != len(references) or not all(references):
        raise ValueError(f"{len(answers)} answers, {len(references)} lists of references: one each is needed")
    from importlib.metadata import version

    bleu, signature = _bleu(answers, references)
    words = [_words(answer) for answer in answers]
    expected = [[_words(reference) for reference in of_one] for of_one in references]
    meteor, variant = _meteor(words, expected)
    packages = ", ".join(f"{name} {version(name)}" for name in ("nltk", "rouge-score", "pycocoevalcap"))
    return Scores(
        bleu=bleu,
        nist=_nist(words, expected),
        meteor=meteor,
        rouge_l=_rouge_l(answers, references),
        cider=_cider(words, expected),
        meteor_variant=variant,
        signature=f"BLEU {signature}; {packages}",
    )


def _words(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return str(Tokenizer13a()(text.lower())).split()


def _bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    most = max(len(of_one) for of_one in references)
    streams: list[Any] = [[of_one[i] if i < len(of_one) else None for of_one in references] for i in range(most)]
    return float(metric.corpus_score(list(answers), streams).score), str(metric.get_signature())


def _nist(answers: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float | None:
    """Use no order longer than all answers: nltk divides by the number of n-grams of each order."""
    from nltk.translate.nist_score import corpus_nist

    order = min(_NIST_ORDER, max(len(words) for words in answers))
    return float(corpus_nist(references, answers, n=order)) if order and _have_words(references) else None


def _meteor(answers: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> tuple[float, str]:
    from nltk.translate.meteor_score import meteor_score

    wordnet, variant = _wordnet()
    found = [meteor_score(of_one, words, wordnet=wordnet) for of_one, words in zip(references, answers, strict=True)]
    return sum(found) / len(found), variant


class _NoSynonyms:
    """Replaces WordNet if there is none: METEOR's third stage then matches nothing."""

    def synsets(self, word: str) -> tuple[()]:
        """Return no synonyms."""
        return ()


@lru_cache(maxsize=1)  # it takes seconds to read
def _wordnet() -> tuple[Any, str]:
    """Return WordNet, if nltk finds it in its search path, which NLTK_DATA extends; and METEOR's variant."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    try:
        root = nltk.data.find("corpora/wordnet")
    except LookupError:
        return _NoSynonyms(), "exact and stem (nltk finds no WordNet)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing languages
            wordnet = WordNetCorpusReader(root, None)
    except (OSError, LookupError, ValueError) as error:
        raise UsageError(f"{root}: nltk cannot read this WordNet ({error})", hint="remove or replace it") from error
    return wordnet, f"exact, stem and synonyms of WordNet {wordnet.get_version() or ''}".rstrip()


def _rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = [
        scorer.score_multi(list(of_one), answer)["rougeL"].fmeasure
        for of_one, answer in zip(references, answers, strict=True)
    ]
    return float(sum(found) / len(found))


def _cider(answers: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float | None:
    """Return None for one question: the logarithm of the number of questions gives every n-gram a weight of zero."""
    from pycocoevalcap.cider.cider import Cider

    if len(answers) < 2 or not _have_words(references):
        return None
    found = {number: [" ".join(words)] for number, words in enumerate(answers)}
    expected = {number: [" ".join(words) for words in of_one] for number, of_one in enumerate(references)}
    return float(Cider().compute_score(expected, found)[0])


def _have_words(references: Sequence[Sequence[list[str]]]) -> bool:
    """Whether any reference has words: sacrebleu's tokenizer reduces some texts, such as ``<skipped>``, to nothing."""
    return any(words for of_one in references for words in of_one)
