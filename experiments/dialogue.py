"""Speech that a language model understands: Moonshine's encoder fused into SmolLM2.

    python -m fusion_jax train experiments/dialogue.py
    python -m fusion_jax chat --workdir runs/dialogue
    python -m fusion_jax ask --workdir runs/dialogue --audio question.ogg ""

Moonshine Tiny's encoder and SmolLM2 stay frozen. A `Listener` learns which letter each frame says
(CTC, `listen_steps`); of the sentences that SmolLM2's own words and those of the training texts can
make of these letters, SmolLM2 takes the one that it, too, expects, and reads it as if it had been
typed. With more steps and `--lora-rank 8` adapters learn to answer what is heard amiss: each token
of SmolLM2's own answer to the typed words is to be expected after the sound as well
(`recognition.as_typed`), and after typed questions, so that those stay near what they were.

Questions are about the things on the stamps; short definitions from WordNet are only spelled. Two
synthesizers say both (Festival Lite two thirds, espeak-ng one third). Real recordings are
Asterisk's telephone prompts (one woman, 8 kHz) and the few English recordings of the stamps. No
question or prompt that is tested on was said or written in training, nor any question or recording
with the head noun of a held thing; a definition, or a recording of `--published`, may hold it.

Seed 0, on one core beside other work: 24 minutes to synthesize and encode 13,000 utterances in two
views, 54 to train. Words that are wrong (%) as the listener and as Moonshine's own decoder write
them down; then how near (chrF) the first 24 tokens of an answer are to those that SmolLM2 gives to
the typed words: of the spoken question, hearing nothing, and by the cascade, Moonshine's words
answered by SmolLM2 (80 of each kind, 13 names):

                                     wrong words          nearness of answers
                                     listener  Moonshine  fused  nothing  cascade
    synthetic, voices of training    28.1      35.3       37.7   16.6     34.5
    synthetic, another voice         27.1      22.2       37.3   16.6     49.7
    recorded telephone prompts       41.4      13.7       34.8   30.5     48.8
    recorded names of things         96.3      85.2       17.1   15.6     11.3

So in voices that it knows spoken questions are understood a little better than by the cascade; in
others, and on telephones, of which it heard few hundred recordings, the cascade is the better
choice still. Typed questions are answered as before, to the letter. The first words of an answer
come after 0.42 to 0.43 s, by the cascade after 0.15 to 0.17 (medians of 20 recordings a kind on 2
cores, `experiments.benchmarks.dialogue`): choosing among eight candidates takes most of it.

What it lacks is speech: more recordings come in by `--published`. On validation things, after 1,600
steps on two thirds of the data and with WordNet's names in the dictionary too, 28.8 and 32.0% of
words were wrong (60 questions in voices of training, 60 in another) and 38.0 of 45 prompts by the
dictionary alone, 24.7, 28.2 and 36.9 with SmolLM2 choosing among eight candidates. WordNet's names
harm a little. A listener that told SmolLM2's 10,000 word pieces apart in place of 41 letters had
33, 31 (320 of each) and 49, with all data and steps. Adapters (300 steps, rank 8) were tried with
that one alone, and did not help.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import optax

from fusion_jax.data import asterisk, concepts, espeak, flite, questions, stamps
from fusion_jax.data.audio import SAMPLE_RATE, decode
from fusion_jax.data.domain_batches import own_share
from fusion_jax.data.pipeline import Batches, Mixture
from fusion_jax.data.speech_sets import published, spoken_questions
from fusion_jax.data.spoken import Spoken, Utterance
from fusion_jax.data.streams import Later, Phases, Streams
from fusion_jax.errors import UserError
from fusion_jax.evaluation.table import print_table
from fusion_jax.evaluation.translation import chrf, word_error_rate
from fusion_jax.knowledge import wordnet
from fusion_jax.language.ask import Assistant
from fusion_jax.language.hearing import Dictation, Turn, Typed, open_hearing
from fusion_jax.language.recogniser import recogniser
from fusion_jax.language.spoken import SpokenLM
from fusion_jax.language.tuned import TRAINED
from fusion_jax.language.word_tree import Dictionary, letters_in, own_words
from fusion_jax.objectives.generative import causal_lm
from fusion_jax.objectives.recognition import as_typed, spell_and_answer
from fusion_jax.pretrained.load import load
from fusion_jax.training.experiment import Experiment
from fusion_jax.training.optimizer import warmup_cosine
from fusion_jax.training.partition import Params
from fusion_jax.training.settings import Settings as Base
from fusion_jax.training.settings import runtime
from fusion_jax.training.step import parameter_ema

TEMPLATES = (
    *("What is {}?", "Is {} an animal?", "Where can I find {}?", "Tell me about {}."),
    *("What is {} used for?", "How big is {}?", "Can {} fly?", "What color is {}?"),
    *("What does {} look like?", "Describe {}.", "Is {} good to eat?", "How do I draw {}?"),
    *("Write a sentence about {}.", "What sound does {} make?", "Who invented {}?"),
)


@dataclasses.dataclass(frozen=True)
class Settings(Base):
    steps: int = 4000
    """Of them `listen_steps` train the listener alone, and are quick; in more adapters learn to
    answer what it hears."""
    listen_steps: int = 4000
    batch_size: int = 32
    """Recordings that are spelled in a step."""
    turns: int = 8
    """Turns that are answered in a step."""
    checkpoint_every: int = 500
    learning_rate: float = 2e-3
    answer_learning_rate: float = 5e-4
    """Once turns are answered."""
    language_model: str = "smollm2-135m-instruct"
    """A name, hub id, folder or GGUF file of a decoder that chats."""
    tower: str = "moonshine-tiny"
    """A published encoder of sound."""
    lora_rank: int = 0
    """0 leaves the language model as it is."""
    lora: str = "attention/(query|value)"
    """Which of the decoder's kernels get adapters."""
    ctc_weight: float = 0.3
    """Of the spelling, once turns are answered."""
    questions: int = 3000
    """Questions that are synthesized."""
    answered: int = 1500
    """Of these, and at most so many recordings, to which SmolLM2's own answers are learned."""
    sentences: int = 10_000
    """Short definitions from WordNet that are synthesized, to be spelled."""
    shares: tuple[float, ...] = (0.6, 0.2, 0.2)
    """Of synthetic questions, recordings, and typed questions among turns."""
    answer_tokens: int = 24
    """So much of an answer is learned, and compared."""
    seconds: float = 4.5
    """What lies beyond is not heard in training."""
    views: int = 2
    """Of each recording of training: as it is, then at other speeds and in noise of 0 to 20 dB."""
    spelled: int = 90
    """Most letters of a recording that is learned to be spelled."""
    candidates: int = 8
    """Sentences that the letters may spell, of which the language model takes the one that it, too,
    expects."""
    length: int = 96
    """Ids of a turn."""
    most: int | None = runtime(None)
    """Test turns of each kind in the report, at most; None: all."""
    asked: Path | None = None
    """Your own recorded questions beside these: JSONL of {"audio", "question", "answer"}. Their
    answers are learned as they are written, and count as much as all other turns."""
    published: tuple[str, ...] = ()
    """Published recordings of English beside these, to be spelled: "librispeech LibriSpeech" or
    "common_voice CV/en". Give --seconds and --spelled that fit them."""
    stamps: Path | None = None
    """Tux Paint's stamps, if they are not to be fetched."""
    development: bool = False
    """Report on validation things and prompts in place of the test ones."""


