"""What words stand for: numbers, sets and values in plain English, and the units that an answer states."""

import re
from fractions import Fraction

from deltarl.rewards.math.nodes import Node

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBERS = {
    **{word: number for number, word in enumerate(ONES)},
    **{word: 20 + 10 * i for i, word in enumerate(TENS)},
    **{f"{ten}{ONES[k]}": 20 + 10 * i + k for i, ten in enumerate(TENS) for k in range(1, 10)},
    **{f"{ten}-{ONES[k]}": 20 + 10 * i + k for i, ten in enumerate(TENS) for k in range(1, 10)},
    "hundred": 100, "onehundred": 100, "onethousand": 1000, "onemillion": 10**6,
}  # fmt: skip
INFINITY: Node = ("sym", "oo")
MEANINGS: dict[str, Node] = {
    **{word: ("num", Fraction(number), 0) for word, number in NUMBERS.items()},
    **dict.fromkeys(("infinity", "positiveinfinity", "plusinfinity"), INFINITY),
    **dict.fromkeys(("negativeinfinity", "minusinfinity", "-infinity"), ("neg", INFINITY)),
    **dict.fromkeys(
        ("allrealnumbers", "allreals", "anyrealnumber", "realnumbers", "thesetofrealnumbers", "therealnumbers"),
        ("sym", "mathbbR"),
    ),
    **dict.fromkeys(
        ("nosolution", "nosolutions", "norealsolution", "norealsolutions", "norealroots", "emptyset", "theemptyset"),
        ("set", ()),
    ),
    **dict.fromkeys(("doesnotexist", "dne", "undefined", "notdefined"), ("text", "undefined")),
}
UNIT_NAMES = {
    "meter": "m meters metre metres", "second": "s seconds sec secs", "gram": "g grams", "hour": "h hours hr hrs",
    "liter": "L liters litre litres", "mm": "millimeter millimeters millimetre millimetres", "ft": "foot feet",
    "cm": "centimeter centimeters centimetre centimetres", "km": "kilometer kilometers kilometre kilometres",
    "inch": "inches", "yard": "yards yd", "mile": "miles mi", "kg": "kilogram kilograms", "mg": "milligram milligrams",
    "lb": "lbs", "oz": "ounce ounces", "minute": "minutes mins", "day": "days", "week": "weeks", "month": "months",
    "year": "years yr yrs", "dollar": "dollars usd", "cent": "cents", "euro": "euros eur", "mph": "", "kph": "",
    "degree": "degrees deg", "%": "percent pct percentage", "ml": "milliliter milliliters",
}  # fmt: skip
UNITS = {alias: unit for unit, aliases in UNIT_NAMES.items() for alias in (unit, *aliases.split())}
UNIT_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}|\\circ\b|%|\\\$|\u20ac")
LETTERS = r"(?P<unit>m|s|g|h|L|N|J|W|V|K|Hz|Pa)(?:\^\{?\d\}?)?(?:/(?:m|s|g|h|L)(?:\^\{?\d\}?)?)?"
AFTER_BLANK = re.compile(rf"(?P<value>[-+]?[\d.,/]+) {LETTERS}")
UPRIGHT = re.compile(
    rf"(?<=[\d}})])(?:\s|\\[,;: ]|~)*\\(?:text|textrm|mathrm|mbox|rm)\s*\{{ *{LETTERS} *\}}(?:\^\{{?\d\}}?)?$"
)
SIGNS = {"\\$": "dollar", "\u20ac": "euro", "\\circ": "degree"}


def meaning(words: str) -> Node | None:
    """The value that words without their blanks stand for."""
    return MEANINGS.get(words.casefold())


def without_letter_unit(text: str) -> tuple[str, str | None]:
    """The text and the unit of one letter behind its value, if any: a blank or upright type tells it from a name."""
    if upright := UPRIGHT.search(text):
        return text[: upright.start()], UNITS.get(upright["unit"], upright["unit"])
    if alone := AFTER_BLANK.fullmatch(text):
        return alone["value"], UNITS.get(alone["unit"], alone["unit"])
    return text, None


def units_in(text: str) -> frozenset[str]:
    """The units that a text states, one name for each however it is written."""
    found = (SIGNS.get(word) or UNITS.get(word.lower()) for word in UNIT_WORD.findall(text))
    return frozenset(unit for unit in found if unit)
