"""Whole models of random weights: tokens per second, share of the bandwidth, time to first token, memory, kernels.

    python scripts/bench.py --shape llama-3.1-8b                                  # INT4 beside bfloat16, one row
    python scripts/bench.py --shape llama-3.1-8b --rows 1,4,16,64 --context 512,8192 --json sweep.jsonl
    python scripts/bench.py --shape tiny --device cpu --new-tokens 20             # a look on any machine

Weights are made on the device, so no checkpoint is needed; `--shape` also takes a config.json. Before anything is
timed, a model of two layers is compared with the same model in float32, run by `model.py`. The first run on a machine
compiles (cold), a second one finds the artifacts (warm). Prints as it goes, what does not fit too; `--json` appends one
line a measurement; `--profile` leaves traces.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniawq.checkpoint.config import llama_config
from miniawq.checkpoint.loading import DTYPES, KV_DTYPES, DenseLinear, add_kv_dtype_flag, loaded_dtype
from miniawq.engine.delivery import delivered
from miniawq.engine.memory import (
    OVERHEAD,
    PREFILL_CHUNK,
    bytes_per_step,
    kv_bytes_per_token,
    prefill_bytes,
    weight_bytes,
)
from miniawq.engine.reader import PromptReader
from miniawq.engine.step import DecodeStep
from miniawq.hardware import copy_bandwidth, device_memory, peak_memory, synchronize
from miniawq.kernel import QuantLinear
from miniawq.model import KVCache, Llama, LlamaConfig, dense_linear
from miniawq.packing import Quantized, dequantize

LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1e6}


def shape(
    base: dict[str, Any], vocab: int, width: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> Any:
    """A config.json."""
    return base | {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 131072,
        **more,
    }


SHAPES = {
    "tiny": shape(LLAMA, 512, 256, 512, 3, 4, 2),
    "tinyllama-1.1b": shape(LLAMA, 32000, 2048, 5632, 22, 32, 4),
    "llama-3.2-1b": shape(LLAMA, 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama-2-7b": shape(LLAMA, 32000, 4096, 11008, 32, 32, 32),
    "llama-3.1-8b": shape(LLAMA, 128256, 4096, 14336, 32, 32, 8, rope_theta=5e5),
    "codellama-34b": shape(LLAMA, 32000, 8192, 22016, 48, 64, 8),
    "llama-3.1-70b": shape(LLAMA, 128256, 8192, 28672, 80, 64, 8, rope_theta=5e5),
    "qwen3-8b": shape(QWEN3, 151936, 4096, 12288, 36, 32, 8, head_dim=128),
}
WORST_ERROR = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-4}


class Clock:
    """Seconds of the part of a program under `with`, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds = time.perf_counter() - start


def empty_model(config: LlamaConfig, kind: str, group_size: int, packs_head: bool = False) -> Llama:
    """The model without memory, INT4 but perhaps for its head, or dense; stored in 16 bits unless it is of float32."""

    def packed(name: str, *shape: int) -> nn.Module:
        is_dense = name == "lm_head" and not packs_head
        return dense_linear(name, *shape) if is_dense else QuantLinear(*shape, group_size)

    with torch.device("meta"):
        model = Llama(config, packed if kind == "int4" else dense_linear)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES.get(kind, torch.bfloat16))
    return model


