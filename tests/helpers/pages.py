"""Running what pages show: a copy of the repository to run in, and commands as a reader types them."""

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from miniawq.__main__ import main
from tests.helpers import ROOT, TESTS

COPIED = ("miniawq", "scripts")  # a page may change these


def repository(folder: Path) -> Path:
    """The repository as a reader has it, with a `miniawq` that runs it."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").symlink_to(TESTS)
    program = folder / "bin" / "miniawq"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -m miniawq "$@"\n')
    program.chmod(0o755)
    return folder


def shell(commands: str, root: Path) -> tuple[int, str]:
    """The exit code of the last command, and what all have printed."""
    places = (root / "bin", Path(sys.executable).parent, os.environ["PATH"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join(map(str, places))
    run = subprocess.run(
        ["bash", "-c", commands], cwd=root, capture_output=True, text=True, env=environment, check=False
    )
    return run.returncode, run.stdout + run.stderr


RAN: dict[str, tuple[int, str, list[Path]]] = {}


def once(command: str, root: Path) -> tuple[int, str]:
    """The exit code and what was printed. A command of several pages runs for the first; others get what it made."""
    if command not in RAN:
        before = set(root.iterdir())
        code, printed = (in_this_process if command.startswith("miniawq ") else shell)(command, root)
        RAN[command] = code, printed, sorted(set(root.iterdir()) - before)
    code, printed, made = RAN[command]
    for path in made:
        if not (root / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, root / path.name)
    return code, printed


def in_this_process(command: str, root: Path) -> tuple[int, str]:
    """The same of one `miniawq` command, which may end in `> FILE`; to start a process for it takes seconds."""
    line, _, file = command.partition(" > ")
    with (
        contextlib.chdir(root),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main(shlex.split(line)[1:])
    if file:
        (root / file).write_text(out.getvalue())
    return code, out.getvalue() + err.getvalue()
