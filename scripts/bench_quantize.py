"""Quantizing, converting and evaluating by the clock: where the time goes, memory beside its plan, the same choices.

    python scripts/bench_quantize.py --work /tmp/bench --out $OUT/quantize.json
    python scripts/bench_quantize.py --work /tmp/bench --out quantize.json --parts split,whole --device cuda
    python scripts/bench_quantize.py --shapes tiny --large tiny --device cpu --samples 4 --length 32 --work W --out O

Checkpoints of random weights are made in `--work`; those that later runs can use stay there (8B: 16 GB dense, 6 GB in
INT4; 30 GB at most at a time). The text is random ids, so of the choices only how far two ways of computing agree means
something. Parts, in this order; each prints what it finds and `--out` has it all:

    split     a few blocks, the device waited for around every step: seconds of each step
    whole     all blocks as users run them: seconds, memory beside the plan
    large     a few blocks of the large shapes, extrapolated to all of them
    choices   a few blocks and the demo model, in TF32 and in float32: which choices are the same
    convert   the result of `whole` to compressed-tensors, beside a plain copy of the same files
    evaluate  the dense model and the result of `whole`, streamed, beside plain reading of the same files
"""

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniawq import awq
from miniawq.checkpoint.background import Background
from miniawq.checkpoint.blocks import BlockStream
from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import Checkpoint, build_skeleton, open_checkpoint
from miniawq.commands.convert import convert_checkpoint
from miniawq.commands.evaluate import evaluate
from miniawq.packing import Quantized
from miniawq.quantize import factors, job, neighbours, recipes
from miniawq.quantize.calibration import Calibration, sample_calibration
from miniawq.quantize.job import Quantizer, Settings, quantize_checkpoint
from miniawq.quantize.memory import plan_memory
from miniawq.quantize.moments import SymmetricStatistics
from miniawq.quantize.recipes import RECIPES
from miniawq.quantize.report import QuantizationReport
from miniawq.quantize.streams import Streams
from miniawq.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tests" / "data" / "fairytales"
PARTS = ("split", "whole", "large", "choices", "convert", "evaluate")
# What is timed: where a function lives, its name, what its time is told as. Time in an inner one is not the outer's.
STEPS = [
    (BlockStream, "embed", "embedding"),
    (BlockStream, "_stored_block", "reading, in its thread"),
    (BlockStream, "block", "waiting for a block, moving it"),
    (Quantizer, "process", "everything else of a block"),
    (Quantizer, "advance", "forward passes"),
    (awq, "check_folds", "forward passes"),
    (SymmetricStatistics, "add", "statistics"),
    (factors, "search_coarse_to_fine", "factor search"),
    (awq, "apply_fold", "folding"),
    (awq, "quantize_layer", "rounding and losses"),
    (recipes, "independent_sides", "range search"),
    (Streams, "aims", "two streams"),
    (Streams, "follow", "two streams"),
    (recipes, "neighbouring_codes", "learned codes"),
    (neighbours, "prove_steps", "compiling and proving their steps"),
    (Quantizer, "_tensors", "packing and fetching"),
    (Background, "run", "waiting for the disk"),
    (job, "_write_block", "writing, in its thread"),
    (job, "_write_dense", "dense tensors"),
    (job, "verify", "verifying"),
]


