"""Meta-steps of MAML and prototypical networks in plain JAX, as a careful user of Flax and optax writes them.

`Peer` has the same interface as that of `torch_peers.py`. The network has Flax's own layers and the same
parameter values as ours, and every batch is normalised by its own statistics.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict
from machine import program_bytes
from rows import ConvRow

NAME = "plain JAX"


class Net(linen.Module):
    """`StridedConv4` (spatial mean) or `Conv4` (max-pooled, flattened) with a linear head."""

    row: ConvRow

    @linen.compact
    def __call__(self, x):
        row = self.row
        for _ in range(row.blocks):
            x = linen.Conv(row.filters, (3, 3), strides=2 if row.strided else 1, padding=row.padding)(x)
            x = linen.BatchNorm(use_running_average=False, epsilon=1e-3)(x)
            # Before the ReLU, as ours does: the two commute, and a quarter of the pixels are left.
            x = linen.relu(x if row.strided else linen.max_pool(x, (2, 2), (2, 2)))
        x = x.mean((1, 2)) if row.strided else x.reshape(x.shape[0], -1)
        return linen.Dense(row.ways)(x) if row.inner_steps else x


def task_loss(row, order):
    """Return the loss of one task, `(params, (xs, ys, xq, yq)) -> scalar`."""
    net = Net(row)

    def outputs(params, x):
        # Flax writes running averages, which nothing reads and the compiler removes.
        return net.apply({"params": params}, x, mutable=["batch_stats"])[0]

    def cross_entropy(logits, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def loss(params, x, y):
        return cross_entropy(outputs(params, x), y)

    def maml(params, task):
        xs, ys, xq, yq = task
        for _ in range(row.inner_steps):
            grads = jax.grad(loss)(params, xs, ys)
            if order == "first":
                grads = jax.lax.stop_gradient(grads)
            params = jax.tree.map(lambda p, g: p - row.inner_lr * g, params, grads)
        return loss(params, xq, yq)

    def prototypical(params, task):
        xs, _, xq, yq = task
        z = outputs(params, jnp.concatenate([xs, xq]))
        means, queries = z[: len(xs)].reshape(row.ways, row.shots, -1).mean(1), z[len(xs) :]
        # ‖query‖² is the same for all classes and cancels in the softmax.
        return cross_entropy(2 * queries @ means.T - jnp.square(means).sum(1), yq)

    return maml if row.inner_steps else prototypical


def mean_gradient(loss, form):
    """Return the gradient of the mean loss of tasks: of all at once ("vmap") or one by one ("scan")."""

    def of_all(params, tasks):
        return jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, tasks).mean())(params)

    def one_by_one(params, tasks):
        def add(total, task):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, task)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), tasks)
        return jax.tree.map(lambda g: g / len(tasks[0]), total)

    return {"vmap": of_all, "scan": one_by_one}[form]


class Peer:
    """The meta-step by `jax.jit` on JAX's default device, with all tasks at once or one by one."""

    def __init__(self, name, row, params, device, order, form):
        del name, device
        optimizer = optax.adam(row.outer_lr)
        self.gradient_of = jax.jit(mean_gradient(task_loss(row, order), form))
        self.params = jax.tree.map(jnp.asarray, unflatten_dict(self.from_ours(params, row), sep="/"))
        self.state = optimizer.init(self.params)

        def step(params, state, tasks):
            updates, state = optimizer.update(self.gradient_of(params, tasks), state)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.compiled = None

    @staticmethod
    def forms(name):
        """Return the ways of going through the tasks to try."""
        del name
        return ("vmap", "scan")

    @staticmethod
    def from_ours(params, row):
        """Return our parameters as a dict of arrays by Flax's paths."""
        params, out = params["model"], {}
        for i in range(row.blocks):
            block = params[f"ConvNorm_{i}"]
            out[f"Conv_{i}"] = {"kernel": block["conv"]["kernel"], "bias": block["bias"]}
            out[f"BatchNorm_{i}"] = block["norm"]
        if row.inner_steps:
            out["Dense_0"] = params["head"]
        return flatten_dict(out, sep="/")

    def tensors(self, tasks):
        return tuple(map(jnp.asarray, tasks))

    def gradient(self, tasks):
        """Return the mean meta-gradient over `tasks` (NumPy) as NumPy arrays by Flax's paths."""
        grads = self.gradient_of(self.params, self.tensors(tasks))
        return {name: np.asarray(g) for name, g in flatten_dict(grads, sep="/").items()}

    def steps(self, count, tasks):
        """Run `count` meta-steps and wait for the device."""
        if self.compiled is None:
            self.compiled = self.step.lower(self.params, self.state, tasks).compile()
        for _ in range(count):
            self.params, self.state = self.compiled(self.params, self.state, tasks)
        jax.block_until_ready(self.params)

    def peak_memory(self, tasks):
        """Return the bytes that the compiled meta-step allocates, arguments included."""
        del tasks
        return program_bytes(self.compiled)
