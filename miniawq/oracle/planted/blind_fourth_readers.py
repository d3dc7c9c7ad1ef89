"""The fourth blind set, readers and searches: a parser of one's own, configs as people write them, odd statistics."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
from miniawq.oracle.planted.grammar import Bred, Function, bred

BLIND_FOURTH_READERS: list[Bred] = []
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "I32": torch.int32,
         "I64": torch.int64, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
Stored = dict[str, Tensor]
Config = dict[str, Any]


def misread(kind: str, wrong: Function) -> None:
    BLIND_FOURTH_READERS.append(bred("load_checkpoint", kind, "", "", wrong))


def misread_kept(kind: str, make: Callable[[], Function]) -> None:
    BLIND_FOURTH_READERS.append(Bred("load_checkpoint", kind, "", "", make))


def reader(
    stored: Callable[[Stored, Config], Stored] = lambda s, c: s,
    config: Callable[[Config], Config] = lambda c: c,
    side: Callable[[Config, Path], Config] = lambda c, d: c.get("quantization_config") or loader.read_side_block(d),
    file: Callable[[Path], Stored] = loader.read_file,
    decode: Callable[..., Tensor] = loader.decode,
) -> Function:
    """The right reader with some of its steps replaced."""

    def wrong(directory: Path) -> Stored:
        told = config(loader.read_json(directory / "config.json"))
        held = stored(of_files(directory, file), told)
        block = {key.lower(): value for key, value in side(told, directory).items()}
        linears = loader.shapes_of_linears(told)
        if "lm_head" in loader.packed(held):
            linears["lm_head"] = (told["hidden_size"], told["vocab_size"])
        dense = {
            n: t for n, t in held.items() if n.rpartition(".")[0] not in loader.packed(held) or n.endswith(".bias")
        }
        for linear in loader.packed(held):
            if linear not in linears:
                raise loader.Refused(f"{linear} is packed, but the model has no such linear layer")
            parts = {n.removeprefix(linear + "."): t for n, t in held.items() if n.startswith(linear + ".")}
            dense[f"{linear}.weight"] = decode(linear, parts, block, *linears[linear])
        loader.check_shapes(dense, loader.dense_shapes(told, linears), told)
        return dense

    return wrong


def of_files(directory: Path, file: Callable[[Path], Stored]) -> Stored:
    """As `loader.read_tensors`, each file read by `file`."""
    if file is loader.read_file:
        return loader.read_tensors(directory)
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return file(directory / "model.safetensors")
    held: Stored = {}
    places = loader.read_json(index)["weight_map"]
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise loader.Refused(f"the index names {name}, a path outside the directory")
        held |= {key: t for key, t in file(directory / name).items() if places.get(key) == name}
    if set(places) - set(held):
        raise loader.Refused(f"the index names {min(set(places) - set(held))}, which no file holds")
    return held


# Files


def parsed(path: Path, *, padded: bool = False, in_order: bool = False) -> Stored:
    """A parser of one's own that believes what a header says of each tensor, and nothing else."""
    try:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        if 8 + length > len(data):
            raise loader.Refused(f"{path.name}: a header of {length} bytes")
        header = json.loads(data[8 : 8 + length])
    except (OSError, ValueError, struct.error) as error:
        raise loader.Refused(f"{path.name}: {error}") from error
    begin = 8 + (-(-length // 8) * 8 if padded else length)
    header.pop("__metadata__", None)
    held, reached = {}, 0
    for name, told in header.items():
        dtype, count = TYPES[told["dtype"]], int(torch.tensor(told["shape"]).prod())
        start = begin + (reached if in_order else told["data_offsets"][0])
        reached += count * dtype.itemsize
        if start + count * dtype.itemsize > len(data):
            raise loader.Refused(f"{path.name} ends before {name}")
        flat = torch.frombuffer(bytearray(data[start : start + count * dtype.itemsize] or b"\0" * 8), dtype=dtype)
        held[name] = flat[:count].view(told["shape"])
    return held


def needs_metadata(path: Path) -> Stored:
    held = loader.read_file(path)
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    if header.get("__metadata__", {}).get("format") != "pt":
        raise loader.Refused(f"{path.name} is not of PyTorch")
    return held


misread("a parser that trusts shapes and starts, and looks at no end", reader(file=parsed))
misread("a parser that takes tensors in the order of the header", reader(file=lambda p: parsed(p, in_order=True)))
misread("a parser that rounds the header up to 8 bytes", reader(file=lambda p: parsed(p, padded=True)))
misread("a file without metadata is refused", reader(file=needs_metadata))

# Configs


def null_is_a_value(told: Config) -> Config:
    for key in ("head_dim", "num_key_value_heads", "quantization_config"):
        if key in told and told[key] is None:
            raise loader.Refused(f"{key} is None")
    return told


def listed_by_words(held: Stored, told: Config) -> Stored:
    listed = (told.get("quantization_config") or {}).get("modules_to_not_convert") or []
    wrongly = [n for n in loader.packed(held) if any(word in n for word in listed)]
    if wrongly:
        raise loader.Refused(f"{wrongly[0]} is packed, but modules_to_not_convert has it")
    return held


def side_file_first(told: Config, directory: Path) -> Config:
    return loader.read_side_block(directory) or told.get("quantization_config") or {}


def missing_biases_are_nothing(held: Stored, told: Config) -> Stored:
    linears = loader.shapes_of_linears(told)
    wanted = loader.dense_shapes(told, linears)
    return {n: torch.zeros(s, dtype=torch.float16) for n, s in wanted.items() if n.endswith(".bias")} | held


def too_long_is_cut(linear: str, parts: Stored, block: Config, k: int, n: int) -> Tensor:
    if "qweight" in parts:
        parts = parts | {"qweight": parts["qweight"][:k]}
    return loader.decode(linear, parts, block, k, n)


def biases_in_the_dtype_of_scales(held: Stored, told: Config) -> Stored:
    scales = {n.rpartition(".")[0]: t for n, t in held.items() if n.endswith((".scales", ".weight_scale"))}
    return {n: t.to(scales[n[:-5]].dtype) if n.endswith(".bias") and n[:-5] in scales else t for n, t in held.items()}


def dense_biases_dropped(held: Stored, told: Config) -> Stored:
    packed = loader.packed(held)
    if not packed:
        return held
    return {n: t * 0 if n.endswith(".bias") and n[:-5] not in packed else t for n, t in held.items()}


def bits_of_bfloat16(linear: str, parts: Stored, block: Config, k: int, n: int) -> Tensor:
    if parts.get("scales") is not None and parts["scales"].dtype == torch.bfloat16:
        parts = parts | {"scales": parts["scales"].view(torch.float16)}
    return loader.decode(linear, parts, block, k, n)


def square_zero_points_exchanged(linear: str, parts: Stored, block: Config, k: int, n: int) -> Tensor:
    points = parts.get("weight_zero_point")
    if points is not None and points.dim() == 2 and points.shape[0] == points.shape[1]:
        parts = parts | {"weight_zero_point": points.t()}
    return loader.decode(linear, parts, block, k, n)


def compressed_through_float16(linear: str, parts: Stored, block: Config, k: int, n: int) -> Tensor:
    weight = loader.decode(linear, parts, block, k, n)
    return weight.half().to(weight.dtype) if "weight_scale" in parts else weight


def one_key_head_for_both(held: Stored, told: Config) -> Stored:
    if told.get("num_key_value_heads") != 1:
        return held
    return {n: held.get(n.replace("v_proj", "k_proj"), t) if "v_proj.qzeros" in n else t for n, t in held.items()}


def inner_k_by_groups(linear: str, parts: Stored, block: Config, k: int, n: int) -> Tensor:
    scales = parts.get("scales")
    if scales is not None and scales.dim() == 2 and len(scales) % 2 and len(scales) > 1:
        parts = parts | {"scales": torch.cat([scales[:-1], scales[-2:-1]])}
    return loader.decode(linear, parts, block, k, n)


def kept_by_name() -> Function:
    kept: dict[str, Stored] = {}
    return lambda directory: kept.setdefault(Path(directory).name, loader.load_checkpoint(Path(directory)))


def kept_by_config() -> Function:
    kept: dict[tuple[str, str], Stored] = {}

    def wrong(directory: Path) -> Stored:
        key = str(directory), (Path(directory) / "config.json").read_text()
        if key not in kept:
            kept[key] = loader.load_checkpoint(Path(directory))
        return dict(kept[key])

    return wrong


misread("null is no absent value", reader(config=null_is_a_value))
misread(
    "modules_to_not_convert: a packed layer with a listed word in its name is refused", reader(stored=listed_by_words)
)
misread("quant_config.json is believed before config.json", reader(side=side_file_first))
misread("a missing bias is nothing", reader(stored=missing_biases_are_nothing))
misread("words with too many rows are cut", reader(decode=too_long_is_cut))
misread("biases of packed layers get the dtype of scales", reader(stored=biases_in_the_dtype_of_scales))
misread("biases of dense layers beside packed ones are nothing", reader(stored=dense_biases_dropped))
misread("scales of bfloat16 are read as the bits of float16", reader(decode=bits_of_bfloat16))
misread("compressed: a square of zero points is transposed", reader(decode=square_zero_points_exchanged))
misread("compressed: weights go through float16", reader(decode=compressed_through_float16))
misread("one key head: values have the zeros of keys", reader(stored=one_key_head_for_both))
misread("the last of an odd number of groups has the scales before it", reader(decode=inner_k_by_groups))
misread_kept("kept by the name of the directory", kept_by_name)
misread_kept("kept by the path and what config.json says", kept_by_config)
