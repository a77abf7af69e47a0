from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusion_jax.attention import dense_attend
from fusion_jax.attention_kernels import cudnn, splash
from fusion_jax.errors import UserError
from fusion_jax.language.connectors import Projection
from fusion_jax.language.fused import FusedLM, init_around
from fusion_jax.language.knowledge_tree import Mention, Tree, TreeLM, TreeMask, stack
from fusion_jax.language.prompt import pad, text_mask
from fusion_jax.ring import ring
from fusion_jax.tokens import Tokens
from fusion_jax.training.sharding import make_mesh
from tests.language import tiny

SENTENCE = [5, 6, 7, 8, 9]
FACTS = ((11, 12), (13, 14, 15))
# Tokens 1 and 2 mention what both facts are about; token 4 what the third is.
TREE = Tree.of(SENTENCE, [Mention(1, 3, FACTS), Mention(4, 5, ((16,),))])


def test_soft_positions_go_on_from_the_mention():
    assert TREE.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5, 5]
    assert TREE.ids.tolist() == [*SENTENCE, 11, 12, 13, 14, 15, 16]


def test_the_visible_matrix_is_that_of_the_paper_read_forwards():
    names = ["A", "B", "C", "D", "E", "f", "g", "h", "i", "j", "k"]
    sees = {
        "A": "A", "B": "A B f g h i j", "C": "A B C f g h i j", "D": "A B C D",
        "E": "A B C D E k",
        "f": "A B C f", "g": "A B C f g",
        "h": "A B C h", "i": "A B C h i", "j": "A B C h i j",
        "k": "A B C D E k",
    }  # fmt: skip
    batch = stack([TREE], 13)
    tree = jax.tree.map(jnp.asarray, batch["tree"])
    mask = TreeMask(tree.positions, tree.positions, jnp.asarray(batch["text"].mask), tree=tree)
    dense = np.asarray(mask.dense()[0, 0])
    for row, name in enumerate(names):
        assert [names[i] for i in np.flatnonzero(dense[row])] == sees[name].split(), name


@pytest.mark.parametrize(
    "kernel",
    [partial(cudnn, implementation="xla"), partial(splash, interpret=True), ring],
    ids=["cudnn", "splash", "ring"],
)
def test_every_kernel_sees_the_same(kernel):
    """And no token its future, which the plain part of the mask does not hide."""
    batch = stack([TREE, Tree.of(SENTENCE, [])], 16)
    tree = jax.tree.map(jnp.asarray, batch["tree"])
    mask = TreeMask(tree.positions, tree.positions, jnp.asarray(batch["text"].mask), tree=tree)
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 16, 2, 8))
    mesh = make_mesh("data=2,tensor=4").abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        found = jax.jit(kernel)(query, key, value, mask)
    np.testing.assert_allclose(found, dense_attend(query, key, value, mask), atol=1e-5)


def run(trees, length=16):
    model = TreeLM(tiny.decoder())
    params = {"decoder": tiny.random_params(model.decoder)}
    return model.apply({"params": params}, stack(trees, length)).hidden


def test_without_facts_it_is_the_decoder():
    model = tiny.decoder()
    text = pad([SENTENCE], 16)
    expected, _ = model.apply(
        {"params": tiny.random_params(model)},
        jnp.asarray(text.values),
        text_mask(jnp.asarray(text.mask)),
    )
    bare = run([Tree.of(SENTENCE, [])])
    np.testing.assert_allclose(bare[:, :5], expected[:, :5], atol=1e-5)
    mentioned = run([Tree.of(SENTENCE, [Mention(1, 3, ())])])
    np.testing.assert_array_equal(mentioned, bare)


def test_a_fact_changes_its_mention_and_what_follows_and_the_other_fact_does_not_see_it():
    both = run([TREE])[0]
    other = run(
        [Tree.of(SENTENCE, [Mention(1, 3, ((11, 12), (20, 21, 22))), Mention(4, 5, ((16,),))])]
    )[0]
    np.testing.assert_allclose(both[0], other[0], atol=1e-5)
    assert (np.abs(both[1:5] - other[1:5]).max(axis=1) > 1e-3).all()
    # Facts of one mention meet only through the mention, from the second layer on.
    assert np.abs(both[5:7] - other[5:7]).max() > 0
    order = run([Tree.of(SENTENCE, [Mention(1, 3, FACTS[::-1]), Mention(4, 5, ((16,),))])])[0]
    np.testing.assert_allclose(both[:5], order[:5], atol=1e-4)


def test_bad_trees_are_told():
    with pytest.raises(UserError, match="tokens 3 to 9 is not within a sentence of 5"):
        Tree.of(SENTENCE, [Mention(3, 9, ())])
    with pytest.raises(UserError, match="has 11 tokens, room is for 8"):
        stack([TREE], 8)


def test_a_picture_on_the_trunk_is_read_and_an_absent_one_takes_no_place():
    decoder, key = tiny.decoder(), jax.random.key(0)
    model = TreeLM(decoder, {"image": Projection(tiny.WIDTH)})
    mark, rng = -1, np.random.default_rng(0)
    values = rng.normal(size=(1, 1, 2, 3)).astype(np.float32)
    image = Tokens(values, np.ones((1, 1, 2), bool))
    shown = [SENTENCE[0], mark, mark, *SENTENCE[1:]]
    facts = [Mention(3, 5, FACTS)]  # where Mention(1, 3) was without the picture
    batch = stack([Tree.of(shown, facts)], 16) | {"image": image}
    params = init_around(model, key, batch, {"decoder": tiny.random_params(decoder)})
    run = jax.jit(lambda batch: model.apply({"params": params}, batch).hidden)

    absent = run(batch | {"image": Tokens(values, np.zeros((1, 1, 2), bool))})[0]
    without = run(stack([Tree.of(SENTENCE, [Mention(1, 3, FACTS)])], 16) | {"image": image})[0]
    last = int(batch["text"].mask.sum())
    np.testing.assert_allclose(absent[0], without[0], atol=1e-5)
    np.testing.assert_allclose(absent[3:last], without[1 : last - 2], atol=1e-5)
    assert np.abs(run(batch)[0, 3:last] - absent[3:last]).max() > 1e-3

    bare = stack([Tree.of(shown, [])], 16) | {"image": image}
    plain = FusedLM(decoder, model.connectors)
    fused = plain.apply({"params": params}, {"text": bare["text"], "image": image}).hidden
    np.testing.assert_allclose(run(bare)[0, :7], fused[0, :7], atol=1e-5)
