"""Why the loss of a quantized model differs from the dense model's by more than KL: how sure is it of what it predicts?

    python scripts/confidence.py DENSE PLAIN DEFAULT --text wikitext2-test.txt held.txt

Entropy is the loss that a model expects: a dense model whose loss is larger is too sure of itself, and errors that make
it less sure please the text. `rest` is loss - dense - KL, 0 in the mean for a text that came from the dense model;
`rest < 0.1` is the part of it that belongs to tokens to which the dense model gives less than that. `flattened` is the
rest of the dense model itself at the temperature where it has the row's entropy.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gate import told
from torch import Tensor

from miniawq.commands.scores import cut_windows
from miniawq.generate import load
from miniawq.model import Llama
from miniawq.text.plain import read_text

UNLIKELY = 0.1
TEMPERATURES = (1.0, 1.02, 1.04, 1.06)
POSITIONS_TOGETHER = 128


def log_probabilities(model: Llama, window_L: Tensor) -> Iterator[Tensor]:
    """Of the next tokens [T, V], some positions at a time."""
    for hidden_TD in model.model(window_L[None])[0, :-1].split(POSITIONS_TOGETHER):
        yield model.logits(hidden_TD).log_softmax(-1)


def compared(dense_TV: Tensor, other_TV: Tensor, next_T: Tensor) -> Tensor:
    """For each token: loss, KL, entropy, and the rest of unlikely tokens [T, 4]."""
    p_TV, gain_TV = dense_TV.exp(), other_TV - dense_TV
    log_T, gain_T = (x_TV.gather(1, next_T[:, None])[:, 0] for x_TV in (other_TV, gain_TV))
    is_unlikely_TV = p_TV < UNLIKELY
    of_text_T = gain_T * is_unlikely_TV.gather(1, next_T[:, None])[:, 0]
    expected_T = (p_TV * gain_TV * is_unlikely_TV).sum(-1)
    divergence_T = -(p_TV * gain_TV).sum(-1)
    entropy_T = -(other_TV.exp() * other_TV).sum(-1)
    return torch.stack((-log_T, divergence_T, entropy_T, expected_T - of_text_T), 1).double()


def table(dense: Llama, models: dict[str, Llama], windows_BL: Tensor) -> Iterator[str]:
    """Rows in Markdown, in nats a token, with the standard error of the mean."""
    of_rows = {name: list[Tensor]() for name in [*TEMPERATURES, *models]}
    for window_L in windows_BL:
        parts = [log_probabilities(model, window_L) for model in (dense, *models.values())]
        for next_T, dense_TV, *others in zip(window_L[1:].split(POSITIONS_TOGETHER), *parts, strict=True):
            flattened = [(dense_TV / temperature).log_softmax(-1) for temperature in TEMPERATURES]
            for found, other_TV in zip(of_rows.values(), [*flattened, *others], strict=True):
                found.append(compared(dense_TV, other_TV, next_T))
    rows = {name: torch.cat(found) for name, found in of_rows.items()}
    loss_T, _, entropy_T, _ = rows[1.0].unbind(1)
    yield f"{len(loss_T)} tokens; loss of the dense model {loss_T.mean():.4f}, its entropy {entropy_T.mean():.4f}: "
    yield f"{told(loss_T - entropy_T)}\n"
    yield "| model | KL | loss - dense | rest | rest < 0.1 | entropy - dense | flattened |"
    yield "|---|---|---|---|---|---|---|"
    losses, divergences, entropies, _ = torch.stack([rows[key].mean(0) for key in TEMPERATURES]).unbind(1)
    for name, found_T4 in rows.items():
        other_T, divergence_T, own_T, unlikely_T = found_T4.unbind(1)
        change_T, more_T = other_T - loss_T, own_T - entropy_T
        rest = np.interp(float(own_T.mean()), entropies, losses - losses[0] - divergences)
        cells = [f"dense at {name}" if isinstance(name, float) else name, f"{divergence_T.mean():.5f}"]
        cells += [*map(told, (change_T, change_T - divergence_T, unlikely_T, more_T)), f"{rest:+.5f}"]
        yield f"| {' | '.join(cells)} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("models", nargs="+", help="quantized from it")
    parser.add_argument("--text", required=True, nargs="+", help="each scored by itself")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, spread over each text")
    arguments = parser.parse_args()
    dense, tokenizer = load(arguments.dense, device="cpu", dtype=torch.float32)
    models = {Path(name).name: load(name, device="cpu", dtype=torch.float32)[0] for name in arguments.models}
    for text in arguments.text:
        windows_BL = cut_windows(tokenizer.encode(read_text(text), False), 512, arguments.windows)
        print(f"\n{Path(text).name}", *table(dense, models, windows_BL), sep="\n", flush=True)


if __name__ == "__main__":
    main()
