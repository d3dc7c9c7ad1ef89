"""The head is one more layer, after the last block: its ranges are searched and its codes learned like those of others.

Its inputs are the last hidden states after the model's final norm: those of the quantized model where codes are
learned. No factors are folded into that norm, since they gain nothing (docs/log/head.md). Outputs do not depend on each
other, and a head has many more than a layer of a block, so some are rounded at a time.
"""

import math

import torch
from torch import Tensor

from miniawq.awq import QuantizedLayer, quantize_layer
from miniawq.checkpoint.blocks import BlockStream, micro_batches
from miniawq.packing import Quantized
from miniawq.quantize.moments import SymmetricStatistics
from miniawq.quantize.recipes import Recipe


def quantize_head(stream: BlockStream, hidden_BLD: Tensor, recipe: Recipe) -> QuantizedLayer:
    """Round the stored head, for these outputs of the last block; parts of it as large as another layer at a time."""
    weight_OI = stream.checkpoint.read("lm_head.weight", stream.device)
    largest = max(math.prod(shape) for name, shape in stream.checkpoint.linears.items() if name != "lm_head")
    norm, seen = stream.norm(), SymmetricStatistics(weight_OI.shape[1], stream.device)
    for rows in micro_batches(*hidden_BLD.shape[:2]):
        seen.add(norm(hidden_BLD[rows].to(stream.device, torch.float32)).flatten(0, -2))
    seen.finish()
    parts = [
        quantize_layer("lm_head", some_OI.float(), seen, recipe.rounding, recipe.method)
        for some_OI in weight_OI.split(largest // weight_OI.shape[1])
    ]
    quantized = Quantized(*(torch.cat(tensors) for tensors in zip(*(part.quantized for part in parts), strict=True)))
    sizes = torch.tensor([len(part.quantized.codes_OI) for part in parts], dtype=torch.float64)
    losses = torch.tensor([(part.plain_loss, part.loss) for part in parts], dtype=torch.float64)
    plain_loss, loss = (sizes @ losses / sizes.sum()).tolist()
    return QuantizedLayer(quantized, plain_loss, loss)