# ------------------------------------------------------------------------------------------ data


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is said, and which rows of it serve for what.

    Attributes:
        train, tests: {kind: rows}; kinds of training are "question", "sentence" (published
            recordings among them, which are spelled alone) and "recording".
        answers: {row: answer} of recorded questions that came with one.
    """

    utterances: list[Utterance]
    train: dict[str, list[int]]
    tests: dict[str, list[int]]
    answers: dict[int, str]


def read_corpus(s: Settings) -> Corpus:
    """Draws questions and voices, and looks recordings up."""
    rng = np.random.default_rng(s.seed)
    source = stamps.load(s.stamps)
    things = questions.read_things(source)
    sides = questions.splits(things, s.seed)
    held = "validation" if s.development else "test"
    kept = [row for side in ("validation", "test") for row in sides[side]]
    nouns = {things[row].noun for row in kept} - {"", None}
    utterances: list[Utterance] = []

    def fresh(text: str) -> bool:
        """Whether no head noun of a held thing is said in it."""
        words = concepts.normalize(text).split()
        return not any(word in nouns or questions.head_noun(word) in nouns for word in words)

    def add(those: list[Utterance]) -> list[int]:
        utterances.extend(those)
        return list(range(len(utterances) - len(those), len(utterances)))

    def asked(side: str, count: int) -> list[str]:
        captions = [things[row].caption for row in sides[side] if things[row].caption]
        captions = [caption for caption in captions if side != "train" or fresh(caption)]
        names = [questions.in_sentence(each) for each in captions if len(each) <= 30]
        pairs = [
            (TEMPLATES[rng.integers(len(TEMPLATES))], names[rng.integers(len(names))])
            for _ in range(count)
        ]
        return [template.format(name) for template, name in pairs]

    def synthetic(texts: Sequence[str]) -> list[Utterance]:
        return [Utterance(text, voice=draw_voice(rng, n)) for n, text in enumerate(texts)]

    def recorded(side: str) -> list[Utterance]:
        found = []
        for row in sides[side]:
            spoken = source[row].get("audio") or {}
            known = things[row].caption
            if "en" in spoken and known and (side != "train" or fresh(known)):
                read = lambda row=row: source[row]["audio"]["en"]  # noqa: E731
                key = f"stamps {source.checksum} {row}"
                found.append(Utterance(known, recording=read, key=key))
        return found

    prompts = asterisk.load(("en",))
    prompted = asterisk.splits(prompts, s.seed)

    def short(sound: bytes) -> bool:
        """Whether all of it is heard."""
        return len(decode(sound)) <= s.seconds * SAMPLE_RATE

    def telephoned(side: str) -> list[Utterance]:
        found = []
        for row in prompted[side]:
            read = lambda row=row: prompts[row]["audio"]["en"]  # noqa: E731
            words, key = prompts[row]["text"]["en"], f"asterisk {prompts.checksum} {row}"
            if (side != "train" or fresh(words)) and short(read()):
                found.append(Utterance(words, recording=read, key=key))
        return found

    train = {
        "question": add(synthetic(asked("train", s.questions))),
        "sentence": add(synthetic(definitions(s.sentences, rng))),
        "recording": add([*telephoned("train"), *recorded("train")]),
    }
    another = [Utterance(text, voice=UNHEARD) for text in asked(held, TESTED)]
    tests = {
        "synthetic, voices of training": add(synthetic(asked(held, TESTED))),
        "synthetic, another voice": add(another),
        "recorded telephone prompts": add(telephoned(held)[:TESTED]),
        "recorded names of things": add(recorded(held)),
    }
    answers: dict[int, str] = {}
    if s.asked is not None:
        own = spoken_questions(s.asked)
        shares = concepts.split(own.concepts, s.seed)
        for side in ("train", held):
            numbers = [number for number in shares[side] if own.seconds(number) <= s.seconds]
            if left := len(shares[side]) - len(numbers):
                print(f"{left} of your {side} questions take over {s.seconds:g} s and are left out")
            rows = add([own.spoken(number, "en") for number in numbers])
            answers |= {
                row: own.utterances[number].more["answer"]
                for row, number in zip(rows, numbers, strict=True)
            }
            if side == "train":
                train["recording"] += rows
            else:
                tests["your own questions"] = rows
    if s.published:
        said = {
            utterances[row].text
            for kind in (train, tests)
            for rows in kind.values()
            for row in rows
        }
        tested, trained = read_published(s, {concepts.normalize(text) for text in said})
        tests["published recordings"] = add(tested)
        train["sentence"] += add([each for each in trained if fresh(each.text)])
    return Corpus(utterances, train, tests, answers)


def read_published(s: Settings, said: Set[str]) -> tuple[list[Utterance], list[Utterance]]:
    """English recordings of published sets to test on, TESTED at most, drawn from all sets alike,
    and to train on.

    Nothing of either is what the other, or one of `said`, says.
    """
    rng, sides, said = np.random.default_rng(s.seed), [], set(said)
    for split in ("dev" if s.development else "test", "train"):
        most = None if split == "train" else -(-TESTED // len(s.published))
        found: list[Utterance] = []
        for given in s.published:
            source = published(given, split)
            english = [n for n, each in enumerate(source.utterances) if each.language == "en"]
            fit = (
                number
                for number in rng.permutation(english).tolist()
                if concepts.normalize(source.utterances[number].text) not in said
                and source.seconds(number) <= s.seconds
            )
            rows = sorted(itertools.islice(fit, most))
            if not rows:
                raise UserError(
                    f"{given}: nothing of {split} is in English, takes at most --seconds "
                    f"{s.seconds:g} and is not said elsewhere"
                )
            print(f"{given}: {len(rows)} of {len(source)} recordings of {split} are taken")
            found += [source.spoken(row) for row in rows]
        sides.append(found)
        said |= {concepts.normalize(each.text) for each in found}
    return sides[0], sides[1]


TESTED = 80
"""Most utterances of a kind that are tested."""
UNHEARD = flite.Voice("rms")
HEARD = ("awb", "kal16", "slt")
VARIANTS = ("f2", "f5", "m1", "m3", "f3")


def draw_voice(rng: np.random.Generator, number: int) -> flite.Voice | espeak.Voice:
    """One of the voices that are heard in training."""
    if number % 3 < 2:
        return flite.Voice.draw(rng, HEARD)
    voice = espeak.Voice.draw(rng, ("en-us", "en-us", "en"))
    return dataclasses.replace(voice, variant=str(rng.choice(VARIANTS)), pitch=50)


def definitions(count: int, rng: np.random.Generator) -> list[str]:
    """Short ones, of nouns with several meanings or of several words, which are the commoner ones,
    in an order drawn at random: "The absence of matter is vacuum."

    The noun comes last, so that its pieces are those that it has in a sentence.
    """
    graph = wordnet.load()
    found = []
    for sense in rng.permutation(len(graph.descriptions)):
        if len(found) == count:
            break
        name = graph.names["en"][sense][0]
        text = f"{graph.descriptions[sense].split(';')[0].strip()} is {name}."
        short = len(text.split()) <= 10 and text.isascii() and "(" not in text
        senses = graph.senses["en"]
        if short and (" " in name or len(senses.get(concepts.normalize(name), ())) > 1):
            found.append(f"{text[0].upper()}{text[1:]}")
    return found


# ------------------------------------------------------------------------------ model, objective


@functools.lru_cache(maxsize=1)  # to be trained, and to be asked
def assemble(s: Settings) -> tuple[Corpus, SpokenLM]:
    """What is said, and the language model that hears it."""
    corpus = read_corpus(s)
    trained = [row for rows in corpus.train.values() for row in rows]
    hearing = open_hearing(
        Spoken(corpus.utterances), s.tower, seconds=s.seconds, views=s.views, rows=trained
    )
    checkpoint = load(s.language_model)
    if checkpoint.tokenizer is None or checkpoint.chat_template is None:
        raise UserError(f"{s.language_model} does not chat: give a checkpoint with a chat template")
    texts = [corpus.utterances[row].text for row in trained]
    letters = letters_in(texts)
    words = own_words(checkpoint.tokenizer, texts, letters)
    dictionary = Dictionary.of(checkpoint.tokenizer, letters, {"en": words})
    ranks = {s.lora: s.lora_rank} if s.lora_rank else {}
    model = SpokenLM.of(checkpoint, hearing, dictionary, ranks=ranks, candidates=s.candidates)
    return corpus, model


def stream(s: Settings, corpus: Corpus, model: SpokenLM) -> Phases:
    """Speech to spell, and from `listen_steps` on turns to answer too.

    Recordings, of which there are few, are repeated until they are about a sixth of what is
    spelled.
    """
    share = own_share()
    rows = [row for kind in corpus.train.values() for row in kind]
    rows += corpus.train["recording"] * (len(rows) // (5 * len(corpus.train["recording"])))
    dictionary = model.listener.dictionary
    spelled = [(row, dictionary.spell(corpus.utterances[row].text)) for row in rows]
    spelled = [(row, classes) for row, classes in spelled if len(classes) <= s.spelled]
    dictation = Dictation(*map(list, zip(*spelled, strict=True)), model.hearing, most=s.spelled)
    listen = Batches(dictation, s.batch_size, dictation.transforms, seed=s.seed, **share)
    if s.steps == s.listen_steps:  # it need not be asked for its own answers
        return Phases([(Streams({"listen": listen}), 0)])
    asked = corpus.train["question"][: s.answered]
    own = [row for row in corpus.train["recording"] if row in corpus.answers]
    recorded = [row for row in corpus.train["recording"] if row not in corpus.answers]
    recorded = recorded[: s.answered]
    said = [corpus.utterances[row].text for row in asked + recorded]
    written = model.own_answers(said, s.answer_tokens)
    # As text, one that ended is learned with its end; of others so much, and not what comes after.
    answers = [model.text(ids) if len(ids) < s.answer_tokens else ids for ids in written]
    heard = [
        Turn("<audio>", answer, row, said=text)
        for row, text, answer in zip(asked + recorded, said, answers, strict=True)
    ]
    typed = [Turn(turn.said, turn.answer) for turn in heard]
    kinds = [heard[: len(asked)], heard[len(asked) :], typed]
    parts = [Typed(turns, model.hearing, model.chat, model.layout, s.length) for turns in kinds]
    mixture = Mixture(parts, s.shares)
    turn = Batches(mixture, s.turns, parts[0].transforms, seed=s.seed, **share)
    streams: dict[str, Any] = {"listen": listen, "turn": turn}
    if own:
        told = model.turns([Turn("<audio>", corpus.answers[row], row) for row in own], s.length)
        streams["told"] = Batches(told, s.turns, told.transforms, seed=s.seed, **share)
    return Phases([(Streams({"listen": listen}), s.listen_steps), (Streams(streams), 0)])


def build(s: Settings) -> Experiment:
    if not 0 < s.listen_steps <= s.steps:
        raise UserError(f"--listen-steps {s.listen_steps} must lie between 1 and {s.steps}")
    if bool(s.lora_rank) != (s.listen_steps < s.steps):
        raise UserError(
            f"--lora-rank {s.lora_rank}: adapters alone learn from answers, in the --steps after "
            "--listen-steps: give both or neither"
        )
    if s.asked is not None and s.listen_steps == s.steps:
        raise UserError(
            f"--asked {s.asked}: its answers are learned after --listen-steps, by adapters: give "
            "more --steps and a --lora-rank"
        )
    if len(s.shares) != 3 or min(s.shares) < 0 or not any(s.shares):
        raise UserError(f"--shares {s.shares}: give three numbers, none of them negative")
    corpus, model = assemble(s)
    answering = (s.answer_learning_rate, s.steps - s.listen_steps)
    schedule = warmup_cosine((s.learning_rate, s.listen_steps), answering)
    learned = {
        "turn": as_typed(model.tuned, s.answer_tokens),
        "told": causal_lm(model.tuned, chunk=8),
    }
    return Experiment(
        data=Later(lambda: stream(s, corpus, model)),
        init=model.init,
        objective=spell_and_answer(model, learned, s.ctc_weight),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, weight_decay=0.01),
            parameter_ema(0.98),
        ),
        pretrained=model.published,
        trainable=TRAINED,
        report=lambda params, folder: report(s, corpus, model, params, folder),
    )


def assistant(s: Settings, params: Params) -> Assistant:
    """What `python -m fusion_jax chat --workdir` talks to."""
    corpus, model = assemble(s)
    trained = [corpus.utterances[row] for rows in corpus.train.values() for row in rows]
    synthetic = sum(said.synthetic for said in trained)
    data = f"trained on {len(trained)} utterances, {synthetic} of them synthetic"
    return model.assistant(params, data)


# ---------------------------------------------------------------------------------------- report


def report(
    s: Settings, corpus: Corpus, model: SpokenLM, params: Params, folder: Path
) -> dict[str, float]:
    """Against the typed question's answer, and against recognising first and answering then."""
    merged = model.tuned.merged(params)
    recognise = cascade(s.tower)
    errors: dict[str, dict[str, float]] = {}
    agreement: dict[str, dict[str, float]] = {}
    tests = {kind: rows[: s.most] for kind, rows in corpus.tests.items() if rows}
    for kind, rows in tests.items():
        said = [corpus.utterances[row].text for row in rows]
        typed = model.own_answers(said, s.answer_tokens)
        if rows[0] in corpus.answers:
            typed = [model.chat.encode(corpus.answers[row])[: s.answer_tokens] for row in rows]
        written = {"listener": model.spell(merged, rows)}
        answers = {"fused": model.write(merged, ["<audio>"] * len(rows), rows, s.answer_tokens)}
        answers["fused, typed"] = model.write(merged, said, [None] * len(rows), s.answer_tokens)
        answers["nothing heard"] = model.own_answers([""] * len(rows), s.answer_tokens)
        if recognise is not None:
            texts = recognise([corpus.utterances[row] for row in rows])
            written["Moonshine"] = texts
            answers["Moonshine, then SmolLM2"] = model.own_answers(texts, s.answer_tokens)
        errors[kind] = {name: word_error_rate(text, said).value for name, text in written.items()}
        for name, found in answers.items():
            same = [a == b for a, b in zip(found, typed, strict=True)]
            agreement.setdefault(f"{kind}, same answer", {})[name] = float(np.mean(same))
            texts = [model.text(ids) for ids in found]
            score = chrf(texts, [model.text(ids) for ids in typed]).value
            agreement.setdefault(f"{kind}, chrF", {})[name] = score
    counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in tests.items())
    about = f"questions and prompts never trained on: {counts}"
    print_table("Word error rate", errors, about, [s.seed])
    print_table(
        f"Answers (first {s.answer_tokens} tokens) against those to the typed words",
        agreement,
        about,
        [s.seed],
    )
    tables = {"wer": errors, "answer": agreement}
    return {
        f"{table}/{kind}/{name}": value
        for table, found in tables.items()
        for kind, row in found.items()
        for name, value in row.items()
    }


def cascade(tower: str) -> Callable[[Sequence[Utterance]], list[str]] | None:
    """What the tower's own decoder writes of recordings, where it has one."""
    try:
        write = recogniser(tower)
    except UserError:
        return None

    def recognise(those: Sequence[Utterance]) -> list[str]:
        sounds = (said.sound() for said in those)
        return [write(decode(s) if isinstance(s, bytes) else s) for s in sounds]

    return recognise
