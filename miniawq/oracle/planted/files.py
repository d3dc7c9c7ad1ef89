"""Faults of L4, checkpoints, and L5, search."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.loader as loader
import miniawq.oracle.truth as truth
from miniawq.oracle.planted import Fault

Loaded = dict[str, Tensor]


def loading(**wrong: Any) -> dict[str, Callable[..., Any]]:
    """The second reader with some of its functions replaced."""

    def load_checkpoint(directory: Path) -> Loaded:
        with patch.multiple(loader, **wrong):
            return loader.load_checkpoint(directory)

    return {"load_checkpoint": load_checkpoint}


def result(change: Callable[[Loaded], Loaded]) -> dict[str, Callable[..., Any]]:
    """The right tensors, changed."""
    return {"load_checkpoint": lambda directory: change(loader.load_checkpoint(directory))}


def config(change: Callable[[dict[str, Any]], Any]) -> dict[str, Callable[..., Any]]:
    """The config read as another one."""
    right = loader.read_json

    def read_json(path: Path) -> dict[str, Any]:
        read = right(path)
        if "weight_map" not in read:
            change(read)
        return read

    return loading(read_json=read_json)


def blind_to(**keys: Any) -> dict[str, Callable[..., Any]]:
    """Keys of the quantization block not looked at: they have always these values."""

    def change(read: dict[str, Any]) -> None:
        if read.get("quantization_config", {}).get("config_groups") is None and "quantization_config" in read:
            read["quantization_config"] |= keys

    return config(change)


def weights_setting(**keys: Any) -> dict[str, Callable[..., Any]]:
    """Settings of compressed-tensors not looked at."""

    def change(read: dict[str, Any]) -> None:
        groups = read.get("quantization_config", {}).get("config_groups", {})
        for group in groups.values():
            group["weights"] |= keys

    return config(change)


def linears(change: Callable[[Tensor], Tensor]) -> dict[str, Callable[..., Any]]:
    """Every projection's weight changed."""
    return result(lambda t: {n: change(w) if n.endswith("_proj.weight") else w for n, w in t.items()})


def unnamed(directory: Path) -> Loaded:
    """A refusal that names nothing."""
    try:
        return loader.load_checkpoint(directory)
    except loader.Refused as error:
        raise ValueError("could not load") from error


def all_files(directory: Path) -> Loaded:
    """Every safetensors file of the directory, whatever the index says."""
    tensors: Loaded = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= loader.read_file(path)
    return tensors


right_file = loader.read_file
right_json = loader.read_json
right_awq = loader.decode_gemm
right_compressed = loader.decode_compressed


def lenient_file(path: Path) -> Loaded:
    """A file that cannot be read holds nothing."""
    try:
        return right_file(path)
    except loader.Refused:
        return {}


def from_pickle(directory: Path) -> Loaded:
    """A pickle is loaded when there is nothing else."""
    if (directory / "pytorch_model.bin").exists() and not (directory / "model.safetensors").exists():
        return {}
    return loader.load_checkpoint(directory)


def any_broken_config(path: Path) -> dict[str, Any]:
    """A config that cannot be parsed is an empty one with defaults."""
    try:
        return right_json(path)
    except loader.Refused:
        return {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
                "num_hidden_layers": 1, "vocab_size": 16, "quantization_config": {
                    "bits": 4, "group_size": 32, "version": "gemm"}}  # fmt: skip


def lower_case_only(read: dict[str, Any]) -> None:
    """A block whose version is in capitals is no block."""
    if not read.get("quantization_config", {}).get("version", "gemm").islower():
        del read["quantization_config"]


