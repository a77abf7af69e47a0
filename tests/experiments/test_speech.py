"""What dialogue.py and translation.py train on, and what they keep for the test."""

import dataclasses
import importlib.util
import inspect
import io
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from fusion_jax.data import concepts, stamps
from fusion_jax.errors import UserError
from fusion_jax.knowledge.lexicon import Lexicon
from fusion_jax.language.ask import Assistant
from fusion_jax.language.translate import check, instruction, translate

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def experiment(name):
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


WORDS = Lexicon([{"fr": ["un", "une"], "en": ["a"], "da": ["en"]}])
translation, dialogue = experiment("translation"), experiment("dialogue")


@pytest.fixture(scope="module")
def corpus():
    try:
        stamps.load()
    except UserError as error:
        pytest.skip(str(error))
    return translation.read_corpus(translation.Settings(languages=("en", "fr", "da", "ru")))


def test_no_held_thing_is_said_or_written_in_training(corpus):
    known = stamps.load().concepts
    sides = [{known[row] for row in corpus.rows[side]} for side in ("train", "held")]
    assert sides[0] and sides[1] and sides[0].isdisjoint(sides[1])
    heard = [corpus.utterances[number] for number in translation.heard(corpus)]
    assert {each.language for each in heard} == {"en", "fr", "ru"}  # no Danish is heard
    assert all(each.noise is None and not each.synthetic for each in heard)
    held = {key for key in corpus.spoken if key[0] in set(corpus.rows["held"])}
    assert {language for _, language, _ in held} >= {"fr", "da", "ru"}
    assert {noise for _, language, noise in held if language == "fr"} == {None, 20.0, 10.0, 0.0}


def test_what_is_heard_says_the_caption_whole(corpus):
    """Some recordings read a whole sentence, of whose caption the first clause is kept."""
    source = stamps.load()
    for (row, language, _), number in corpus.spoken.items():
        whole = concepts.normalize(source[row]["text"][language])
        assert whole == concepts.normalize(corpus.utterances[number].text)
        sound = io.BytesIO(source[row]["audio"][language])
        assert soundfile.info(sound).duration <= translation.Settings.seconds


def drawing(views):
    """In place of `PackedTurns`: what the first of a row would be made of."""
    row = lambda turns, number: (number, *next(turns))  # noqa: E731
    hearing = SimpleNamespace(views=views)
    return SimpleNamespace(row=row, each=SimpleNamespace(hearing=hearing))


def test_draws_are_of_training_and_depend_on_seed_and_index_alone(corpus):
    turns = drawing(views=3)
    places = {number: number % 7 for number in translation.heard(corpus)}
    drawn = translation.Drawn(corpus, WORDS, turns, places, (0.3, 0.3, 0.25, 0.15), 2.0, seed=0)
    found = [drawn[index] for index in range(800)]
    assert found[:50] == [drawn[index] for index in range(50)]
    other = dataclasses.replace(drawn, seed=1)
    assert found[:50] != [other[index] for index in range(50)]
    held = {text for row in corpus.rows["held"] for text in corpus.captions[row].values()}
    ways, aided = np.zeros(2), 0
    assert {view for *_, view in found} == {0, 1, 2}
    first = [list(itertools.islice(drawn.drawn(index), 5)) for index in range(60)]
    assert len({turn.content for turns in first for turn, _ in turns}) > 150
    for turn in [turn for turns in first for turn, _ in turns] + [turn for _, turn, _ in found]:
        asked = turn.content.split(": ", 1)[1].removeprefix("<audio>").strip()
        aided += asked.endswith(" (a)") and turn.answer.lower().startswith("a ")
        asked = asked.removesuffix(" (a)")
        assert turn.answer not in held and asked not in held
        assert (turn.row is None) == ("<audio>" not in turn.content)
        ways += [turn.row is None, turn.row is not None]
        if turn.row is not None:
            assert corpus.utterances[turn.row].noise is None
            assert turn.places == turn.row % 7
    assert ways.min() > 100 and aided > 20


