"""L4: configs and files as different tools write them, in all pairs, and headers that no tool writes.

A reader of one's own believes in what its author's files have in common: tensors in the order of the header, a header
that fills whole words, metadata, keys that are never null, biases in the dtype of the scales. None of it is promised.
"""

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniawq.oracle.cases import PackedCase
from miniawq.oracle.check import Check, rule
from miniawq.oracle.checkpoints import EMBEDDING, HEAD, Q, check_of, expect_read, invalid, refused, valid
from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Factors, Setting
from miniawq.oracle.deep_checkpoints import expect_refusal, qwen2, with_biases, with_tensors, words_about
from miniawq.oracle.directories import (
    PROJECTIONS,
    WEIGHTS,
    Model,
    compressed,
    compressed_block,
    gemm,
    in_three_shards,
    in_two_shards,
    model,
)
from miniawq.oracle.subject import Broken, Subject, expect_equal

Header = dict[str, Any]
Encoding = Callable[[PackedCase], dict[str, Tensor]]


def reheaded(path: Path, change: Callable[[Header], Header], padding: int = 0) -> None:
    """Write a file's header anew, `padding` bytes past a multiple of 8; the data stays."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    text += b" " * ((padding - len(text)) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


METADATA: dict[str, Header] = {"of PyTorch": {"__metadata__": {"format": "pt"}}, "none": {},
                               "another": {"__metadata__": {"made by": "a tool"}}}  # fmt: skip
LISTED = {
    "null": (None, ()),
    "empty": ([], ()),
    "the head": (["lm_head"], ()),
    "a projection": (["o_proj"], ("self_attn.o_proj",)),
    "layer 1": (["model.layers.1"], PROJECTIONS),
}


def dialects(limits: Limits) -> Factors:
    """What tools write in one way or another."""
    return {
        "group size": (32, -1),
        "head_dim": ("given", "null", "absent"),
        "num_key_value_heads": ("given", "null", "absent"),
        "modules_to_not_convert": tuple(LISTED),
        "biases": ("none", "of q, k and v", "all"),
        "dtype of biases": ("float16", "float32", "bfloat16"),
        "dtype of norms": ("float16", "float32", "bfloat16"),
        "files": (1, 2, 3),
        "order of the header": ("of the data", "reversed"),
        "padding of the header": (0, 3),
        "metadata": tuple(METADATA),
        "quant_config.json": ("absent", "there too"),
    }


def dialect(setting: Setting) -> Model:
    """The model of a setting, before it is written."""
    listed, dense = LISTED[setting["modules_to_not_convert"]]
    layers = 11 if setting["modules_to_not_convert"] == "layer 1" else 2  # the name of layer 10 begins alike
    names = tuple(f"model.layers.{i}.{name}" for i in ((1,) if layers == 11 else range(2)) for name in dense)
    own = setting["num_key_value_heads"] == "given"
    made = model(hidden=32, inner=64, head=16, layers=layers, dense=names, group_size=setting["group size"],
                 key_heads=1 if own else 2)  # fmt: skip
    made.config["quantization_config"]["modules_to_not_convert"] = listed
    for key in ("head_dim", "num_key_value_heads"):
        if setting[key] != "given":
            made.config[key] = None
        if setting[key] == "absent":
            del made.config[key]
    if setting["biases"] == "all":
        with_biases(made, ("_proj",))
        made.config |= {"attention_bias": True, "mlp_bias": True}
    elif setting["biases"] != "none":
        with_biases(made, ("q_proj", "k_proj", "v_proj"))
        made.config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    for name in made.tensors:
        if name.endswith(".bias") or "norm" in name:
            dtype = getattr(torch, setting["dtype of biases" if name.endswith(".bias") else "dtype of norms"])
            made.tensors[name] = made.expected[name] = made.tensors[name].to(dtype) * (1 + torch.finfo(dtype).eps)
    if setting["quant_config.json"] != "absent":
        made.texts["quant_config.json"] = json.dumps(
            {"zero_point": True, "q_group_size": setting["group size"], "w_bit": 4, "version": "GEMM"}
        )
    return {1: lambda m: m, 2: in_two_shards, 3: in_three_shards}[setting["files"]](made)


@rule("L4.reads.dialects", "load_checkpoint", over=dialects)
def directories_in_dialects(target: Subject, setting: Setting) -> None:
    """reads: keys that are given, null or absent, dense layers listed by any name, biases, files and headers, in pairs.

    Tensors may stand in the header in any order, a header may have any length, and metadata are not needed.
    """

    def header(old: Header) -> Header:
        entries = [(name, told) for name, told in old.items() if name != "__metadata__"]
        order = 1 if setting["order of the header"] == "of the data" else -1
        return METADATA[setting["metadata"]] | dict(entries[::order])

    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        directory, made = Path(folder) / "dialect", dialect(setting)
        made.write(directory)
        for path in directory.glob("*.safetensors"):
            reheaded(path, header, setting["padding of the header"])
        expect_read(target, directory, made)


def offsets(name: str, begin: int, end: int) -> Callable[[Path], None]:
    """A damage: the data of a tensor begin and end elsewhere, by so many bytes."""

    def change(header: Header) -> Header:
        places = header[name]["data_offsets"]
        header[name]["data_offsets"] = [places[0] + begin, places[1] + end]
        return header

    return lambda directory: reheaded(directory / WEIGHTS, change)


def reshaped(name: str) -> Callable[[Path], None]:
    """A damage: the header has twice the rows of a tensor in its config's shape, and the offsets of one half."""

    def change(header: Header) -> Header:
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin, begin + (end - begin) // 2]
        return header

    return lambda directory: reheaded(directory / WEIGHTS, change)


