"""Whole checkpoint directories of which a few files are changed, and what comes of opening and using one."""

import math
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands.evaluate import evaluate
from miniawq.commands.plan import make_plan, render_plan
from miniawq.engine.memory import footprint
from miniawq.generate import generate
from miniawq.hardware import DeviceMemory
from miniawq.text.tokenizer import Tokenizer
from tests.helpers import tiny_checkpoints as tiny
from tests.helpers import tiny_tokenizers
from tests.reliability.mutations import change_of

Files = dict[str, bytes]
SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 420}
TOKENIZER_CONFIG = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}
# Files that a directory may have beside its own; each is read by something, or must be left alone.
STRANGE = ("quant_config.json", "pytorch_model.bin", "consolidated.safetensors", "model.safetensors.index.json")


def use(directory: Path) -> torch.Tensor:
    """Open, plan, evaluate and generate; what is accepted must compute numbers. Returns logits."""
    checkpoint = open_checkpoint(directory)
    needed = footprint(checkpoint, torch.float16, device="cpu", batch=1, max_seq_len=16, overhead=0)
    plan = make_plan(checkpoint, "it", torch.float16, needed, DeviceMemory("a device", 1 << 40, 1 << 40))
    assert render_plan(plan, show_tensors=True)
    assert math.isfinite(evaluate(checkpoint, tiny.TOKENS).perplexity)
    model = load_model(checkpoint, dtype=torch.float32)
    logits = model(tiny.TOKENS)
    assert logits.isfinite().all()
    assert len(list(generate(model, tiny.TOKENS, max_tokens=2))) == 2
    return logits


def meaning(directory: Path) -> Any:
    """What a directory is to its user: logits, and the ids of a text."""
    logits = use(directory)
    tokenizer = Tokenizer(directory)
    return logits.numpy().tobytes(), tokenizer.encode("Once upon a time"), tokenizer.eos_ids


def valid(directory: Path) -> dict[str, Files]:
    """Checkpoints in four layouts, with a tokenizer each."""
    tiny.make(directory / "awq", changes=SMALL)
    tiny.make(directory / "gemv", layout="gemv", changes=SMALL)
    tiny.make(directory / "compressed", layout="compressed-tensors", family="llama-tied", shards=2, changes=SMALL)
    tiny.make_dense(directory / "dense", family="qwen3", **SMALL | {"head_dim": 16})
    made = {}
    for path in directory.iterdir():
        tiny_tokenizers.write(path, tiny_tokenizers.byte_level(), tokenizer_config=TOKENIZER_CONFIG)
        for file in path.glob("*.safetensors"):  # values in half the bytes, so that headers are hit more often
            halved = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
            save_file(halved, file, metadata={"format": "pt"})
        made[path.name] = {file.name: file.read_bytes() for file in path.iterdir()}
    return made


def changed(files: Files, random: Random) -> Files:
    """One to three files changed, exchanged, cut off, left out or added."""
    files = dict(files)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(sorted(files))
        match random.randint(0, 15):
            case 0:
                files[name] = files[random.choice(sorted(files))]
            case 1:
                del files[name]
            case 2:
                files[random.choice(STRANGE)] = files[name]
            case 3:
                files[name] = files[name][: random.randint(0, len(files[name]))]
            case _:
                files[name] = change_of(name)(files[name], random)
        if not files:
            break
    return files


def lay(files: Files, directory: Path) -> Path:
    """Write them, in place of what is there."""
    shutil.rmtree(directory, ignore_errors=True)
    os.mkdir(directory)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def damaged(bases: dict[str, Files]) -> st.SearchStrategy[Files]:
    """Valid checkpoints, changed; Hypothesis makes the changes few and small when it reports one."""
    randoms = st.randoms(use_true_random=False)
    return st.builds(lambda name, random: changed(bases[name], random), st.sampled_from(sorted(bases)), randoms)
