"""Whether an answer's tree means the same as the gold's, by the kind of thing that they are."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise, product

from deltarl.rewards.math.evaluate import NotANumber, Undefined
from deltarl.rewards.math.intervals import is_inequality, names_a_set, real_set, same_set
from deltarl.rewards.math.lexer import LimitError, ParseError
from deltarl.rewards.math.matrices import folded
from deltarl.rewards.math.nodes import Node, names
from deltarl.rewards.math.piecewise import same_cases
from deltarl.rewards.math.renaming import in_golds_names, with_argument_renamed, without_integer_clause
from deltarl.rewards.math.scalars import Rules, matches, same_up_to_factor, same_value
from deltarl.rewards.math.symbolic import OPERATORS, evaluated, holds_operator, same_zeros

MAX_ITEMS = 100
MAX_FREE_SIGNS = 4
ORDERS = {"<": ">", "<=": ">="}


class Conflict(ValueError):
    """An answer that contradicts itself, as x = 5 = 7 does."""


def equivalent(gold: Node, answer: Node, rules: Rules) -> bool:
    """Raises LimitError where a bound keeps it from being known, and Conflict for an answer that contradicts itself."""
    try:
        gold, answer = folded(gold), folded(answer)
        if gold == answer:
            return True
        if holds_operator(gold) or holds_operator(answer):
            if rules.require_evaluated and holds_operator(_stated(answer)):
                return _same_form(split_label(gold)[1], split_label(answer)[1])
            gold, answer = evaluated(gold), evaluated(answer)
        return _Comparison(rules).same(gold, answer)
    except (Undefined, ParseError):
        return False


def _same_form(gold: Node, answer: Node) -> bool:
    """The same sum, integral or the like, over the same range: the term may be written in another way."""
    if gold == answer:
        return True
    if gold[0] not in OPERATORS or gold[0] != answer[0] or holds_operator(gold[1]) or holds_operator(answer[1]):
        return False
    return gold[2:] == answer[2:] and same_value(gold[1], answer[1])


def _stated(answer: Node) -> Node:
    """The last value of a chain, which may begin with a sum that it works out; else the answer."""
    values = [term for term in answer[1] if not is_label(term)] if _is_equation(answer) else []
    return values[-1] if values else answer


class _Comparison:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def same(self, gold: Node, answer: Node) -> bool:
        gold, answer = without_integer_clause(gold), without_integer_clause(answer)
        if gold[0] == "modulo" or answer[0] == "modulo":
            return self.residues(gold, answer)
        gold_label, gold_core = split_label(gold)
        answer_label, answer_core = split_label(answer)
        if gold_label and answer_label:
            renamed = with_argument_renamed(answer_label, gold_label, answer_core)
            if renamed is not None and self.unlabelled(gold_core, renamed):
                return True
            return _is_equation(gold) and _is_equation(answer) and self.equations(gold, answer)
        if _is_equation(gold_core) or _is_equation(answer_core):
            return _is_equation(gold) and _is_equation(answer) and self.equations(gold, answer)
        return self.unlabelled(gold_core, answer_core)

    def unlabelled(self, gold: Node, answer: Node) -> bool:
        if _count(gold, "pm") > 1 or _count(answer, "pm") > 1:
            free = with_free_signs(gold), with_free_signs(answer)
            if self.in_any_order(_items(free[0])[0], _items(free[1])[0]):
                return True
        gold, answer = _unwrapped(both_signs(gold)), _unwrapped(both_signs(answer))
        answer = in_golds_names(gold, answer)
        if gold == answer:
            return True
        if gold[0] == "cases" or answer[0] == "cases":
            return gold[0] == answer[0] and self.cases(gold, answer)
        if gold[0] == "matrix" or answer[0] == "matrix":
            return self.matrices(_as_matrix(gold), _as_matrix(answer))
        if names_a_set(gold) or names_a_set(answer):
            return self.sets_of_reals(gold, answer)
        if gold[0] in ("list", "set") or answer[0] in ("list", "set"):
            return self.collections(gold, answer)
        if gold[0] == "tuple" or answer[0] == "tuple":
            return self.tuples(gold, answer)
        if gold[0] == "ratio" or answer[0] == "ratio":
            return self.ratios(gold, answer)
        if gold[0] == "text" or answer[0] == "text":
            return gold[0] == answer[0] and gold[1].casefold() == answer[1].casefold()
        if gold[0] == "based" and answer[0] == "num":
            return gold[1] == str(answer[1]) or matches(gold, answer, self.rules)
        return matches(gold, answer, self.rules)

    def sets_of_reals(self, gold: Node, answer: Node) -> bool:
        if all(_compares_terms(node) for node in (gold, answer)):
            return self.inequalities(gold, answer)
        if is_inequality(gold) and is_inequality(answer) and names(gold) != names(answer):
            return False
        if gold[0] == answer[0] == "tuple":
            return gold[2:] == answer[2:] and self.in_order(gold[1], answer[1])
        return same_set(real_set(gold), real_set(answer), lambda a, b: matches(a, b, self.rules))

    def inequalities(self, gold: Node, answer: Node) -> bool:
        """f(2) < f(1) < f(4), term by term in either direction, or two sides up to a positive factor."""
        gold, answer = _ascending(gold), _ascending(answer)
        if gold[2] != answer[2]:
            return False
        if all(same_value(a, b) for a, b in zip(gold[1], answer[1], strict=True)):
            return True
        return len(gold[2]) == 1 and same_up_to_factor(_difference(gold), _difference(answer), gold[2] != ("!=",))

    def equations(self, gold: Node, answer: Node) -> bool:
        if len(gold[1]) != 2 or len(answer[1]) != 2:
            return False
        left, right = _difference(gold), _difference(answer)
        return same_up_to_factor(left, right, positive=False) or same_zeros(left, right)

    def collections(self, gold: Node, answer: Node) -> bool:
        """Lists and sets in any order; in their order where labels or a tuple's brackets give one.

        Repeats count once in a set, and in a list beside a gold that has none.
        """
        gold_items, gold_labels = _items(gold)
        answer_items, answer_labels = _items(answer)
        if max(len(gold_items), len(answer_items)) > MAX_ITEMS:
            raise LimitError(f"a collection of more than {MAX_ITEMS} items")
        if gold_labels and answer_labels and sorted(gold_labels) == sorted(answer_labels):
            by_label = dict(zip(answer_labels, answer_items, strict=True))
            return self.in_order(gold_items, [by_label[label] for label in gold_labels])
        if gold_labels and answer_labels:
            return False
        if "tuple" in (gold[0], answer[0]):
            return "set" not in (gold[0], answer[0]) and self.in_order(gold_items, answer_items)
        if gold_labels or answer_labels:
            return self.in_order(gold_items, answer_items)
        distinct = self.distinct(gold_items)
        if "set" in (gold[0], answer[0]) or len(distinct) == len(gold_items):
            gold_items, answer_items = distinct, self.distinct(answer_items)
        return self.in_any_order(gold_items, answer_items)

    def in_order(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        return len(gold) == len(answer) and all(self.same(a, b) for a, b in zip(gold, answer, strict=True))

    def in_any_order(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        """Every item of one has its own equal in the other."""
        if len(gold) != len(answer):
            return False
        left = list(answer)
        for item in gold:
            found = next((i for i, candidate in enumerate(left) if self.same(item, candidate)), None)
            if found is None:
                return False
            del left[found]
        return True

    def distinct(self, items: Sequence[Node]) -> list[Node]:
        kept: list[Node] = []
        for item in items:
            if item not in kept:
                kept.append(item)
        return kept

    def residues(self, gold: Node, answer: Node) -> bool:
        """3 (mod 7) is 10 (mod 7); a remainder without its modulus must be the gold's own."""
        if gold[0] != answer[0]:
            bare = [node[1] if node[0] == "modulo" else node for node in (gold, answer)]
            return self.same(*bare)
        if not same_value(gold[2], answer[2]):
            return False
        values = [split_label(node[1])[1] for node in (gold, answer)]
        if any(map(names, values)) or any(value[0] in ("list", "set", "rel") for value in values):
            return self.same(gold[1], answer[1])
        difference = ("add", (values[0], ("neg", values[1])))
        return same_value(("fn", "mod", (difference, gold[2])), ("num", Fraction(0), 0))

    def cases(self, gold: Node, answer: Node) -> bool:
        try:
            return same_cases(gold, answer, self.same)
        except NotANumber:
            ours, theirs = ([("tuple", row, "(", ")") for row in node[1]] for node in (gold, answer))
            return self.in_any_order(ours, theirs)

    def tuples(self, gold: Node, answer: Node) -> bool:
        return gold[0] == answer[0] and self.in_order(gold[1], answer[1])

    def matrices(self, gold: Node, answer: Node) -> bool:
        if "tuple" in (gold[0], answer[0]):
            return self.in_order(_vector(gold), _vector(answer))
        if gold[0] != answer[0] or len(gold[1]) != len(answer[1]):
            return False
        return all(self.in_order(a, b) for a, b in zip(gold[1], answer[1], strict=True))

    def ratios(self, gold: Node, answer: Node) -> bool:
        """Equal term by term, or in the same proportion (2:4 is 1:2)."""
        if gold[0] != answer[0]:
            scalar, ratio = (answer, gold) if gold[0] == "ratio" else (gold, answer)
            return len(ratio[1]) == 2 and matches(("div", *ratio[1]), scalar, self.rules)
        if self.in_order(gold[1], answer[1]):
            return True
        if len(gold[1]) != len(answer[1]):
            return False
        pairs = [list(zip(node[1], node[1][1:], strict=False)) for node in (gold, answer)]
        return all(same_value(("div", *a), ("div", *b)) for a, b in zip(*pairs, strict=True))


