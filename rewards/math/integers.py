"""Exact roots, and a fixed hash."""

import math
from fractions import Fraction

from deltarl.rewards.math.budget import fraction_price, spend


def exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The rational root of a rational number >= 0, None where it is irrational."""
    if value < 0:
        return None
    top, bottom = integer_root(value.numerator, degree), integer_root(value.denominator, degree)
    return None if top is None or bottom is None else Fraction(top, bottom)


def integer_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
        return root if root * root == number else None
    if number < 2 or degree == 1:
        return number
    if number.bit_length() <= degree:
        return None
    spend(10 * fraction_price(number.bit_length()))
    root = _above_root(number, degree)
    while (following := ((degree - 1) * root + number // root ** (degree - 1)) // degree) < root:
        root = following
    return root if root**degree == number else None


def _above_root(number: int, degree: int) -> int:
    """A little more than the root, from its logarithm: Newton's steps from there are few."""
    log = math.log2(number) / degree
    shift = max(0, int(log) - 52)
    return int(2 ** (log - shift) * (1 + 2**-30)) + 2 << shift


def hash_number(text: str) -> int:
    """40 bits that depend on the text alone (FNV-1a), the same in every process."""
    state = 0xCBF29CE484222325
    for byte in text.encode("utf-8", "surrogatepass"):
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return (state >> 24) + 1
