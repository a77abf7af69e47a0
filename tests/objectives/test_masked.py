import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fusion_jax.errors import UserError
from fusion_jax.objectives.masked import (
    corrupt_text,
    hidden_patches,
    masked_language_modelling,
    masked_patch_modelling,
    patchify,
)
from fusion_jax.tokens import Tokens

RNG = np.random.default_rng(0)
MASK_ID, VOCAB, PAD, CLS = 3, 50, 0, 1
KEY = jax.random.key(0)


def test_corruption_is_80_10_10_of_15_percent():
    ids = jnp.asarray(RNG.integers(4, VOCAB, (200, 100)), jnp.int32).at[:, 0].set(CLS)
    mask = jnp.arange(100)[None, :] < jnp.full((200, 1), 80)
    text = Tokens(ids, mask)
    corrupt = jax.jit(lambda rng: corrupt_text(rng, text, MASK_ID, VOCAB, 0.15, (CLS,)))
    shown, chosen = jax.tree.map(np.asarray, corrupt(KEY))
    np.testing.assert_array_equal(shown.values, corrupt(KEY)[0].values)
    assert (shown.values != corrupt(jax.random.key(1))[0].values).any()
    ids = np.asarray(ids)
    assert not chosen[:, 0].any() and not chosen[:, 80:].any()
    np.testing.assert_array_equal(shown.values[~chosen], ids[~chosen])
    np.testing.assert_allclose(chosen[:, 1:80].mean(), 0.15, atol=0.01)
    masked = shown.values[chosen] == MASK_ID
    same = shown.values[chosen] == ids[chosen]
    np.testing.assert_allclose(masked.mean(), 0.8 + 0.1 / VOCAB, atol=0.03)
    np.testing.assert_allclose(same.mean(), 0.1 + 0.1 / VOCAB, atol=0.03)
    others = np.asarray(shown.values[chosen])[~(masked | same)]
    assert len(np.unique(others)) > 40 and others.min() >= 0 and others.max() < VOCAB


def test_masked_language_modelling_is_cross_entropy_of_the_chosen():
    ids = RNG.integers(4, VOCAB, (5, 12)).astype(np.int32)
    mask = np.arange(12) < np.array([12, 7, 3, 0, 9])[:, None]
    table = RNG.normal(size=(5, 12, VOCAB)).astype(np.float32)
    seen = []

    def predict(table, batch, rng):
        seen.append(batch["text"].values)
        return table

    batch = {"text": Tokens(jnp.asarray(ids), jnp.asarray(mask))}
    objective = masked_language_modelling(predict, MASK_ID, VOCAB, rate=0.5)
    value, metrics = objective(table, batch, KEY)
    _, chosen = corrupt_text(jax.random.split(KEY)[0], batch["text"], MASK_ID, VOCAB, 0.5)
    chosen = np.asarray(chosen)
    assert chosen.sum() > 8 and (np.asarray(seen[0]) != ids).any()
    rows = np.float64(table)[chosen]
    nll = [-np.log(np.exp(r[i]) / np.exp(r).sum()) for r, i in zip(rows, ids[chosen], strict=True)]
    np.testing.assert_allclose(value, np.mean(nll), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["masked_text_accuracy"], np.mean(rows.argmax(1) == ids[chosen])
    )
    holes = np.where(chosen[..., None], table, np.nan)
    grad = jax.jit(jax.value_and_grad(lambda table: objective(table, batch, KEY)[0]))
    jax.tree.map(np.testing.assert_array_equal, grad(holes), grad(table))


def test_hidden_patches_are_exactly_that_many_and_spread():
    hidden = hidden_patches(KEY, 400, 10, 0.6)
    assert (hidden.sum(axis=1) == 6).all()
    np.testing.assert_allclose(hidden.mean(axis=0), 0.6, atol=0.1)


@pytest.mark.parametrize("normalize", [False, True])
def test_masked_patch_modelling_by_hand(normalize):
    pictures = RNG.uniform(size=(3, 8, 12, 3)).astype(np.float32)
    present = np.array([True, False, True])
    pictures[1] = np.nan
    guess = RNG.normal(size=(3, 6, 48)).astype(np.float32)
    seen = []

    def predict(guess, batch, rng):
        seen.append(batch)
        return guess

    batch = {"image": Tokens(jnp.asarray(pictures), jnp.asarray(present))}
    objective = masked_patch_modelling(predict, patch=4, ratio=0.5, normalize=normalize)

    def loss(guess):
        return objective(guess, batch, KEY)[0]

    value = loss(guess)
    shown, hidden = np.asarray(seen[0]["image"].values), np.asarray(seen[0]["hidden"])
    errors = []
    for row in (0, 2):
        for patch in range(6):
            top, side = 4 * (patch // 3), 4 * (patch % 3)
            pixels = np.float64(pictures[row, top : top + 4, side : side + 4])
            view = shown[row, top : top + 4, side : side + 4]
            if not hidden[row, patch]:
                np.testing.assert_array_equal(view, np.float32(pixels))
                continue
            assert (view == 0.5).all()
            if normalize:
                pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var() + 1e-6)
            errors.append(np.mean((guess[row, patch] - pixels.ravel()) ** 2))
    assert len(errors) == 6
    np.testing.assert_allclose(value, np.mean(errors), rtol=1e-5)
    check_grads(jax.jit(loss), (guess,), 1, modes=["rev"], atol=0.02, rtol=0.02)
    broken = guess.copy()
    broken[1] = np.nan
    run = jax.jit(jax.value_and_grad(loss))
    jax.tree.map(np.testing.assert_array_equal, run(broken), run(guess))


def test_bad_settings_say_what_was_given():
    with pytest.raises(UserError, match=r"8x12.*5x5"):
        patchify(jnp.zeros((1, 8, 12, 3)), 5)
    with pytest.raises(UserError, match=r"1\.5"):
        masked_patch_modelling(lambda *args: None, ratio=1.5)
    with pytest.raises(UserError, match=r"15"):
        masked_language_modelling(lambda *args: None, 0, 10, rate=15)
