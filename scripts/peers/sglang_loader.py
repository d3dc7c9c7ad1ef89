"""What SGLang's own loader makes of our files, without a GPU: each fused layer that it holds is, word for word, ours.

    SGLANG/bin/python scripts/peers/sglang_loader.py miniawq/demo/fairytales-awq

SGLang's kernels want a GPU; its configuration, its model and the loading of weights do not. It reads config.json,
builds its Llama or Qwen 2 on the CPU and loads the shards. Then each `qkv_proj` and `gate_up_proj` is compared with our
tensors side by side, all others with ours as they are. The environment: sglang==0.5.23 and what importing it asks for;
where there is no driver, a libcuda.so.1 of any kind on LD_LIBRARY_PATH, which is looked up and not called.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def loaded(directory: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of SGLang's model after it has loaded the tensors."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.quantization import get_quantization_config
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    settings = ServerArgs(model_path=str(directory), device="cpu", dtype="float16")
    publish(settings, role="scheduler", ranks=SpawnRanks(0))
    init_distributed_environment(1, 0, "tcp://127.0.0.1:29581", 0, "gloo")
    initialize_model_parallel()
    initialize_dp_attention(settings)
    config = AutoConfig.from_pretrained(directory)
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    kind, _ = ModelRegistry.resolve_model_cls(config.architectures)
    torch.set_default_dtype(torch.float16)
    model = kind(config, get_quantization_config(block["quant_method"]).from_config(block))
    model.load_weights(iter(tensors.items()))
    return dict(model.named_parameters())


def expected(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """Our tensor for a parameter of SGLang's, those of a fused layer side by side."""
    for joined, parts in JOINED.items():
        if f".{joined}." in name:
            side = 1 if name.endswith(("qweight", "qzeros", "scales")) else 0
            return torch.cat([tensors[name.replace(joined, part)] for part in parts], side)
    return tensors.get(name)


def main() -> None:
    directory = Path(sys.argv[1])
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    found: dict[str, Any] = loaded(directory, tensors)
    wrong = []
    for name, parameter in found.items():
        ours = expected(name, tensors)
        ours = ours if ours is None or ours.dtype == torch.int32 else ours.to(parameter.dtype)
        if ours is None or not torch.equal(parameter.data[: len(ours)], ours):
            wrong.append(name)
    print(
        f"sglang {version('sglang')}: {len(found)} parameters, {len(found) - len(wrong)} as in the files",
        *wrong,
        sep="\n",
    )


if __name__ == "__main__":
    main()