def squares(head: int, encode: Encoding = gemm, block: dict[str, Any] | None = None) -> Model:
    """16 groups of 512 inputs; as many outputs, or words of them, in some layer."""
    return model(encode, block, hidden=512, head=head, inner=64 if head == 64 else 128)


NORM = "model.norm.weight"
ABOUT = f"{WEIGHTS} header offset data_offsets shape"
HEADERS = [
    valid("squares", "the words of down_proj and the zeros of q_proj are square", lambda: squares(64)),
    valid("square-scales", "the scales of k_proj and the zeros of gate_proj are square", lambda: squares(16)),
    valid("compressed-squares", "compressed-tensors: the zeros of q_proj are square",
          lambda: squares(64, compressed, compressed_block())),
    valid("compressed-square-scales", "compressed-tensors: the scales of k_proj are square",
          lambda: squares(16, compressed, compressed_block())),
    invalid("header-overlap", "a tensor lies in the data of the one before", f"{ABOUT} norm", model,
            offsets(NORM, -16, -16)),
    invalid("header-shape", "a tensor's data are half of what its shape takes", f"{ABOUT} q_proj", model,
            reshaped(f"{Q}.scales")),
    invalid("header-past-end", "a tensor's data end after the file", f"{ABOUT} norm", model,
            offsets(NORM, 1 << 20, 1 << 20)),
]  # fmt: skip


def beyond_float16() -> Model:
    """bfloat16 scales of 2**-40 and 2**30 times the usual, bfloat16 and float32 tensors beyond float16."""
    made = model(compressed, compressed_block(), scale_dtype=torch.bfloat16)
    for i, name in enumerate(made.layers):
        size = 2.0 ** (-40, 30)[i % 2]
        made.tensors[f"{name}.weight_scale"] = made.tensors[f"{name}.weight_scale"] * size
        made.expected[f"{name}.weight"] = made.expected[f"{name}.weight"] * size
    for name, dtype, size in ((EMBEDDING, torch.bfloat16, 2.0**-60), (HEAD, torch.float32, 2.0**-130),
                              (NORM, torch.bfloat16, 2.0**100)):  # fmt: skip
        made.tensors[name] = made.expected[name] = made.tensors[name].to(dtype) * size
    return made


WIDE = valid("wide-range", "scales, norms and embeddings that float16 does not hold keep their values", beyond_float16)


@rule("L4.refuses.each-tensor-long", "load_checkpoint")
def each_tensor_long(target: Subject) -> None:
    """refuses: any one tensor of a layer a row longer, packed parts and biases too; the message names its layer."""
    base = qwen2()
    for name, tensor in base.tensors.items():
        if "layers.0." not in name:
            made = with_tensors(base, base.tensors | {name: torch.cat([tensor, tensor[:1]])})
            expect_refusal(target, "each-tensor-long", f"{name} is long", made, words_about(name))


@rule("L4.reads-or-refuses.bfloat16-scales", "load_checkpoint")
def bfloat16_scales(target: Subject) -> None:
    """reads or refuses: AutoAWQ scales of bfloat16; weights are then the exact products, rounded once."""
    made = model()
    for name in made.layers:
        made.tensors[f"{name}.scales"] = made.tensors[f"{name}.scales"].to(torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        directory = Path(folder) / "bfloat16-scales"
        made.write(directory)
        if refused(target, directory):
            return
        got = target.call("load_checkpoint", directory)
        for name, layer in made.layers.items():
            weight = got.get(f"{name}.weight")
            if weight is None:
                raise Broken(f"{name}.weight", "no such tensor")
            scales = made.tensors[f"{name}.scales"]
            exact = (layer.weight / layer.scales.double().repeat_interleave(32, 0)).round()
            exact = (exact * scales.double().repeat_interleave(32, 0)).t()
            expect_equal(weight, exact.to(weight.dtype), f"{name}.weight")


CHECKS: list[Check] = [
    directories_in_dialects,
    *(check_of(case) for case in (*HEADERS, WIDE)),
    each_tensor_long,
    bfloat16_scales,
]
