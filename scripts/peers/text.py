"""Compare text generation with transformers: ids of a prompt, greedy text, penalties, and what may be sampled.

Run in an environment that has transformers too: `python scripts/peers/text.py [CHECKPOINT]`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from miniawq.engine.sampling import History, Sampling, candidates, penalize
from miniawq.generate import generate, load

FAIRYTALES = Path(__file__).parents[2] / "tests" / "data" / "fairytales"
PROMPT = "Once upon a time there was a queen"
NEW_TOKENS = 100


def greedy_ids(checkpoint: Path, repetition_penalty: float) -> tuple[list[int], list[int]]:
    """Ours and theirs, in float32 on the CPU."""
    model, tokenizer = load(checkpoint, device="cpu", dtype=torch.float32)
    prompt_BL = torch.tensor([tokenizer.encode(PROMPT)])
    sampling = Sampling(repetition_penalty=repetition_penalty)
    ours = [ids[0] for ids in generate(model, prompt_BL, max_tokens=NEW_TOKENS, sampling=sampling)]
    peer = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    peer.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "repetition_penalty": repetition_penalty}
    return ours, peer.generate(prompt_BL, **options)[0, prompt_BL.shape[1] :].tolist()


def largest_difference(rows: int, vocabulary: int) -> float:
    """Of the probabilities of all tokens, after all filters."""
    logits_BV, prompt_BL = 3 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows, 30))
    sampling = Sampling(temperature=0.7, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    logits_BK, ids_BK = candidates(penalize(logits_BV, sampling, History.of_prompt(prompt_BL, vocabulary)), sampling)
    ours_BV = torch.zeros_like(logits_BV).scatter(1, ids_BK, logits_BK.softmax(-1))
    filters = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), *filters])
    return float((processors(prompt_BL, logits_BV.clone()).softmax(-1) - ours_BV).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=FAIRYTALES)
    checkpoint = parser.parse_args().checkpoint
    torch.manual_seed(0)
    _, tokenizer = load(checkpoint, device="cpu")
    peer = AutoTokenizer.from_pretrained(checkpoint)
    texts = [PROMPT, " Ü 👋🏽\n\n  Es war einmal", "it's 'tis <|endoftext|> 1234"]
    same = [tokenizer.encode(text, False) == peer(text, add_special_tokens=False).input_ids for text in texts]
    print(f"ids of {len(texts)} texts equal: {all(same)}")
    print(f"BOS put before a text: {tokenizer.encode(PROMPT)[0]}, transformers {peer(PROMPT).input_ids[0]}")
    for penalty in (1.0, 1.2):
        ours, theirs = greedy_ids(checkpoint, penalty)
        shared = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        print(f"greedy, repetition penalty {penalty}: the first {shared} of {len(theirs)} new tokens are equal")
    difference = largest_difference(8, 2000)
    print(f"probabilities after penalty, temperature, top-k, top-p and min-p: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
