"""Sums, differences, products and scalar multiples of matrices, worked out on the tree."""

from fractions import Fraction

from deltarl.rewards.math.lexer import LimitError, ParseError
from deltarl.rewards.math.nodes import Node, check_depth, parts

TRANSPOSES = (("sym", "T"), ("sym", "'"), ("text", "T"))
MAX_CELLS = 900
MAX_PRODUCTS = 2000
MAX_FACTORS = 5
MAX_PARTS = 20_000


def folded(node: Node) -> Node:
    """The tree with arithmetic on matrices replaced by the one matrix that it gives.

    Raises ParseError for shapes that do not fit and LimitError past a bound.
    """
    if node[0] == "pow" and node[1][0] == "tuple" and node[2] in TRANSPOSES:
        return node[1]
    if not _holds_matrix(node):
        return node
    if node[0] == "matrix":
        if len(node[1]) * len(node[1][0]) > MAX_CELLS:
            raise LimitError(f"a matrix of more than {MAX_CELLS} cells")
        return node
    if node[0] == "neg":
        return _scaled(("num", Fraction(-1), 0), folded(node[1]))
    if node[0] == "add":
        total = folded(node[1][0])
        for term in node[1][1:]:
            total = _added(total, folded(term))
        check_depth(total)
        return total
    if node[0] == "mul":
        if len(node[1]) > MAX_FACTORS:
            raise LimitError(f"a product of matrices with more than {MAX_FACTORS} factors")
        product = folded(node[1][0])
        for factor in node[1][1:]:
            product = _multiplied(product, folded(factor))
        return product
    if node[0] == "pow" and node[2] in TRANSPOSES:
        return _transposed(folded(node[1]))
    if node[0] == "div":
        return _scaled(("div", ("num", Fraction(1), 0), node[2]), folded(node[1]))
    return tuple(_folded_part(part) for part in node)


def _transposed(node: Node) -> Node:
    return ("matrix", tuple(zip(*node[1], strict=True))) if node[0] == "matrix" else node


def _folded_part(part: object) -> object:
    if not isinstance(part, tuple) or not part:
        return part
    return folded(part) if isinstance(part[0], str) else tuple(_folded_part(p) for p in part)


def _holds_matrix(node: Node) -> bool:
    return node[0] == "matrix" or any(_holds_matrix(part) for part in node if isinstance(part, tuple) and part)


def _scaled(factor: Node, matrix: Node) -> Node:
    if matrix[0] != "matrix":
        raise ParseError("a matrix where a number belongs")
    rows, columns = _shape(matrix)
    _check_parts(rows * columns * parts(factor) + 2 * parts(matrix))
    return ("matrix", tuple(tuple(("mul", (factor, cell)) for cell in row) for row in matrix[1]))


def _added(left: Node, right: Node) -> Node:
    if left[0] != "matrix" or right[0] != "matrix" or _shape(left) != _shape(right):
        raise ParseError("a sum of matrices of different shapes")
    return (
        "matrix",
        tuple(tuple(("add", pair) for pair in zip(a, b, strict=True)) for a, b in zip(left[1], right[1], strict=True)),
    )


def _multiplied(left: Node, right: Node) -> Node:
    if left[0] != "matrix" and right[0] != "matrix":
        return ("mul", (left, right))
    if left[0] != "matrix":
        return _scaled(left, right)
    if right[0] != "matrix":
        return _scaled(right, left)
    (rows, inner), (height, columns) = _shape(left), _shape(right)
    if inner != height:
        raise ParseError("a product of matrices whose shapes do not fit")
    if rows * inner * columns > MAX_PRODUCTS:
        raise LimitError("a product of matrices past the bound")
    _check_parts(columns * parts(left) + rows * parts(right))
    transposed = list(zip(*right[1], strict=True))
    return ("matrix", tuple(tuple(_inner(row, column) for column in transposed) for row in left[1]))


def _inner(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
    return ("add", tuple(("mul", pair) for pair in zip(row, column, strict=True)))


def _check_parts(count: int) -> None:
    if count > MAX_PARTS:
        raise LimitError(f"a matrix of more than {MAX_PARTS} parts")


def _shape(matrix: Node) -> tuple[int, int]:
    return len(matrix[1]), len(matrix[1][0])
