"""Which settings of AWQ pay: KL divergence and perplexity of one model, quantized in many ways.

    python scripts/study_awq.py tests/data/fairytales --calib ../shared/data/fairytales-train.txt \
        --text ../shared/data/fairytales-valid.txt --group-size 128

`closed` is the part of plain rounding's KL divergence that is gone. With --plant the same function is given outliers
first: four channels of every norm are multiplied by 64 and the columns that read them divided; likewise four rows of
up_proj, and down_proj.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miniawq import awq, evaluate
from miniawq.awq import DEFAULT, PAPER, Recipe, Statistics
from miniawq.calibration import read_calibration, read_text, sample_calibration
from miniawq.checkpoint import load_model, open_checkpoint
from miniawq.model import Llama
from miniawq.quantize import fold_table
from miniawq.stream import micro_batches
from miniawq.tokenizer import Tokenizer

PLAIN = replace(DEFAULT, formulas=(), clip="none")
UNSCALED = replace(DEFAULT, formulas=())
UNCLIPPED = replace(DEFAULT, clip="none")


def root_mean_square(seen: Statistics) -> None:
    seen.magnitude_I = seen.moments_II.diagonal().sqrt()


@dataclass(frozen=True)
class Variant:
    """One way to quantize. `see` changes the statistics; `quantized_inputs` shows a block its predecessors' errors."""

    recipe: Recipe
    see: Callable[[Statistics], None] = lambda seen: None
    quantized_inputs: bool = False
    fold_values: bool = True
    compared_tokens: int = 4096
    own_text: bool = False


VARIANTS = {
    "plain rounding": Variant(PLAIN),
    "scales: the paper's": Variant(replace(PAPER, clip="none")),
    "scales: duo": Variant(replace(UNCLIPPED, formulas=("duo",))),
    "scales: both": Variant(UNCLIPPED),
    "scales: both, every ratio": Variant(replace(UNCLIPPED, stride=1)),
    "scales: both, 16384 tokens compared": Variant(UNCLIPPED, compared_tokens=16384),
    "scales: both, root mean square": Variant(UNCLIPPED, see=root_mean_square),
    "scales: both, v_proj -> o_proj not folded": Variant(UNCLIPPED, fold_values=False),
    "clip: the paper's limits, not q and k": Variant(replace(PAPER, formulas=())),
    "clip: the paper's limits, all layers": Variant(replace(PAPER, formulas=(), unclipped=())),
    "clip: ranges, not q and k": Variant(replace(UNSCALED, unclipped=("q_proj", "k_proj"))),
    "clip: ranges, all layers": Variant(UNSCALED),
    "the paper": Variant(PAPER),
    "default: scales both, clip ranges": Variant(DEFAULT),
    "default, quantized inputs": Variant(DEFAULT, quantized_inputs=True),
    "default, root mean square": Variant(DEFAULT, see=root_mean_square),
    "default, AutoAWQ's grid": Variant(replace(DEFAULT, grid="autoawq")),
    "default, symmetric": Variant(replace(DEFAULT, grid="symmetric")),
    "default, the model's own text": Variant(DEFAULT, own_text=True),
    "compensation alone": Variant(replace(PLAIN, compensate=True)),
    "scales both, limits, compensation": Variant(replace(PAPER, formulas=DEFAULT.formulas, compensate=True)),
    "default, compensation": Variant(replace(DEFAULT, compensate=True)),
}


def quantize(model: Llama, tokens_BL: Tensor, variant: Variant) -> None:
    """Quantize every block of a model in memory."""
    folds = [fold for fold in fold_table(model.config) if variant.fold_values or "v_proj" not in fold.previous]
    hidden_BLD = model.model.embed_tokens(tokens_BL)
    rope, masks = model.model.positions(0, tokens_BL.shape[1], None, hidden_BLD)
    batches = list(micro_batches(*tokens_BL.shape))
    kept = range(0, len(batches), max(1, tokens_BL.numel() // variant.compared_tokens))
    for block, window in zip(model.model.layers, model.config.layer_windows, strict=True):

        def run(block=block, window=window, hidden_BLD=hidden_BLD) -> Tensor:
            return torch.cat([block(hidden_BLD[rows], rope, masks[window]) for rows in batches])

        with awq.observe(block, folds, kept) as statistics:
            outputs_BLD = run()
        for seen in statistics.values():
            variant.see(seen)
        awq.quantize_block(block, statistics, variant.recipe, torch.float16)
        hidden_BLD = run() if variant.quantized_inputs else outputs_BLD
    unfolded = {"self_attn.o_proj"} if not variant.fold_values else set()
    for block, name in itertools.product(model.model.layers, unfolded):
        weight = block.get_parameter(f"{name}.weight")
        weight.data = variant.recipe.plain(weight.data)


def plant_outliers(model: Llama) -> None:
    """Multiply a few channels by 64 and divide their readers: the function stays, its channels differ widely."""
    generator = torch.Generator().manual_seed(7)
    for block in model.model.layers:
        for fold in fold_table(model.config):
            if fold.reads_I is None:
                weight = block.get_parameter(f"{fold.previous}.weight")
                channels = torch.randperm(len(weight), generator=generator)[:4]
                weight[channels] *= 64
                for name in fold.linears:
                    block.get_parameter(f"{name}.weight")[:, channels] /= 64


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48, help="evaluate on so many, spread over the text")
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--only", nargs="*", help="run the variants whose names begin so")
    arguments = parser.parse_args()
    tokenizer, size = Tokenizer(arguments.model), (arguments.num_samples, arguments.sequence_length)
    dense = load_model(open_checkpoint(arguments.model), dtype=torch.float32)
    text = read_calibration(arguments.calib, tokenizer, *size).tokens_BL
    scored_BL = evaluate.cut(tokenizer.encode(read_text(arguments.text)), arguments.sequence_length)
    scored_BL = scored_BL[torch.linspace(0, len(scored_BL) - 1, min(arguments.windows, len(scored_BL))).long()]
    if arguments.plant:
        plant_outliers(dense)
    reference = evaluate.model_predictor(dense, scored_BL)
    print(f"{arguments.model}, group size {arguments.group_size}, {text.numel()} tokens, planted: {arguments.plant}")
    print("| variant | KL | closed | perplexity | seconds |\n|---|---|---|---|---|")
    plain = 0.0
    for name, variant in VARIANTS.items():
        if arguments.only and name != "plain rounding" and not name.startswith(tuple(arguments.only)):
            continue
        model, started = copy.deepcopy(dense), time.monotonic()
        own = sample_calibration(dense, tokenizer, *size).tokens_BL if variant.own_text else text
        recipe = replace(variant.recipe, group_size=arguments.group_size)
        quantize(model, own, replace(variant, recipe=recipe))
        scores = evaluate.score(scored_BL, evaluate.model_predictor(model, scored_BL), reference)
        assert scores.reference is not None
        kl = scores.reference.kl_mean
        plain = plain or kl
        seconds = time.monotonic() - started
        print(f"| {name} | {kl:.6f} | {1 - kl / plain:.1%} | {scores.perplexity:.4f} | {seconds:.0f} |", flush=True)
    print(f"| dense | 0 | 100% | {scores.reference.perplexity:.4f} | |")


if __name__ == "__main__":
    main()
