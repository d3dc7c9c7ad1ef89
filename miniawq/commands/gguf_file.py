"""An INT4 checkpoint as a file of llama.cpp: GGUF, through the package `gguf` (the extra of that name).

Codes stay as they are. llama.cpp's blocks are 32 weights of one output, in 4 bits each, with

    Q4_0    w = (q - 8) d          d in float16
    Q4_1    w = q d + m            d and m in float16: d is the group's scale, m is -zero scale

Q4_0 is exact for symmetric codes with float16 scales. In Q4_1 all weights of a group move by |m + zero scale|. The
product has up to 15 bits and m has 11, so with float16 scales no weight moves by more than 2^-11 zero scale, at most
0.0074 of a scale; where zero is a power of two, by nothing. Other scales are rounded to float16 first, which moves a
weight by q |d - scale| more; bfloat16 ones above 2^-17 are exact.

Names of tensors and keys are those that llama.cpp's `convert_hf_to_gguf.py` writes.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from miniawq.checkpoint.background import ahead
from miniawq.checkpoint.blocks import place_stored, read_stored
from miniawq.checkpoint.opening import Checkpoint
from miniawq.checkpoint.publishing import check_disk
from miniawq.checkpoint.shards import disk_errors
from miniawq.checkpoint.strict import parse_json
from miniawq.errors import InvalidInput, MiniawqError, UnsupportedCheckpoint, UsageError
from miniawq.model import INVERSE_FREQUENCIES, LlamaConfig, RopeConfig, default_frequencies
from miniawq.packing import SYMMETRIC_ZERO, Quantized, dequantize
from miniawq.text.chat import read_templates
from miniawq.text.ggml import vocabulary
from miniawq.text.tokenizer import Tokenizer, read_object

if TYPE_CHECKING:
    import gguf

BLOCK = 32  # weights


class Counterpart(NamedTuple):
    """What llama.cpp calls a family, and what it computes under this name.

    ropes: the rotary embeddings that it has.
    reorders: whether it turns channels (2e, 2e + 1) where we turn (e, e + E/2): queries and keys are reordered for it.
    interleaved: whether it turns (2e, 2e + 1), as the family does.
    turns_parts: whether it turns a part of each head.
    unturned_every: every how many layers there is one without positions.
    switches: what config.json may ask for, and the methods of the writer for its keys.
    """

    name: str
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    reorders: bool = False
    interleaved: bool = False
    turns_parts: bool = False
    unturned_every: int | None = None
    switches: Mapping[str, str] = {}


LLAMA = Counterpart("llama", ropes=("default", "linear", "llama3", "yarn"), reorders=True)
SCALES = {
    "embedding_multiplier": "add_embedding_scale",
    "attention_multiplier": "add_attention_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MinistralForCausalLM": LLAMA,
    "GraniteForCausalLM": Counterpart("granite", reorders=True, switches=SCALES),
    "Qwen2ForCausalLM": Counterpart("qwen2"),
    "Qwen3ForCausalLM": Counterpart("qwen3"),
    "SeedOssForCausalLM": Counterpart("seed_oss"),
    "HunYuanDenseV1ForCausalLM": Counterpart("hunyuan-dense"),
    "Olmo2ForCausalLM": Counterpart("olmo2"),
    "Exaone4ForCausalLM": Counterpart("exaone4", ropes=LLAMA.ropes),
    "SmolLM3ForCausalLM": Counterpart("smollm3", reorders=True, unturned_every=4),
    "Ernie4_5ForCausalLM": Counterpart("ernie4_5", interleaved=True),
    "Phi3ForCausalLM": Counterpart("phi3", ropes=("default", "longrope"), turns_parts=True),
    "GlmForCausalLM": Counterpart("chatglm", interleaved=True, turns_parts=True),
    "Glm4ForCausalLM": Counterpart("glm4", interleaved=True, turns_parts=True),
}
DENSE_KINDS = {torch.float16: "F16", torch.bfloat16: "BF16"}  # of matrices; all the rest is F32


def encode_q4_1(quantized: Quantized) -> Tensor:
    """Rows of blocks as bytes, uint8 [O, 20 I / 32]: d, m, and codes; 0..15 in the low nibbles, 16..31 in the high."""
    return _blocks(quantized, quantized.scales_OG.half(), minima(quantized))


def minima(quantized: Quantized) -> Tensor:
    """m of each group, float16 [O, G]."""
    return -(quantized.scales_OG.float() * quantized.zeros_OG).half()


def encode_q4_0(quantized: Quantized) -> Tensor:
    """Rows of blocks as bytes, uint8 [O, 18 I / 32], of codes whose zeros are all 8."""
    assert (quantized.zeros_OG == SYMMETRIC_ZERO).all()
    return _blocks(quantized, quantized.scales_OG.half())


def _blocks(quantized: Quantized, *numbers: Tensor) -> Tensor:
    """Each block's numbers, one for each group, and its codes."""
    low, high = quantized.codes_OI.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    repeats = quantized.group_size // BLOCK
    parts = [number_OG.repeat_interleave(repeats, 1).unsqueeze(-1).view(torch.uint8) for number_OG in numbers]
    if not all(number_OG.isfinite().all() for number_OG in numbers):
        raise InvalidInput("a scale does not fit into a GGUF file", "times its zero it is beyond 65504, float16's end")
    return torch.cat([*parts, low | high << 4], dim=-1).flatten(1)


