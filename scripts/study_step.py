"""What one layer of the decode step costs on a GPU, and what other ways of attending and launching would save.

    python scripts/study_step.py --out $OUT --seconds 230

Two parts are timed, each in a CUDA graph over several copies of what it reads (cold L2), medians of 15 replays:
"middle" is all that lies between the product of q, k, v and the product of o; "layer" is a whole layer. Ways to attend:

    flash                   rotate q (in the middle; a layer writes it with k and v); flash attention; prescale
    flex/SPLITS/BLOCK       one kernel rotates and writes q, k and v; FlexAttention; its combination inside the prescale
    sums/PARTS              the same with attention as two plain torch expressions: scores, then values by parts

and for a layer with flex, programmatic dependent launch (pdl): for all kernels, or all but the products. Every result
is checked first: the middle against attention in float32, the layer against the eager block in float32. One process a
shape and number of rows compiles; they take turns at the GPU. Prints as it goes, appends to OUT/step.jsonl. Without a
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
from bench import SHAPES, float32_of, random_model
from gpu_kernels import CUDA, DEVICE, gpu_turn, seconds_per_call
from torch._inductor.virtualized import V
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from miniawq import decode, forms
from miniawq.attend import flash_attention, mask_of, spans_of
from miniawq.decode import Layer, parts_of
from miniawq.model import LlamaConfig, attention
from miniawq.products import norm_and_multiply, prescaled, reduce_product, written
from miniawq.rope import apply_rope, rope_tables

DTYPE = torch.bfloat16 if CUDA else torch.float32
L2_BYTES = 60e6
BLOCK = 64  # of FlexAttention's table
WORST = 0.03 if CUDA else 1e-4


def rotate_and_write(config, qkv_BO, rope, slots, cache_SJE):
    """q, k and v into one memory by one kernel; q_BHE and the cache's keys and values [B, M, J, E] from there."""
    rows, heads, kv = len(qkv_BO), config.num_attention_heads, config.num_key_value_heads
    qkv_BHE = qkv_BO.unflatten(-1, (-1, config.head_dim))
    turned_BHE, v_BJE = apply_rope(qkv_BHE[:, : heads + kv], rope), qkv_BHE[:, heads + kv :]
    q_SJE = turned_BHE[:, :heads].reshape(-1, kv, config.head_dim)
    cache_SJE.index_copy_(0, slots, torch.cat((q_SJE, turned_BHE[:, heads:], v_BJE)))
    of_q = len(q_SJE)
    keys_BMJE, values_BMJE = cache_SJE[of_q:].unflatten(0, (2, rows, -1))
    return cache_SJE[:of_q].unflatten(0, (rows, -1)).flatten(1, 2), keys_BMJE, values_BMJE


def flex(q_BHE, keys_BMJE, values_BMJE, seen, options):
    position_1, first_B, count_B11, index_B11N = seen

    def sees(b, h, l, m):
        return (m <= position_1[0]) & (m >= first_B[b])

    block_mask = BlockMask.from_kv_blocks(
        count_B11,
        index_B11N,
        BLOCK_SIZE=(128, BLOCK),
        mask_mod=sees,
        seq_lengths=(1, keys_BMJE.shape[1]),
        compute_q_blocks=False,
    )
    q_BHLE, keys_BJME, values_BJME = q_BHE.unsqueeze(2), keys_BMJE.transpose(1, 2), values_BMJE.transpose(1, 2)
    return flex_attention(
        q_BHLE, keys_BJME, values_BJME, block_mask=block_mask, enable_gqa=True, kernel_options=dict(options)
    ).squeeze(2)


def sums(q_BHE, keys_BMJE, values_BMJE, seen, parts):
    """Two kernels, and a combination that is none: scores of the heads that share a key, then sums of each part.

    Places behind the newest are read at the newest, so that they cost no memory.
    """
    position_1, first_B = seen[:2]
    room, kv, size = keys_BMJE.shape[1:]
    place_M = torch.arange(room, device=q_BHE.device)
    read_M = torch.minimum(place_M, position_1)
    unseen_BM1 = ((place_M > position_1) | (place_M < first_B[:, None])).unsqueeze(-1)
    values_BCMJE = values_BMJE[:, read_M].unflatten(1, (parts, -1)).float()
    keys_BMJE, heads = keys_BMJE[:, read_M].float(), q_BHE.unflatten(1, (kv, -1)).float().unbind(2)
    scores = [(q_BJE.unsqueeze(1) * keys_BMJE).sum(-1) * size**-0.5 for q_BJE in heads]
    scores_RBMJ = written(torch.stack([score_BMJ.masked_fill(unseen_BM1, -torch.inf) for score_BMJ in scores]))
    attended = []
    for score_BMJ in scores_RBMJ.unbind():
        score_BCMJE = score_BMJ.unflatten(1, (parts, -1)).unsqueeze(-1).expand_as(values_BCMJE)
        top_BCJE = score_BCMJE.amax(2).clamp_min(-1e30)
        weight_BCMJE = torch.exp(score_BCMJE - top_BCJE.unsqueeze(2))
        total_BCJE, value_BCJE = weight_BCMJE.sum(2), (weight_BCMJE * values_BCMJE).sum(2)
        share_BCJE = torch.exp(top_BCJE - top_BCJE.amax(1, keepdim=True))
        attended.append((share_BCJE * value_BCJE).sum(1) / (share_BCJE * total_BCJE).sum(1))
    return torch.stack(attended, 2).flatten(1, 2).to(q_BHE.dtype)


