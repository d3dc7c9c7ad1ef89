"""What one layer of the decode step costs on a GPU, and what other tiles and launches would save.

    python scripts/study_step.py --out $OUT --seconds 230

Timed are, each in a CUDA graph over several copies of what it reads (cold L2), medians of 15 replays: whole layers with
flash attention, with attention by blocks, and the latter with programmatic dependent launch (pdl) for all kernels or
for all but the products; and "middle", which is all that lies between the products of q, k, v and of o, with attention
in so many parts. Every result is checked first, against attention or the eager block in float32. One process a shape
and number of rows compiles; then they take turns at the GPU. Prints as it goes, appends to OUT/step.jsonl. Without a
GPU: tiny shapes, uncompiled.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import SHAPES, empty_model, float32_of, random_model
from gpu_timing import CUDA, DEVICE, gpu_turn, seconds_per_call

from miniawq import forms, tiles
from miniawq.attend import block_attention, blocks_of, flash_attention, mask_of, spans_of
from miniawq.inductor import BlockSizes, V
from miniawq.layer import Layer, after_attention, before_attention, parts_of, rotate_into_cache, whole_layer
from miniawq.model import LlamaConfig, attention
from miniawq.products import prepare, prepare_normed
from miniawq.rope import rope_tables

DTYPE = torch.bfloat16 if CUDA else torch.float32
L2_BYTES = 60e6
WORST = 0.03 if CUDA else 1e-4


def consume(o, attended_BHE):
    """What the product of o does to its activations first."""
    (prepared,) = prepare((o,), attended_BHE.flatten(1)).of_products
    return prepared[0] if isinstance(prepared, tuple) else prepared


def middle(config, o, rope, position_1, qkv_BO, cache_SJE, blocks, parts):
    """A layer without its products, with attention in so many parts."""
    rotate_into_cache(config, None, qkv_BO, rope, position_1, cache_SJE)
    return consume(o, block_attention(*parts_of(config, len(qkv_BO), cache_SJE), blocks, parts))


class Choices(BlockSizes):
    """The project's block sizes; with pdl "small", the products are compiled without."""

    def __init__(self, pdl):
        super().__init__(tiles.block_sizes)
        self.pdl = pdl

    def uuid(self):
        return f"{super().uuid()} {self.pdl}"

    def triton_kernel_kwargs(self, *arguments):
        features = arguments[1]
        reads_words = any(V.graph.get_dtype(name) == torch.int32 for name in features.buf_accesses())
        if self.pdl == "small":
            torch._inductor.config.triton.enable_pdl = not (features.reduction_nodes() and reads_words)
        return super().triton_kernel_kwargs(*arguments)


def compiled(function, pdl="", **options):
    if not CUDA:
        return function
    options = forms.OPTIONS | {"unroll_reductions_threshold": 33, "triton.enable_pdl": bool(pdl)} | options
    lowered = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def call(*arguments):
        with V.set_choices_handler(Choices(pdl)):
            return lowered(*arguments)

    return call