class BlockKind(NamedTuple):
    """How llama.cpp stores four-bit weights."""

    nbytes: int
    encode: Callable[[Quantized], Tensor]


BLOCK_KINDS = {"Q4_0": BlockKind(18, encode_q4_0), "Q4_1": BlockKind(20, encode_q4_1)}


def largest_move(quantized: Quantized, kind: str) -> float:
    """How far a weight is at most from its own number in a file, in scales of its group."""
    scales_OG, zeros_OG = quantized.scales_OG.double(), quantized.zeros_OG.double()
    stored_OG = quantized.scales_OG.half().double()
    minima_OG = minima(quantized).double() if kind == "Q4_1" else -zeros_OG * stored_OG
    ends = [(code * (stored_OG - scales_OG) + minima_OG + zeros_OG * scales_OG).abs() for code in (0, 15)]
    return float((torch.maximum(*ends) / scales_OG).max())


class GgufTensor(NamedTuple):
    """A tensor of the file: where it comes from, the name of its `GGMLQuantizationType`, and its shape."""

    name: str
    module: str
    leaf: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


def require_gguf() -> None:
    """UsageError without the package."""
    if find_spec("gguf") is None:
        raise UsageError("a GGUF file needs the package gguf", "it is not installed", 'pip install "miniawq[gguf]"')


def write_gguf(
    checkpoint: Checkpoint, path: Path, kind: str, pieces: Sequence[tuple[str, str]], device: torch.device
) -> tuple[set[str], list[int], float]:
    """Write `pieces` ((module, leaf), "packed" for INT4) with blocks of a kind, and read all of it again.

    Returns the layers that are packed, the bytes of each tensor, and the largest move of a weight.
    """
    import gguf

    config = checkpoint.model_config
    there = architecture_there(config)
    writer = gguf.GGUFWriter(path, there.name)
    _add_config(writer, checkpoint, kind)
    _add_tokenizer(writer, checkpoint)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[there.name], config.num_hidden_layers)
    planned = [_planned(checkpoint, kind, names.get_name(module), module, leaf) for module, leaf in pieces]
    factors = frequency_factors(config.rope)
    planned += [GgufTensor(name, "", "", "F32", tuple(values.shape), values.nbytes) for name, values in factors.items()]
    for tensor in planned:
        raw = gguf.GGMLQuantizationType[tensor.kind]
        # With a raw dtype the package asks only whether this one counts bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, torch.empty(0).numpy().dtype, tensor.nbytes, raw_dtype=raw)
    digests, moves = [], [0.0]
    check_disk(path, sum(tensor.nbytes for tensor in planned))
    with disk_errors(path.parent):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    values = (_value(checkpoint, tensor, moves, device) for tensor in planned)
    for value in tqdm(ahead(values), total=len(planned), desc="converting", unit="tensor", disable=None):
        content = value.contiguous().view(torch.uint8).numpy()
        digests.append(hashlib.sha256(content).digest())
        with disk_errors(path.parent):
            writer.write_tensor_data(content)
    with disk_errors(path.parent):
        writer.close()
    _check(path, planned, digests)
    packed = {tensor.module for tensor in planned if tensor.kind == kind}
    return packed, [tensor.nbytes for tensor in planned], max(moves)


