"""Open miniawq's checkpoints with the peers' own code and the peers' with miniawq; print who agrees bit for bit.

Three environments, because the peers want different releases of transformers (CPU builds of torch serve):

    for name in ct lc aa; do python3 -m venv /tmp/venv-$name; /tmp/venv-$name/bin/pip install torch==2.13.0; done
    /tmp/venv-ct/bin/pip install transformers==5.23.0 compressed-tensors==0.20.0
    /tmp/venv-lc/bin/pip install llmcompressor==0.14.0.1
    /tmp/venv-aa/bin/pip install transformers==4.51.3 zstandard accelerate
    /tmp/venv-aa/bin/pip install --no-deps autoawq==0.2.9
    pip download --no-deps gptqmodel==7.7.0 -d /tmp/peers && tar xzf /tmp/peers/gptqmodel-7.7.0.tar.gz -C /tmp/peers

    python scripts/peers/checkpoints.py --work /tmp/peers/work --gptqmodel /tmp/peers/gptqmodel-7.7.0

Run it with miniawq's own Python. Each peer runs in a process of its own (this file with `--actor`), and leaves the
dense weights as it sees them in a safetensors file.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
DENSE = ROOT / "tests" / "data" / "fairytales"
GROUP_SIZE = 64
TEXTS = ["Once upon a time there was a king who had a daughter. " * 4] * 16


def without_datasets() -> None:
    """AutoAWQ imports `datasets` for calibration sets that are not used here; transformers must be imported before."""
    import transformers  # noqa: F401

    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None


def save_autoawq(source: Path, target: Path, version: str) -> None:
    """AutoAWQ's quantizer and saver."""
    without_datasets()
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    settings = {"zero_point": True, "q_group_size": GROUP_SIZE, "w_bit": 4, "version": version}
    model.quantize(tokenizer, quant_config=settings, calib_data=TEXTS, max_calib_samples=16, max_calib_seq_len=128)
    model.save_quantized(str(target))


def save_llmcompressor(source: Path, target: Path, scheme: str) -> None:
    """llm-compressor's quantizer and saver; plain rounding, since the files are the matter here."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    strategy = {"strategy": "channel"} if scheme == "channel" else {"strategy": "group", "group_size": GROUP_SIZE}
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=scheme == "symmetric", **strategy)
    group = QuantizationScheme(targets=["Linear"], weights=weights)
    ignore = ["lm_head", "re:.*layers.0.mlp.gate_proj"]
    oneshot(model=model, recipe=[QuantizationModifier(config_groups={"group_0": group}, ignore=ignore)])
    model.save_pretrained(target, save_compressed=True)


def read_autoawq(source: Path, target: Path, unpacker: Path | None = None) -> None:
    """AutoAWQ's (or, from a single file, GPTQModel's) unpacker over every packed layer."""
    if unpacker is None:
        without_datasets()
        from awq.utils.packing_utils import dequantize_gemm
    else:
        spec = importlib.util.spec_from_file_location("unpacker", unpacker)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        dequantize_gemm = module.dequantize_gemm
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    dense = {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        group_size = parts[0].shape[0] // parts[2].shape[0]
        dense[f"{name}.weight"] = dequantize_gemm(*parts, 4, group_size).t().contiguous()
    save_file(dense, target)


def read_compressed_tensors(source: Path, target: Path, dtype: str) -> None:
    """transformers with compressed-tensors' decompressor; "auto" is the dtype of config.json."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    settings = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=settings)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    weights = {f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in names}
    save_file(weights, target)


def convert_compressed_tensors(source: Path, target: Path) -> None:
    """compressed-tensors' own converter from AutoAWQ."""
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    convert_checkpoint(source, target, AutoAWQConverter.from_pretrained(str(source)))


ACTORS = {
    "save-autoawq": save_autoawq,
    "save-llmcompressor": save_llmcompressor,
    "read-autoawq": read_autoawq,
    "read-compressed-tensors": read_compressed_tensors,
    "convert-compressed-tensors": convert_compressed_tensors,
}