class Stopwatch:
    """Seconds by step. The main thread waits for the device around each; other threads tell their own time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.local = device, Counter[str](), threading.local()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        stack: list[float] = self.local.__dict__.setdefault("stack", [])
        self.wait()
        started = time.perf_counter()
        stack.append(0.0)
        try:
            yield
        finally:
            self.wait()
            took = time.perf_counter() - started
            self.seconds[name] += took - stack.pop()
            if stack:
                stack[-1] += took

    def wait(self) -> None:
        if self.device.type == "cuda" and threading.current_thread() is threading.main_thread():
            torch.cuda.synchronize()

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.step(name):
                result = function(*arguments, **keywords)
                # A generator does its work when it is asked for it.
                return list(result) if isinstance(result, Iterator) else result

        return timed

    @contextmanager
    def on_all_steps(self) -> Iterator[None]:
        with ExitStack() as patches:
            for owner, name, told in STEPS:
                patches.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), told)))
            yield


class Bench:
    """The arguments, what has been found, and the checkpoints made so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device, self.work = arguments, torch.device(arguments.device), arguments.work
        self.found: dict[str, Any] = {"torch": torch.__version__, "device": self._device_name()}
        self.work.mkdir(parents=True, exist_ok=True)

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {os.cpu_count()} cores"

    def tell(self, part: str, **found: Any) -> None:
        self.found.setdefault(part, {}).update(found)
        self.arguments.out.write_text(json.dumps(self.found, indent=1))
        for name, value in found.items():
            print(f"{part:9} {name}: {_shown(value)}", flush=True)

    def dense(self, shapes: str, layers: int | None) -> Path:
        """A checkpoint of random weights, made unless it is there."""
        directory: Path = self.work / f"dense-{shapes}"
        if not directory.exists():
            started = time.perf_counter()
            command = [sys.executable, str(ROOT / "scripts" / "random_checkpoint.py"), shapes, str(directory)]
            command += ["--device", self.arguments.device, *(["--layers", str(layers)] if layers else [])]
            subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            seconds, size = time.perf_counter() - started, nbytes(directory)
            self.tell("make", **{shapes: {"seconds": seconds, "GB": size / 1e9, "GB/s": size / 1e9 / seconds}})
        return directory

    def small(self) -> Checkpoint:
        """The dense checkpoint that most parts work on."""
        return open_checkpoint(self.dense(self.arguments.shapes, self.arguments.layers))

    def text(self, checkpoint: Checkpoint, samples: int | None = None, length: int | None = None) -> torch.Tensor:
        shape = samples or self.arguments.samples, length or self.arguments.length
        generator = torch.Generator().manual_seed(0)
        return torch.randint(checkpoint.model_config.vocab_size, shape, generator=generator)

    def quantized(
        self, checkpoint: Checkpoint, directory: Path, device: str | None = None
    ) -> tuple[QuantizationReport, Any]:
        """Quantize; the report, and what the run took in time and memory."""
        shutil.rmtree(directory, ignore_errors=True)
        tokens_BL, where = self.text(checkpoint), torch.device(device or self.device)
        settings = Settings(RECIPES[self.arguments.recipe])
        plan = plan_memory(
            checkpoint, Quantizer(checkpoint, settings, where).folds, *tokens_BL.shape, settings.compared_tokens,
            where, False, settings.recipe.learns,
        )  # fmt: skip
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        calibration = Calibration(tokens_BL, "random ids", tokens_BL.numel())
        report = quantize_checkpoint(checkpoint, directory, calibration, settings, device=where)
        per_block = [block["seconds"] for block in report.blocks]
        taken = {
            "seconds": report.seconds,
            "blocks": per_block,
            "host GiB at most so far": report.peak_memory_bytes / 2**30,
        }
        if where.type == "cuda":
            taken |= {
                "planned GiB": sum(plan.device.values()) / 2**30,
                "allocated GiB": torch.cuda.max_memory_allocated() / 2**30,
                "reserved GiB": torch.cuda.max_memory_reserved() / 2**30,
            }
        return report, taken

    def split(self) -> None:
        """Once to warm up, once as it is, once with a stopwatch."""
        checkpoint = first_blocks(self.small(), self.arguments.few)
        for name in ("warming up", "not watched"):
            _, taken = self.quantized(checkpoint, self.work / "few")
            self.tell("split", **{name: taken})
        self.tell("split", watched=self._watched(checkpoint))

    def _watched(self, checkpoint: Checkpoint) -> dict[str, Any]:
        watch = Stopwatch(self.device)
        with watch.on_all_steps():
            report, _ = self.quantized(checkpoint, self.work / "few")
        shutil.rmtree(self.work / "few")
        return {"blocks": len(report.blocks), "seconds of all of them": dict(watch.seconds.most_common())}

    def whole(self) -> None:
        self.tell("whole", run=self.quantized(self.small(), self.work / "int4")[1])

    def large(self) -> None:
        shapes, layers = self.arguments.large, self.arguments.large_layers
        checkpoint = open_checkpoint(self.dense(shapes, layers))
        of_all = _config_of(shapes)["num_hidden_layers"]
        _, taken = self.quantized(checkpoint, self.work / "few")
        warm = taken["blocks"][1:]
        taken["all blocks, extrapolated, seconds"] = of_all * sum(warm) / len(warm)
        self.tell("large", run=taken)
        self.tell("large", watched=self._watched(checkpoint))
        if shapes != self.arguments.shapes:
            shutil.rmtree(self.work / f"dense-{shapes}")

    def choices(self) -> None:
        """TF32 beside float32, on a few blocks and on the demo model, which also goes by the CPU."""
        self._compare("random", first_blocks(self.small(), 2), ["float32"])
        demo = open_checkpoint(DEMO)
        text = sample_calibration(load_model(demo, dtype=torch.float32), Tokenizer(DEMO), 8, 256).tokens_BL
        with mock.patch.object(self, "text", return_value=text):
            self._compare("demo", demo, ["float32", "cpu"])

    def _compare(self, name: str, checkpoint: Checkpoint, others: list[str]) -> None:
        fast, taken = self.quantized(checkpoint, self.work / "fast")
        self.tell("choices", **{f"{name}, as it is": taken["blocks"]})
        for other in others:
            plain = mock.patch.object(job, "tensor_cores", nullcontext)
            with plain if other == "float32" else nullcontext():
                report, taken = self.quantized(checkpoint, self.work / other, "cpu" if other == "cpu" else None)
            agreement = compared(fast, report) | codes_compared(self.work / "fast", self.work / other)
            self.tell("choices", **{f"{name}, {other}": agreement | {"blocks": taken["blocks"]}})
            shutil.rmtree(self.work / other)
        shutil.rmtree(self.work / "fast")

    def convert(self) -> None:
        source = self.work / "int4"
        size = nbytes(source)
        for device in dict.fromkeys((self.arguments.device, "cpu")):
            report = convert_checkpoint(source, self.work / "ct", "compressed-tensors", device=device)
            self.tell("convert", **{f"on {device}": {"seconds": report.seconds, "GB/s": size / 1e9 / report.seconds}})
            shutil.rmtree(self.work / "ct")
        seconds = copied(source, self.work / "copy")
        self.tell("convert", copy={"seconds": seconds, "GB": size / 1e9, "GB/s": size / 1e9 / seconds})
        shutil.rmtree(self.work / "copy")

    def evaluate(self) -> None:
        for name, directory in (("int4", self.work / "int4"), ("dense", self.work / f"dense-{self.arguments.shapes}")):
            checkpoint, size = open_checkpoint(directory), nbytes(directory)
            reading = plainly_read(directory)
            for windows in (1, self.arguments.windows):
                tokens_BL = self.text(checkpoint, windows, self.arguments.window)
                started = time.perf_counter()
                scores = evaluate(checkpoint, tokens_BL, device=self.device)
                seconds = time.perf_counter() - started
                told = {"tokens": tokens_BL.numel(), "seconds": seconds, "GB/s": size / 1e9 / seconds}
                told |= {"plain reading, GB/s": size / 1e9 / reading, "loss": scores.mean_loss}
                self.tell("evaluate", **{f"{name}, {windows} windows": told})


