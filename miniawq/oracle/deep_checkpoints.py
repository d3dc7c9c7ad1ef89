"""L4 beyond one layer: several layers and three shards, every tensor missing once, files outside that are there.

In a model of one square layer a reader may exchange layers, ignore a shard, or check one layer for all. Here all shapes
differ, all tensors differ, and the parts of one layer lie in different shards.
"""

import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniawq.oracle.cases import random_layer
from miniawq.oracle.check import Check, rule
from miniawq.oracle.checkpoints import (
    EMBEDDING,
    HEAD,
    Case,
    changed,
    check_of,
    edit_index,
    either,
    expect_read,
    invalid,
    lfs_pointer,
    replace,
    valid,
)
from miniawq.oracle.directories import (
    AWQ_BLOCK,
    INDEX,
    WEIGHTS,
    Model,
    compressed,
    compressed_block,
    compressed_symmetric,
    gemm,
    gemv,
    in_three_shards,
    model,
)
from miniawq.oracle.state import FEW_CALLS
from miniawq.oracle.subject import Subject, comparable, expect_equal

LAST = "model.layers.2"
THIRD = "model-00003-of-00003.safetensors"


def deep(group_size: int = 32, layers: int = 3) -> Model:
    """Three layers in which no two dimensions are equal, and groups that are no power of two in number."""
    return model(hidden=96, inner=160, head=32, group_size=group_size, layers=layers)


def deep_sharded() -> Model:
    """The same in three shards."""
    return in_three_shards(deep())


def eleven() -> Model:
    """Layer 1 and layer 10."""
    return in_three_shards(model(hidden=32, inner=64, head=16, layers=11))


def with_biases(made: Model, names: tuple[str, ...]) -> Model:
    """Biases on these projections of every layer."""
    for linear, layer in made.layers.items():
        if linear.endswith(names):
            n = layer.codes.shape[1]
            bias = (torch.arange(n) % 7 - 3 + len(made.tensors) / 8).to(torch.float16) / 8
            made.tensors[f"{linear}.bias"] = made.expected[f"{linear}.bias"] = bias
    return made


def qwen2() -> Model:
    """Biases on q, k and v of two layers, and no key that says so."""
    made = with_biases(deep(layers=2), ("q_proj", "k_proj", "v_proj"))
    made.config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return made


def llama_with_biases() -> Model:
    """Biases on every projection of two layers."""
    made = with_biases(deep(layers=2), ("_proj",))
    made.config |= {"attention_bias": True, "mlp_bias": True}
    return made


def partly_dense() -> Model:
    """Other projections left dense in each layer."""
    dense = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj", f"{LAST}.self_attn.o_proj")
    return model(hidden=96, inner=160, head=32, layers=3, dense=dense)


def fine_norms() -> Model:
    """Norms, head and a projection in float32 with bits that 16 bits have not, the embedding in bfloat16."""
    dense = f"{LAST}.mlp.up_proj"
    made = model(hidden=96, inner=160, head=32, layers=3, dense=(dense,))
    for name in made.tensors:
        if "norm" in name or name in (HEAD, f"{dense}.weight"):
            made.tensors[name] = made.expected[name] = made.tensors[name].to(torch.float32) * (1 + 2.0**-20)
    made.tensors[EMBEDDING] = made.expected[EMBEDDING] = made.tensors[EMBEDDING].to(torch.bfloat16)
    return made


def stale_copies(directory: Path) -> None:
    """Every shard also holds an old copy of a norm; the index names one shard for it."""
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        if "model.norm.weight" not in tensors:
            save_file(tensors | {"model.norm.weight": torch.zeros(96, dtype=torch.float16)}, path)


def gemv_squares() -> Model:
    """Square layers: words have the same shape in GEMV and in GEMM."""
    return model(gemv, AWQ_BLOCK | {"version": "gemv"}, key_heads=2, layers=1)


def other_groups(linear: str) -> Callable[[Model], None]:
    """An edit: one layer has groups of 16, where the config says 32."""

    def edit(made: Model) -> None:
        k, n = made.layers[linear].codes.shape
        for part, tensor in gemm(random_layer(90, k, n, 16)).items():
            made.tensors[f"{linear}.{part}"] = tensor

    return edit


def in_gemv(linear: str) -> Callable[[Model], None]:
    """An edit: one square layer is stored as GEMV stores it."""

    def edit(made: Model) -> None:
        for part, tensor in gemv(made.layers[linear]).items():
            made.tensors[f"{linear}.{part}"] = tensor

    return edit


