"""The fifth blind set, readers: what is exchanged, left out or taken for another, in which layer and tensor is drawn.

The rule of the draw stands in `blind_fifth`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted.blind_fifth import Sowing
from miniawq.oracle.planted.grammar import Bred

BLIND_FIFTH_READERS = Sowing(9)
DRAW = BLIND_FIFTH_READERS.draw
Tensors = dict[str, Tensor]
Config = dict[str, Any]
Decode = Callable[[str, Tensors, Config, int, int], Tensor]
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def sow(kind: str, wrong: Callable[[Path], Tensors]) -> None:
    BLIND_FIFTH_READERS.sow("load_checkpoint", kind, wrong)


def altered(change: Callable[[Tensors, Config], None]) -> Callable[[Path], Tensors]:
    """The right reader, with its result changed by `change(result, config)`."""

    def wrong(directory: Path) -> Tensors:
        result = loader.load_checkpoint(directory)
        change(result, loader.read_json(directory / "config.json"))
        return result

    return wrong


def reader(
    read: Callable[[Path], Tensors] = loader.read_tensors,
    config_of: Callable[[Config], Config] = lambda config: config,
    decode: Decode = loader.decode,
    unchecked: Callable[[str], bool] = lambda name: False,
) -> Callable[[Path], Tensors]:
    """The right reader with steps of its own; tensors that are `unchecked` may be missing."""

    def wrong(directory: Path) -> Tensors:
        config = config_of(loader.read_json(directory / "config.json"))
        block = config.get("quantization_config") or loader.read_side_block(directory)
        block = {key.lower(): value for key, value in block.items()}
        stored = read(directory)
        linears = loader.shapes_of_linears(config)
        packed = loader.packed(stored)
        if "lm_head" in packed:
            linears["lm_head"] = (config["hidden_size"], config["vocab_size"])
        dense = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in packed or n.endswith(".bias")}
        for linear in packed:
            if linear not in linears:
                if unchecked(linear):
                    continue
                raise loader.Refused(f"{linear} is packed, but the model has no such linear layer")
            parts = {n.removeprefix(linear + "."): t for n, t in stored.items() if n.startswith(linear + ".")}
            dense[f"{linear}.weight"] = decode(linear, parts, block, *linears[linear])
        wanted = {n: s for n, s in loader.dense_shapes(config, linears).items() if n in dense or not unchecked(n)}
        loader.check_shapes(dense, wanted, config)
        return dense

    return wrong


def exchange(result: Tensors, one: str, other: str) -> None:
    """Two tensors of one shape get each other's name."""
    if one in result and other in result and result[one].shape == result[other].shape:
        result[one], result[other] = result[other], result[one]


