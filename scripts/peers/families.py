"""Let llm-compressor quantize tiny models of three families, and compare its logits with those of miniawq.

    python3 -m venv /tmp/venv-lc; /tmp/venv-lc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python scripts/peers/families.py --peer /tmp/venv-lc/bin/python --work /tmp/peers/families

Run it with miniawq's own Python. The peer runs in a process of its own (this file with `--write`): it loads a model of
tests/golden/models, quantizes it, saves it, loads what it has saved, and leaves the logits beside it.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "golden" / "models"
# By name of the model: for each group its targets and the form of their weights.
GROUPS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "glm4": [("Linear", {"symmetric": False, "strategy": "group", "group_size": 8})],
    "phi3-long": [("Linear", {"symmetric": True, "strategy": "channel"})],
    "gemma3": [
        ("re:.*self_attn.*", {"symmetric": False, "strategy": "group", "group_size": 8}),
        ("re:.*mlp.*", {"symmetric": True, "strategy": "group", "group_size": 4}),
    ],
}


def write(name: str, directory: Path) -> None:
    """In the peer's environment."""
    transformers, compressor = importlib.import_module("transformers"), importlib.import_module("llmcompressor")
    modifiers = importlib.import_module("llmcompressor.modifiers.quantization")
    schemes = importlib.import_module("compressed_tensors.quantization")

    def loaded(source: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    model = loaded(MODELS / name)
    groups = {
        f"group_{number}": schemes.QuantizationScheme(
            targets=[target], weights=schemes.QuantizationArgs(num_bits=4, type="int", **form)
        )
        for number, (target, form) in enumerate(GROUPS[name])
    }
    compressor.oneshot(model=model, recipe=modifiers.QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    model.save_pretrained(directory, save_compressed=True)
    tokens_BL = load_file(MODELS / name / "reference.safetensors")["tokens"]
    with torch.no_grad():
        logits_BLV = loaded(directory)(tokens_BL).logits
    save_file({"tokens": tokens_BL, "logits": logits_BLV.contiguous()}, directory / "reference.safetensors")


def compare(name: str, directory: Path) -> None:
    """In miniawq's."""
    sys.path.insert(0, str(ROOT))
    loading = importlib.import_module("miniawq.checkpoint.loading")
    checkpoint = importlib.import_module("miniawq.checkpoint.opening").open_checkpoint(directory)
    (directory / "reference.safetensors").rename(reference := directory.with_suffix(".reference"))
    saved = load_file(reference)
    with torch.no_grad():
        logits_BLV = loading.load_model(checkpoint, dtype=torch.float32)(saved["tokens"])
    worst = float((logits_BLV - saved["logits"]).abs().max() / saved["logits"].abs().max())
    print(f"{name}: {len(checkpoint.quantized)} packed layers, logits off by {worst:.1e} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, required=True, help="a directory for the peer's files")
    parser.add_argument("--peer", help="the Python with llmcompressor")
    parser.add_argument("--write", metavar="NAME", help="what the peer's process does")
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write, arguments.work)
        return
    for name in GROUPS:
        directory = arguments.work / name
        command = [arguments.peer, "-P", __file__, "--work", str(directory), "--write", name]
        subprocess.run(command, check=True, capture_output=True)
        compare(name, directory)


if __name__ == "__main__":
    main()
