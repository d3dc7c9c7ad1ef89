"""The readers of what strangers write, each as a function of bytes: what the fuzzer calls a hundred thousand times.

A reader returns what the bytes mean, or raises a MiniawqError; anything else has escaped. Where there are two ways to
read, both are gone and compared.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from miniawq.checkpoint import reading
from miniawq.checkpoint.config import llama_config, refuse_architecture
from miniawq.checkpoint.headers import tensors_of, weight_files
from miniawq.checkpoint.hub import LocalFiles
from miniawq.checkpoint.quant_config import read_block
from miniawq.checkpoint.strict import parse_json
from miniawq.engine.sampling import Sampling
from miniawq.model import rope_tables
from miniawq.quantize.journal import NAME, Journal
from miniawq.text import chat
from miniawq.text.template import ImmutableSandboxedEnvironment
from miniawq.text.tokenizer import Tokenizer, read_object
from tests.helpers import TESTS, tiny_tokenizers
from tests.reliability import mutations

CORPUS = Path(__file__).parent / "corpus"
ASK = [{"role": "user", "content": "Who spins?"}]
TEXT = "Once upon a time, König 王様 👋🏽 <s> \n\t  café"
RUN = {"model": "a", "text": "b"}  # the journal of the corpus is of this run


class Reader(NamedTuple):
    """`read` takes what a file of this name holds, in a directory of its own."""

    file: str
    read: Callable[[Path], Any]
    golden: str = ""

    @property
    def change(self) -> Callable[[bytes, Random], bytes]:
        """How its file is changed."""
        return mutations.change_of(self.file)


def read_config(path: Path) -> Any:
    """The model and the quantization that a config.json describes; its rotary embedding is made of numbers."""
    config = parse_json(path)
    refuse_architecture(config)
    model, quantization = llama_config(config), read_block(config, {})
    longest = model.max_position_embeddings
    for table_LE in rope_tables(model.rope, torch.tensor([0, longest - 1]), longest, torch.float32):
        assert table_LE.isfinite().all(), model.rope
    return model, quantization


def read_header(path: Path) -> Any:
    """Every tensor with its bytes, which our reader and that of safetensors find in the same place."""
    found = {}
    for name, info in tensors_of(LocalFiles(path.parent), {path.name: set()}, []).items():
        tensor = reading.read_tensor(path, info.key, info.dtype, info.shape, torch.device("cpu"))
        with safe_open(path, framework="pt") as file:
            other = file.get_tensor(info.key)
        assert tensor.shape == other.shape == info.shape, name
        values = tensor.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(values, other.contiguous().view(-1).view(torch.uint8)), name
        found[name] = (str(info), bytes(values.tolist()))
    return found


def read_index(path: Path) -> Any:
    """The file of each tensor, in the directory and nowhere else."""
    files = LocalFiles(path.parent)
    weights = weight_files(files)
    assert all(Path(name).name == name and (path.parent / name).is_file() for name in weights), weights
    return sorted((name, info.file) for name, info in tensors_of(files, weights, []).items())


def read_tokenizer(path: Path) -> Any:
    """The ids of a text, and the text of the ids, whole and in pieces."""
    tokenizer = Tokenizer(path.parent)
    ids = tokenizer.encode(TEXT)
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    text = tokenizer.decode(ids)
    tokenizer.end_of_turn_ids()
    return ids, text, [*pieces, stream.finish()], tokenizer.eos_ids, tokenizer.bos_id


def read_settings(path: Path) -> Any:
    """How to sample, and which ids begin and end a text."""
    tokenizer = Tokenizer(path.parent)
    return Sampling.choose(read_object(path)), tokenizer.eos_ids, tokenizer.bos_id


def read_template(path: Path) -> Any:
    """The text of a conversation. Parsing alone happens here too, where the fuzzer sees which lines run."""
    template = chat.read_templates(path.parent, {})["default"]
    with suppress(Exception):
        ImmutableSandboxedEnvironment().parse(template)
    return chat.render(template, ASK, variables={"bos_token": "<s>"})


def read_journal(path: Path) -> Any:
    """The finished blocks of a run."""
    found = Journal(path.parent, RUN, lambda record, number: "" if record.get("layer") == number else "another block")
    return found.blocks, found.published


READERS = {
    "config": Reader("config.json", read_config, "golden/models/*/config.json"),
    "header": Reader("model.safetensors", read_header),
    "index": Reader("model.safetensors.index.json", read_index),
    "tokenizer": Reader("tokenizer.json", read_tokenizer),
    "tokenizer_config": Reader("tokenizer_config.json", read_tokenizer),
    "generation_config": Reader("generation_config.json", read_settings, "golden/models/*/generation_config.json"),
    "template": Reader("chat_template.jinja", read_template, "golden/chat/*.jinja"),
    "journal": Reader(NAME, read_journal),
}


def corpus(name: str) -> list[bytes]:
    """Where the fuzzer begins: valid files, and what once escaped. Golden files of other tests are valid ones too."""
    found = [*(CORPUS / name).glob("*"), *(TESTS.glob(READERS[name].golden) if READERS[name].golden else ())]
    return [path.read_bytes() for path in sorted(found)]


def prepare(name: str, directory: Path) -> Path:
    """Put into a new directory what the reader's file needs beside it; returns the path of the file."""
    directory.mkdir()
    if name in ("tokenizer_config", "generation_config", "template"):
        tiny_tokenizers.write(directory, tiny_tokenizers.byte_level())
    if name == "index":
        for number in (1, 2):
            tensors = {f"model.layers.{number}.x": torch.ones(2), f"{number}": torch.ones(1)}
            save_file(tensors, directory / f"model-0000{number}-of-00002.safetensors")
    return directory / READERS[name].file
