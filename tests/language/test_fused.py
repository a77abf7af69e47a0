"""Fused language models: where media land, what absence means, and generation from them."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_jax.errors import UserError
from fusion_jax.language.connectors import Patches, Projection, Resampler, with_cross_attention
from fusion_jax.language.fused import FusedLM, init_around, looked_at, vector_of
from fusion_jax.language.generate import answer_items, choose, fit, generate
from fusion_jax.language.prompt import pad
from fusion_jax.tokens import Tokens

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

DECODER = tiny.decoder()
WORDS = {"what": 5, "is": 6, "this": 7, "and": 8, "cat": 9, "dog": 10}


def encode(text):
    return [WORDS[word] for word in text.split()]


def build(**settings) -> FusedLM:
    return FusedLM(
        settings.pop("decoder", DECODER),
        {"image": Projection(tiny.WIDTH), "facts": Resampler(tiny.WIDTH, 2, 1, 2)},
        **settings,
    )


def media(seed=0, items=2):
    image, facts = jax.random.normal(jax.random.key(seed), (2, 3, items, 4, 6))
    return {
        "image": Tokens(image, jnp.ones((3, items, 4), bool)),
        "facts": Tokens(facts, jnp.ones((3, items, 4), bool)),
    }


TEXTS = ["<image> what is this <facts> and <image> cat", "what is <facts> this dog", "what dog"]


@pytest.fixture(scope="module", params=["causal", "prefix", "cross"])
def fused(request):
    """(model, params, layout): a causal one, a prefix-LM, and Flamingo's cross-attention."""
    if request.param == "cross":
        model = build(decoder=with_cross_attention(DECODER, every=2, heads=2), cross="image")
    else:
        model = build(prefix=request.param == "prefix")
    layout = model.layout(jax.random.key(0), media())
    batch = {"text": text(layout), "weight": weights(layout)} | media()
    base = {"decoder": tiny.random_params(DECODER)}
    params = init_around(model, jax.random.key(1), batch, base)
    if request.param == "cross":
        gates = params["decoder"]["transformer"]["layer_1"]["media"]
        gates["attention_gate"], gates["mlp_gate"] = jnp.float32(0.8), jnp.float32(-0.6)
    return model, params, layout


def text(layout, texts=TEXTS, **kwargs) -> Tokens:
    return pad([layout.encode(encode, t) for t in texts], **kwargs)


def weights(layout, texts=TEXTS) -> Tokens:
    """The last word of each row is its answer."""
    mask = text(layout, texts).mask
    last = np.arange(mask.shape[1]) == mask.sum(1, keepdims=True) - 1
    return Tokens(last.astype(np.float32), mask)


def run(model, params, batch):
    out = jax.jit(model.apply)({"params": params}, batch)
    return out.hidden, out.mask


def test_media_land_at_their_marks_in_order():
    model = build()
    layout = model.layout(jax.random.key(0), media())
    assert layout.lengths == {"image": 4, "facts": 2}
    batch = {"text": text(layout)} | media()
    variables = model.init(jax.random.key(1), batch)
    prompt = model.apply(variables, batch, method="prompt")
    connected = model.apply(variables, media(), method="connect")
    words = DECODER.apply(
        {"params": variables["params"]["decoder"]}, jnp.arange(11)[None], method="embed"
    )[0]
    image, facts = connected["image"].values[0], connected["facts"].values[0]
    expected = [
        *image[:4],
        *words[jnp.array([5, 6, 7])],
        *facts[:2],
        words[8],
        *image[4:],
        words[9],
    ]
    np.testing.assert_allclose(prompt.vectors[0], jnp.stack(expected), atol=1e-6)
    np.testing.assert_allclose(prompt.vectors[1, 2:4], connected["facts"].values[1, :2], atol=1e-6)
    assert prompt.mask.sum(1).tolist() == [15, 6, 2]


