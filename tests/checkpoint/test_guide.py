"""docs/checkpoints.md stays honest."""

import json
import re

from miniawq.checkpoint.config import text_of
from miniawq.checkpoint.families import FAMILIES, TOWERS
from tests.helpers import MODELS, ROOT, TESTS
from tests.helpers.golden_models import NAMES


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


def test_every_family_has_golden_models_and_a_row():
    configs = [text_of(json.loads((MODELS / name / "config.json").read_text()), []) for name in NAMES]
    assert {config["architectures"][0] for config in configs} == FAMILIES.keys()
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", (ROOT / "docs" / "checkpoints.md").read_text(), re.MULTILINE)
    named = dict(rows)
    assert FAMILIES.keys() <= named.keys()
    assert {name for cell in named.values() for name in re.findall(r"\[([\w-]+)\]", cell)} <= {*NAMES}
    assert all(name in (ROOT / "docs" / "checkpoints.md").read_text() for name in TOWERS)
