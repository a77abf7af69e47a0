"""The decoder's parts: caches, scanned layers, padding; T5's biases under a cache; mixtures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.attention import Mask, self_mask
from fusion_jax.language.decoder import Decoder
from fusion_jax.language.mixture import Mixture, load_balancing_loss
from fusion_jax.language.t5 import T5, RelativeTransformer
from fusion_jax.norm import RMSNorm
from fusion_jax.tokens import Tokens
from fusion_jax.transformer import MLP, Attention, Block, Rope, stack_layers, unstack_layers

LENGTH = 9
REAL = np.arange(LENGTH)[None] < np.array([[LENGTH], [6]])
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, LENGTH)), jnp.int32)


def block(window=None):
    attention = partial(Attention, heads=4, kv_heads=2, rope=Rope.plain(4), window=window)
    mixture = partial(Mixture, experts=3, chosen=2, hidden_width=8)
    return partial(Block, attention=attention, mlp=mixture, norm=RMSNorm)


def build(blocks, **kwargs):
    return Decoder(
        vocabulary=40,
        width=16,
        blocks=blocks,
        final_norm=RMSNorm,
        embedding_scale=4.0,
        context_length=LENGTH,
        learned_positions=True,
        tied=False,
        logit_softcap=3.0,
        **kwargs,
    )


def causal(part=slice(None)):
    mask = self_mask(jnp.asarray(REAL), causal=True)
    return Mask(
        mask.query_positions[:, part],
        mask.key_positions[:, part],
        mask.key_mask[:, part],
        causal=True,
    )


def test_rings_of_the_window_equal_full_recomputation():
    model = build((block(), block(3), block(3)))
    params = jax.jit(model.init)(jax.random.key(0), IDS, causal())
    expected, _ = jax.jit(model.apply)(params, IDS, causal())
    caches = model.empty_caches(2, LENGTH)
    assert [cache.key.shape[1] for cache in caches] == [LENGTH, 3, 3]
    step, found = jax.jit(model.apply), []
    for part in (slice(0, 4), *(slice(t, t + 1) for t in range(4, LENGTH))):
        hidden, caches = step(params, IDS[:, part], causal(part), caches=caches)
        found.append(hidden)
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found[REAL], expected[REAL], atol=1e-5)
    logits = model.apply(params, expected, method="logits")
    assert logits.shape == (2, LENGTH, 40)
    assert jnp.abs(logits).max() < 3.0


@pytest.mark.parametrize("turns", [1, 2])
def test_scanned_layers_equal_the_loop(turns):
    """All alike, or two kinds that take turns."""
    same = (block(3), block())[:turns] * 2
    params = jax.jit(build(same).init)(jax.random.key(0), IDS, causal())["params"]
    expected, _ = build(same).apply({"params": params}, IDS, causal())
    stacked = params | {"transformer": stack_layers(params["transformer"], turns)}
    model = build(same, scan=True)
    drawn = jax.eval_shape(model.init, jax.random.key(0), IDS, causal())["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda leaf: leaf.shape, drawn)
    jax.tree.map(
        np.testing.assert_array_equal, unstack_layers(stacked["transformer"]), params["transformer"]
    )
    caches = model.empty_caches(2, LENGTH)
    found, caches = model.apply({"params": stacked}, IDS, causal(), caches=caches)
    np.testing.assert_allclose(found[REAL], expected[REAL], atol=1e-5)
    caches = caches if turns > 1 else [caches]
    assert [cache.key.shape for cache in caches] == [(2, 2, n, 2, 4) for n in (3, LENGTH)[:turns]]


def test_vectors_equal_ids_and_padding_holds_anything():
    model = build((block(),))
    params = jax.jit(model.init)(jax.random.key(0), IDS, causal())
    vectors = model.apply(params, IDS, method="embed")
    vectors = jnp.where(REAL[:, :, None], vectors, jnp.nan)

    @jax.jit
    def loss(params, inputs):
        hidden, _ = model.apply(params, inputs, causal())
        return jnp.where(REAL[:, :, None], hidden, 0.0).var()

    expected, wanted = jax.value_and_grad(loss)(params, jnp.where(REAL, IDS, -5))
    found, gradient = jax.value_and_grad(loss, argnums=(0, 1))(params, vectors)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    wanted, gradient = wanted["params"]["transformer"], gradient[0]["params"]["transformer"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), gradient, wanted)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_mixture_is_the_weighted_sum_of_its_experts(normalize):
    model = Mixture(experts=4, chosen=2, hidden_width=6, normalize=normalize)
    hidden = jax.random.normal(jax.random.key(1), (2, 5, 8))
    params = model.init(jax.random.key(0), hidden)["params"]
    found = model.apply({"params": params}, hidden)
    chances = np.asarray(jax.nn.softmax(hidden @ params["router"]["kernel"]))
    expected = np.zeros(hidden.shape)
    for b, t in np.ndindex(2, 5):
        best = np.argsort(chances[b, t])[-2:]
        weights = chances[b, t, best] / (chances[b, t, best].sum() if normalize else 1)
        for weight, expert in zip(weights, best, strict=True):
            gate = jax.nn.silu(hidden[b, t] @ params["gate"][expert])
            up = hidden[b, t] @ params["up"][expert]
            expected[b, t] += weight * np.asarray((gate * up) @ params["down"][expert])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("scan", [False, True])
def test_load_balancing_loss_equals_transformers(scan):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    model = build((block(),) * 3, scan=scan)
    params = jax.jit(model.init)(jax.random.key(0), IDS, causal())
    _, state = model.apply(params, IDS, causal(), mutable=["intermediates"])
    found = load_balancing_loss(state["intermediates"], jnp.asarray(REAL), chosen=2)
    flat = [np.asarray(leaf) for leaf in jax.tree.leaves(state["intermediates"])]
    layers = np.concatenate([leaf.reshape(-1, 2 * LENGTH, 3) for leaf in flat])
    layers = tuple(torch.from_numpy(layer) for layer in layers)
    expected = theirs.load_balancing_loss_func(layers, 3, 2, torch.from_numpy(REAL).long())
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)


def test_t5_decodes_with_a_cache_as_without():
    def side(both_ways):
        attention = partial(Attention, heads=4, head_dim=6, bias=False, out_bias=False, scale=1.0)
        layer = partial(
            Block,
            attention=attention,
            cross_attention=None if both_ways else attention,
            mlp=partial(MLP, hidden_width=16),
            norm=RMSNorm,
        )
        return RelativeTransformer((layer,) * 2, RMSNorm, 4, 8, 6, both_ways)

    model = T5(40, 16, side(True), side(False))
    source = Tokens(IDS[:, ::-1], jnp.asarray(REAL))
    target = Tokens(IDS, jnp.asarray(REAL))
    params = jax.jit(model.init)(jax.random.key(0), source, target)
    expected = jax.jit(model.apply)(params, source, target)
    encoded = model.apply(params, source, method="encode")
    caches = model.decoder.empty_caches(2, LENGTH, 16)
    step, found = jax.jit(partial(model.apply, method="decode")), []
    for t in range(LENGTH):
        part = slice(t, t + 1)
        logits, caches = step(params, IDS[:, part], causal(part), encoded, caches=caches)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, 1)[REAL], expected[REAL], atol=1e-5)
