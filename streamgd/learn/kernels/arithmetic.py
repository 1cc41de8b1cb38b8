"""Functions of numbers with the same bits on every CPU, for numbers and for vectors.

Those of the C library differ between CPU types and versions. Nothing here branches, so a vector costs what a number
costs.
"""

from __future__ import annotations

import math

from streamgd.learn.kernels.llvm import F64, I64, Value, larger, smaller, where

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_INVERSE_LN2 = 1.4426950408889634
_ROUNDER = 6755399441055744.0  # 1.5 * 2**52: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4338000000000000


def _polynomial(x: Value, coefficients: list[float]) -> Value:
    """Evaluate a polynomial by Horner's rule, highest power first."""
    total = x.code.splat(x.code.number(coefficients[0]), x.lanes)
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def exp(x: Value) -> Value:
    """Return e**x within 1.5 units in the last place; x is clamped to [-708, 709].

    x = k ln 2 + r with |r| <= ln(2)/2, then a Taylor polynomial of degree 13 in r, then the exponent bits of k.
    """
    x = smaller(larger(x, -708.0), 709.0)
    shifted = x * _INVERSE_LN2 + _ROUNDER
    k = shifted - _ROUNDER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = _polynomial(r, [1.0 / math.factorial(n) for n in range(13, -1, -1)])
    exponent = (shifted.bits_as(I64) - (_ROUNDER_BITS - 1023)) << 52
    return p * exponent.bits_as(F64)


def _two_atanh(s: Value) -> Value:
    """Return log((1 + s) / (1 - s)) for |s| <= 0.1716, by its series in s**2."""
    z = s * s
    p = _polynomial(z, [1.0 / n for n in range(21, 1, -2)])
    return 2.0 * s + 2.0 * s * (z * p)


def log1p(u: Value) -> Value:
    """Return log(1 + u) for 0 <= u <= 1, within two units in the last place.

    The series is taken of 1 + u where that is below √2, else of (1 + u) / 2.
    """
    high = u > 0.41421356237309503
    s = where(high, u - 1.0, u) / where(high, u + 3.0, u + 2.0)
    return where(high, 0.6931471805599453, 0.0) + _two_atanh(s)


def log(x: Value) -> Value:
    """Return log(x) for a normal positive x, within two units in the last place.

    The exponent apart, the series is taken of a mantissa between √½ and √2.
    """
    bits = x.bits_as(I64)
    exponent = ((bits >> 52) & 0x7FF) - 1023
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).bits_as(F64)
    high = m > 1.4142135623730951
    m = where(high, 0.5 * m, m)
    k = where(high, exponent + 1, exponent).to(F64)
    return k * _LN2_HIGH + (_two_atanh((m - 1.0) / (m + 1.0)) + k * _LN2_LOW)


def cos_pi(x: Value) -> Value:
    """Return cos(π x) for 0 <= x <= 1, to 1e-15."""
    flip = x > 0.5
    a = math.pi * where(flip, 1.0 - x, x)
    z = a * a
    term = total = x * 0.0 + 1.0
    for i in range(1, 13):
        term = -term * z / float((2 * i - 1) * (2 * i))
        total = total + term
    return where(flip, -total, total)