def random_model(model: Llama, device: torch.device, dtype: torch.dtype) -> Llama:
    """Independent random weights for an `empty_model` that computes in `dtype`, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, random_int4(module, device))
            continue
        for key, meta in module.named_parameters(recurse=False):
            tensor = torch.empty(meta.shape, device=device, dtype=loaded_dtype(meta.dtype, meta.dim(), dtype))
            tensor = tensor.normal_(0, meta.shape[-1] ** -0.5) if meta.dim() == 2 else tensor.fill_(1)
            setattr(module, key, nn.Parameter(tensor, requires_grad=False))
        if type(module) is nn.Linear and module.weight.dtype != dtype:
            model.set_submodule(name, DenseLinear.of(module))
    model.tie_weights()
    return model


def random_int4(layer: QuantLinear, device: torch.device) -> QuantLinear:
    """Random codes, zeros of 7 and 8, and scales that keep the size of what goes through."""
    outputs, inputs = layer.out_features, layer.in_features
    codes_OI = torch.randint(16, (outputs, inputs), dtype=torch.uint8, device=device)
    scales_OG = torch.empty(outputs, inputs // layer.group_size, dtype=torch.float16, device=device)
    scales_OG.uniform_(0.5, 1.5).mul_(0.2 * inputs**-0.5)
    zeros_OG = torch.randint(7, 9, scales_OG.shape, dtype=torch.uint8, device=device)
    bias_O = None if layer.bias is None else torch.zeros(outputs, dtype=torch.float16, device=device)
    return QuantLinear.from_quantized(Quantized(codes_OI, scales_OG, zeros_OG), bias_O)


def check(config: LlamaConfig, kind: str, rows: int, arguments: argparse.Namespace) -> float:
    """Largest relative error of a step's logits on two layers of the model, against `model.py` in float32."""
    first = {"layer_windows": config.layer_windows[:2], "layer_ropes": config.layer_ropes[:2]}
    config = dataclasses.replace(config, num_hidden_layers=2, **first)
    model = random_model(
        empty_model(config, kind, arguments.group_size, arguments.lm_head), arguments.device, arguments.activations
    )
    exact = float32_of(model)
    step = DecodeStep(model, rows, 64, compiles=arguments.compile)
    exact_cache = KVCache(config, rows, 64, device=arguments.device)
    tokens_BL = torch.randint(config.vocab_size, (rows, 20), device=arguments.device)
    step.begin(tokens_BL)
    model.last_logits(tokens_BL[:, :17], step.cache)
    exact.last_logits(tokens_BL[:, :17], exact_cache)
    worst = 0.0
    for ids_B in tokens_BL[:, 17:].unbind(1):
        expected_BV = exact.last_logits(ids_B[:, None], exact_cache)
        step.step(ids_B)
        worst = max(worst, float((step.logits_BV - expected_BV).norm() / expected_BV.norm()))
    return worst


def float32_of(model: Llama) -> Llama:
    """The same model, dense and in float32."""
    with torch.device("meta"):
        exact = Llama(model.config)
    for name, module in model.named_modules():
        target = exact.get_submodule(name)
        if isinstance(module, QuantLinear):
            weight_OI = dequantize(module.to_quantized(), torch.float32)
            target.weight = nn.Parameter(weight_OI, requires_grad=False)
            if module.bias is not None:
                target.bias = nn.Parameter(module.bias.float(), requires_grad=False)
        else:
            for key, tensor in module.named_parameters(recurse=False):
                setattr(target, key, nn.Parameter(tensor.float(), requires_grad=False))
    exact.tie_weights()
    return exact