def exchanged(one: str, other: str) -> Callable[[Model], None]:
    """An edit: two projections of layer 1 have each other's tensors."""

    def edit(made: Model) -> None:
        for part in ("qweight", "qzeros", "scales"):
            names = [f"model.layers.1.{name}.{part}" for name in (one, other)]
            first, second = (made.tensors[name] for name in names)
            made.tensors[names[0]], made.tensors[names[1]] = second, first

    return edit


def outside(absolute: bool) -> Callable[[Path], None]:
    """The index names a file above the directory, and the file is there, with the right tensor in it."""

    def damage(directory: Path) -> None:
        place = directory.parent / "elsewhere.safetensors"
        tensors: dict[str, Tensor] = {}
        for path in directory.glob("*.safetensors"):
            tensors |= load_file(path)
        save_file({EMBEDDING: tensors[EMBEDDING]}, place)
        name = str(place) if absolute else "../elsewhere.safetensors"
        edit_index(directory, lambda weight_map: weight_map.update({EMBEDDING: name}))

    return damage


def as_the_hub_keeps_it(directory: Path) -> None:
    """Every file is a link to one in another directory whose name is a hash, as in the cache of the Hub."""
    blobs = directory.parent / f"{directory.name}-blobs"
    blobs.mkdir()
    for path in sorted(directory.iterdir()):
        blob = blobs / sha256(path.name.encode()).hexdigest()
        path.rename(blob)
        path.symlink_to(Path("..") / blobs.name / blob.name)


DEEP = [
    valid("layers", "three layers, no two dimensions equal", deep),
    valid("layers-sharded", "three layers in three shards, the parts of a layer apart", deep_sharded),
    valid("eleven-layers", "layer 1 and layer 10 are different layers", eleven),
    valid("layers-group-all", "three layers with one group of all inputs each", lambda: deep(-1)),
    valid("layers-group-64", "two layers with groups of 64",
          lambda: model(hidden=128, inner=192, head=64, group_size=64, layers=2)),
    valid("layers-qwen2", "Qwen2: biases on q, k and v of each layer", qwen2),
    valid("layers-bias", "attention_bias and mlp_bias: a bias on every projection", llama_with_biases),
    valid("layers-partly-dense", "other projections left dense in each layer", partly_dense),
    valid("layers-fine-norms", "float32 norms, head and projection keep their bits", fine_norms),
    valid("layers-compressed", "compressed-tensors with zeros, three layers in three shards", lambda: in_three_shards(
        model(compressed, compressed_block(), hidden=96, inner=160, layers=3))),
    valid("layers-compressed-symmetric", "compressed-tensors without zeros, three layers", lambda: model(
        compressed_symmetric, compressed_block(symmetric=True), hidden=96, inner=160, layers=3, symmetric=True)),
    either("stale-copies", "a norm lies in three shards with different values; the index names one", deep_sharded,
           stale_copies),
    either("gemv-squares", "AutoAWQ GEMV, named so, where every layer is square", gemv_squares),
    invalid("group-size-first-layer", "one projection of the first layer has other groups than the config says",
            "group scales qzeros shape q_proj", changed(other_groups("model.layers.0.self_attn.q_proj"), deep)),
    invalid("group-size-last-layer", "one projection of the last layer has other groups than the config says",
            "group scales qzeros shape down_proj", changed(other_groups(f"{LAST}.mlp.down_proj"), deep)),
    invalid("gemv-in-one-layer", "one square projection of the last layer is stored as GEMV stores it",
            "gemv layout shape qweight qzeros scales o_proj", changed(
                in_gemv(f"{LAST}.self_attn.o_proj"), lambda: model(hidden=64, inner=160, layers=3))),
    invalid("q-and-k-exchanged", "the tensors of q_proj and k_proj exchanged", "shape q_proj k_proj qweight", changed(
        exchanged("self_attn.q_proj", "self_attn.k_proj"), deep)),
    invalid("gate-and-down-exchanged", "the tensors of gate_proj and down_proj exchanged",
            "shape gate_proj down_proj qweight", changed(exchanged("mlp.gate_proj", "mlp.down_proj"), deep)),
    invalid("layers-too-few", "the config has a layer more than the files", "layers.3 missing num_hidden_layers",
            changed(lambda m: m.config.update(num_hidden_layers=4), deep)),
    invalid("qzeros-int64", "zeros of 64 bits in the last layer", "qzeros dtype int64 i64", changed(
        replace(f"{LAST}.mlp.up_proj.qzeros", lambda t: t.to(torch.int64)), deep)),
    invalid("scales-int16", "scales of integers in the last layer", "scales dtype int16 i16", changed(
        replace(f"{LAST}.mlp.up_proj.scales", lambda t: t.view(torch.int16)), deep)),
    invalid("scales-transposed", "scales [N, G] in the last layer", "scales shape group up_proj", changed(
        replace(f"{LAST}.mlp.up_proj.scales", lambda t: t.t()), deep)),
    invalid("norm-short", "a norm of the wrong length in the last layer", "norm shape", changed(
        replace(f"{LAST}.input_layernorm.weight", lambda t: t[:-8]), deep)),
    invalid("third-shard-missing", "the third shard is not there", "00003", deep_sharded,
            lambda d: (d / THIRD).unlink()),
    invalid("third-shard-truncated", "the third shard stops early", "00003 truncated incomplete", deep_sharded,
            lambda d: (d / THIRD).write_bytes((d / THIRD).read_bytes()[:-64])),
    invalid("third-shard-lfs-pointer", "a git-lfs pointer instead of the third shard", "00003 lfs", deep_sharded,
            lambda d: lfs_pointer(d, THIRD)),
]  # fmt: skip

