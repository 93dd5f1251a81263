"""Task-batched convolution, fast where every task has its own kernels.

Meta-learning makes three demands on a convolution that frameworks are not built for.

1. Kernels differ between tasks. Under `vmap`, `lax.conv_general_dilated` becomes a grouped
   convolution, whose gradients take XLA's CPU backend about a hundred times as long as a matrix
   product, and which is slow on GPUs too.
2. Second derivatives. A convolution is trilinear, T(x, w, y) = Σ y · conv(x, w), so its three
   partial maps

       forward(x, w) -> y      input_grad(y, w) -> x      kernel_grad(x, y) -> w

   are each other's derivatives, to any order. Differentiating `lax.conv`'s gradients gives
   correct but slow members of this family.
3. Forward mode over reverse mode, for memory-saving Hessian-vector products, which rules out
   `jax.custom_vjp`.

The three maps are therefore three JAX primitives with bilinear differentiation rules. Each map has
one implementation per platform, chosen by measurement. A `vmap` over tasks becomes a leading task
axis or, where only one operand is batched, more images or more channels of one product.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

NHWC = ("NHWC", "HWIO", "NHWC")
# A core's second-level cache holds about a megabyte. Patches that overflow it take longer to write
# and read back than the matrix product of which they are an operand.
CPU_PATCH_BYTES = 1 << 20
# Patches of a 3×3 kernel are nine times as large as their images. Beyond this size for one task, an
# accelerator's own convolution, task by task, saves more traffic and memory than its launches cost.
# `benchmarks/gpu_program.py mini-imagenet` shortened the predicted time at 16 MB, and lengthened it at 8.
ACCELERATOR_PATCH_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static parameters of a 2-D convolution: everything but its arrays and their dtype."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    precision: str | lax.Precision | tuple[Any, ...] | None = None

    @property
    def out(self) -> tuple[int, ...]:
        """Return the height and width of the output."""
        return tuple(
            (size + lo + hi - k) // stride + 1
            for size, k, stride, (lo, hi) in zip(
                self.image, self.kernel, self.strides, self.padding, strict=True
            )
        )

    @property
    def transposed(self) -> "Geometry":
        """Return the geometry of the stride-1 convolution with flipped kernel for the input gradient."""
        padding = tuple(
            (k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(self.kernel, self.padding, strict=True)
        )
        return dataclasses.replace(self, image=self.out, padding=padding)


# --- Implementations for one kernel: x (n, h, w, c), w (kh, kw, c, o), y (n, h', w', o) -----------
# Channels are last: a pixel's channels are contiguous, so that a patch is kh·kw contiguous runs, and images
# and kernels become the operands of a matrix product by reshaping.


def _lax_conv(x, w, geometry):
    return lax.conv_general_dilated(
        x, w, geometry.strides, geometry.padding, dimension_numbers=NHWC, precision=geometry.precision
    )


def _patches(x, geometry):
    """Return the patches (n, h', w', kh·kw·c) of images (n, h, w, c)."""
    # Shifted slices of the padded images cost a copy and no arithmetic.
    (kh, kw), (sh, sw), (ho, wo) = geometry.kernel, geometry.strides, geometry.out
    x = lax.pad(
        x, jnp.zeros((), x.dtype), ((0, 0, 0), *((lo, hi, 0) for lo, hi in geometry.padding), (0, 0, 0))
    )
    slices = [
        lax.slice(
            x,
            (0, i, j, 0),
            (x.shape[0], i + (ho - 1) * sh + 1, j + (wo - 1) * sw + 1, x.shape[3]),
            (1, sh, sw, 1),
        )
        for i in range(kh)
        for j in range(kw)
    ]
    return lax.concatenate(slices, 3)


def _matrix(x):
    """Merge all axes but the last, so that products are of matrices."""
    # XLA transposes the operands of a contraction over several axes first, which copies them.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _patch_conv(x, w, geometry):
    out = jnp.matmul(_matrix(_patches(x, geometry)), _matrix(w), precision=geometry.precision)
    return out.reshape(x.shape[0], *geometry.out, w.shape[-1])


def _transpose_of_x(form, y, w, geometry):
    x = jax.ShapeDtypeStruct((y.shape[0], *geometry.image, w.shape[2]), y.dtype)
    return jax.linear_transpose(lambda x: form(x, w, geometry), x)(y)[0]


def _transpose_of_w(form, x, y, geometry):
    w = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[3], y.shape[3]), x.dtype)
    return jax.linear_transpose(lambda w: form(x, w, geometry), w)(y)[0]


def _patch_kernel_grad(x, y, geometry):
    w = jnp.matmul(_matrix(_patches(x, geometry)).T, _matrix(y), precision=geometry.precision)
    return w.reshape(*geometry.kernel, x.shape[3], y.shape[3])


def _transposed_kernel_grad(x, y, geometry):
    """Return the kernel gradient with output channels first, (o, kh, kw, c)."""
    w = jnp.matmul(_matrix(y).T, _matrix(_patches(x, geometry)), precision=geometry.precision)
    return w.reshape(y.shape[3], *geometry.kernel, x.shape[3])


def _flip(w):
    return w[::-1, ::-1].swapaxes(2, 3)


def _patch_bytes(geometry, channels, dtype):
    """Return the bytes of the patches of one image."""
    return dtype.itemsize * math.prod(geometry.out) * math.prod(geometry.kernel) * channels


def _chunk_size(x, geometry, channels):
    """Return the largest divisor of n such that the patches of that many images fit in a core's cache."""
    most = max(1, CPU_PATCH_BYTES // _patch_bytes(geometry, channels, x.dtype))
    n = x.shape[0]
    return next(chunk for chunk in range(min(most, n), 0, -1) if n % chunk == 0)


def _images(array, index, chunk):
    return lax.dynamic_slice_in_dim(array, index * chunk, chunk)


# --- The three maps on the CPU ------------------------------------------------------------------


def _cpu_input_grad(y, w, geometry):
    if geometry.strides == (1, 1):
        return _lax_conv(y, _flip(w), geometry.transposed)
    return _transpose_of_x(_patch_conv, y, w, geometry)


def _cpu_kernel_grad(x, y, geometry):
    n, chunk = x.shape[0], _chunk_size(x, geometry, x.shape[3])
    if math.prod(geometry.kernel) * x.shape[3] <= y.shape[3]:
        part, shape = _patch_kernel_grad, (*geometry.kernel, x.shape[3], y.shape[3])
    else:
        # The product is a third faster where the narrower operand is the one that is transposed.
        part, shape = _transposed_kernel_grad, (y.shape[3], *geometry.kernel, x.shape[3])

    def accumulate(index, total):
        return total + part(_images(x, index, chunk), _images(y, index, chunk), geometry)

    if chunk == n:
        # Without the barrier the compiler merges the transposition below into the product, which swaps its
        # operands back to the slower order.
        total = lax.optimization_barrier(part(x, y, geometry))
    else:
        total = lax.fori_loop(0, n // chunk, accumulate, jnp.zeros(shape, x.dtype))
    return total if part is _patch_kernel_grad else jnp.moveaxis(total, 0, -1)


def _over_tasks_one_by_one(one):
    """Return the map `one` over a leading task axis, one task at a time."""

    def run(a, b, *, geometry):
        if a.shape[0] == 1:
            return one(a[0], b[0], geometry)[None]
        return lax.map(lambda ab: one(*ab, geometry), (a, b))

    return run


# --- The three maps on GPU and TPU ---------------------------------------------------------------


def _patch_input_grad(y, w, geometry):
    if geometry.strides == (1, 1):
        return _patch_conv(y, _flip(w), geometry.transposed)
    return _transpose_of_x(_patch_conv, y, w, geometry)


def _over_tasks_as_product(one, batched):
    """Return batched matrix products or, for one task or large patches, the backend's own convolution."""
    one_by_one = _over_tasks_one_by_one(one)

    def run(a, b, *, geometry):
        # The first operand has the images of which patches are taken: x, or y for the gradient of x.
        patches = a.shape[1] * _patch_bytes(geometry, a.shape[-1], a.dtype)
        if a.shape[0] == 1 or patches > ACCELERATOR_PATCH_BYTES:
            return one_by_one(a, b, geometry=geometry)
        return jax.vmap(lambda a, b: batched(a, b, geometry))(a, b)

    return run


# --- Primitives ----------------------------------------------------------------------------------


def _primitive(name, out_shape, cpu, default):
    primitive = Primitive(name)

    def handle_empty(run):
        """Return `run` extended to operands without images or tasks, for which the result is zero."""

        def run_or_zeros(a, b, *, geometry):
            if a.size and b.size:
                return run(a, b, geometry=geometry)
            return jnp.zeros((a.shape[0], *out_shape(a, b, geometry)), a.dtype)

        return run_or_zeros

    @primitive.def_abstract_eval
    def _(a, b, *, geometry):
        if a.dtype != b.dtype:
            raise TypeError(f"convolution operands must have one dtype, got {a.dtype} and {b.dtype}")
        return a.update(shape=(*a.shape[:1], *out_shape(a, b, geometry)), weak_type=False)

    @functools.partial(jax.jit, static_argnames="geometry")
    def eager(a, b, *, geometry):
        return primitive.bind(a, b, geometry=geometry)

    primitive.def_impl(eager)
    for run, platform in ((default, None), (cpu, "cpu")):
        lowering = mlir.lower_fun(handle_empty(run), multiple_results=False)
        mlir.register_lowering(primitive, lowering, platform=platform)
    return primitive


# Operands carry a leading task axis t: x (t, n, h, w, c), w (t, kh, kw, c, o), y (t, n, h', w', o).
_forward_p = _primitive(
    "task_conv",
    lambda x, w, geometry: (x.shape[1], *geometry.out, w.shape[4]),
    _over_tasks_one_by_one(_lax_conv),
    _over_tasks_as_product(_lax_conv, _patch_conv),
)
_input_grad_p = _primitive(
    "task_conv_input_grad",
    lambda y, w, geometry: (y.shape[1], *geometry.image, w.shape[3]),
    _over_tasks_one_by_one(_cpu_input_grad),
    _over_tasks_as_product(functools.partial(_transpose_of_x, _lax_conv), _patch_input_grad),
)
_kernel_grad_p = _primitive(
    "task_conv_kernel_grad",
    lambda x, y, geometry: (*geometry.kernel, x.shape[4], y.shape[4]),
    _over_tasks_one_by_one(_cpu_kernel_grad),
    _over_tasks_as_product(functools.partial(_transpose_of_w, _lax_conv), _patch_kernel_grad),
)


def _forward(x, w, geometry):
    return _forward_p.bind(x, w, geometry=geometry)


def _input_grad(y, w, geometry):
    return _input_grad_p.bind(y, w, geometry=geometry)


def _kernel_grad(x, y, geometry):
    return _kernel_grad_p.bind(x, y, geometry=geometry)


ad.defbilinear(
    _forward_p,
    lambda y, x, w, *, geometry: _input_grad(y, w, geometry),
    lambda y, x, w, *, geometry: _kernel_grad(x, y, geometry),
)
ad.defbilinear(
    _input_grad_p,
    lambda x, y, w, *, geometry: _forward(x, w, geometry),
    lambda x, y, w, *, geometry: _kernel_grad(x, y, geometry),
)
ad.defbilinear(
    _kernel_grad_p,
    lambda w, x, y, *, geometry: _input_grad(y, w, geometry),
    lambda w, x, y, *, geometry: _forward(x, w, geometry),
)


def _batch_rule(primitive, a_free, a_out, b_free, b_out):
    """Register the `vmap` rule of a bilinear map.

    If both operands are batched, the new axis joins the task axis. If one is, it joins that operand's free
    axis (`a_free`, `b_free`), which is axis `a_out` or `b_out` of the output, so that a kernel shared by all
    tasks stays one kernel of one large product.
    """

    def fold(operand, dim, axis):
        """Move axis `dim` to `axis` and merge it with the next; return the operand and both sizes."""
        # The sizes are returned because a merged axis of size 0 does not determine them.
        operand = jnp.moveaxis(operand, dim, axis)
        sizes = operand.shape[axis : axis + 2]
        return operand.reshape(*operand.shape[:axis], math.prod(sizes), *operand.shape[axis + 2 :]), sizes

    def unfold(out, sizes, axis):
        return out.reshape(*out.shape[:axis], *sizes, *out.shape[axis + 1 :])

    def rule(args, dims, *, geometry):
        (a, b), (a_dim, b_dim) = args, dims
        if a_dim is not None and b_dim is not None:
            (a, sizes), (b, _), axis = fold(a, a_dim, 0), fold(b, b_dim, 0), 0
        elif b_dim is None:
            (a, sizes), axis = fold(a, a_dim, a_free), a_out
        else:
            (b, sizes), axis = fold(b, b_dim, b_free), b_out
        return unfold(primitive.bind(a, b, geometry=geometry), sizes, axis), axis

    batching.primitive_batchers[primitive] = rule


_batch_rule(_forward_p, a_free=1, a_out=1, b_free=4, b_out=4)  # images; output channels
_batch_rule(_input_grad_p, a_free=1, a_out=1, b_free=3, b_out=4)  # images; input channels
_batch_rule(_kernel_grad_p, a_free=4, a_out=3, b_free=4, b_out=4)  # input channels; output channels


# --- Public ------------------------------------------------------------------------------------


def _explicit_padding(padding, image, kernel, strides):
    if isinstance(padding, str):
        return tuple(lax.padtype_to_pads(image, kernel, strides, padding))
    return tuple((int(lo), int(hi)) for lo, hi in padding)


def conv(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "kh kw c o"],
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    *,
    precision: str | lax.Precision | None = None,
) -> Float[Array, "n h2 w2 o"]:
    """Return the 2-D convolution (cross-correlation) of `x` with `kernel`.

    It is fast under `vmap` over tasks with different kernels, and in derivatives of any order.

    Args:
      x: images.
      kernel: filters; under `vmap` they may differ between tasks.
      strides: step of the window along height and width.
      padding: "SAME", "VALID", or (low, high) zeros along height and width.
      precision: precision of the matrix products; None for `jax.default_matmul_precision`.

    Returns:
      The values of `jax.lax.conv_general_dilated`, up to rounding.

    Raises:
      ValueError: the shapes do not fit, or a kernel is larger than the padded image.
      TypeError: `x` and `kernel` have different types.

    Examples:
      >>> conv(jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 4)), padding="VALID").shape
      (1, 2, 2, 4)
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"conv takes x (n, h, w, c) and kernel (kh, kw, c, o), got {x.shape} and {kernel.shape}"
        )
    image, window = x.shape[1:3], kernel.shape[:2]
    geometry = Geometry(
        image=image,
        kernel=window,
        strides=tuple(strides),
        padding=_explicit_padding(padding, image, window, strides),
        # Read here, because the context manager that sets it has exited when the primitive is lowered.
        precision=jax.config.jax_default_matmul_precision if precision is None else precision,  # type: ignore[attr-defined]
    )
    if min(geometry.out) < 1:
        raise ValueError(f"padding={padding!r} leaves no room for a {window} kernel in a {image} image")
    return _forward(x[None], kernel[None], geometry)[0]
