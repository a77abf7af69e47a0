"""Asking: files, marks and what is refused, on a tiny model; SmolLM2 against transformers."""

import dataclasses
import importlib.util
import io
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, models, pre_tokenizers

from fusion_jax.__main__ import main
from fusion_jax.errors import UserError
from fusion_jax.language.ask import Assistant, ask, joined
from fusion_jax.language.chat import Chat
from fusion_jax.language.connectors import Projection
from fusion_jax.language.conversation import Conversation, talk
from fusion_jax.language.evidence import log_likelihood
from fusion_jax.language.fused import FusedLM, init_around
from fusion_jax.language.generate import generate
from fusion_jax.language.hearing import load_speech
from fusion_jax.language.prompt import pad
from fusion_jax.tokens import Tokens

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
tiny.LAYERS = 1  # less to compile


def read(file: Path) -> Tokens:
    if not file.exists():
        raise UserError(f"cannot read {file}")
    values = np.frombuffer(file.read_bytes(), np.uint8)[:6].astype(np.float32) / 100
    return Tokens(values.reshape(1, 1, 2, 3), np.ones((1, 1, 2), bool))


@pytest.fixture(scope="module")
def assistant():
    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    decoder = tiny.decoder()
    model = FusedLM(decoder, {"image": Projection(tiny.WIDTH)})
    media = {"image": Tokens(np.zeros((1, 1, 2, 3), np.float32), np.ones((1, 1, 2), bool))}
    batch = {"text": pad([[1, 2]])} | media
    base = {"decoder": tiny.random_params(decoder)}
    params = init_around(model, jax.random.key(0), batch, base)
    layout = model.layout(jax.random.key(0), media)
    return Assistant(model, params, Chat(tokenizer, None, {}, ()), layout, {"image": read})


def test_files_stand_at_their_marks_or_before(assistant, tmp_path):
    files = []
    for index, content in enumerate((b"abcdef", b"zyxwvu")):
        files.append(tmp_path / f"{index}.bin")
        files[-1].write_bytes(content)

    def answer(question, *files):
        return "".join(assistant.answer(question, {"image": files}, max_tokens=12))

    assert answer("w5 w6", *files) == answer("<image><image>w5 w6", *files)
    assert answer("w5 <image> w6", files[0]) == answer("w5<image>w6", files[0])
    different = {answer("w5 w6"), answer("w5 w6", files[0]), answer("w5 <image> w6", files[1])}
    assert len(different) == 3
    with pytest.raises(UserError, match="2 <image> marks and 1 given"):
        answer("<image> w5 <image>", files[0])
    with pytest.raises(UserError, match="does not read"):
        assistant.answer("w5", {"audio": files})


def hearing(assistant, decoder=None):
    """Another run around the same language model that reads sound, in longer items."""
    decoder = decoder or tiny.decoder()  # opened anew, as each run opens it
    model = FusedLM(decoder, {"audio": Projection(tiny.WIDTH)})
    media = {"audio": Tokens(np.zeros((1, 1, 3, 3), np.float32), np.ones((1, 1, 3), bool))}
    base = {"decoder": assistant.params["decoder"]}
    params = init_around(model, jax.random.key(1), {"text": pad([[1]])} | media, base)

    def listen(file):
        two = read(file)
        values = np.pad(two.values, [(0, 0), (0, 0), (0, 1), (0, 0)])
        return Tokens(values, np.ones((1, 1, 3), bool))

    layout = model.layout(jax.random.key(0), media)
    return dataclasses.replace(
        assistant, model=model, params=params, layout=layout, readers={"audio": listen}
    )


def test_a_run_with_the_senses_of_another_reads_what_both_read(assistant, tmp_path):
    files = [tmp_path / "picture", tmp_path / "sound"]
    files[0].write_bytes(b"abcdef")
    files[1].write_bytes(b"zyxwvu")
    ears = hearing(assistant)
    both = assistant.with_senses(ears)
    seen, heard = {"image": files[:1]}, {"audio": files[1:]}

    def answer(who, question, media):
        return "".join(who.answer(question, media, max_tokens=10))

    for asked in ("w5 w6", "w7"):
        assert answer(both, asked, {}) == answer(assistant, asked, {})
        assert answer(both, asked, seen) == answer(assistant, asked, seen)
        assert answer(both, asked, heard) == answer(ears, asked, heard)
    said = answer(both, "", heard | seen)
    assert said == answer(both, "<image><audio>", seen | heard)
    assert said not in (answer(both, "<image>", seen), answer(both, "<audio>", heard))
    with pytest.raises(UserError, match=r"both runs read \['audio'\]"):
        both.with_senses(ears)
    with pytest.raises(UserError, match="different language models"):
        assistant.with_senses(hearing(assistant, tiny.decoder(tied=False)))
    changed = jax.tree.map(lambda leaf: leaf + 1, ears.params)
    with pytest.raises(UserError, match="different language models"):
        assistant.with_senses(dataclasses.replace(ears, params=changed))


