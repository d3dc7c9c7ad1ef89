"""Implementations that are programs: JSON lines on stdin and stdout, tensors in raw files.

One request and one answer a line. A request is one JSON object with its keys in this order and no spaces:

    {"cmd":"start","contract":"1"}
    {"cmd":"run","seq":1,"function":"dequantize","out":"/tmp/o/1","parameters":{"group_size":32},"tensors":[
     {"name":"qweight","dtype":"int32","shape":[64,2],"path":"/tmp/o/1.qweight"}, ...]}
    {"cmd":"stop"}

The program answers `start` with what it is, `run` with one of four lines, and ends on `stop`:

    {"name":"mine","version":"1.0","functions":["unpack","dequantize"],"limits":{"group_sizes":[-1,128]}}
    {"seq":1,"tensors":[{"dtype":"float16","shape":[64,16]}]}   written to /tmp/o/1.0, a second result to /tmp/o/1.1
    {"seq":1,"refused":"code 16 does not fit"}                  what the contract calls a ValueError
    {"seq":1,"skipped":"no bfloat16"}                           what Python calls a NotImplementedError
    {"seq":1,"error":"out of memory"}                           any other exception

Files hold the elements in row-major order, little-endian, without a header. `limits` is optional (`contract.Limits`);
results of `load_checkpoint` also carry a "name". A program that ends, is silent for too long or answers what cannot be
read has failed that check; it is started again for the next one. `python -m miniawq.oracle.stdio pkg.module` serves a
Python target this way, which keeps the suite alive when native code crashes.
"""

import ctypes
import json
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from miniawq.errors import UsageError
from miniawq.oracle.contract import CONTRACT, FUNCTIONS, Limits
from miniawq.oracle.door import load_target
from miniawq.oracle.subject import PARAMETERS, Crash, as_tensors, name_of


