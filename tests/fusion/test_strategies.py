"""Properties that every fusion strategy has, its cost, and what each adds to the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.fusion import streams
from fusion_jax.fusion.bottleneck import Bottleneck
from fusion_jax.fusion.concat import Concat
from fusion_jax.fusion.cross_attention import CrossAttention
from fusion_jax.fusion.gated import Gated
from fusion_jax.fusion.low_rank_bilinear import LowRankBilinear
from fusion_jax.fusion.merged_attention import MergedAttention
from fusion_jax.fusion.modality_experts import ModalityExperts
from fusion_jax.fusion.perceiver import Perceiver
from fusion_jax.fusion.sum import Sum
from fusion_jax.fusion.tensor import Tensor
from fusion_jax.tokens import Tokens, mean_pool

STRATEGIES = {
    "sum": Sum(),
    "concat": Concat(),
    "gated": Gated(),
    "low_rank_bilinear": LowRankBilinear(),
    "tensor": Tensor(factor_width=3),
    "merged_attention": MergedAttention(layers=1),
    "merged_attention_scan": MergedAttention(scan=True, remat=True),
    "co_attention": CrossAttention(layers=1),
    "cross_attention": CrossAttention(layers=1, queries=("text",)),
    "bottleneck": Bottleneck(),
    "perceiver": Perceiver(),
    "modality_experts": ModalityExperts(remat=True),
}
LENGTHS = {"audio": 5, "image": 4, "text": 3}
ROWS, WIDTH = 4, 8
each = pytest.mark.parametrize("name", STRATEGIES)


def make(seed: int, masks: dict[str, np.ndarray], width: int = WIDTH) -> dict[str, Tokens]:
    rng = np.random.default_rng(seed)
    return {
        name: Tokens(
            jnp.asarray(rng.normal(size=(*mask.shape, width)), jnp.float32), jnp.asarray(mask)
        )
        for name, mask in masks.items()
    }


def everything(width: int = WIDTH) -> dict[str, Tokens]:
    return make(0, {name: np.ones((ROWS, n), bool) for name, n in LENGTHS.items()}, width)


def random_params(fusion, tokens):
    """Random params, biases too, without compiling an init."""
    shapes = jax.eval_shape(fusion.init, jax.random.key(0), tokens)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype),
        shapes.get("params", {}),
    )


@functools.cache
def params(name):
    return random_params(STRATEGIES[name], everything())


@functools.cache
def loss_and_gradients(name):
    """(params, values, masks) -> loss, pooled result, gradients for params and for values."""

    def loss(params, values, masks):
        tokens = {n: Tokens(values[n], masks[n]) for n in values}
        pooled = mean_pool(STRATEGIES[name].apply({"params": params}, tokens))
        return (jnp.sin(pooled) ** 2).sum(), pooled

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def evaluate(name, tokens):
    values = {n: t.values for n, t in tokens.items()}
    return loss_and_gradients(name)(params(name), values, {n: t.mask for n, t in tokens.items()})


masks = st.fixed_dictionaries(
    {
        name: st.lists(st.integers(0, length), min_size=ROWS, max_size=ROWS).map(
            lambda real, length=length: np.arange(length)[None] < np.array(real)[:, None]
        )
        for name, length in LENGTHS.items()
    }
)


@each
@settings(max_examples=8, deadline=None, derandomize=True)
@given(masks=masks, junk=st.sampled_from([np.nan, np.inf, 1e30]))
def test_padding_holds_nothing(name, masks, junk):
    """Row 0 has no modality at all; NaN in padding changes nothing, bit for bit."""
    masks = {n: mask & (np.arange(ROWS) > 0)[:, None] for n, mask in masks.items()}
    tokens = make(1, masks)
    clean = {
        n: t.replace(values=jnp.where(t.mask[:, :, None], t.values, 0.0)) for n, t in tokens.items()
    }
    dirty = {
        n: t.replace(values=jnp.where(t.mask[:, :, None], t.values, junk))
        for n, t in tokens.items()
    }
    expected = evaluate(name, clean)
    found = evaluate(name, dirty)
    for leaf, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert jnp.isfinite(other).all()
        np.testing.assert_array_equal(leaf, other)


@each
def test_rows_are_independent_of_order_and_padding(name):
    real = {"audio": [5, 0, 2, 1], "image": [4, 4, 0, 1], "text": [3, 2, 1, 0]}
    masks = {n: np.arange(LENGTHS[n])[None] < np.array(real[n])[:, None] for n in LENGTHS}
    tokens = make(2, masks)
    (_, expected), _ = evaluate(name, tokens)
    order = np.array([2, 0, 3, 1])
    pad = ((0, 0), (0, 3))
    moved = {
        n: Tokens(
            jnp.pad(t.values[order], (*pad, (0, 0)), constant_values=7.0),
            jnp.pad(t.mask[order], pad),
        )
        for n, t in reversed(tokens.items())
    }
    found = jax.jit(STRATEGIES[name].apply)({"params": params(name)}, moved)
    np.testing.assert_allclose(mean_pool(found), expected[order], atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["sum", "merged_attention", "co_attention", "bottleneck", "perceiver", "modality_experts"],
)
def test_absent_is_the_same_as_never_named(name):
    """Where params do not depend on how many modalities there are."""
    tokens = everything()
    absent = tokens["image"].replace(mask=tokens["image"].mask & False)
    (_, expected), _ = evaluate(name, tokens | {"image": absent})
    del tokens["image"]
    found = jax.jit(STRATEGIES[name].apply)({"params": params(name)}, tokens)
    np.testing.assert_allclose(mean_pool(found), expected, atol=2e-5)


@each
def test_every_modality_matters(name):
    """Each modality that a row has changes its result, and dropping it is not the same."""
    tokens = everything()
    (_, expected), _ = evaluate(name, tokens)
    for modality in LENGTHS:
        mask = tokens[modality].mask.at[0].set(False)
        dropped = tokens | {modality: tokens[modality].replace(mask=mask)}
        (_, found), _ = evaluate(name, dropped)
        assert jnp.abs(found[0] - expected[0]).max() > 1e-4
        np.testing.assert_allclose(found[1:], expected[1:], atol=1e-5)


@each
def test_cost_is_what_xla_counts(name):
    """Matrix products make up at least 80% of XLA's count at these sizes, and no more than it."""
    lengths, width, rows = {"audio": 40, "image": 24, "text": 16}, 64, 2
    masks = {n: np.ones((rows, length), bool) for n, length in lengths.items()}
    tokens = make(0, masks, width)
    fusion = STRATEGIES[name]
    if name.endswith("scan"):
        fusion = fusion.clone(scan=False)  # XLA counts the body of a loop once
    variables = jax.eval_shape(fusion.init, jax.random.key(0), tokens)
    compiled = jax.jit(fusion.apply).lower(variables, tokens).compile()
    counted = compiled.cost_analysis()["flops"] / rows
    assert 0.8 < fusion.flops(lengths, width) / counted < 1.02