def test_words_about_a_file_follow_its_mark(assistant, tmp_path):
    files = []
    for content in (b"abcdef", b"zyxwvu"):
        files.append(tmp_path / content.decode())
        files[-1].write_bytes(content)
    about = {"abcdef": "w8 ", "zyxwvu": "w9 "}
    told = dataclasses.replace(assistant, words={"image": lambda file: about[file.name]})

    def answer(assistant, question):
        return "".join(assistant.answer(question, {"image": files}, max_tokens=8))

    for asked, written in (
        ("w5", "<image>w8 <image>w9 w5"),
        ("<image> w5 <image> w6", "<image>w8  w5 <image>w9  w6"),
        ("w5 <image>", "<image>w8 w5 <image>w9 "),
    ):
        assert answer(told, asked) == answer(assistant, written)
    with pytest.raises(UserError, match="3 <image> marks and 2 given"):
        answer(told, "<image> w5 <image> <image>")


def test_the_answer_is_that_of_generate(assistant):
    decoder, params = assistant.model.decoder, assistant.params["decoder"]
    from fusion_jax.language.prompt import Prompt

    ids = generate(decoder, params, Prompt.of([[5, 6]]), max_tokens=7).sequences()[0]
    found = "".join(assistant.answer("w5 w6", max_tokens=7))
    assert found == " ".join(f"w{i}" for i in ids)


def test_turns_follow_each_other_and_the_oldest_are_forgotten(assistant, tmp_path):
    file = tmp_path / "picture"
    file.write_bytes(b"abcdef")
    template = "{% for m in messages %}{{ m.content }} w3 {% endfor %}"
    chatting = dataclasses.replace(assistant, chat=Chat(assistant.chat.tokenizer, template, {}, ()))
    talked = Conversation(chatting, max_tokens=4)
    first = "".join(talked.say("w5", {"image": [file]}))
    second = "".join(talked.say("w6 w7"))
    whole = f"<image>w5 w3 {first} w3 w6 w7"
    plain = {"role": "user", "content": f"{whole} w3 "}
    assert second == "".join(assistant.reply([plain], {"image": [file]}, max_tokens=4))
    with pytest.raises(UserError, match="cannot read"):
        "".join(talked.say("w5", {"image": [tmp_path / "none"]}))
    assert len(talked.turns) == 2
    # With room for this turn alone, the earlier ones are forgotten, the picture with them.
    model = assistant.model.clone(decoder=assistant.model.decoder.clone(context_length=8))
    talked.assistant = dataclasses.replace(chatting, model=model)
    third = "".join(talked.say("w8 w9"))
    assert talked.turns[0][0]["content"] == "w8 w9" and len(talked.turns) == 1
    assert third == "".join(
        assistant.reply([{"role": "user", "content": "w8 w9 w3 "}], {}, max_tokens=4)
    )


def test_a_turn_keeps_what_its_file_held(assistant, tmp_path):
    """Each turn recorded over the same file: what was said before is not what is said now."""
    file, others = tmp_path / "question", [tmp_path / "first", tmp_path / "second"]
    opened = []

    def once(path):
        opened.append(path.read_bytes())
        return read(path)

    template = "{% for m in messages %}{{ m.content }} w3 {% endfor %}"
    chat_of = Chat(assistant.chat.tokenizer, template, {}, ())
    recorded = dataclasses.replace(assistant, chat=chat_of, readers={"image": once})
    talked, whole = Conversation(recorded, max_tokens=4), ""
    for other, content in zip(others, (b"abcdef", b"zyxwvu"), strict=True):
        file.write_bytes(content)
        other.write_bytes(content)
        whole += "<image> w3 " + "".join(talked.say("", {"image": [file]})) + " w3 "
    file.unlink()
    last = "".join(talked.say("w6 w7"))
    assert opened == [b"abcdef", b"zyxwvu"]
    plain = {"role": "user", "content": f"{whole}w6 w7 w3 "}
    assert last == "".join(assistant.reply([plain], {"image": others}, max_tokens=4))


