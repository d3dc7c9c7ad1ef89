"""Checkpoints: a directory or Hub repository opened by its headers, and read one tensor at a time.

Tables in config.py, quant_config.py, headers.py and detection.py say what is refused and why. The rule is that going on
must never give plausible but wrong text. `shards.py` writes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniawq.checkpoint import reading
from miniawq.checkpoint.config import llama_config, refuse_architecture, text_of
from miniawq.checkpoint.detection import QuantizedLinear, find_quantized
from miniawq.checkpoint.headers import INDEX, TensorInfo, some, tensors_of, weight_files
from miniawq.checkpoint.hub import SMALL_FILES, LocalFiles, locate
from miniawq.checkpoint.layouts import LAYOUTS
from miniawq.checkpoint.quant_config import CONFIG_FILES, QuantizationConfig, read_block
from miniawq.errors import UnsupportedCheckpoint
from miniawq.kernel import QuantLinear
from miniawq.model import Llama, LlamaConfig
from miniawq.packing import CODES_PER_WORD, SYMMETRIC_ZERO, Quantized, pack

log = logging.getLogger(__name__)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of what is not packed
DAMAGED = "the file is damaged: download it again"
UNTIED = {"tie_word_embeddings": False}


@dataclass(frozen=True)
class Checkpoint:
    """What the headers of a checkpoint say; values are read when asked for.

    `tensors` holds every tensor under its Hugging Face name, `quantized` every packed linear layer, `linears` the
    (in_features, out_features) of every linear layer. `skeleton` is the model on the meta device: shapes without
    values, each linear layer packed or dense as it is stored. If `mapped`, tensors on a CPU are views of the files,
    which take no memory of their own and need files that stay as they are.
    """

    files: LocalFiles
    config: dict[str, Any]
    model_config: LlamaConfig
    quantization: QuantizationConfig | None
    tensors: dict[str, TensorInfo]
    quantized: dict[str, QuantizedLinear]
    linears: dict[str, tuple[int, int]]
    skeleton: Llama
    notices: list[str] = field(default_factory=list)
    mapped: bool = False

    @property
    def directory(self) -> Path:
        """The directory of the small files: config, tokenizer, chat template."""
        return self.files.directory

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor in the dtype of the file; UnsupportedCheckpoint if a value is not finite, or the file changed."""
        info, device = self.tensors[name], torch.device(device)
        place = path, *_ = self.files.local(info.file), info.key, info.dtype, info.shape
        self.files.unchanged(info.file)
        if self.mapped and device.type == "cpu":
            finite = reading.is_finite_on_disk(*place)
            tensor = reading.map_tensor(*place)
        else:
            tensor = reading.read_tensor(*place, device)
            finite = reading.is_finite(tensor)
        self.files.unchanged(info.file)
        if not finite:
            raise UnsupportedCheckpoint(f"{name} has values that are not finite", f"{path}: NaN or infinity", DAMAGED)
        return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor

    def read_packed(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of a packed linear layer by the names of their parts, checked; absent AutoAWQ zeros become 8."""
        linear = self.quantized[name]
        parts = {part: self.read(tensor, device) for part, tensor in linear.tensors.items()}
        if (shape := parts.get("weight_shape")) is not None and shape.tolist() != [*self.linears[name]][::-1]:
            inputs, outputs = self.linears[name]
            why = f"{name}.weight_shape is {shape.tolist()}, and config.json makes it {[outputs, inputs]}"
            raise UnsupportedCheckpoint("the config and the tensors of this checkpoint disagree", why)
        if linear.layout == "awq" and "qzeros" not in parts:
            parts["qzeros"] = pack(torch.full_like(parts["scales"], SYMMETRIC_ZERO, dtype=torch.uint8))
        return parts

    def read_linear(self, name: str, device: torch.device | str = "cpu") -> Quantized | Tensor:
        """A linear layer: its codes, scales and zeros if it is packed, else its weight [O, I]."""
        if name not in self.quantized:
            return self.read(f"{name}.weight", device)
        linear = self.quantized[name]
        return LAYOUTS[linear.layout].decode(self.read_packed(name, device), linear.group_size)

    def fetched(self) -> "Checkpoint":
        """The checkpoint with all its weight files on this machine, downloaded if need be.

        If config.json ties the head to the embedding and a head with other values is stored, the result is untied: the
        stored head is part of the model.
        """
        self.files.fetch(sorted({info.file for info in self.tensors.values()}))
        if not self.model_config.tie_word_embeddings or HEAD not in self.tensors:
            return self
        if torch.equal(self.read(HEAD), self.read(EMBEDDING)):
            return self
        log.warning("config.json: tie_word_embeddings is true, but the stored lm_head differs: it is used as it is")
        return self.untied()

    def untied(self) -> "Checkpoint":
        """The checkpoint with a head of its own: the stored one, or else a second copy of the embedding."""
        if not self.model_config.tie_word_embeddings:
            return self
        model_config = replace(self.model_config, tie_word_embeddings=False)
        tensors = {HEAD: self.tensors[EMBEDDING]} | self.tensors
        skeleton = build_skeleton(model_config, tensors, self.quantized)
        config = self.config | UNTIED
        return replace(self, config=config, model_config=model_config, tensors=tensors, skeleton=skeleton)

    def with_kv_cache(self, dtype: torch.dtype | None) -> "Checkpoint":
        """The checkpoint whose model keeps keys and values in this dtype; None is that of its activations."""
        if dtype == self.model_config.kv_cache_dtype:
            return self
        model_config = replace(self.model_config, kv_cache_dtype=dtype)
        skeleton = build_skeleton(model_config, self.tensors, self.quantized)
        return replace(self, model_config=model_config, skeleton=skeleton)

    @property
    def side_files(self) -> list[str]:
        """Names of tokenizer, templates, licence and card: another checkpoint of the model takes them byte for byte."""

        def is_side(name: str) -> bool:
            kept = any(Path(name).match(pattern) for pattern in SMALL_FILES) and not name.endswith(INDEX)
            in_place = name.rpartition("/")[0] in ("", "additional_chat_templates")
            return kept and in_place and name not in ("config.json", *CONFIG_FILES)

        return [name for name in self.files.names if is_side(name)]


def open_checkpoint(
    model: str | Path | None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open a directory, a Hub id, "id@revision" or (None) the demo, reading only config and headers.

    UnsupportedCheckpoint, with file and key, if the checkpoint would not give the right text; NotFound if there is
    none.
    """
    files = locate(model, revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir)
    weights = weight_files(files)
    notices: list[str] = []
    config = text_of(files.json("config.json"), notices)
    refuse_architecture(config)
    quantization = read_block(config, {name: files.json(name) for name in CONFIG_FILES if name in files.names})
    model_config = llama_config(config)
    tensors = tensors_of(files, weights, notices)
    check_layers(model_config, tensors, str(files.directory))
    linears = linear_shapes(meta_model(model_config))
    quantized = find_quantized(tensors, quantization, linears)
    if quantized and quantization is None:
        notices.append("no quantization config: layout and group size are taken from the tensors")
    if "lm_head" in quantized:
        config = config | UNTIED if model_config.tie_word_embeddings else config
        model_config = replace(model_config, tie_word_embeddings=False)
    elif HEAD not in tensors and config.get("tie_word_embeddings") is None:
        notices.append("no lm_head is stored: it shares the embedding's matrix")
        model_config = replace(model_config, tie_word_embeddings=True)
    skeleton = build_skeleton(model_config, tensors, quantized)
    check_tensors(skeleton, tensors, quantized, str(files.directory))
    for notice in notices:
        log.warning("%s: %s", files.name, notice)
    return Checkpoint(files, config, model_config, quantization, tensors, quantized, linears, skeleton, notices)


def meta_model(config: LlamaConfig) -> Llama:
    """A dense model on the meta device: shapes without values."""
    with torch.device("meta"), _NoValues():
        return Llama(config)


def linear_shapes(model: Llama) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every linear layer of a dense model, by full name."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


class _NoValues(TorchFunctionMode):
    """Skips the initialisation of parameters: on meta tensors it only imports torch's compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_skeleton(
    config: LlamaConfig, tensors: Mapping[str, TensorInfo], quantized: Mapping[str, QuantizedLinear]
) -> Llama:
    """The model on the meta device, in the dtypes of the files."""
    model = meta_model(config)
    for name, packed in quantized.items():
        # A GEMM word holds eight outputs, a prepacked one eight inputs of a group. Layers of other sizes are dense.
        if packed.out_features % CODES_PER_WORD == 0 and packed.group_size % CODES_PER_WORD == 0:
            dense = model.get_submodule(name)
            scales = packed.tensors.get("scales") or packed.tensors["weight_scale"]
            sizes = packed.in_features, packed.out_features, dense.bias is not None, packed.group_size
            with torch.device("meta"):
                model.set_submodule(name, QuantLinear(*sizes, tensors[scales].dtype))
    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].dtype.is_floating_point:
            parameter.data = parameter.data.to(tensors[name].dtype)
    return model


def check_layers(config: LlamaConfig, tensors: Mapping[str, TensorInfo], directory: str) -> None:
    """UnsupportedCheckpoint if the files hold fewer layers than config.json says, before a model of these is made."""
    held = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    if held < config.num_hidden_layers:
        raise UnsupportedCheckpoint(
            "the tensors are not those of the model that config.json describes",
            f"config.json: num_hidden_layers = {config.num_hidden_layers}; {directory} holds tensors of {held}",
            "the download may be incomplete, or this is a variant of the architecture that is not implemented",
        )


def check_tensors(
    model: Llama, tensors: Mapping[str, TensorInfo], quantized: Mapping[str, QuantizedLinear], directory: str
) -> None:
    """UnsupportedCheckpoint lists tensors that are missing, tensors that the model lacks, wrong shapes and dtypes."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    packed = {name for linear in quantized.values() for name in linear.tensors.values()}
    for name in quantized:
        for part in ("qweight", "qzeros", "scales", "weight"):
            expected.pop(f"{name}.{part}", None)
    found = tensors.keys() - packed
    if model.config.tie_word_embeddings and HEAD not in found:
        expected.pop(HEAD)
    problems = {
        "missing": sorted(expected.keys() - found),
        "unexpected": sorted(found - expected.keys()),
        "of another shape than config.json says": [
            f"{name} {list(tensors[name].shape)} for {list(expected[name])}"
            for name in sorted(expected.keys() & found)
            if tensors[name].shape != expected[name]
        ],
        "of a dtype that is not read": [
            f"{name} {tensors[name]}" for name in sorted(expected.keys() & found) if tensors[name].dtype not in DENSE
        ],
    }
    if any(problems.values()):
        told = [f"{len(names)} tensors are {what}: {some(names)}" for what, names in problems.items() if names]
        raise UnsupportedCheckpoint(
            "the tensors are not those of the model that config.json describes",
            f"{directory}: " + "; ".join(told),
            "the download may be incomplete, or this is a variant of the architecture that is not implemented",
        )
