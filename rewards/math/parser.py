"""Tokens of one answer, to a tree of plain tuples.

Raises ParseError for what it does not know and LimitError past a bound.
"""

from deltarl.rewards.math.atoms import MAX_DEPTH, Atoms
from deltarl.rewards.math.lexer import LimitError, ParseError, join_thousands, tokenize, words
from deltarl.rewards.math.nodes import CONSTANT_NAMES, Node, as_list, check_depth, flat_name, is_name, product

RELATION_OPS = frozenset(("=", "<", ">", "<=", ">=", "!=", "~", "in"))
LEAD_WORDS = words("approximately about exactly is the final answer answer: equals only therefore thus so")
DENIALS = words("not no wrong incorrect false never neither nor isn't except")


def parse(text: str, *, thousands: bool = True) -> Node:
    """The tree of a text that `clean` has been over; `thousands` reads 1,234 as a number, else as two items."""
    return _Parser(tokenize(join_thousands(text) if thousands else text)).whole()


class _Parser(Atoms):
    def whole(self) -> Node:
        if not self.tokens:
            raise ParseError("empty")
        kinds = {kind if len(value) > 1 or kind != "sym" else "letter" for kind, value, _ in self.tokens}
        if "text" in kinds and kinds <= {"text", "letter", "sep"}:
            return ("text", " ".join(value for _, value, _ in self.tokens))
        while (self.kind() == "text" and words(self.value().lower()) <= LEAD_WORDS) or (
            self.at == 0 and self.op("=", "~")
        ):
            self.at += 1
            self.accept(":")
        node = self.items()
        if self.at < len(self.tokens):
            raise ParseError(f"unexpected {self.value()!r}")
        check_depth(node)
        return node

    def items(self) -> Node:
        """Items between commas, semicolons, and, or: a list when there is more than one."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise LimitError(f"nested deeper than {MAX_DEPTH}")
        groups: list[list[Node]] = [[]]
        separators: set[str] = set()
        while True:
            groups[-1].append(self.relation())
            separator = self.separator()
            if separator is None:
                break
            separators.add(separator)
            if separator == ";":
                groups.append([])
        self.depth -= 1
        if len(groups) > 1 and any(len(g) > 1 for g in groups):
            rows = [as_list(g, ",") if len(g) == 1 else ("tuple", tuple(g), "(", ")") for g in groups]
            return ("list", tuple(rows), ";")
        flat = [item for group in groups for item in group]
        return as_list(flat, "and" if separators == {"and"} else "or" if separators == {"or"} else ",")

    def separator(self) -> str | None:
        found = None
        while self.op(",", ";") or self.kind() == "sep" or (self.op("\\\\") and not self.bars):
            found = self.value() if found in (None, ",") else found
            self.at += 1
        if found is not None and (self.kind() == "end" or self.op(")", "]", "}", "\\}")):
            return None
        return found

    def relation(self) -> Node:
        terms, ops = [self.ratio()], []
        while self.kind() == "op" and self.value() in RELATION_OPS:
            op = self.value()
            self.at += 1
            if op == "!" and self.accept("="):
                op = "!="
            if op == "~" and (ops or not is_name(terms[0]) or terms[0][1] in CONSTANT_NAMES):
                self.ratio()
                continue
            ops.append("=" if op == "~" else op)
            terms.append(self.ratio())
        node = ("rel", tuple(terms), tuple(ops)) if ops else terms[0]
        return self.modulo(node)

    def modulo(self, node: Node) -> Node:
        """`(mod m)` behind a value or a congruence."""
        if self.kind() == "cmd" and self.value() == "pmod":
            self.at += 1
            return ("modulo", node, self.argument())
        if self.op("(") and self.before_mod():
            self.at += 2
            node = ("modulo", node, self.sum())
            self.expect(")")
        return node

    def before_mod(self) -> bool:
        return [token[1] for token in self.tokens[self.at + 1 : self.at + 2]] == ["mod"]

    def ratio(self) -> Node:
        terms = [self.sets()]
        while self.accept(":"):
            terms.append(self.sets())
        return ("ratio", tuple(terms)) if len(terms) > 1 else terms[0]

    def sets(self) -> Node:
        node = self.sum()
        names = {"cup": "union", "cap": "meet", "setminus": "minus"}
        while self.op(*names):
            name = names[self.value()]
            self.at += 1
            node = (name, node, self.sum())
        return node

    def sum(self) -> Node:
        terms: list[Node] = []
        signs = {"+": None, "-": "neg", "pm": "pm", "mp": "mp"}
        sign = None
        if self.op(*signs):
            sign = signs[self.value()]
            self.at += 1
        while True:
            term = self.term()
            terms.append(term if sign is None else (sign, term))
            if not self.op(*signs):
                break
            sign = signs[self.value()]
            self.at += 1
        node = ("add", tuple(terms)) if len(terms) > 1 else terms[0]
        if self.kind() == "cmd" and self.value() == "choose":
            self.at += 1
            return ("fn", "binom", (node, self.sum()))
        return node

    def term(self) -> Node:
        node = self.signed()
        while True:
            if self.accept("*"):
                node = product(node, self.signed())
            elif self.accept("/"):
                if not self.unit():
                    node = ("div", node, self.signed())
            elif self.accept("mod"):
                node = ("fn", "mod", (node, self.signed()))
            elif self.kind() == "text":
                self.unit()
            elif self.starts_factor():
                node = product(node, self.power())
            else:
                return node

    def unit(self) -> bool:
        """Words behind a value, with an exponent (cm^2): skipped, unless they take the value back."""
        if self.kind() != "text":
            return False
        while self.kind() == "text":
            if words(self.value().lower()) & DENIALS:
                raise ParseError(f"words that deny the value: {self.value()!r}")
            self.at += 1
            if self.accept("^"):
                self.argument()
        return True

    def signed(self) -> Node:
        if self.accept("-"):
            return ("neg", self.signed())
        if self.accept("+"):
            return self.signed()
        if self.accept("pm"):
            return ("pm", self.signed())
        return self.power()

    def starts_factor(self) -> bool:
        kind = self.kind()
        if kind in ("num", "sym", "func"):
            return True
        if kind == "cmd":
            return self.value() not in ("end", "rfloor", "rceil", "urcorner", "lrcorner", "choose", "pmod")
        if self.op("(") and self.before_mod():
            return False
        return self.op("(", "[", "{", "\\{", "langle") or (self.op("|") and not self.bars)

    def power(self) -> Node:
        node = self.postfix(self.atom())
        if self.accept("^"):
            if self.degrees():
                return self.postfix(self.angle(node))
            exponent = self.exponent()
            if node[0] == "sym" and self.accept("_"):
                node = ("sym", f"{node[1]}_{flat_name(self.argument())}")
            node = self.postfix(("pow", node, exponent))
        return node

    def angle(self, node: Node) -> Node:
        """A value before its degree sign; degrees of temperature (C, F) are a unit."""
        if self.kind() == "sym" and self.value() in ("C", "F"):
            self.at += 1
            return node
        return ("deg", node)

    def degrees(self) -> bool:
        if self.accept("deg"):
            return True
        inside = [t[1] for t in self.tokens[self.at : self.at + 3]]
        if inside == ["{", "deg", "}"]:
            self.at += 3
            return True
        return False

    def exponent(self) -> Node:
        if self.accept("-"):
            return ("neg", self.exponent())
        if self.accept("+"):
            return self.exponent()
        if self.op("{"):
            return self.argument()
        if self.accept("'"):
            return ("sym", "'")
        if self.kind() in ("num", "sym") and [token[1] for token in self.tokens[self.at + 1 : self.at + 2]] == ["_"]:
            return self.inner([self.taken()])
        node = self.postfix(self.atom())
        return ("pow", node, self.exponent()) if self.accept("^") else node

    def postfix(self, node: Node) -> Node:
        while True:
            if self.op("!") and not (self.at + 1 < len(self.tokens) and self.tokens[self.at + 1][1] == "="):
                self.at += 1
                node = ("fact", node)
            elif self.accept("%"):
                node = ("pct", node)
            elif self.accept("deg"):
                node = self.angle(node)
            else:
                return node