class Program:
    """A target that is a program: the functions it says it has, as methods."""

    def __init__(self, command: str, timeout: float = 60.0) -> None:
        self.command, self.timeout = command, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="oracle-")
        self._sequence = 0
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        try:
            hello = self._ask({"cmd": "start", "contract": CONTRACT})
        except (Crash, OSError) as error:
            raise UsageError(f"{command!r} does not answer", str(error), "it must answer the `start` line") from error
        self.name, self.version = str(hello.get("name", command)), str(hello.get("version", ""))
        self.functions = [name for name in hello.get("functions", ()) if name in FUNCTIONS]
        for name, value in hello.get("limits", {}).items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, function: str) -> Any:
        if function not in self.__dict__.get("functions", ()):
            raise AttributeError(function)
        return lambda *arguments: self._run(function, arguments)

    def close(self) -> None:
        """End the program and remove the files."""
        if self._process is not None and self._process.poll() is None:
            try:
                self._ask({"cmd": "stop"}, answered=False)
                self._process.wait(5)
            except (Crash, OSError, subprocess.TimeoutExpired):
                self._process.kill()
        self._folder.cleanup()

    def _run(self, function: str, arguments: tuple[Any, ...]) -> Any:
        self._sequence += 1
        out = f"{self._folder.name}/{self._sequence}"
        request: dict[str, Any] = {"cmd": "run", "seq": self._sequence, "function": function, "out": out}
        request |= {"parameters": {}, "tensors": []}
        for name, value in zip(PARAMETERS[function], arguments, strict=False):
            if isinstance(value, Tensor):
                request["tensors"].append(write_raw(value, name, Path(f"{out}.{name}")))
            elif value is not None:
                request["parameters"][name] = value if isinstance(value, int) else str(value)
        answer = self._ask(request)
        try:
            items = enumerate(answer.get("tensors", ()))
            results = [(item.get("name"), read_raw(item, Path(f"{out}.{i}"))) for i, item in items]
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise Crash(f"an answer that cannot be read: {answer} ({type(error).__name__}: {error})") from error
        for path in Path(self._folder.name).glob(f"{self._sequence}.*"):
            path.unlink()
        if "refused" in answer:
            raise ValueError(answer["refused"])
        if "skipped" in answer:
            raise NotImplementedError(answer["skipped"])
        if "error" in answer or not results:
            raise RuntimeError(answer.get("error", f"an answer without tensors: {answer}"))
        if function == "load_checkpoint":
            return dict(results)
        return results[0][1] if len(results) == 1 else tuple(tensor for _, tensor in results)

    def _ask(self, request: dict[str, Any], answered: bool = True) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request, separators=(",", ":")) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=self.timeout) if answered else "{}"
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            process.kill()
            line = ""
        if not line:
            raise Crash(f"the program {how_it_ended(process.wait())}")
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise Crash(f"the program answered {line[:80]!r}, which is not JSON") from error

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            again = self._process is not None
            self._process = subprocess.Popen(
                shlex.split(self.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._lines = queue.SimpleQueue()
            threading.Thread(target=pass_on, args=(self._process.stdout, self._lines), daemon=True).start()
            if again:
                self._ask({"cmd": "start", "contract": CONTRACT})
        return self._process


def pass_on(lines: IO[str], to: "queue.SimpleQueue[str]") -> None:
    """Read a program's lines for whoever does not wait for ever; an empty one is the end."""
    for line in lines:
        to.put(line)
    to.put("")


def how_it_ended(code: int) -> str:
    """A return code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {signal.Signals(-code).name}" + (" (no answer in time)" if code == -signal.SIGKILL else "")


def write_raw(tensor: Tensor, name: str, path: Path) -> dict[str, Any]:
    """Store a tensor's elements and say what they are."""
    flat = tensor.detach().cpu().contiguous()
    path.write_bytes(ctypes.string_at(flat.data_ptr(), flat.nbytes))
    return {"name": name, "dtype": name_of(tensor.dtype), "shape": list(tensor.shape), "path": str(path)}


def read_raw(item: dict[str, Any], path: Path) -> Tensor:
    """The tensor a file holds."""
    dtype, shape = getattr(torch, item["dtype"]), tuple(item["shape"])
    data = path.read_bytes()
    size = torch.Size(shape).numel()
    if len(data) != size * dtype.itemsize:
        raise ValueError(f"{list(shape)} needs {size * dtype.itemsize} bytes, the file holds {len(data)}")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def serve(target: Any, requests: IO[str], answers: IO[str]) -> None:
    """Answer the protocol for a Python target, until `stop` or the end of the input."""
    for line in requests:
        request = json.loads(line)
        if request["cmd"] == "stop":
            return
        print(json.dumps(answer_to(target, request)), file=answers, flush=True)


def answer_to(target: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    if request["cmd"] == "start":
        limits = {name: getattr(target, name) for name in Limits.__dataclass_fields__ if hasattr(target, name)}
        functions = [name for name in FUNCTIONS if callable(getattr(target, name, None))]
        name = str(getattr(target, "name", getattr(target, "__name__", "target")))
        return {"name": name, "version": str(getattr(target, "version", "")), "functions": functions, "limits": limits}
    arguments = {name: Path(v) if name == "directory" else v for name, v in request["parameters"].items()}
    arguments |= {item["name"]: read_raw(item, Path(item["path"])) for item in request["tensors"]}
    ordered = [arguments[name] for name in PARAMETERS[request["function"]] if name in arguments]
    try:
        result = as_tensors(getattr(target, request["function"])(*ordered))
    except Exception as error:
        kind = {ValueError: "refused", NotImplementedError: "skipped"}
        key = next((key for type_, key in kind.items() if isinstance(error, type_)), "error")
        return {"seq": request["seq"], key: f"{type(error).__name__}: {error}"}
    named = result if isinstance(result, dict) else dict(enumerate(result if isinstance(result, tuple) else (result,)))
    items = [
        write_raw(tensor, str(name), Path(f"{request['out']}.{i}")) for i, (name, tensor) in enumerate(named.items())
    ]
    return {"seq": request["seq"], "tensors": items}


if __name__ == "__main__":
    serve(load_target(sys.argv[1])[0], sys.stdin, sys.stdout)
