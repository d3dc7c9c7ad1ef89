"""Text from files and stdin."""

import sys
from pathlib import Path

from miniawq.errors import InvalidInput, NotFound

MAX_TEXT_BYTES = 1 << 30


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of stdin for `-`. NotFound if it cannot be read, InvalidInput on other encodings."""
    try:
        if str(path) == "-":
            found = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1) if sys.stdin else b""
        else:
            with open(path, "rb") as file:
                found = file.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL
        raise NotFound(f"cannot read the text {path}", str(error), "check the path") from error
    if len(found) > MAX_TEXT_BYTES:
        raise InvalidInput(f"{path} is too long", f"the limit is {MAX_TEXT_BYTES >> 20} MiB", "give it in parts")
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not text", f"it is not UTF-8: {error}", "convert it to UTF-8") from error