def consume(o, attended_BHE):
    """What the product of o does to its activations first."""
    x_TI = attended_BHE.flatten(1)
    if o.form is reduce_product:
        return prescaled(x_TI, o.tensors[0], o.tensors[3])
    if CUDA:
        return (written(forms.spread(x_TI, o.tensors[1].shape[1])),)
    return (x_TI.contiguous(),)


def middle(config, o, way, rope, slots, qkv_BO, cache_SJE, seen):
    q_BHE, keys_BMJE, values_BMJE = rotate_and_write(config, qkv_BO, rope, slots, cache_SJE)
    attend, *settings = way
    return consume(o, attend(q_BHE, keys_BMJE, values_BMJE, seen, *settings))


def whole_layer(config, layer, way, rope, slots, h_BD, cache_SJE, seen):
    qkv_BO = written(norm_and_multiply(layer.qkv, h_BD, layer.input_norm_D, config.rms_norm_eps))
    q_BHE, keys_BMJE, values_BMJE = rotate_and_write(config, qkv_BO, rope, slots, cache_SJE)
    attend, *settings = way
    attended_BHE = attend(q_BHE, keys_BMJE, values_BMJE, seen, *settings)
    return decode.after_attention(config, layer, h_BD, attended_BHE)


def before_without_product(config, qkv_BO, rope, slots_2B, cache_SJE):
    """q by one kernel, k and v by another, as before they lay in one memory."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    q_BHE, k_BJE, v_BJE = qkv_BO.unflatten(-1, (-1, config.head_dim)).split((heads, kv, kv), dim=1)
    cache_SJE.index_copy_(0, slots_2B, torch.cat((apply_rope(k_BJE, rope), v_BJE)))
    return apply_rope(q_BHE, rope).contiguous()


class Choices(forms.BlockSizes):
    """The project's block sizes; with pdl "small", the products are compiled without."""

    def __init__(self, pdl):
        super().__init__(forms.block_sizes)
        self.pdl = pdl

    def uuid(self):
        return f"{super().uuid()} {self.pdl}"

    def triton_kernel_kwargs(self, *arguments):
        kwargs = super().triton_kernel_kwargs(*arguments)
        if self.pdl == "small":
            torch._inductor.config.triton.enable_pdl = "fixed_config" not in kwargs
        return kwargs


def compiled(function, pdl="", **options):
    if not CUDA:
        return function
    options = forms.OPTIONS | {"unroll_reductions_threshold": 33, "triton.enable_pdl": bool(pdl)} | options
    lowered = torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def call(*arguments):
        with V.set_choices_handler(Choices(pdl)):
            return lowered(*arguments)

    return call


def flex_options(splits, block):
    return {"SPLIT_KV": splits, "BLOCK_N": block, "num_warps": 2 if block < 64 else 4, "BLOCKS_ARE_CONTIGUOUS": True}


