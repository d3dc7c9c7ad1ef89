"""Read changed files until time is over, and count what comes. Linux, with `pip install -e ".[fuzz]"`: `make fuzz`.

    python scripts/fuzz.py --minutes 10                    # every reader, and whole directories
    python scripts/fuzz.py --minutes 2 --only header index # some of them
    python scripts/fuzz.py --minutes 60 --page docs/reliability.md

Each reader runs in a process of its own under atheris, which keeps the inputs that reach new lines of our code;
directories are drawn by Hypothesis. `tests/reliability/` says what is read and how it is changed, and holds the corpus.
What escapes is kept where the end of the output says: put it into the corpus when it is mended. Exit code 1 if anything
escaped or hung.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.reliability.outcomes import KINDS, Counts, Tally
from tests.reliability.page import table, write_table
from tests.reliability.readers import READERS, corpus

ROOT = Path(__file__).resolve().parents[1]
DIRECTORIES = "directories"
# Parts of the time: what is slow, or has much behind it, takes more.
PARTS = dict.fromkeys(READERS, 2) | {"tokenizer": 3, "template": 3, DIRECTORIES: 6}
INPUT_BYTES, INPUT_SECONDS, PROCESS_MEGABYTES = 1 << 16, 30, 4096  # beyond which libFuzzer ends a process


def fuzz(name: str, seconds: float, seed: int, work: Path) -> Counts:
    """Run one part for so long, again and again if its process ends, which it does when an input kills it."""
    found, kept = work / name / "found", work / name / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    kept.mkdir(exist_ok=True)
    if name != DIRECTORIES:
        for number, content in enumerate(corpus(name)):
            (kept / f"seed-{number}").write_bytes(content)
    tally = Tally(work / name / "tally")
    until = time.monotonic() + seconds
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with open(work / name / "log", "ab") as log, tempfile.TemporaryDirectory(dir=memory) as scratch:
        environment = os.environ | {"TMPDIR": scratch}
        while (left := until - time.monotonic()) > 1:
            before, line = tally.counts.tried, command(name, left, seed, work / name)
            ended = subprocess.run(line, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
            if tally.counts.tried == before:
                raise SystemExit(f"{name} does not start (exit code {ended.returncode}): see {work / name / 'log'}")
            seed += 1
    counts = tally.counts
    slow, died = len([*found.glob("timeout-*")]), counts.tried - sum(counts[1:])
    return counts._replace(hung=counts.hung + slow, escaped=counts.escaped + max(0, died - slow))


def command(name: str, seconds: float, seed: int, work: Path) -> list[str]:
    """The command line of the process of one part."""
    places = [str(work / "tally"), str(work / "found")]
    if name == DIRECTORIES:
        return [sys.executable, "-m", "tests.reliability.searching", str(seed), *places, str(seconds)]
    limits = {
        "max_total_time": max(1, int(seconds)),
        "max_len": INPUT_BYTES,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": PROCESS_MEGABYTES,
        "artifact_prefix": f"{places[1]}/",
        "print_final_stats": 1,
    }
    options = [f"-{key}={value}" for key, value in limits.items()]
    return [sys.executable, "-m", "tests.reliability.fuzzing", name, str(seed), *places, *options, str(work / "corpus")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of all parts together (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    parser.add_argument("--work", type=Path, help="keep there what is found, and the corpora that grew")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    arguments = parser.parse_args()
    share = 60 * arguments.minutes / sum(PARTS[name] for name in arguments.only)
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="miniawq-fuzz-"))).absolute()
    rows = {}
    for name in (bar := tqdm(arguments.only, unit="part", disable=None)):
        bar.set_postfix_str(name)
        rows[name] = fuzz(name, share * PARTS[name], arguments.seed, work)
    text = table("reader", KINDS, rows)
    print(text)
    if arguments.page:
        write_table(arguments.page, "fuzz", text)
    for path in sorted(work.glob("*/found/*")):
        print(f"\n{path}" if path.suffix != ".txt" else path.read_text()[-1500:])
    is_bad = any(counts.hung or counts.escaped for counts in rows.values())
    if not is_bad and not arguments.work:
        shutil.rmtree(work)
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
