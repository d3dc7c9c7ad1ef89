"""The third blind set in readers of checkpoints and in searches, L4 and L5."""

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.planted import CORRECT
from miniawq.oracle.planted.blind_third import after, refuse
from miniawq.oracle.planted.grammar import Bred, Function, bred

Tensors = dict[str, Tensor]

BLIND_THIRD_READERS: list[Bred] = []


def lay(function: str, kind: str, wrong: Function) -> None:
    """Keep a wrong function under what is wrong with it."""
    BLIND_THIRD_READERS.append(bred(function, kind, "", "", wrong))


# L4


def read(directory: Path) -> Tensors:
    return dict(CORRECT["load_checkpoint"](directory))


def config_of(directory: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((Path(directory) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config


def stored(directory: Path) -> list[tuple[Path, Tensors]]:
    """The tensors of each file that can be read, in the order of names."""
    files = []
    for path in sorted(Path(directory).glob("*.safetensors")):
        with suppress(OSError, ValueError, SafetensorError):
            files.append((path, load_file(path)))
    return files


def elsewhere(change: Callable[[Path], None]) -> Function:
    """The right reader on a copy of the directory that was changed."""

    def wrong(directory: Path) -> Tensors:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(shutil.copytree(directory, Path(place) / Path(directory).name))
            change(copy)
            return {name: tensor.clone() for name, tensor in read(copy).items()}

    return wrong


def with_key(key: str, value: Callable[[Path], Any], when: Callable[[Any], bool] = lambda v: True) -> Function:
    """A reader for which a key of `quantization_config` has one value, whatever it says."""

    def change(directory: Path) -> None:
        config = config_of(directory)
        entry = config.get("quantization_config", {})
        if key in entry and when(entry[key]):
            entry[key] = value(directory)
            (directory / "config.json").write_text(json.dumps(config))

    return elsewhere(change)


def size_of_shapes(directory: Path) -> int:
    tensors = {name: t for _, file in stored(directory) for name, t in file.items()}
    pairs = [(t, tensors.get(name.replace("qweight", "scales"))) for name, t in tensors.items() if "qweight" in name]
    return next((len(words) // len(scales) for words, scales in pairs if scales is not None), 128)


def last_file_wins(directory: Path) -> Tensors:
    tensors = read(directory)
    return tensors | {name: t for _, file in stored(directory) for name, t in file.items() if name in tensors}


def index_cut(directory: Path) -> None:
    """What the index promises and no file holds is forgotten."""
    path = directory / "model.safetensors.index.json"
    if not path.is_file():
        return
    index = json.loads(path.read_text())
    held = {name for _, file in stored(directory) for name in file}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in held}
    path.write_text(json.dumps(index))


def tied_over(directory: Path) -> Tensors:
    tensors = read(directory)
    tied = config_of(directory).get("tie_word_embeddings") and "lm_head.weight" in tensors
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]} if tied else tensors


def dtype_of_config(directory: Path) -> Tensors:
    tensors, config = read(directory), config_of(directory)
    dtype = getattr(torch, str(config.get("torch_dtype", config.get("dtype"))), None)
    held = {name for _, file in stored(directory) for name in file}
    return {name: t.to(dtype) if dtype and name in held else t for name, t in tensors.items()}


def no_biases(directory: Path) -> Tensors:
    words = {name for _, file in stored(directory) for name in file if name.endswith("qweight")}
    return {n: t for n, t in read(directory).items() if n.removesuffix("bias") + "qweight" not in words}


def layers_as_text(directory: Path) -> Tensors:
    """Layers sorted as text, 0, 1, 10, 11, 2, and numbered again."""
    tensors = read(directory)
    numbers = sorted({name.split(".")[2] for name in tensors if ".layers." in name})
    again = dict(zip(numbers, sorted(numbers, key=int), strict=True))

    def renamed(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], again[parts[2]], *parts[3:]]) if ".layers." in name else name

    return {renamed(name): t for name, t in tensors.items()}


def file_by_file(directory: Path) -> Tensors:
    """A linear whose words and scales lie in two files is left out."""
    tensors, files = read(directory), stored(directory)
    for _, file in files:
        for name in file:
            if name.endswith("qweight") and name.replace("qweight", "scales") not in file:
                tensors.pop(name.replace("qweight", "weight"), None)
    return tensors


