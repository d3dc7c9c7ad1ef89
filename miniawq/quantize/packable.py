"""Which layers of a model the file formats hold."""

from miniawq.awq import Fold, llama_folds
from miniawq.model import LlamaConfig
from miniawq.packing import CODES_PER_WORD


def packable_folds(config: LlamaConfig, shapes: dict[str, tuple[int, int]], group_size: int) -> list[Fold]:
    """The folds whose linears all fit the file format: engines read a set of linears as one matrix."""

    def fits(fold: Fold) -> bool:
        return all(is_packable(shapes[f"model.layers.0.{name}"], group_size) for name in fold.balance_layers)

    return [fold for fold in llama_folds(config) if fits(fold)]


def is_packable(shape: tuple[int, int], group_size: int) -> bool:
    """Whether groups divide a layer's inputs and words its outputs."""
    inputs, outputs = shape
    return inputs % max(1, group_size) == 0 and outputs % CODES_PER_WORD == 0


def left_dense(config: LlamaConfig, shapes: dict[str, tuple[int, int]], group_size: int) -> str:
    """What to tell of layers of blocks that do not fit, with a group size that packs more; "" if all fit."""
    packed = packable_folds(config, shapes, group_size)
    kept = {name for fold in packed for name in fold.balance_layers}
    names = [name for fold in llama_folds(config) for name in fold.balance_layers]
    left = [f"model.layers.0.{name}" for name in names if name not in kept]
    if not left:
        return ""
    name = next(name for name in left if not is_packable(shapes[name], group_size))
    inputs, outputs = shapes[name]
    told = (
        f"{len(left)} of each block's {len(names)} layers stay dense: groups of {group_size} inputs and words of "
        f"{CODES_PER_WORD} outputs do not fit the {inputs} inputs and {outputs} outputs of {name}"
    )
    for smaller in (64, 32):
        if len(packable_folds(config, shapes, smaller)) > len(packed):
            return f"{told}; --group-size {smaller} packs more of them"
    return told
