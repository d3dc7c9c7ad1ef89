"""Plant each fault of `tests/planted/` in a copy of the project and show the test that catches it.

    python scripts/planted_faults.py                        # hours
    python scripts/planted_faults.py packing awq            # the faults of these rooms
    python scripts/planted_faults.py engine --file sampling # those of a room whose file has this in its name

A fault that no test catches is an error: then a rule of this project stands untested.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.planted import ROOMS
from tests.planted.fault import Fault

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("miniawq", "tests")  # whose files know where they are; the rest is linked
LEFT_OUT = (".git", ".venv")
SECONDS = 600  # after which a test is said to hang


def copied(folder: Path) -> None:
    """The project in another folder."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name not in LEFT_OUT:
            (folder / path.name).symlink_to(path)


def first_failure(copy: Path, test: str) -> str:
    """The name of the first test that fails or hangs, or nothing."""
    command = [sys.executable, "-m", "pytest", f"tests/{test}.py", "-x", "--no-header", "-p", "no:cacheprovider"]
    command += ["-o", f"faulthandler_timeout={SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, check=False)
    if hanging := re.search(r"^Timeout \(.*? in (test_\w+)$", run.stderr, re.MULTILINE | re.DOTALL):
        return f"{hanging.group(1)} hangs"
    found = re.search(r"^(?:FAILED|ERROR) tests/\S+?(?:::(\S+)|$)", run.stdout, re.MULTILINE)
    return "" if run.returncode == 0 else (found.group(1) or "import" if found else "crash")


def caught(fault: Fault, copy: Path) -> str:
    """What catches a fault, or nothing; the copy is as before afterwards."""
    target = copy / "miniawq" / fault.file
    before = target.read_text()
    target.write_text(fault.planted(copy / "miniawq"))
    try:
        return first_failure(copy, fault.test)
    finally:
        target.write_text(before)


def main() -> int:
    """Exit code 1 if a fault is not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"some of {', '.join(ROOMS)} (all)")
    parser.add_argument("--file", default="", help="only files whose path has this in it")
    arguments = parser.parse_args()
    if unknown := set(arguments.rooms) - ROOMS.keys():
        parser.error(f"no room {', '.join(sorted(unknown))}; there are {', '.join(ROOMS)}")
    chosen = [fault for room in arguments.rooms or ROOMS for fault in ROOMS[room] if arguments.file in fault.file]
    # Whoever is started in the background may have Ctrl-C ignored, and so would the tests of it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        before = {test: first_failure(Path(folder), test) for test in sorted({fault.test for fault in chosen})}
        for fault in chosen:
            if problem := fault.problem(Path(folder) / "miniawq", Path(folder) / "tests"):
                by = f"STALE: {problem}"
            elif before[fault.test]:
                by = f"CANNOT TELL: without it fails {before[fault.test]}"
            else:
                by = caught(fault, Path(folder)) or "NOT CAUGHT"
            missed += by.startswith(("STALE", "CANNOT TELL", "NOT CAUGHT"))
            shown = " ".join(fault.replacement.split())[:50] or "nothing"
            print(f"{fault.file:28} {fault.pattern[:50]:50} {shown:50} {by}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
