"""Text, speech, or both, from many languages to many: one small language model that translates.

    python -m fusion_jax train experiments/translation.py
    python -m fusion_jax translate --workdir runs/translation --to en recording.ogg
    python -m fusion_jax translate --workdir runs/translation --from fr --to es "un chat"

SmolLM2 with LoRA, and Moonshine Tiny's frozen encoder behind a `Listener` that first learns to
spell what people say in ten languages (CTC). Data are the captions and recordings of the Tux Paint
stamps. They are split by concept: no thing that is tested on was written or said in any language in
training. What a new thing is called is knowledge, and is looked up: a `lexicon` of Unicode's names
of emoji and FreeDict's dictionaries says what it can of each word given, or heard, and the model,
which reads this beside the words, learns what to make of it. Any language goes into any other: the
report has rows into English, from English, and between `pairs` of others. What happens to be
written alike on both sides is left out of the test, as are recordings that say more than the
caption. A second split is by language: no recording of an `unheard` one was in training.

Seed 0, 62 minutes to train on two cores beside other work and 12 to report, things never trained
on, people's recordings, beside what the lexicon says of each word and nothing else, the same model
with nothing looked up, and the translation of the most similar caption of training (in brackets
the 95% interval over 1,000 resamplings of sentences; 30 sentences where a language is named):

                            text          speech        both          words unaided nearest
    into English, 254 recordings of nine languages:
      chrF                  36.9 [33-41]  16.6 [14-19]  37.0 [33-41]  35.8  13.1    16.7
      BLEU                  10.6 [6.2-15] 3.5 [2.7-4.3] 11.6 [7.8-16] 2.3   2.3     1.6
      same to the letter, % 29.9 [24-36]  9.8 [6.3-14]  31.5 [26-37]  3.9   2.0     0.0
    chrF of Danish, unheard 34.4 [22-47]  7.2 [5.7-8.7] 33.3 [22-46]  37.3  16.1    20.3
      French to Spanish     42.0 [29-54]  15.9 [9.4-22] 42.5 [30-55]  37.9  25.2    18.0
      Russian to Catalan    34.6 [23-47]  27.7 [17-39]  34.1 [23-46]  23.8  9.4     20.4
      French to English     39.7 [27-53]  10.8 [6.1-16] 35.9 [23-49]  38.2  17.1    18.6
        in noise at 20 dB                 10.0 [5.4-15] 36.1 [23-49]
        10 dB                             9.9 [5.8-14]  39.1 [27-52]
        0 dB                              6.9 [5.3-8.5] 38.9 [26-52]

So words are what it lacked (with none looked up, and trained without a lexicon, it had 10.7 from
text): three of ten captions of new things come out to the letter, where the lexicon's words alone
make one in 25, and the rest mostly are what the lexicon does not know. By chrF the model adds
little to these words (into English 36.9 for 35.8, from Greek and into Russian it takes away), by
BLEU and to the letter much. Text and speech together are as good as text (chrF +0.02, paired
bootstrap p = 0.41). Speech alone is as near as the nearest caption of what was really said: where
there are 400 to 550 recordings of a language 28 to 59% of characters are heard amiss, if it is told
which language is spoken (28 to 71 if not), in English, Dutch and Danish, of which there are few or
none, 75 to 83. From English into other languages, text has 20 (Russian) to 41 (French), the nearest
caption 15 to 30. The listener's search was chosen on validation things.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
import soundfile
from tokenizers import Tokenizer

from fusion_jax.data import questions, stamps
from fusion_jax.data.concepts import normalize
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pipeline import Batches, spread
from fusion_jax.data.speech_sets import published
from fusion_jax.data.spoken import Spoken, Utterance
from fusion_jax.data.streams import Later, Phases, Streams
from fusion_jax.errors import UserError
from fusion_jax.evaluation.captions import chrf as alike
from fusion_jax.evaluation.translation import (
    Score,
    bleu,
    character_error_rate,
    chrf,
    exact_match,
    format_scores,
    paired_p_value,
    plot_scores,
)
from fusion_jax.knowledge import lexicon
from fusion_jax.knowledge.lexicon import Lexicon
from fusion_jax.language.answers import PLAIN
from fusion_jax.language.hearing import Dictation, PackedTurns, Turn, open_hearing
from fusion_jax.language.spoken import SpokenLM
from fusion_jax.language.translate import WRITTEN, Translator, instruction
from fusion_jax.language.tuned import TRAINED
from fusion_jax.language.word_tree import Dictionary, counted_words, letters_in
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.objectives.recognition import spell_and_answer
from fusion_jax.pretrained.load import load
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.optimizer import warmup_cosine
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.step import parameter_ema

LANGUAGES = ("en", "fr", "ro", "ru", "ca", "bg", "es", "be", "el", "da", "de", "it", "pt", "nl")
LEXICON = (
    *("cldr", "fra-eng", "eng-fra", "spa-eng", "eng-spa", "ell-eng", "eng-ell", "eng-bul"),
    *("eng-rus", "dan-eng", "eng-dan", "ita-eng", "eng-ita", "por-eng", "eng-por"),
    *("nld-eng", "eng-nld"),
)


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 2200
    """Of them `listen_steps` train the listener alone, and are quick."""
    listen_steps: int = 1400
    batch_size: int = 32
    """Recordings that are spelled in a step."""
    rows: int = 4
    """Of a step, as many as devices or a multiple of that; in each are as many translations as go
    in, four or so."""
    checkpoint_every: int = 200
    learning_rate: float = 2e-3
    language_model: str = "smollm2-135m-instruct"
    """A name, hub id, folder or GGUF file of a decoder."""
    tower: str = "moonshine-tiny"
    """A published encoder of sound."""
    lora_rank: int = 16
    lora: str = "attention/(query|value|out)|mlp/down"
    """Which of the decoder's kernels get adapters."""
    ctc_weight: float = 0.3
    """Of the spelling, once translations are learned."""
    label_smoothing: float = 0.1
    languages: tuple[str, ...] = LANGUAGES
    """Of captions; recordings serve where there are any."""
    unheard: tuple[str, ...] = ("da",)
    """Languages of which no recording is trained on."""
    lexicon: tuple[str, ...] = LEXICON
    """Where words are looked up: "cldr", dictionaries of FreeDict by their two languages, .jsonl
    files of your own, see knowledge/lexicon.py. None: give "" to look nothing up."""
    temperature: float = 2.0
    """A target language is drawn in proportion to its captions' number to the power 1 / this."""
    shares: tuple[float, ...] = (0.3, 0.3, 0.25, 0.15)
    """Of translating text, speech, and both, and of writing down speech."""
    seconds: float = 4.5
    """What lies beyond is not heard in training."""
    length: int = 160
    """Ids of a row: of translations and what they are of, vectors of recordings among them."""
    views: int = 2
    """Of each recording of training: as it is, then at other speeds and in noise of 0 to 20 dB."""
    spelled: int = 60
    """Most letters of a recording that is learned to be spelled."""
    places: int = 32
    """Most word pieces of a recording that is heard in training."""
    heard: int = 48
    """Most word pieces of a recording that is to be translated."""
    written: int = WRITTEN
    """Most ids of a translation in the report; `translate` has --max-tokens for it."""
    most: int = 30
    """Test items of each language, at most."""
    stamps: Path | None = None
    """Tux Paint's stamps, if they are not to be fetched."""
    published: tuple[str, ...] = ()
    """Published sets in place of them, in their own splits: "covost2 CV/fr covost_v2.fr_en.tsv",
    "must_c MUSTC/en-de", and, to be written down only, "common_voice CV/fr" and "librispeech
    LibriSpeech". Give --seconds, --length, --spelled, --heard, --written and the languages
    that fit them."""
    pairs: tuple[str, ...] = ("fr-es", "es-fr", "fr-ru", "ru-ca", "ro-el", "da-fr")
    """From which language to which the report also measures; those it has no captions of are left
    out."""
    development: bool = False
    """Report on validation concepts in place of the test ones."""


