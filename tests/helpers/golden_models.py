"""The models of `tests/golden/models`, for tests of one each."""

import pytest

from tests.helpers import MODELS

NAMES = sorted(path.name for path in MODELS.iterdir())
# They differ from others in nothing but names, biases and numbers, which their logits show.
LIKE_OTHERS = {
    *("ernie", "exaone4-full", "glm", "granite", "helium", "internlm3", "ministral", "ministral3"),
    *("mistral3-pictures", "phi3", "seed-oss", "seed-oss-biases", "smollm3"),
}
MOST_THOROUGHLY = [
    pytest.param(name, marks=pytest.mark.thorough) if name in LIKE_OTHERS else pytest.param(name) for name in NAMES
]
