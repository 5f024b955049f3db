"""Puzzles with many right answers, as reasoning-gym poses them: each is checked by its rules, not against one solution.

Each check takes the answer's text, the row's `metadata` and its gold, and says whether the answer solves the puzzle. An
answer of another form raises ValueError or IndexError, a row without the data that its rules need KeyError.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

Metadata = Mapping[str, Any]
Check = Callable[[str, Metadata, str], bool]

MAX_TOKENS = 200
MAX_MOVES = 10_000
ARITHMETIC = re.compile(r"\s*(\d{1,20}|[-+*/()])")
SIGNS = {"×": "*", "·": "*", "\\times": "*", "\\cdot": "*", "÷": "/", "\\div": "/", "\u2212": "-"}
MOVE_DISK = re.compile(r"Move disk (\d+) from Peg (\d+) to Peg (\d+)", re.IGNORECASE)
JUG_MOVE = re.compile(r"(fill|empty) ([A-Z])|pour ([A-Z])->([A-Z])")
ASSIGNED = re.compile(r"([A-Z])\s*=\s*(\d)")
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def rows_of(text: str) -> list[list[str]]:
    """The cells of a grid: lines of cells between blanks or commas, with or without brackets, or a LaTeX matrix."""
    text = re.sub(r"\\(?:begin|end)\{\w+\}", "", text).replace("\\\\", "\n").replace("&", " ")
    lines = re.sub(r"\]\s*,\s*\[", "\n", text).splitlines()
    rows = [re.sub(r"[\[\],'\"|]", " ", line).split() for line in lines]
    return [row for row in rows if row]


def arithmetic(text: str) -> tuple[Fraction, list[int]]:
    """Value and numbers of an expression of + - * / and brackets. Raises ValueError, also for a division by 0."""
    for sign, plain in SIGNS.items():
        text = text.replace(sign, plain)
    tokens, position = [], 0
    text = text.strip()
    while position < len(text):
        found = ARITHMETIC.match(text, position)
        if found is None or len(tokens) == MAX_TOKENS:
            raise ValueError("not an expression of numbers, + - * / and brackets")
        tokens.append(found[1])
        position = found.end()
    tokens.append("")
    value, end = _sum(tokens, 0)
    if tokens[end]:
        raise ValueError(f"{tokens[end]!r} where the expression should end")
    return value, [int(token) for token in tokens if token.isdigit()]


def _sum(tokens: Sequence[str], at: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at)
    while tokens[at] in ("+", "-"):
        sign = 1 if tokens[at] == "+" else -1
        term, at = _product(tokens, at + 1)
        value += sign * term
    return value, at


def _product(tokens: Sequence[str], at: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at)
    while tokens[at] in ("*", "/"):
        operator = tokens[at]
        factor, at = _factor(tokens, at + 1)
        if operator == "/" and not factor:
            raise ValueError("a division by 0")
        value = value * factor if operator == "*" else value / factor
    return value, at


def _factor(tokens: Sequence[str], at: int) -> tuple[Fraction, int]:
    token = tokens[at]
    if token == "-":
        value, at = _factor(tokens, at + 1)
        return -value, at
    if token == "(":
        value, at = _sum(tokens, at + 1)
        if tokens[at] != ")":
            raise ValueError("a bracket is not closed")
        return value, at + 1
    if not token.isdigit():
        raise ValueError(f"{token or 'the end'!r} where a number should stand")
    return Fraction(int(token)), at + 1


def countdown(answer: str, metadata: Metadata, gold: str) -> bool:
    return _makes(answer, metadata["numbers"], metadata["target"])


def puzzle24(answer: str, metadata: Metadata, gold: str) -> bool:
    return _makes(answer, metadata["numbers"], 24)


def _makes(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Every number used exactly once, the value the target; `= target` may follow."""
    expression, equals, claimed = answer.partition("=")
    if equals and claimed.strip() != str(target):
        return False
    value, used = arithmetic(expression)
    return value == target and Counter(used) == Counter(numbers)