# ------------------------------------------------------------------------------------------ data


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Captions of rows {row: {language: text}} of each side, and who said which.

    Attributes:
        rows: of the stamps on each side, "train" and "held".
        spoken: {(row, language, decibels or None): utterance}.
    """

    captions: dict[int, dict[str, str]]
    rows: dict[str, list[int]]
    utterances: list[Utterance]
    spoken: dict[tuple[int, str, float | None], int]

    def languages(self) -> dict[int, list[str]]:
        """Of clean recordings, by row."""
        found: dict[int, list[str]] = {}
        for row, language, noise in self.spoken:
            if noise is None:
                found.setdefault(row, []).append(language)
        return found


NOISES = (20.0, 10.0, 0.0)
NOISY = "fr"
"""The language of which recordings are tested in noise as well."""


def read_corpus(s: Settings) -> Corpus:
    """Looks captions and recordings up."""
    return read_published(s) if s.published else read_stamps(s)


def read_published(s: Settings) -> Corpus:
    """Sentences of published sets and their translations, as if each were a stamp.

    A test sentence of one set may be for training in another: it is not trained on.
    """
    corpus = Corpus({}, {"train": [], "held": []}, [], {})
    tested: set[tuple[str, str]] = set()
    for side, split in (("held", "dev" if s.development else "test"), ("train", "train")):
        for given in s.published:
            source, before = published(given, split), len(corpus.captions)
            for index, said in enumerate(source.utterances):
                texts = {said.language: said.text, **said.more.get("translation", {})}
                captions = {lang: text for lang, text in texts.items() if lang in s.languages}
                keys = {(lang, normalize(text)) for lang, text in captions.items()}
                if not captions or (side == "train" and keys & tested):
                    continue
                tested |= keys if side == "held" else set()
                row = len(corpus.captions)
                corpus.captions[row] = captions
                corpus.rows[side].append(row)
                unheard = side == "train" and said.language in s.unheard
                if said.language in captions and not unheard:
                    corpus.spoken[row, said.language, None] = len(corpus.utterances)
                    corpus.utterances.append(source.spoken(index))
            if len(corpus.captions) == before:
                raise UserError(
                    f"{given}: nothing of {split} is in --languages {' '.join(s.languages)}, or "
                    "all of it is in a test set"
                )
    return corpus


def read_stamps(s: Settings) -> Corpus:
    """Of the stamps, whose concepts are dealt out to one side each."""
    source = stamps.load(s.stamps)
    sides = questions.splits(questions.read_things(source), s.seed)
    rows = {"train": sides["train"], "held": sides["validation" if s.development else "test"]}
    captions: dict[int, dict[str, str]] = {}
    utterances: list[Utterance] = []
    spoken: dict[tuple[int, str, float | None], int] = {}
    known: set[tuple[str, str]] = set()
    """What is written in training; things apart may still be called alike in some language."""
    for side, those in rows.items():
        for row in those:
            example = source[row]
            texts = {lang: questions.first_clause(t) for lang, t in example["text"].items()}
            texts = {lang: texts[lang] for lang in s.languages if texts.get(lang)}
            if side == "held":
                texts = {lang: t for lang, t in texts.items() if (lang, normalize(t)) not in known}
            else:
                known |= {(lang, normalize(text)) for lang, text in texts.items()}
            captions[row] = texts
            for language, sound in (example.get("audio") or {}).items():
                unheard = side == "train" and language in s.unheard
                if language not in texts or unheard:
                    continue
                said_whole = normalize(example["text"][language]) == normalize(texts[language])
                if not said_whole or soundfile.info(io.BytesIO(sound)).duration > s.seconds:
                    continue
                read = lambda row=row, language=language: source[row]["audio"][language]  # noqa: E731
                noises = NOISES if side == "held" and language == NOISY else ()
                for noise in (None, *noises):
                    spoken[row, language, noise] = len(utterances)
                    text, key = texts[language], f"stamps {source.checksum} {row}"
                    utterances.append(
                        Utterance(text, language, recording=read, key=key, noise=noise)
                    )
    return Corpus(captions, rows, utterances, spoken)


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A source of rows of translations, each between two languages and of text, speech or both.

    What is in a row depends on (seed, index) alone. There are as many as rows of the corpus,
    language and language. What does not go in any more is left out, so that long ones are fewer
    than `shares` and `temperature` would have: in rows of 128, 0.89 of those below 20 ids stay,
    0.77 of 30 to 44, 0.53 of 60 to 89.

    Attributes:
        places: {utterance of training: vectors that it is given}.
    """

    corpus: Corpus
    lexicon: Lexicon
    turns: PackedTurns
    places: Mapping[int, int]
    shares: Sequence[float]
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        heard, written = self.corpus.languages(), self.corpus.captions
        known = self.corpus.rows["train"]
        rows = [row for row in known if sum(self._ways(len(written[row]) > 1, row in heard))]
        if not rows:
            raise UserError(f"--shares {self.shares}: none of the captions can be learned so")
        counts = Counter(lang for row in rows for lang in written[row])
        weights = {lang: count ** (1 / self.temperature) for lang, count in counts.items()}
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "heard", heard)

    def __len__(self) -> int:
        return len(self.rows) * len(self.weights) ** 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.turns.row(self.drawn(index), index)

    def drawn(self, index: int) -> Iterator[tuple[Turn, int]]:
        """Translations and the views of what is heard, without end."""
        rng, row = np.random.default_rng([self.seed, index]), self.rows[index % len(self.rows)]
        while True:
            yield self._turn(row, rng), int(rng.integers(self.turns.each.hearing.views))
            row = self.rows[rng.integers(len(self.rows))]

    def _ways(self, known: bool, said: bool) -> np.ndarray:
        """Shares of what can be done with a row, by whether another language is known, and sound.

        [4]: translating text, speech, and both, and writing down speech.
        """
        return np.array(self.shares) * [known, known and said, known and said, said]

    def _turn(self, row: int, rng: np.random.Generator) -> Turn:
        captions, heard = self.corpus.captions[row], self.heard.get(row)
        shares = self._ways(len(captions) > 1, bool(heard))
        way = rng.choice(4, p=shares / shares.sum())
        source = str(rng.choice(heard if way else sorted(captions)))
        if way == 3:  # write down what is said
            to = source
        else:
            others = sorted(set(captions) - {source})
            weights = np.array([self.weights[lang] for lang in others])
            to = str(rng.choice(others, p=weights / weights.sum()))
        text = captions[source] if way in (0, 2) else None
        known = source if rng.random() < 0.5 else None
        words = meanings(self.lexicon, captions[source], source, to)
        asked = instruction(to, known, text, spoken=way > 0, words=words)
        utterance = self.corpus.spoken[row, source, None] if way else None
        places = None if utterance is None else self.places[utterance]
        return Turn(asked, captions[to], utterance, to, places=places)