def test_absent_media_are_as_if_never_mentioned(fused):
    """NaN in their values changes neither outputs nor gradients."""
    model, params, layout = fused
    full = {"text": text(layout), "weight": weights(layout)} | media()
    absent = dict(full)
    mask = full["image"].mask.at[0, 0].set(False)
    absent["image"] = Tokens(full["image"].values.at[0, 0].set(jnp.nan), mask)
    absent["facts"] = Tokens(jnp.full((3, 2, 4, 6), jnp.nan), jnp.zeros((3, 2, 4), bool))

    plain = dict(full)
    texts = ["what is this and <image> cat", "what is this dog", "what dog"]
    plain["text"] = text(layout, texts)
    plain["weight"] = weights(layout, texts)
    moved = full["image"].values.at[0, 0].set(full["image"].values[0, 1])
    plain["image"] = Tokens(moved, full["image"].mask)

    found, mask = run(model, params, absent)
    expected, plain_mask = run(model, params, plain)
    for row in range(3):
        np.testing.assert_allclose(found[row][mask[row]], expected[row][plain_mask[row]], atol=2e-5)

    def loss(params, batch):
        out = model.apply({"params": params}, batch)
        return jnp.where(out.mask[:, :, None], jnp.sin(out.hidden), 0.0).sum()

    grads = jax.jit(jax.grad(loss))(params, absent)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_generation_continues_what_training_sees(fused):
    """The generated token is the most likely next one of a whole pass over prompt and answer."""
    model, params, layout = fused
    questions = [t.rsplit(" ", 1)[0] for t in TEXTS]
    rows = [layout.encode(encode, t) for t in questions]
    batch = {"text": pad(rows)} | media()
    prompt = jax.jit(lambda p, b: model.apply({"params": p}, b, method="prompt"))(params, batch)
    found = generate(model.decoder, params["decoder"], prompt, max_tokens=4).sequences()

    whole = pad([row + tokens for row, tokens in zip(rows, found, strict=True)])
    answered = np.zeros(whole.mask.shape, np.float32)
    for i, row in enumerate(rows):
        answered[i, len(row) : len(row) + 4] = 1
    hidden, mask = run(
        model, params, {"text": whole, "weight": Tokens(answered, whole.mask)} | media()
    )
    logits = model.apply({"params": params}, hidden, method="logits")
    logits = [row[real] for row, real in zip(logits, mask, strict=True)]
    assert [row[-5:-1].argmax(-1).tolist() for row in logits] == found

    scores = choose(model.decoder, params["decoder"], prompt, [[9], [10, 5], found[0][:3]])
    log_probs = jax.nn.log_softmax(logits[0])[-5:]
    expected = sum(log_probs[i, token] for i, token in enumerate(found[0][:3]))
    np.testing.assert_allclose(scores[0, 2], expected, rtol=1e-4)


def test_cross_attention_starts_as_the_decoder_itself():
    model = build(decoder=with_cross_attention(DECODER, every=1, heads=2), cross="image")
    layout = model.layout(jax.random.key(0), media())
    batch = {"text": text(layout)} | media()
    base = tiny.random_params(DECODER)
    params = init_around(model, jax.random.key(1), batch, {"decoder": base})
    hidden, mask = run(model, params, batch)
    other = {name: v for name, v in batch.items() if name != "image"}
    expected, _ = run(build(), params | {"decoder": base}, other)
    np.testing.assert_array_equal(
        jnp.where(mask[:, :, None], hidden, 0), jnp.where(mask[:, :, None], expected, 0)
    )


def test_an_answer_looks_at_a_picture_at_the_end_of_its_prompt():
    """However wide the prompt is padded; the mark's own place holds nothing."""
    model = build(decoder=with_cross_attention(DECODER, every=1, heads=2), cross="image")
    layout = model.layout(jax.random.key(0), media())
    base = {"decoder": tiny.random_params(DECODER)}
    params = init_around(model, jax.random.key(1), {"text": text(layout)} | media(), base)
    ids = layout.encode(encode, "what " * 16 + "<image>")
    for width, left in ((17, True), (24, False), (32, True)):
        batch = {"text": pad([ids] * 3, width, left=left)} | media()
        prompt = model.apply({"params": params}, batch, method="prompt")
        assert answer_items(fit(model.decoder, prompt, 4)).tolist() == [[1]] * 3


def test_each_word_looks_at_the_picture_before_it():
    model = build(decoder=with_cross_attention(DECODER, every=1, heads=2), cross="image")
    layout = model.layout(jax.random.key(0), media())
    batch = {"text": text(layout, ["what <image> is <image> this"] * 3)} | media()
    params = init_around(model, jax.random.key(1), batch, {"decoder": tiny.random_params(DECODER)})
    for layer in ("layer_0", "layer_1"):
        params["decoder"]["transformer"][layer]["media"]["attention_gate"] = jnp.float32(1)
    before, _ = run(model, params, batch)
    for item, changed in ((0, [0, 0, 1, 1, 1]), (1, [0, 0, 0, 1, 1])):
        values = batch["image"].values.at[:, item].add(1.0)
        after, mask = run(model, params, batch | {"image": Tokens(values, batch["image"].mask)})
        moved = np.abs(after - before).max(axis=(0, 2)) > 1e-4
        keep = np.array(mask[0])
        assert moved[keep].tolist() == np.array(changed, bool)[keep].tolist()


