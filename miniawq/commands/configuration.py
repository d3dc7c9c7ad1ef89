"""`--show-config`: what is about to run, and where each setting is from."""

import json

import torch

from miniawq import cli
from miniawq.checkpoint.opening import Checkpoint
from miniawq.commands.figures import Writing, settings_on
from miniawq.commands.flags import sampling_flags
from miniawq.commands.plan import lines_of_model, make_plan
from miniawq.commands.prompts import is_chat
from miniawq.engine.memory import Footprint
from miniawq.engine.sampling import Sampling
from miniawq.hardware import device_memory


def show_configuration(
    run: Writing, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, needed: Footprint
) -> None:
    """Say it on stderr."""
    plan = make_plan(checkpoint, run.arguments.model or "the demo", dtype, needed, device_memory(device))
    longest = checkpoint.model_config.max_position_embeddings
    lines = [
        *lines_of_model(plan),
        f"computes  in {plan.dtype}",
        f"context   at most {run.context.limit} tokens{run.context.why}; the model's own {longest}",
        *sampling_lines(run),
        f"ends      {', '.join(ends_of(run)) or 'with the context or --max-tokens alone'}",
    ]
    cli.say("\n".join(lines), limit=None)


def sampling_lines(run: Writing) -> list[str]:
    """Each setting that is on, and the seed, with where it is from."""
    wanted = sampling_flags(run.arguments)
    without_file = Sampling.choose({}, **wanted)

    def origin(name: str, value: float) -> str:
        if wanted[name] is not None:
            return "flag"
        return "default" if value == getattr(without_file, name) else "generation_config.json"

    told = [(f"{name} {value:g}", origin(name, value)) for name, value in settings_on(run.sampling).items()]
    unasked = "default" if run.arguments.model is None else "random"
    told.append((f"seed {run.next_seed}", unasked if run.arguments.seed is None else "flag"))
    width = max(len(setting) for setting, _ in told)
    return [
        f"{'' if place else 'sampling':9} {setting:{width}}   {source}" for place, (setting, source) in enumerate(told)
    ]


def ends_of(run: Writing) -> list[str]:
    """What ends an answer: ids of tokens with their texts, and the texts of --stop."""
    ids = sorted(run.ends(is_chat(run.arguments, run.tokenizer)))
    tokens = [f"{token_id} {_quoted(run.tokenizer.decode([token_id], False))}" for token_id in ids]
    return tokens + [_quoted(text) for text in run.arguments.stop]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
