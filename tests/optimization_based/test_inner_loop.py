"""Tests of `jm.inner_loop` against closed forms and finite differences, in float64.

Each check runs as one jitted program. The default run takes each memory mode in one small case of each
check; more cases, and the mode "auto", which is "store" for such small problems, are nightly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_differences, flat

import jaxmeta as jm

MODES = ("store", "recompute", "forward_over_reverse", "auto")

nightly = pytest.mark.nightly
each_mode = pytest.mark.parametrize("memory", [*MODES[:3], pytest.param("auto", marks=nightly)])

pytestmark = pytest.mark.usefixtures("x64")


def in_each_mode(cases, default):
    """Combine every case with every memory mode, as nightly unless (first value, mode) is in `default`."""
    return [
        pytest.param(*case, memory, marks=() if (case[0], memory) in default else nightly)
        for case in cases
        for memory in MODES
    ]


# --- Closed forms -----------------------------------------------------------------------------------

# L^S = ½·2·(θ − 1)², L^Q = ½(θ − 3)², α = 0.1, θ = 0: steps, θ_n, g_FO, g_MAML, L^Q(θ_n).
QUADRATIC = [
    (0, 0.0, -3.0, -3.0, 4.5),
    (1, 0.2, -2.8, -2.24, 3.92),
    (2, 0.36, -2.64, -1.6896, 3.4848),
    (3, 0.488, -2.512, -1.286144, 3.155072),
    (5, 0.67232, -2.32768, -0.7627341824, 2.7090470912),
]


def quadratic(theta, batch):
    return 0.5 * batch["a"] * (theta - batch["s"]) ** 2


SUPPORT = {"a": 2.0, "s": 1.0}


def quadratic_query(theta):
    return 0.5 * (theta - 3.0) ** 2


@pytest.mark.parametrize(
    ("steps", "theta", "first", "second", "query", "memory"),
    in_each_mode(
        QUADRATIC,
        {(0, "store"), (1, "recompute"), (3, "store"), (3, "recompute"), (3, "forward_over_reverse")},
    ),
)
def test_adaptation_and_meta_gradients_match_closed_form_on_a_quadratic(
    steps, theta, first, second, query, memory
):
    def meta(start, order):
        adapt = jm.inner_loop(quadratic, optax.sgd(0.1), steps, order=order, memory=memory)
        adapted, trace = adapt(start, SUPPORT)
        return quadratic_query(adapted), (adapted, trace.loss)

    @jax.jit
    def run(start):
        return [jax.value_and_grad(meta, has_aux=True)(start, order) for order in ("first", "second")]

    for ((value, (adapted, losses)), gradient), expected in zip(run(0.0), (first, second), strict=True):
        np.testing.assert_allclose(adapted, theta, rtol=1e-12)
        # The trace holds the loss before each update: θ_j − s = −0.8^j.
        np.testing.assert_allclose(losses, 0.64 ** np.arange(steps), rtol=1e-12)
        np.testing.assert_allclose(value, query, rtol=1e-12)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_the_loop_runs_without_jit_on_python_numbers():
    adapted, trace = jm.inner_loop(quadratic, optax.sgd(0.1), 2)(0.0, SUPPORT)
    np.testing.assert_allclose(adapted, 0.36, rtol=1e-12)
    np.testing.assert_allclose(trace.loss, [1.0, 0.64], rtol=1e-12)


CUBIC = [(1, 0.9, 0.9, 0.72), (2, 0.819, 0.819, 0.537264), (3, 0.7519239, 0.7519239, 0.41246574995808)]


@pytest.mark.parametrize(
    ("steps", "theta", "first", "second", "memory"),
    in_each_mode(CUBIC, {(3, "store"), (3, "recompute"), (3, "forward_over_reverse")}),
)
def test_meta_gradients_match_closed_form_where_the_hessian_changes(steps, theta, first, second, memory):
    def adapt(start, order):
        loop = jm.inner_loop(lambda t, _: t**3 / 3, optax.sgd(0.1), steps, order=order, memory=memory)
        return loop(start, None)[0]

    def meta(start, order):
        return 0.5 * adapt(start, order) ** 2

    @jax.jit
    def run(start):
        adapted, slope = jax.value_and_grad(adapt)(start, "second")
        return adapted, slope, jax.grad(meta)(start, "first"), jax.grad(meta)(start, "second")

    np.testing.assert_allclose(run(1.0), [theta, second / theta, first, second], rtol=1e-12)


@each_mode
def test_jacobians_of_two_steps_multiply_with_the_first_step_leftmost(memory):
    def meta(theta, order):
        loop = jm.inner_loop(lambda t, _: t["x"] ** 2 * t["y"], optax.sgd(0.1), 2, order=order, memory=memory)
        adapted, _ = loop(theta, None)
        return adapted["x"] + 2 * adapted["y"], adapted

    @jax.jit
    def run(theta):
        return [jax.grad(meta, has_aux=True)(theta, order) for order in ("second", "first")]

    (grads, adapted), (first, _) = run({"x": 1.0, "y": 2.0})
    np.testing.assert_allclose((adapted["x"], adapted["y"]), (0.372, 1.864), rtol=1e-12)
    np.testing.assert_allclose((grads["x"], grads["y"]), (-0.148, 1.804), rtol=1e-12)
    np.testing.assert_allclose((first["x"], first["y"]), (1, 2), rtol=1e-12)


@pytest.mark.parametrize("memory", ["store", *(pytest.param(mode, marks=nightly) for mode in MODES[1:])])
@pytest.mark.parametrize(("step_size", "steps"), [(0.0, 3), (0.1, 0)])
def test_meta_gradient_without_movement_is_the_query_gradient(step_size, steps, memory):
    def meta(start, order):
        adapt = jm.inner_loop(quadratic, optax.sgd(step_size), steps, order=order, memory=memory)
        return quadratic_query(adapt(start, SUPPORT)[0])

    actual = jax.jit(lambda start: [jax.grad(meta)(start, order) for order in ("first", "second")])(0.0)
    np.testing.assert_allclose(actual, -3.0, rtol=1e-12)


def test_orders_agree_where_the_inner_loss_is_linear():
    def meta(theta, order):
        adapt = jm.inner_loop(lambda t, b: jnp.vdot(t, b), optax.sgd(0.3), 3, order=order)
        return jnp.cos(adapt(theta, jnp.arange(3.0))[0]).sum()

    theta = np.array([0.3, -1.0, 2.0])
    first, second = jax.jit(lambda t: [jax.grad(meta)(t, order) for order in ("first", "second")])(theta)
    np.testing.assert_allclose(first, second, rtol=1e-14)


def test_one_sgd_step_subtracts_the_scaled_gradient():
    adapted, _ = jm.inner_loop(quadratic, optax.sgd(0.1), 1)(-0.7, SUPPORT)
    np.testing.assert_allclose((-0.7 - adapted) / 0.1, 2.0 * (-0.7 - 1.0), rtol=1e-12)


@pytest.mark.parametrize(
    "memory", ["recompute", *(pytest.param(m, marks=nightly) for m in MODES if m != "recompute")]
)
def test_vmap_over_starts_and_batches_equals_separate_loops(memory):
    starts = jnp.array([0.0, 2.0])
    batches = {"a": np.array([2.0, 1.0]), "s": np.array([1.0, -1.0])}
    adapt = jax.jit(jm.inner_loop(quadratic, optax.sgd(0.1), 3, memory=memory))
    together, _ = jax.jit(jax.vmap(adapt))(starts, batches)
    alone = [adapt(starts[i], {name: leaf[i] for name, leaf in batches.items()})[0] for i in range(2)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


@each_mode
def test_learned_step_size_has_minus_the_product_of_gradients_as_gradient(memory):
    """∂L^Q/∂α = −∇L^S(θ)·∇L^Q(θ_1) = −(−2)(−2.8)."""

    def meta(rate, order):
        adapt = jm.inner_loop(quadratic, optax.sgd, 1, order=order, memory=memory)
        return quadratic_query(adapt(0.0, SUPPORT, hyper=rate)[0])

    actual = jax.jit(lambda rate: [jax.grad(meta)(rate, order) for order in ("first", "second")])(0.1)
    np.testing.assert_allclose(actual, -5.6, rtol=1e-12)


@each_mode
def test_proximal_term_pulls_the_minimum_towards_the_start(memory):
    """L^S + (λ/2)(θ − θ_0)² has its minimum at (a·s + λθ_0)/(a + λ), with slope λ/(a + λ) in θ_0."""
    adapt, two_steps = (
        jm.inner_loop(quadratic, optax.sgd(0.1), steps, memory=memory, proximal=2.0) for steps in (200, 2)
    )

    def meta(start):
        adapted, trace = adapt(start, SUPPORT)
        return quadratic_query(adapted), (adapted, trace.loss)

    @jax.jit
    def run(start):
        return jax.grad(meta, has_aux=True)(start), two_steps(start, SUPPORT)[0]

    (gradient, (adapted, losses)), two = run(0.0)
    np.testing.assert_allclose(adapted, 0.5, rtol=1e-10)
    np.testing.assert_allclose(gradient, -1.25, rtol=1e-10)
    np.testing.assert_allclose(losses[-1], quadratic(0.5, SUPPORT), rtol=1e-10)
    # Two steps by hand: θ_1 = 0.2; θ_2 = 0.2 − 0.1(2(0.2 − 1) + 2·0.2) = 0.32.
    np.testing.assert_allclose(two, 0.32, rtol=1e-12)


@each_mode
def test_batch_at_selects_the_mini_batch_of_each_step(memory):
    """(θ − s_j)² with s = 1, −1: θ_1 = θ + 0.2(1 − θ), θ_2 = θ_1 + 0.2(−1 − θ_1) = 0.64θ − 0.04."""

    def loop(steps, batch_at):
        return jm.inner_loop(
            lambda theta, s: (theta - s) ** 2, optax.sgd(0.1), steps, memory=memory, batch_at=batch_at
        )

    def adapt(start, targets):
        adapted, trace = loop(2, lambda batch, step: batch[step])(start, targets)
        return adapted, trace.loss

    @jax.jit
    def run(start, targets):
        single, _ = loop(1, lambda batch, step: batch[step + 1])(start, targets)
        return jax.value_and_grad(adapt, (0, 1), has_aux=True)(start, targets), single

    ((adapted, losses), (to_start, to_targets)), single = run(0.5, np.array([1.0, -1.0]))
    np.testing.assert_allclose(adapted, 0.28, rtol=1e-12)
    np.testing.assert_allclose(losses, [0.25, 1.6**2], rtol=1e-12)
    np.testing.assert_allclose(to_start, 0.64, rtol=1e-12)
    np.testing.assert_allclose(to_targets, [0.16, 0.2], rtol=1e-12)
    np.testing.assert_allclose(single, 0.5 + 0.2 * -1.5, rtol=1e-12)


# --- Finite differences -----------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda hyper: optax.sgd(hyper["rate"]),
    "momentum": lambda hyper: optax.sgd(hyper["rate"], momentum=hyper["decay"], nesterov=True),
    # eps_root: Adam's square root has no derivative at zero.
    "adam": lambda hyper: optax.adam(hyper["rate"], b1=hyper["decay"], eps_root=1e-4),
    "weight decay": lambda hyper: optax.chain(
        optax.clip_by_global_norm(0.5), optax.add_decayed_weights(hyper["decay"]), optax.sgd(hyper["rate"])
    ),
}
STEPS = 3


def problem():
    """Build a head to adapt on a shared body, and batches of integer images, labels, a mask and weights."""
    rng = np.random.default_rng(0)
    batches = [
        {
            "images": rng.integers(0, 256, (5, 4)).astype(np.uint8),
            "labels": rng.integers(0, 3, 5).astype(np.int32),
            "mask": np.array([True, True, True, True, False]),
            "weights": rng.uniform(0.5, 1.5, 5),
        }
        for _ in range(2)
    ]
    arguments = {
        "params": {"kernel": rng.normal(size=(3, 3)), "bias": rng.normal(size=3)},
        "hyper": {"rate": np.asarray(0.3), "decay": np.asarray(0.8)},
        "body": [rng.normal(size=(4, 3)), rng.normal(size=3)],
        "regularizer": np.asarray(0.1),
        "weights": batches[0].pop("weights"),
    }
    return arguments, *batches


def head_loss(params, batch, *, body, regularizer, key):
    features = jnp.tanh((batch["images"].astype(jnp.float64) / 255) @ body[0] + body[1][None])
    noise = 1 + 0.1 * jax.random.normal(key, features.shape)
    logits = (features * noise) @ params["kernel"] + params["bias"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    fit = jnp.where(batch["mask"], losses * batch["weights"], 0).mean()
    return fit + 0.5 * regularizer * sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))


def meta_loss(adapt, arguments, support, query):
    key = jax.random.key(0)
    extra = {"body": arguments["body"], "regularizer": arguments["regularizer"], "key": key}
    adapted, _ = adapt(
        arguments["params"],
        {**support, "weights": arguments["weights"]},
        hyper=arguments["hyper"],
        **extra,
    )
    return head_loss(adapted, query, **extra)


def meta_loss_of(name, proximal, memory, arguments, order="second"):
    support, query = jax.tree.map(jnp.asarray, problem()[1:])
    adapt = jm.inner_loop(head_loss, OPTIMIZERS[name], STEPS, order=order, memory=memory, proximal=proximal)
    return meta_loss(adapt, arguments, support, query)


@functools.cache
def meta_gradient(name, proximal, memory, order="second"):
    """Return the meta-loss, its gradient as one vector, and as a tree, from one jitted program."""

    def loss(arguments):
        return meta_loss_of(name, proximal, memory, arguments, order)

    value, gradient = jax.jit(jax.value_and_grad(loss))(problem()[0])
    return value, flat(gradient), gradient


@functools.cache
def differences(name, proximal):
    return finite_differences(functools.partial(meta_loss_of, name, proximal, "store"), problem()[0])


@pytest.mark.parametrize(
    ("name", "proximal", "memory"),
    [
        pytest.param(
            name,
            proximal,
            memory,
            marks=()
            if (name, proximal, memory)
            in {
                ("momentum", 0.5, "store"),
                ("momentum", 0.5, "forward_over_reverse"),
                ("adam", None, "recompute"),
                ("weight decay", None, "store"),
            }
            else nightly,
        )
        for name in OPTIMIZERS
        for proximal in (None, 0.5)
        for memory in MODES
    ],
)
def test_meta_gradient_matches_finite_differences(name, proximal, memory):
    expected = differences(name, proximal)
    # All arguments have an effect, except the weight of the padding, and the decay where it is not used.
    assert (expected == 0).sum() == (2 if name == "sgd" else 1)
    _, actual, _ = meta_gradient(name, proximal, memory)
    np.testing.assert_allclose(actual, expected, atol=3e-8)
    np.testing.assert_allclose(actual, meta_gradient(name, proximal, "store")[1], atol=1e-10)


@functools.cache
def frozen_differences(name, proximal):
    """Return the meta-loss of a plain loop, and its finite differences with inner gradients held fixed."""
    arguments, support, query = problem()
    support, query = jax.tree.map(jnp.asarray, (support, query))

    def loop(gradient_at, arguments):
        """Run the inner loop in plain Python, with the gradients `gradient_at(step, theta, batch, extra)`."""
        used = []

        def adapt(params, batch, *, hyper, **extra):
            optimizer = OPTIMIZERS[name](hyper)
            theta, state = params, optimizer.init(params)
            for step in range(STEPS):
                grads = gradient_at(step, theta, batch, extra)
                used.append(grads)
                if proximal is not None:
                    grads = jax.tree.map(lambda g, t, s: g + proximal * (t - s), grads, theta, params)
                updates, state = optimizer.update(grads, state, theta)
                theta = optax.apply_updates(theta, updates)
            return theta, None

        return meta_loss(adapt, arguments, support, query), used

    def exact(step, theta, batch, extra):
        return jax.grad(head_loss)(theta, batch, **extra)

    value, recorded = jax.jit(lambda a: loop(exact, a))(arguments)
    return value, finite_differences(lambda a: loop(lambda step, *_: recorded[step], a)[0], arguments)


@pytest.mark.parametrize(
    ("name", "proximal", "memory"),
    [
        pytest.param(
            name,
            proximal,
            memory,
            marks=()
            if (name, proximal, memory) in {("adam", 0.5, "recompute"), ("weight decay", None, "auto")}
            else nightly,
        )
        for name in OPTIMIZERS
        for proximal in (None, 0.5)
        for memory in ("auto", "recompute", "store")
    ],
)
def test_first_order_matches_finite_differences_with_frozen_inner_gradients(name, proximal, memory):
    value, expected = frozen_differences(name, proximal)
    actual, vector, gradient = meta_gradient(name, proximal, memory, "first")
    np.testing.assert_allclose(actual, value, rtol=1e-12)
    np.testing.assert_allclose(vector, expected, atol=3e-8)
    # The frozen weights of the support loss reach the query loss through the inner gradients only.
    np.testing.assert_array_equal(gradient["weights"], 0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("proximal", [None, 0.5])
def test_first_and_second_order_differ(name, proximal):
    first, second = (
        meta_gradient(name, proximal, "auto", "first")[1],
        meta_gradient(name, proximal, "store")[1],
    )
    assert np.abs(second - first).max() > 1e-3


@pytest.mark.parametrize(
    "memory", ["recompute", *(pytest.param(mode, marks=nightly) for mode in MODES if mode != "recompute")]
)
def test_meta_gradient_under_vmap_over_tasks_equals_a_loop(memory):
    arguments, support, query = problem()
    adapt = jm.inner_loop(head_loss, OPTIMIZERS["sgd"], 2, memory=memory)
    gradient = jax.grad(lambda a, s, q: meta_loss(adapt, a, s, q))
    supports, queries = (
        jax.tree.map(lambda leaf: np.stack([leaf, np.roll(leaf, 1, 0)]), part) for part in (support, query)
    )
    together = jax.jit(jax.vmap(gradient, (None, 0, 0)))(arguments, supports, queries)
    alone = jax.jit(gradient)
    for i in range(2):
        expected = alone(arguments, *jax.tree.map(lambda leaf: leaf[i], (supports, queries)))  # noqa: B023
        actual = jax.tree.map(lambda leaf: leaf[i], together)  # noqa: B023
        np.testing.assert_allclose(flat(actual), flat(expected), atol=1e-12)


@each_mode
def test_gradient_flows_into_the_trace_of_losses(memory):
    """L_1 = ½·2·(θ_1 − 1)² with θ_1 = θ + 0.2(1 − θ): dL_1/dθ = 2(θ_1 − 1)·0.8."""
    adapt = jm.inner_loop(quadratic, optax.sgd(0.1), 2, memory=memory)
    gradient = jax.jit(jax.grad(lambda theta: adapt(theta, SUPPORT)[1].loss[1]))(0.0)
    np.testing.assert_allclose(gradient, 2 * (0.2 - 1) * 0.8, rtol=1e-12)


@pytest.mark.nightly
def test_recomputing_modes_keep_fewer_bytes_for_the_backward_pass():
    """Residuals hold the activations of each step under "store", and only its parameters otherwise."""

    def residuals(memory):
        adapt = jm.inner_loop(wide_loss, optax.sgd(0.1), 10, memory=memory)
        x = jax.ShapeDtypeStruct((500, 4), jnp.float64)
        theta = jax.ShapeDtypeStruct((4, 4), jnp.float64)
        compiled = jax.jit(jax.grad(lambda t, x: adapt(t, x)[0].sum())).lower(theta, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activations = 10 * 5 * 500 * 4 * 8
    assert residuals("store") > activations
    assert residuals("recompute") < activations
    assert residuals("forward_over_reverse") < activations


# --- Implicit gradients -----------------------------------------------------------------------------


def test_implicit_gradient_of_a_quadratic():
    """φ* = (as + λθ)/(a + λ), with slope λ/(a + λ) in θ; for λ → ∞, φ* = θ, as in MAML without steps."""
    for proximal, minimum, expected in ((2.0, 0.5, -1.25), (1e9, 0.0, -3.0)):
        rate = 0.3 / (1 + proximal)
        adapt = jm.inner_loop(quadratic, optax.sgd(rate), 200, order="implicit", proximal=proximal)

        def meta(start, adapt=adapt):
            adapted, trace = adapt(start, SUPPORT)
            return quadratic_query(adapted), (adapted, trace.loss)

        def path_loss(start, adapt=adapt):
            return adapt(start, SUPPORT)[1].loss.sum()

        @jax.jit
        def run(start, meta=meta, path_loss=path_loss):
            return jax.grad(meta, has_aux=True)(start), jax.grad(path_loss)(start)

        (actual, (adapted, losses)), path_gradient = run(0.0)
        np.testing.assert_allclose(adapted, minimum, atol=1e-7)
        np.testing.assert_allclose(actual, expected, rtol=1e-7)
        assert losses.shape == (200,)
        # The path to the minimum is not differentiated.
        assert path_gradient == 0


def test_damping_is_added_to_the_identity_of_the_linear_system():
    """(1 + damping + a/λ) u = ∇L^Q(φ*)."""
    adapt = jm.inner_loop(quadratic, optax.sgd(0.1), 200, order="implicit", proximal=2.0, damping=0.5)
    actual = jax.jit(jax.grad(lambda start: quadratic_query(adapt(start, SUPPORT)[0])))(0.0)
    np.testing.assert_allclose(actual, -2.5 / (1 + 0.5 + 1), rtol=1e-8)


def curved(dim=6):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(dim, dim))
    return root @ root.T / dim, rng.normal(size=dim), rng.normal(size=dim)


def curved_loss(theta, centre, *, matrix):
    return 0.5 * (theta - centre) @ matrix @ (theta - centre)


def test_as_many_conjugate_gradient_steps_as_parameters_are_exact_on_a_quadratic():
    matrix, centre, start = curved()
    proximal, dim = 0.5, start.size

    def meta(start, centre, matrix, cg_steps=dim):
        adapt = jm.inner_loop(
            curved_loss, optax.sgd(0.2), 2000, order="implicit", proximal=proximal, cg_steps=cg_steps
        )
        return jnp.sin(adapt(start, centre, matrix=matrix)[0]).sum()

    system = matrix + proximal * np.eye(dim)
    minimum = np.linalg.solve(system, matrix @ centre + proximal * start)
    adjoint = np.linalg.solve(system, np.cos(minimum))
    actual = jax.jit(jax.grad(meta, (0, 1, 2)))(start, centre, matrix)
    np.testing.assert_allclose(actual[0], proximal * adjoint, rtol=1e-8)
    # The minimum also depends on the other arguments of the loss: ∂φ*/∂c = (A + λI)⁻¹ A, and so on.
    np.testing.assert_allclose(actual[1], matrix @ adjoint, rtol=1e-8)
    # ∇L = ½(A + Aᵀ)(φ − c)
    outer = np.outer(adjoint, minimum - centre)
    np.testing.assert_allclose(actual[2], -(outer + outer.T) / 2, rtol=1e-7)
    fewer = jax.jit(jax.grad(functools.partial(meta, cg_steps=2)))(start, centre, matrix)
    assert np.abs(fewer - actual[0]).max() > 1e-4


def test_implicit_gradient_matches_converged_second_order_and_finite_differences():
    arguments, support, query = problem()
    support, query = jax.tree.map(jnp.asarray, (support, query))
    hyper = arguments.pop("hyper")

    def meta(arguments, order, steps=3000):
        adapt = jm.inner_loop(
            head_loss, optax.sgd(hyper["rate"]), steps, order=order, proximal=0.5, cg_steps=12
        )
        return meta_loss(
            lambda *args, hyper, **extra: adapt(*args, **extra),
            {**arguments, "hyper": None},
            support,
            query,
        )

    expected = finite_differences(lambda arguments: meta(arguments, "second"), arguments)
    actual = flat(jax.jit(jax.grad(lambda arguments: meta(arguments, "implicit")))(arguments))
    np.testing.assert_allclose(actual, expected, atol=2e-8)
    unrolled = flat(jax.jit(jax.grad(lambda arguments: meta(arguments, "second")))(arguments))
    np.testing.assert_allclose(actual, unrolled, atol=1e-10)


def test_implicit_gradient_under_vmap_over_tasks_equals_a_loop():
    matrix, _, _ = curved()
    rng = np.random.default_rng(1)
    starts, centres = (rng.normal(size=(3, 6)) for _ in range(2))
    adapt = jm.inner_loop(curved_loss, optax.sgd(0.2), 300, order="implicit", proximal=0.5, cg_steps=6)
    gradient = jax.grad(lambda start, centre: jnp.cos(adapt(start, centre, matrix=matrix)[0]).sum())
    alone = jax.jit(gradient)
    loop = [alone(start, centre) for start, centre in zip(starts, centres, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(starts, centres), loop, atol=1e-9)


def test_implicit_needs_no_derivative_of_the_optimizer():
    """Adam without `eps_root`, which other orders refuse or cannot differentiate, finds the same minimum."""
    adapt = jm.inner_loop(
        quadratic, optax.adam(optax.cosine_decay_schedule(0.1, 500)), 500, order="implicit", proximal=2.0
    )

    def meta(start):
        adapted, _ = adapt(start, SUPPORT)
        return quadratic_query(adapted), adapted

    gradient, adapted = jax.jit(jax.grad(meta, has_aux=True))(0.0)
    np.testing.assert_allclose(adapted, 0.5, atol=1e-5)
    np.testing.assert_allclose(gradient, -1.25, rtol=1e-4)


# --- Truncation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "truncations", "memory"),
    [
        pytest.param(steps, truncations, memory, marks=marks)
        for steps, truncations, memory, marks in (
            (5, (1, 2, 4, 5, 8), "store", ()),
            (5, (2,), "recompute", ()),
            (5, (2,), "forward_over_reverse", ()),
            *((steps, (1, 2, 4, steps, steps + 3), memory, nightly) for steps in (5, 6) for memory in MODES),
        )
    ],
)
def test_truncation_keeps_the_factors_of_the_last_steps(steps, truncations, memory):
    """The gradient is (1 − αa)^K ∇L^Q(θ_n), from first order (K = 0) to second (K = n)."""

    def meta(start, truncation):
        adapt = jm.inner_loop(quadratic, optax.sgd(0.1), steps, memory=memory, truncation=truncation)
        return quadratic_query(adapt(start, SUPPORT)[0])

    actual = jax.jit(lambda start: [jax.grad(meta)(start, truncation) for truncation in truncations])(0.0)
    first = 3.0 - (1 - 0.8**steps)
    np.testing.assert_allclose(actual, [-(0.8 ** min(k, steps)) * first for k in truncations], rtol=1e-12)


def plain_unroll(name, arguments, cut):
    """Sum the losses of five plain Python steps and the query loss; also return the arguments of the cuts.

    Segments begin before steps 1 and 3, with `cut(step, carry, start)`.
    """
    _, support, query = problem()
    support, query = jax.tree.map(jnp.asarray, (support, query))
    extra = {"body": arguments["body"], "regularizer": arguments["regularizer"], "key": jax.random.key(0)}
    batch = {**support, "weights": arguments["weights"]}
    optimizer = OPTIMIZERS[name](arguments["hyper"])
    theta, state, total, cut_arguments = arguments["params"], optimizer.init(arguments["params"]), 0.0, {}
    for step in range(5):
        if step in (1, 3):
            cut_arguments[step] = (theta, state), arguments["params"]
            theta, state = cut(step, (theta, state), arguments["params"])
        value, grads = jax.value_and_grad(head_loss)(theta, batch, **extra)
        total += value
        updates, state = optimizer.update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
    return total + head_loss(theta, query, **extra), cut_arguments


@functools.cache
def truncated_differences(name):
    """Return the value of `plain_unroll`, and its finite differences with the cut carries held fixed."""
    arguments, _, _ = problem()
    value, recorded = jax.jit(lambda a: plain_unroll(name, a, lambda step, carry, start: carry))(arguments)

    def held(step, carry, start):
        (theta, state), start_then = recorded[step]
        return jax.tree.map(lambda t, now, then: t + now - then, theta, start, start_then), state

    return value, finite_differences(lambda arguments: plain_unroll(name, arguments, held)[0], arguments)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param(
            name,
            memory,
            marks=() if (name, memory) in {("adam", "recompute")} else nightly,
        )
        for name in ("momentum", "adam")
        for memory in MODES[:3]
    ],
)
def test_truncated_gradient_matches_finite_differences_with_cut_carries_held_fixed(name, memory):
    """The loss sums over five steps in segments of two, with cuts before steps 1 and 3."""
    arguments, support, query = problem()
    support, query = jax.tree.map(jnp.asarray, (support, query))

    def truncated(arguments):
        extra = {"body": arguments["body"], "regularizer": arguments["regularizer"], "key": jax.random.key(0)}
        adapt = jm.inner_loop(head_loss, OPTIMIZERS[name], 5, memory=memory, truncation=2)
        adapted, trace = adapt(
            arguments["params"],
            {**support, "weights": arguments["weights"]},
            hyper=arguments["hyper"],
            **extra,
        )
        return trace.loss.sum() + head_loss(adapted, query, **extra)

    value, expected = truncated_differences(name)
    actual, gradient = jax.jit(jax.value_and_grad(truncated))(arguments)
    np.testing.assert_allclose(actual, value, rtol=1e-12)
    np.testing.assert_allclose(flat(gradient), expected, atol=5e-8)


# --- Trace, and arguments of the optimizer ----------------------------------------------------------


@each_mode
def test_path_holds_the_parameters_after_each_update(memory):
    adapt = jm.inner_loop(quadratic, optax.sgd(0.1), 3, memory=memory, keep_path=True)
    plain = jm.inner_loop(quadratic, optax.sgd(0.1), 3, memory=memory)

    def summed(theta):
        path = adapt(theta, SUPPORT)[1].path
        return path.sum(), path

    gradient, path = jax.jit(jax.grad(summed, has_aux=True))(0.0)
    np.testing.assert_allclose(path, [0.2, 0.36, 0.488], rtol=1e-12)
    # d/dθ Σ_j θ_j = 0.8 + 0.64 + 0.512
    np.testing.assert_allclose(gradient, 0.8 + 0.64 + 0.512, rtol=1e-12)
    assert jax.eval_shape(lambda theta: plain(theta, SUPPORT)[1], 0.0).path is None


@pytest.mark.parametrize(
    "memory", ["store", "recompute", *(pytest.param(m, marks=nightly) for m in MODES[2:])]
)
def test_loop_continues_from_an_optimizer_state(memory):
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def run(start):
        whole, _ = jm.inner_loop(quadratic, optimizer, 5, memory=memory)(start, SUPPORT)
        first, trace = jm.inner_loop(quadratic, optimizer, 2, memory=memory)(start, SUPPORT)
        rest = jm.inner_loop(quadratic, optimizer, 3, memory=memory)
        return whole, rest(first, SUPPORT, state=trace.state)[0], rest(first, SUPPORT)[0]

    whole, continued, restarted = run(0.0)
    np.testing.assert_allclose(continued, whole, rtol=1e-12)
    assert abs(restarted - whole) > 1e-3


@each_mode
def test_first_order_losses_depend_only_on_the_parameters_of_their_step(memory):
    """θ_1 = θ − α·constant: dL_1/dθ = L'(θ_1), and the curvature of the first loss does not enter.

    The proximal term moves the parameters but is not part of the loss; it is zero in the first step.
    """
    for proximal in (None, 0.5):
        adapt = jm.inner_loop(quadratic, optax.sgd(0.1), 2, order="first", memory=memory, proximal=proximal)
        actual = jax.jit(jax.jacrev(lambda theta, adapt=adapt: adapt(theta, SUPPORT)[1].loss))(0.0)
        np.testing.assert_allclose(actual, [-2.0, -1.6], rtol=1e-12)


@pytest.mark.parametrize(
    ("order", "memory"),
    [
        pytest.param(order, memory, marks=nightly if memory in nightly_modes else ())
        for order, nightly_modes in (("second", MODES[3:]), ("first", MODES[1:]))
        for memory in MODES
    ],
)
def test_an_optimizer_with_extra_arguments_receives_the_loss(order, memory):
    """u = −α·L·∇L, so that θ_1 = θ − α·L·L', and dθ_1/dθ = 1 − α(L'² + L·L'') in second order."""
    by_loss = optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda grads, state, params, *, value, **extra: (
            jax.tree.map(lambda g: -0.1 * value * g, grads),
            state,
        ),
    )
    adapt = jm.inner_loop(quadratic, by_loss, 2, order=order, memory=memory)

    def by_hand(theta):
        slopes = []
        for _ in range(2):
            loss, slope = (theta - 1) ** 2, 2 * (theta - 1)
            slopes.append(1 - 0.1 * (slope**2 + 2 * loss) if order == "second" else 1.0)
            theta = theta - 0.1 * loss * slope
        return theta, np.prod(slopes)

    actual = jax.jit(jax.value_and_grad(lambda theta: adapt(theta, SUPPORT)[0]))(0.3)
    np.testing.assert_allclose(actual, by_hand(0.3), rtol=1e-12)


# --- Memory mode "auto" -----------------------------------------------------------------------------


def wide_loss(theta, x):
    for _ in range(5):
        x = jnp.tanh(x @ theta)
    return jnp.square(x).mean()


@pytest.mark.parametrize(
    ("examples", "steps", "backend", "mode"),
    [
        (20000, 10, "cpu", "recompute"),
        (20000, 10, "gpu", "store"),
        (500000, 10, "gpu", "recompute"),
        (5000, 1, "cpu", "store"),
        (10, 10, "cpu", "store"),
    ],
)
def test_auto_chooses_by_steps_model_and_backend(examples, steps, backend, mode, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def program(memory):
        adapt = jm.inner_loop(wide_loss, optax.sgd(0.1), steps, memory=memory)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in ((4, 4), (examples, 4))]
        return jax.jit(jax.grad(lambda theta, x: adapt(theta, x)[0].sum())).lower(*shapes).as_text()

    chosen = program("auto")
    assert chosen == program(mode)
    if steps > 1:
        assert chosen != program("recompute" if mode == "store" else "store")


def test_memory_of_implicit_gradients_does_not_grow_with_steps():
    def temporaries(steps):
        adapt = jm.inner_loop(wide_loss, optax.sgd(0.1), steps, order="implicit", proximal=1.0)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in ((4, 4), (500, 4))]
        compiled = jax.jit(jax.grad(lambda theta, x: adapt(theta, x)[0].sum())).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Each step adds one number, its loss.
    assert temporaries(100) - temporaries(2) <= 2 * 98 * 8


# --- Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "third"}, "order: got 'third'; it must be one of"),
        ({"memory": "none"}, "memory: got 'none'; it must be one of"),
        ({"steps": -1}, "steps: got -1; it must be at least 0"),
        ({"truncation": 0}, "truncation: got 0; it must be at least 1"),
        ({"proximal": -1.0}, r"proximal: got -1\.0; it must be at least 0"),
        ({"order": "implicit"}, 'proximal: got None; order="implicit" needs a positive weight'),
        ({"order": "implicit", "proximal": 0.0}, r"proximal: got 0\.0; order=\"implicit\" needs"),
        ({"order": "implicit", "proximal": 1.0, "steps": 0}, "steps: got 0; it must be at least 1"),
        ({"order": "implicit", "proximal": 1.0, "cg_steps": 0}, "cg_steps: got 0; it must be at least 1"),
        ({"order": "implicit", "proximal": 1.0, "damping": -1.0}, "damping: got .*; it must be at least 0"),
        ({"order": "implicit", "proximal": 1.0, "truncation": 2}, "truncation: .* leave it out"),
        ({"order": "implicit", "proximal": 1.0, "keep_path": True}, "keep_path: .* leave it out"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.inner_loop(quadratic, **{"optimizer": optax.sgd(0.1), "steps": 2, **settings})


def test_an_optimizer_with_an_infinite_derivative_is_refused_in_second_order():
    with pytest.raises(ValueError, match=r"not finite where a gradient is zero.*eps_root=1e-8"):
        jm.inner_loop(quadratic, optax.adam(0.1), 2)
    with pytest.raises(ValueError, match="eps_root"):
        jm.inner_loop(quadratic, optax.chain(optax.clip(1.0), optax.adamw(0.1)), 2)
    for optimizer, order in ((optax.adam(0.1, eps_root=1e-8), "second"), (optax.adam(0.1), "first")):
        adapt = jm.inner_loop(lambda t, _: (t[0] - 1) ** 2, optimizer, 2, order=order)
        gradient = jax.jit(jax.grad(lambda t: adapt(t, None)[0].sum()))(np.zeros(2))  # noqa: B023
        assert np.isfinite(gradient).all()


def test_an_optimizer_without_a_reverse_mode_derivative_is_refused():
    def update(grads, state, params=None):
        halved = jax.lax.while_loop(lambda g: jnp.abs(g) > 1, lambda g: g / 2, grads)
        return jax.tree.map(jnp.negative, halved), state

    halving = optax.GradientTransformation(lambda params: (), update)
    adapt = jm.inner_loop(quadratic, halving, 2)
    with pytest.raises(ValueError, match="optimizer: its update cannot be differentiated in reverse mode"):
        adapt(0.0, SUPPORT)
    implicit = jm.inner_loop(quadratic, halving, 1, order="implicit", proximal=1.0)
    assert np.isfinite(implicit(0.0, SUPPORT)[0])


def test_hyperparameters_that_do_not_fit_the_optimizer_are_refused():
    with pytest.raises(ValueError, match="hyper: got None"):
        jm.inner_loop(quadratic, optax.sgd, 2)(0.0, SUPPORT)
    with pytest.raises(ValueError, match="hyper: got hyperparameters, but"):
        jm.inner_loop(quadratic, optax.sgd(0.1), 2)(0.0, SUPPORT, hyper=0.1)


@pytest.mark.parametrize("traced", [False, True])
def test_an_infinite_derivative_is_detected_for_an_optimizer_of_hyperparameters(traced):
    adapt = jm.inner_loop(quadratic, lambda rate: optax.adam(jnp.exp(rate)), 2)
    run = jax.jit(lambda rate: adapt(0.0, SUPPORT, hyper=rate)[0]) if traced else None
    with pytest.raises(ValueError, match="eps_root"):
        run(0.1) if traced else adapt(0.0, SUPPORT, hyper=0.1)
    adapt = jm.inner_loop(quadratic, lambda rate: optax.adam(jnp.exp(rate), eps_root=1e-8), 2)
    assert np.isfinite(jax.jit(jax.grad(lambda rate: adapt(0.0, SUPPORT, hyper=rate)[0]))(0.1))


def test_hyperparameters_under_implicit_are_refused():
    settings = {"order": "implicit", "proximal": 1.0}
    message = 'optimizer: got the function sgd; order="implicit" needs an optax transformation'
    with pytest.raises(ValueError, match=message):
        jm.inner_loop(quadratic, optax.sgd, 2, **settings)
    adapt = jm.inner_loop(quadratic, optax.sgd(0.1), 2, **settings)
    with pytest.raises(ValueError, match=r'hyper: got hyperparameters, but .* and order="second" or "first"'):
        adapt(0.0, SUPPORT, hyper=0.1)