def decode_rate(
    model: Llama, rows: int, context: int, arguments: argparse.Namespace
) -> tuple[DecodeStep, dict[str, Any]]:
    """Time `new_tokens` steps after `context` positions, ids delivered as they come: random keys and values, and a last
    piece of the prompts.
    """
    device, steps = arguments.device, arguments.new_tokens
    room = context + steps + 2
    step, clock = DecodeStep(model, rows, room, compiles=arguments.compile), Clock(device)
    ids_B = torch.randint(model.config.vocab_size, (rows,), device=device)
    step.begin(ids_B[:, None])
    for kept_NBMJE in (step.cache.keys_NBMJE, step.cache.values_NBMJE):
        for kept_BMJE in kept_NBMJE:
            kept_BMJE.copy_(torch.randn_like(kept_BMJE, dtype=model.dtype))
    piece = min(context, max(1, PREFILL_CHUNK // rows))
    step.cache.length = context - piece
    model.last_logits(torch.randint(model.config.vocab_size, (rows, piece), device=device), step.cache)
    with clock():
        ids_B = step.step(ids_B)
    first = clock.seconds
    with clock():
        for _ in delivered(step, ids_B, steps + 1):
            pass
    seconds = clock.seconds / steps
    read = bytes_per_step(model, rows, context + steps // 2)
    return step, {
        "ms_per_step": seconds * 1e3,
        "tokens_per_s": rows / seconds,
        "GB_per_s": read / seconds / 1e9,
        "share_of_bandwidth": read / seconds / arguments.bandwidth,
        "compile_s": first,
        "by_blocks": step.by_blocks,
    }


def first_token(model: Llama, prompt: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prefill of one prompt from ids to the choice of the first token, the best of four: where steps are compiled, the
    second time records it.
    """
    clock, best = Clock(arguments.device), float("inf")
    read = PromptReader(model)
    if arguments.compile and arguments.device.type == "cuda":
        read.compile()
    tokens_BL = torch.randint(model.config.vocab_size, (1, prompt), device=arguments.device)
    cache = KVCache(model.config, 1, prompt, device=arguments.device, dtype=arguments.activations)
    for _ in range(4):
        cache.length = 0
        with clock():
            for chunk_BL in tokens_BL.split(PREFILL_CHUNK, dim=1):
                logits_BV = model.logits(read(chunk_BL, cache)[:, -1])
            logits_BV.argmax(-1)
        best = min(best, clock.seconds)
    return {"prompt": prompt, "prefill_s": best, "prefill_tokens_per_s": prompt / best}


def planned(skeleton: Llama, rows: int, room: int, arguments: argparse.Namespace) -> int:
    """What `miniawq plan` says of an `empty_model`, without the overhead of the runtime, which torch does not count."""
    dtype, device = arguments.activations, arguments.device.type
    cache = rows * room * kv_bytes_per_token(skeleton.config, dtype)
    return weight_bytes(skeleton, dtype, device) + cache + prefill_bytes(skeleton, dtype, device, rows, room)


def fits(nbytes: int, what: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether so much more fits on the device beside the overhead of the runtime; says so if it does not."""
    free = device_memory(arguments.device).free - OVERHEAD[arguments.device.type]
    if nbytes > free:
        show(what | {"more_GB": nbytes / 1e9, "free_GB": free / 1e9, "fits": False}, arguments)
    return nbytes <= free


def forget(device: torch.device) -> None:
    """Free what earlier measurements have left, and begin to count the peak of memory again."""
    gc.collect()
    if device.type == "cuda":
        # A library's workspace stays for each stream that it was ever called on.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_of(skeleton: Llama, rows: int, room: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The most that torch has allocated, what was planned for it, and all that is in use on a GPU."""
    peak, plan = peak_memory(arguments.device), planned(skeleton, rows, room, arguments)
    found = {"peak_GB": peak / 1e9, "planned_GB": plan / 1e9}
    if arguments.device.type == "cuda":
        memory = device_memory(arguments.device)
        found["in_use_GB"] = (memory.total - memory.free) / 1e9
    return found


def kernels_of(step: DecodeStep, trace: Path | None, tokens: int = 3) -> dict[str, Any]:
    """What the device does in one token: kernels, their time, and the time between them."""
    ids_B = torch.zeros_like(step.ids_B)
    step.cache.length -= tokens + 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(tokens):
            ids_B = step.step(ids_B)
        torch.cuda.synchronize()
    events = sorted(
        (event for event in profile.events() if event.device_type.name == "CUDA"),
        key=lambda event: event.time_range.start,
    )
    names: dict[str, list[float]] = {}
    for event in events:
        names.setdefault(event.name, []).append(event.time_range.elapsed_us())
    busy = sum(sum(times) for times in names.values())
    span = events[-1].time_range.end - events[0].time_range.start
    by_time = sorted(names.items(), key=lambda item: -sum(item[1]))
    for name, times in by_time[:24]:
        each, share = sum(times) / len(times), sum(times) / span
        print(f"    {len(times) / tokens:7.1f} x {each:8.2f} us {share:6.1%}  {name[:110]}", flush=True)
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    return {"kernels": len(events) / tokens, "busy_us": busy / tokens, "between_us": (span - busy) / tokens}


def show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """One line for people, one for machines."""
    parts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()]
    print("  ".join(parts), flush=True)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps({"shape": arguments.shape, "device": arguments.device_name} | result) + "\n")


def bench(kind: str, config: LlamaConfig, arguments: argparse.Namespace) -> None:
    """Everything about one kind of weights."""
    device, clock = arguments.device, Clock(arguments.device)
    if arguments.check:
        for rows in sorted({min(arguments.rows), max(arguments.rows)}):
            error = check(config, kind, rows, arguments)
            # Keys that differ by a rounding may be kept as neighbouring numbers of 8 bits.
            right = error < WORST_ERROR[arguments.activations] * (2 if arguments.kv_dtype == "fp8" else 1)
            show({"kind": kind, "check_rows": rows, "error": error, "right": right}, arguments)
            if not right:
                raise SystemExit("the step does not compute the model: nothing was timed")
    forget(device)
    skeleton = empty_model(config, kind, arguments.group_size, arguments.lm_head)
    weights = weight_bytes(skeleton, arguments.activations, device.type)
    if not fits(weights, {"kind": kind}, arguments):
        return
    with clock():
        model = random_model(
            empty_model(config, kind, arguments.group_size, arguments.lm_head), device, arguments.activations
        )
    show({"kind": kind, "make_s": clock.seconds, "weights_GB": weights / 1e9}, arguments)
    for rows, context in itertools.product(arguments.rows, arguments.context):
        what = {"kind": kind, "rows": rows, "context": context}
        forget(device)
        needed = planned(skeleton, rows, context + arguments.new_tokens + 2, arguments)
        if not fits(needed - weights, what, arguments):
            continue
        step, result = decode_rate(model, rows, context, arguments)
        show(what | result | memory_of(skeleton, rows, step.cache.max_seq_len, arguments), arguments)
        if arguments.profile and device.type == "cuda":
            trace = arguments.profile / f"{arguments.shape}-{kind}-{rows}-{context}.json"
            show(what | kernels_of(step, trace), arguments)
        del step
    for prompt in arguments.prompt_tokens:
        show({"kind": kind} | first_token(model, prompt, arguments), arguments)


def numbers(text: str) -> list[int]:
    """A list such as 1,4,16."""
    return [int(part) for part in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="llama-3.1-8b", help=f"a config.json, or one of {', '.join(SHAPES)}")
    add("--dtype", default="int4,bfloat16", help="kinds of weights: int4, bfloat16, float16, float32")
    add("--activations", choices=DTYPES, help="of an INT4 model (bfloat16; float32 on a CPU)")
    add_kv_dtype_flag(add)
    add("--group-size", type=int, default=128, help="inputs that share a scale (128)")
    add("--lm-head", action="store_true", help="the head of an INT4 model in INT4 too")
    add("--rows", type=numbers, default=[1], metavar="N,N", help="texts at a time (1)")
    add("--context", type=numbers, default=[128], metavar="N,N", help="positions before the first timed step (128)")
    add("--prompt-tokens", type=numbers, default=[128], metavar="N,N", help="prompts to time (128)")
    add("--new-tokens", type=int, default=256, help="steps to time (256)")
    add("--layers", type=int, help="fewer layers than the shape has")
    add("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    add("--json", type=Path, help="file to append to")
    add("--profile", type=Path, help="folder for traces of three tokens each; prints the kernels")
    add("--no-check", dest="check", action="store_false", help="time at once")
    add("--no-compile", dest="compile", action="store_false", help="the same step, uncompiled")
    return parser


@torch.no_grad()
def main() -> None:
    """Measure what is asked for."""
    started = time.perf_counter()
    arguments = build_parser().parse_args()
    raw = SHAPES[arguments.shape] if arguments.shape in SHAPES else json.loads(Path(arguments.shape).read_text())
    if arguments.layers:
        raw = raw | {"num_hidden_layers": arguments.layers}
    config = dataclasses.replace(llama_config(raw), kv_cache_dtype=KV_DTYPES[arguments.kv_dtype])
    device = arguments.device
    on_gpu = device.type == "cuda"
    arguments.device_name = torch.cuda.get_device_name(device) if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    chosen, default = arguments.activations, torch.bfloat16 if on_gpu else torch.float32
    arguments.bandwidth = copy_bandwidth(device)
    said = {"torch": torch.__version__, "copy_GB_per_s": arguments.bandwidth / 1e9}
    arguments.activations = default
    show({"device": arguments.device_name} | said, arguments)
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    for kind in arguments.dtype.split(","):
        arguments.activations = DTYPES.get(kind) or (DTYPES[chosen] if chosen else default)
        bench(kind, config, arguments)
        if on_gpu:
            torch.cuda.empty_cache()
    print(f"done in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
