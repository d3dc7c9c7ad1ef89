"""From the start of a process to the first token, with an empty and with a filled cache of artifacts, part by part.

    python scripts/random_checkpoint.py llama-3.1-8b /tmp/8b --int4 --device cuda
    python scripts/first_token.py /tmp/8b
    python scripts/first_token.py                            # the demo model

Each run is `python -m miniawq.generate --compile` in a fresh process, with clocks around its parts: seconds since the
process was started. On a GPU reading and arranging are counted as the host sees them; "weights" has waited for both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTED = "MINIAWQ_STARTED"


def child(flags: list[str]) -> None:
    """One run: the marks, the time spent in the parts of loading, and what `generate` says of itself."""
    sys.path.insert(0, str(ROOT))
    import torch

    marks, spent = {"torch imported": since_start()}, {"reading": 0.0, "arranging": 0.0}
    from miniawq import checkpoint, completion, generate
    from miniawq.kernel import QuantLinear

    marks["miniawq imported"] = since_start()

    def timed(owner, name, key):
        function = getattr(owner, name)

        def call(*arguments, **options):
            begun = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[key] += time.perf_counter() - begun

        setattr(owner, name, call)

    def marked(owner, name, *keys):
        function = getattr(owner, name)

        def call(*arguments, **options):
            result = function(*arguments, **options)
            if torch.cuda.is_available() and name == "load_model":
                torch.cuda.synchronize()
            for key in keys:
                marks.setdefault(key, since_start())
            return result

        setattr(owner, name, call)

    timed(checkpoint.Checkpoint, "read", "reading")
    timed(QuantLinear, "prepare", "arranging")
    marked(generate, "open_checkpoint", "checkpoint opened")
    marked(generate, "load_model", "weights loaded")
    marked(generate, "EagerStart", "step made")
    marked(completion, "sample", "first token")
    marked(completion.DecodeStep, "compile", "step compiled")
    marked(completion.DecodeStep, "step", "first compiled token")
    generate.main([*flags, "--compile", "--json"])
    print(json.dumps({"marks": marks, "spent": spent}))


def since_start() -> float:
    return time.time() - float(os.environ[STARTED])


def run(flags: list[str], cache: str) -> dict[str, float]:
    """A fresh process with this cache."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {"MINIAWQ_CACHE": cache, STARTED: str(time.time())}
    command = [sys.executable, __file__, "--child", *flags]
    lines = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return json.loads(lines[0]) | json.loads(lines[1]) | {"process_s": time.time() - float(environment[STARTED])}


def show(name: str, found: dict, weights: int) -> None:
    """A column of seconds."""
    print(f"\n{name}: {found['process_s']:.1f} s in all")
    before = 0.0
    for mark, seconds in sorted(found["marks"].items(), key=lambda item: item[1]):
        print(f"  {seconds:8.2f} s  {mark:22} {seconds - before:+8.2f}")
        before = seconds
    spent, loading = found["spent"], found["marks"]["weights loaded"] - found["marks"]["checkpoint opened"]
    print(f"  reading {spent['reading']:.2f} s, arranging {spent['arranging']:.2f} s")
    print(f"  {weights / 1e9 / loading:.2f} GB of weights a second, both together")
    print(f"  {found['prompt_tokens']} tokens of prompt in {found['first_token_s']:.3f} s")
    print(f"  {found['tokens_before_compiled']} tokens before the compiled step", end="")
    print(f", then {found['compiled_tps']:.1f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory (the demo)")
    parser.add_argument("--prompt", default="Once upon a time there was a king who had three daughters.")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--device", default="cuda if there is one")
    parser.add_argument("--warm-runs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write everything to")
    arguments = parser.parse_args()
    directory = Path(arguments.model) if arguments.model else ROOT / "miniawq" / "demo" / "fairytales-awq"
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    flags = [str(directory), "--prompt", arguments.prompt, "-n", str(arguments.new_tokens), "--greedy", "--ignore-eos"]
    flags += [] if " " in arguments.device else ["--device", arguments.device]
    print(f"{directory}: {weights / 1e9:.2f} GB", flush=True)
    everything = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", *(f"warm {number + 1}" for number in range(arguments.warm_runs))):
            everything[name] = run(flags, cache)
            show(name, everything[name], weights)
            if arguments.json:
                arguments.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
