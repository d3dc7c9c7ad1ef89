"""`miniawq plan MODEL`: what is in a checkpoint, what memory it needs, and which engines can run it.

Everything comes from config.json and the headers of the weight files; no weights of a Hub repository are downloaded.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from miniawq import cli
from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.detection import QuantizedLinear
from miniawq.checkpoint.hub import HubFiles, add_hub_flags, hub_options
from miniawq.checkpoint.layouts import part_shapes
from miniawq.checkpoint.loading import DTYPES, KV_DTYPES, add_kv_dtype_flag
from miniawq.checkpoint.opening import Checkpoint, linear_shapes, meta_model, open_checkpoint
from miniawq.checkpoint.quant_config import QuantizationConfig, read_block
from miniawq.checkpoint.shards import DTYPE_NAMES, Spec
from miniawq.commands.gguf_file import architecture_there
from miniawq.commands.sizes import LARGEST, add_memory_margin_flag, parse_size
from miniawq.engine.memory import (
    PREFILL_CHUNK,
    Footprint,
    check_fit,
    footprint,
    kv_bytes_per_token,
    parts_of,
)
from miniawq.errors import UnsupportedCheckpoint, UsageError
from miniawq.hardware import DeviceMemory, device_memory, named_device, pick_device, size
from miniawq.model import LlamaConfig

DEGREES = (1, 2, 4, 8)
DEFAULT_CONTEXT = 8192
EXAMPLES = (
    "miniawq plan Qwen/Qwen3-8B-AWQ",
    "miniawq plan my-awq --device cuda --device-memory 24GiB --batch 8",
    "miniawq plan my-awq --max-seq-len 32768 --json",
)


def tensors_from_config(config: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> list[Spec]:
    """The tensors of a checkpoint with this quantized config.json, as if it were written by us.

    All linear layers but the head are packed in groups of the config's size; scales and dense tensors have `dtype`.
    """
    model_config = llama_config(config)
    block = read_block(config, {})
    if block is None or block.layout is None or not block.group_sizes:
        raise UsageError("this config.json says no quantization layout or group size")
    layout = "compressed-tensors-symmetric" if block.symmetric and block.layout != "awq" else block.layout
    (group_size,) = block.group_sizes
    model = meta_model(model_config)
    stored, linears = model.state_dict(), linear_shapes(model)
    specs: list[Spec] = []
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        if name == "lm_head.weight" and model_config.tie_word_embeddings:
            continue
        if leaf == "weight" and layer in linears and layer != "lm_head":
            inputs, outputs = linears[layer]
            groups = 1 if group_size == -1 else inputs // group_size
            parts = part_shapes(layout, inputs, outputs, groups, dtype)
            specs += [Spec(f"{layer}.{part}", kind, shape) for part, (kind, shape) in parts.items()]
        else:
            specs.append(Spec(name, dtype, tuple(tensor.shape)))
    return specs


@dataclass(frozen=True)
class EngineLimit:
    """What a kernel asks of a packed layer: divisors of its inputs and outputs on each device, and its group sizes.

    The outputs of a packed head are a multiple of `head`; 0 if none is read. `degrees` are those that can be asked for.
    """

    inputs: int
    outputs: int
    group_sizes: tuple[int, ...] | None = None
    head: int = 1
    degrees: tuple[int, ...] = DEGREES


# Read in these versions. vLLM: `layers/quantization/auto_awq.py` and `kernels/linear/mixed_precision` under
# model_executor; it takes the last kernel here that has no obstacle, Machete on Hopper alone, the CPU's own on a CPU
# (its build lacks the operation without AVX-512). Its Marlin pads shapes that fill no tile; it pads a vocabulary to
# multiples of 64 and then loads no AWQ words of a head. SGLang: `marlin_utils.py` under srt/layers/quantization; other
# shapes get a slow kernel. transformers: `quantizers`, with `torch_awq.py` of gptqmodel 7.7.0 for AWQ. It and
# llama.cpp, which `convert` writes a file for, run a layer on one device.
ENGINES_OF = "vLLM 0.32.0, SGLang 0.5.23, transformers 5.24.0"
AWQ_KERNEL = EngineLimit(inputs=1, outputs=8)
MARLIN = EngineLimit(inputs=1, outputs=8, group_sizes=(-1, 32, 64, 128))
MACHETE = EngineLimit(inputs=64, outputs=128, group_sizes=(-1, 64, 128))
CPU_WNA16 = EngineLimit(inputs=32, outputs=32)
SGLANG = EngineLimit(inputs=128, outputs=64, group_sizes=(-1, 32, 64, 128))
GPTQMODEL = EngineLimit(inputs=1, outputs=8, group_sizes=(-1, 16, 32, 64, 128), head=0, degrees=(1,))
UNPACKED = EngineLimit(inputs=1, outputs=1, degrees=(1,))
VLLM_AWQ = {"vLLM CPU": CPU_WNA16, "vLLM AWQ": AWQ_KERNEL, "vLLM Marlin": MARLIN, "vLLM Machete": MACHETE}
ENGINES: dict[str, dict[str, EngineLimit]] = {
    "awq": {engine: replace(limit, head=64) for engine, limit in VLLM_AWQ.items()}
    | {"SGLang Marlin": replace(SGLANG, head=0), "transformers": GPTQMODEL},
    "compressed-tensors": {
        "vLLM CPU": CPU_WNA16,
        "vLLM Marlin": MARLIN,
        "vLLM Machete": MACHETE,
        "SGLang Marlin": SGLANG,
        "transformers": UNPACKED,
    },
    "gemv": {},
}
# Where an AWQ config says zero_point false, AutoAWQ's kernel is taken.
NEED_ZEROS = ("vLLM Marlin", "vLLM Machete", "SGLang Marlin")
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # vLLM and SGLang make one matrix of each
SPLIT_BY_INPUTS = ("o_proj", "down_proj", "output_linear")  # they split the others by outputs among devices


def engine_degrees(
    config: LlamaConfig, quantized: Mapping[str, QuantizedLinear], block: QuantizationConfig | None = None
) -> dict[str, dict[int, str]]:
    """For each engine that reads the layout and each tensor-parallel degree: "" if it works, or why it does not."""
    layouts = {linear.layout for linear in quantized.values()}
    shapes = linear_shapes(meta_model(config))
    engines = ENGINES[layouts.pop()] if len(layouts) == 1 else {}
    found = {
        engine: {degree: _obstacle(config, shapes, quantized, limit, degree) for degree in limit.degrees}
        for engine, limit in engines.items()
    }
    if block and block.method == "awq" and block.symmetric:
        found |= {engine: dict.fromkeys(DEGREES, f"{block.where}: zero_point is false") for engine in NEED_ZEROS}
    return found | ({"llama.cpp (GGUF)": {1: _no_counterpart(config)}} if quantized else {})


def _no_counterpart(config: LlamaConfig) -> str:
    """Why llama.cpp does not compute this model; empty if it does."""
    try:
        architecture_there(config)
    except UnsupportedCheckpoint as error:
        return error.why
    return ""


def _obstacle(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, int]],
    quantized: Mapping[str, QuantizedLinear],
    limit: EngineLimit,
    degree: int,
) -> str:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % degree or (kv_heads % degree and degree % kv_heads):
        return f"{heads} query and {kv_heads} key/value heads do not divide by {degree}"
    for name, linear in quantized.items():
        if name == "lm_head" and not limit.head:
            return "lm_head: it is packed, which is not read in this layout"
        if name == "lm_head" and linear.out_features % limit.head:
            return f"lm_head: {linear.out_features} outputs are no multiple of {limit.head}"
        split_inputs = name.endswith(SPLIT_BY_INPUTS)
        inputs = linear.in_features / (degree if split_inputs else 1)
        outputs = linear.out_features if split_inputs else _outputs_per_device(name, shapes, kv_heads, degree)
        whole_rows = linear.group_size == linear.in_features
        if limit.group_sizes and not whole_rows and linear.group_size not in limit.group_sizes:
            return f"{name}: group size {linear.group_size} is not one of {limit.group_sizes}"
        multiple = math.lcm(limit.inputs, 1 if whole_rows else linear.group_size)
        if inputs % multiple:
            return f"{name}: {inputs:g} inputs on each device are no multiple of {multiple}"
        if outputs % limit.outputs:
            return f"{name}: {outputs:g} outputs on each device are no multiple of {limit.outputs}"
    return ""


def _outputs_per_device(name: str, shapes: Mapping[str, tuple[int, int]], kv_heads: int, degree: int) -> float:
    """Outputs on one device of the matrix that holds this layer; if there are too few key/value heads, devices repeat
    them.
    """
    stem, dot, leaf = name.rpartition(".")
    together = next((leaves for leaves in MERGED if leaf in leaves), (leaf,))
    return sum(
        shapes[stem + dot + part][1] / (min(degree, kv_heads) if part in ("k_proj", "v_proj") else degree)
        for part in together
    )


@dataclass(frozen=True)
class Row:
    """Tensors of the same role in all layers."""

    name: str
    count: int
    dtype: str
    shape: list[int]
    nbytes: int


def tensor_table(checkpoint: Checkpoint) -> list[Row]:
    """The stored tensors, layers folded together, in the order of the files."""
    rows: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, info in checkpoint.tensors.items():
        key = re.sub(r"\.\d+\.", ".*.", name), DTYPE_NAMES[info.dtype], info.shape
        rows.setdefault(key, []).append(info.nbytes)
    return [Row(name, len(found), dtype, list(shape), sum(found)) for (name, dtype, shape), found in rows.items()]


def layers_by_storage(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The kinds of linear layers by how they are stored, with numbers where those of a kind are not stored alike."""
    total: Counter[str] = Counter()
    stored: dict[str, Counter[str]] = {}
    for name in checkpoint.linears:
        kind, packed = name.rpartition(".")[2], checkpoint.quantized.get(name)
        how = f"INT4 {packed.layout}, group size {packed.group_size}" if packed else "dense"
        total[kind] += 1
        stored.setdefault(how, Counter())[kind] += 1
    return {
        how: [kind if count == total[kind] else f"{count} of {total[kind]} {kind}" for kind, count in kinds.items()]
        for how, kinds in stored.items()
    }