class Case:
    """Layers of one shape for a number of rows and a context, with random caches."""

    def __init__(self, config, rows, context, layers, blocks):
        self.config, self.rows, self.context = config, rows, context
        kv, size = config.num_key_value_heads, config.head_dim
        self.room = context + 136
        self.layers, self.exact_blocks = layers, blocks
        of_q = rows * config.num_attention_heads // kv
        one = 2 * rows * context * kv * size * DTYPE.itemsize
        copies = max(len(layers), min(32, int(L2_BYTES / one) + 1))
        shape = (of_q + 2 * rows * self.room, kv, size)
        self.caches = [torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(copies)]
        for cache_SJE in self.caches:
            torch._dynamo.mark_dynamic(cache_SJE, 0)
        self.of_q = of_q
        self.position_1 = torch.tensor([context], device=DEVICE)
        self.padding_B = torch.arange(rows, device=DEVICE) % 3
        positions_M = torch.arange(self.room, device=DEVICE)
        cos_ME, sin_ME = rope_tables(config.rope, positions_M, self.room, DTYPE)
        self.rope = (cos_ME[self.position_1], sin_ME[self.position_1])
        self.spans = spans_of(self.position_1, self.padding_B, self.room)
        self.blocks = blocks_of(self.position_1, self.padding_B, self.room)
        torch._dynamo.mark_dynamic(self.blocks.index_B11N, 3)
        width = (config.num_attention_heads + 2 * kv) * size
        self.qkvs = [torch.randn(rows, width, device=DEVICE).to(DTYPE) for _ in self.caches]
        self.h_BD = torch.randn(rows, config.hidden_size, device=DEVICE).to(DTYPE)
        (first, *_) = layers
        self.prepared = prepare_normed(first.qkv, self.h_BD, first.input_norm_D, config.rms_norm_eps)

    def exact_attention(self, q_BHE, cache_SJE):
        keys, values = cache_SJE[self.of_q :].unflatten(0, (2, self.rows, -1)).transpose(2, 3).float()
        mask = mask_of(self.position_1, self.padding_B, self.room)
        return attention(q_BHE.unsqueeze(2).float(), keys, values, mask).squeeze(2)

    def exact_middle(self):
        cache_SJE = self.caches[0]
        rotate_into_cache(self.config, None, self.qkvs[0], self.rope, self.position_1, cache_SJE)
        q_BHE = parts_of(self.config, self.rows, cache_SJE)[0]
        return consume(self.layers[0].o[0], self.exact_attention(q_BHE, cache_SJE).to(DTYPE))

    def exact_layer(self):
        """By the eager block in float32."""
        block, cache_SJE, case = self.exact_blocks[0], self.caches[0], self

        class Cache:
            def append(self, _, k_BJLE, v_BJLE):
                keys, values = cache_SJE[case.of_q :].unflatten(0, (2, case.rows, -1)).transpose(2, 3).float()
                keys[:, :, case.context], values[:, :, case.context] = k_BJLE[:, :, 0], v_BJLE[:, :, 0]
                return keys, values

        mask = mask_of(self.position_1, self.padding_B, self.room)
        rope = tuple(table.float() for table in self.rope)
        return block(self.h_BD.float().unsqueeze(1), rope, mask, Cache()).squeeze(1)

    def middle(self, parts):
        """(function, argument sets)."""
        run, config, o = once(middle), self.config, self.layers[0].o[0]
        sets = list(zip(self.qkvs, self.caches, strict=True))
        return lambda qkv, cache: run(config, o, self.rope, self.position_1, qkv, cache, self.blocks, parts), sets

    def layer(self, way, pdl):
        """(function, argument sets)."""
        config, sets = self.config, [(self.layers[i % len(self.layers)], cache) for i, cache in enumerate(self.caches)]
        if way == "blocks":
            run, normed = once(whole_layer, pdl), self.prepared
            return lambda layer, cache: run(
                config, layer, layer, self.h_BD, normed, self.rope, cache, self.blocks
            )[0], sets  # fmt: skip
        before, after = once(before_attention), once(after_attention)

        def function(layer, cache_SJE):
            before(config, layer, self.prepared, self.rope, self.position_1, cache_SJE)
            q_BHE, keys_BMJE, values_BMJE = parts_of(config, self.rows, cache_SJE)
            if CUDA:
                attended_BHE = flash_attention(q_BHE, keys_BMJE, values_BMJE, self.spans)
            else:
                attended_BHE = self.exact_attention(q_BHE, cache_SJE).to(DTYPE)
            return after(config, layer, layer, self.h_BD, attended_BHE)[0]

        return function, sets


COMPILED = {}


def once(function, pdl=""):
    if (function, pdl) not in COMPILED:
        COMPILED[function, pdl] = compiled(function, pdl)
    return COMPILED[function, pdl]


