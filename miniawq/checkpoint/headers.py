"""Which files of a checkpoint hold the model, and which tensors they hold, from their headers alone."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from miniawq.checkpoint.hub import LocalFiles
from miniawq.checkpoint.quant_config import refuse_layout
from miniawq.checkpoint.shards import DTYPE_NAMES
from miniawq.checkpoint.values import checked_values, shown
from miniawq.errors import UnsupportedCheckpoint

STORED_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LARGEST = 1 << 48  # of a shape: with a 0 beside it, any number takes no bytes
SHOWN = 5  # names in a message
# Names in models of text and pictures.
OF_TEXT = re.compile(r"^(model\.)?language_model\.(model\.)?")
OF_PICTURES = re.compile(r"^(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
IGNORED_WITH_NOTICE = re.compile(r"\.(k_scale|v_scale|q_scale|input_scale|output_scale)$")

# Kinds of weight files that are never read, with what they are.
FOREIGN_FILES = {
    r"\.gguf$": ("GGUF", "made for llama.cpp"),
    r"(^|/)openvino_.*\.(xml|bin|json)$": ("OpenVINO", "made for OpenVINO"),
    r"\.(bin|pt|pth|ckpt|pkl)$": ("pickle", "pickles can run code when they are loaded, so miniawq never opens them"),
    r"\.(onnx|h5|msgpack|npz)$": ("another framework's", "not safetensors"),
}
# Files with these names hold the weights a second time, or something else.
OTHER_SAFETENSORS = re.compile(r"^(consolidated.*|adapter_model|optimizer|.*/.*)\.safetensors$")
INDEX = ".safetensors.index.json"


class TensorInfo(NamedTuple):
    """A tensor on disk, as the header of its file describes it; `key` is its name in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    key: str

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]} {list(self.shape)} in {self.file}"


def weight_files(files: LocalFiles) -> dict[str, set[str]]:
    """The safetensors files that hold the model, each with the tensors that the index, if there is one, promises."""
    found = [name for name in files.names if name.endswith(".safetensors") and not OTHER_SAFETENSORS.match(name)]
    indexes = [name for name in files.names if name.endswith(INDEX) and "/" not in name]
    if "hf_quant_config.json" in files.names:
        refuse_layout("NVIDIA ModelOpt", "hf_quant_config.json is its file")
    if "model.safetensors" in found or (len(found) == 1 and not indexes):
        return {"model.safetensors" if "model.safetensors" in found else found[0]: set()}
    if "model" + INDEX in indexes or len(indexes) == 1:
        return _indexed_files(files, "model" + INDEX if "model" + INDEX in indexes else indexes[0])
    if found:
        raise UnsupportedCheckpoint(
            "it is not clear which files hold the model",
            f"there is no index, and several files: {some(found)}",
            f"download the repository again: model{INDEX} is missing",
        )
    for pattern, (kind, why) in FOREIGN_FILES.items():
        if names := [name for name in files.names if re.search(pattern, name)]:
            refuse_layout(kind, f"{some(names)}: {why}")
    raise files.missing(["model.safetensors"])


def _indexed_files(files: LocalFiles, index: str) -> dict[str, set[str]]:
    weight_map = checked_values(index, files.json(index), {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedCheckpoint(f"{index} has no weight_map", "", "download the repository again")
    shards = sorted(set(map(str, weight_map.values())))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UnsupportedCheckpoint(
                f"{index} names a file outside the checkpoint",
                f"weight_map: {shown(shard)} is no plain name of a safetensors file",
                "do not use this upload: such an index can read files it should not",
            )
    if missing := [shard for shard in shards if shard not in files.names]:
        raise files.missing([f"{some(missing)} ({len(missing)} of {len(shards)} files that {index} names)"])
    return {shard: {key for key, file in weight_map.items() if file == shard} for shard in shards}


def tensors_of(files: LocalFiles, weights: Mapping[str, set[str]], notices: list[str]) -> dict[str, TensorInfo]:
    """Every tensor of the model under its Hugging Face name. A notice about tensors left out is added to `notices`."""
    tensors: dict[str, TensorInfo] = {}
    ignored = []
    for file, promised in weights.items():
        header = files.header(file)
        if absent := sorted(promised - header.keys()):
            raise UnsupportedCheckpoint(
                f"{file} does not hold what the index says",
                f"index.json: weight_map puts {some(absent)} there",
                "the files may be from different uploads: download the repository again",
            )
        for key, (dtype, shape) in header.items():
            name = "model." + key if key.startswith(("layers.", "embed_tokens.", "norm.")) else key
            name = OF_TEXT.sub("" if ".lm_head." in name else "model.", name)
            if OF_PICTURES.match(name) or IGNORED.search(name):
                continue
            if IGNORED_WITH_NOTICE.search(name):
                ignored.append(name)
                continue
            if name in tensors:
                raise UnsupportedCheckpoint(f"tensor {name} is there twice", f"in {tensors[name].file} and in {file}")
            if max(shape, default=0) > LARGEST:
                why = f"{file}: tensor {name} has the shape {list(shape)}"
                raise UnsupportedCheckpoint(f"{file} is damaged", why, "download the file again")
            if dtype not in STORED_DTYPES:
                refuse_layout(dtype, f"tensor {name} in {file} is {dtype}")
            tensors[name] = TensorInfo(STORED_DTYPES[dtype], shape, file, key)
    if ignored:
        notices.append(f"scales of activations and of the kv cache are not used: {some(ignored)}")
    return tensors


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(name[:200] for name in names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
