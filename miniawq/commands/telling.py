"""One text on stdout as --output-format says, and on stderr how it went."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from miniawq.commands import prompts
from miniawq.commands.figures import Writing, figures
from miniawq.commands.thoughts import begins_in_thought, styled
from miniawq.engine.completion import Completion
from miniawq.engine.sampling import TokenLogprobs
from miniawq.text.tokenizer import Tokenizer

IN_PIECES = ("text", "tokens", "logprobs")


def tell(run: Writing, prompt: str, completion: Completion, seed: int) -> None:
    """Write a text whose pieces have yet to be taken from it, as they come where the format lets them."""
    try:
        match run.arguments.output_format:
            case "text":
                begun = prompt if prompts.is_story(run.arguments, prompt) else run.arguments.prefill_response or ""
                separator = "\n" if run.texts_told else ""
                pieces = styled(completion, begins_in_thought(prompt))
                write_text(separator + begun, pieces, streams=run.arguments.stream)
            case "json":
                list(completion)
                print_json(full_record(run, prompt, completion, seed))
            case "jsonl":
                write_pieces(completion, run.tokenizer)
                record = full_record(run, prompt, completion, seed)
                print_json({key: value for key, value in record.items() if key not in IN_PIECES})
        run.texts_told += 1
    finally:
        run.report(completion, seed)


def write_text(begun: str, pieces: Iterable[str], *, streams: bool) -> None:
    """What is begun, with each piece as it comes, or whole at the end; an end of line even if it is interrupted."""
    waiting = begun
    try:
        for piece in pieces:
            waiting += piece
            if streams:
                print(waiting, end="", flush=True)
                waiting = ""
    finally:
        print(waiting, flush=True)


def write_pieces(completion: Completion, tokenizer: Tokenizer) -> None:
    """An object for each piece, with the ids that have made it; at the end there may be ids without a text."""
    for piece in completion.pieces():
        if piece.ids or piece.text:
            record: dict[str, Any] = {"text": piece.text, "tokens": piece.ids}
            print_json(record | ({"logprobs": readable(piece.logprobs, tokenizer)} if piece.logprobs else {}))


def print_json(record: dict[str, Any]) -> None:
    """One object, one line."""
    print(json.dumps(record, ensure_ascii=False), flush=True)


def full_record(run: Writing, prompt: str, completion: Completion, seed: int) -> dict[str, Any]:
    """All that is known about one text."""
    record = {"prompt": prompt} | figures(run, completion, seed)
    return record | ({"logprobs": readable(completion.logprobs, run.tokenizer)} if completion.logprobs else {})


def readable(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The log-probability of each token, and of the most probable ones in its place, with their texts."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": token_id, "text": tokenizer.decode([token_id], False), "logprob": logprob}

    return [token(*chosen) | {"top": [token(*pair) for pair in best]} for chosen, best in logprobs]
