"""What runs inside the sandbox next to untrusted code, given to the interpreter with -c. Roles, the first argument:

call      one call of the program's function; argument, one JSON object on standard input: {"program", "function",
          "arguments"}; result, one JSON value on the original standard output.
program   loads the program and serves its names to the tests over the socket at descriptor 3.
tests     runs test code, in which the program's names stand for objects of the other process, and writes
          {"passed", "reason"} on the original standard output.

Tests and program share no memory. Plain values cross by value, exactly as their built-in type, so that no method of the
program's, `__eq__` least of all, takes part in a comparison; any other object stays with its owner and the tests
hold a Remote, which offers calls, attributes, len, indexing, iteration and str, and is equal to itself alone.
"""

import builtins
import ctypes
import importlib
import itertools
import json
import os
import sys

PR_SET_DUMPABLE = 4
MAX_MESSAGE = 1 << 22
MAX_ITEMS = 100_000


class ProgramGone(BaseException):
    """The program ended, or sent what no runner sends: not an Exception, so that no test code takes it for one."""


class RemoteError(Exception):
    """An exception of a type that the program defined."""


class Peer:
    """One end of the socket. Requests may cross: while one waits for its answer, it serves the other end's."""

    def __init__(self, descriptor: int, served: tuple[str, ...]) -> None:
        self.descriptor = descriptor
        self.reader = os.fdopen(descriptor, "rb", closefd=False)
        self.served = served
        self.objects: dict[int, object] = {}

    def send(self, message: object) -> None:
        data = json.dumps(message).encode() + b"\n"
        if len(data) > MAX_MESSAGE:
            raise OverflowError("a value too large to compare")
        while data:
            data = data[os.write(self.descriptor, data) :]

    def read(self) -> dict:
        line = self.reader.readline(MAX_MESSAGE + 1)
        if not line.endswith(b"\n"):
            raise ProgramGone
        return json.loads(line)

    def ask(self, what: str, *parts: object) -> object:
        """The other end's answer; raises the exception that it met."""
        self.send({"ask": what, "parts": [self.encode(part) for part in parts]})
        return self.answer(parts)

    def answer(self, parts: tuple = ()) -> object:
        while True:
            message = self.read()
            if "ask" in message:
                self.serve(message)
                continue
            if "raise" in message:
                raise exception(*message["raise"])
            for index, value in message["changed"]:
                refill(parts[1][index], self.decode(value))
            return self.decode(message["value"])

    def serve(self, message: dict) -> None:
        try:
            if message["ask"] not in self.served:
                raise PermissionError(f"{message['ask']} is not served here")
            parts = [self.decode(part) for part in message["parts"]]
            given = parts[1] if message["ask"] == "call" else []
            before = [self.copy(argument) for argument in given]
            value = self.encode(ACTIONS[message["ask"]](*parts))
            after = [self.copy(argument) for argument in given]
            changed = [[i, new] for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
            self.send({"value": value, "changed": changed})
        except Exception as error:  # noqa: BLE001 - it crosses to the other end and is raised there
            self.send({"raise": [type(error).__name__, str(error)[:1000]]})

    def copy(self, argument: object) -> object:
        return self.encode(argument) if type(argument) in REFILL else None

    def encode(self, value: object) -> object:
        if value is None or isinstance(value, bool):
            return value
        for kind, plain in PLAIN.items():
            if isinstance(value, kind):
                return plain(value)
        if isinstance(value, SEQUENCES):
            kind = next(kind for kind in SEQUENCES if isinstance(value, kind))
            return {kind.__name__: [self.encode(item) for item in kind.__iter__(value)]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]}
        if type(value) is Remote:
            return {"yours": value.__dict__["_number"]}
        self.objects[id(value)] = value
        return {"object": id(value), "type": type(value).__name__}

    def decode(self, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if "object" in value:
            return Remote(self, value["object"], value["type"])
        if "yours" in value:
            return self.objects[value["yours"]]
        if "dict" in value:
            return {self.decode(key): self.decode(item) for key, item in value["dict"]}
        ((kind, content),) = value.items()
        if kind in TEXTUAL:
            return TEXTUAL[kind](content)
        return NAMED[kind](self.decode(item) for item in content)


SEQUENCES = (list, tuple, set, frozenset)
NAMED = {kind.__name__: kind for kind in SEQUENCES}
PLAIN = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: {"bytes": bytes.hex(value)},
    bytearray: lambda value: {"bytearray": bytearray.hex(value)},
    complex: lambda value: {"complex": [value.real, value.imag]},
}
TEXTUAL = {"bytes": bytes.fromhex, "bytearray": bytearray.fromhex, "complex": lambda parts: complex(*parts)}


