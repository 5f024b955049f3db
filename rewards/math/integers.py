"""Exact roots, and a fixed hash."""

import math
from fractions import Fraction


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
    root, following = 0, 1 << (number.bit_length() // degree + 1)
    while root == 0 or following < root:
        root = following
        following = ((degree - 1) * root + number // root ** (degree - 1)) // degree
    return root if root**degree == number else None


def hash_number(text: str) -> int:
    """40 bits that depend on the text alone (FNV-1a), the same in every process."""
    state = 0xCBF29CE484222325
    for byte in text.encode("utf-8", "surrogatepass"):
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return (state >> 24) + 1
