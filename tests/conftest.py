"""Options and fixtures of all tests."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples on every run: a red test is red for everybody.
settings.register_profile("miniawq", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("miniawq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the tests marked with the fixture `device` run on")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fairytales() -> Path:
    """The demo model in bfloat16, before quantization."""
    return Path(__file__).parent / "data" / "fairytales"