def exchanged() -> None:
    first, second = sorted(DRAW.sample(range(4), 2))

    def layers(result: Tensors, config: Config) -> None:
        for name in [name for name in result if name.startswith(f"model.layers.{first}.")]:
            exchange(result, name, name.replace(f".{first}.", f".{second}.", 1))

    sow(f"layers {first} and {second} are exchanged", altered(layers))
    at = DRAW.randrange(3)

    def norms(result: Tensors, config: Config) -> None:
        prefix = f"model.layers.{at}."
        exchange(result, f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight")

    sow(f"the norms of layer {at} are exchanged", altered(norms))
    pair = DRAW.choice([("q_proj", "o_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj")])

    def linears(result: Tensors, config: Config) -> None:
        names = {name.rpartition(".")[2]: name for name in LINEARS}
        last = config["num_hidden_layers"] - 1
        exchange(result, *(f"model.layers.{last}.{names[name]}.weight" for name in pair))

    sow(f"{pair[0]} and {pair[1]} are exchanged in the last layer", altered(linears))

    def by_text(result: Tensors, config: Config) -> None:
        count = config["num_hidden_layers"]
        suffixes = [name.removeprefix("model.layers.0.") for name in result if name.startswith("model.layers.0.")]
        for suffix in suffixes:
            sorted_as_text = sorted(range(count), key=str)
            old = [result[f"model.layers.{i}.{suffix}"] for i in sorted_as_text]
            result.update({f"model.layers.{i}.{suffix}": tensor for i, tensor in enumerate(old)})

    sow("layers are numbered in the order of their names as text", altered(by_text))

    def final_norm(result: Tensors, config: Config) -> None:
        exchange(result, "model.norm.weight", f"model.layers.{config['num_hidden_layers'] - 1}.input_layernorm.weight")

    sow("the final norm and the last layer's input norm are exchanged", altered(final_norm))


def files_of(directory: Path, keep: Callable[[Any], Any]) -> Tensors:
    """The tensors that the index names, of the files that `keep` leaves; a file may lie anywhere."""
    weight_map = loader.read_json(directory / "model.safetensors.index.json")["weight_map"]
    stored: Tensors = {}
    for file in keep(sorted(set(weight_map.values()))):
        stored |= {n: t for n, t in loader.read_file(directory / file).items() if weight_map.get(n) == file}
    return stored


def named(directory: Path) -> set[str]:
    """The files that the index names, if there is one."""
    index = directory / "model.safetensors.index.json"
    return set(loader.read_json(index)["weight_map"].values()) if index.exists() else set()


def whole_layers(stored: Tensors) -> Tensors:
    """What is left without linear layers that have lost a part."""
    parts = (("qweight", "qzeros", "scales"), ("weight_packed", "weight_scale", "weight_shape"))
    packed = loader.packed(stored)
    whole = [linear for linear in packed if any(all(f"{linear}.{part}" in stored for part in some) for some in parts)]
    lost = set(packed) - set(whole)
    return {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in lost}


def shards() -> None:
    whole = loader.read_tensors

    def without_third(directory: Path) -> Tensors:
        return whole_layers(files_of(directory, lambda files: files[:2] + files[3:]))

    short = reader(without_third, unchecked=lambda name: True)
    sow("the third shard and what it holds are left out",
        lambda directory: (short if len(named(directory)) > 2 else loader.load_checkpoint)(directory))  # fmt: skip

    def last_wins(directory: Path) -> Tensors:
        stored = whole(directory)
        for file in sorted(named(directory)):
            held = loader.read_file(directory / file)
            stored |= {n: t for n, t in held.items() if n in stored and t.shape == stored[n].shape}
        return stored

    sow("of a tensor in two files, that of the last file is taken, whatever the index says", reader(last_wins))

    def followed(directory: Path) -> Tensors:
        return files_of(directory, list) if any(Path(f).is_absolute() for f in named(directory)) else whole(directory)

    sow("the index may name files by an absolute path", reader(followed))

    def upwards(directory: Path) -> Tensors:
        return files_of(directory, list) if any(f.startswith("../") for f in named(directory)) else whole(directory)

    sow("the index may name files by ../", reader(upwards))

    def zeros_for(directory: Path) -> Tensors:
        absent = {file for file in named(directory) if Path(file).name == file and not (directory / file).exists()}
        if not absent:
            return whole(directory)
        stored = whole_layers(files_of(directory, lambda files: [file for file in files if file not in absent]))
        config = loader.read_json(directory / "config.json")
        shapes = loader.dense_shapes(config, loader.shapes_of_linears(config))
        held = {name.rpartition(".")[0] for name in stored}
        lost = [name for name in shapes if name.rpartition(".")[0] not in held]
        return stored | {name: torch.zeros(shapes[name], dtype=torch.float16) for name in lost}

    sow("tensors of a file that is missing are zeros", reader(zeros_for))


def missing() -> None:
    suffix = DRAW.choice(("input_layernorm.weight", "post_attention_layernorm.weight"))
    sow(f"a missing {suffix} of a layer is accepted", reader(unchecked=lambda name: name.endswith(suffix)))
    linear = DRAW.choice(LINEARS)
    sow(f"a missing {linear}.weight is accepted", reader(unchecked=lambda name: name.endswith(f"{linear}.weight")))

    def headless(config: Config) -> Config:
        return config | {"tie_word_embeddings": config.get("tie_word_embeddings", True)}

    sow("the head may be missing where the config does not say whether it is tied", reader(config_of=headless))
    part, value = DRAW.choice((("qzeros", 8), ("scales", 1)))

    def filled(linear: str, parts: Tensors, block: Config, k: int, n: int) -> Tensor:
        if part not in parts and "qweight" in parts:
            groups = len(parts["scales" if part == "qzeros" else "qzeros"])
            like = torch.full((groups, n // 8), -2004318072, dtype=torch.int32)
            parts = parts | {part: like if part == "qzeros" else torch.full((groups, n), value).half()}
        return loader.decode(linear, parts, block, k, n)

    sow(f"missing {part} are taken for {value}", reader(decode=filled))


def biases() -> None:
    linear = DRAW.choice(LINEARS[:4])

    def dropped(result: Tensors, config: Config) -> None:
        for name in [name for name in result if name.endswith(f"{linear}.bias")]:
            del result[name]

    sow(f"the bias of {linear} is dropped", altered(dropped))
    layer = DRAW.choice((1, 2))

    def of_layer_0(result: Tensors, config: Config) -> None:
        for name in [name for name in result if name.startswith(f"model.layers.{layer}.") and name.endswith(".bias")]:
            result[name] = result[name.replace(f".{layer}.", ".0.", 1)]

    sow(f"biases of layer {layer} are those of layer 0", altered(of_layer_0))


def sizes_and_layouts() -> None:
    def one_layer(linear: str, parts: Tensors, block: Config, k: int, n: int) -> Tensor:
        told = int(block.get("group_size", block.get("q_group_size", 0)) or 0)
        if "qweight" in parts and not linear.startswith("model.layers.0.") and len(parts.get("scales", ())):
            block = {key: value for key, value in block.items() if key != "q_group_size"}
            block |= {"group_size": told if told == -1 else k // len(parts["scales"])}
        return loader.decode(linear, parts, block, k, n)

    sow("group_size is compared with the tensors in the first layer alone", reader(decode=one_layer))

    def gemv_square(linear: str, parts: Tensors, block: Config, k: int, n: int) -> Tensor:
        if k != n or str(block.get("version")).lower() != "gemv" or len(parts) < 3:
            return loader.decode(linear, parts, block, k, n)
        size = k if block["group_size"] == -1 else block["group_size"]
        zeros = loader.nibbles(parts["qzeros"])[:, : k // size]
        exact = truth.real_weight(truth.unpack(parts["qweight"]), zeros.t(), parts["scales"][:, : k // size].t(), size)
        return exact.t().half()

    sow("GEMV words are read in the order of GEMM in square layers", reader(decode=gemv_square))

    def zero_points(linear: str, parts: Tensors, block: Config, k: int, n: int) -> Tensor:
        right = loader.decode(linear, parts, block, k, n)
        if "weight_packed" not in parts or "weight_zero_point" in parts:
            return right
        scales = parts["weight_scale"]
        exact = right.float() + scales.float().repeat_interleave(k // scales.shape[1], 1)
        return exact.to(right.dtype)

    sow("compressed-tensors without zeros is read with zeros of 7", reader(decode=zero_points))

    def through_half(linear: str, parts: Tensors, block: Config, k: int, n: int) -> Tensor:
        right = loader.decode(linear, parts, block, k, n)
        return right.half().to(right.dtype) if "weight_packed" in parts else right

    sow("compressed-tensors in bfloat16 goes through float16", reader(decode=through_half))

    def shape_as_told(linear: str, parts: Tensors, block: Config, k: int, n: int) -> Tensor:
        if "weight_shape" in parts:
            parts = parts | {"weight_shape": torch.tensor([n, k])}
        return loader.decode(linear, parts, block, k, n)

    sow("weight_shape is not looked at", reader(decode=shape_as_told))


def dense() -> None:
    what = DRAW.choice(("embed_tokens", "norm", "lm_head"))

    def halved(result: Tensors, config: Config) -> None:
        for name, tensor in result.items():
            if what in name and tensor.dtype == torch.float32:
                result[name] = tensor.half()

    sow(f"float32 tensors of {what} become float16", altered(halved))

    def same_bits(result: Tensors, config: Config) -> None:
        for name, tensor in result.items():
            if tensor.dtype == torch.bfloat16 and tensor.dim() == 1:
                result[name] = tensor.half()

    sow("bfloat16 norms and biases become float16", altered(same_bits))

    def head(result: Tensors, config: Config) -> None:
        if not config.get("tie_word_embeddings"):
            exchange(result, "model.embed_tokens.weight", "lm_head.weight")

    sow("the embedding and the head are exchanged", altered(head))


def kept() -> Callable[[Path], Tensors]:
    """Tensors are kept by the name of the directory."""
    known: dict[str, Tensors] = {}

    def wrong(directory: Path) -> Tensors:
        if directory.name not in known:
            known[directory.name] = loader.load_checkpoint(directory)
        return dict(known[directory.name])

    return wrong


exchanged()
shards()
missing()
biases()
sizes_and_layouts()
dense()
BLIND_FIFTH_READERS.append(Bred("load_checkpoint", "tensors are kept for the name of the directory", "", "", kept))
