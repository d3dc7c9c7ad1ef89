"""Options and fixtures of all tests."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.helpers import DATA

# Started in the background, a shell has us ignore Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples on every run: a red test is red for everybody.
settings.register_profile("miniawq", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("miniawq")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="run the tests with the fixture `device`, and no others, on this")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What compiles comes first: one process then proves the forms for all of it, and none of it is left for the end.
    On another device than the CPU, only what depends on it.
    """
    items.sort(key=lambda item: item.get_closest_marker("compiles") is None)
    if config.getoption("--device") != "cpu":
        config.hook.pytest_deselected(items=[item for item in items if not takes_device(item)])
        items[:] = [item for item in items if takes_device(item)]


def takes_device(item: pytest.Item) -> bool:
    return "device" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


@pytest.fixture(autouse=True)
def the_same_on_every_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that does not take the device must not find a GPU, where the command line would compile."""
    if not takes_device(request.node):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The seed of a CPU alone takes no time; `torch.manual_seed` keeps the stack for the devices that may come."""
    (torch.manual_seed if takes_device(request.node) else torch.default_generator.manual_seed)(0)


@pytest.fixture(scope="session")
def fairytales() -> Path:
    """The demo model in bfloat16, before quantization."""
    return DATA / "fairytales"