OUTSIDE = [
    valid("hub-cache", "files are links to files named by their hashes, as in the cache of the Hub", deep_sharded,
          as_the_hub_keeps_it),
    invalid("index-above", "the index names a file above the directory, which is there",
            f"outside path .. {INDEX} name", deep_sharded, outside(absolute=False)),
    invalid("index-absolute", "the index names a file by its absolute path, which is there",
            f"outside path absolute {INDEX} name", deep_sharded, outside(absolute=True)),
]  # fmt: skip


def words_about(name: str) -> tuple[str, ...]:
    """Words of a message about a tensor: its layer, or what else says which it is."""
    linear = name.rpartition(".")[0].rpartition(".")[2]
    return (linear, "lm_head", "tie") if name == HEAD else (linear, "norm") if "norm" in name else (linear,)


@rule("L4.refuses.each-tensor-missing", "load_checkpoint")
def each_tensor_missing(target: Subject) -> None:
    """refuses: any one tensor of any layer missing, packed parts and biases included; the message names its layer."""
    base = qwen2()
    for name in base.tensors:
        tensors = {other: tensor for other, tensor in base.tensors.items() if other != name}
        expect_refusal(
            target, "each-tensor-missing", f"{name} is missing", with_tensors(base, tensors), words_about(name)
        )


@rule("L4.refuses.each-tensor-short", "load_checkpoint")
def each_tensor_short(target: Subject) -> None:
    """refuses: any one tensor of any layer a row short, packed parts and biases too; the message names its layer."""
    base = qwen2()
    for name, tensor in base.tensors.items():
        made = with_tensors(base, base.tensors | {name: tensor[:-1]})
        expect_refusal(target, "each-tensor-short", f"{name} is short", made, words_about(name))


def with_tensors(base: Model, tensors: dict[str, Tensor]) -> Model:
    """The same model with other tensors in its file."""
    return Model(base.config, tensors, base.expected, base.layers)


def expect_refusal(target: Subject, id: str, comment: str, made: Model, words: tuple[str, ...]) -> None:
    """Hold the target to the refusal of one model."""
    check_of(Case(id, "invalid", comment, lambda: made, words)).body(target)


@rule("L4.state", "load_checkpoint")
def directory_read_again(target: Subject) -> None:
    """What was loaded stays when the directory is written anew; loading again, many times, gives what is there now."""
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        directory = Path(folder) / "state"
        first, second = deep(), deep()
        for name in (*second.expected,):
            if name in second.tensors:
                second.tensors[name] = second.expected[name] = second.tensors[name] + 1
        for linear, layer in second.layers.items():
            k, n = layer.codes.shape
            other = random_layer(91, k, n, 32)
            second.tensors |= {f"{linear}.{part}": tensor for part, tensor in gemm(other).items()}
            second.expected[f"{linear}.weight"] = other.weight.t().to(torch.float16).contiguous()
        first.write(directory)
        kept = target.answer("load_checkpoint", directory)
        (directory / WEIGHTS).unlink()
        second.write(directory)
        expect_read(target, directory, second)
        for name, tensor in comparable(kept).items():
            if name in first.expected:
                expect_equal(tensor, first.expected[name], f"{name}, loaded before the directory was written anew: ")
        small = model(hidden=32, head=16)
        small.write(directory.parent / "small")
        for _ in range(FEW_CALLS):
            expect_read(target, directory.parent / "small", small)


CHECKS: list[Check] = [
    *(check_of(case) for case in (*DEEP, *OUTSIDE)),
    each_tensor_missing,
    each_tensor_short,
    directory_read_again,
]
