"""The models of `tests/golden/models`, for tests of one each."""

from collections.abc import Collection
from typing import Any

import pytest

from tests.helpers import MODELS

NAMES = sorted(path.name for path in MODELS.iterdir())
# They differ from others in nothing but names, biases and numbers, which their logits show.
LIKE_OTHERS = {
    *("ernie", "exaone4-full", "glm", "granite", "helium", "internlm3", "ministral"),
    *("mistral3-pictures", "phi3", "seed-oss", "seed-oss-biases", "smollm3"),
}


def thorough_but(quick: Collection[str]) -> list[Any]:
    """All names; tests of those that are not quick run thoroughly only."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in NAMES]


MOST_THOROUGHLY = thorough_but({*NAMES} - LIKE_OTHERS)
ONE_OF_EACH_FOLD = thorough_but(("llama", "qwen3", "granite4", "phi3-long", "glm4", "olmo2", "gemma3"))