def test_published_sets_keep_their_splits(tmp_path):
    rows = "path\tsentence\n"
    listed = "path\ttranslation\tsplit\n"
    for number, split in enumerate(("train", "train", "dev", "test")):
        (tmp_path / "clips").mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"clips/{number}.flac", np.ones(2000) * 0.1, 16_000)
        rows += f"{number}.flac\tUn hibou {number}.\n"
        listed += f"{number}.flac\tAn owl {number}.\t{split}\n"
    (tmp_path / "validated.tsv").write_text(rows)
    (tmp_path / "covost_v2.fr_en.tsv").write_text(listed)
    published = (f"covost2 {tmp_path} {tmp_path / 'covost_v2.fr_en.tsv'}",)
    found = translation.read_corpus(translation.Settings(published=published))
    assert found.rows == {"train": [1, 2], "held": [0]}
    assert found.captions[0] == {"fr": "Un hibou 3.", "en": "An owl 3."}
    assert [found.utterances[n].text for n in translation.heard(found)] == [
        "Un hibou 0.",
        "Un hibou 1.",
    ]
    assert found.utterances[found.spoken[0, "fr", None]].sound()[:4] == b"fLaC"
    held = dataclasses.replace(translation.Settings(published=published), development=True)
    assert translation.read_corpus(held).captions[0]["en"] == "An owl 2."
    for wrong in ("wmt x", "covost2 x", "librispeech"):
        with pytest.raises(UserError, match="expected one of covost2, must_c, common_voice, libri"):
            translation.read_corpus(translation.Settings(published=(wrong,)))
    with pytest.raises(UserError, match="nothing of test is in --languages de"):
        translation.read_corpus(translation.Settings(published=published, languages=("de",)))


def test_published_sets_are_joined_and_none_trains_on_what_another_tests(tmp_path):
    sound = np.ones(2000) * 0.1

    def libri(split, *lines):
        place = tmp_path / "LibriSpeech" / split / "1/2"
        place.mkdir(parents=True)
        (place / "1-2.trans.txt").write_text("".join(f"1-2-{i} {t}\n" for i, t in enumerate(lines)))
        for i in range(len(lines)):
            soundfile.write(place / f"1-2-{i}.flac", sound, 16_000)

    libri("train-clean-100", "AN OWL", "A CAT")
    libri("test-clean", "A HOUSE")
    voices = tmp_path / "fr"
    (voices / "clips").mkdir(parents=True)
    for split, texts in {"train": ["Un hibou", "Un mot"], "test": ["Un chat"]}.items():
        rows = [f"{split}{i}.flac\t{text}\tfr\n" for i, text in enumerate(texts)]
        (voices / f"{split}.tsv").write_text("path\tsentence\tlocale\n" + "".join(rows))
        for i in range(len(texts)):
            soundfile.write(voices / f"clips/{split}{i}.flac", sound, 16_000)
    talks = tmp_path / "fr-en"
    for split, pairs in {"train": [("Un lac", "A lake")], "tst-COMMON": [("Mot", "A cat")]}.items():
        place = talks / "data" / split
        (place / "txt").mkdir(parents=True), (place / "wav").mkdir()
        soundfile.write(place / "wav/a.wav", sound, 16_000)
        segment = "{duration: 0.1, offset: 0, wav: a.wav}"
        (place / f"txt/{split}.yaml").write_text(f"- {segment}\n" * len(pairs))
        for side, lang in enumerate(("fr", "en")):
            lines = "".join(pair[side] + "\n" for pair in pairs)
            (place / f"txt/{split}.{lang}").write_text(lines)
    published = (f"librispeech {tmp_path}/LibriSpeech", f"common_voice {voices}", f"must_c {talks}")
    found = translation.read_corpus(translation.Settings(published=published))
    written = {side: [found.captions[row] for row in rows] for side, rows in found.rows.items()}
    assert written["held"] == [{"en": "a house"}, {"fr": "Un chat"}, {"fr": "Mot", "en": "A cat"}]
    assert written["train"] == [  # "a cat" is tested by another set
        {"en": "an owl"},
        {"fr": "Un hibou"},
        {"fr": "Un mot"},
        {"fr": "Un lac", "en": "A lake"},
    ]
    talks.rename(tmp_path / "en-fr")  # to dialogue what is said in English alone
    hers = (f"librispeech {tmp_path}/LibriSpeech", f"must_c {tmp_path}/en-fr")
    tested, trained = dialogue.read_published(dialogue.Settings(published=hers), set())
    assert [each.text for each in tested] == ["a house", "A cat"]
    assert [each.text for each in trained] == ["an owl", "A lake"]
    assert (
        trained[0].sound()[:4] == b"fLaC" and len({each.key for each in (*tested, *trained)}) == 4
    )
    tested, trained = dialogue.read_published(dialogue.Settings(published=hers[:1]), {"an owl"})
    assert [each.text for each in (*tested, *trained)] == ["a house", "a cat"]
    for wrong in ({"published": (f"common_voice {voices}",)}, {"published": hers, "seconds": 0.1}):
        with pytest.raises(UserError, match=r"nothing of test is in English, takes at most"):
            dialogue.read_published(dialogue.Settings(**wrong), set())
    places = dict.fromkeys(translation.heard(found))
    shares = (0.3, 0.3, 0.25, 0.15)
    drawn = translation.Drawn(found, WORDS, drawing(views=1), places, shares, 2.0, seed=0)
    asked = {drawn[index][1].content for index in range(400)}
    assert {"To English: <audio> (a)", "From French to English: <audio> Un lac (a)"} <= asked
    assert not any("Un hibou" in each for each in asked)  # nothing to translate it into
    for index in range(400):
        _, turn, view = drawn[index]
        assert view == 0
        alone = len(found.captions[found.rows["train"][index % 4]]) == 1
        assert not alone or turn.answer == found.utterances[turn.row].text


