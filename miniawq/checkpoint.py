"""Checkpoints: a directory or Hub repository opened by its headers, read one tensor at a time, loaded as a model.

What is refused, and why, is in tables here and in quant_config.py and layouts.py; the rule is that going on must never
give plausible but wrong text. Writing is in shards.py.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniawq import reading
from miniawq.errors import UnsupportedCheckpoint
from miniawq.hub import SMALL_FILES, LocalFiles, locate
from miniawq.kernel import QuantLinear
from miniawq.layouts import QuantizedLinear, TensorInfo, find_quantized
from miniawq.model import LinearFactory, Llama, LlamaConfig, dense, loaded_dtype
from miniawq.packing import CODES_PER_WORD, LAYOUTS, SYMMETRIC_ZERO, Quantized, dequantize, pack
from miniawq.quant_config import CONFIG_FILES, QuantizationConfig, read_block, refuse_layout
from miniawq.shards import DTYPE_NAMES, write_bytes

log = logging.getLogger(__name__)

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SHOWN = 5
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
IGNORED_WITH_NOTICE = re.compile(r"\.(k_scale|v_scale|q_scale|input_scale|output_scale)$")

# Keys of config.json that change the mathematics, with what they stand for.
FOREIGN_KEYS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "mixture of experts"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "multi-head latent attention"),
    **dict.fromkeys(("linear_num_key_heads", "mamba_d_state", "mamba_d_ssm", "ssm_cfg"), "hybrid layers"),
    **dict.fromkeys(("vision_config", "audio_config", "thinker_config"), "pictures or sound as input"),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), "Gemma's soft-capping"),
    **dict.fromkeys(("alibi", "position_embedding_type"), "positions other than rotary ones"),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), "scaled residuals"
    ),
    "add_bias_to_lm_head": "a bias on the head",
}
ATTENTION_TYPES = {"full_attention", "sliding_attention"}
# Kinds of weight files that are never read, with what they are.
FOREIGN_FILES = {
    r"\.gguf$": ("GGUF", "made for llama.cpp"),
    r"(^|/)openvino_.*\.(xml|bin|json)$": ("OpenVINO", "made for OpenVINO"),
    r"\.(bin|pt|pth|ckpt|pkl)$": ("pickle", "pickles can run code when they are loaded, so miniawq never opens them"),
    r"\.(onnx|h5|msgpack|npz)$": ("another framework's", "not safetensors"),
}
# Files with these names repeat weights, or hold something else.
OTHER_SAFETENSORS = re.compile(r"^(consolidated.*|adapter_model|optimizer|.*/.*)\.safetensors$")
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What the headers of a checkpoint say; values are read when asked for.

    `tensors` has every tensor under its Hugging Face name, `quantized` the packed linear layers among them.
    """

    files: LocalFiles
    config: dict[str, Any]
    model_config: LlamaConfig
    quantization: QuantizationConfig | None
    tensors: dict[str, TensorInfo]
    quantized: dict[str, QuantizedLinear]
    linears: dict[str, tuple[int, int]]
    notices: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """Where the small files are: config, tokenizer, chat template."""
        return self.files.directory

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor, in the dtype of the file; on a CPU it is a view of the file until it is changed."""
        info = self.tensors[name]
        path = self.files.local(info.file)
        if torch.device(device).type == "cuda":
            tensor = reading.read(path, info.key, info.dtype, info.shape, torch.device(device))
        else:
            # The file is opened for each tensor: a handle kept open would count all pages ever read as our memory.
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensor = file.get_tensor(info.key)
        return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor

    def read_packed(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of a packed linear layer by their part names, checked; absent AutoAWQ zeros are filled in."""
        linear = self.quantized[name]
        parts = {part: self.read(tensor, device) for part, tensor in linear.tensors.items()}
        scales = parts["weight_scale" if linear.layout == "compressed-tensors" else "scales"]
        if not scales.isfinite().all():
            raise _damaged(f"{name} has scales that are not finite", self.tensors, linear.tensors.values())
        if (shape := parts.get("weight_shape")) is not None and shape.tolist() != [*self.linears[name]][::-1]:
            inputs, outputs = self.linears[name]
            why = f"{name}.weight_shape is {shape.tolist()}, and config.json makes it {[outputs, inputs]}"
            raise UnsupportedCheckpoint("the config and the tensors of this checkpoint disagree", why)
        if linear.layout == "awq" and "qzeros" not in parts:
            parts["qzeros"] = pack(torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8))
        return parts

    def read_linear(self, name: str, device: torch.device | str = "cpu") -> Quantized | Tensor:
        """A linear layer: codes, scales and zeros [O, I] when it is packed, else its weight."""
        if name not in self.quantized:
            return self.read(f"{name}.weight", device)
        linear = self.quantized[name]
        return LAYOUTS[linear.layout].decode(self.read_packed(name, device), linear.group_size)

    def fetch(self) -> None:
        """Download the weight files that are not here yet."""
        self.files.fetch(sorted({info.file for info in self.tensors.values()}))

    def copy_side_files(self, directory: Path) -> None:
        """Copy tokenizer, templates, licence and card to another checkpoint, byte for byte."""
        for name in self.files.names:
            kept = any(Path(name).match(pattern) for pattern in SMALL_FILES) and not name.endswith(INDEX)
            in_place = name.rpartition("/")[0] in ("", "additional_chat_templates")
            if kept and in_place and name not in ("config.json", *CONFIG_FILES):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(directory / name, self.files.local(name).read_bytes())