def n_queens(answer: str, metadata: Metadata, gold: str) -> bool:
    """As many queens as rows, those given among them, none in another's row, column or diagonal."""
    board, given = rows_of(answer), metadata["puzzle"]
    size = len(given)
    if len(board) != size or any(len(row) != size or set(row) - {"_", "Q"} for row in board):
        return False
    queens = [(i, j) for i in range(size) for j in range(size) if board[i][j] == "Q"]
    kept = all(board[i][j] == "Q" for i in range(size) for j in range(size) if given[i][j] == "Q")
    lines = [[f(i, j) for i, j in queens] for f in (lambda i, j: i, lambda i, j: j, int.__add__, int.__sub__)]
    return len(queens) == size and kept and all(len(set(line)) == size for line in lines)


def sudoku(answer: str, metadata: Metadata, gold: str) -> bool:
    """Every row, column and box holds each number once, and the clues stand."""
    board, clues = [[int(cell) for cell in row] for row in rows_of(answer)], metadata["puzzle"]
    size, box = len(clues), int(len(clues) ** 0.5)
    if len(board) != size or any(len(row) != size for row in board):
        return False
    boxes = [
        [board[i + a][j + b] for a in range(box) for b in range(box)]
        for i in range(0, size, box)
        for j in range(0, size, box)
    ]
    units = [*board, *map(list, zip(*board, strict=True)), *boxes]
    kept = all(
        clue in (0, cell)
        for row, given in zip(board, clues, strict=True)
        for cell, clue in zip(row, given, strict=True)
    )
    return kept and all(sorted(unit) == list(range(1, size + 1)) for unit in units)


def kakurasu(answer: str, metadata: Metadata, gold: str) -> bool:
    """The places of the ones of each row and column, counted from 1, sum to what is asked."""
    board = [[int(cell) for cell in row] for row in rows_of(answer)]
    across, down = metadata["row_sums"], metadata["col_sums"]
    if len(board) != len(across) or any(len(row) != len(down) or set(row) - {0, 1} for row in board):
        return False
    sums = [
        sum(place * cell for place, cell in enumerate(line, start=1)) for line in (*board, *zip(*board, strict=True))
    ]
    return sums == [*across, *down]


def survo(answer: str, metadata: Metadata, gold: str) -> bool:
    """The blanks hold the numbers given, and every line's last number is the sum of the others."""
    board, puzzle = [[int(cell) for cell in row] for row in rows_of(answer)], metadata["puzzle"]
    if [len(row) for row in board] != [len(row) for row in puzzle]:
        return False
    cells = [(b, p) for row, given in zip(board, puzzle, strict=True) for b, p in zip(row, given, strict=True)]
    filled = sorted(b for b, p in cells if p == 0)
    lines = [*board, *zip(*board, strict=True)]
    kept = all(p in (0, b) for b, p in cells)
    return (
        kept and filled == sorted(metadata["candidate_numbers"]) and all(sum(line[:-1]) == line[-1] for line in lines)
    )


def graph_color(answer: str, metadata: Metadata, gold: str) -> bool:
    puzzle, colors = metadata["puzzle"], json.loads(answer)
    if not isinstance(colors, dict) or set(colors) != {str(vertex) for vertex in puzzle["vertices"]}:
        return False
    allowed = all(color in puzzle["color_options"] for color in colors.values())
    return allowed and all(colors[str(a)] != colors[str(b)] for a, b in puzzle["edges"])


def cryptarithm(answer: str, metadata: Metadata, gold: str) -> bool:
    """Each letter its own digit, and the words add up."""
    pairs = ASSIGNED.findall(answer)
    digits = dict(pairs)
    whole = len(pairs) == len(digits) == len(set(digits.values())) and set(digits) == set(metadata["letters"])
    if not whole:
        return False
    words = [*metadata["words_letters"], metadata["result_letters"]]
    *terms, total = ["".join(digits[letter] for letter in word) for word in words]
    if not metadata["allow_leading_zero"] and any(word.startswith("0") for word in (*terms, total)):
        return False
    return sum(map(int, terms)) == int(total)