class Knowing:
    """In place of a model: of speech alone it writes what was said, of anything else nothing; as
    it came it goes on after the line that was asked for."""

    def __init__(self, corpus):
        self.corpus, self.tuned = corpus, self
        self.published = {"base": {"decoder": "as it came"}}

    def merged(self, params):
        return params

    def write(self, params, asked, rows, most, language=None):
        if params == {"decoder": "as it came"}:
            return [f"{ask.splitlines()[1]}\nand more" for ask in asked]
        said = [row is not None and self.corpus.utterances[row].text for row in rows]
        alone = [re.sub(r" \(\w+\)$", "", ask).endswith("<audio>") for ask in asked]
        return [text if only else "" for text, only in zip(said, alone, strict=True)]

    def text(self, ids):
        return ids

    def spell(self, params, rows, language=None):
        assert {self.corpus.utterances[row].language for row in rows} == {language} or not language
        return [self.corpus.utterances[row].text for row in rows]


def test_the_report_leaves_out_what_there_is_none_of(corpus, tmp_path, monkeypatch, capsys):
    s = translation.Settings(languages=("en", "fr", "da", "ru"), most=12)
    measured = []

    def bleu(written, true, language="en"):
        measured.append(language)
        return translation.chrf(written, true)

    monkeypatch.setattr(translation, "bleu", bleu)
    few = {**corpus.rows, "train": corpus.rows["train"][:60]}  # the nearest of them is sought
    corpus = dataclasses.replace(corpus, rows=few)
    found = translation.report(s, corpus, WORDS, Knowing(corpus), {}, tmp_path)
    assert set(measured) == {"en", "fr", "da", "ru"}  # each by its own tokens
    assert "From English, BLEU/ru/nearest caption" in found
    row = "Into English, chrF/all that were heard"
    assert found[f"{row}/speech"] == found[f"{row}/copy the source"] > 0
    assert found[f"{row}/text"] == found[f"{row}/both"] == 0
    aided = found["Into English, chrF/fr/words looked up"]
    assert aided > found["Into English, chrF/ru/words looked up"] == 0
    held = [r for r in corpus.rows["held"] if "en" in corpus.captions[r]]
    truth = [corpus.captions[r]["en"] for r in held if (r, "fr", None) in corpus.spoken][: s.most]
    first = translation.examples(corpus, "fr", "en").splitlines()[1]
    expected = translation.chrf([first] * len(truth), truth).value
    assert found[f"Into English, chrF/fr/{translation.AS_IT_CAME}"] == expected > 0
    written = "Written down, character errors/fr"
    assert found[f"{written}/listener"] == found[f"{written}/language model"] == 0
    assert "Both against speech alone: chrF" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == len({name.split("/")[0] for name in found})
    row = "Between other languages, chrF/da to fr"
    assert found[f"{row}/speech"] == found[f"{row}/copy the source"] > found[f"{row}/text"] == 0
    assert not any("es" in name.split("/")[1].split() for name in found)
    noisy = "fr to en in white noise, chrF"
    assert {f"{noisy}/{name}/speech" for name in ("clean", "0 dB")} <= set(found)
    clean = {item: number for item, number in corpus.spoken.items() if item[2] is None}
    clean = dataclasses.replace(corpus, spoken=clean)
    monkeypatch.setattr(translation, "plot_scores", lambda *_: None)  # seen above
    few = dataclasses.replace(s, languages=("en", "fr"), pairs=())
    found = translation.report(few, clean, WORDS, Knowing(clean), {}, tmp_path)
    assert not any("noise" in name or "other" in name for name in found)
    silent = dataclasses.replace(corpus, spoken={}, utterances=[])
    found = translation.report(s, silent, WORDS, Knowing(silent), {}, tmp_path)
    assert {name.split(",")[0] for name in found} == {"From English", "Between other languages"}
    assert not any(name.endswith(("/speech", "/both")) for name in found)
    french = {row: {"fr": texts.get("fr", "")} for row, texts in corpus.captions.items()}
    said = {item: number for item, number in corpus.spoken.items() if item[1] == "fr"}
    alone = dataclasses.replace(corpus, captions=french, spoken=said)
    found = translation.report(s, alone, WORDS, Knowing(alone), {}, tmp_path)
    assert {name.split(",")[0] for name in found} == {"Written down"}


