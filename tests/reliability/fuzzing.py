"""One reader under atheris (https://github.com/google/atheris), in a process of its own: scripts/fuzz.py starts it.

    python -m tests.reliability.fuzzing READER SEED TALLY FOUND [libFuzzer's options and corpus]

libFuzzer keeps the inputs that reach new lines of our code and changes them again, its way or by `mutations.py`.
"""

import logging
import os
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(
    include=["miniawq.checkpoint", "miniawq.text", "miniawq.engine.sampling", "miniawq.quantize.journal", "jinja2"]
):
    from miniawq.errors import MiniawqError
    from miniawq.text import library, worker
    from tests.reliability.outcomes import Judge, Tally
    from tests.reliability.readers import READERS, corpus, prepare

# Budgets of a tenth: what takes longer is refused sooner, and more is tried.
worker.SECONDS, library.SECONDS, library.CHARACTERS_PER_SECOND = 0.5, 1.0, 200_000


def main() -> None:
    name, seed, tally, found, *options = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    reader = READERS[name]
    judge = Judge(Tally(Path(tally)), Path(found))
    with tempfile.TemporaryDirectory() as scratch:
        path = prepare(name, Path(scratch) / name)

        def read(content: bytes) -> object:
            path.write_bytes(content)
            return reader.read(path)

        for content in corpus(name):
            with suppress(MiniawqError):  # what once escaped is refused today
                judge.known.add(repr(read(content)))

        def one_input(content: bytes) -> None:
            judge.judge(lambda: read(content), lambda: content)
            if threading.active_count() > 3:  # a tokenizer that was left behind takes the processor from the others
                os._exit(0)

        def change(content: bytes, most: int, number: int) -> bytes:
            random = Random(number)
            if random.randint(0, 2) == 0:
                return atheris.Mutate(content, most)
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                content = reader.change(content, random)
            return content[:most]

        atheris.Setup([sys.argv[0], f"-seed={seed}", *options], one_input, custom_mutator=change)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
