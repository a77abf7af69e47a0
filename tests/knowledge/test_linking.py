import re

import numpy as np
import pytest

from fusion_jax.knowledge import graph
from fusion_jax.knowledge.linking import Linker

NAMES = {
    "en": (
        ("whale",),
        ("killer whale", "orca"),
        ("mammal",),
        ("seal",),
        ("seal", "stamp"),
        ("kiss",),
    ),
    "fr": (("baleine",), ("épaulard",), ("mammifère",), (), (), ()),
    "ja": (("クジラ", "鯨"), (), ("哺乳類",), (), (), ()),
    "th": (("ปลาวาฬ",), (), (), (), (), ()),
}


def linker(**more):
    keys = ["whale", "orca", "mammal", "seal_1", "seal_2", "kiss"]
    senses = {"en": {"seal": (4, 3)}}
    world = graph.make(np.zeros((0, 3), np.int32), keys, ["is_a"], names=NAMES, senses=senses)
    return Linker.of(world, **more)


def found(text, **more):
    return [(text[m.start : m.end], m.entities) for m in linker(**more)(text)]


def test_the_longest_name_wins_and_plurals_count():
    assert found("Is a killer whale a mammal?") == [("killer whale", (1,)), ("mammal", (2,))]
    assert found("Killer-whales, whales; ORCAS!") == [
        ("Killer-whales", (1,)),
        ("whales", (0,)),
        ("ORCAS", (1,)),
    ]
    assert found("a killer kissed a kiss") == [("kiss", (5,))]
    assert found("oxen", singular={"oxen": "seal"}) == [("oxen", (4, 3))]


def test_every_language_is_read_with_accents_and_without_spaces():
    assert found("L'e\u0301paulard est un mammifère") == [
        ("e\u0301paulard", (1,)),
        ("mammifère", (2,)),
    ]
    assert found("鯨は哺乳類ですか") == [("鯨", (0,)), ("哺乳類", (2,))]
    assert found("ปลาวาฬเป็นสัตว์") == [("ปลาวาฬ", (0,))]
    assert found("épaulard", languages=["en"]) == []


@pytest.mark.parametrize(
    "names",
    [
        ("दिन", "दान", "दीन"),  # Hindi: day, donation, poor
        ("কলা", "কল", "কলি"),  # Bengali: banana, tap, bud
        ("கல்", "கால்", "கலி"),  # Tamil: stone, leg, an age
        ("กิน", "กัน", "กน"),  # Thai: to eat, each other, no word
        ("ດິນ", "ດນ"),  # Lao
        ("שָׁלוֹם", "שלום"),  # Hebrew with and without points
    ],
)
def test_vowel_signs_tell_words_apart(names):
    world = graph.make(
        np.zeros((0, 3), np.int32),
        list(names),
        ["is_a"],
        names={"x": tuple((name,) for name in names)},
    )
    link = Linker.of(world)
    for entity, name in enumerate(names):
        text = f"({name}), {name}_{name}"
        places = [(m.start, m.end, m.entities) for m in link(text)]
        ends = [(match.start(), match.end()) for match in re.finditer(name, text)]
        assert places == [(*each, (entity,)) for each in ends]


def test_a_mark_that_only_chooses_a_form_changes_no_word():
    assert found("鯨\U000e0100は\ufe0f") == [("鯨\U000e0100", (0,))]
    assert found("\u0301whale\ufe0f") == [("whale\ufe0f", (0,))]


def test_meanings_come_in_their_order_and_nothing_is_found_in_nothing():
    assert found("the seal") == [("seal", (4, 3))]
    assert found("") == found("?! -") == []