@dataclass(frozen=True)
class Plan:
    """Everything that `miniawq plan` tells; sizes are bytes."""

    model: str
    commit: str | None
    architecture: str
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    layers_by_storage: dict[str, list[str]]
    layout: str
    group_sizes: list[int]
    packed_linears: int
    dense_linears: list[str]
    stored_bytes: int
    packed_bytes: int
    dtype: str
    kv_dtype: str
    kv_bytes_per_token: int
    memory: Footprint
    total: int
    device: DeviceMemory
    fits: bool
    engines: dict[str, dict[int, str]]
    engines_of: str
    tensors: list[Row]
    notices: list[str]


def make_plan(checkpoint: Checkpoint, model: str, dtype: torch.dtype, needed: Footprint, device: DeviceMemory) -> Plan:
    packed = [name for linear in checkpoint.quantized.values() for name in linear.tensors.values()]
    return Plan(
        model=model,
        commit=checkpoint.files.commit if isinstance(checkpoint.files, HubFiles) else None,
        architecture=checkpoint.model_config.architecture,
        layers=checkpoint.model_config.num_hidden_layers,
        heads=checkpoint.model_config.num_attention_heads,
        key_value_heads=checkpoint.model_config.num_key_value_heads,
        head_dim=checkpoint.model_config.head_dim,
        layers_by_storage=layers_by_storage(checkpoint),
        layout=", ".join(sorted({linear.layout for linear in checkpoint.quantized.values()})) or "dense",
        group_sizes=sorted({linear.group_size for linear in checkpoint.quantized.values()}),
        packed_linears=len(checkpoint.quantized),
        dense_linears=[name for name in checkpoint.linears if name not in checkpoint.quantized],
        stored_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        packed_bytes=sum(checkpoint.tensors[name].nbytes for name in packed),
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=str(checkpoint.model_config.kv_cache_dtype or dtype).removeprefix("torch."),
        kv_bytes_per_token=kv_bytes_per_token(checkpoint.model_config, dtype),
        memory=needed,
        total=needed.total,
        device=device,
        fits=needed.total <= device.free,
        engines=engine_degrees(checkpoint.model_config, checkpoint.quantized, checkpoint.quantization),
        engines_of=ENGINES_OF,
        tensors=tensor_table(checkpoint),
        notices=checkpoint.notices,
    )


