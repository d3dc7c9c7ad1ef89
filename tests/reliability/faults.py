"""Runs of quantize and convert that are killed, starved, or in each other's way: what is left, and what comes of it.

After each fault the destination either does not open or is the whole checkpoint, byte for byte; and the same command,
given again, makes the whole one.
"""

import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import psutil

from miniawq.checkpoint.opening import open_checkpoint
from miniawq.errors import MiniawqError
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers import tiny_tokenizers
from tests.helpers.quantizing import contents
from tests.reliability.processes import Ended, Run, mount, unmount

try:
    import resource
except ImportError:  # Windows, where only the names of the faults are read
    resource = None  # type: ignore[assignment]

KINDS = ("tried", "done", "refused", "ended", "hung", "escaped", "lost")
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 420, "num_hidden_layers": 3}
CHAT = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
WRITING = ("quantize", "convert")
VERBS = (*WRITING, "generate", "evaluate", "plan")


class Verdict(NamedTuple):
    """What came of one fault: a kind of KINDS, and what to look at if it is a bad one."""

    kind: str
    told: str = ""


class Arena:
    """A dense and an INT4 checkpoint, a text, and what quantize and convert make of them when nothing is in the way."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.text = directory / "text.txt"
        self.text.write_text("Once upon a time there was a king who had three sons. " * 40)
        self.models = {"dense": directory / "dense", "int4": directory / "int4"}
        tiny.make_dense(self.models["dense"], **SHAPE)
        tiny.make(self.models["int4"], changes=SHAPE)
        for path in self.models.values():
            tiny_tokenizers.write(path, tiny_tokenizers.byte_level(), tokenizer_config=CHAT)
        self.disk = directory / "disk"
        self.disk.mkdir()
        self.whole, self.seconds = {}, {}
        for verb in WRITING:
            out = directory / f"whole-{verb}" / "out"
            started = time.monotonic()
            ended = self.run(verb, out).wait()
            assert ended.code == 0, ended.err
            self.seconds[verb] = time.monotonic() - started
            self.whole[verb] = files_of(out)

    def run(self, verb: str, out: Path | None = None, setup: Callable[[], None] = lambda: None) -> Run:
        """Start a verb; `out` is where quantize and convert write."""
        paths = self.models
        commands: dict[str, list[str | Path | None]] = {
            "quantize": [
                paths["dense"], out, "--calib", self.text, "--num-samples", "4", "--sequence-length", "16",
                "--group-size", "64", "--shard-gigabytes", "0.0001",
            ],
            "convert": [paths["int4"], out, "--format", "compressed-tensors"],
            "generate": [paths["int4"], "--prompt", "Once", "-n", "4"],
            "evaluate": [paths["int4"], "--text", self.text, "--sequence-length", "16"],
            "plan": [paths["int4"]],
        }  # fmt: skip
        log = self.directory / f"log-{time.monotonic_ns()}"
        return Run([verb, *(word for word in commands[verb] if word is not None)], log, setup)

    def fresh(self) -> Path:
        """A destination in a new directory."""
        place = self.directory / f"at-{time.monotonic_ns()}"
        place.mkdir()
        return place / "out"

    def moment(self, verb: str, random: Random) -> float:
        """A time within a run of this verb, or just after it."""
        return random.random() * 1.2 * self.seconds[verb]

    def judged(self, ended: Ended, verb: str, out: Path, may_be_gone: bool = False) -> Verdict:
        """What came of a run, after which the same command must make the whole checkpoint."""
        if (verdict := verdict_of(ended, verb)).told:
            return verdict
        before = self.state(verb, out)
        if before == "wrong":
            other = sorted(set(files_of(out)) ^ set(self.whole[verb])) or "bytes"
            return Verdict("lost", f"{verb}: after code {ended.code} another checkpoint opens: {other}\n{ended.err}")
        if ended.code == 0 and before != "whole" and not may_be_gone:
            return Verdict("lost", f"{verb}: exit code 0, and nothing opens\n{ended.err}")
        again = self.run(verb, out).wait()
        if again.code != 0 and not (before == "whole" and again.code == 2):
            return Verdict("lost", f"{verb}: code {ended.code}, then {again.code}\n{ended.err}\n{again.err}")
        if self.state(verb, out) != "whole":
            return Verdict("lost", f"{verb}: the second run made another checkpoint\n{again.err}")
        if left := sorted(path.name for path in out.parent.iterdir() if path != out):
            return Verdict("lost", f"{verb}: {left} are left")
        return verdict

    def state(self, verb: str, out: Path) -> str:
        """ "nothing" if the destination does not open, "whole" if it is what it should be, else "wrong"."""
        try:
            open_checkpoint(out)
        except MiniawqError:
            return "nothing"
        return "whole" if files_of(out) == self.whole[verb] else "wrong"


def verdict_of(ended: Ended, verb: str) -> Verdict:
    """What came of a run, whatever it has left."""
    if escaped := ended.escaped:
        return Verdict("hung" if ended.hung else "escaped", f"{verb}: {escaped}\n{ended.err}")
    return Verdict("done" if ended.code == 0 else "refused" if ended.code > 0 else "ended")


def files_of(out: Path) -> dict[str, object]:
    """Every file of a checkpoint, but for times in its report."""
    if (out / "quantization_report.json").exists():
        return contents(out)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def killed(arena: Arena, random: Random) -> Iterator[Verdict]:
    """kill -9 at a random moment, up to three times on the way."""
    for verb in WRITING:
        out = arena.fresh()
        for _ in range(random.choice((1, 1, 3))):
            run = arena.run(verb, out)
            time.sleep(arena.moment(verb, random))
            run.send(signal.SIGKILL)
            ended = run.wait()
            if arena.state(verb, out) == "whole":
                break
        yield arena.judged(ended, verb, out)


def signalled(arena: Arena, random: Random) -> Iterator[Verdict]:
    """Ctrl-C once or twice, and the signals of a terminal or a scheduler that goes."""
    for verb in WRITING:
        out = arena.fresh()
        number = random.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        run = arena.run(verb, out)
        for _ in range(random.choice((1, 2))):
            time.sleep(arena.moment(verb, random) / 2)
            run.send(number)
        yield arena.judged(run.wait(), verb, out)


def in_pairs(arena: Arena, random: Random) -> Iterator[Verdict]:
    """Two runs into one destination: one of them gets it, and the other says so."""
    for verbs in itertools.combinations_with_replacement(WRITING, 2):
        out = arena.fresh()
        runs = []
        for verb in random.sample(verbs, 2):
            runs.append((verb, arena.run(verb, out)))
            time.sleep(arena.moment(verb, random) * random.choice((0, 0.5)))
        ends = {run: (verb, run.wait()) for verb, run in runs}
        codes = sorted(ended.code for _, ended in ends.values())
        told = "\n".join(f"{verb} {ended.code}: {ended.err}" for verb, ended in ends.values())
        left = sorted(path.name for path in out.parent.iterdir() if path != out)
        if any(ended.escaped for _, ended in ends.values()):
            yield Verdict("escaped", told)
        elif codes not in ([0, 0], [0, 2]) or not any(arena.state(verb, out) == "whole" for verb in verbs) or left:
            yield Verdict("lost", f"{told}\n{left}")
        else:
            yield Verdict("refused" if codes[1] else "done")


def on_full_disks(arena: Arena, random: Random) -> Iterator[Verdict]:
    """A disk, or a limit on files, that is reached somewhere; then there is room again."""
    for verb in WRITING:
        size = random.randint(0, 400_000)
        if mount(arena.disk, f"size={max(4096, size)}"):
            ended = arena.run(verb, arena.disk / "out").wait()
            mount(arena.disk, "remount", "size=100m")
            yield arena.judged(ended, verb, arena.disk / "out")
            unmount(arena.disk)
        out = arena.fresh()
        yield arena.judged(arena.run(verb, out, partial(_limit_files, size)).wait(), verb, out)


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def on_read_only_disks(arena: Arena, random: Random) -> Iterator[Verdict]:
    """A disk that becomes read-only at a random moment, and is written to again later."""
    for verb in WRITING:
        if not mount(arena.disk, "size=100m"):
            return
        run = arena.run(verb, arena.disk / "out")
        time.sleep(arena.moment(verb, random))
        while not mount(arena.disk, "remount", "ro") and run.poll() is None:
            pass  # the system does not allow it while a file is open for writing
        ended = run.wait()
        mount(arena.disk, "remount", "rw")
        yield arena.judged(ended, verb, arena.disk / "out")
        unmount(arena.disk)


def on_vanishing_disks(arena: Arena, random: Random) -> Iterator[Verdict]:
    """A disk, a destination or a source that is taken away at a random moment. The source comes back."""
    for verb, model in zip(WRITING, ("dense", "int4"), strict=True):
        out, gone, aside = arena.fresh(), random.choice(("disk", "destination", "source")), arena.fresh()
        if gone == "disk" and mount(arena.disk, "size=100m"):
            out = arena.disk / "here" / "out"
            out.parent.mkdir()
        run = arena.run(verb, out)
        time.sleep(arena.moment(verb, random))
        if gone == "disk":
            unmount(arena.disk)
        else:
            with suppress(FileNotFoundError):
                os.rename(arena.models[model] if gone == "source" else out, aside)
        ended = run.wait()
        if gone == "source":
            os.rename(aside, arena.models[model])
        elif gone == "disk":
            shutil.rmtree(arena.disk / "here", ignore_errors=True)  # below the disk: what a late write may have made
            (arena.disk / "here").mkdir()
        yield arena.judged(ended, verb, out, may_be_gone=True)


def with_closed_streams(arena: Arena, random: Random) -> Iterator[Verdict]:
    """stdin, stdout and stderr closed, full, or read by nobody, in any combination: the work is done all the same."""
    for verb in random.sample(VERBS, 2):
        states = [random.choice(("open", "closed", "full", "broken")) for _ in range(3)]
        out = arena.fresh()
        ended = arena.run(verb, out if verb in WRITING else None, partial(_damage_streams, states)).wait()
        if ended.code and states[2] != "open":
            ended = ended._replace(err=f"miniawq {verb}: nobody could read what")
        verdict = arena.judged(ended, verb, out) if verb in WRITING else verdict_of(ended, verb)
        if ended.code not in (0, 1):
            verdict = Verdict("escaped", f"{verb}: exit code {ended.code}\n{ended.err}")
        yield verdict._replace(told=verdict.told and f"{states}\n{verdict.told}")


def _damage_streams(states: list[str]) -> None:
    for number, state in enumerate(states):
        if state == "closed":
            os.close(number)
        elif state != "open":
            reader, writer = os.pipe()
            os.close(reader)
            opened = writer if state == "broken" else os.open("/dev/full", os.O_RDWR)
            os.dup2(opened, number)


def with_little_memory(arena: Arena, random: Random) -> Iterator[Verdict]:
    """An address space that ends somewhere above what the imports took."""
    for verb in random.sample(VERBS, 2):
        mebibytes = random.choice((random.randint(0, 128), random.randint(64, 800)))
        out = arena.fresh()
        ended = arena.run(verb, out if verb in WRITING else None, partial(_limit_memory, mebibytes)).wait()
        verdict = arena.judged(ended, verb, out) if verb in WRITING else verdict_of(ended, verb)
        if ended.code < 0 and not ended.hung:
            verdict = Verdict("escaped", f"{verb}: signal {-ended.code}\n{ended.err}")
        yield verdict._replace(told=verdict.told and f"{mebibytes} MiB\n{verdict.told}")


def _limit_memory(mebibytes: int) -> None:
    limit = psutil.Process().memory_info().vms + (mebibytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


FAULTS: dict[str, Callable[[Arena, Random], Iterator[Verdict]]] = {
    "kill -9": killed,
    "Ctrl-C, SIGTERM, SIGHUP": signalled,
    "two runs into one destination": in_pairs,
    "full disks": on_full_disks,
    "read-only disks": on_read_only_disks,
    "vanishing disks": on_vanishing_disks,
    "closed streams": with_closed_streams,
    "memory limits": with_little_memory,
}