def _config_of(shapes: str) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    from random_checkpoint import SHAPES

    return SHAPES[shapes]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n              {name:36} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(_shown(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def nbytes(directory: Path) -> int:
    """Of the weights in a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def first_blocks(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The same checkpoint as if it ended after some blocks."""

    def kept(entries: dict[str, Any]) -> dict[str, Any]:
        numbers = {name: re.match(r"model\.layers\.(\d+)\.", name) for name in entries}
        return {name: entries[name] for name, found in numbers.items() if not found or int(found[1]) < layers}

    config, tensors = checkpoint.config | {"num_hidden_layers": layers}, kept(checkpoint.tensors)
    model_config = llama_config(config)
    return replace(
        checkpoint,
        config=config,
        model_config=model_config,
        tensors=tensors,
        linears=kept(checkpoint.linears),
        skeleton=build_skeleton(model_config, tensors, {}),
    )


def compared(fast: QuantizationReport, plain: QuantizationReport) -> dict[str, Any]:
    """How many searches of factors ended alike, and what the fast one's choice loses by the plain one's measure."""
    pairs = [
        (one, other)
        for ours, theirs in zip(fast.blocks, plain.blocks, strict=True)
        for one, other in zip(ours["folds"], theirs["folds"], strict=True)
    ]
    same = sum((one["formula"], one["ratio"]) == (other["formula"], other["ratio"]) for one, other in pairs)
    regrets = []
    for one, other in pairs:
        lost = {(formula, ratio): loss for formula, ratio, loss in other["trials"]}
        # What the plain search did not try has only the fast one's measure.
        regrets.append(lost.get((one["formula"], one["ratio"]), one["loss"]) / other["loss"] - 1)
    return {"factor searches alike": f"{same} of {len(pairs)}", "loss of the fast choice above the best": regrets}


def codes_compared(first: Path, second: Path) -> dict[str, float]:
    """Shares of groups with the same scale and zero, and of weights with the same code."""
    one, other = open_checkpoint(first), open_checkpoint(second)
    grids, codes = [], []
    for name in one.quantized:
        ours, theirs = one.read_linear(name), other.read_linear(name)
        assert isinstance(ours, Quantized)
        assert isinstance(theirs, Quantized)
        alike_OG = (ours.scales_OG == theirs.scales_OG) & (ours.zeros_OG == theirs.zeros_OG)
        grids.append((int(alike_OG.sum()), alike_OG.numel()))
        codes.append((int((ours.codes_OI == theirs.codes_OI).sum()), ours.codes_OI.numel()))
    shares = {"groups alike": grids, "codes alike": codes}
    return {name: sum(a for a, _ in counts) / sum(b for _, b in counts) for name, counts in shares.items()}


def copied(source: Path, destination: Path) -> float:
    """Seconds to copy the weights until they are on the disk."""
    started = time.perf_counter()
    destination.mkdir()
    for path in source.glob("*.safetensors"):
        with open(path, "rb") as read, open(destination / path.name, "wb") as written:
            shutil.copyfileobj(read, written, 16 << 20)
            written.flush()
            os.fsync(written.fileno())
    return time.perf_counter() - started


def plainly_read(directory: Path) -> float:
    """Seconds to read the weights, from the system's cache where they are in it."""
    buffer, started = bytearray(16 << 20), time.perf_counter()
    for path in directory.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory on the disk that is measured")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parts", default=",".join(PARTS), help="which (default %(default)s)")
    parser.add_argument("--shapes", default="llama-3.1-8b", help="of random_checkpoint.py (default %(default)s)")
    parser.add_argument("--layers", type=int, help="of these shapes (default: all)")
    parser.add_argument("--large", default="llama-3.1-70b", help="the large shapes (default %(default)s)")
    parser.add_argument("--large-layers", type=int, default=3, help="blocks of them (default %(default)s)")
    parser.add_argument("--few", type=int, default=3, help="blocks of `split` (default %(default)s)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="of `evaluate` (default %(default)s)")
    parser.add_argument("--window", type=int, default=2048, help="tokens of one (default %(default)s)")
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    asked = arguments.parts.split(",")
    if unknown := set(asked) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    started = time.perf_counter()
    for part in PARTS:
        if part in asked:
            getattr(bench, part)()
            bench.tell("script", **{f"seconds after {part}": time.perf_counter() - started})


if __name__ == "__main__":
    main()
