"""The models of `tests/golden/models`, for tests of one each."""

from tests.helpers import MODELS
from tests.helpers.marks import thorough_but

NAMES = sorted(path.name for path in MODELS.iterdir())
# They differ from others in nothing but names, biases and numbers, which their logits show.
LIKE_OTHERS = {
    *("ernie", "exaone4-full", "glm", "granite", "helium", "internlm3", "ministral"),
    *("mistral3-pictures", "phi3", "seed-oss", "seed-oss-biases", "smollm3"),
}


MOST_THOROUGHLY = thorough_but({*NAMES} - LIKE_OTHERS, NAMES)
ONE_OF_EACH_FOLD = thorough_but(("llama", "qwen3", "granite4", "phi3-long", "glm4", "olmo2", "gemma3"), NAMES)
