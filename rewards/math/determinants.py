"""Determinants, by Laplace's expansion: exact for rational entries, bounded in size."""

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from deltarl.rewards.math.lexer import LimitError
from deltarl.rewards.math.nodes import Node

if TYPE_CHECKING:
    from deltarl.rewards.math.evaluate import Evaluator


def determinant(evaluator: "Evaluator", matrix: Node) -> Any:
    rows = [[evaluator.value(cell) for cell in row] for row in matrix[1]]
    if len(rows) != len(rows[0]) or len(rows) > 6:
        raise LimitError("the determinant of a matrix that is not square or larger than 6")
    return _laplace(evaluator, rows)


def _laplace(evaluator: "Evaluator", rows: list[list[Any]]) -> Any:
    if len(rows) == 1:
        return rows[0][0]
    minors = [_laplace(evaluator, [row[:i] + row[i + 1 :] for row in rows[1:]]) for i in range(len(rows))]
    return evaluator.sum(
        [evaluator.product(evaluator.product(Fraction((-1) ** i), rows[0][i]), m) for i, m in enumerate(minors)]
    )
