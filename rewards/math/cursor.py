"""A place in a list of tokens."""

from deltarl.rewards.math.lexer import ParseError, Token


class Cursor:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    def value(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def op(self, *values: str) -> bool:
        if self.at >= len(self.tokens):
            return False
        kind, value, _ = self.tokens[self.at]
        return kind == "op" and value in values

    def accept(self, *values: str) -> bool:
        if self.at >= len(self.tokens):
            return False
        kind, value, _ = self.tokens[self.at]
        found = kind == "op" and value in values
        self.at += found
        return found

    def taken(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, *values: str) -> str:
        if not self.op(*values):
            raise ParseError(f"expected {values[0]!r}, found {self.value()!r}")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def braced_word(self) -> str:
        self.expect("{")
        word = ""
        while not self.accept("}"):
            if self.kind() == "end":
                raise ParseError("a brace is not closed")
            word += self.value()
            self.at += 1
        return word
