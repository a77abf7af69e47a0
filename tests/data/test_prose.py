import pytest

from fusion_jax.data import prose
from fusion_jax.errors import UserError


def test_what_is_trained_on_and_what_is_measured_on_share_no_sentence():
    train, held = prose.docstrings(), prose.reference()
    assert len(train) > 500 and len(held) > 50

    def sentences(texts):
        found = (part for text in texts for part in text.split(". "))
        return {part for part in found if len(part) > 60}

    assert not sentences(train) & sentences(held)


def test_rows_are_whole_and_from_all_over():
    def encode(text):
        return [ord(letter) for letter in text]

    rows = prose.rows(["abc", "defg"], encode, 3, 2)
    assert rows.shape == (2, 3) and len(set(rows.ravel().tolist()) & set(map(ord, "abcdefg"))) > 4
    with pytest.raises(UserError, match="too few for 9 x 3"):
        prose.rows(["abc"], encode, 3, 9)
