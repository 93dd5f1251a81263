"""Meta-gradients against PyTorch's autograd on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
F = torch.nn.functional

WAYS, STEPS, LR = 3, 2, 0.3
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def same_padding(x):
    """Pad like XLA's SAME for a 3×3 kernel of stride 2, with an odd zero at the end."""
    pads = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[2:]]
    (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in pads)
    return F.pad(x, (left, right, top, bottom))


def torch_conv(params, x, pooled):
    """Apply `Conv4` (pooled, flattened) or `StridedConv4` (averaged) with jaxmeta's parameters and layout."""
    x = x.permute(0, 3, 1, 2)
    for i in range(4):
        block = params[f"ConvNorm_{i}"]
        kernel, bias = block["conv"]["kernel"].permute(3, 2, 0, 1), block["bias"]
        x = (
            F.conv2d(x, kernel, bias, padding=1)
            if pooled
            else F.conv2d(same_padding(x), kernel, bias, stride=2)
        )
        norm = block["norm"]
        x = F.relu(F.batch_norm(x, None, None, norm["scale"], norm["bias"], training=True, eps=1e-3))
        if pooled:
            x = F.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1) if pooled else x.mean((2, 3))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def torch_mlp(params, x):
    for i in range(2):
        x = F.relu(x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


NETWORKS = {
    "strided": (
        jm.nn.StridedConv4(ways=WAYS, filters=6),
        lambda params, x: torch_conv(params, x, pooled=False),
        (14, 13, 2),
    ),
    "pooled": (
        jm.nn.Conv4(ways=WAYS, filters=5),
        lambda params, x: torch_conv(params, x, pooled=True),
        (18, 21, 3),
    ),
    "mlp": (
        jm.nn.MLP(out=WAYS, hidden=(16, 12), kernel_init=jax.nn.initializers.he_normal()),
        torch_mlp,
        (7,),
    ),
}


def make_task(shape, dtype):
    rng = np.random.default_rng(0)

    def batch(shots):
        y = np.repeat(np.arange(WAYS, dtype=np.int32), shots)
        x = rng.normal(size=(len(y), *shape)).astype(dtype)
        return jm.Batch(jnp.asarray(x), jnp.asarray(y), ways=WAYS)

    return jm.Task(batch(2), batch(3))


def torch_loss_and_gradient(forward, params, task, order):
    """Return the query loss after two SGD steps, and its gradient with respect to the initial weights."""
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params))
    start = [leaf.requires_grad_() for leaf in leaves]
    (xs, ys), (xq, yq) = (
        (torch.tensor(np.asarray(part.x)), torch.tensor(np.asarray(part.y), dtype=torch.long))
        for part in task
    )
    fast = start
    for _ in range(STEPS):
        value = F.cross_entropy(forward(jax.tree.unflatten(tree, fast), xs), ys)
        grads = torch.autograd.grad(value, fast, create_graph=order == "second")
        fast = [leaf - LR * grad for leaf, grad in zip(fast, grads, strict=True)]
    value = F.cross_entropy(forward(jax.tree.unflatten(tree, fast), xq), yq)
    grads = torch.autograd.grad(value, start)
    return value.item(), jax.tree.unflatten(tree, [grad.numpy() for grad in grads])


def relative_error(actual, expected):
    """Return ‖actual − expected‖ / ‖expected‖ over the whole gradient."""
    actual, expected = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (actual, expected)
    )
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("network", "order", "precision"),
    [
        ("mlp", "second", "float64"),
        *(
            pytest.param(*row, marks=pytest.mark.nightly)
            for row in (
                ("strided", "second", "float64"),
                ("strided", "second", "float32"),
                ("strided", "first", "float64"),
                ("pooled", "second", "float64"),
                ("mlp", "second", "float32"),
                ("mlp", "first", "float64"),
            )
        ),
    ],
)
def test_two_step_meta_gradient_matches_torch(network, order, precision):
    dtype, tolerance = np.dtype(precision), TOLERANCE[precision]
    module, forward, shape = NETWORKS[network]
    with jax.enable_x64(precision == "float64"):
        task = make_task(shape, dtype)
        learner = jm.maml(jm.nn.as_model(module), inner_lr=LR, inner_steps=STEPS, order=order)
        rng = np.random.default_rng(1)
        # At the initial zeros and ones some terms vanish, and their errors would go unnoticed.
        params = jax.tree.map(
            lambda leaf: jnp.asarray((leaf + 0.1 * rng.normal(size=leaf.shape)).astype(dtype)),
            learner.init(jax.random.key(0), task),
        )
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))

        def loss(params):
            return learner.loss(params, task, jax.random.key(1))[0]

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        expected_value, expected = torch_loss_and_gradient(forward, params["model"], task, order)
        assert abs(float(value) - expected_value) < tolerance
        assert relative_error(grads["model"], expected) < tolerance


@pytest.mark.nightly
def test_first_and_second_order_differ_on_these_tasks():
    """Check that agreement with torch depends on the second-order term."""
    module, forward, shape = NETWORKS["strided"]
    task = make_task(shape, np.float32)
    params = jm.nn.as_model(module).init(jax.random.key(0), task.support.x)
    gradients = [torch_loss_and_gradient(forward, params, task, order)[1] for order in ("first", "second")]
    assert relative_error(*gradients) > 0.05