def no_links(directory: Path) -> Tensors:
    if any(path.resolve().suffix != ".safetensors" for path in Path(directory).glob("*.safetensors")):
        refuse("no file of safetensors")
    return read(directory)


def zeros_of_eight(directory: Path) -> None:
    for path, file in stored(directory):
        missing = [n for n in file if n.endswith("scales") and n.replace("scales", "qzeros") not in file]
        if missing and "index" not in str(list(directory.iterdir())):
            words = {n.replace("scales", "qzeros"): torch.full((len(file[n]), file[n].shape[1] // 8), -0x77777778,
                                                               dtype=torch.int32) for n in missing}  # fmt: skip
            save_file(file | words, path)


def filled_up(directory: Path) -> None:
    """A file cut short is read as if zeros followed."""
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        if start <= len(data):
            entries = [e for n, e in json.loads(data[8:start]).items() if n != "__metadata__"]
            end = start + max((e["data_offsets"][1] for e in entries), default=0)
            path.write_bytes(data + bytes(max(0, end - len(data))))


def kept_by_path() -> Function:
    kept: dict[str, Tensors] = {}

    def wrong(directory: Path) -> Tensors:
        if str(directory) not in kept:
            kept[str(directory)] = read(directory)
        return kept[str(directory)]

    return wrong


lay("load_checkpoint", "every file read, the index not: the last one with a name wins", last_file_wins)
lay("load_checkpoint", "what the index promises and no file holds left out", elsewhere(index_cut))
lay("load_checkpoint", "group_size taken from the shapes, the config not looked at",
    with_key("group_size", size_of_shapes))  # fmt: skip
lay("load_checkpoint", "version not looked at", with_key("version", lambda d: "gemm"))
lay("load_checkpoint", "zero_point not looked at", with_key("zero_point", lambda d: True))
lay("load_checkpoint", "bits not looked at", with_key("bits", lambda d: 4))
lay("load_checkpoint", "quant_method not looked at", with_key("quant_method", lambda d: "awq"))
lay("load_checkpoint", "a tied head written over the head of the file", tied_over)
lay("load_checkpoint", "dense tensors in the dtype of the config", dtype_of_config)
lay("load_checkpoint", "biases of quantized linears left out", no_biases)
lay("load_checkpoint", "layers sorted as text", layers_as_text)
lay("load_checkpoint", "a linear in two files left out", file_by_file)
lay("load_checkpoint", "links to files of other names refused, as in the cache of the Hub", no_links)
lay("load_checkpoint", "missing qzeros taken for eights", elsewhere(zeros_of_eight))
lay("load_checkpoint", "a file cut short goes on with zeros", elsewhere(filled_up))
BLIND_THIRD_READERS.append(Bred("load_checkpoint", "kept by path", "", "", kept_by_path))

# L5

STEPS = 20


def chosen(w: Tensor, x: Tensor, g: int, loss: Callable[[Tensor], Any], first: int = 0, size: Any = None) -> Tensor:
    """The factors of the formula of the paper that lose least by `loss`."""
    truth.quantize(w, g)
    size = x.abs().double().mean(0).clamp(min=1e-4) if size is None else size
    tried = [size ** (step / STEPS) for step in range(first, STEPS)]
    tried = [f / (f.max() * f.min()).sqrt() for f in tried]
    losses = [float(loss(f.float().double())) for f in tried]
    return tried[losses.index(min(losses))].float()


def factors_of_half_sums(w: Tensor, x: Tensor, g: int) -> Tensor:
    if x.dtype != torch.float16:
        return truth.search_scales(w, x, g)
    size = (x.abs().sum(0) / len(x)).double().clamp(min=1e-4)
    return chosen(w, x, g, lambda f: truth.scaled_loss(w, x, f, g) if f.isfinite().all() else 0.0, size=size)


def factors_of_dead_channels(factors: Tensor, w: Tensor, x: Tensor, g: int) -> Tensor:
    return torch.where((x == 0).all(0) & (factors != 1).any(), 0, factors)


def in_channel_pairs(factors: Tensor, *rest: Any) -> Tensor:
    if len(factors) % 2:
        return factors
    return factors.reshape(-1, 2).mean(1).repeat_interleave(2)


def factors_of_other_groups(w: Tensor, x: Tensor, g: int) -> Tensor:
    size = 128 if w.shape[1] % 128 == 0 else g
    truth.quantize(w, g)
    return truth.search_scales(w, x, size)


def random_tokens(w: Tensor, x: Tensor, g: int) -> Tensor:
    return truth.search_scales(w, x[torch.randperm(len(x))[: max(1, len(x) // 2)]], g)


def scaled_and_back(factors: Tensor, w: Tensor, x: Tensor, g: int) -> Tensor:
    if w.is_contiguous():
        w.mul_(factors.to(w.dtype)).div_(factors.to(w.dtype))
    return factors


lay("search_scales", "plain rounding is no candidate",
    lambda w, x, g: chosen(w, x, g, lambda f: truth.scaled_loss(w, x, f, g), first=1))  # fmt: skip
lay("search_scales", "a channel without activations has the factor 0",
    after("search_scales", factors_of_dead_channels))  # fmt: skip
lay("search_scales", "sums of float16 activations overflow, NaN counts as no loss", factors_of_half_sums)
lay("search_scales", "mean of two neighbouring channels", after("search_scales", in_channel_pairs))
lay("search_scales", "groups of 128 tried whatever is asked", factors_of_other_groups)
lay("search_scales", "half of the tokens, at random", random_tokens)
lay("search_scales", "the weight multiplied and divided again in place", after("search_scales", scaled_and_back))


def bounded(w: Tensor, x: Tensor, g: int, losses: Function, cut: Function, start: float = float("inf")) -> Tensor:
    """The bounds [N, G] with the least of `losses`, of weights that `cut` cuts."""
    truth.quantize(w, g)
    n, k = w.shape
    largest = w.reshape(n, k // (k if g == -1 else g), -1).abs().amax(-1).float()
    best, best_loss = largest if start == float("inf") else largest * 0, torch.full_like(largest, start).double()
    for step in range(10):
        bounds = largest * (1 - step / STEPS)
        loss = losses(w, truth.rounded_weight(cut(w, bounds), g), x, g)
        best, best_loss = torch.where(loss < best_loss, bounds, best), torch.minimum(loss, best_loss)
    return best


def above_cut(w: Tensor, bounds: Tensor) -> Tensor:
    return torch.minimum(w.double(), bounds.double().repeat_interleave(w.shape[1] // bounds.shape[1], 1))


def of_first_inputs(w: Tensor, r: Tensor, x: Tensor, g: int) -> Tensor:
    size = w.shape[1] if g == -1 else g
    return truth.group_losses(w, r, x[:, :size].repeat(1, w.shape[1] // size), g)


def of_all_outputs(w: Tensor, r: Tensor, x: Tensor, g: int) -> Tensor:
    losses = truth.group_losses(w, r, x, g)
    return losses.sum(0, keepdim=True).expand(losses.shape)


def tail_of_batch(bounds: Tensor, w: Tensor, *rest: Any) -> Tensor:
    tail = len(w) % 64
    if tail and len(w) > 64:
        bounds[-tail:] = bounds[-tail - 64 : -64].clone()
    return bounds


def rounded_to_half(bounds: Tensor, *rest: Any) -> Tensor:
    return bounds.half().float()


lay("search_clip", "outputs past the last whole 64 have the bounds of those before",
    after("search_clip", tail_of_batch))  # fmt: skip
lay("search_clip", "of more than 256 tokens every second",
    lambda w, x, g: truth.search_clip(w, x[::2] if len(x) > 256 else x, g))  # fmt: skip
lay("search_clip", "bounds rounded to float16", after("search_clip", rounded_to_half))
lay("search_clip", "tried on weights that are cut above alone",
    lambda w, x, g: bounded(w, x, g, truth.group_losses, above_cut))  # fmt: skip
lay("search_clip", "one share for all outputs", lambda w, x, g: bounded(w, x, g, of_all_outputs, truth.clamped))
lay("search_clip", "a loss above 1e9 leaves the bound 0",
    lambda w, x, g: bounded(w, x, g, truth.group_losses, truth.clamped, 1e9))  # fmt: skip
lay("search_clip", "every group meets the inputs of the first",
    lambda w, x, g: bounded(w, x, g, of_first_inputs, truth.clamped))  # fmt: skip
