"""Distillation against NumPy and at its zero: a student that is its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from fusion_jax.objectives.distillation import (
    attention_relations,
    contrastive,
    hidden_states,
    soft_targets,
)

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 3, 5, 8)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0] * 5], bool)


def test_soft_targets_are_a_scaled_divergence_and_only_the_student_learns():
    found = soft_targets(STUDENT, TEACHER, MASK, temperature=2.0)
    p, q = (scipy.special.softmax(x.astype(float) / 2, axis=-1) for x in (TEACHER, STUDENT))
    expected = 4 * scipy.stats.entropy(p, q, axis=-1)[MASK].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(float(soft_targets(TEACHER, TEACHER))) < 1e-6
    grads = jax.grad(soft_targets, argnums=(0, 1))(jnp.asarray(STUDENT), jnp.asarray(TEACHER))
    assert np.abs(grads[0]).max() > 0 and np.abs(grads[1]).max() == 0


def test_hidden_states_are_compared_in_the_teachers_width():
    projection = RNG.normal(size=(4, 8)).astype(np.float32)
    student = np.where(MASK[..., None], STUDENT[..., :4], np.nan).astype(np.float32)
    found = hidden_states(student, TEACHER, projection, MASK)
    gap = STUDENT[..., :4].astype(float) @ projection - TEACHER
    np.testing.assert_allclose(found, np.square(gap).mean(-1)[MASK].mean(), rtol=1e-5)


def test_attention_relations_do_not_depend_on_width_or_rotation():
    rotation = np.linalg.qr(RNG.normal(size=(4, 4)))[0].astype(np.float32)
    turned = np.concatenate([TEACHER[..., :4] @ rotation, TEACHER[..., 4:] @ rotation], axis=-1)
    assert float(attention_relations(turned, TEACHER, MASK, heads=2)) < 1e-5
    assert float(attention_relations(STUDENT, TEACHER, MASK, heads=2)) > 0.01
    junk = np.where(MASK[..., None], STUDENT, 1e3)
    np.testing.assert_allclose(
        attention_relations(junk.astype(np.float32), TEACHER, MASK, heads=2),
        attention_relations(STUDENT, TEACHER, MASK, heads=2),
        rtol=1e-5,
    )


def test_contrastive_wants_the_teachers_vector_of_the_same_row():
    rows, present = RNG.normal(size=(4, 6)).astype(np.float32), np.array([1, 1, 1, 0], bool)
    dirty = np.where(present[:, None], rows, np.nan).astype(np.float32)
    unit = rows[:3] / np.linalg.norm(rows[:3], axis=1, keepdims=True)
    scores = unit @ unit[::-1].T / 0.5
    expected = -np.diag(scipy.special.log_softmax(scores, axis=1)).mean()
    turned = np.concatenate([dirty[2::-1], dirty[3:]])
    np.testing.assert_allclose(
        contrastive(dirty, turned, present, temperature=0.5), expected, rtol=1e-4
    )
    assert contrastive(rows, rows, present) < contrastive(rows, rows[::-1], present)