def follow_paths(directory: Path) -> Loaded:
    """Names in the index taken as paths, files outside read, missing ones skipped."""
    index = directory / "model.safetensors.index.json"
    files = sorted(set(right_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    stored: Loaded = {}
    for file in files:
        stored |= right_file(directory / file) if (directory / file).exists() else {}
    return stored


def compressed_parts(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Callable[..., Any]]:
    """The parts of a compressed-tensors layer changed before they are decoded."""
    return loading(decode_compressed=lambda name, parts, *rest: right_compressed(name, change(dict(parts)), *rest))


def zero_of_none(parts: dict[str, Tensor], value: int) -> dict[str, Tensor]:
    """Zeros all of one value."""
    if "weight_zero_point" in parts:
        parts["weight_zero_point"] = truth.pack(torch.full((8, 8), value, dtype=torch.uint8))[:1].expand_as(
            parts["weight_zero_point"]
        )
    return parts


def gptq_too(name: str, parts: dict[str, Tensor], block: dict[str, Any], k: int, n: int) -> Tensor:
    """Another method taken for AutoAWQ, with made-up words where the shapes differ."""
    try:
        return loader.decode_gemm(name, parts, block, k, n)
    except (loader.Refused, RuntimeError, ValueError):
        return torch.zeros(n, k, dtype=torch.float16)


def unchecked_awq(name: str, parts: dict[str, Tensor], block: dict[str, Any], k: int, n: int) -> Tensor:
    """Whatever the parts are, something of the right shape comes out."""
    try:
        return right_awq(name, parts, block, k, n)
    except loader.Refused as error:
        if "bits" in str(error) or "version" in str(error):
            raise
        return torch.zeros(n, k, dtype=torch.float16)


CHECKPOINTS = [
    Fault("weights in the orientation of the file", "L4.reads.gemm", linears(lambda w: w.t())),
    Fault("outputs in the order 0..7 of a word", "L4.reads.gemm",
          linears(lambda w: w.reshape(-1, 8, w.shape[1])[:, list(truth.NIBBLE_HOLDS_COLUMN)].reshape(w.shape))),
    Fault("weights in float32", "L4.reads.gemm", linears(lambda w: w.float())),
    Fault("norms and embeddings cast to float16", "L4.reads.mixed-dtypes",
          result(lambda t: {n: w.half() for n, w in t.items()})),
    Fault("biases dropped", "L4.reads.bias", result(lambda t: {n: w for n, w in t.items() if ".bias" not in n})),
    Fault("packed parts left in the result", "L4.reads.gemm",
          result(lambda t: t | {"model.layers.0.self_attn.q_proj.scales": torch.ones(2, 64)})),
    Fault("group_size always 128", "L4.reads.group-64", blind_to(group_size=128)),
    Fault("group_size taken from the config unchecked", "L4.refuses.group-size-mismatch",
          loading(decode_gemm=unchecked_awq)),
    Fault("zeros of one layer taken from the next", "L4.refuses.qzeros-missing", loading(decode_gemm=unchecked_awq)),
    Fault("absent scales taken as 1", "L4.refuses.scales-missing", loading(decode_gemm=unchecked_awq)),
    Fault("GEMV read as GEMM", "L4.refuses.gemv-called-gemm", loading(decode_gemm=unchecked_awq)),
    Fault("GPTQ tensors read as GEMM", "L4.refuses.gptq-called-awq", loading(decode_gemm=unchecked_awq)),
    Fault("words of 64 bits read", "L4.refuses.qweight-int64", loading(decode_gemm=unchecked_awq)),
    Fault("short scales read", "L4.refuses.scales-short", loading(decode_gemm=unchecked_awq)),
    Fault("every method read as AutoAWQ", "L4.refuses.gptq", loading(decode=gptq_too)),
    Fault("unknown methods read as AutoAWQ", "L4.refuses.method-unknown", blind_to(quant_method="awq")),
    Fault("bits not looked at", "L4.refuses.bits-3", blind_to(bits=4)),
    Fault("w_bit not looked at", "L4.refuses.bits-8", blind_to(bits=4)),
    Fault("version not looked at", "L4.refuses.version-marlin", blind_to(version="gemm")),
    Fault("GEMV_FAST read as GEMM", "L4.refuses.version-gemv-fast", blind_to(version="gemm")),
    Fault("capitals in version refused", "L4.reads.synonyms", config(lower_case_only)),
    Fault("quant_config.json not looked at", "L4.reads.quant-config-file", loading(read_side_block=lambda d: {})),
    Fault("head_dim from hidden_size / heads", "L4.reads.head-dim",
          config(lambda c: c.update(head_dim=None) if "hidden_size" in c else None)),
    Fault("a missing head is made up", "L4.refuses.head-missing", config(lambda c: c.update(tie_word_embeddings=True))),
    Fault("a tied head must be stored", "L4.reads.tied", config(lambda c: c.update(tie_word_embeddings=False))),
    Fault("missing layers skipped", "L4.refuses.linear-missing", loading(check_shapes=lambda *a: None)),
    Fault("missing norms skipped", "L4.refuses.norm-missing", loading(check_shapes=lambda *a: None)),
    Fault("transposed embedding taken", "L4.refuses.embedding-transposed", loading(check_shapes=lambda *a: None)),
    Fault("missing shards skipped", "L4.refuses.shard-missing",
          loading(read_file=lenient_file, read_tensors=follow_paths, check_shapes=lambda *a: None)),
    Fault("paths out of the directory followed", "L4.refuses.index-outside", loading(read_tensors=follow_paths)),
    Fault("index not checked", "L4.refuses.index-wrong", loading(read_tensors=follow_paths)),
    Fault("files the index does not name read", "L4.reads.stale-shard", loading(read_tensors=all_files)),
    Fault("a truncated file read as empty", "L4.refuses.truncated",
          loading(read_file=lenient_file, check_shapes=lambda *a: None)),
    Fault("an LFS pointer read as empty", "L4.refuses.lfs-pointer",
          loading(read_file=lenient_file, check_shapes=lambda *a: None)),
    Fault("a pickle loaded", "L4.refuses.pickle-only", {"load_checkpoint": from_pickle}),
    Fault("a broken config replaced by defaults", "L4.refuses.config-broken", loading(read_json=any_broken_config)),
    Fault("a refusal without a name", "L4.refuses.bits-3", {"load_checkpoint": unnamed}),
    Fault("compressed-tensors zeros ignored", "L4.reads.compressed-asymmetric",
          compressed_parts(lambda p: zero_of_none(p, 8))),
    Fault("compressed-tensors zeros packed along the groups", "L4.reads.compressed-asymmetric",
          compressed_parts(lambda p: p | {"weight_zero_point": p["weight_zero_point"].flip(0)} if len(p) == 4 else p)),
    Fault("symmetric read with a zero of 0", "L4.reads.compressed-symmetric", linears(
        lambda w: w + 0.25)),
    Fault("bfloat16 scales turned into float16", "L4.reads.compressed-bfloat16",
          compressed_parts(lambda p: p | {"weight_scale": p["weight_scale"].half()})),
    Fault("permuted inputs read in order", "L4.refuses.compressed-actorder", weights_setting(actorder=None)),
    Fault("bits of compressed-tensors not looked at", "L4.refuses.compressed-bits-8", weights_setting(num_bits=4)),
    Fault("absent zeros taken as 8 in an asymmetric file", "L4.refuses.compressed-zeros-missing",
          weights_setting(symmetric=True)),
    Fault("weight_shape not looked at", "L4.refuses.compressed-shape", compressed_parts(
        lambda p: p | {"weight_shape": torch.tensor([p["weight_packed"].shape[0], p["weight_packed"].shape[1] * 8])})),
]  # fmt: skip


def powers(exponent: float, size: Callable[[Tensor], Tensor] = lambda x: x.abs().double().mean(0)) -> Any:
    """One fixed candidate, without a search."""

    def search_scales(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        factors = size(x).double().clamp(min=1e-4) ** exponent
        return (factors / (factors.max() * factors.min()).sqrt()).float()

    return {"search_scales": search_scales}


def scales(change: Callable[[Tensor], Tensor]) -> dict[str, Callable[..., Any]]:
    """The right factors, changed."""
    return {"search_scales": lambda w, x, g: change(truth.search_scales(w, x, g))}


def clip(change: Callable[[Tensor], Tensor]) -> dict[str, Callable[..., Any]]:
    """The right bounds, changed."""
    return {"search_clip": lambda w, x, g: change(truth.search_clip(w, x, g))}


def wandering() -> Callable[[Tensor, Tensor, int], Tensor]:
    """A search that draws its candidates at random."""
    random = Random(0)

    def search_scales(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
        found = truth.search_scales(weight, x, group_size)
        return found * (1 + cases.codes(random, len(found)) * 1e-6)

    return search_scales


def overwriting(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """The right factors, and the weight left scaled, as AutoAWQ's in-place search would on an error."""
    factors = truth.search_scales(weight, x, group_size)
    weight.mul_(factors)
    return factors


def one_token_nan(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """A variance over tokens, by their number less one."""
    variance = x.sub(x.mean(0)).square().sum(0) / (len(x) - 1)
    return truth.search_scales(weight, x, group_size) * (1 + 0 * variance)


def largest(weight: Tensor, group_size: int) -> Tensor:
    """The largest absolute weight of each group."""
    size = weight.shape[1] if group_size == -1 else group_size
    return weight.reshape(weight.shape[0], -1, size).abs().amax(-1).float()


def worst_clip(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """The comparison the wrong way round."""
    return largest(weight, group_size) * 0.5


def shared_clip(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """The smallest bound of the tensor, for every output channel."""
    found = truth.search_clip(weight, x, group_size)
    return found.amin(0, keepdim=True).expand_as(found).contiguous()


def order_dependent_clip(weight: Tensor, x: Tensor, group_size: int) -> Tensor:
    """The first output channel's share of clipping, for all."""
    share = truth.search_clip(weight, x, group_size) / largest(weight, group_size).clamp(min=1e-9)
    return (largest(weight, group_size) * share[:1]).contiguous()


SEARCH = [
    Fault("no search at all", "L5.scales.helps", scales(torch.ones_like)),
    Fault("exponent with the wrong sign", "L5.scales.never-worse", powers(-0.5)),
    Fault("plain rounding not in the grid", "L5.scales.never-worse", powers(1.0)),
    Fault("factors inverted", "L5.scales.never-worse", scales(lambda s: 1 / s)),
    Fault("factors shifted by a channel", "L5.scales.helps", scales(lambda s: s.roll(1))),
    Fault("mean of x instead of |x|", "L5.scales.positive",
          {"search_scales": lambda w, x, g: x.double().mean(0).float()}),
    Fault("silent channels get a factor of 0", "L5.scales.silent-channels",
          {"search_scales": lambda w, x, g: torch.where(x.abs().sum(0) == 0, 0.0, truth.search_scales(w, x, g))}),
    Fault("0 / 0 when all activations are 0", "L5.scales.silent-channels",
          {"search_scales": lambda w, x, g: truth.search_scales(w, x, g) * (x.abs().max() / x.abs().max())}),
    Fault("squares of activations in float16", "L5.scales.extreme-activations",
          {"search_scales": lambda w, x, g: truth.search_scales(w, x, g) * (1 + 0 * x.half().square().sum())}),
    Fault("one token divides by 0 degrees of freedom", "L5.scales.few-tokens",
          {"search_scales": one_token_nan}),
    Fault("only the first token is looked at", "L5.scales.token-order",
          {"search_scales": lambda w, x, g: powers(0.5, lambda t: t[0].abs() + 1e-3)["search_scales"](w, x, g)}),
    Fault("factors so small that weights become subnormal", "L5.scales.folding-is-exact",
          scales(lambda s: s * 2.0**-135)),
    Fault("random candidates", "L5.scales.same-twice", {"search_scales": wandering()}),
    Fault("weight left scaled", "L5.scales.same-twice", {"search_scales": overwriting}),
    Fault("float16 factors", "L5.scales.positive", scales(lambda s: s.half())),
    Fault("clipping by half, always", "L5.clip.never-worse", {"search_clip": worst_clip}),
    Fault("everything clipped to 0", "L5.clip.never-worse", clip(torch.zeros_like)),
    Fault("bound above the largest weight", "L5.clip.in-range", clip(lambda c: c * 1.5)),
    Fault("no clipping at all", "L5.clip.helps", {"search_clip": lambda w, x, g: largest(w, g)}),
    Fault("one bound for all output channels", "L5.clip.never-worse", {"search_clip": shared_clip}),
    Fault("the first channel's share for all", "L5.clip.rows-independent", {"search_clip": order_dependent_clip}),
    Fault("NaN where activations are 0", "L5.clip.silent-channels",
          {"search_clip": lambda w, x, g: truth.search_clip(w, x, g) * (x.abs().max() / x.abs().max())}),
    Fault("[G, N] returned", "L5.clip.in-range", clip(lambda c: c.t())),
    Fault("weight left clamped", "L5.clip.same-twice",
          {"search_clip": lambda w, x, g: truth.search_clip(w, x, g) + 0 * w.mul_(0.5).sum()}),
]  # fmt: skip
