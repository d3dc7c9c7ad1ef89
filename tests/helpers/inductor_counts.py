"""What the compiled forms become on an H100, counted without one: kernels, instructions a weight, registers, stack.

    python tests/helpers/inductor_counts.py '[["reduce", 28672, 4096, 1], ["dot", 4096, 4096, 16], ["layer", 4096,
    14336, 16]]'

prints a JSON object for each [form, outputs, inputs, rows], or [layer, width, feed-forward width, rows]. Inductor is
told that there is a GPU and generates Triton code for tensors that do not exist; Triton and the assembler in its
package compile for compute capability 9.0.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.compile_fx as compile_fx
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton as torch_triton
import triton
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from miniawq.checkpoint.config import llama_config
from miniawq.compiled import gpu_forms as forms
from miniawq.compiled import launch
from miniawq.compiled.eager import EXPAND_IN_ONE, expand
from miniawq.compiled.inductor import chosen_by
from miniawq.compiled.prepacked import LANES
from miniawq.compiled.products import DOT, FEWEST_ROWS_DOTTED, ONE_KERNEL, REDUCE, Product, options_of
from miniawq.engine.layer import SUM_WHERE_READ, after_attention
from miniawq.engine.weights import Layer

GROUP = 128
TARGET = GPUTarget("cuda", 90, 32)
GPU = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


class PretendedCuda(device_interface.CudaInterface):
    get_device_properties = staticmethod(lambda device=None: GPU)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_available = is_triton_capable = staticmethod(lambda device=None: True)
    current_device = get_raw_stream = staticmethod(lambda index=0: 0)
    device_count = staticmethod(lambda: 1)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: GPU)


def pretend_gpu():
    torch.cuda.get_device_properties = lambda *_, **__: GPU
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.current_device, torch.cuda.device_count = lambda: 0, lambda: 1
    # Asked for the first time, torch fills its register, in which ours is to be last.
    device_interface.get_interface_for_device("cpu")
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, PretendedCuda)
    fake_tensor.init_gpu_context = lambda _: None
    torch_triton.has_triton = lambda *_, **__: True
    joint_graph.lazy_init = lambda *_, **__: None
    initialize = post_grad.lazy_init
    post_grad.lazy_init = lambda *_, **__: initialize(torch.device("cpu"))
    driver = SimpleNamespace(get_current_target=lambda: TARGET, get_current_device=lambda: 0)
    driver.get_active_torch_device = lambda: torch.device("cuda", 0)
    triton.runtime.driver.set_active(driver)


def triton_sources(function, shapes, **options):
    """[(name, source)] of the kernels that a function of tensors, given as (shape, dtype), becomes."""
    mode = fake_tensor.FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch.no_grad(), tracing(TracingContext(mode)), config.patch(ONE_KERNEL | options):
        with mode:
            inputs = [torch.empty(shape, dtype=dtype, device="cuda:0") for shape, dtype in shapes]
            graph = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
            graph.graph.eliminate_dead_code()
            graph.graph = fx_graph_cse(graph.graph)
            graph.recompile()
        with V.set_fake_mode(mode):
            graph = joint_graph.joint_graph_passes(graph) or graph
            view_to_reshape(graph)
            graph = compile_fx._recursive_post_grad_passes(graph, is_inference=True) or graph
            lowering = GraphLowering(graph, inputs, ShapeEnv(), is_inference=True, graph_id=0)
            with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
                lowering.run(*inputs)
                code = lowering.codegen()[0]
    return re.findall(r"async_compile\.triton\('(\w+)', '''\n(.*?)'''", getattr(code, "value", code), re.S)


def assembled(name, source, blocks):
    """Of one kernel, instructions of a thread, registers and bytes of stack (where registers are spilled), and how many
    layouts of tiles in shared memory are row by row.
    """
    signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", source)[1])
    source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n@triton.jit", "@triton.jit", source, flags=re.S)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        constants = {
            (i,): blocks.get(key, 1) for i, key in enumerate(kernel.arg_names) if signature[key] == "constexpr"
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(kernel.arg_names)) if (i,) not in constants}
        options = {"num_warps": blocks["num_warps"], "num_stages": blocks["num_stages"]}
        ast_source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        binary = Path(folder, "kernel.cubin")
        compiled = triton.compile(ast_source, target=TARGET, options=options).asm
        binary.write_bytes(compiled["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text, usage = (subprocess.check_output([tool, kind, binary], text=True) for kind in ("-sass", "-res-usage"))
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return instructions_of_a_step(text), registers, stack, compiled["ttgir"].count("maxPhase = 1, order")


def instructions_of_a_step(text):
    """Those of the longest loop, or of the whole program if it has none."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)
    places = [int(place, 16) for place, _ in lines]
    jumps = [(place, re.search(r"\bBRA.* 0x([0-9a-f]+)", line)) for place, (_, line) in zip(places, lines, strict=True)]
    loops = [(int(to[1], 16), place) for place, to in jumps if to and int(to[1], 16) < place]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, places[-1]))
    return sum(first <= place <= last for place in places)


