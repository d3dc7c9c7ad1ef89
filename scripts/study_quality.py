"""What each recipe closes of plain rounding's loss, on a model and held-out texts.

    python scripts/study_quality.py tests/data/fairytales --calib fairytales-train.txt --text fairytales-valid.txt \
        --recipes plain default neighbours --group-size 128 64 32

Each recipe makes a checkpoint in a temporary directory, as `miniawq quantize` would. The loss is KL(dense || quantized)
in nats a token, on windows spread over the held-out text; `closed` is the part of the first recipe's that is gone.
Seconds are CPU seconds of the whole run. With --plant the same function is given outliers first: four channels of every
norm are multiplied by 64 and the columns that read them divided, four rows of up_proj and columns of down_proj alike.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from miniawq.awq import llama_folds
from miniawq.checkpoint.loading import load_model
from miniawq.checkpoint.opening import Checkpoint, open_checkpoint
from miniawq.commands.evaluate import stream_predictor
from miniawq.commands.scores import Scores, cut_windows, score
from miniawq.quantize.calibration import add_own_windows, read_calibration
from miniawq.quantize.job import Settings, quantize_checkpoint
from miniawq.quantize.recipes import RECIPES
from miniawq.text.plain import read_text
from miniawq.text.tokenizer import Tokenizer

OUTLIERS, STRENGTH = 4, 64


def planted(source: Checkpoint, directory: Path) -> Checkpoint:
    """The same function with outliers: a copy of a dense checkpoint in an empty directory."""
    for name in ("config.json", *source.side_files):
        shutil.copy(source.directory / name, directory / name)
    tensors = {name: source.read(name) for name in source.tensors}
    generator = torch.Generator().manual_seed(7)
    for layer in range(source.model_config.num_hidden_layers):
        for fold in [fold for fold in llama_folds(source.model_config) if fold.reads_I is None]:
            weight = tensors[f"model.layers.{layer}.{fold.smooth_layer}.weight"]
            channels = torch.randperm(len(weight), generator=generator)[:OUTLIERS]
            weight[channels] *= STRENGTH
            for name in fold.balance_layers:
                tensors[f"model.layers.{layer}.{name}.weight"][:, channels] /= STRENGTH
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True, nargs="+", help="held-out texts, each scored by itself")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["plain", "default", "neighbours"])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128])
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--own-windows", type=int, default=0, help="more, in which the model goes on")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--compared-tokens", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=24, help="scored, spread over each text")
    parser.add_argument("--plant", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        study(arguments, Path(place))


def study(arguments: argparse.Namespace, place: Path) -> None:
    dense, tokenizer, length = open_checkpoint(arguments.model), Tokenizer(arguments.model), arguments.sequence_length
    if arguments.plant:
        (place / "dense").mkdir()
        dense = planted(dense, place / "dense")
    calibration = read_calibration(arguments.calib, tokenizer, arguments.num_samples, length)
    if arguments.own_windows:
        model = load_model(dense, torch.device("cpu"), torch.float32)
        calibration = add_own_windows(calibration, model, arguments.own_windows)
        print(f"{time.process_time():.0f} CPU s until the model's windows were written")
    texts = {}
    for text in arguments.text:
        tokens_BL = cut_windows(tokenizer.encode(read_text(text)), length, arguments.windows)
        with torch.inference_mode():
            texts[text] = (tokens_BL, stream_predictor(dense, tokens_BL, "cpu"))
    print(f"{arguments.model}: {calibration.tokens_BL.numel()} tokens of {arguments.calib}, planted: {arguments.plant}")
    print("| text | group size | recipe | KL | closed | perplexity (dense) | loss difference | top-1 | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for size in arguments.group_size:
        plain: dict[str, float] = {}
        for recipe in arguments.recipes:
            out, started = place / f"{recipe}-{size}", time.process_time()
            settings = Settings(replace(RECIPES[recipe], group_size=size), compared_tokens=arguments.compared_tokens)
            quantize_checkpoint(dense, out, calibration, settings)
            seconds = time.process_time() - started
            for text, (tokens_BL, reference) in texts.items():
                with torch.inference_mode():
                    scores = score(tokens_BL, stream_predictor(open_checkpoint(out), tokens_BL, "cpu"), reference)
                told = row(scores, plain.setdefault(text, scores.reference.kl_mean if scores.reference else 0))
                print(f"| {Path(text).name} | {size} | {recipe} | {told} | {seconds:.0f} |", flush=True)
            shutil.rmtree(out)


def row(scores: Scores, plain: float) -> str:
    """The scores beside the first recipe's KL."""
    other = scores.reference
    assert other is not None
    return (
        f"{other.kl_mean:.6f} | {1 - other.kl_mean / plain:.1%} | {scores.perplexity:.4f} ({other.perplexity:.4f}) | "
        f"{other.loss_difference:+.5f} +- {other.standard_error:.5f} | {other.top1_agreement:.2%}"
    )


if __name__ == "__main__":
    main()