def open_checkpoint(
    model: str | Path | None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open a directory, a Hub id, "id@revision" or (None) the demo, reading config and headers only.

    UnsupportedCheckpoint with the file and key when it would not give the right text; NotFound when it is not there.
    """
    files = locate(model, revision=revision, local_files_only=local_files_only, token=token, cache_dir=cache_dir)
    weights = weight_files(files)
    config = files.json("config.json")
    quantization = read_block(config, {name: files.json(name) for name in CONFIG_FILES if name in files.names})
    refuse_architecture(config)
    model_config = LlamaConfig.from_dict(config)
    linears = linear_shapes(model_config)
    notices: list[str] = []
    tensors = _headers(files, weights, notices)
    quantized = find_quantized(tensors, quantization, linears)
    if quantized and quantization is None:
        notices.append("no quantization config: layout and group size are taken from the tensors")
    if "lm_head" in quantized:
        model_config = dataclasses.replace(model_config, tie_word_embeddings=False)
    elif "lm_head.weight" not in tensors and "tie_word_embeddings" not in config:
        notices.append("no lm_head is stored: it shares the embedding's matrix")
        model_config = dataclasses.replace(model_config, tie_word_embeddings=True)
    for notice in notices:
        log.warning("%s: %s", files.name, notice)
    return Checkpoint(files, config, model_config, quantization, tensors, quantized, linears, notices)


def refuse_architecture(config: Mapping[str, Any]) -> None:
    """UnsupportedCheckpoint on keys of config.json that ask for other mathematics than the Llama family's."""
    for key, meaning in FOREIGN_KEYS.items():
        if value := config.get(key):
            said = f"{key} = {value!r}" if isinstance(value, int | float | str) else key
            raise UnsupportedCheckpoint(
                f"{(config.get('architectures') or ['this model'])[0]} is not implemented",
                f"config.json: {said} asks for {meaning}",
                "use a dense Llama, Mistral, Qwen2 or Qwen3 model, or an engine that supports this one",
            )
    if other := sorted(set(config.get("layer_types") or ()) - ATTENTION_TYPES):
        raise UnsupportedCheckpoint(
            "layers of this kind are not implemented",
            f"config.json: layer_types has {', '.join(map(str, other))}",
            "use a model with attention in all layers, or an engine that supports this one",
        )


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every linear layer of the model, by full name."""
    shapes: dict[str, tuple[int, int]] = {}

    def record(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        shapes[name] = inputs, outputs
        return nn.Identity()

    meta_model(config, record)
    return shapes


def meta_model(config: LlamaConfig, linear: LinearFactory = dense) -> Llama:
    """A model of shapes without values."""
    with torch.device("meta"), _NoValues():
        return Llama(config, linear)


class _NoValues(TorchFunctionMode):
    """Modules are made without initialising them, which on meta tensors would only import torch's compiler: seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def weight_files(files: LocalFiles) -> dict[str, set[str]]:
    """The safetensors files that hold the model, and the tensors that an index (if there is one) puts into each."""
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
            f"there is no index, and several files: {_some(found)}",
            f"download the repository again: model{INDEX} is missing",
        )
    for pattern, (kind, why) in FOREIGN_FILES.items():
        if names := [name for name in files.names if re.search(pattern, name)]:
            refuse_layout(kind, f"{_some(names)}: {why}")
    raise files.missing(["model.safetensors"])


