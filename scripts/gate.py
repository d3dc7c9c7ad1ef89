"""The gate of a recipe: formats of `miniawq evaluate` on a real model, in one pass, on several held-out texts.

    python scripts/gate.py MODEL --calib mixed.txt --text wikitext2-test.txt held-out-code.txt

`closed` is the part of the first format's KL(dense || quantized) that is gone, `rest` by what the loss differs beside
KL: 0 in the mean if the text came from the dense model. The last two columns compare a row with the one above it, token
by token. Seconds are those of quantizing, of the processor or of the GPU. With --blocks only the first blocks change,
where the time does not do for all.
"""

import argparse
from pathlib import Path

import torch

from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands.contest import run_formats
from miniawq.commands.scores import Predictor, TokenScores, cut_windows, mean_and_error, token_scores
from miniawq.quantize.calibration import read_calibration
from miniawq.text.plain import read_text
from miniawq.text.tokenizer import Tokenizer


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True, nargs="+", help="held-out texts, each scored by itself")
    parser.add_argument("--formats", nargs="+", default=["rtn", "awq", "neighbours"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--compared-tokens", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12, help="scored, spread over each text")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=Path, help="write the scores of all tokens there, for torch.load")
    arguments = parser.parse_args()
    dense, tokenizer, length = open_checkpoint(arguments.model), Tokenizer(arguments.model), arguments.sequence_length
    calibration_BL = read_calibration(arguments.calib, tokenizer, arguments.num_samples, length).tokens_BL
    windows = [cut_windows(tokenizer.encode(read_text(text)), length, arguments.windows) for text in arguments.text]
    reference, entries = run_formats(
        dense,
        torch.cat(windows),
        [(name, arguments.group_size) for name in arguments.formats],
        calibration_BL,
        arguments.device,
        compared_tokens=arguments.compared_tokens,
        blocks=arguments.blocks,
    )
    print(f"{calibration_BL.numel()} tokens of calibration; {arguments.device}")
    print(*(f"{entry.name}: {entry.seconds:.1f} s" for entry, _ in entries), sep="\n", flush=True)
    kept, begin = {}, 0
    for text, tokens_BL in zip(arguments.text, windows, strict=True):
        rows = slice(begin, begin := begin + len(tokens_BL))
        found = {
            entry.name: token_scores(tokens_BL, within(predictor, rows), within(reference, rows))
            for entry, predictor in entries
        }
        print(f"\n{Path(text).name}: {tokens_BL.numel()} tokens\n", *table(found), sep="\n", flush=True)
        kept[text] = {name: vars(scores) for name, scores in found.items()} | {"tokens_BL": tokens_BL}
    if arguments.keep:
        torch.save(kept, arguments.keep)


def within(predictor: Predictor, rows: slice) -> Predictor:
    return Predictor(predictor.hidden_BLD[rows], predictor.logits)


def table(found: dict[str, TokenScores]) -> list[str]:
    """Rows in Markdown; losses and KL in nats a token, with the standard error of the mean."""
    lines = [
        "| format | KL | closed | perplexity | loss - dense | rest | same choice | KL - above | loss - above |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = above = next(iter(found.values()))
    for name, scores in found.items():
        loss_T, dense_T, kl_T, agrees_T = scores.loss_T, scores.reference_loss_T, scores.kl_T, scores.agrees_T
        cells = [
            name,
            told(kl_T),
            f"{1 - float(kl_T.mean() / first.kl_T.mean()):.1%}",
            f"{loss_T.mean().exp():.4f} (dense {dense_T.mean().exp():.4f})",
            told(loss_T - dense_T),
            told(loss_T - dense_T - kl_T),
            f"{agrees_T.mean():.2%}",
            told(kl_T - above.kl_T),
            told(loss_T - above.loss_T),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        above = scores
    return lines


def told(values_T: torch.Tensor) -> str:
    return "{:+.5f} +- {:.5f}".format(*mean_and_error(values_T))


if __name__ == "__main__":
    main()
