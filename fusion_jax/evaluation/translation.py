"""Written against true sentences: BLEU and chrF by sacrebleu, word errors by jiwer, with intervals.

    scores = {"French": {"chrF": chrf(written, true), "BLEU": bleu(written, true)}}
    print(format_scores("To English", scores, "stamps, test concepts"))

A measure is `measure(written, true) -> Score`. Its 95% interval is over resamplings of sentences
with replacement: what other sentences of the same kind would give, for one trained model.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jiwer
import numpy as np
import sacrebleu
from sacrebleu.significance import PairedTest

from fusion_jax.data.concepts import normalize
from fusion_jax.errors import UserError
from fusion_jax.evaluation import plots, table

RESAMPLES = 1000
# Languages written without spaces, and sacrebleu's tokenizer for them; 13a serves the others.
TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char", "km": "char", "lo": "char"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A measure over `count` sentences, in percent, with its 95% interval."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bleu(written: Sequence[str], true: Sequence[str], language: str = "en") -> Score:
    """Corpus BLEU (Papineni et al. 2002) up to 4-grams, of the language's tokens.

    A caption shorter than 4 tokens has no 4-gram: prefer `chrf` for those.
    """
    tokenizer = TOKENIZERS.get(language.partition("_")[0], "13a")
    return _sacrebleu(sacrebleu.BLEU(tokenize=tokenizer), written, true)


def chrf(written: Sequence[str], true: Sequence[str]) -> Score:
    """Corpus chrF2: the F-score of character n-grams up to 6 (Popović 2015)."""
    return _sacrebleu(_Chrf(), written, true)


def word_error_rate(written: Sequence[str], true: Sequence[str]) -> Score:
    """Words to substitute, delete and insert, per true word; case and punctuation do not count."""
    return _error_rate(jiwer.process_words, written, true)


def character_error_rate(written: Sequence[str], true: Sequence[str]) -> Score:
    """The same of characters, spaces included."""
    return _error_rate(jiwer.process_characters, written, true)


def exact_match(written: Sequence[str], true: Sequence[str]) -> Score:
    """The share of sentences that are the same but for case and punctuation."""
    _check(written, true)
    same = [normalize(one) == normalize(other) for one, other in zip(written, true, strict=True)]
    return _resampled(np.asarray(same, np.float64), np.ones(len(same)))


def paired_p_value(one: Sequence[str], other: Sequence[str], true: Sequence[str]) -> float:
    """How likely a difference in chrF as large as this is if both systems are alike.

    By sacrebleu's paired bootstrap (Koehn 2004): both are resampled on the same sentences.
    """
    _check(one, true)
    _check(other, true)
    if list(one) == list(other):
        return 1.0  # sacrebleu counts differences above 0, of which there are none
    named = [("one", list(one)), ("other", list(other))]
    metrics = {"chrF": sacrebleu.CHRF(references=[list(true)])}
    test = PairedTest(named, metrics, references=None, test_type="bs", n_samples=RESAMPLES)
    _, scores = test()
    return float(scores["chrF2"][1].p_value)


def format_scores(title: str, scores: Mapping[str, Mapping[str, Score]], data: str) -> str:
    """Rows of scores as Markdown, with how many sentences each is over and what the numbers are."""
    if not scores:
        raise UserError(f"the table {title!r} was given no rows")
    columns = list(dict.fromkeys(name for row in scores.values() for name in row))
    rows = [
        [
            name,
            str(max(score.count for score in row.values())),
            *(str(row[column]) if column in row else "" for column in columns),
        ]
        for name, row in scores.items()
    ]
    told = f"Data: {data}. In brackets the 95% interval over {RESAMPLES} resamplings of sentences."
    return f"{title}\n\n{table.markdown(['', 'sentences', *columns], rows)}\n\n{told}"


def plot_scores(
    path: Path, scores: Mapping[str, Mapping[str, Score]], title: str, measure: str
) -> None:
    """One line for each row of `scores` with a point and interval for each series in it."""
    bounds = {
        row: {name: (score.value, score.low, score.high) for name, score in series.items()}
        for row, series in scores.items()
    }
    plots.intervals(path, bounds, title, measure)


def _check(written: Sequence[str], true: Sequence[str]) -> None:
    if len(written) != len(true) or not true:
        raise UserError(
            f"{len(written)} written and {len(true)} true sentences; expected as many, and some"
        )


class _Chrf(sacrebleu.CHRF):
    """Of a resampling in which nothing is written the score is a float, of others a NumPy float32:
    sacrebleu fails at the mean of both."""

    def _compute_f_score(self, statistics: list[int]) -> float:
        return float(super()._compute_f_score(statistics))


def _sacrebleu(metric: sacrebleu.BLEU | sacrebleu.CHRF, written: Sequence, true: Sequence) -> Score:
    _check(written, true)
    score = metric.corpus_score(list(written), [list(true)], n_bootstrap=RESAMPLES)
    about = json.loads(score.format(6, signature=metric.get_signature().format(), is_json=True))
    # sacrebleu leaves the interval out where every resampling scores 0.
    middle, half = about.get("confidence_mean", 0.0), about.get("confidence_var", 0.0)
    return Score(score.score, middle - half, middle + half, len(true))


def _error_rate(process: Callable, written: Sequence[str], true: Sequence[str]) -> Score:
    _check(written, true)
    said, heard = [normalize(text) for text in true], [normalize(text) for text in written]
    if not all(said):
        raise UserError(f"the true sentence {true[said.index('')]!r} has no word to compare with")
    result = process(said, heard)
    errors = [
        sum(
            max(part.ref_end_idx - part.ref_start_idx, part.hyp_end_idx - part.hyp_start_idx)
            for part in parts
            if part.type != "equal"
        )
        for parts in result.alignments
    ]
    lengths = [len(reference) for reference in result.references]
    return _resampled(np.asarray(errors, np.float64), np.asarray(lengths, np.float64))


def _resampled(hits: np.ndarray, sizes: np.ndarray) -> Score:
    """100 * sum(hits) / sum(sizes), both [n], and the percentiles of that over resamplings."""
    rows = np.random.default_rng(0).integers(len(hits), size=(RESAMPLES, len(hits)))
    ratios = 100 * hits[rows].sum(axis=1) / sizes[rows].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Score(float(100 * hits.sum() / sizes.sum()), float(low), float(high), len(hits))
