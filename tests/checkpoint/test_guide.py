"""docs/checkpoints.md stays honest."""

import re

from tests.helpers import ROOT, TESTS


def test_every_row_of_the_guide_names_a_test():
    """docs/checkpoints.md: each `test_...` in its tables is a function of the tests."""
    written = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in TESTS.rglob("test_*.py"))))
    named = set(re.findall(r"`(test_\w+)", (ROOT / "docs" / "checkpoints.md").read_text()))
    assert named
    assert named <= written


def test_every_path_in_the_guide_is_there():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    paths = re.findall(r"(?:miniawq|tests|scripts)/[\w/]+\.py", text)
    assert paths
    assert all((ROOT / path).is_file() for path in paths)