@settings(deadline=None)
@given(st.data())
def test_each_place_takes_its_own_items_next_vector(data):
    """Runs of marks of any length, in one text or in texts that follow each other, by a loop."""
    length, packed = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    part = st.tuples(st.integers(0, 2), st.integers(1, 9), st.booleans())
    marks, segments, expected, item, text = [], [], [], 0, 1
    for words, run, more in data.draw(st.lists(part, min_size=1, max_size=5)):
        if packed and (more or not words):
            text += 1
        words = words if packed or not marks else max(words, 1)
        marks += [False] * words + [True] * run
        segments += [text] * (words + run)
        places = np.arange(run)
        expected += [-1] * words + list((item + places // length) * length + places % length)
        item += -(-run // length)
    rest = 64 - len(marks)  # one shape, compiled once
    two = np.array([marks + [False] * rest, [False] * 64])
    ids = np.array([segments + [0] * rest] * 2, np.int32)
    texts = Tokens(jnp.asarray(ids), jnp.asarray(ids > 0))
    found = np.asarray(vector_of(jnp.asarray(two), length, texts if packed else None))
    np.testing.assert_array_equal(np.where(two[0], found[0], -1), expected + [-1] * rest)


def test_each_word_looks_at_the_last_picture_that_is_there_in_its_own_segment():
    """Against a loop, for cross-attention: absent items and packed neighbours are passed over."""
    rng = np.random.default_rng(0)
    marks, present = rng.random((40, 12)) < 0.3, rng.random((40, 12)) < 0.6
    segments = np.sort(rng.integers(1, 4, marks.shape), axis=1).astype(np.int32)
    for packed in (False, True):
        own = segments if packed else np.ones_like(segments)
        expected = np.zeros(marks.shape, int)
        for row, place in np.ndindex(*marks.shape):
            number = 0
            for at in range(place + 1):
                number += marks[row, at]
                same = own[row, at] == own[row, place]
                if marks[row, at] and same and present[row, number - 1]:
                    expected[row, place] = number
        given = Tokens(jnp.asarray(segments), jnp.ones(segments.shape, bool)) if packed else None
        found = looked_at(jnp.asarray(marks), jnp.asarray(present), given)
        np.testing.assert_array_equal(found, expected)


def test_pictures_go_in_raw_or_through_an_encoder():
    pictures = Tokens(jnp.ones((2, 3, 8, 8, 3)), jnp.array([[True, True, False], [True] * 3]))
    raw = FusedLM(DECODER, {"image": Patches(tiny.WIDTH, patch=4)})
    encoded = FusedLM(DECODER, {"image": Projection(tiny.WIDTH)}, {"image": Patches(5, patch=2)})
    for model, length in ((raw, 4), (encoded, 16)):
        layout = model.layout(jax.random.key(0), {"image": pictures})
        assert (layout.lengths, layout.items) == ({"image": length}, {"image": 3})
        init = partial(model.init_with_output, method="connect")
        tokens, variables = init(jax.random.key(0), {"image": pictures})
        assert tokens["image"].values.shape == (2, 3 * length, tiny.WIDTH)
        assert tokens["image"].mask.sum(1).tolist() == [2 * length, 3 * length]
        names = {"connectors_image"} | ({"encoders_image"} if model is encoded else set())
        assert set(variables["params"]) == names


def test_bad_prompts_and_parts():
    layout = build().layout(jax.random.key(0), media(items=1))
    with pytest.raises(UserError, match="2 <image> marks and 1 given"):
        layout.encode(encode, "<image> what <image>")
    with pytest.raises(UserError, match="context holds 96"):
        layout.encode(encode, "what " * 93 + "<image>")
    batch = {"text": text(layout, ["what"])} | media()
    with pytest.raises(UserError, match="reads 16"):
        FusedLM(DECODER, {"image": Projection(8)}).init(jax.random.key(0), batch)
    with pytest.raises(UserError, match="expects no such param"):
        init_around(build(), jax.random.key(0), batch, {"decoder": {"head": jnp.ones(3)}})
    with pytest.raises(UserError, match="leave --scan out"):
        with_cross_attention(DECODER.clone(scan=True))
    with pytest.raises(UserError, match="among the connectors"):
        FusedLM(DECODER, {}, cross="image").init(jax.random.key(0), batch)
