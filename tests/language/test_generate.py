"""Generation: caches, batches, buckets and streams change nothing; transformers is the oracle."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fusion_jax.errors import UserError
from fusion_jax.language import generate as generation
from fusion_jax.language.beam import beam_search
from fusion_jax.language.generate import choose, generate, stream
from fusion_jax.language.prompt import Prompt, bucket, text_mask
from fusion_jax.language.sampling import Sampling
from fusion_jax.training.sharding import make_mesh, tree_shardings

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

PROMPTS = [[5, 9, 11], [7, 3, 50, 22, 8, 41, 13], [60], [4, 4, 17, 30]]
MODEL = tiny.decoder()


@pytest.fixture(scope="module")
def llama():
    return tiny.torch_llama()


@pytest.fixture(scope="module")
def params(llama):
    return tiny.params_of(llama)


def oracle(llama, prompt, **settings):
    with torch.no_grad():
        out = llama.generate(torch.tensor([prompt]), **settings)
    return out[:, len(prompt) :].numpy()


def test_a_model_split_over_devices_writes_the_same_and_splits_its_cache(params):
    mesh, prompt = make_mesh("fsdp=4,tensor=2"), Prompt.of(PROMPTS)
    split = jax.device_put(params, tree_shardings(params, mesh, smallest=1))
    whole, found = (generate(MODEL, each, prompt, max_tokens=8) for each in (params, split))
    assert found.sequences() == whole.sequences()
    _, caches, _ = jax.jit(generation.prefill, static_argnums=(0, 3))(MODEL, split, prompt, 8)
    for cache in caches:
        assert cache.key.sharding.shard_shape(cache.key.shape)[2] == tiny.KV // 2


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_equals_transformers(llama, params, penalty):
    """Ragged prompts in one batch; some rows stop before others."""
    found = generate(
        MODEL,
        params,
        Prompt.of(PROMPTS),
        max_tokens=20,
        stop_ids=(2, 33),
        sampling=Sampling(repetition_penalty=penalty),
    ).sequences()
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        expected = oracle(
            llama,
            prompt,
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=[2, 33],
            repetition_penalty=penalty,
        )
        assert tokens == expected[0].tolist()


@pytest.mark.parametrize(
    ("length_penalty", "stop_ids"), [(1.0, (2, 5, 33)), (0.3, (2, 33, 12, 45))]
)
def test_beams_equal_transformers(llama, params, length_penalty, stop_ids):
    found, scores = beam_search(
        MODEL,
        params,
        Prompt.of(PROMPTS),
        max_tokens=12,
        beams=3,
        stop_ids=stop_ids,
        length_penalty=length_penalty,
    )
    ended_early = 0
    for row, prompt in enumerate(PROMPTS):
        expected = llama.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            eos_token_id=list(stop_ids),
            length_penalty=length_penalty,
            return_dict_in_generate=True,
            output_scores=True,
        )
        np.testing.assert_allclose(scores[row], expected.sequences_scores, atol=1e-4)
        for beam, sequence in enumerate(expected.sequences[:, len(prompt) :]):
            length = found.mask[row, beam].sum()
            assert found.ids[row, beam, :length].tolist() == sequence[:length].tolist()
            ended_early += length < 12
    assert ended_early > 0


@pytest.mark.parametrize("window", [None, 4])
def test_cached_steps_equal_full_recomputation(window):
    model = tiny.decoder(window)
    params = tiny.random_params(model)
    found = generate(model, params, Prompt.of(PROMPTS), max_tokens=10).sequences()
    rows = [prompt + tokens for prompt, tokens in zip(PROMPTS, found, strict=True)]
    logits = full_logits(model, params, rows)
    assert [row.argmax(-1)[-11:-1].tolist() for row in logits] == found


def full_logits(model, params, rows):
    """Logits [t, v] of each list of ids, without caches, in one padded batch."""
    prompt = Prompt.of(rows)

    @jax.jit
    def run(ids, mask):
        hidden, _ = model.apply({"params": params}, ids, text_mask(mask))
        return model.apply({"params": params}, hidden, method="logits")

    logits = np.asarray(run(prompt.ids, prompt.mask))
    return [logits[i][mask] for i, mask in enumerate(prompt.mask)]


def test_a_batch_equals_one_by_one(params):
    """Also when sampling, with a key per row; and padding anywhere."""
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2)
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    settings = dict(max_tokens=12, sampling=sampling, stop_ids=(2,))
    together = generate(MODEL, params, Prompt.of(PROMPTS), rng=keys, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(MODEL, params, Prompt.of([prompt]), rng=keys[row : row + 1], **settings)
        assert alone.sequences()[0] == together.sequences()[row]
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-4)
        gaps = np.zeros((1, 17), np.int32)
        gaps[0, 1 : 2 * len(prompt) : 2] = prompt
        gapped = Prompt(gaps, gaps > 0)
        moved = generate(MODEL, params, gapped, rng=keys[row : row + 1], **settings)
        assert moved.sequences() == alone.sequences()


def test_streaming_shows_the_same_tokens(params):
    settings = dict(max_tokens=11, stop_ids=(2, 33))
    expected = generate(MODEL, params, Prompt.of(PROMPTS), **settings).sequences()
    found = [[] for _ in PROMPTS]
    chunks = 0
    for chunk in stream(MODEL, params, Prompt.of(PROMPTS), chunk=3, **settings):
        chunks += 1
        for row, ids in zip(found, chunk, strict=True):
            row += ids
    assert found == expected
    assert chunks > 2


def test_vectors_in_place_of_ids(params):
    prompt = Prompt.of(PROMPTS)
    vectors = MODEL.apply({"params": params}, jnp.asarray(prompt.ids), method="embed")
    vectors = jnp.where(prompt.mask[:, :, None], vectors, jnp.nan)
    expected = generate(MODEL, params, prompt, max_tokens=6)
    found = generate(MODEL, params, prompt.replace(vectors=vectors), max_tokens=6)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_places_of_what_is_absent_cost_nothing(params):
    """As of a short recording, for which a prompt has room: they are gone before it is read."""
    prompt = Prompt.of(PROMPTS)
    vectors = MODEL.apply({"params": params}, jnp.asarray(prompt.ids), method="embed")
    wide = prompt.replace(vectors=vectors)
    gaps = {
        name: np.insert(getattr(wide, name), [3] * 20, fill, axis=1)
        for name, fill in (("ids", -1), ("mask", False), ("vectors", np.nan))
    }
    wide = wide.replace(**gaps)
    assert wide.mask.shape[1] == 27
    found = generation.fit(MODEL, wide, 6)
    assert found.mask.shape[1] == found.vectors.shape[1] == 16
    assert bool(jnp.isfinite(jnp.where(found.mask[..., None], found.vectors, 0)).all())
    expected = generate(MODEL, params, prompt, max_tokens=6)
    np.testing.assert_array_equal(generate(MODEL, params, wide, max_tokens=6).ids, expected.ids)


def test_choices_have_their_own_probabilities(params):
    choices = [[9, 4, 2], [30], [9, 5], [8, 8, 8, 8]]
    found = choose(MODEL, params, Prompt.of(PROMPTS), choices, at_once=3)
    rows = [prompt + choice for prompt in PROMPTS for choice in choices]
    logits = full_logits(MODEL, params, rows)
    for index, (row, one) in enumerate(zip(rows, logits, strict=True)):
        count = len(choices[index % len(choices)])
        log_probs = np.asarray(jax.nn.log_softmax(one))[-count - 1 : -1]
        expected = log_probs[np.arange(count), row[-count:]].sum()
        np.testing.assert_allclose(np.ravel(found)[index], expected, rtol=1e-4)
    shortest = choose(MODEL, params, Prompt.of(PROMPTS), [[9], [30]])
    np.testing.assert_allclose(shortest[:, 1], found[:, 1], rtol=1e-4)
    full = [[5] * (MODEL.context_length - 2)]
    [[last, _]] = choose(MODEL, params, Prompt.of(full), [[9, 4], [30]])
    log_probs = jax.nn.log_softmax(full_logits(MODEL, params, [full[0] + [9, 4]])[0])
    np.testing.assert_allclose(last, log_probs[-3, 9] + log_probs[-2, 4], rtol=1e-4)
    with pytest.raises(UserError, match="answer up to 3"):
        choose(MODEL, params, Prompt.of(full), [[9, 4, 2]])


def test_one_compilation_per_bucket(params):
    programs = generation._begin, generation._continue
    for program in programs:
        program.clear_cache()
    before = [program._cache_size() for program in programs]  # not 0 in some versions of JAX

    def compiled() -> list[int]:
        return [program._cache_size() - old for program, old in zip(programs, before, strict=True)]

    for length in (3, 9, 16):
        for max_tokens in (5, 12):
            generate(MODEL, params, Prompt.of([[5] * length]), max_tokens=max_tokens)
    assert compiled() == [1, 1]
    generate(MODEL, params, Prompt.of([[5] * 17]), max_tokens=5)
    assert compiled()[0] == 2
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 65, 97)] == [
        16, 16, 24, 24, 32, 48, 64, 96, 128,
    ]  # fmt: skip


def test_what_cannot_be_generated(params):
    with pytest.raises(UserError, match="context holds 96"):
        generate(MODEL, params, Prompt.of([[5] * 90]), max_tokens=7)
    with pytest.raises(UserError, match="empty"):
        generate(MODEL, params, Prompt.of([[]], length=3), max_tokens=7)
    with pytest.raises(UserError, match="max_tokens=0"):
        generate(MODEL, params, Prompt.of([[5]]), max_tokens=0)
    with pytest.raises(UserError, match="top_p=0"):
        Sampling(top_p=0)
