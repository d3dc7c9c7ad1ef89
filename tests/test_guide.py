"""docs/checkpoints.md stays honest."""

import re
from pathlib import Path


def test_every_row_of_the_guide_names_a_test():
    """docs/checkpoints.md: each `test_...` in its tables is a function of this directory's tests."""
    tests = Path(__file__).parent
    written = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in tests.glob("test_*.py"))))
    named = set(re.findall(r"`(test_\w+)", (tests.parent / "docs" / "checkpoints.md").read_text()))
    assert named
    assert named <= written
