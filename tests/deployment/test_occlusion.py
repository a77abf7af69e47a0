"""What is asked again with an input taken away: a translation is still asked for."""

import base64
from types import SimpleNamespace

import pytest

from fusion_jax.deployment.runtime.occlusion import OcclusionRequest, writings
from fusion_jax.language.translate import NAMES, instruction

TRANSLATION = {
    "languages": {code: NAMES[code] for code in ("en", "fr")},
    "begin": instruction("{to}", None, None, spoken=False),
    "begin_from": instruction("{to}", "{from}", None, spoken=False),
}


def asked(content, *media, translation=None):
    """{what is left: (text, names of media)} of the last turn."""
    generator = SimpleNamespace(
        scores=True,
        readers={"audio": bytes, "image": bytes},
        artifact=SimpleNamespace(manifest={"translation": translation}),
        conversation=SimpleNamespace(
            tokenizer=SimpleNamespace(encode=lambda text, **_: SimpleNamespace(ids=[7, 9]))
        ),
        writing=lambda messages, count, given: messages[-1],
    )
    data = base64.b64encode(b"sound").decode()
    sound = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    parts = [{"audio": sound, "image": picture}[name] for name in media]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": content}]}
    request = OcclusionRequest(model="m", messages=[message], answer="a cat")
    return {
        name: (last["content"], [kind for kind, _ in last["media"]])
        for name, last in writings(request, generator).items()
    }


@pytest.mark.parametrize("source", [None, "fr"])
def test_a_translation_is_still_asked_for(source):
    both = instruction("en", source, "un chat", spoken=True)
    speech = instruction("en", source, None, spoken=True)
    assert asked(both, "audio", translation=TRANSLATION) == {
        "all": (both, ["audio"]),
        "audio": (instruction("en", source, "un chat", spoken=False), []),
        "text": (speech, ["audio"]),
    }
    alone = asked(speech, "audio", translation=TRANSLATION)
    assert set(alone) == {"all", "audio"}  # there are no words to take away
    assert alone["audio"][0] == instruction("en", source, None, spoken=False)
    written = instruction("en", source, "un chat", spoken=False)
    assert set(asked(written, translation=TRANSLATION)) == {"all"}


def test_all_words_of_another_question_are_taken_away():
    found = asked("To English: <audio> or <image>?", "audio", "image")
    assert found == {
        "all": ("To English: <audio> or <image>?", ["audio", "image"]),
        "audio": ("To English: or <image>?", ["image"]),
        "image": ("To English: <audio> or ?", ["audio"]),
        "text": ("<audio><image>", ["audio", "image"]),
    }
    assert asked("What?", "image", translation=TRANSLATION)["text"] == ("", ["image"])