class Remote:
    """An object of the other process."""

    def __init__(self, peer: Peer, number: int, kind: str) -> None:
        self.__dict__.update(_peer=peer, _number=number, _kind=kind)

    def __call__(self, *positional, **named):
        return self._peer.ask("call", self, list(positional), named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("attribute", self, name)

    def __setattr__(self, name, value):
        self._peer.ask("set", self, name, value)

    def __len__(self):
        return self._peer.ask("length", self)

    def __bool__(self):
        return True

    def __getitem__(self, key):
        return self._peer.ask("item", self, key)

    def __setitem__(self, key, value):
        self._peer.ask("set item", self, key, value)

    def __iter__(self):
        return iter(self._peer.ask("items", self))

    def __next__(self):
        return self._peer.ask("next", self)

    def __str__(self):
        return self._peer.ask("text", self)

    def __repr__(self):
        return f"<{self._kind} of the program>"


def refill(argument: object, value: object) -> None:
    """Makes a list, dict or set that was changed in place over there the same here."""
    argument.clear()
    REFILL[type(argument)](argument, value)


def items(value: object) -> list:
    found = list(itertools.islice(value, MAX_ITEMS + 1))
    if len(found) > MAX_ITEMS:
        raise OverflowError(f"more than {MAX_ITEMS} items")
    return found


def exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
    return kind(text) if known else RemoteError(f"{name}: {text}")


REFILL = {list: list.extend, dict: dict.update, set: set.update}
ACTIONS = {
    "call": lambda target, positional, named: target(*positional, **named),
    "attribute": getattr,
    "set": setattr,
    "length": len,
    "item": lambda target, key: target[key],
    "set item": lambda target, key, value: target.__setitem__(key, value),
    "items": items,
    "next": next,
    "text": str,
}


def load(source: str) -> dict:
    namespace = {"__name__": "program", "__builtins__": builtins}
    exec(compile(source, "program", "exec"), namespace)
    return namespace


def serve_program() -> None:
    source = sys.stdin.read()
    peer = Peer(3, tuple(ACTIONS))
    wanted = peer.read()["names"]
    try:
        namespace = load(source)
        found = peer.encode({name: namespace[name] for name in wanted if name in namespace})
    except Exception as error:  # noqa: BLE001 - it crosses to the other end and is raised there
        peer.send({"raise": [type(error).__name__, str(error)[:1000]]})
        return
    peer.send({"value": found, "changed": []})
    while True:
        peer.serve(peer.read())


def run_tests() -> None:
    """The job: {"tests": code, "call": names of a function and of its arguments, or none, "names", "modules"}.

    names: what the tests take from the program. modules: what they use without importing it.
    """
    if ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0) != 0:
        raise OSError("prctl")
    report = private_output()
    job = json.loads(sys.stdin.read())
    peer = Peer(3, ("call",))
    peer.send({"names": job["names"]})
    try:
        program = peer.answer()
        namespace = {"__name__": "tests"} | {name: importlib.import_module(name) for name in job["modules"]}
        namespace |= {name: program[name] for name in job["names"] if name in program}
        exec(compile(job["tests"], "tests", "exec"), namespace)
        if job["call"]:
            function, *given = (namespace[name] for name in job["call"])
            function(*given)
        result = {"passed": True, "reason": ""}
    except ProgramGone:
        result = {"passed": False, "reason": "the program ended before its tests did"}
    except BaseException as error:  # noqa: BLE001 - whatever ends the tests fails them
        result = {"passed": False, "reason": f"{type(error).__name__}: {error}"[:300]}
    report.write(json.dumps(result))
    report.close()


def call_once() -> None:
    """Calls a function, or the method of a class Solution, and writes what it returns as JSON."""
    report = private_output()
    job = json.loads(sys.stdin.read())
    namespace = load(job["program"])
    function = namespace.get(job["function"])
    if function is None and "Solution" in namespace:
        function = getattr(namespace["Solution"](), job["function"], None)
    if function is None:
        raise NameError(f"no function {job['function']!r}, and no class Solution with one")
    report.write(json.dumps(function(*job["arguments"])))
    report.close()


def private_output():
    """The original standard output; what is printed from here on goes nowhere."""
    report = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    return report


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    {"call": call_once, "program": serve_program, "tests": run_tests}[sys.argv[1]]()
