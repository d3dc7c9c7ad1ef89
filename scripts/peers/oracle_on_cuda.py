"""The product of humming, of gemlite and of miniawq's own forms, eager and compiled, through the oracle on a CUDA GPU.

    python scripts/peers/oracle_on_cuda.py [TARGET ...] --seconds 150 --out DIR

Every shape is another kernel to compile, so the checks are spread over all cores, those over a covering array in parts,
and what is not done after --seconds is left out and said. DIR gets one JSON of all results. Adapters of peers stand in
`adapters/`. `--device cpu` tries our own forms without a GPU.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# One compiler for each process: there are as many processes as cores.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "HUMMING_MAX_PARALLEL_BUILD_WORKERS": "1", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402

from miniawq.oracle.check import PROFILES, Check, failure, run_check, settings_of  # noqa: E402
from miniawq.oracle.door import CHECKS  # noqa: E402
from miniawq.oracle.paste import describe_call  # noqa: E402
from miniawq.oracle.subject import Broken, Subject  # noqa: E402

PARTS = 12  # of a check over a covering array
# Compiled forms are built anew for each shape and dtype: the checks that ask for few.
FEW_SHAPES = ("shape-and-dtype", "bias", "one-hot", "group-sizes", "past-tiles", "leading-dimensions", "corners",
              "long-sums", "result-rounding", "special-inputs", "state")  # fmt: skip
PEERS = ("humming", "gemlite")
TARGETS = ("miniawq", "forms-eager", "forms-compiled", *PEERS)
# What a peer does not refuse it may read from beyond a tensor, which can cost the process its GPU: one process each.
RISKY = ("refuses", "dtypes", "integer")
Task = tuple[str, str, int, int, str]  # target, id of the check, part, of parts, device


@cache
def target_of(name: str) -> Any:
    """The target, imported once in a process."""
    torch.set_num_threads(1)
    if name.startswith("forms"):
        forms = importlib.import_module("tests.oracle.test_forms").OneProduct(name == "forms-compiled")
        forms.dtypes = ("bfloat16", "float16", "float32")
        return forms
    return importlib.import_module({"miniawq": "miniawq.oracle.target"}.get(name, f"scripts.peers.adapters.{name}"))


def checks_of(name: str) -> list[Check]:
    """The checks of a target: all of ours, those of the product for the others."""
    if name == "miniawq":
        return [check for check in CHECKS if check.level != "L4"]
    if name.startswith("forms"):
        checks = importlib.import_module("tests.oracle.test_forms").PRODUCT_CHECKS
        return [c for c in checks if name == "forms-eager" or c.id.removeprefix("L3.") in FEW_SHAPES]
    return [check for check in CHECKS if check.level == "L3"]


def tasks_of(name: str, device: str) -> Iterator[Task]:
    """One task for each check, or for each part of one."""
    for check in checks_of(name):
        parts = PARTS if check.over and name != "miniawq" else 1
        yield from ((name, check.id, part, parts, device) for part in range(parts))


def done(task: Task) -> dict[str, Any]:
    """What comes of a task."""
    name, id, part, parts, device = task
    check, started = next(check for check in CHECKS if check.id == id), time.monotonic()
    record = {"target": name, "id": id, "part": part, "parts": parts, "status": "passed"}
    try:
        subject = Subject(target_of(name), device)
        if parts == 1:
            result = run_check(check, subject, PROFILES["default"])
            record |= {"status": result.status, "reason": result.reason}
            broken = result.broken
        else:
            broken = first_broken(check, subject, part, parts)
        if broken:
            call = describe_call(broken.call) if broken.call else ""
            record |= {"status": "failed", "expected": broken.expected, "got": broken.got, "call": call,
                       "setting": {name: str(level) for name, level in broken.setting.items()}}  # fmt: skip
    except Exception as error:  # the target cannot be imported, or the GPU is gone
        record |= {"status": "error", "reason": f"{type(error).__name__}: {str(error)[:400]}"}
    return record | {"seconds": round(time.monotonic() - started, 1)}


def first_broken(check: Check, subject: Subject, part: int, parts: int) -> Broken | None:
    """The first failure in every so-manieth setting of a covering array."""
    assert check.over is not None
    factors = check.over(subject.limits)
    if not all(factors.values()):
        return None
    settings = settings_of(check, factors, PROFILES["default"])[part::parts]
    return next((broken for setting in settings if (broken := failure(check, subject, setting))), None)


def collected(tasks: list[Task], tasks_of_a_process: int | None, until: float) -> list[dict[str, Any]]:
    """What comes of tasks before a time, on all cores."""
    records: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=tasks_of_a_process) as pool:
        results = pool.imap_unordered(done, tasks)
        try:
            while len(records) < len(tasks):
                records.append(results.next(timeout=max(0.1, until - time.monotonic())))
        except multiprocessing.TimeoutError:
            pool.terminate()
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=150, help="for all of it (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("."), help="where oracle-on-cuda.json goes (.)")
    parser.add_argument("--skip", metavar="TEXT", help="leave out checks whose id contains this, such as refuses")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    names = arguments.targets or list(TARGETS)
    by_target = [
        [task for task in tasks_of(name, arguments.device) if not arguments.skip or arguments.skip not in task[1]]
        for name in names
    ]
    longest = max(map(len, by_target))
    tasks = [tasks[i] for i in range(longest) for tasks in by_target if i < len(tasks)]  # each target gets its share
    risky = [task for task in tasks if task[0] in PEERS and any(word in task[1] for word in RISKY)]
    records = collected([task for task in tasks if task not in risky], None, end - arguments.seconds / 4)
    records += collected(risky, 1, end)
    print(f"{len(tasks) - len(records)} of {len(tasks)} tasks were not done in {arguments.seconds:.0f} s")
    (arguments.out / "oracle-on-cuda.json").write_text(json.dumps(records, indent=1))
    for name in names:
        tell(name, [task for task in tasks if task[0] == name], [r for r in records if r["target"] == name])
    return 0


def tell(name: str, tasks: list[Task], records: list[dict[str, Any]]) -> None:
    """One line for a target, then its failures and what was not reached."""
    by_check: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_check[record["id"]].append(record)
    failed = {id: next(r for r in found if r["status"] in ("failed", "error")) for id, found in by_check.items()
              if any(r["status"] in ("failed", "error") for r in found)}  # fmt: skip
    whole = {id for id, found in by_check.items() if len(found) == found[0]["parts"]}
    skipped = {id for id, found in by_check.items() if any(r["status"] == "skipped" for r in found)}
    asked = dict.fromkeys(task[1] for task in tasks)
    passed = whole - set(failed) - skipped
    print(f"{name}: {len(passed)} passed, {len(failed)} failed, {len(skipped - set(failed))} skipped, "
          f"{len(set(asked) - whole - set(failed))} not done, of {len(asked)}")  # fmt: skip
    for id, record in failed.items():
        told = record.get("reason") or f"expected {record['expected']}; got {record['got']}"
        print(f"  {id}: {record.get('call', '')} {record.get('setting', '')} {told}")
    for id in asked:
        if id not in whole and id not in failed:
            print(f"  not done: {id}, {len(by_check[id])} parts of it passed")


if __name__ == "__main__":
    sys.exit(main())
