"""Names whose choice does not matter: arguments of a function, constants of integration, integers that run freely."""

import re

from deltarl.rewards.math.nodes import Node, names, substituted, uses

NUMBERED_CONSTANT = re.compile(r"[CcKk](_\w+)")
CONSTANTS = frozenset("CcKk")
RUNNING = frozenset("klmn")
INTEGERS = frozenset(("mathbbZ", "mathbbN", "Z", "N"))


def in_golds_names(gold: Node, answer: Node) -> Node:
    """The answer with its constants of integration, and integers that multiply pi, named as in the gold."""
    ours, theirs = names(gold) - names(answer), names(answer) - names(gold)
    if not ours or not theirs:
        return answer
    pairs = []
    added, constant = _added_constant(gold), _added_constant(answer)
    if added and constant:
        pairs.append((constant, added))
    by_number = {found[1]: name for name in ours if (found := NUMBERED_CONSTANT.fullmatch(name))}
    pairs += [
        (name, by_number[found[1]])
        for name in theirs
        if (found := NUMBERED_CONSTANT.fullmatch(name)) and found[1] in by_number
    ]
    running, counted = ours & RUNNING, theirs & RUNNING
    if len(running) == len(counted) == 1 and uses(gold, "pi") and uses(answer, "pi"):
        pairs += zip(counted, running, strict=True)
    return substituted(answer, {("sym", old): ("sym", new) for old, new in pairs}) if pairs else answer


def _added_constant(node: Node) -> str | None:
    """C in F(x) + C, where x is another name."""
    if node[0] != "add" or len(names(node)) < 2:
        return None
    return next((term[1] for term in node[1] if term[0] == "sym" and term[1] in CONSTANTS), None)


def without_integer_clause(node: Node) -> Node:
    """`k pi, k in Z` without its last item."""
    if node[0] != "list" or not _says_integer(node[1][-1]):
        return node
    kept = node[1][:-1]
    return kept[0] if len(kept) == 1 else ("list", kept, node[2])


def _says_integer(item: Node) -> bool:
    return item[0] == "rel" and item[2] == ("in",) and item[1][1][0] == "sym" and item[1][1][1] in INTEGERS


def with_argument_renamed(answer_label: Node, gold_label: Node, answer: Node) -> Node | None:
    """The answer in the gold's names when the labels agree: f(t) = t beside f(x) = x, y = x beside f(x) = x; None when
    they do not."""
    if answer_label == gold_label:
        return answer
    if answer_label[0] == gold_label[0] == "call" and answer_label[1] == gold_label[1]:
        theirs, ours = answer_label[2], gold_label[2]
        if len(theirs) == len(ours) and all(a[0] == b[0] == "sym" for a, b in zip(theirs, ours, strict=True)):
            taken = names(answer) & {name for _, name in ours} - {name for _, name in theirs}
            return None if taken else substituted(answer, dict(zip(theirs, ours, strict=True)))
    if _is_function_of(gold_label, answer_label) or _is_function_of(answer_label, gold_label):
        return answer
    return answer if "text" in (answer_label[0], gold_label[0]) else None


def _is_function_of(call: Node, name: Node) -> bool:
    return call[0] == "call" and name == ("sym", "y") and all(a[0] == "sym" for a in call[2])