def test_a_mark_that_the_model_writes_is_no_file_of_the_next_turn(assistant, monkeypatch):
    talked = Conversation(assistant, max_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(type(assistant), "reply", lambda *_, **__: iter(("w6<im", "age>")))
        assert "".join(talked.say("w5")) == "w6<image>"
    "".join(talked.say("w7"))
    (*_, answer), _ = talked.turns
    assert answer == "w6"


def test_a_turn_that_fails_forgets_nothing(assistant):
    talked = Conversation(assistant, max_tokens=4)
    talked.turns = before = [({"role": "user", "content": "w5"}, {}, "w6")]
    with pytest.raises(UserError, match="the prompt takes 120 tokens"):
        "".join(talked.say("w5 " * 120))
    assert talked.turns is before and len(before) == 1


def test_five_turns_with_two_media_and_one_that_is_refused(assistant, tmp_path):
    """What is said last follows all that was said and shown, and nothing of what failed."""
    (tmp_path / "picture").write_bytes(b"abcdef")
    soundfile.write(tmp_path / "question.wav", np.sin(np.arange(4000) / 9), 16_000)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 8_000, 1) as file:
        for _ in range(30):
            file.write(np.zeros(60 * 8_000))
    both = assistant.with_senses(hearing(assistant))
    listen = both.readers["audio"]

    def heard(file):
        load_speech(file)
        return listen(file)

    template = "{% for m in messages %}{{ m.content }} w3 {% endfor %}"
    chat_of = Chat(assistant.chat.tokenizer, template, {}, ())
    both = dataclasses.replace(both, chat=chat_of, readers={**both.readers, "audio": heard})
    lines = (
        "w5\n/image {0}/picture\nw6\n/audio {0}/long.flac\n\n/audio {0}/question.wav\n\nw7\nw8\n"
    )
    out = io.StringIO()
    talk(Conversation(both, max_tokens=3), io.StringIO(lines.format(tmp_path)), out)
    *said, last = [line for line in out.getvalue().splitlines() if not line.startswith("error")]
    told = [line for line in out.getvalue().splitlines() if line.startswith("error")]
    assert len(told) == 1 and "longer than the 30 s that are heard at once" in told[0]
    asked = ("w5", "<image>w6", "<audio>", "w7")
    before = "".join(f"{a} w3 {b} w3 " for a, b in zip(asked, said, strict=True))
    media = {"image": [tmp_path / "picture"], "audio": [tmp_path / "question.wav"]}
    message = {"role": "user", "content": f"{before}w8"}
    assert last == "".join(both.reply([message], media, max_tokens=3))


def test_lines_are_turns_and_a_wrong_one_is_told(assistant, tmp_path):
    file = tmp_path / "a picture"
    file.write_bytes(b"abcdef")
    lines = io.StringIO(f"/image '{file}'\nw5\n/audio x.wav\nw6\nw7\n/new\nw7\n/quit\nw8\n")
    out = io.StringIO()
    conversation = Conversation(assistant, max_tokens=3)
    talk(conversation, lines, out)
    told = out.getvalue().splitlines()
    assert len(told) == 4 and told[1].startswith("error: this model does not read ['audio']")
    assert told[0] == "".join(assistant.answer("w5", {"image": [file]}, max_tokens=3))
    assert told[3] == "".join(assistant.answer("w7", max_tokens=3))
    assert len(conversation.turns) == 1


def test_a_question_may_stand_anywhere_and_files_and_stops_be_several(monkeypatch, capsys):
    class Told:
        def answer(self, question, media, **how):
            return [f"{question} {media} {how['stops']} {how['max_tokens']}"]

    monkeypatch.setattr("fusion_jax.language.ask.named", lambda *_: Told())
    flags = ["--image", "a.png", "--image", "b.png", "Which?", "--stop", "x", "--stop", "y"]
    assert main(["ask", *flags, "--max-tokens", "3"]) == 0
    media = {"image": (Path("a.png"), Path("b.png")), "audio": ()}
    assert capsys.readouterr().out == f"Which? {media} {('x', 'y')} 3\n"


def test_whom_to_ask(tmp_path):
    with pytest.raises(UserError, match="either --model"):
        ask("Who?")
    with pytest.raises(UserError, match="--model is no run"):
        ask("Who?", model="nobody", senses=Path("nowhere"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    (tmp_path / "old" / "experiment.py").write_text("from fusion_jax.paths import gone\n")
    with pytest.raises(UserError, match=r"another version of fusion_jax \(cannot import .*gone"):
        ask("Who?", workdir=tmp_path / "old")
    with pytest.raises(UserError, match="holds no run"):
        ask("Who?", workdir=Path("nowhere"))


def test_what_an_answer_rests_on_is_its_log_p(assistant, tmp_path):
    """Against the model's own logits, token by token, with a picture and without."""
    picture = tmp_path / "picture"
    picture.write_bytes(b"abcdef")
    for media in ({}, {"image": [picture]}):
        total, said = 0.0, [7, 8, 9]
        for place, token in enumerate(said):
            question = assistant.marked("w1 w2", media)
            ids = assistant.ids([{"role": "user", "content": question}], media) + said[:place]
            batch = {"text": pad([ids])} | {
                name: joined(items) for name, items in assistant.read(media).items()
            }
            params = {"params": assistant.params}
            hidden = assistant.model.apply(params, batch).hidden
            logits = assistant.model.apply(params, hidden[:, -1:], method="logits")
            total += float(jax.nn.log_softmax(logits[0, 0])[token])
        found = log_likelihood(assistant, "w1 w2", media, "w7 w8 w9")
        np.testing.assert_allclose(found, total, rtol=1e-4)
