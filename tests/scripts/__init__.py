"""Tests of the programs in `scripts/`, which are no package."""

import importlib.util
import sys
from types import ModuleType

from tests.helpers import ROOT

SCRIPTS = ROOT / "scripts"


def script(name: str) -> ModuleType:
    """A program as a module, which may import its neighbours."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    specification = importlib.util.spec_from_file_location(name.replace("/", "_"), SCRIPTS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
