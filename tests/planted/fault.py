"""A fault that can be planted in one file of the package, and the tests that must catch it."""

import ast
import re
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    r"""`pattern` occurs once in miniawq/`file`; `replacement` takes its place, with groups as \1; tests/`test` fails.

    A pattern is a short piece that says what the rule is, with `^` for the beginning of a line, so that it outlives a
    change of what stands around it.
    """

    file: str
    pattern: str
    replacement: str
    test: str

    def planted(self, package: Path) -> str:
        """The source of the file with the fault; ValueError where the pattern does not match once."""
        source = (package / self.file).read_text() if (package / self.file).exists() else ""
        changed, count = re.subn(self.pattern, self.replacement, source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"matches {count} times")
        if changed == source:
            raise ValueError("changes nothing")
        return changed

    def problem(self, package: Path, tests: Path) -> str:
        """Why it cannot be planted; empty if it can."""
        try:
            ast.parse(self.planted(package))
        except (ValueError, SyntaxError, re.error) as error:
            return str(error)
        return "" if (tests / f"{self.test}.py").exists() else f"there is no test file {self.test}"