def architecture_there(config: LlamaConfig) -> Counterpart:
    """What llama.cpp has for this model; UnsupportedCheckpoint where it computes something else."""
    there = ARCHITECTURES.get(config.architecture)
    what, fix = "this model cannot be written for llama.cpp", "run it with another engine: miniawq plan names some"
    if there is None:
        why = f"{config.architecture} is none of {', '.join(ARCHITECTURES)}"
        raise UnsupportedCheckpoint(what, why, fix)
    changed = [
        item.name
        for item in fields(config)
        if item.name not in ("names", *there.switches) and item.default not in (MISSING, getattr(config, item.name))
    ]
    if changed:
        raise UnsupportedCheckpoint(what, f"{', '.join(changed)}: {there.name} has no such switch there", fix)
    rope = config.rope
    unturned, layers = replace(rope, rotary_dim=0), range(1, config.num_hidden_layers + 1)
    layer_ropes = tuple(unturned if there.unturned_every and not n % there.unturned_every else rope for n in layers)
    yarn = (rope.beta_fast, rope.beta_slow, rope.truncate, rope.attention_factor)
    known = (
        rope.rope_type in there.ropes
        and (rope.rope_type != "yarn" or yarn == (32, 1, True, 0.1 * math.log(rope.factor) + 1))
        and (rope.rotary_dim == config.head_dim or there.turns_parts)
        and (rope.interleaved, rope.llama_4_scaling_beta) == (there.interleaved, 0)
        and config.layer_ropes == layer_ropes
    )
    if not known:
        why = f"config.json: its rotary embedding, {rope.rope_type}, has no counterpart for {there.name} there"
        raise UnsupportedCheckpoint(what, why, fix)
    return there


def frequency_factors(rope: RopeConfig) -> dict[str, Tensor]:
    """What llama.cpp divides the frequencies of a rotary embedding by, float32 [R/2], under its names."""
    if rope.rope_type == "llama3":
        return {"rope_freqs.weight": default_frequencies(rope, 0) / INVERSE_FREQUENCIES["llama3"](rope, 0)}
    if rope.rope_type == "longrope":
        factors = {"long": rope.long_factor, "short": rope.short_factor}
        return {f"rope_factors_{name}.weight": torch.tensor(values) for name, values in factors.items()}
    return {}


def _add_config(writer: "gguf.GGUFWriter", checkpoint: Checkpoint, kind: str) -> None:
    """The model's sizes, and its rotary embedding."""
    import gguf

    config = checkpoint.model_config
    windows = [window for window in config.layer_windows if window]
    writer.add_name(checkpoint.directory.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # llama.cpp gives these architectures no window: within the smallest one there is no difference.
    writer.add_context_length(min([config.max_position_embeddings, *windows]))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.rope.rotary_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    if config.rope.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.rope_type))
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.rope_type == "longrope":
        writer.add_rope_scaling_attn_factors(config.rope.attention_factor)
    if config.rope.rope_type in ("linear", "yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
    for name, add in ARCHITECTURES[config.architecture].switches.items():
        getattr(writer, add)(getattr(config, name))


def _add_tokenizer(writer: "gguf.GGUFWriter", checkpoint: Checkpoint) -> None:
    """The vocabulary, what stands around a text, and the chat templates."""
    directory = checkpoint.directory
    tokenizer = Tokenizer(directory)
    found = vocabulary(parse_json(directory / "tokenizer.json"), checkpoint.model_config.vocab_size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre_tokenizer)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    if found.scores:
        writer.add_token_scores(found.scores)
    else:
        writer.add_token_merges(found.merges)
    writer.add_add_space_prefix(found.leading_space)
    ids = {token: token_id for token_id, token in enumerate(found.tokens)}
    special = {name: ids[token] for name, token in tokenizer.special_tokens.items() if token in ids}
    ends = tokenizer.end_of_turn_ids() | tokenizer.eos_ids
    eos_id = special.get("eos_token")
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, eos_id),
        (writer.add_eot_token_id, min(ends - {eos_id}, default=None)),
        (writer.add_unk_token_id, special.get("unk_token")),
        (writer.add_pad_token_id, special.get("pad_token")),
    ):
        if token_id is not None:
            add(token_id)
    plain, framed = tokenizer.encode("a", False), tokenizer.encode("a")
    writer.add_add_bos_token(framed[: len(framed) - len(plain)] == [tokenizer.bos_id])
    writer.add_add_eos_token(len(framed) > len(plain) and framed[-1] == eos_id)
    if templates := read_templates(directory, read_object(directory / "tokenizer_config.json")):
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])