def meanings(words: Lexicon, text: str, source: str, to: str) -> list[str]:
    """What a lexicon says of a text's words in another language."""
    return [] if source == to else [meant for _, meant in words.look_up(text, source, to)]


# ------------------------------------------------------------------------------ model, objective


@lru_cache(maxsize=1)  # to be trained, and to be asked
def assemble(s: Settings) -> tuple[Corpus, Lexicon, SpokenLM]:
    """What is translated, where words are looked up, and the language model that hears and reads.

    The listener expects words of the captions of training and those that CLDR has.
    """
    corpus = read_corpus(s)
    emoji = lexicon.load([each for each in s.lexicon if each == "cldr"], s.languages)
    others = lexicon.load([each for each in s.lexicon if each not in ("cldr", "")], s.languages)
    words = Lexicon([*emoji.senses, *others.senses])
    source, rows = Spoken(corpus.utterances), heard(corpus)
    hearing = open_hearing(source, s.tower, seconds=s.seconds, views=s.views, rows=rows)
    checkpoint = load(s.language_model)
    if checkpoint.tokenizer is None:
        raise UserError(f"{s.language_model} has no tokenizer")
    dictionary = Dictionary.of(
        checkpoint.tokenizer,
        letters_in(corpus.utterances[number].text for number in rows),
        {
            code: counted_words(written_in(corpus, code), emoji.words(code))
            for code in s.languages
            if any(language == code for _, language, _ in corpus.spoken)
        },
    )
    ranks = {s.lora: s.lora_rank} if s.lora_rank else {}
    model = SpokenLM.of(
        checkpoint,
        hearing,
        dictionary,
        ranks=ranks,
        template=PLAIN,
        heard=s.heard,
        most=s.places,
        **SEARCH,
    )
    return corpus, words, model


