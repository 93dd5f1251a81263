"""Scan a recurrent network over a sequence, with few operations in each step of the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxmeta.core import Params, PyTree

_KEPT = "jaxmeta.recurrence.kept"


def keep(x: Array) -> Array:
    """Mark an array of a step that the backward pass of `scan_steps` reads instead of computing it again."""
    return checkpoint_name(x, _KEPT)


class Dense(linen.Dense):
    """A `linen.Dense` whose gradient `scan_steps` computes for all steps at once.

    It records its inputs under "intermediates", and adds its variable under "additions", if it has one, to
    its outputs. A step must read the layer's parameters by this call only, and as they are: weights that are
    tied to another layer or transformed (`linen.WeightNorm`, `linen.map_variables`) need a `linen.Dense`,
    which is differentiated as in a plain scan.
    """

    def __call__(self, inputs: Float[Array, " fan_in"]) -> Float[Array, " fan_out"]:
        self.sow("intermediates", "dense_inputs", inputs)
        outputs = super().__call__(inputs)
        if self.has_variable("additions", "outputs"):
            outputs = outputs + self.get_variable("additions", "outputs").astype(outputs.dtype)
        return keep(outputs)


def scan_steps(
    network: linen.Module,
    params: Params,
    state: PyTree,
    projected: Float[Array, "steps gates"],
    mask: Bool[Array, " steps"] | None = None,
) -> tuple[PyTree, Float[Array, "steps features"]]:
    """Return the state after all steps of a sequence, and the features of each step.

    The backward pass of a plain scan adds an outer product to the gradient of every kernel in each step. To
    first order, however, a change of a layer's parameters by dK and db is an addition of x_t dK + db to its
    outputs, where x_t are its inputs. Here the derivative is computed in this way: one product for all steps,
    as is its transpose, the gradient. Derivatives of any order and mode equal those of a plain scan.

    For the backward pass each step stores its arguments and what `keep` marks, such as the outputs of the
    layers. All other values are computed again, which takes little arithmetic; to store them, a GPU would
    launch a kernel for each.

    Args:
      network: module with a method `step(state, projected) -> (state, features)`. Parameters of layers other
        than `Dense`, and of layers that a step calls twice, are differentiated as in a plain scan.
      params: parameters of the network.
      state: state before the sequence.
      projected: second argument of each step.
      mask: False at padding, which leaves the state unchanged; None if there is none.

    Returns:
      The state after the sequence, and the features of each step.
    """

    def scan(params, additions, state, projected, mask):
        """Return the results, and the inputs of each layer by its path, as `additions` are."""
        params = unflatten_dict(params)

        def step(state, inputs):
            added, now, real = inputs
            variables = {
                "params": params,
                "additions": unflatten_dict({(*layer, "outputs"): leaf for layer, leaf in added.items()}),
            }
            (after, features), recorded = network.apply(
                variables, state, now, method="step", mutable=["intermediates"]
            )
            if real is not None:
                after = jax.tree.map(partial(jnp.where, real), after, state)
            calls = flatten_dict(recorded.get("intermediates", {}))
            layer_inputs = {
                path[:-1]: values[0]
                for path, values in calls.items()
                if path[-1] == "dense_inputs" and len(values) == 1
            }
            return after, (features, layer_inputs)

        # The barriers of `prevent_cse` are for code outside of a scan.
        step = jax.checkpoint(
            step, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(_KEPT)
        )
        state, (features, layer_inputs) = lax.scan(step, state, (additions, projected, mask))
        return (state, features), layer_inputs

    def products(params, layer_inputs):
        """Return the outputs of the layers at all steps."""

        def outputs(layer, x):
            return x @ params[*layer, "kernel"] + params.get((*layer, "bias"), 0)

        return {layer: jax.vmap(partial(outputs, layer))(x) for layer, x in layer_inputs.items()}

    @jax.custom_jvp
    def run(params, state, projected, mask):
        return scan(params, {}, state, projected, mask)[0]

    @run.defjvp
    def derivative(primals, tangents):
        """Return the results and their tangents, with one product for each layer's parameters."""
        params, state, projected, mask = primals
        d_params, d_state, d_projected, _ = tangents
        _, layer_inputs = jax.eval_shape(scan, params, {}, state, projected, mask)
        rest, d_rest = (
            {path: leaf for path, leaf in tree.items() if path[:-1] not in layer_inputs}
            for tree in (params, d_params)
        )
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(products, params, layer_inputs))
        results, linear, layer_inputs = jax.linearize(
            lambda rest, added, state, projected: scan(params | rest, added, state, projected, mask),
            *(rest, zeros, state, projected),
            has_aux=True,
        )
        return results, linear(d_rest, products(d_params, layer_inputs), d_state, d_projected)

    return run(flatten_dict(params), state, projected, mask)
