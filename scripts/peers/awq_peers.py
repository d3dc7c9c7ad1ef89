"""The same model and calibration ids through other quantizers, each in an environment of its own.

    python scripts/peers/awq_peers.py ids tests/data/fairytales ../shared/data/fairytales-train.txt /tmp/ids.json
    /tmp/venv-ar/bin/python scripts/peers/awq_peers.py auto-round tests/data/fairytales /tmp/out-ar /tmp/ids.json
    miniawq evaluate /tmp/out-ar --reference tests/data/fairytales --text fairytales-valid.txt --sequence-length 512 \\
        --max-windows 24

All are asked for asymmetric INT4 and 32 windows, and keep their defaults otherwise. Each beside torch 2.13 on a CPU:

    auto-round, auto-round-light            auto-round==0.16.1, and its own export to AutoAWQ
    llm-compressor, llm-compressor-gptq     llmcompressor==0.14.0.1
    gptqmodel       BUILD_CUDA_EXT=0 pip install gptqmodel==7.7.0; its file is written once more as a dense one
    autoawq         autoawq==0.2.9 transformers==4.51.3 huggingface-hub<1 datasets==3.6.0 triton accelerate, and one
                    repair without which it is wrong on a CPU: in awq/quantize/quantizer.py `org_sd = {k: v.cpu() ...}`
                    must be `v.clone()`

`loss` prints transformers' own loss on windows of ids, to compare `miniawq evaluate` with.
"""

import argparse
import json
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def write_ids(model: str, text: str, out: str, samples: int, length: int) -> None:
    from miniawq.quantize.calibration import read_calibration
    from miniawq.text.tokenizer import Tokenizer

    tokens_BL = read_calibration(text, Tokenizer(model), samples, length).tokens_BL
    Path(out).write_text(json.dumps(tokens_BL.tolist()))


def autoawq(model: str, out: str, ids: list[list[int]], group_size: int) -> None:
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoAWQForCausalLM.from_pretrained(model, torch_dtype="float32", device_map="cpu", safetensors=True)
    settings = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    loaded.quantize(
        tokenizer, quant_config=settings, calib_data=ids, max_calib_samples=len(ids), max_calib_seq_len=len(ids[0])
    )
    loaded.save_quantized(out)
    tokenizer.save_pretrained(out)


def auto_round(model: str, out: str, ids: list[list[int]], group_size: int, **recipe: Any) -> None:
    """`recipe` is what its command line sets for its recipes; without any its defaults stay."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    windows = [torch.tensor([row]) for row in ids]
    shape = {"nsamples": len(ids), "seqlen": len(ids[0]), "group_size": group_size, "sym": False}
    rounder = AutoRound(loaded, tokenizer, scheme="W4A16", dataset=windows, device_map="cpu", **shape, **recipe)
    rounder.quantize_and_save(out, format="auto_awq")


def auto_round_light(model: str, out: str, ids: list[list[int]], group_size: int) -> None:
    auto_round(model, out, ids, group_size, iters=50, lr=5e-3)


def gptqmodel(model: str, out: str, ids: list[list[int]], group_size: int) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=group_size, sym=False), device="cpu")
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    loaded.save(f"{out}-gptq")
    write_dense(Path(f"{out}-gptq"), model, out)


def write_dense(packed: Path, model: str, out: str) -> None:
    """What a file in AutoGPTQ's format (zeros are stored less one) stands for, in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = load_file(packed / "model.safetensors")
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    shifts = torch.arange(0, 32, 4)
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        words_WO, zeros_GW, scales_GO, group_I = (
            tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        codes_IO = (words_WO[:, None] >> shifts[:, None] & 15).flatten(0, 1)
        zeros_GO = (zeros_GW[..., None] >> shifts & 15).flatten(1) + 1
        weight_IO = (codes_IO - zeros_GO[group_I]) * scales_GO.float()[group_I]
        dense.get_submodule(name).weight.data = weight_IO.t().contiguous()
    dense.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def llm_compressor_awq(model: str, out: str, ids: list[list[int]], group_size: int) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, *batch: None  # torch 2.13 raises without an accelerator
    rounding = QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme(group_size)})
    llm_compressor(model, out, ids, [AWQModifier(duo_scaling="both"), rounding])


def llm_compressor_gptq(model: str, out: str, ids: list[list[int]], group_size: int) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    groups = {"group_0": scheme(group_size)}
    llm_compressor(model, out, ids, [GPTQModifier(ignore=["lm_head"], config_groups=groups)])


def scheme(group_size: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=group_size)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def llm_compressor(model: str, out: str, ids: list[list[int]], recipe: Sequence[Any]) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=list(recipe),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
    )
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def transformers_loss(model: str, ids: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [loaded(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in ids]
    mean = sum(losses) / len(losses)
    print(f"transformers: loss {mean:.6f}, perplexity {2.718281828459045**mean:.6f} on {len(ids)} windows")


# What each is called, its distribution, and what runs it.
PEERS = {
    "autoawq": ("autoawq", autoawq),
    "auto-round": ("auto-round", auto_round),
    "auto-round-light": ("auto-round", auto_round_light),
    "gptqmodel": ("gptqmodel", gptqmodel),
    "llm-compressor": ("llmcompressor", llm_compressor_awq),
    "llm-compressor-gptq": ("llmcompressor", llm_compressor_gptq),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ids", "loss", *PEERS))
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", help="ids: TEXT IDS; loss: IDS; a peer: OUT IDS")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    if arguments.what == "ids":
        write_ids(arguments.model, *arguments.files, arguments.num_samples, arguments.sequence_length)
        return
    ids = json.loads(Path(arguments.files[-1]).read_text())
    if arguments.what == "loss":
        transformers_loss(arguments.model, ids)
        return
    distribution, run = PEERS[arguments.what]
    started = time.process_time()
    run(arguments.model, arguments.files[0], ids, arguments.group_size)
    print(f"{arguments.what} ({version(distribution)}): {time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
