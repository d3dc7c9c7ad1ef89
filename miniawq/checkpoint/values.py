"""Values of a JSON object, checked against a table: a line for each key with its type, its range and what it is."""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from miniawq.errors import UnsupportedCheckpoint

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


class Key(NamedTuple):
    """What may stand under a key: a value of `kind` from `low` to `high`, which means `meaning`."""

    kind: str
    meaning: str
    low: float = 1
    high: float = 1
    default: Any = None

    def takes(self, value: object) -> bool:
        """Whether the value is of the kind and in the range."""
        if self.kind in ("integer", "number"):
            types: Any = int if self.kind == "integer" else (int, float)
            return isinstance(value, types) and not isinstance(value, bool) and self.low <= value <= self.high
        if self.kind == "texts":
            return isinstance(value, list) and all(isinstance(text, str) for text in value)
        if self.kind == "numbers":
            return isinstance(value, list) and all(map(self._replace(kind="number").takes, value))
        return isinstance(value, {"flag": bool, "text": str, "object": Mapping}[self.kind])

    def __str__(self) -> str:
        if self.kind == "integer":
            return f"a positive integer up to {self.high}" if self.low == 1 else f"an integer from 0 to {self.high}"
        names = {"flag": "true or false", "text": "a text", "texts": "a list of texts", "object": "an object"}
        numbers = {"number": "a number", "numbers": "a list of numbers"}
        return names.get(self.kind) or f"{numbers[self.kind]} from {self.low:g} to {self.high:g}"


def checked_values(where: str, given: object, described: Mapping[str, Key]) -> dict[str, Any]:
    """The object with the defaults of absent keys; null counts as absent, and keys that are not described stay.

    UnsupportedCheckpoint on a value of another type or out of range, and on anything but an object.
    """
    if not isinstance(given, Mapping):
        name, _, key = where.partition(": ")
        refuse(key or "the whole file", given, "expected an object", name)
    values = dict(given)
    for key, description in described.items():
        value = values.get(key)
        if value is not None and not description.takes(value):
            refuse(key, value, f"expected {description}: {description.meaning}", where)
        value = description.default if value is None else value
        values[key] = float(value) if description.kind == "number" and value is not None else value
    return values


def refuse(key: str, value: object, why: str, where: str = "config.json") -> NoReturn:
    """Raise UnsupportedCheckpoint: this key asks for something that is not implemented, or makes no sense."""
    raise UnsupportedCheckpoint(
        f"this model's {where.partition(':')[0]} asks for something that is not implemented",
        f"{where}: {key} = {shown(value)}; {why}",
        "ignoring it would give wrong text; use another model, or an engine that supports this one",
    )


def shown(value: object) -> str:
    """A value for a message, cut if it is long."""
    return _short.repr(value)
