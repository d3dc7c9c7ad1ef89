"""Changes of valid files, byte by byte and field by field: what the fuzzer and Hypothesis draw from.

Each takes the content of a file and a `random.Random`, and returns another content. Hypothesis hands in one whose
choices it can shrink (`st.randoms`).
"""

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Place = tuple[Any, ...]

VALUES: tuple[Any, ...] = (
    None, True, False, "false", "", "x", "x" * 5000, [], [None], [[]], ["x"], {}, {"x": {}}, {"type": 1},
    {"content": 1}, 0, 1, 2, 3, 127, 128, -1, -0.5, 0.5, 1e-300, 1e300, 4096, 20_000, 2**31, 2**31 - 1, 2**53, 2**63,
    2**64, 10**400, "\ud800", "\x00", "\u202e", "../x", "/dev/zero", "F8_E4M3", "BOOL", "BF16", "linear", "yarn",
    "dynamic", "llama3", "gemv", "awq",
)  # fmt: skip
BYTES = (b"\x00", b"\xff", b'"', b"[", b"]", b"{", b"}", b":", b",", b"0", b"9", b"-", b"e", b"U", b"\\", b"\xed\xa0")
# Pieces of JSON that no value of Python is written as.
PIECES = ("NaN", "Infinity", "-0", "1e999", "1" * 5000, "[" * 200 + "]" * 200, '{"a":1,"a":2}', "tru", '"\\ud800"')
WORDS = (
    "{{ ", " }}", "{% ", " %}", "{# ", " #}", "{%- ", "-%}", "for x in messages", "endfor", "if ", "else", "endif",
    "set a = ", "macro f(x)", "endmacro", "call f(1)", "endcall", "filter upper", "endfilter", "generation",
    "endgeneration", "break", "continue", "messages", "[0]", ".content", "['role']", "loop.index", "namespace(a=1)",
    "range(99)", " | tojson", " | join", " | length", " | map(attribute='x')", " | select", " | sort", " | trim",
    " | batch(2)", "raise_exception('x')", "strftime_now('%Y')", "self", "()", "10 ** 9", " * ", " + ", " ~ ", "'x'",
    "[1, 2]", "{'a': 1}", ".__class__", ".format(1)", "%s", "not ", " in ", " is defined", " is mapping", "none", "\n",
)  # fmt: skip


def change_bytes(content: bytes, random: Random) -> bytes:
    """One byte replaced, or a piece left out, written twice, moved or put in."""
    place = random.randint(0, len(content))
    end = min(len(content), place + random.choice((1, 1, 2, 8, 64, 1 << 12)))
    match random.randint(0, 5):
        case 0:
            return content[:place] + bytes([random.randint(0, 255)]) + content[place + 1 :]
        case 1:
            return content[:place] + content[end:]
        case 2:
            return content[:end] + content[place:end] + content[end:]
        case 3:
            other = random.randint(0, len(content))
            return content[:other] + content[place:end] + content[other:]
        case 4:
            return content[:place]
    return content[:place] + random.choice(BYTES) + content[place:]


def change_words(content: bytes, random: Random) -> bytes:
    """A word of Jinja put in, or bytes changed."""
    if random.randint(0, 1):
        return change_bytes(content, random)
    place = random.randint(0, len(content))
    return content[:place] + random.choice(WORDS).encode() + content[place:]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """The path of every value in a JSON value, at most 50 of one list or object."""
    yield path
    items = [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    for key, inner in items[:50]:
        yield from places(inner, (*path, key))


def change_field(content: bytes, random: Random) -> bytes:
    """One value of a JSON file replaced, left out, renamed, moved, doubled or wrapped; bytes changed if it is none."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return change_bytes(content, random)
    path = random.choice([*places(whole)])
    if not path:
        return json.dumps(random.choice(VALUES)).encode()
    place = _inner(whole, path[:-1])
    key, value = path[-1], place[path[-1]]
    match random.randint(0, 7):
        case 0:
            del place[key]
        case 1:
            place[key] = copy.deepcopy(_inner(whole, random.choice([*places(whole)])))
        case 2:
            place[key] = random.choice(([value], {"x": value}, str(value), [value, value]))
        case 3 if isinstance(value, int | float):
            place[key] = random.choice((value + 1, value - 1, value * 2, value // 2, -value, 0.7))
        case 4 if isinstance(place, dict):
            place[random.choice(("x", str(key) + "_", str(key).upper(), *map(str, place)))] = place.pop(key)
        case 5:
            place[key] = "\0"
            return json.dumps(whole).encode().replace(b'"\\u0000"', random.choice(PIECES).encode())
        case _:
            place[key] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(whole, ensure_ascii=bool(random.randint(0, 1))).encode("utf-8", "surrogatepass")


def _inner(value: Any, path: Place) -> Any:
    for key in path:
        value = value[key]
    return value


def change_header(content: bytes, random: Random) -> bytes:
    """A field of a safetensors header changed, its length corrected; or bytes anywhere."""
    length = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + length], content[8 + length :]
    match random.randint(0, 5):
        case 0:
            return change_bytes(content, random)
        case 1:
            return content[:8] + change_bytes(header, random) + values
        case 2:
            return content[: 8 + length] + change_bytes(values, random)
    changed = change_field(header, random)
    return len(changed).to_bytes(8, "little") + changed + values


def change_of(name: str) -> Callable[[bytes, Random], bytes]:
    """How a file of this name is changed."""
    if name.endswith(".safetensors"):
        return change_header
    return change_words if name.endswith(".jinja") else change_text_of_json if name.endswith(".json") else change_bytes


def change_text_of_json(content: bytes, random: Random) -> bytes:
    """A field of a JSON file changed, or now and then its bytes."""
    return change_field(content, random) if random.randint(0, 3) else change_bytes(content, random)