def weight(outputs, groups):
    """The shapes and dtypes of words_KWGP and grid_KGW."""
    blocks = outputs // LANES
    return [((blocks, LANES, groups, GROUP // 8), torch.int32), ((blocks, groups, LANES), torch.int32)]


def count_layer(width, inner, rows):
    """Kernels of `layer.after_attention`, and how many of them would be searched."""
    heads = width // 128
    names = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    common = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "vocab_size": 256, "num_hidden_layers": 1}
    config = llama_config(common | names)
    residual, attended = (forms.whole_rows(rows), width), (rows, heads, 128)
    shapes = [(shape, torch.bfloat16) for shape in (residual, attended, (width,))]
    form = REDUCE if rows < FEWEST_ROWS_DOTTED else DOT
    for outputs, inputs in ((width, width), (2 * inner, width), (width, inner), (3 * width, width)):
        powers = [((inputs,), torch.float32)] if form is REDUCE else []
        shapes += [*weight(outputs, inputs // GROUP), ((0,), torch.float16), *powers]

    def after(h_BD, attended_BHE, norm_D, *tensors):
        count = len(tensors) // 4
        of_each = (tensors[i : i + count] for i in range(0, len(tensors), count))
        o, gate_up, down, qkv = ((Product(form, (*of_one, None)),) for of_one in of_each)
        layer = Layer(norm_D, qkv, None, o, None, norm_D, gate_up, down, None, rows, rows)
        h_BD, prepared = after_attention(config, layer, layer, h_BD, attended_BHE)
        return h_BD, *prepared.of_products[0], prepared.means_TC

    with chosen_by(launch.block_sizes):
        kernels = triton_sources(after, shapes, **options_of([form]), **SUM_WHERE_READ)
    return {"kernels": len(kernels), "searched": sum("fixed_config(" not in source for _, source in kernels)}


def count_expand(outputs, inputs):
    """Kernels of `eager.expand`, in how many dimensions their tiles lie, and whether they write one after the other."""
    shapes = weight(outputs, inputs // GROUP)
    both = torch.float16, torch.bfloat16
    kernels = triton_sources(lambda words, grid: expand(words, grid, *both), shapes, **EXPAND_IN_ONE)
    dimensions = [source.count("BLOCK : tl.constexpr") for _, source in kernels]
    stores = [re.search(r"tl\.store\(\w+ \+ \((x\d+)\)", source) for _, source in kernels]
    in_order = [
        bool(store and f"{store[1]} = xindex\n" in source) for store, (_, source) in zip(stores, kernels, strict=True)
    ]
    return {"kernels": len(kernels), "dimensions": dimensions, "in_order": in_order}


def count(form, outputs, inputs, rows):
    if form == "layer":
        return count_layer(outputs, inputs, rows)
    if form == "expand":
        return count_expand(outputs, inputs)
    groups, half, chosen = inputs // GROUP, torch.float16, []
    if form == "reduce":
        words = inputs // 8
        vectors = words // forms.WORDS_OF_A_LOAD
        parts = launch.parts_for(vectors, rows)
        x = [((rows, 8, words), torch.float32), ((rows, groups), torch.float32)]
        product = lambda w, g, *x: forms.reduce_vectors(w, g, half, *x, parts)  # noqa: E731
    elif form == "weights":
        x = [((rows, groups, GROUP), half)]
        product = lambda w, g, x: forms.dot_weights(w, g, half, x)  # noqa: E731
    else:
        x = [((1, rows, groups, 4, GROUP // 4), half), ((rows, groups, 4), torch.int64)]
        product = lambda w, g, *x: forms.dot_groups(w, g, half, *x)  # noqa: E731

    def choose(kind, **sizes):
        blocks = launch.block_sizes(kind, **sizes)
        if kind in ("vectors", "dot"):
            chosen.append(blocks)
        return blocks

    with chosen_by(choose):
        kernels = triton_sources(product, weight(outputs, groups) + x)
    (blocks,) = chosen
    name, source = max(kernels, key=lambda kernel: len(kernel[1]))
    instructions, registers, stack, row_by_row = assembled(name, source, blocks)
    step = blocks["XBLOCK"] * forms.WORDS_OF_A_LOAD * parts if form == "reduce" else blocks["YBLOCK"]
    words = blocks["R0_BLOCK"] * step
    per_weight = instructions * 32 * blocks["num_warps"] / (8 * words)
    counts = {"per_weight": round(per_weight, 2), "registers": registers, "stack": stack, "row_by_row": row_by_row}
    return {"kernels": len(kernels)} | counts


if __name__ == "__main__":
    pretend_gpu()
    for job in json.loads(sys.argv[1]):
        print(json.dumps(count(*job)), flush=True)
