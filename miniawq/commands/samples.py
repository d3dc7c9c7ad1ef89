"""`--num-samples N`: several texts of one prompt, written at once and told in the order of their seeds."""

from miniawq.commands.figures import Writing
from miniawq.commands.prompts import show
from miniawq.commands.telling import tell
from miniawq.commands.together import Together
from miniawq.engine.batch import Ending, Request
from miniawq.engine.sampling import SEEDS


class Samples:
    """The texts that may follow a prompt."""

    def __init__(self, run: Writing, prompt: str, is_chat: bool) -> None:
        self.run, self.prompt = run, prompt
        show(run.arguments, prompt)
        ids, first = run.encode(prompt, is_chat), run.next_seed
        self.seeds = [(first + number) % SEEDS for number in range(run.arguments.num_samples)]
        self.together = Together(run, [Request(ids, run.context.room(len(ids)), seed) for seed in self.seeds], is_chat)

    def write(self) -> None:
        """All of them, each as soon as those before it have been told."""
        waiting: dict[int, Ending] = {}
        told = 0
        for ending in self.together.batch():
            if ending.error is not None:
                raise ending.error
            waiting[ending.number] = ending
            while (next_one := waiting.pop(told, None)) is not None:
                assert next_one.completion is not None
                tell(self.run, self.prompt, next_one.completion, self.seeds[told])
                told += 1
