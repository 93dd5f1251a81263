"""Tests of `jm.nn.conv` against `lax.conv_general_dilated`: values, derivatives and transformations."""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

import jaxmeta as jm

# `jaxmeta.nn.conv` as an attribute is the function, not the module.
module = importlib.import_module("jaxmeta.nn.conv")
conv = jm.nn.conv
nightly = pytest.mark.nightly


def reference(x, kernel, strides=(1, 1), padding="SAME"):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=module.NHWC)


def draws(seed, *shapes, dtype=None):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape).astype(dtype or jnp.result_type(float))) for shape in shapes]


def assert_close(actual, expected, tolerance):
    """Compare to `tolerance` times the largest entry, since rounding scales with the terms of a sum."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1, np.abs(e).max(initial=0)))


# image, channels in, channels out, kernel, strides, padding
GEOMETRIES = [
    ((5, 5), 1, 2, (3, 3), (1, 1), "SAME"),
    ((6, 7), 3, 4, (3, 3), (2, 2), "SAME"),
    ((7, 4), 16, 3, (3, 3), (2, 2), "VALID"),
    ((4, 5), 18, 2, (2, 3), (1, 1), "VALID"),
    ((5, 6), 2, 17, (1, 1), (2, 1), "SAME"),
    ((7, 7), 3, 2, (5, 4), (2, 1), ((2, 1), (0, 3))),
    ((5, 4), 2, 2, (4, 4), (1, 1), "SAME"),
    # The window never reaches the last row and column.
    ((6, 6), 2, 3, (1, 2), (3, 3), ((0, 0), (0, 0))),
    # Padding wider than the kernel, and negative padding.
    ((3, 3), 2, 3, (2, 2), (1, 1), ((3, 2), (0, 3))),
    ((7, 8), 2, 3, (3, 3), (1, 1), ((-1, 0), (1, -2))),
]


def operands(geometry, seed=0, dtype=None, n=3):
    image, c, o, window, strides, padding = geometry
    x, w = draws(seed, (n, *image, c), (*window, c, o), dtype=dtype)
    return x, w, (strides, padding)


def geometries_of(*default):
    """Parametrize by all geometries; those whose index is not in `default` are nightly."""
    return pytest.mark.parametrize(
        "geometry",
        [pytest.param(g, marks=() if i in default else nightly) for i, g in enumerate(GEOMETRIES)],
    )


@geometries_of(0, 2, 4, 6, 8)
def test_values_match_lax_in_float32(geometry):
    x, w, (strides, padding) = operands(geometry, dtype=jnp.float32)

    @jax.jit
    def run(x, w):
        return conv(x, w, strides, padding), reference(x, w, strides, padding)

    assert_close(*run(x, w), 1e-5)


def derivatives(function, x, w, directions):
    """Return values and derivatives up to third order, by nested forward and reverse mode."""
    (dx, dw), (ex, ew) = directions

    def loss(x, w):
        return jnp.sin(function(x, w)).sum()

    def dot(a, b):
        return sum(jnp.vdot(u, v) for u, v in zip(a, b, strict=True))

    gradient = jax.grad(loss, (0, 1))

    def curvature(x, w):
        return jax.jvp(gradient, (x, w), (dx, dw))[1]

    return {
        "value": function(x, w),
        "grad": gradient(x, w),
        "jvp": jax.jvp(function, (x, w), (dx, dw))[1],
        "jvp of grad": curvature(x, w),
        "grad of grad": jax.grad(lambda x, w: dot(gradient(x, w), (dx, dw)), (0, 1))(x, w),
        "grad of jvp": jax.grad(lambda x, w: jax.jvp(loss, (x, w), (dx, dw))[1], (0, 1))(x, w),
        "grad of jvp of grad": jax.grad(lambda x, w: dot(curvature(x, w), (ex, ew)), (0, 1))(x, w),
    }


@pytest.mark.parametrize("geometry", GEOMETRIES[1::2])
def test_values_and_three_derivatives_match_lax_in_float64(geometry, x64):
    x, w, (strides, padding) = operands(geometry, n=2)
    directions = [draws(seed, x.shape, w.shape) for seed in (1, 2)]
    actual, expected = (
        jax.jit(functools.partial(derivatives, functools.partial(f, strides=strides, padding=padding)))(
            x, w, directions
        )
        for f in (conv, reference)
    )
    assert_close(actual, expected, 1e-10)
    assert_close(actual["grad of grad"], actual["jvp of grad"], 1e-10)


@st.composite
def geometries(draw):
    window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    pads = st.tuples(st.integers(0, 3), st.integers(0, 3))
    padding = draw(st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(pads, pads)))
    image = tuple(k + draw(st.integers(0, 4)) for k in window)
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return image, draw(st.sampled_from([1, 2, 16])), draw(st.integers(1, 3)), window, strides, padding


@nightly
@settings(max_examples=10, deadline=None, derandomize=True)
@given(geometry=geometries())
def test_values_and_gradients_match_lax_for_random_geometries(geometry):
    with jax.enable_x64(True):
        x, w, (strides, padding) = operands(geometry, n=2)

        def loss(x, w, function):
            return jnp.sin(function(x, w, strides, padding)).sum()

        actual, expected = (
            jax.jit(jax.value_and_grad(functools.partial(loss, function=f), (0, 1)))(x, w)
            for f in (conv, reference)
        )
        assert_close(actual, expected, 1e-10)


# --- vmap ------------------------------------------------------------------------------------------


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@pytest.mark.parametrize(
    ("strides", "channels"),
    [pytest.param(1, 3, marks=nightly), (2, 3), pytest.param(1, 16, marks=nightly)],
)
@pytest.mark.parametrize("batched", ["both", "x", "kernel"])
def test_vmap_equals_a_loop(strides, channels, batched, x64):
    axes = {"both": (0, 0), "x": (0, None), "kernel": (None, 0)}[batched]
    xs, ws = draws(0, (3, 2, 5, 4, channels), (3, 3, 2, channels, 4))
    directions = draws(1, xs.shape[1:], ws.shape[1:])

    def function(x, w):
        def gradient(x, w):
            return jax.grad(lambda x, w: jnp.sin(conv(x, w, (strides, strides))).sum(), (0, 1))(x, w)

        return conv(x, w, (strides, strides)), jax.jvp(gradient, (x, w), tuple(directions))

    args = tuple(a if axis == 0 else a[0] for a, axis in zip((xs, ws), axes, strict=True))
    jitted = jax.jit(function)
    loop = [jitted(*(a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True))) for i in range(3)]
    assert_close(jax.jit(jax.vmap(function, axes))(*args), stacked(loop), 1e-10)


def test_nested_vmap_over_any_axis(x64):
    xs, ws = draws(0, (2, 3, 5, 4, 3, 2), (3, 2, 2, 3, 4))
    # Outer: the first axis of xs, with the same kernels. Inner: tasks, on axis 3 of each of xs and of ws.
    actual = jax.jit(jax.vmap(jax.vmap(conv, (3, 3), -1), (0, None)))(xs, ws)
    jitted = jax.jit(reference)
    xs, ws = np.asarray(xs), np.asarray(ws)
    expected = np.stack([np.stack([jitted(x[..., j, :], ws[..., j, :]) for j in range(3)], -1) for x in xs])
    assert_close(actual, expected, 1e-10)


MAPS = {
    "forward": (module._forward, "x", "w"),
    "input_grad": (module._input_grad, "y", "w"),
    "kernel_grad": (module._kernel_grad, "x", "y"),
}


@pytest.mark.parametrize("strides", [pytest.param((1, 1), marks=nightly), (2, 1)])
@pytest.mark.parametrize("name", MAPS)
def test_each_map_batches_in_each_operand(name, strides, x64):
    function, *kinds = MAPS[name]
    geometry = module.Geometry((5, 4), (3, 2), strides, ((1, 1), (0, 1)))
    shapes = {"x": (2, 3, 5, 4, 2), "w": (2, 3, 2, 2, 4), "y": (2, 3, *geometry.out, 4)}
    a, b = draws(0, *((3, *shapes[kind]) for kind in kinds))
    function = functools.partial(function, geometry=geometry)

    @jax.jit
    def batched(a, b):
        return (
            jax.vmap(function)(a, b),
            jax.vmap(function, (0, None))(a, b[0]),
            jax.vmap(function, (None, 0))(a[0], b),
        )

    jitted = jax.jit(function)
    pairs = [(i, i) for i in range(3)], [(i, 0) for i in range(3)], [(0, i) for i in range(3)]
    a, b = np.asarray(a), np.asarray(b)
    loops = tuple(np.stack([jitted(a[i], b[j]) for i, j in indices]) for indices in pairs)
    assert_close(batched(a, b), loops, 1e-12)


# --- The implementations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit", [pytest.param(0, id="own convolution"), pytest.param(1 << 20, id="product")]
)
@geometries_of(1, 4, 5, 9)
def test_accelerator_rules_equal_those_of_the_cpu(geometry, limit, monkeypatch, x64):
    monkeypatch.setattr(module, "ACCELERATOR_PATCH_BYTES", limit)
    image, c, o, window, strides, padding = geometry
    pads = module._explicit_padding(padding, image, window, strides)
    geometry = module.Geometry(image, window, strides, pads)
    x, w, y = draws(0, (2, 3, *image, c), (2, *window, c, o), (2, 3, *geometry.out, o))
    product = module._over_tasks_as_product
    rules = [
        (product(module._lax_conv, module._patch_conv), module._forward, x, w),
        (
            product(functools.partial(module._transpose_of_x, module._lax_conv), module._patch_input_grad),
            module._input_grad,
            y,
            w,
        ),
        (
            product(functools.partial(module._transpose_of_w, module._lax_conv), module._patch_kernel_grad),
            module._kernel_grad,
            x,
            y,
        ),
    ]
    pairs = [(a[:tasks], b[:tasks]) for *_, a, b in rules for tasks in (1, 2)]
    both = [functions for *functions, _, _ in rules for _ in (1, 2)]

    @jax.jit
    def run(pairs):
        accelerator = [f(*pair, geometry=geometry) for (f, _), pair in zip(both, pairs, strict=True)]
        return accelerator, [f(*pair, geometry) for (_, f), pair in zip(both, pairs, strict=True)]

    assert_close(*run(pairs), 1e-10)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "rocm"])
def test_accelerators_get_matrix_products_for_kernels_of_each_task(platform):
    x, w = draws(0, (2, 3, 6, 6, 2), (2, 3, 3, 2, 4))

    def lowered(function, *args):
        gradient = jax.grad(lambda *args: jnp.sin(function(*args)).sum(), (0, 1))
        return jax.jit(gradient).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    many = lowered(jax.vmap(conv), x, w)
    assert "stablehlo.convolution" not in many
    assert "stablehlo.dot_general" in many
    assert "stablehlo.convolution" in lowered(conv, x[0], w[0])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_their_own_convolution_where_patches_are_large(platform, monkeypatch):
    # The patches of three images with 36 pixels, 9 positions of the kernel and 2 channels.
    monkeypatch.setattr(module, "ACCELERATOR_PATCH_BYTES", 4 * 3 * 36 * 9 * 2)
    for images, found in ((3, "stablehlo.dot_general"), (4, "stablehlo.convolution")):
        x, w = draws(0, (2, images, 6, 6, 2), (2, 3, 3, 2, 4))
        text = jax.jit(jax.vmap(conv)).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        assert found in text
        assert text.count("stablehlo.dot_general") + text.count("stablehlo.convolution") == 1


def test_no_platform_gets_a_grouped_convolution():
    x, w = draws(0, (2, 3, 6, 6, 16), (2, 3, 3, 16, 16))
    gradient = jax.grad(lambda x, w: jnp.sin(jax.vmap(conv)(x, w)).sum(), (0, 1))
    for platform in ("cpu", "cuda", "tpu"):
        text = jax.jit(gradient).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("feature_group_count = 1 :") == text.count("feature_group_count")
        assert text.count("batch_group_count = 1 :") == text.count("batch_group_count")


@pytest.mark.parametrize(
    ("limit", "channels", "strides"),
    [
        pytest.param(limit, *rest, marks=() if (limit, *rest) in {(1, 17, 1), (3000, 2, 2)} else nightly)
        for limit in (1, 3000, 1 << 20)
        for rest in ((2, 1), (2, 2), (17, 1), (17, 2))
    ],
)
def test_gradients_in_chunks_of_images_match_transposition(limit, channels, strides, monkeypatch, x64):
    monkeypatch.setattr(module, "CPU_PATCH_BYTES", limit)
    geometry = module.Geometry((5, 5), (3, 3), (strides, strides), ((1, 1), (1, 1)))
    # Six images are split into chunks of 1, 2, 3 or 6.
    x, w, y = draws(0, (6, 5, 5, channels), (3, 3, channels, 4), (6, *geometry.out, 4))

    @jax.jit
    def run(x, w, y):
        return (
            (module._cpu_kernel_grad(x, y, geometry), module._cpu_input_grad(y, w, geometry)),
            (
                module._transpose_of_w(module._lax_conv, x, y, geometry),
                module._transpose_of_x(module._lax_conv, y, w, geometry),
            ),
        )

    assert_close(*run(x, w, y), 1e-12)


def test_chunk_is_the_largest_divisor_that_fits(monkeypatch, x64):
    geometry = module.Geometry((4, 4), (1, 1), (1, 1), ((0, 0), (0, 0)))
    x = jnp.zeros((12, 4, 4, 1))  # 128 bytes of patches per image
    for limit, chunk in ((1, 1), (128 * 5, 4), (128 * 11, 6), (128 * 12, 12), (1 << 20, 12)):
        monkeypatch.setattr(module, "CPU_PATCH_BYTES", limit)
        assert module._chunk_size(x, geometry, 1) == chunk


@pytest.mark.parametrize(("channels", "strides"), [(3, 1), pytest.param(20, 2, marks=nightly)])
def test_derivatives_match_where_images_are_split_into_chunks(channels, strides):
    # The patches of one image have 3·3·h·w·channels float32 values: 110 kB for 3 channels and stride 1,
    # 184 kB for 20 channels and stride 2.
    x, w, direction = draws(
        0, (10, 32, 32, channels), (3, 3, channels, 8), (3, 3, channels, 8), dtype=jnp.float32
    )

    def second(function, x, w):
        gradient = jax.grad(lambda x, w: jnp.sin(0.1 * function(x, w, (strides, strides))).mean(), (0, 1))
        return gradient(x, w), jax.jvp(lambda w: gradient(x, w), (w,), (direction,))[1]

    geometry = module.Geometry((32, 32), (3, 3), (strides, strides), ((1, 1), (1, 1)))
    assert module._chunk_size(x, geometry, channels) in (5, 2)
    actual, expected = (jax.jit(functools.partial(second, f))(x, w) for f in (conv, reference))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


# --- Under other transformations -------------------------------------------------------------------


def test_eager_jit_scan_checkpoint_and_shard_map_agree(x64):
    xs, w = draws(0, (4, 2, 5, 5, 3), (3, 3, 3, 4))

    def gradient(x, w):
        return jax.grad(lambda w: jnp.sin(conv(x, w, (2, 2))).sum())(w)

    known = jax.jit(jax.grad(lambda w, x: jnp.sin(reference(x, w, (2, 2))).sum()))
    expected = np.stack([known(w, x) for x in np.asarray(xs)])
    assert_close(np.stack([gradient(jnp.asarray(x), w) for x in np.asarray(xs)]), expected, 1e-10)
    scanned = jax.jit(lambda: lax.scan(lambda _, x: (None, gradient(x, w)), None, xs)[1])
    assert_close(scanned(), expected, 1e-10)
    rematerialised = jax.checkpoint(lambda x, w: jnp.sin(conv(x, w, (2, 2))).sum())
    assert_close(jax.jit(jax.vmap(jax.grad(rematerialised, 1), (0, None)))(xs, w), expected, 1e-10)
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("tasks")
    sharded = jax.shard_map(
        jax.vmap(gradient, (0, None)),
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    assert_close(jax.jit(sharded)(xs, w), expected, 1e-10)


def test_scan_over_steps_differentiates(x64):
    x, w = draws(0, (2, 5, 5, 3), (3, 3, 3, 3))

    def unroll(w, function):
        def step(w, _):
            return w - 0.01 * jax.grad(lambda w: jnp.sin(function(x, w)).mean())(w), None

        return lax.scan(step, w, length=2)[0]

    actual, expected = (
        jax.jit(jax.grad(lambda w: jnp.cos(unroll(w, f)).sum()))(w)  # noqa: B023
        for f in (conv, reference)
    )
    assert_close(actual, expected, 1e-10)


def test_bfloat16_operands_give_bfloat16_outputs():
    x, w = draws(0, (2, 5, 5, 3), (3, 3, 3, 4), dtype=jnp.bfloat16)
    actual = conv(x, w)
    assert actual.dtype == jnp.bfloat16
    expected = reference(x.astype(jnp.float32), w.astype(jnp.float32))
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=0.05 * np.abs(expected).max())


def test_precision_of_the_context_reaches_the_primitive():
    x, w = draws(0, (2, 5, 5, 3), (3, 3, 3, 4))

    def precision(**settings):
        (equation,) = [
            e for e in jax.make_jaxpr(lambda x, w: conv(x, w, **settings))(x, w).eqns if "task_conv" in str(e)
        ]
        return equation.params["geometry"].precision

    with jax.default_matmul_precision("highest"):
        assert precision() == "highest"
    assert precision(precision="highest") == "highest"
    for setting in (lax.Precision.HIGHEST, "tensorfloat32"):
        assert conv(x, w, precision=setting).shape == (2, 5, 5, 4)


@pytest.mark.parametrize(
    ("x", "kernel", "padding", "message"),
    [
        ((2, 5, 5, 3), (3, 3, 4, 8), "SAME", r"\(2, 5, 5, 3\) and \(3, 3, 4, 8\)"),
        ((5, 5, 3), (3, 3, 3, 8), "SAME", "conv takes x"),
        ((2, 5, 5, 3), (3, 3, 8), "SAME", "conv takes x"),
        ((2, 2, 5, 3), (3, 3, 3, 8), "VALID", r"no room for a \(3, 3\) kernel in a \(2, 5\) image"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, kernel, padding, message):
    # Unwrapped, because jaxtyping's run-time checks, which only tests enable, would raise first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(conv)(jnp.zeros(x), jnp.zeros(kernel), padding=padding)


def test_operands_of_different_dtypes_are_refused():
    with pytest.raises(TypeError, match="one dtype"):
        conv(jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1), jnp.bfloat16))


# --- The Flax layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "is_supported"),
    [
        ({"kernel_size": (3, 3)}, True),
        ({"kernel_size": (3, 3), "strides": 2, "use_bias": False}, True),
        ({"kernel_size": (2, 3), "strides": (2, 1), "padding": "VALID"}, True),
        ({"kernel_size": (3, 3), "padding": ((1, 0), (2, 1))}, True),
        ({"kernel_size": (3, 3), "padding": 1}, True),
        ({"kernel_size": (3, 3), "padding": "CIRCULAR"}, True),
        ({"kernel_size": (3, 3), "precision": lax.Precision.HIGHEST}, True),
        ({"kernel_size": (3, 3), "kernel_dilation": 2}, False),
        ({"kernel_size": (3, 3), "padding": 1, "input_dilation": 2}, False),
        ({"kernel_size": (3, 3), "feature_group_count": 2}, False),
        ({"kernel_size": (3,)}, False),
        pytest.param({"kernel_size": (2, 2, 2)}, False, marks=nightly),
    ],
)
def test_conv_layer_matches_that_of_flax(settings, is_supported):
    spatial = (6, 5, 4)[: len(settings["kernel_size"])]
    (x,) = draws(0, (2, *spatial, 4))
    ours, theirs = jm.nn.Conv(8, **settings), linen.Conv(8, **settings)

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, layer):
        params = layer.init(jax.random.key(0), x)

        def loss(params, x):
            outputs = layer.apply(params, x)
            return jnp.sin(outputs).sum(), outputs

        return params, jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    params, results = run(x, ours)
    assert_close((params, results), run(x, theirs), 1e-5)
    assert ("task_conv" in str(jax.make_jaxpr(ours.apply)(params, x))) == is_supported


def test_conv_layer_takes_zero_or_two_batch_axes():
    layer, flax_layer = jm.nn.Conv(3, (3, 3)), linen.Conv(3, (3, 3))
    for shape in ((5, 5, 2), (2, 3, 5, 5, 2)):
        (x,) = draws(0, shape)
        params = layer.init(jax.random.key(0), x)
        assert_close(layer.apply(params, x), flax_layer.apply(params, x), 1e-5)
