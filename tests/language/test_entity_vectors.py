import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.language.entity_vectors import EntityLM
from fusion_jax.language.fused import FusedLM
from fusion_jax.language.prompt import pad
from fusion_jax.tokens import Tokens
from tests.language import tiny

MODEL = EntityLM(tiny.decoder())
TEXT = jax.tree.map(jnp.asarray, pad([[5, 6, 7, 8], [9, 10, 11]], 6))


def entities(mask):
    values = np.full((2, 6, 3), np.nan, np.float32)
    values[mask] = np.random.default_rng(0).normal(size=(mask.sum(), 3))
    return Tokens(jnp.asarray(values), jnp.asarray(mask))


def hidden(params, mask):
    batch = {"text": TEXT, "entities": entities(mask)}
    return MODEL.apply({"params": params}, batch).hidden


def test_it_is_the_decoder_where_nothing_is_mentioned_and_before_training():
    nowhere = np.zeros((2, 6), bool)
    somewhere = nowhere.copy()
    somewhere[0, 1:3] = True
    fresh = MODEL.init(jax.random.key(0), {"text": TEXT, "entities": entities(somewhere)})["params"]
    decoder = tiny.random_params(MODEL.decoder)
    plain = FusedLM(MODEL.decoder, {})
    expected = plain.apply({"params": {"decoder": decoder}}, {"text": TEXT}).hidden
    np.testing.assert_array_equal(hidden({**fresh, "decoder": decoder}, somewhere), expected)

    trained = {"decoder": decoder, "entity": {"kernel": jnp.ones((3, tiny.WIDTH))}}
    np.testing.assert_array_equal(hidden(trained, nowhere), expected)
    changed = np.abs(hidden(trained, somewhere) - expected)[:, :4].max(axis=2) > 1e-4
    assert changed.tolist() == [[False, True, True, True], [False] * 4]
