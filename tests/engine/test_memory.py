"""The memory of a prompt: the plan's part for it, held to what operations allocate."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from miniawq import kernel
from miniawq.checkpoint.config import llama_config
from miniawq.compiled import eager, prepacked
from miniawq.engine import memory
from miniawq.engine.memory import prefill_bytes
from miniawq.engine.weights import Weights
from miniawq.kernel import QuantLinear
from miniawq.model import KVCache, Llama, LlamaConfig, dense_linear
from tests.helpers.allocations import Allocations

# Llama-3.1-8B with everything a sixteenth as wide and a piece as much shorter; 70B's shape is wider beside a slice.
SCALE = 16
SHAPES = {"8b": (256, 896, 4, 1), "70b": (512, 1792, 8, 1)}
PIECE = memory.PREFILL_CHUNK // SCALE


def config_of(shape: str) -> LlamaConfig:
    width, inner, heads, kv_heads = SHAPES[shape]
    return llama_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": width,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 64,
            "num_hidden_layers": 2,
            "vocab_size": 256,
            "max_position_embeddings": 4096,
        }
    )


def packed(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    return dense_linear(name, inputs, outputs, bias) if name == "lm_head" else QuantLinear(inputs, outputs, bias)


def model_of(config: LlamaConfig, linear: Callable[..., nn.Module], device: torch.device) -> Llama:
    """Zeros, prepacked and with what reads the same input in one memory, as a decode step leaves it."""
    model = Llama(config, linear).to(device, torch.bfloat16).requires_grad_(False)
    for block in model.model.layers:
        attn, mlp = block.self_attn, block.mlp
        for group in ((attn.q_proj, attn.k_proj, attn.v_proj), (attn.o_proj,), (mlp.gate_proj, mlp.up_proj)):
            if linear is packed:
                Weights.of(*group)
        if linear is packed:
            mlp.down_proj.prepare()
    return model


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU on any device, all sizes as much smaller as the shapes are."""
    monkeypatch.setattr(prepacked, "wants_rows", lambda _: True)
    monkeypatch.setattr(kernel, "multiply_prepacked", eager.expanded_product)
    codes = eager.CODES_PER_EXPANDED_SLICE // SCALE**2
    monkeypatch.setattr(memory, "CODES_PER_EXPANDED_SLICE", codes)
    monkeypatch.setattr(eager, "expansion", lambda weight, dtype: (partial(expanded, dtype), codes))
    monkeypatch.setattr(memory, "PREFILL_CHUNK", PIECE)


def expanded(dtype: torch.dtype, words_KWGP: Tensor, grid_KGW: Tensor) -> Tensor:
    """What one compiled kernel leaves behind."""
    words_OJ = words_KWGP.flatten(2).flatten(0, 1)
    outputs, words = words_OJ.shape
    return torch.zeros(outputs, words * dtype.itemsize, dtype=torch.int64, device=words_OJ.device)


@pytest.mark.parametrize("linear", [packed, dense_linear])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (1, 50),
        (16, 384),
        pytest.param(1, 1536, marks=pytest.mark.thorough),
        pytest.param(16, 32, marks=pytest.mark.thorough),
    ],
)
@torch.no_grad()
def test_the_last_piece_of_a_prompt_takes_what_is_planned(linear, shape, rows, length, as_on_cuda, device) -> None:
    config, piece = config_of(shape), min(length, PIECE // rows)
    with Allocations() as allocations:
        model = model_of(config, linear, device)
        padding_B = torch.arange(rows, device=device) if rows > 1 else None
        cache = KVCache(config, rows, length, device=device, dtype=torch.bfloat16, padding_B=padding_B)
        cache.length = length - piece
        held, allocations.peak = sum(allocations.sizes.values()), 0
        model.last_logits(torch.zeros(rows, piece, dtype=torch.long, device=device), cache)
    planned = prefill_bytes(model, torch.bfloat16, "cuda", rows, length)
    assert 0.9 * planned < allocations.peak - held < 1.05 * planned