def lines_of_model(plan: Plan) -> list[str]:
    """What the model is, and the memory that it needs."""
    needed, packed = plan.memory, f"{plan.packed_linears} packed layers {size(plan.packed_bytes)}"
    heads = f"{plan.heads} query and {plan.key_value_heads} key/value heads of {plan.head_dim}"
    told = {
        "weights": f"{packed}; {plan.stored_bytes / 1e9:.3f} GB on disk",
        "kv cache": f"{needed.batch} x {needed.max_seq_len} tokens x {size(plan.kv_bytes_per_token)} ({plan.kv_dtype})",
        "prefill": f"{min(PREFILL_CHUNK, needed.batch * needed.max_seq_len)} tokens at a time",
        "overhead": "what the device's runtime takes for itself (--memory-margin)",
    }
    lines = [
        f"model     {plan.model}{' @ ' + plan.commit[:8] if plan.commit else ''}",
        f"          {plan.architecture}, {plan.layers} layers, {heads}",
    ]
    lines += [f"          {how}: {', '.join(kinds)}" for how, kinds in plan.layers_by_storage.items()]
    lines += [f"{part:9} {size(value):>11}   {told[part]}" for part, value in parts_of(needed).items()]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    supply = f"of {size(plan.device.total)}, {size(plan.device.free)} free on {plan.device.name}"
    return [*lines, f"total     {size(plan.total):>11}   {supply}: {verdict}"]