def split_label(node: Node) -> tuple[Node | None, Node]:
    """(label, value) of `x = 5`, `|AB| = 1`, `x in S`; the label is None without one.

    A chain must agree with itself: x = 2+3 = 5 is 5, x = 5 = 7 raises Conflict. An equation that labels nothing
    comes back whole.
    """
    if node[0] == "list" and _label_of_all(node):
        return split_label(node[1][0])[0], ("list", (split_label(node[1][0])[1], *node[1][1:]), node[2])
    if node[0] != "rel":
        return None, node
    terms, ops = node[1], node[2]
    if ops == ("in",) and is_label(terms[0]):
        return None, terms[1]
    if any(op != "=" for op in ops):
        return None, node
    label = terms[0] if is_label(terms[0]) else None
    values = terms[1:] if label else terms
    if label is None and is_label(terms[-1]) and not names(terms[0]):
        label, values = terms[-1], terms[:-1]
    while len(values) > 1 and label is not None and is_label(values[0]):
        values = values[1:]
    if len(values) == 1:
        return label, values[0]
    if label is None and any(names(value) for value in values):
        return None, node
    if not all(same_value(a, b) for a, b in pairwise(values)):
        raise Conflict("a chain of equations that contradicts itself")
    return label, values[-1]


def is_label(node: Node) -> bool:
    """What stands left of `=` to name the value on the right: x, f(x), AB, |AB|, S:T, AB/CD, (p, q), words."""
    if node[0] in ("sym", "call", "text"):
        return node not in (("sym", "e"), ("sym", "i"), ("sym", "pi"), ("sym", "oo"))
    if node[0] in ("mul", "ratio", "tuple"):
        return all(is_label(part) for part in node[1])
    if node[0] == "div":
        return is_label(node[1]) and is_label(node[2])
    return node[0] == "fn" and node[1] == "abs" and is_label(node[2][0])


