# SPDX-License-Identifier: MIT
"""The shapes and dtypes that arrays on tensor memory can have."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import errors

__all__ = ["Shape", "array_form"]

Shape = SupportsIndex | Sequence[SupportsIndex]


def _shape(shape: Shape) -> tuple[int, ...]:
    if isinstance(shape, str | bytes):
        raise errors.InvalidArgument(f"shape {shape!r} is not a size or a list of sizes")
    try:
        parts = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        dims = tuple(operator.index(n) for n in parts)
    except TypeError:
        raise errors.InvalidArgument(
            f"shape {shape!r} is not a size or a list of sizes", "pass integers from 0"
        ) from None
    if any(n < 0 for n in dims):
        raise errors.InvalidArgument(f"shape {dims} has a negative size", "pass integers from 0")
    return dims


def array_form(shape: Shape, dtype: npt.DTypeLike) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the dimensions and the dtype that arguments of these forms mean.

    Raises:
        InvalidArgument: they mean none that an array on tensor memory can have.
    """
    dims = _shape(shape)
    try:
        form = np.dtype(dtype)
    except TypeError:
        raise errors.InvalidArgument(f"{dtype!r} is not a dtype") from None
    if form.hasobject or not form.itemsize:
        raise errors.InvalidArgument(
            f"dtype {form} has no fixed bytes to keep in a tensor", "use a plain numeric dtype"
        )
    return dims, form
