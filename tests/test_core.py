"""Batches as pytrees, the number of ways, and static protocol cards."""

import jax
import jax.numpy as jnp
import pytest

import jaxmeta as jm
from jaxmeta.core import ways_of


def batch(**fields):
    return jm.Batch(**({"x": jnp.zeros((4, 2)), "y": jnp.array([0, 2, 1, 2], jnp.int32)} | fields))


def test_a_batch_is_a_pytree_with_static_ways():
    full = batch(mask=jnp.ones(4, bool), ways=3)
    assert len(jax.tree.leaves(full)) == 3
    assert len(jax.tree.leaves(batch())) == 2
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), full)
    assert stacked.x.shape == (2, 4, 2)
    assert jax.vmap(lambda b: b.x.sum() + b.ways)(stacked).tolist() == [3.0, 3.0]
    assert jax.tree.structure(full) != jax.tree.structure(batch(mask=full.mask, ways=4))


def test_mask_and_ways_of_a_batch_are_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        jm.Batch(jnp.zeros((2, 1)), jnp.array([0, 1]), jnp.ones(2, bool))


def test_ways_default_to_one_more_than_the_largest_label():
    assert ways_of(batch(ways=7)) == 7
    assert ways_of(batch()) == 3
    gap = jm.Batch(jnp.zeros((2, 1)), jnp.array([0, 4]))
    assert ways_of(gap) == 5
    assert jax.jit(lambda b: jnp.zeros(ways_of(b)))(batch(ways=7)).shape == (7,)


def test_traced_labels_require_ways():
    with pytest.raises(ValueError, match=r"pass Batch\(\.\.\., ways=N\)"):
        jax.jit(ways_of)(batch())


def test_a_card_is_static():
    card = jm.ProtocolCard("toy", "train", ways=(3, 5))
    assert jax.tree.leaves(card) == []
    assert hash(card) == hash(jm.ProtocolCard("toy", "train", ways=(3, 5)))
    assert jax.jit(lambda c: jnp.asarray(c.shots))(card) == 1


def test_a_learner_has_no_statistics_by_default():
    assert jm.Learner(None, None, None, None).statistics is None
    assert jm.Model(None, None).apply_norm is None