def render_plan(plan: Plan, show_tensors: bool) -> str:
    """The plan as lines for people."""
    lines = lines_of_model(plan)
    if plan.engines:
        lines.append(f"engines   as read in {plan.engines_of}; Machete wants Hopper, vLLM CPU AVX-512")
    alike: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for engine, degrees in plan.engines.items():
        alike.setdefault(tuple(degrees.items()), []).append(engine)
    for reasons, engines in alike.items():
        works = [str(degree) for degree, why in reasons if not why]
        lines.append(f"{', '.join(engines)}: tensor-parallel {', '.join(works) or 'never'}")
        obstacles: dict[str, list[str]] = {}
        for degree, why in reasons:
            obstacles.setdefault(why, []).append(str(degree))
        lines += [f"          not {', '.join(degrees)}: {why}" for why, degrees in obstacles.items() if why]
    lines += [f"notice    {notice}" for notice in plan.notices]
    if show_tensors:
        lines += [
            f"{row.count:4} x {row.name:52} {row.dtype:5} {row.shape!s:18} {size(row.nbytes)}" for row in plan.tensors
        ]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "plan",
        "What is in a checkpoint, what memory it needs, which engines run it; reads\nheaders only.",
        usage="[MODEL] [flags]",
        examples=EXAMPLES,
        page="docs/guides/gpu.md",
    )
    parser.add_argument("model", nargs="?", help="directory, Hub id or ID@REVISION (the demo)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (1)")
    longest = f"tokens of prompt and answer ({DEFAULT_CONTEXT}, or the model's limit)"
    parser.add_argument("--max-seq-len", type=int, metavar="N", help=longest)
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, cpu (cuda if there is one)")
    parser.add_argument(
        "--device-memory", type=parse_size, metavar="SIZE", help="plan for a device of this size (24GiB)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", metavar="DTYPE", help="of what is not packed (float16)"
    )
    add_kv_dtype_flag(parser.add_argument)
    add_memory_margin_flag(parser.add_argument)
    parser.add_argument("--tensors", action="store_true", help="list the tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_hub_flags(parser)
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    for flag in ("batch", "max_seq_len", "device_memory"):
        if (value := getattr(arguments, flag)) is not None and not 1 <= value <= LARGEST:
            raise UsageError(f"--{flag.replace('_', '-')} {value} makes no sense", "", "give a positive number")
    checkpoint = open_checkpoint(arguments.model, **hub_options(arguments)).with_kv_cache(KV_DTYPES[arguments.kv_dtype])
    if nbytes := arguments.device_memory:
        # A plan for another machine may name a device that this one lacks.
        device = named_device(arguments.device or pick_device(None))
        memory = DeviceMemory(f"a device of {size(nbytes)}", nbytes, nbytes)
    else:
        device = pick_device(arguments.device)
        memory = device_memory(device)
    limit = checkpoint.model_config.max_position_embeddings
    dtype = DTYPES[arguments.dtype]
    needed = footprint(
        checkpoint,
        dtype,
        device=device.type,
        batch=arguments.batch,
        max_seq_len=arguments.max_seq_len or min(limit, DEFAULT_CONTEXT),
        overhead=arguments.memory_margin,
    )
    plan = make_plan(checkpoint, arguments.model or "the demo", dtype, needed, memory)
    if arguments.json:
        print(json.dumps(asdict(plan) | {"device": memory._asdict()}))
    else:
        print(render_plan(plan, arguments.tensors))
    check_fit(needed, memory, checkpoint, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 4 if the model does not fit."""
    return cli.run(_plan, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