def test_merged_tokens_are_in_alphabetical_order_without_jit_too():
    tokens = everything()
    merged = streams.merge(dict(reversed(tokens.items())))
    expected = np.concatenate([tokens[n].values for n in ("audio", "image", "text")], axis=1)
    np.testing.assert_array_equal(merged.values, expected)


def test_products_and_gates_by_float64_loops():
    """Two rows, the second without text."""
    masks = {"image": np.ones((2, 1), bool), "text": np.array([[True], [False]])}
    tokens = make(3, masks)
    pooled = {n: np.asarray(mean_pool(t), np.float64) for n, t in tokens.items()}

    def run(fusion):
        shapes = jax.eval_shape(fusion.init, jax.random.key(0), tokens)["params"]
        rng = np.random.default_rng(0)
        p = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
        single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), p)
        return p, jax.jit(fusion.apply)({"params": single}, tokens).values[:, 0]

    p, found = run(LowRankBilinear(rank=2))
    expected = np.tile(p["bias"], (2, 1))
    for rank in range(2):
        columns = slice(rank * WIDTH, (rank + 1) * WIDTH)
        product = np.ones((2, WIDTH))
        for name, vector in pooled.items():
            factor = p[f"{name}_factor"]
            product *= vector @ factor["kernel"][:, columns] + factor["bias"][columns]
        expected += p["weights"][rank] * product
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    p, found = run(Tensor(factor_width=2))
    for row in range(2):
        factors = []
        for name, vector in pooled.items():
            factor = vector[row] @ p[f"{name}_factor"]["kernel"] + p[f"{name}_factor"]["bias"]
            factors.append(np.append(factor * masks[name][row], 1.0))
        expected = np.outer(*factors).reshape(-1) @ p["out"]["kernel"] + p["out"]["bias"]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)

    p, found = run(Gated())
    both = np.concatenate([pooled["image"], pooled["text"]], axis=1)
    expected = np.zeros((2, WIDTH))
    for name, vector in pooled.items():
        gate, hidden = p[f"{name}_gate"], p[f"{name}_hidden"]
        z = 1 / (1 + np.exp(-(both @ gate["kernel"] + gate["bias"])))
        expected += masks[name] * z * np.tanh(vector @ hidden["kernel"] + hidden["bias"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bottleneck_carries_one_modality_to_another_from_the_second_layer():
    tokens = everything()
    changed = tokens | {"audio": tokens["audio"].replace(values=tokens["audio"].values * 3)}
    for layers, heard in ((1, False), (2, True)):
        fusion = Bottleneck(layers=layers)
        p = {"params": random_params(fusion, tokens)}
        apply = jax.jit(fusion.apply)
        difference = apply(p, tokens).values - apply(p, changed).values
        assert bool(jnp.abs(difference[:, LENGTHS["audio"] :]).max() > 1e-5) == heard


def test_experts_are_used_by_their_modality_alone():
    fusion = ModalityExperts(layers=1, shared_layers=0)
    tokens = everything()
    before = {"params": random_params(fusion, tokens)}
    after = jax.tree.map(lambda leaf: leaf, before)  # dicts are copied
    experts = after["params"]["transformer"]["layer_0"]["mlp"]
    experts["image"] = jax.tree.map(lambda leaf: leaf + 0.1, experts["image"])
    apply = jax.jit(fusion.apply)
    changed = jnp.abs(apply(before, tokens).values - apply(after, tokens).values).max(axis=(0, 2))
    np.testing.assert_array_equal(changed > 1e-6, [False] * 5 + [True] * 4 + [False] * 3)


@pytest.mark.parametrize(
    ("fusion", "tokens"),
    [
        (Sum(), everything() | {"text": make(0, {"text": np.ones((ROWS, 2), bool)}, 6)["text"]}),
        (Tensor(factor_width=200), everything()),
        (CrossAttention(queries=("smell",)), everything()),
        (MergedAttention(heads=3), everything()),
    ],
)
def test_bad_settings_say_what_to_do(fusion, tokens):
    with pytest.raises(UserError, match=r"(?s)given|needs|change"):
        fusion.init(jax.random.key(0), tokens)
