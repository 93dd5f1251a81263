"""Derivatives of `scan_steps` against those of a plain scan, and the arrays that its backward pass has."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax
from jax.extend.core import jaxprs_in_params

import jaxmeta as jm
from jaxmeta.nn.recurrence import Dense, scan_steps

STEPS, HIDDEN = 6, 5


class Cell(linen.Module):
    """A recurrent network with layers of all kinds: one is called twice, one is plain, and one is a scale."""

    @linen.compact
    def __call__(self, state, projected):
        once, twice = Dense(HIDDEN, name="once"), Dense(HIDDEN, use_bias=False, name="twice")
        h = jnp.tanh(projected + once(state) + twice(state))
        h = jnp.tanh(linen.Dense(HIDDEN, name="plain")(h) + twice(h))
        return self.param("scale", linen.initializers.ones, (HIDDEN,)) * h, jnp.sin(h)

    def step(self, state, projected):
        return self(state, projected)


class Inputs:
    """Parameters, a state, inputs and a mask; and the losses of both scans."""

    def __init__(self, network, state, gates):
        rng = np.random.default_rng(0)
        self.network, self.state = network, state
        self.projected = jnp.asarray(rng.normal(size=(STEPS, gates)))
        step = (self.state, self.projected[0])
        params = jax.jit(partial(network.init, method="step"))(jax.random.key(0), *step)["params"]
        # The parameters need biases other than zeros.
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf + rng.normal(size=leaf.shape) / 2), params)
        self.mask = jnp.arange(STEPS) != 2

    def plain(self, params, state, projected, mask):
        def step(state, inputs):
            now, real = inputs
            after, features = self.network.apply({"params": params}, state, now, method="step")
            return jax.tree.map(partial(jnp.where, real), after, state), features

        return lax.scan(step, state, (projected, mask))

    def losses(self):
        """Return losses of (params, state, projected) whose gradient differs in each feature and step."""

        def loss(scan, params, state, projected):
            state, features = scan(params, state, projected, self.mask)
            weights = jnp.cos(jnp.arange(features.size).reshape(features.shape))
            return (weights * features**2).sum() + sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(state))

        return partial(loss, partial(scan_steps, self.network)), partial(loss, self.plain)

    def arguments(self):
        return self.params, self.state, self.projected


def of_cell():
    return Inputs(Cell(), jnp.cos(jnp.arange(HIDDEN)), HIDDEN)


def of_memory_network():
    network = jm.nn.MemoryNetwork(out=3, memory=jm.nn.LRUA(rows=11, width=3, heads=2), hidden=HIDDEN)
    return Inputs(network, network.initial(), 4 * HIDDEN)


def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def derivatives(loss, arguments):
    ways = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), arguments)
    gradient = jax.grad(loss, (0, 1, 2))
    return {
        "value": loss(*arguments),
        "grad": gradient(*arguments),
        "jvp": jax.jvp(loss, arguments, ways),
        "jvp of grad": jax.jvp(gradient, arguments, ways)[1],
        "grad of grad": jax.grad(lambda *a: dot(gradient(*a), ways), (0, 1, 2))(*arguments),
        "grad of jvp": jax.grad(lambda *a: jax.jvp(loss, a, ways)[1], (0, 1, 2))(*arguments),
    }


def assert_equal(actual, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), actual, expected)


@pytest.mark.nightly
def test_derivatives_of_all_orders_and_modes_are_those_of_a_plain_scan(x64):
    inputs = of_cell()
    ours, plain = (jax.jit(partial(derivatives, loss))(inputs.arguments()) for loss in inputs.losses())
    assert_equal(ours, plain)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(plain))


def test_gradients_summed_over_tasks_are_those_of_a_plain_scan(x64):
    inputs = of_cell()
    tasks = jnp.stack([inputs.projected, inputs.projected[::-1]])

    def gradients(loss):
        def total(params, tasks):
            return jax.vmap(lambda projected: loss(params, inputs.state, projected))(tasks).sum()

        return jax.jit(jax.grad(total, (0, 1)))(inputs.params, tasks)

    ours, plain = map(gradients, inputs.losses())
    assert_equal(ours, plain)
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(plain))


def test_layers_may_compute_in_another_type():
    class Narrow(linen.Module):
        @linen.compact
        def step(self, state, projected):
            h = jnp.tanh(projected + Dense(HIDDEN, dtype=jnp.bfloat16)(state).astype(jnp.float32))
            return h, h

    loss, plain = Inputs(Narrow(), jnp.ones(HIDDEN, jnp.float32), HIDDEN).losses()
    arguments = Inputs(Narrow(), jnp.ones(HIDDEN, jnp.float32), HIDDEN).arguments()
    actual, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in (loss, plain))
    # bfloat16 has 8 bits.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05), actual, expected)


def equations(jaxpr, primitive):
    """Yield the equations of a primitive in a program and its parts."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for part in jaxprs_in_params(equation.params):
            yield from equations(part, primitive)


def gradient_scans(loss, inputs):
    """Return the forward and the backward scan of the gradient in the parameters."""
    forward, backward = equations(jax.make_jaxpr(jax.grad(loss))(*inputs.arguments()).jaxpr, "scan")
    return forward, backward


def test_each_step_of_the_backward_pass_adds_only_to_the_gradient_of_the_state():
    def carried(scan):
        first, count = scan.params["num_consts"], scan.params["num_carry"]
        return sorted(variable.aval.shape for variable in scan.invars[first : first + count])

    inputs = of_memory_network()
    params, state = (sorted(map(np.shape, jax.tree.leaves(tree))) for tree in inputs.arguments()[:2])
    ours, plain = (carried(gradient_scans(loss, inputs)[1]) for loss in inputs.losses())
    assert ours == state
    assert plain == sorted(state + params)


def test_the_backward_pass_stores_few_arrays_and_repeats_no_layer_or_search():
    def stored(scan):
        return sum(variable.aval.size for variable in scan.outvars[scan.params["num_carry"] :])

    inputs = of_memory_network()
    (forward, backward), (plain, _) = (gradient_scans(loss, inputs) for loss in inputs.losses())
    assert stored(forward) < stored(plain) / 2
    body = backward.params["jaxpr"].jaxpr
    assert not list(equations(body, "top_k"))
    products = [{variable.aval.shape for variable in each.invars} for each in equations(body, "dot_general")]
    for kernel in (leaf.shape for leaf in jax.tree.leaves(inputs.params) if leaf.ndim == 2):
        assert sum(kernel in shapes for shapes in products) == 1, kernel