def both_signs(node: Node) -> Node:
    """`a ± b` as the list of its two values; inside a list or set, item by item."""
    if node[0] in ("list", "set"):
        items = [both_signs(item) for item in node[1]]
        flat = tuple(x for item in items for x in (item[1] if item[0] == "list" and item[2] == "pm" else (item,)))
        return (node[0], flat, *node[2:])
    if node[0] in ("rel", "tuple") or not _has(node, ("pm", "mp")):
        return node
    return ("list", (_signed(node, False), _signed(node, True)), "pm")


def with_free_signs(node: Node) -> Node:
    """`± a ± b` as the list of its values where each sign is chosen by itself."""
    if _count(node, "pm") > MAX_FREE_SIGNS:
        raise LimitError(f"more than {MAX_FREE_SIGNS} signs to choose")
    if node[0] != "add" or not _has(node, ("pm",)):
        return node
    choices = [((term[1], ("neg", term[1])) if term[0] == "pm" else (term,)) for term in node[1]]
    return ("list", tuple(("add", terms) for terms in product(*choices)), "pm")


def _count(node: Node, kind: str) -> int:
    return (node[0] == kind) + sum(_count(part, kind) for part in node if isinstance(part, tuple) and part)


def _has(node: Node, kinds: tuple[str, ...]) -> bool:
    return node[0] in kinds or any(_has(part, kinds) for part in node if isinstance(part, tuple) and part)


