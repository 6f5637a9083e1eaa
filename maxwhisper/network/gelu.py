"""GELU, with an error function of our own: MAX computes two forms, for small and large numbers, and selects one."""

from collections.abc import Sequence

from max.dtype import DType
from max.graph import TensorValue, ops

REACH = 3.925
"""From where on no float32 lies between the error function and 1."""
ABOVE = (1.12837923, 0.181134582, 0.0515885949, 0.00339097064, 0.000280346314, 2.1689134e-06)
BELOW = (1.0, 0.493860304, 0.110337615, 0.0142096877, 0.00107933243, 3.90934365e-05)
"""Polynomials in z^2 whose quotient, times z, is the error function of z up to REACH: fitted for the least relative
error as numbers of float32, by least squares whose weights go where it is largest."""


def gelu(x: TensorValue) -> TensorValue:
    """Returns x times the standard normal's distribution function at x, in float32 whatever the dtype of x: the exact
    form, not the tanh approximation."""
    wide = x.cast(DType.float32)
    return (wide * (erf(wide * 0.5**0.5) * 0.5 + 0.5)).cast(x.dtype)


def erf(z: TensorValue) -> TensorValue:
    """Computes the error function of z, float32."""
    z = ops.max(ops.min(z, REACH), -REACH)
    above, below = (polynomial(coefficients, z * z) for coefficients in (ABOVE, BELOW))
    return ops.max(ops.min(z * above / below, 1.0), -1.0)


def polynomial(coefficients: Sequence[float], x: TensorValue) -> TensorValue:
    """Computes the sum of coefficient i times x^i."""
    *others, y = coefficients
    for coefficient in reversed(others):
        y = x * y + coefficient
    return y
