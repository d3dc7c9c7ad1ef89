"""Text from files and stdin."""

import sys
from pathlib import Path

from miniawq.errors import InvalidInput, NotFound


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of stdin for `-`. NotFound if it cannot be read, InvalidInput on other encodings."""
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()).decode()
    except OSError as error:
        raise NotFound(f"cannot read the text {path}", str(error), "check the path") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not text", f"it is not UTF-8: {error}", "convert it to UTF-8") from error
