"""Train the small Llama that the package embeds, tokenizer included, on one text file.

    python scripts/train_demo.py --train train.txt --valid valid.txt --output tests/data/fairytales

Writes a Hugging Face checkpoint: model.safetensors (bfloat16), config.json, generation_config.json, tokenizer.json,
tokenizer_config.json and training.json (settings, and the held-out perplexity after every epoch). Run it again to go on
after an interruption. The same seed on the same machine gives the same model.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from miniawq.checkpoint.config import llama_config
from miniawq.model import Llama

END_OF_TEXT = "<|endoftext|>"
# The books come without titles; these openings are where one story ends and the next begins.
OPENING = re.compile(
    r"\n\n(?=(?:Once upon a time|There was once|There were once|There once|Once there|In old times|In olden times"
    r"|Long ago|A long time ago|There lived|In a certain|A certain|There was a|There were two|There were three) )"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="text to train on; blank lines part paragraphs")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text; its perplexity picks the best step")
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--architecture", default="LlamaForCausalLM", help="a family of miniawq.model")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--feed-forward", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--untied", action="store_true", help="give the head a matrix of its own")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32, help="windows of --context tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1, help="on the output of each attention and MLP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eval-every", type=int, default=100)
    return parser


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    end = (END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[end])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """All token ids of the stories, each behind an end-of-text token."""
    stories = OPENING.split(text.strip())
    text = "".join(END_OF_TEXT + story.strip() for story in stories)
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)


def hugging_face_config(arguments: argparse.Namespace, vocab_size: int) -> dict[str, object]:
    family = arguments.architecture.removesuffix("ForCausalLM").lower()
    return {
        "architectures": [arguments.architecture],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": arguments.width,
        "intermediate_size": arguments.feed_forward,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "head_dim": arguments.width // arguments.heads,
        "hidden_act": "silu",
        "max_position_embeddings": arguments.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": not arguments.untied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def initialise(model: Llama) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # The outputs of 2 N residual branches add up: each is made smaller by the root of that.
            branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * len(model.model.layers)) if branch else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def add_dropout(model: Llama, probability: float) -> None:
    def drop(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, probability, training=module.training)

    for block in model.model.layers:
        block.self_attn.register_forward_hook(drop)
        block.mlp.register_forward_hook(drop)


@torch.no_grad()
def mean_loss(model: Llama, tokens: Tensor, context: int, device: str) -> float:
    """Mean cross-entropy in nats a token over windows that do not overlap."""
    model.eval()
    windows_BL = tokens[: len(tokens) // context * context].view(-1, context)
    total = 0.0
    for batch_BL in windows_BL.to(device).split(16):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits_BLV = model(batch_BL)
        total += cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), batch_BL[:, 1:].flatten(), reduction="sum")
    model.train()
    return float(total) / (windows_BL.shape[0] * (context - 1))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to a twentieth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def train(model: Llama, tokens: Tensor, valid: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in place, keep the weights of the lowest held-out loss, return the record."""
    device, state_path = arguments.device, arguments.output / "training-state.pt"
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": decayed, "weight_decay": arguments.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda")
    best: dict[str, Tensor] = {}
    record: dict[str, Any] = {"train_loss": [], "valid_perplexity": []}
    first, lowest = 0, math.inf
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, lowest, best, record = state["step"], state["lowest"], state["best"], state["record"]
    progress = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, desc="train", mininterval=5)
    for step in progress:
        # Seeded by step, so that a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - arguments.context - 1, (arguments.batch, 1))
        windows_BL = tokens[starts + torch.arange(arguments.context + 1)].to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits_BLV = model(windows_BL[:, :-1])
        loss = cross_entropy(logits_BLV.flatten(0, 1).float(), windows_BL[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % arguments.eval_every == 0 or step + 1 == arguments.steps:
            held_out = mean_loss(model, valid, arguments.context, device)
            record["train_loss"].append((step + 1, round(loss.item(), 4)))
            record["valid_perplexity"].append((step + 1, round(math.exp(held_out), 4)))
            if held_out < lowest:
                lowest = held_out
                best = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
            progress.set_postfix(train=f"{loss.item():.3f}", valid=f"{held_out:.3f}", best=f"{math.exp(lowest):.2f}")
            partial = state_path.with_suffix(".partial")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                | {"lowest": lowest, "best": best, "record": record},
                partial,
            )
            partial.replace(state_path)
    model.load_state_dict(best)
    return record


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> int:
    arguments = build_parser().parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    text, valid_text = arguments.train.read_text(), arguments.valid.read_text()
    tokenizer = train_tokenizer(text, arguments.vocab_size)
    tokenizer.save(str(arguments.output / "tokenizer.json"))
    tokens, valid = encode(tokenizer, text), encode(tokenizer, valid_text)
    config = hugging_face_config(arguments, tokenizer.get_vocab_size())
    torch.manual_seed(arguments.seed)
    model = Llama(llama_config(config))
    initialise(model)
    model.to(arguments.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(tokens):,} training and {len(valid):,} held-out tokens")
    add_dropout(model, arguments.dropout)
    began = time.monotonic()
    record = train(model, tokens, valid, arguments)
    record["seconds"] = round(time.monotonic() - began)
    model.to(torch.bfloat16)
    loss = mean_loss(model, valid, arguments.context, arguments.device)
    record["bfloat16_valid_perplexity"] = round(math.exp(loss), 4)
    record["settings"] = {
        name: value.name if isinstance(value, Path) else value for name, value in vars(arguments).items()
    }
    tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    if not arguments.untied:
        del tensors["lm_head.weight"]
    save_file(tensors, arguments.output / "model.safetensors", metadata={"format": "pt"})
    write_json(arguments.output / "config.json", config)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "bos_token_id": 0, "eos_token_id": 0}
    write_json(arguments.output / "generation_config.json", sampling)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "add_bos_token": True}
    write_json(arguments.output / "tokenizer_config.json", special | {"model_max_length": arguments.context})
    write_json(arguments.output / "training.json", record)
    (arguments.output / "training-state.pt").unlink()
    print(f"held-out perplexity {record['bfloat16_valid_perplexity']} in bfloat16: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