def _signed(node: Node, minus: bool) -> Node:
    if node[0] in ("pm", "mp"):
        inner = _signed(node[1], minus)
        return ("neg", inner) if minus == (node[0] == "pm") else inner
    return tuple(_signed_part(part, minus) for part in node)


def _signed_part(part: object, minus: bool) -> object:
    if not isinstance(part, tuple) or not part:
        return part
    return _signed(part, minus) if isinstance(part[0], str) else tuple(_signed_part(p, minus) for p in part)


def _unwrapped(node: Node) -> Node:
    return node[1][0] if node[0] in ("set", "list") and len(node[1]) == 1 else node


def _is_equation(node: Node) -> bool:
    return node[0] == "rel" and all(op == "=" for op in node[2])


def _label_of_all(node: Node) -> bool:
    """n = 2, 3, 4: the first item's label is the whole list's."""
    first, *rest = node[1]
    return _is_equation(first) and is_label(first[1][0]) and not any(item[0] == "rel" for item in rest)


def _compares_terms(node: Node) -> bool:
    """An inequality between expressions that has no single name to solve for."""
    if not is_inequality(node):
        return False
    variable_terms = sum(bool(names(term)) or term[0] == "call" for term in node[1])
    return variable_terms > 1 or len(names(node)) > 1


def _ascending(node: Node) -> Node:
    back = {v: k for k, v in ORDERS.items()}
    if all(op in back for op in node[2]):
        return ("rel", node[1][::-1], tuple(back[op] for op in node[2][::-1]))
    return node


def _difference(node: Node) -> Node:
    return ("add", (node[1][0], ("neg", node[1][1])))


def _items(node: Node) -> tuple[Sequence[Node], list[str]]:
    """The items of a list, set or tuple, and their labels when each has another."""
    items = node[1] if node[0] in ("list", "set", "tuple") else (node,)
    pairs = [split_label(item) for item in items]
    if not all(label for label, _ in pairs):
        return items, []
    labels, values = [str(label) for label, _ in pairs], [value for _, value in pairs]
    period = len(set(labels))
    if period == len(labels):
        return values, labels if len({_base_name(label) for label, _ in pairs}) > 1 else []
    if period == 1:
        return values, []
    if len(labels) % period == 0 and labels == labels[:period] * (len(labels) // period):
        return [("tuple", tuple(values[i : i + period]), "(", ")") for i in range(0, len(values), period)], []
    return items, []


def _base_name(label: Node | None) -> str:
    """x_1 and x_2 are values of one x: their order says nothing."""
    return label[1].partition("_")[0] if label and label[0] == "sym" else str(label)


def _as_matrix(node: Node) -> Node:
    """[[1, 2], [3, 4]] as the matrix of its rows."""
    if node[0] == "tuple" and all(row[0] == "tuple" and len(row[1]) == len(node[1][0][1]) for row in node[1]):
        return ("matrix", tuple(row[1] for row in node[1]))
    return node


def _vector(node: Node) -> Sequence[Node]:
    if node[0] != "matrix":
        return node[1] if node[0] in ("tuple", "list") else (node,)
    return node[1][0] if len(node[1]) == 1 else tuple(row[0] for row in node[1] if len(row) == 1)
