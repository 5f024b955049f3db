"""Arithmetic and algebra problems with ground truth and short worked solutions.

A solution writes out every intermediate result, left to right, so that each next number follows from numbers a few
tokens back: that is what a model of two million parameters can learn in minutes, and what it cannot guess without
writing.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from deltarl.rl.errors import UserError

# A task with n problems found counts as exhausted after n times this many draws that bring no new one.
DRAWS_PER_PROBLEM = 10


@dataclass(frozen=True)
class Exercise:
    """One generated problem; `operands` identify it whatever the phrasing, the letter or the order of its terms."""

    task: str
    operands: tuple[int, ...]
    question: str
    gold: str
    solution: str


class LinearLevel(NamedTuple):
    """Inclusive ranges of `coefficient * unknown ± constant`."""

    coefficient: tuple[int, int]
    unknown: tuple[int, int]
    constant: tuple[int, int]


# One entry per difficulty, 1 first.
CHAIN_SUM = [  # (min terms, max terms, min digits, max digits, running totals may be negative)
    (3, 4, 1, 1, False),
    (3, 4, 1, 2, True),
    (3, 5, 2, 2, True),
    (4, 6, 2, 3, True),
    (5, 8, 3, 3, True),
]
LINEAR = [
    LinearLevel((2, 9), (1, 9), (1, 20)),
    LinearLevel((2, 9), (1, 20), (1, 50)),
    LinearLevel((2, 12), (-20, 20), (1, 99)),
    LinearLevel((2, 20), (-50, 50), (1, 200)),
    LinearLevel((2, 50), (-99, 99), (1, 999)),
]
PRODUCT = [  # digits of the two factors
    (2, 1),
    (3, 1),
    (2, 2),
    (4, 1),
    (3, 2),
]
GCD_LARGEST = [40, 60, 99, 300, 999]
LEVELS = len(CHAIN_SUM)


def chain_sum(difficulty: int, rng: random.Random) -> Iterator[Exercise]:
    """`3+5-2`, solved by running totals: `3+5=8; 8-2=6.`"""
    min_terms, max_terms, min_digits, max_digits, may_be_negative = CHAIN_SUM[difficulty - 1]
    while True:
        numbers = [_number(rng.randint(min_digits, max_digits), rng) for _ in range(rng.randint(min_terms, max_terms))]
        first, steps, total = numbers[0], [], numbers[0]
        for number in numbers[1:]:
            sign = rng.choice("+-") if may_be_negative or number <= total else "+"
            steps.append((sign, number))
            total += number if sign == "+" else -number
        terms = [first, *(number if sign == "+" else -number for sign, number in steps)]
        written, total = running_total(first, steps)
        question = rng.choice(["Compute {}.", "What is {}?"]).format(
            f"{first}" + "".join(f"{sign}{number}" for sign, number in steps)
        )
        yield Exercise("chain_sum", tuple(sorted(terms)), question, str(total), _boxed(written, total))


def linear_equation(difficulty: int, rng: random.Random) -> Iterator[Exercise]:
    """`3*x+5=26`, solved in two moves: `3*x=26-5=21; x=21/3=7.`"""
    level = LINEAR[difficulty - 1]
    while True:
        a, x, b = (rng.randint(*bounds) for bounds in level)
        sign, back = rng.choice(["+-", "-+"])
        product = a * x
        total = product + b if sign == "+" else product - b
        letter = rng.choice("xyzn")
        equation = f"{a}*{letter}{sign}{b}={total}"
        question = rng.choice(["Solve {eq} for {v}.", "Find {v} if {eq}."]).format(eq=equation, v=letter)
        steps = [f"{a}*{letter}={total}{back}{b}={product}", f"{letter}={product}/{a}={x}"]
        yield Exercise("linear_equation", (a, b if sign == "+" else -b, total), question, str(x), _boxed(steps, x))


def product(difficulty: int, rng: random.Random) -> Iterator[Exercise]:
    """`47*6`, solved by place values and running totals: `40*6=240; 7*6=42; 240+42=282.`"""
    long, short = PRODUCT[difficulty - 1]
    while True:
        a, b = _number(long, rng), max(2, _number(short, rng))
        question = rng.choice(["Compute {a}*{b}.", "What is {a} times {b}?"]).format(a=a, b=b)
        pairs = list(itertools.product(place_values(a), place_values(b)))
        partials = [p * q for p, q in pairs]
        written = [f"{p}*{q}={p * q}" for p, q in pairs]
        totals, _ = running_total(partials[0], [("+", partial) for partial in partials[1:]])
        yield Exercise("product", tuple(sorted((a, b))), question, str(a * b), _boxed(written + totals, a * b))


def gcd(difficulty: int, rng: random.Random) -> Iterator[Exercise]:
    """`gcd of 36 and 15`, solved by Euclid's algorithm: `36-2*15=6; 15-2*6=3; 6-2*3=0.`"""
    while True:
        a, b = (rng.randint(2, GCD_LARGEST[difficulty - 1]) for _ in range(2))
        phrasing = rng.choice(["Find the gcd of {a} and {b}.", "What is the gcd of {a} and {b}?"])
        large, small = max(a, b), min(a, b)
        steps = []
        while small:
            quotient, remainder = divmod(large, small)
            steps.append(f"{large}-{quotient}*{small}={remainder}")
            large, small = small, remainder
        yield Exercise("gcd", tuple(sorted((a, b))), phrasing.format(a=a, b=b), str(large), _boxed(steps, large))