class Peers:
    """Runs actors in the peers' environments."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.pythons = {"aa": arguments.autoawq, "lc": arguments.llmcompressor, "ct": arguments.compressed_tensors}

    def run(self, environment: str, actor: str, *values: object) -> None:
        command = [self.pythons[environment], __file__, "--actor", actor, *map(str, values)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{actor} failed in {environment}:\n{done.stderr[-3000:]}")


def our_weights(directory: Path) -> dict[str, torch.Tensor]:
    from miniawq.checkpoint.opening import open_checkpoint
    from miniawq.packing import dequantize

    checkpoint = open_checkpoint(directory)
    return {f"{name}.weight": dequantize(checkpoint.read_linear(name)) for name in checkpoint.quantized}


def verdict(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str:
    """Bit equality of every packed layer, or how many differ and by how much at most, in units of the weight."""
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name].dtype))]
    if not unequal:
        return f"equal bit for bit ({len(ours)} layers)"
    worst = max(((ours[n].double() - theirs[n].double()).abs().max() / ours[n].abs().max()).item() for n in unequal)
    return f"{len(unequal)} of {len(ours)} layers differ, by {worst:.1e} of the largest weight at most"


def write_ours(work: Path) -> dict[str, Path]:
    """The demo model in every form that miniawq writes, by plain rounding."""
    from miniawq.checkpoint.opening import open_checkpoint
    from miniawq.checkpoint.quant_config import awq_block
    from miniawq.commands.convert import convert_checkpoint
    from miniawq.packing import GRIDS, LAYOUTS, quantize

    made = {}
    dense = open_checkpoint(DENSE)
    for name, group_size, grid in (
        ("asymmetric", GROUP_SIZE, "asymmetric"),
        ("symmetric", GROUP_SIZE, "symmetric"),
        ("rows", -1, "asymmetric"),
    ):
        tensors = {key: dense.read(key).clone() for key in dense.tensors}
        for linear in dense.linears:
            if linear != "lm_head":
                packed = quantize(tensors.pop(f"{linear}.weight").float(), group_size, GRIDS[grid])
                tensors |= {f"{linear}.{part}": tensor for part, tensor in LAYOUTS["awq"].encode(packed).items()}
        start = work / f"start-{name}"
        start.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, start / "model.safetensors")
        config = dense.config | {"quantization_config": awq_block(group_size, ["lm_head"])}
        (start / "config.json").write_text(json.dumps(config))
        for format in ("awq", "compressed-tensors"):
            made[f"{format} {name}"] = work / f"{format}-{name}"
            convert_checkpoint(start, made[f"{format} {name}"], format)
    return made


def compare(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    from miniawq.commands.convert import convert_checkpoint

    work, peers, rows = arguments.work, Peers(arguments), []

    def read_by(writer: str, reader: str, directory: Path, environment: str, actor: str, *values: object) -> None:
        dump = work / f"{len(rows)}.safetensors"
        peers.run(environment, actor, directory, dump, *values)
        rows.append((writer, reader, verdict(our_weights(directory), load_file(dump))))
        print(" | ".join(rows[-1]), file=sys.stderr)

    gptqmodel = arguments.gptqmodel / "gptqmodel/quantization/awq/utils/packing_utils.py"
    made = write_ours(work)
    for name, directory in made.items():
        if name.startswith("awq"):
            read_by(f"miniawq, {name}", "AutoAWQ 0.2.9", directory, "aa", "read-autoawq")
            read_by(f"miniawq, {name}", "GPTQModel 7.7.0", directory, "ct", "read-autoawq", gptqmodel)
        else:
            reader = "compressed-tensors 0.20.0"
            read_by(f"miniawq, {name}", reader, directory, "ct", "read-compressed-tensors", "float16")
            read_by(
                f"miniawq, {name}", f"{reader}, in bfloat16", directory, "ct", "read-compressed-tensors", "bfloat16"
            )
    peers.run("ct", "convert-compressed-tensors", made["awq asymmetric"], work / "theirs")
    same = verdict(our_weights(made["awq asymmetric"]), our_weights(work / "theirs"))
    rows.append(("compressed-tensors' AutoAWQConverter", "miniawq", same))
    for version in ("GEMM", "GEMV"):
        peers.run("aa", "save-autoawq", DENSE, work / f"autoawq-{version}", version)
    read_by("AutoAWQ 0.2.9's saver", "miniawq, against AutoAWQ", work / "autoawq-GEMM", "aa", "read-autoawq")
    same = verdict(our_weights(work / "autoawq-GEMV"), our_weights(work / "autoawq-GEMM"))
    rows.append(("AutoAWQ 0.2.9's saver, GEMV", "miniawq, against the GEMM one", same))
    for scheme in ("symmetric", "asymmetric", "channel"):
        target = work / f"llmcompressor-{scheme}"
        peers.run("lc", "save-llmcompressor", DENSE, target, scheme)
        writer, reader = f"llm-compressor 0.14.0.1's saver, {scheme}", "miniawq, against compressed-tensors"
        read_by(writer, reader, target, "ct", "read-compressed-tensors", "auto")
        convert_checkpoint(target, work / f"converted-{scheme}", "awq")
        same = verdict(our_weights(target), our_weights(work / f"converted-{scheme}"))
        rows.append((f"the same, converted to awq, {scheme}", "miniawq", same))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/peers/work"))
    parser.add_argument("--gptqmodel", type=Path, default=Path("/tmp/peers/gptqmodel-7.7.0"))
    parser.add_argument("--autoawq", default="/tmp/venv-aa/bin/python")
    parser.add_argument("--llmcompressor", default="/tmp/venv-lc/bin/python")
    parser.add_argument("--compressed-tensors", default="/tmp/venv-ct/bin/python")
    parser.add_argument("--actor", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.actor:
        name, source, target, *rest = arguments.actor
        extra = [Path(value) if "/" in value else value for value in rest]
        ACTORS[name](Path(source), Path(target), *extra)
        return
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    print("| written by | read by | weights |\n|---|---|---|")
    for row in compare(arguments):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