def _planned(checkpoint: Checkpoint, kind: str, name: str | None, module: str, leaf: str) -> GgufTensor:
    """What will be written of a piece."""
    assert name is not None, f"llama.cpp has no name for {module}"
    if leaf == "packed":
        linear = checkpoint.quantized[module]
        outputs, inputs = linear.out_features, linear.in_features
        if linear.group_size % BLOCK == 0:
            row = inputs // BLOCK * BLOCK_KINDS[kind].nbytes
            return GgufTensor(f"{name}.weight", module, leaf, kind, (outputs, inputs), outputs * row)
        scales = linear.tensors.get("scales") or linear.tensors["weight_scale"]
        leaf, info = "unpacked", checkpoint.tensors[scales]._replace(shape=(outputs, inputs))
    else:
        info = checkpoint.tensors[f"{module}.{leaf}"]
    dtype, shape = info.dtype, info.shape
    dense = DENSE_KINDS.get(dtype, "F32") if len(shape) == 2 else "F32"
    nbytes = torch.Size(shape).numel() * (4 if dense == "F32" else 2)
    return GgufTensor(f"{name}.{'bias' if leaf == 'bias' else 'weight'}", module, leaf, dense, shape, nbytes)


def _value(checkpoint: Checkpoint, tensor: GgufTensor, moves: list[float], device: torch.device) -> Tensor:
    """The bytes or numbers of a tensor, on the host; appends the largest move of its weights to `moves`."""
    config = checkpoint.model_config
    if not tensor.module:
        return frequency_factors(config.rope)[tensor.name]
    if tensor.leaf in ("weight", "bias"):
        stored = checkpoint.read(f"{tensor.module}.{tensor.leaf}")
        return _turned(config, tensor.module, stored if tensor.kind in DENSE_KINDS.values() else stored.float())
    place = read_stored(checkpoint, f"{tensor.module}.weight", device)
    quantized = place_stored(checkpoint, tensor.module, place, device)
    assert isinstance(quantized, Quantized)
    quantized = Quantized(*(_turned(config, tensor.module, part) for part in quantized))
    if tensor.leaf == "unpacked":
        return dequantize(quantized).cpu()
    moves.append(largest_move(quantized, tensor.kind))
    return BLOCK_KINDS[tensor.kind].encode(quantized).cpu()


def _turned(config: LlamaConfig, module: str, rows: Tensor) -> Tensor:
    """The outputs of a query or key in the order of llama.cpp's rotary embedding: (e, e + E/2) become neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.rpartition(".")[2])
    if heads is None or not ARCHITECTURES[config.architecture].reorders:
        return rows
    return rows.unflatten(0, (heads, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _check(path: Path, planned: list[GgufTensor], digests: list[bytes]) -> None:
    """MiniawqError names the first tensor whose bytes are not those that were written."""
    import gguf

    for written, tensor, digest in zip(gguf.GGUFReader(path).tensors, planned, digests, strict=True):
        if written.name != tensor.name or hashlib.sha256(written.data.tobytes()).digest() != digest:
            fix = "nothing is published: run again; report it if that fails, too"
            raise MiniawqError(f"the written file is wrong at {tensor.name}", "other bytes were written", fix)