SEARCH = {"beams": 32, "weight": 0.4, "bonus": 2.5, "unknown": -3.0}
"""Of words in what is heard; chosen on validation concepts."""


def written_in(corpus: Corpus, language: str) -> list[str]:
    """Captions of training in a language."""
    captions = (corpus.captions[row] for row in corpus.rows["train"])
    return [each[language] for each in captions if language in each]


def heard(corpus: Corpus) -> list[int]:
    """Utterances of training."""
    rows = set(corpus.rows["train"])
    return [number for (row, *_), number in corpus.spoken.items() if row in rows]


def in_pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a caption as they stand in the middle of a line."""
    return tokenizer.encode(" " + text, add_special_tokens=False).ids


def stream(s: Settings, corpus: Corpus, words: Lexicon, model: SpokenLM) -> Phases:
    """Training batches: dictation, then turns beside it."""
    texts = {number: corpus.utterances[number].text for number in heard(corpus)}
    pieces = {u: len(in_pieces(model.chat.tokenizer, text)) for u, text in texts.items()}
    # A few more than there is to say, since it may be spelled worse.
    places = {u: min(count * 5 // 4 + 2, s.places) for u, count in pieces.items()}
    classes = {u: model.listener.dictionary.spell(text) for u, text in texts.items()}
    if long := [number for number, each in classes.items() if len(each) > s.spelled]:
        print(f"{len(long)} recordings take over --spelled {s.spelled} letters and are not spelled")
    classes = {number: each for number, each in classes.items() if len(each) <= s.spelled}
    dictation = Dictation(list(classes), list(classes.values()), model.hearing, most=s.spelled)
    share = own_share()
    listen = Batches(dictation, s.batch_size, dictation.transforms, seed=s.seed, **share)
    turns = model.packed(s.length)
    drawn = Drawn(corpus, words, turns, places, s.shares, s.temperature, s.seed)
    turn = Batches(drawn, s.rows, turns.transforms, seed=s.seed, **share)
    both = Streams({"listen": listen, "turn": turn})
    return Phases([(Streams({"listen": listen}), s.listen_steps), (both, 0)])


def build(s: Settings) -> Experiment:
    if not 0 < s.listen_steps < s.steps:
        raise UserError(f"--listen-steps {s.listen_steps} must lie between 0 and {s.steps}")
    if len(s.shares) != 4 or min(s.shares) < 0 or not any(s.shares):
        raise UserError(f"--shares {s.shares}: give four numbers, none of them negative")
    if s.temperature <= 0:
        raise UserError(f"--temperature {s.temperature} must be positive")
    if wrong := [pair for pair in s.pairs if pair.count("-") != 1]:
        raise UserError(f"--pairs {wrong}: expected two codes each, such as fr-es")
    corpus, words, model = assemble(s)
    phases = (s.listen_steps, s.steps - s.listen_steps)
    schedule = warmup_cosine(*((s.learning_rate, steps) for steps in phases))
    translate = causal_lm(model.tuned, chunk=8, label_smoothing=s.label_smoothing)
    return Experiment(
        data=Later(lambda: stream(s, corpus, words, model)),
        init=model.init,
        objective=spell_and_answer(model, {"turn": translate}, s.ctc_weight),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, weight_decay=0.01),
            parameter_ema(0.98),
        ),
        pretrained=model.published,
        trainable=TRAINED,
        report=lambda params, folder: report(s, corpus, words, model, params, folder),
    )


def assistant(s: Settings, params: Params) -> Translator:
    """What `python -m fusion_jax translate --workdir` asks."""
    corpus, words, model = assemble(s)
    trained = {lang for row in corpus.rows["train"] for lang in corpus.captions[row]}
    languages = tuple(lang for lang in s.languages if lang in trained)
    data = (
        f"trained on {len(corpus.rows['train'])} captions of {named(s)} in {', '.join(languages)}"
    )
    answers = dataclasses.replace(model.assistant(params, data), languages=languages)
    return Translator(answers, words, partial(model.reader, answers.params))


def named(s: Settings) -> str:
    """What the data are called."""
    return ", ".join(given.split()[0] for given in s.published) or "Tux Paint stamps"


# ---------------------------------------------------------------------------------------- report

Items = list[tuple[int, str, float | None]]
"""Captions: a row, a language, and decibels of noise over its recording, if any."""
FEWEST = 10
"""Recordings of a language from which it gets a row."""
EXAMPLES, EXAMPLE_TOKENS = 6, 24
AS_IT_CAME = f"as it came, {EXAMPLES} examples"
"""What the language model writes untrained after so many examples, at most so many tokens."""
WAYS = {"text": (True, False), "speech": (False, True), "both": (True, True)}
UNAIDED = ", nothing looked up"
WORDS = "words looked up"
"""What the lexicon says of each word, and nothing else."""


def report(
    s: Settings,
    corpus: Corpus,
    words: Lexicon,
    model: SpokenLM,
    params: Params,
    folder: Path,
) -> dict[str, float]:
    """The same held-out captions given as text, speech and both: into English, from it, between
    others, and in noise; and recordings written down."""
    merged = model.tuned.merged(params)
    nearest = nearest_caption(corpus)
    found: dict[str, dict[str, dict[str, float]]] = {}

    def given(items: Items, way: str) -> list[str]:
        """Each caption, or its words as they are heard."""
        if WAYS[way][0]:
            return [corpus.captions[row][lang] for row, lang, _ in items]
        (language,) = {lang for _, lang, _ in items}
        return model.spell(merged, [corpus.spoken[item] for item in items], language)

    def translated(items: Items, to: str, way: str) -> list[str]:
        """By text, speech or both of one language, which the model is told."""
        (lang,) = {lang for _, lang, _ in items}
        way, unaided, _ = way.partition(UNAIDED)
        written, spoken = WAYS[way]
        asked = [
            instruction(
                to,
                lang,
                corpus.captions[row][lang] if written else None,
                spoken,
                [] if unaided else meanings(words, said, lang, to),
            )
            for (row, *_), said in zip(items, given(items, way), strict=True)
        ]
        rows = [corpus.spoken[item] if spoken else None for item in items]
        written_ids = model.write(merged, asked, rows, s.written, lang)
        return [model.text(ids) for ids in written_ids]

    def show(what: str, measure: str, scores: dict[str, dict[str, Score]], about: str) -> None:
        title = f"{what}, {measure}"
        print(format_scores(title, scores, f"{named(s)}, {about}; seed {s.seed}"))
        name = title.lower().replace(",", "").replace(" ", "_")
        plot_scores(folder / f"{name}.png", scores, what, measure)
        found[title] = {
            row: {name: score.value for name, score in each.items()} for row, each in scores.items()
        }

    def items_of(lang: str, noise: float | None = None) -> Items:
        every = [(row, lang, noise) for row in corpus.rows["held"] if "en" in corpus.captions[row]]
        return [item for item in every if item in corpus.spoken][: s.most]

    def pairs(items: Items, to: str, way: str) -> tuple[list[str], list[str]]:
        return translated(items, to, way), [corpus.captions[row][to] for row, *_ in items]

    def everyone(items: Items, to: str, ways: Iterable[str]) -> dict[str, list[str]]:
        """What the model writes, and the baselines."""
        texts = [(corpus.captions[row][lang], lang) for row, lang, _ in items]
        return {way: translated(items, to, way) for way in (*ways, f"text{UNAIDED}")} | {
            WORDS: [" ".join(meanings(words, text, lang, to)) for text, lang in texts],
            "copy the source": [text for text, _ in texts],
            "nearest caption": [nearest(text, lang, to) for text, lang in texts],
        }

    def untrained(captions: list[str], lang: str, to: str) -> list[str]:
        """What the language model as it came writes after examples of training."""
        shown = examples(corpus, lang, to)
        asked = [shown + instruction(to, lang, text, spoken=False) for text in captions]
        params = {"decoder": model.published["base"]["decoder"]}
        written = model.write(params, asked, [None] * len(asked), min(s.written, EXAMPLE_TOKENS))
        return [model.text(ids).partition("\n")[0] for ids in written]

    into: dict[str, dict[str, Score]] = {}
    pooled: dict[str, tuple[list[str], list[str]]] = {}
    for lang in [lang for lang in s.languages if lang != "en" and len(items_of(lang)) >= FEWEST]:
        items = items_of(lang)
        truth = [corpus.captions[row]["en"] for row, *_ in items]
        captions = [corpus.captions[row][lang] for row, *_ in items]
        written = everyone(items, "en", WAYS) | {AS_IT_CAME: untrained(captions, lang, "en")}
        name = f"{lang} (unheard)" if lang in s.unheard else lang
        into[name] = {way: chrf(texts, truth) for way, texts in written.items()}
        for way, texts in written.items():
            if lang not in s.unheard:
                a, b = pooled.setdefault(way, ([], []))
                a.extend(texts)
                b.extend(truth)
    if pooled:
        every = "all that were heard"
        into[every] = {way: chrf(a, b) for way, (a, b) in pooled.items()}
        about = f"at most {s.most} recordings a language of things never trained on, people's"
        show("Into English", "chrF", into, about)
        for measure, score in {"BLEU": bleu, "exact match": exact_match}.items():
            scores = {every: {way: score(a, b) for way, (a, b) in pooled.items()}}
            show("Into English", measure, scores, about)
        better = max(("text", "speech"), key=lambda way: into[every][way].value)
        texts, truth = pooled["both"]
        p = paired_p_value(texts, pooled[better][0], truth)
        more = into[every]["both"].value - into[every][better].value
        print(f"Both against {better} alone: chrF {more:+.3f} (paired bootstrap: p = {p:.3f})\n")
    noisy: dict[str, dict[str, tuple[list[str], list[str]]]] = {}
    for noise in (None, *NOISES):
        items = items_of(NOISY, noise)
        if items:
            name = "clean" if noise is None else f"{noise:.0f} dB"
            noisy[name] = {way: pairs(items, "en", way) for way in ("speech", "both")}
    for measure, score in {"chrF": chrf, "exact match": exact_match}.items():
        scores = {
            name: {way: score(*pair) for way, pair in ways.items()} for name, ways in noisy.items()
        }
        if len(scores) > 1:
            about = f"recordings of things never trained on; views of each in training: {s.views}"
            show(f"{NOISY} to en in white noise", measure, scores, about)
    out: dict[str, dict[str, dict[str, Score]]] = {"chrF": {}, "BLEU": {}}
    said: dict[str, dict[str, Score]] = {}
    for lang in [lang for lang in s.languages if lang != "en"]:
        rows = [r for r in corpus.rows["held"] if {"en", lang} <= set(corpus.captions[r])][: s.most]
        if not rows:
            continue
        written = everyone([(row, "en", None) for row in rows], lang, ["text"])
        truth = [corpus.captions[row][lang] for row in rows]
        for measure, score in {"chrF": chrf, "BLEU": partial(bleu, language=lang)}.items():
            out[measure][lang] = {way: score(texts, truth) for way, texts in written.items()}
        spoken = [(r, "en", None) for r in rows if (r, "en", None) in corpus.spoken]
        if len(spoken) >= FEWEST:
            said[lang] = {way: chrf(*pairs(spoken, lang, way)) for way in WAYS}
    about = f"at most {s.most} captions a language of things never seen"
    for measure, scores in out.items():
        if scores:
            show("From English", measure, scores, about)
    if said:
        show("From spoken English", "chrF", said, f"{about}, those with a recording")
    between: dict[str, dict[str, Score]] = {}
    for pair in s.pairs:
        lang, _, to = pair.partition("-")
        rows = [row for row in corpus.rows["held"] if {lang, to} <= set(corpus.captions[row])]
        items = [(row, lang, None) for row in rows]
        recorded = [item for item in items if item in corpus.spoken]
        items, ways = (recorded, WAYS) if len(recorded) >= FEWEST else (items, ["text"])
        if len(items := items[: s.most]) >= FEWEST:
            truth = [corpus.captions[row][to] for row, *_ in items]
            between[f"{lang} to {to}"] = {
                way: chrf(texts, truth) for way, texts in everyone(items, to, ways).items()
            }
    if between:
        about = f"at most {s.most} captions a pair of things never trained on"
        show("Between other languages", "chrF", between, about)
    heard_as: dict[str, dict[str, Score]] = {}
    for lang in s.languages:
        spoken = [(row, lang, None) for row in corpus.rows["held"]]
        spoken = [item for item in spoken if item in corpus.spoken][: s.most]
        if len(spoken) >= FEWEST:
            truth = [corpus.captions[row][lang] for row, *_ in spoken]
            heard_as[f"{lang} (unheard)" if lang in s.unheard else lang] = {
                "listener": character_error_rate(given(spoken, "speech"), truth),
                "language unknown": character_error_rate(
                    model.spell(merged, [corpus.spoken[item] for item in spoken]), truth
                ),
                "language model": character_error_rate(translated(spoken, lang, "speech"), truth),
            }
    if heard_as:
        about = f"at most {s.most} recordings a language of things never trained on, people's"
        show("Written down", "character errors", heard_as, about)
    return {
        f"{title}/{row}/{name}": value
        for title, rows in found.items()
        for row, each in rows.items()
        for name, value in each.items()
    }


def examples(corpus: Corpus, lang: str, to: str) -> str:
    """Captions of training and their translations, as turns are written, each on a line."""
    rows = [r for r in corpus.rows["train"] if {lang, to} <= set(corpus.captions[r])]
    chosen = [corpus.captions[row] for row in spread(rows, EXAMPLES)]
    shown = (f"{instruction(to, lang, each[lang], spoken=False)}\n{each[to]}\n" for each in chosen)
    return "".join(shown)


def nearest_caption(corpus: Corpus) -> Callable[[str, str, str], str]:
    """(text, its language, another) -> what the most similar caption of training is there."""

    def nearest(text: str, source: str, to: str) -> str:
        rows = [r for r in corpus.rows["train"] if {source, to} <= set(corpus.captions[r])]
        if not rows:
            return ""
        best = max(rows, key=lambda row: alike(corpus.captions[row][source], text))
        return corpus.captions[best][to]

    return nearest