class Case:
    """Layers of one shape for a number of rows and a context, with random caches."""

    def __init__(self, config, rows, context, layers, blocks):
        self.config, self.rows, self.context = config, rows, context
        kv, size = config.num_key_value_heads, config.head_dim
        self.room = context + 136
        self.layers, self.blocks = layers, blocks
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
        self.slots_2B = torch.arange(2 * rows, device=DEVICE) * self.room + self.position_1
        self.slots = torch.cat((torch.arange(of_q, device=DEVICE), self.slots_2B + of_q))
        self.spans = spans_of(self.position_1, self.padding_B, self.room)
        index_N = torch.arange(-(-self.room // BLOCK), device=DEVICE, dtype=torch.int32)
        first_B = (self.padding_B // BLOCK).int()
        index_B11N = (first_B[:, None] + index_N)[:, None, None].clamp_max(len(index_N) - 1).contiguous()
        torch._dynamo.mark_dynamic(index_B11N, 3)
        count_B11 = (self.position_1.int() // BLOCK + 1 - first_B)[:, None, None]
        self.seen = (self.position_1, self.padding_B, count_B11, index_B11N)
        width = (config.num_attention_heads + 2 * kv) * size
        self.qkvs = [torch.randn(rows, width, device=DEVICE).to(DTYPE) for _ in self.caches]
        self.h_BD = torch.randn(rows, config.hidden_size, device=DEVICE).to(DTYPE)

    def exact_attention(self, q_BHE, cache_SJE):
        keys, values = cache_SJE[self.of_q :].unflatten(0, (2, self.rows, -1)).transpose(2, 3).float()
        mask = mask_of(self.position_1, self.padding_B, self.room)
        return attention(q_BHE.unsqueeze(2).float(), keys, values, mask).squeeze(2)

    def exact_middle(self):
        cache_SJE = self.caches[0]
        q_BHE, *_ = rotate_and_write(self.config, self.qkvs[0], self.rope, self.slots, cache_SJE)
        return consume(self.layers[0].o[0], self.exact_attention(q_BHE, cache_SJE).to(DTYPE))[0]

    def exact_layer(self):
        """By the eager block in float32."""
        block, cache_SJE, case = self.blocks[0], self.caches[0], self

        class Cache:
            def append(self, _, k_BJLE, v_BJLE):
                keys, values = cache_SJE[case.of_q :].unflatten(0, (2, case.rows, -1)).transpose(2, 3).float()
                keys[:, :, case.context], values[:, :, case.context] = k_BJLE[:, :, 0], v_BJLE[:, :, 0]
                return keys, values

        mask = mask_of(self.position_1, self.padding_B, self.room)
        rope = tuple(table.float() for table in self.rope)
        return block(self.h_BD.float().unsqueeze(1), rope, mask, Cache()).squeeze(1)

    def middle(self, way):
        """(function, argument sets)."""
        config, o = self.config, self.layers[0].o[0]
        sets = [(qkv_BO, cache_SJE) for qkv_BO, cache_SJE in zip(self.qkvs, self.caches, strict=True)]
        if way == "flash":
            before, after = once(before_without_product), once(consume)

            def function(qkv_BO, cache_SJE):
                cache_TJE = cache_SJE[self.of_q :]
                torch._dynamo.mark_dynamic(cache_TJE, 0)
                q_BHE = before(config, qkv_BO, self.rope, self.slots_2B, cache_TJE)
                return after(o, flash_or_exact(self, q_BHE, cache_SJE))[0]

            return function, sets
        run = once(middle)
        return lambda qkv, cache: run(config, o, way, self.rope, self.slots, qkv, cache, self.seen)[0], sets

    def layer(self, way, pdl=""):
        config, sets = self.config, [(self.layers[i % len(self.layers)], cache) for i, cache in enumerate(self.caches)]
        if way == "flash":
            before, after = once(decode.before_attention), once(decode.after_attention)

            def function(layer, cache_SJE):
                before(config, layer, self.h_BD, self.rope, self.position_1, cache_SJE)
                q_BHE = parts_of(config, self.rows, cache_SJE)[0]
                return after(config, layer, self.h_BD, flash_or_exact(self, q_BHE, cache_SJE))

            return function, sets
        run = once(whole_layer, pdl)
        return lambda layer, cache: run(config, layer, way, self.rope, self.slots, self.h_BD, cache, self.seen), sets


COMPILED = {}


def once(function, pdl=""):
    if (function, pdl) not in COMPILED:
        COMPILED[function, pdl] = compiled(function, pdl)
    return COMPILED[function, pdl]


def flash_or_exact(case, q_BHE, cache_SJE):
    if not CUDA:
        return case.exact_attention(q_BHE, cache_SJE).to(DTYPE)
    return flash_attention(q_BHE, *parts_of(case.config, case.rows, cache_SJE)[1:], case.spans)


def report(out, **result):
    parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items())
    print("  ".join(parts), flush=True)
    with open(out / "step.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")


def build(out, labels, function, sets, expected):
    """Compile and check; one that cannot be compiled is reported, and the study goes on."""
    started = time.perf_counter()
    try:
        got = function(*sets[0]).float()
    except Exception as problem:
        report(out, **labels, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
        return []
    error = float((got - expected.float()).norm() / expected.float().norm())
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
    model = random_model(config, "int4", 128 if CUDA else 32, DEVICE, DTYPE)
    blocks = list(float32_of(model).model.layers[:1])
    layers = [Layer.of(block, rows) for block in model.model.layers]
    cases = {context: Case(config, rows, context, layers, blocks) for context in contexts}
    if CUDA:
        torch.cuda.empty_cache()
    tiles = [(8, 16), (8, 32), (16, 16), (16, 32), (16, 64), (32, 32)] if rows == 1 else [(4, 32), (8, 32), (8, 64)]
    ways = {"flash": "flash"} | {f"flex/{s}/{b}": (flex, flex_options(s, b)) for s, b in tiles} | {"sums/8": (sums, 8)}
    best = (flex, flex_options(16 if rows == 1 else 8 if rows == 4 else 4, 32))
    whole = [("flash", "flash", ""), ("flex", best, ""), ("flex, pdl small", best, "small"), ("flex, pdl", best, "all")]
    built = []
    for name, way, pdl in [(name, way, None) for name, way in ways.items()] + whole:
        for context, case in cases.items():
            if left() < seconds * 0.35 or (name == "sums/8" and rows * context > 2048):
                continue
            labels = tag | {"context": context, "part": "middle" if pdl is None else "layer", "way": name}
            if pdl is None:
                built += build(out, labels, *case.middle(way), case.exact_middle())
            else:
                built += build(out, labels, *case.layer(way, pdl), case.exact_layer())
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
