"""Whether a text fits: its prompt the model, and its decoder the text."""

from torch import Tensor

from miniawq.engine.sampling import Sampling
from miniawq.engine.start import Step
from miniawq.errors import InvalidInput
from miniawq.model import Llama


def check_prompt(model: Llama, tokens_BL: Tensor, max_tokens: int, padding_B: Tensor | None = None) -> None:
    """Raise InvalidInput if the prompt is empty or padding alone, has ids unknown to the model, or leaves no room for
    `max_tokens`.
    """
    length, limit = tokens_BL.shape[1], model.config.max_position_embeddings
    if tokens_BL.numel() == 0:
        raise InvalidInput("the prompt has no tokens", "this tokenizer puts no BOS before a text", "give it a word")
    if padding_B is not None and not (
        not padding_B.is_floating_point()
        and padding_B.shape == tokens_BL.shape[:1]
        and 0 <= int(padding_B.min()) <= int(padding_B.max()) < length
    ):
        why = f"wanted: for each of {len(tokens_BL)} rows a number from 0 to {length - 1}, its positions of padding"
        raise InvalidInput("padding_B does not fit the prompt", why)
    known, lowest, highest = model.config.vocab_size, int(tokens_BL.min()), int(tokens_BL.max())
    if lowest < 0 or highest >= known:
        why = f"id {lowest if lowest < 0 else highest}; config.json: vocab_size = {known}"
        raise InvalidInput("the prompt has an id that the model does not know", why, "use the tokenizer of this model")
    if max_tokens < 1 or length + max_tokens > limit:
        why = f"{length} in the prompt and {max_tokens} new; config.json: max_position_embeddings = {limit}"
        raise InvalidInput("prompt and answer do not fit into the context", why, "shorten the prompt or max_tokens")


def check_decoder(decoder: Step, rows: int, positions: int, sampling: Sampling) -> None:
    """Raise InvalidInput if the decoder has other rows, too few positions or another sampling."""
    found = (decoder.sampling, decoder.cache.keys_NBMJE.shape[1], decoder.cache.max_seq_len >= positions)
    if found != (sampling, rows, True):
        why = f"wanted: {rows} rows, {positions} positions, {sampling}"
        raise InvalidInput("the decoder was made for another text", why, "make one for this text, or give none")