def _indexed_files(files: LocalFiles, index: str) -> dict[str, set[str]]:
    weight_map = files.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedCheckpoint(f"{index} has no weight_map", "", "download the repository again")
    shards = sorted(set(map(str, weight_map.values())))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UnsupportedCheckpoint(
                f"{index} names a file outside the checkpoint",
                f"weight_map: {shard!r} is no plain name of a safetensors file",
                "do not use this upload: such an index can read files it should not",
            )
    if missing := [shard for shard in shards if shard not in files.names]:
        raise files.missing([f"{_some(missing)} ({len(missing)} of {len(shards)} files that {index} names)"])
    return {shard: {key for key, file in weight_map.items() if file == shard} for shard in shards}


def _headers(files: LocalFiles, weights: Mapping[str, set[str]], notices: list[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    ignored = []
    for file, promised in weights.items():
        header = files.header(file)
        if absent := sorted(promised - header.keys()):
            raise UnsupportedCheckpoint(
                f"{file} does not hold what the index says",
                f"index.json: weight_map puts {_some(absent)} there",
                "the files may be from different uploads: download the repository again",
            )
        for key, (dtype, shape) in header.items():
            name = "model." + key if key.startswith(("layers.", "embed_tokens.", "norm.")) else key
            if IGNORED.search(name):
                continue
            if IGNORED_WITH_NOTICE.search(name):
                ignored.append(name)
                continue
            if name in tensors:
                raise UnsupportedCheckpoint(f"tensor {name} is there twice", f"in {tensors[name].file} and in {file}")
            if dtype not in DTYPES:
                refuse_layout(dtype, f"tensor {name} in {file} is {dtype}")
            tensors[name] = TensorInfo(DTYPES[dtype], shape, file, key)
    if ignored:
        notices.append(f"scales of activations and of the kv cache are not used: {_some(ignored)}")
    return tensors


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16) -> Llama:
    """The model with all its weights, to compute in `dtype`: packed layers as `QuantLinear`, scales as stored.

    Dense tensors take `dtype`, except that matrices of 16 bits do not become wider. What keeps its dtype is a view of
    the file on a CPU. One tensor is read at a time, so a second copy of the model never exists. UnsupportedCheckpoint
    lists what is missing, what is too much and what has another shape.
    """
    model = skeleton(checkpoint)
    checkpoint.fetch()
    if _head_differs(checkpoint):
        log.warning("config.json: tie_word_embeddings is true, but the stored lm_head differs: it is used as it is")
        untied = dataclasses.replace(checkpoint.model_config, tie_word_embeddings=False)
        model = skeleton(dataclasses.replace(checkpoint, model_config=untied))
    for name, module in model.named_modules():
        for leaf, tensor in _values(checkpoint, name, module, device, dtype):
            module.load_state_dict({leaf: tensor}, strict=False, assign=True)
        if isinstance(module, QuantLinear):
            module.prepare()
    model.tie_weights()
    return model.requires_grad_(False).eval()


def skeleton(checkpoint: Checkpoint) -> Llama:
    """The model on the meta device: shapes without values, each linear layer packed or dense as it is stored.

    UnsupportedCheckpoint when the checkpoint's tensors are not those of this model.
    """
    model = meta_model(checkpoint.model_config, lambda *layer: _make_linear(checkpoint, *layer))
    _check_tensors(checkpoint, model)
    for name, parameter in model.named_parameters():
        if name in checkpoint.tensors and checkpoint.tensors[name].dtype.is_floating_point:
            parameter.data = parameter.data.to(checkpoint.tensors[name].dtype)
    return model


def _make_linear(checkpoint: Checkpoint, name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    packed = checkpoint.quantized.get(name)
    # GEMM words hold eight outputs, the kernel's eight inputs of one group; a layer of other numbers is unpacked.
    if packed is None or outputs % CODES_PER_WORD or packed.group_size % CODES_PER_WORD:
        return dense(name, inputs, outputs, bias)
    scales = packed.tensors.get("scales") or packed.tensors["weight_scale"]
    return QuantLinear(inputs, outputs, bias, packed.group_size, checkpoint.tensors[scales].dtype)


def _values(
    checkpoint: Checkpoint, name: str, module: nn.Module, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that belong to one module itself, by their names in it."""
    if isinstance(module, QuantLinear):
        linear = checkpoint.quantized[name]
        parts = checkpoint.read_packed(name, device)
        if linear.layout != "awq":
            parts = LAYOUTS["awq"].encode(LAYOUTS[linear.layout].decode(parts, linear.group_size))
        yield from parts.items()
    elif name in checkpoint.quantized:
        quantized = checkpoint.read_linear(name, device)
        assert isinstance(quantized, Quantized)
        yield "weight", dequantize(quantized, dtype)
    for leaf in ("weight", "bias"):
        if f"{name}.{leaf}" in checkpoint.tensors:
            tensor = checkpoint.read(f"{name}.{leaf}", device)
            yield leaf, tensor.to(loaded_dtype(tensor.dtype, tensor.dim(), dtype))


def _head_differs(checkpoint: Checkpoint) -> bool:
    """Whether a head is stored that is not the embedding's matrix, though config.json ties the two."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not checkpoint.model_config.tie_word_embeddings or head not in checkpoint.tensors:
        return False
    return not torch.equal(checkpoint.read(head), checkpoint.read(embedding))


def _check_tensors(checkpoint: Checkpoint, model: Llama) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    packed = {name for linear in checkpoint.quantized.values() for name in linear.tensors.values()}
    for name in checkpoint.quantized:
        for part in ("qweight", "qzeros", "scales", "weight"):
            expected.pop(f"{name}.{part}", None)
    found = checkpoint.tensors.keys() - packed
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        found -= {"lm_head.weight"}
    problems = {
        "missing": sorted(expected.keys() - found),
        "unexpected": sorted(found - expected.keys()),
        "of another shape than config.json says": [
            f"{name} {list(checkpoint.tensors[name].shape)} for {list(expected[name])}"
            for name in sorted(expected.keys() & found)
            if checkpoint.tensors[name].shape != expected[name]
        ],
    }
    if any(problems.values()):
        told = [f"{len(names)} tensors are {what}: {_some(names)}" for what, names in problems.items() if names]
        raise UnsupportedCheckpoint(
            "the tensors are not those of the model that config.json describes",
            f"{checkpoint.directory}: " + "; ".join(told),
            "the download may be incomplete, or this is a variant of the architecture that is not implemented",
        )


def _damaged(what: str, tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> UnsupportedCheckpoint:
    shown = ", ".join(f"{name} {tensors[name]}" for name in names)
    return UnsupportedCheckpoint(what, shown, "the file is damaged: download it again")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
