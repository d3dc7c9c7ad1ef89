"""The oracle: a property suite that tells any implementation of AWQ INT4 what it got wrong.

    python -m miniawq.oracle my_package.my_adapter          a report on a module, or on `module:object`
    test_conformance = conformance_tests(my_adapter)        the same checks, one test each, in a pytest file
    python -m miniawq.oracle --command './my_program'       the same checks on a program (`stdio`)

`contract.Target` is the specification. `truth` is a second definition of it, written apart from the rest of miniawq.
"""

from importlib.util import find_spec

from miniawq.errors import MissingExtra

for package in ("hypothesis", "pytest"):
    if find_spec(package) is None:
        raise MissingExtra(f"the oracle needs {package}", "it is not installed", "pip install 'miniawq[oracle]'")

from miniawq.oracle.contract import FLAGS, LEVELS, Limits, Target  # noqa: E402
from miniawq.oracle.door import conformance_tests, run_conformance  # noqa: E402

__all__ = ["FLAGS", "LEVELS", "Limits", "Target", "conformance_tests", "run_conformance"]
