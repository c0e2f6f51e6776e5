"""A pickle as data: what it would build, without building it.

A pickle is a program, and Python's own reader runs it. Here its opcodes are interpreted with containers and constants
alone: the name of a class or function becomes a `Named`, a call of one a `Made` that keeps its arguments and state.
Nothing is looked up, imported or called, so a hostile pickle can do no more than be refused. torch is not needed.

Cost: 2 µs an opcode. Memory goes with the bytes that are read, which the caller bounds; lengths that a pickle declares
are read from those bytes and no further.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

ARGUMENT_IS_VALUE = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
DICTIONARIES = frozenset({"collections.OrderedDict", "collections.defaultdict"})  # read as what they hold
SETS = frozenset({"builtins.set", "__builtin__.set", "builtins.frozenset"})
NOTHING = frozenset({"PROTO", "FRAME"})


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names, `module.name`."""

    name: str


@dataclass(eq=False)
class Made:
    """What a call would have made: the name of what is called, its arguments, and the state that was set on it."""

    of: str
    arguments: tuple[Any, ...]
    state: Any = None


class Unpickled:
    """One pickle's object, and every name that occurs in it. `persistent` makes of an id what stands for it."""

    def __init__(self, file: BytesIO, persistent: Callable[[Any], Any]) -> None:
        self.names: set[str] = set()
        self._persistent = persistent
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self.value = self._run(file)

    def _run(self, file: BytesIO) -> Any:
        """Raises ValueError (of which UnicodeDecodeError is one), IndexError, KeyError or TypeError when damaged."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in ARGUMENT_IS_VALUE:
            stack.append(argument)
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in EMPTY:
            stack.append(EMPTY[opcode]())
        elif opcode in FIXED_TUPLES:
            n = FIXED_TUPLES[opcode]
            if len(stack) < n:
                raise ValueError("the pickle takes more than it made")
            stack[-n:] = [tuple(stack[-n:])]
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode not in NOTHING:
            method = getattr(self, f"_{opcode.lower()}", None)
            if method is None:
                raise ValueError(f"the pickle uses {opcode}, which no file of weights does")
            method(argument)

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _pop_mark(self, _: Any) -> None:
        self._marked()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _tuple(self, _: Any) -> None:
        items = self._marked()
        self._stack.append(tuple(items))

    def _list(self, _: Any) -> None:
        items = self._marked()
        self._stack.append(items)

    def _dict(self, _: Any) -> None:
        items = self._marked()
        self._stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _frozenset(self, _: Any) -> None:
        items = self._marked()
        self._stack.append(frozenset(items))

    def _append(self, _: Any) -> None:
        item = self._stack.pop()
        self._extend([item])

    def _appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)
        elif not isinstance(self._stack[-1], Made):  # a subclass of list, whose items nobody asks for
            raise ValueError("the pickle appends to what is no list")

    def _setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], dict):
            self._stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(self._stack[-1], Made):
            raise ValueError("the pickle sets items of what is no dictionary")

    def _additems(self, _: Any) -> None:
        items = self._marked()
        if isinstance(self._stack[-1], set):
            self._stack[-1].update(items)

    def _named(self, module: Any, name: Any) -> Named:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("the pickle names a class by what is no text")
        named = Named(f"{module}.{name}")
        self.names.add(named.name)
        return named

    def _global(self, argument: str) -> None:
        self._stack.append(self._named(*argument.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._named(module, name))

    def _reduce(self, _: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        self._call(called, arguments)

    def _newobj(self, _: Any) -> None:
        self._reduce(None)

    def _newobj_ex(self, _: Any) -> None:
        self._stack.pop()  # keywords
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        items = self._marked()
        self._call(self._named(*argument.split(" ", 1)), tuple(items))

    def _obj(self, _: Any) -> None:
        called, *arguments = self._marked()
        self._call(called, tuple(arguments))

    def _call(self, called: Any, arguments: Any) -> None:
        if not isinstance(called, Named) or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls what is no name")
        if called.name in DICTIONARIES:
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            self._stack.append(dict(pairs))
        elif called.name in SETS:
            self._stack.append(set(*arguments))
        else:
            self._stack.append(Made(called.name, arguments))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Made):
            self._stack[-1].state = state

    def _persid(self, argument: str) -> None:
        self._stack.append(self._persistent(argument))

    def _binpersid(self, _: Any) -> None:
        self._stack.append(self._persistent(self._stack.pop()))