def test_the_nearest_caption_is_of_training(corpus):
    nearest = translation.nearest_caption(corpus)
    row = corpus.rows["train"][0]
    assert nearest(corpus.captions[row]["fr"], "fr", "en")
    seen = {corpus.captions[r].get("en") for r in corpus.rows["train"]}
    assert nearest("quelque chose", "fr", "en") in seen


def test_a_run_says_between_which_languages_it_translates(monkeypatch):
    answers = lambda params, data: Assistant(None, params, None)  # noqa: E731
    model = SimpleNamespace(assistant=answers, reader=lambda params, language: language)
    corpus = translation.Corpus({0: {"fr": "Un", "en": "One"}}, {"train": [0]}, [], {})
    monkeypatch.setattr(translation, "assemble", lambda s: (corpus, WORDS, model))
    told = translation.assistant(translation.Settings(languages=("en", "fr", "de")), {})
    assert told.assistant.languages == ("en", "fr")
    assert told.translation["languages"] == {"en": "English", "fr": "French"}
    assert told.reader("fr") == "fr" and told.lexicon is WORDS


def test_instructions_and_what_is_no_source():
    assert instruction("en", None, None, True) == "To English: <audio>"
    assert instruction("es", "fr", "un chat", False) == "From French to Spanish: un chat"
    aided = instruction("en", "fr", "un chat", True, ["a", "cat"])
    assert aided == "From French to English: <audio> un chat (a, cat)"
    with pytest.raises(UserError, match="2 texts and 0 files"):
        translate(("a", "b"), Path("nowhere"), "en")
    with pytest.raises(UserError, match="0 texts and 2 files"):
        translate(("a.ogg", "b.wav"), Path("nowhere"), "en")


