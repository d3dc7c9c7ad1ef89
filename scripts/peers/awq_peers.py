"""The same model and calibration ids through AutoAWQ 0.2.9 and llm-compressor's AWQ, each in its own environment.

    python scripts/peers/awq_peers.py ids tests/data/fairytales ../shared/data/fairytales-train.txt /tmp/ids.json
    /tmp/venv-aa/bin/python scripts/peers/awq_peers.py autoawq tests/data/fairytales /tmp/out-autoawq /tmp/ids.json
    /tmp/venv-lc/bin/python scripts/peers/awq_peers.py llm-compressor tests/data/fairytales /tmp/out-lc /tmp/ids.json
    python -m miniawq.commands.evaluate /tmp/out-autoawq --reference tests/data/fairytales --text ...

AutoAWQ needs torch==2.13.0 transformers==4.51.3 huggingface-hub<1 datasets==3.6.0 triton accelerate, and one repair
without which it is wrong on a CPU: in awq/quantize/quantizer.py `org_sd = {k: v.cpu() ...}` must be `v.clone()`.
`loss` prints transformers' own loss on windows of ids, to compare `miniawq.commands.evaluate` with.
"""

import argparse
import json
import time
from pathlib import Path


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


def llm_compressor(model: str, out: str, ids: list[list[int]], group_size: int) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=[
            AWQModifier(duo_scaling="both"),
            QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme}),
        ],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ids", "autoawq", "llm-compressor", "loss"))
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", help="ids: TEXT IDS; autoawq, llm-compressor: OUT IDS; loss: IDS")
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
    started = time.monotonic()
    run = autoawq if arguments.what == "autoawq" else llm_compressor
    run(arguments.model, arguments.files[0], ids, arguments.group_size)
    print(f"{arguments.what}: {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
