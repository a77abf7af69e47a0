import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.encoders.moonshine import END, START, Moonshine, MoonshineDecoder, MoonshineEncoder
from fusion_jax.tokens import Tokens, fill
from fusion_jax.transformer import Rope

SIZES = {"width": 24, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_width": 40, "rope": Rope.plain(8)}


@pytest.fixture(scope="module")
def recogniser():
    module = Moonshine(MoonshineEncoder(**SIZES), MoonshineDecoder(vocabulary=13, **SIZES))
    text = Tokens(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    shapes = jax.eval_shape(module.init, jax.random.key(3), sound([4000]), text)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    random = [0.6 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return module, jax.tree.unflatten(tree, random)


def sound(lengths, padding=0.0, extra=0):
    rng = np.random.default_rng(0)
    width = max(lengths) + extra
    values = np.full((len(lengths), width), padding, np.float32)
    for row, length in enumerate(lengths):
        values[row, :length] = rng.normal(size=length)
    return Tokens(jnp.asarray(values), jnp.arange(width)[None] < jnp.array(lengths)[:, None])


def test_padding_does_not_change_a_row(recogniser):
    _, params = recogniser
    encoder = jax.jit(MoonshineEncoder(**SIZES).apply)
    variables = {"params": params["encoder"]}
    lengths = [5000, 2100, 600, 0]
    together = encoder(variables, sound(lengths, np.nan, extra=700))
    np.testing.assert_array_equal(together.present, [True, True, False, False])
    rng = np.random.default_rng(0)
    for row, length in enumerate(lengths[:2]):
        values = rng.normal(size=(1, length)).astype(np.float32)
        alone = encoder(variables, Tokens(values, np.ones((1, length), bool)))
        assert alone.mask.all()
        real = together.values[row][together.mask[row]]
        np.testing.assert_allclose(real, alone.values[0], atol=1e-4)


def test_nan_in_padding_reaches_no_gradient(recogniser):
    _, params = recogniser
    encoder = MoonshineEncoder(**SIZES)

    @jax.jit
    @jax.grad
    def gradient(params, audio):
        return (fill(encoder.apply({"params": params}, audio)) ** 2).sum()

    with_nan = gradient(params["encoder"], sound([2100, 0], np.nan))
    jax.tree.map(
        np.testing.assert_array_equal, with_nan, gradient(params["encoder"], sound([2100, 0]))
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(with_nan))


def test_transcript_is_the_greedy_choice_of_the_whole_decoder(recogniser):
    module, params = recogniser
    audio = sound([5000, 3000, 0])
    found = jax.jit(lambda a: module.apply({"params": params}, a, 9, method="transcribe"))(audio)
    assert not found.mask[2].any()
    before = jnp.concatenate([jnp.full((3, 1), START, jnp.int32), found.values[:, :-1]], axis=1)
    logits = module.apply({"params": params}, audio, Tokens(before, jnp.ones((3, 9), bool)))
    best = logits.argmax(axis=-1)
    for row in range(2):
        length = int(found.mask[row].sum())
        np.testing.assert_array_equal(found.values[row, :length], best[row, :length])
        assert length == 9 or best[row, length] == END
    assert len(set(np.asarray(found.values[0]).tolist())) > 1  # a test of something