def test_the_command_may_write_what_the_report_measures():
    default = inspect.signature(translate).parameters["max_tokens"].default
    assert default == translation.Settings.written


def test_a_language_that_was_not_trained_on_is_refused():
    for to, source, told in (
        ("english", None, r"--to english: .* between en \(English\), fr \(French\)"),
        ("en", "fra", "--from fra: "),
        ("fr", "de", "--from de: "),
    ):
        with pytest.raises(UserError, match=told):
            check(("en", "fr"), to, source)
    check(("en", "fr"), "en", None)


def test_what_is_a_file_or_ends_as_one_is_not_translated_as_words(tmp_path):
    (tmp_path / "chat").touch()
    for files in (("talk.mp4", "Photo.JPG"), ("my talk.m4a", str(tmp_path / "chat"))):
        with pytest.raises(UserError, match="0 texts and 2 files"):
            translate(files, Path("nowhere"), "en")
    with pytest.raises(UserError, match="2 texts and 0 files"):
        translate(("un chat. " * 500, "mp4"), Path("nowhere"), "en")


def test_own_questions_are_dealt_out_with_their_answers(corpus, tmp_path, capsys):
    lines = []
    for number in range(20):
        samples = 2000 if number % 5 else 80_000  # every fifth is too long
        soundfile.write(tmp_path / f"{number}.wav", np.ones(samples) * 0.1, 16_000)
        row = {"audio": f"{number}.wav", "question": f"What is {number}?", "answer": f"A {number}."}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "asked.jsonl").write_text("".join(lines))
    s = dialogue.Settings(questions=2, sentences=1, asked=tmp_path / "asked.jsonl")
    try:
        found = dialogue.read_corpus(s)
    except UserError as error:
        pytest.skip(str(error))
    for row, answer in found.answers.items():
        assert found.utterances[row].text == answer.replace("A", "What is").replace(".", "?")
    asked = {found.utterances[row].text for row in found.answers}
    assert asked.isdisjoint({f"What is {number}?" for number in range(0, 20, 5)})
    assert "of your train questions take over 4.5 s and are left out" in capsys.readouterr().out
    held = set(found.tests["your own questions"])
    trained = held ^ set(found.answers)
    assert held and trained and trained <= set(found.train["recording"])
    assert held.isdisjoint(found.train["recording"])


def test_dialogue_asks_about_other_things_than_it_is_tested_on(corpus, monkeypatch):
    monkeypatch.setattr(dialogue, "TESTED", 12)
    s = dialogue.Settings(questions=40, sentences=10, answered=5)
    try:
        found = dialogue.read_corpus(s)
    except UserError as error:
        pytest.skip(str(error))
    said = {kind: [found.utterances[r].text for r in rows] for kind, rows in found.train.items()}
    trained = {concepts.normalize(text) for texts in said.values() for text in texts}
    for kind, rows in found.tests.items():
        texts = [found.utterances[row].text for row in rows]
        assert texts and trained.isdisjoint(map(concepts.normalize, texts)), kind
        assert all(found.utterances[row].synthetic == kind.startswith("syn") for row in rows)
    things = dialogue.questions.read_things(stamps.load())
    sides = dialogue.questions.splits(things, s.seed)
    nouns = {things[row].noun for row in sides["test"]}
    nouns = {noun for noun in nouns if noun and len(noun) > 2}  # questions themselves say "I"
    asked = said["question"] + said["recording"]  # a definition may hold any word
    words = {word for text in asked for word in concepts.normalize(text).split()}
    assert len(nouns) > 100 and not words & (nouns | {f"{noun}s" for noun in nouns})
    again = dialogue.read_corpus(s)
    assert [u.text for u in again.utterances] == [u.text for u in found.utterances]
    assert all(
        u.voice != dialogue.UNHEARD
        for r in found.train.values()
        for u in map(found.utterances.__getitem__, r)
    )