def shortest_path(answer: str, metadata: Metadata, gold: str) -> bool:
    """A way from * to # over open cells, as long as the gold's; `infeasible` where the gold says so."""
    if "infeasible" in (gold, answer.strip().casefold()):
        return gold == answer.strip().casefold()
    grid, moves = metadata["matrix"], re.sub(r"[,\[\]'\"→>-]", " ", answer.casefold()).split()
    row, column = next((i, line.index("*")) for i, line in enumerate(grid) if "*" in line)
    if len(moves) != len(gold.split()) or set(moves) - set(STEPS):
        return False
    for move in moves:
        row, column = row + STEPS[move][0], column + STEPS[move][1]
        if not (0 <= row < len(grid) and 0 <= column < len(grid[row])) or grid[row][column] == "X":
            return False
    return grid[row][column] == "#"


def palindrome_generation(answer: str, metadata: Metadata, gold: str) -> bool:
    word = answer.strip()
    return word == word[::-1] and Counter(word) == Counter(metadata["letters"])


def quantum_lock(answer: str, metadata: Metadata, gold: str) -> bool:
    """The buttons reach the target in as few presses as the gold; each press changes the light."""
    buttons = {button["name"]: button for button in metadata["buttons"]}
    presses = re.sub(r"→|->|,|\\rightarrow|\\to\b", " ", answer).split()
    if len(presses) != len(metadata["solution_path"]) or set(presses) - set(buttons):
        return False
    value, light = metadata["initial_value"], metadata["initial_state"]
    for button in map(buttons.__getitem__, presses):
        if button["active_state"] in ("any", light):
            value = {
                "add": value + button["value"],
                "subtract": value - button["value"],
                "multiply": value * button["value"],
            }[button["type"]]
        light = "red" if light == "green" else "green"
    return value == metadata["target_value"]


def jugs(answer: str, metadata: Metadata, gold: str) -> bool:
    """The moves leave the target in some jug."""
    sizes = metadata["puzzle"]["jug_capacities"]
    held, moves = [0] * len(sizes), json.loads(answer)
    if not isinstance(moves, list) or len(moves) > MAX_MOVES:
        return False
    for move in moves:
        found = JUG_MOVE.fullmatch(str(move))
        if found is None:
            return False
        jug, source, target = (ord(name) - ord("A") if name else 0 for name in (found[2], found[3], found[4]))
        if max(jug, source, target) >= len(sizes) or (found[3] and source == target):
            return False
        if found[3]:
            poured = min(held[source], sizes[target] - held[target])
            held[source] -= poured
            held[target] += poured
        else:
            held[jug] = sizes[jug] if found[1] == "fill" else 0
    return metadata["puzzle"]["target"] in held


def tower_of_hanoi(answer: str, metadata: Metadata, gold: str) -> bool:
    """Legal moves, in any number, that bring every disk to the target peg."""
    lines = [line.strip() for line in answer.strip().splitlines()]
    moves = [MOVE_DISK.fullmatch(line.rstrip(".")) for line in lines if line]
    if len(moves) > MAX_MOVES or not all(moves):
        return False
    pegs: dict[int, list[int]] = {peg: [] for peg in range(1, metadata["num_pegs"] + 1)}
    pegs[metadata["start_peg"]] = list(range(metadata["num_disks"], 0, -1))
    for move in moves:
        disk, source, target = map(int, move.groups())
        if target not in pegs or pegs.get(source, [])[-1:] != [disk] or (pegs[target] and pegs[target][-1] < disk):
            return False
        pegs[target].append(pegs[source].pop())
    return len(pegs[metadata["target_peg"]]) == metadata["num_disks"]


PUZZLES: dict[str, Check] = {
    check.__name__: check
    for check in (
        countdown,
        cryptarithm,
        graph_color,
        jugs,
        kakurasu,
        n_queens,
        palindrome_generation,
        puzzle24,
        quantum_lock,
        shortest_path,
        sudoku,
        survo,
        tower_of_hanoi,
    )
} | {"mini_sudoku": sudoku}
