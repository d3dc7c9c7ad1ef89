"""What tests share: paths, and small things to test with."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
DATA = TESTS / "data"
MODELS = GOLDEN / "models"