def report(out, **result):
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items())
    print("  ".join(parts), flush=True)
    with open(out / "step.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


def build(out, labels, function, sets, expected):
    """Compile and check; one that cannot be compiled is reported, and the study goes on."""
    started = time.perf_counter()
    try:
        got = function(*sets[0]).double()
    except Exception as problem:
        report(out, **labels, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
        return []
    expected = expected.double()
    error = float((got - expected).norm() / expected.norm())
    checked = labels | {"error": error, "right": error < WORST, "built_s": time.perf_counter() - started}
    return [(checked, function, sets)]


def wait_for_others(out, workers, seconds):
    """Compiling tries tiles on the GPU, so nobody times before all have compiled."""
    (out / f"built-{os.getpid()}").touch()
    deadline = time.perf_counter() + seconds
    while len(list(out.glob("built-*"))) < workers and time.perf_counter() < deadline:
        time.sleep(0.2)


def profile(out, labels, function, sets):
    """Mean microseconds of each kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for arguments in sets:
            function(*arguments)
        torch.cuda.synchronize()
    times = {}
    for event in trace.events():
        if event.device_type.name == "CUDA":
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        report(out, **labels, kernel=name[:70], times=len(each) / len(sets), us=sum(each) / len(each))


@torch.no_grad()
def work(shape, rows, contexts, seconds, out):
    started, tag = time.perf_counter(), {"shape": shape, "rows": rows}
    left = lambda: seconds - (time.perf_counter() - started)  # noqa: E731
    config = LlamaConfig.from_dict(SHAPES[shape])
    copies = 3
    config = dataclasses.replace(config, num_hidden_layers=copies, layer_windows=(None,) * copies, vocab_size=256)
    torch.manual_seed(rows)
    torch._dynamo.config.recompile_limit = 64
    model = random_model(empty_model(config, "int4", 128 if CUDA else 32), DEVICE, DTYPE)
    blocks = list(float32_of(model).model.layers[:1])
    layers = [Layer.of(block, rows) for block in model.model.layers]
    cases = {context: Case(config, rows, context, layers, blocks) for context in contexts}
    if CUDA:
        torch.cuda.empty_cache()
    several_parts = (8, 16, 32) if rows == 1 else (2, 4, 8, 16)
    ways = [("flash", ""), ("blocks", ""), ("blocks", "small"), ("blocks", "all")]
    built = []
    for way in (*ways, *several_parts):
        for context, case in cases.items():
            if left() < seconds * 0.35:
                continue
            labels = tag | {"context": context}
            if way in ways:
                labels |= {"part": "layer", "way": way[0], "pdl": way[1]}
                built += build(out, labels, *case.layer(*way), case.exact_layer())
            else:
                labels |= {"part": "middle", "way": f"{way} parts"}
                built += build(out, labels, *case.middle(way), case.exact_middle())
    report(out, **tag, all_built_s=time.perf_counter() - started)
    wait_for_others(out, int(os.environ["WORKERS"]), left() - seconds * 0.3)
    for labels, function, sets in built:
        with gpu_turn():
            report(out, **labels, us=seconds_per_call(function, sets) * 1e6)
            if CUDA and labels["part"] == "layer" and labels["context"] == contexts[1] and rows < 16:
                profile(out, labels, function, sets)


def main():
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--work", nargs=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    contexts = (128, 512, 8192) if CUDA else (24, 72)
    if arguments.work:
        shape, rows = arguments.work
        return work(shape, int(rows), contexts, arguments.seconds, arguments.out)
    os.environ["GPU_LOCK"] = str(arguments.out / "lock")
    shapes = ("llama-3.1-8b", "llama-3.1-70b") if CUDA else ("tiny",)
    jobs = [(shape, rows) for shape in shapes for rows in ((1, 4, 16) if CUDA else (1, 3))]
    if CUDA:
        report(arguments.out, device=torch.cuda.get_device_name(), torch=torch.__version__)
    for old in arguments.out.glob("built-*"):
        old.unlink()
    os.environ |= {"WORKERS": str(len(jobs)), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    workers = []
    for shape, rows in jobs:
        share = arguments.seconds - (time.perf_counter() - started) - 15
        command = [
            sys.executable,
            __file__,
            "--out",
            arguments.out,
            "--seconds",
            str(share),
            "--work",
            shape,
            str(rows),
        ]
        workers.append(subprocess.Popen(command))
    for worker in workers:
        try:
            worker.wait(max(1, arguments.seconds - (time.perf_counter() - started)))
        except subprocess.TimeoutExpired:
            worker.kill()
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