TASKS: dict[str, Callable[[int, random.Random], Iterator[Exercise]]] = {
    "chain_sum": chain_sum,
    "linear_equation": linear_equation,
    "product": product,
    "gcd": gcd,
}


def exercises(tasks: Mapping[str, float], difficulty: int, sizes: tuple[int, ...], seed: int) -> list[list[Exercise]]:
    """One list of exercises for each of `sizes`; no operands occur twice, within a list or across lists.

    Each list mixes the tasks in proportion to their weights, shuffled.  Earlier lists do not depend on the size of
    later ones, so a held-out list drawn first stays the same when the training list grows.

    Raises:
        UserError: unknown task, no positive weight, a difficulty out of range, or fewer distinct problems exist.
    """
    _check(tasks, difficulty)
    rngs = {task: random.Random(f"{seed}:{task}:{difficulty}") for task in tasks}
    streams = {task: _distinct(TASKS[task](difficulty, rng)) for task, rng in rngs.items()}
    order = random.Random(f"{seed}:order")
    lists = []
    for size in sizes:
        drawn = []
        for task, quota in _quotas(tasks, size).items():
            found = list(itertools.islice(streams[task], quota))
            if len(found) < quota:
                raise UserError(
                    f"task {task} has too few distinct problems at difficulty {difficulty} for data.train_size and "
                    "data.heldout_size: lower them, raise data.difficulty, or give the task less weight"
                )
            drawn += found
        order.shuffle(drawn)
        lists.append(drawn)
    return lists


def running_total(start: int, steps: list[tuple[str, int]]) -> tuple[list[str], int]:
    """The written running totals `3+5=8`, `8-2=6` of the signed `steps` from `start`, and the last total."""
    written, total = [], start
    for sign, number in steps:
        after = total + number if sign == "+" else total - number
        written.append(f"{total}{sign}{number}={after}")
        total = after
    return written, total


def place_values(number: int) -> list[int]:
    """472 -> [400, 70, 2]; zeros are left out."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"]


def _boxed(steps: list[str], answer: int) -> str:
    return f"{'; '.join(steps)}. \\boxed{{{answer}}}"


def _number(digits: int, rng: random.Random) -> int:
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _distinct(stream: Iterator[Exercise]) -> Iterator[Exercise]:
    """The exercises with new operands; ends when the space of them is exhausted."""
    seen: set[tuple[int, ...]] = set()
    misses = 0
    for exercise in stream:
        if exercise.operands in seen:
            misses += 1
            if misses > DRAWS_PER_PROBLEM * (1 + len(seen)):
                return
            continue
        seen.add(exercise.operands)
        misses = 0
        yield exercise


def _quotas(tasks: Mapping[str, float], size: int) -> dict[str, int]:
    """`size` split by weight, largest remainders first."""
    total = sum(tasks.values())
    exact = {task: size * weight / total for task, weight in tasks.items()}
    quotas = {task: int(share) for task, share in exact.items()}
    by_remainder = sorted(tasks, key=lambda task: quotas[task] - exact[task])
    for task in by_remainder[: size - sum(quotas.values())]:
        quotas[task] += 1
    return quotas


def _check(tasks: Mapping[str, float], difficulty: int) -> None:
    known = ", ".join(TASKS)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"data.tasks names {unknown[0]}, which does not exist; known tasks: {known}")
    if not tasks or min(tasks.values()) <= 0:
        raise UserError(f"data.tasks needs at least one task, each with a weight above 0; known tasks: {known}")
    if not 1 <= difficulty <= LEVELS:
        raise UserError(f"data.difficulty is {difficulty}; choose 1 to {LEVELS}")
