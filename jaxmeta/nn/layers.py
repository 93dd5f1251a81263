"""Flax layers that a user's own network needs to be fast: change one import."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen
from flax.linen import Dense
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxmeta.nn.conv import NHWC, conv

__all__ = ["Conv", "Dense", "conv_general_dilated"]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **kwargs: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`, by `conv` wherever that can serve.

    Dilated, grouped, and other than two-dimensional NHWC convolutions go to `jax.lax` unchanged.
    """
    dims = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    undilated = all(d in (None, 1) for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    served = (
        dims == lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), NHWC)
        and undilated
        and feature_group_count == batch_group_count == 1
        and lhs.dtype == rhs.dtype
        and preferred_element_type in (None, lhs.dtype)
        and not kwargs
    )
    if served:
        rows, columns = window_strides
        return conv(lhs, rhs, (rows, columns), padding, precision=precision)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **kwargs,
    )


class Conv(linen.Conv):
    """Drop-in for `flax.linen.Conv`, fast where every task has kernels of its own.

    Same arguments, parameters and results; only how a convolution is computed differs.
    """

    conv_general_dilated: Callable[..., Any] | None = conv_general_dilated
