"""`miniawq VERB` and `python -m miniawq VERB`: find the verb's module and hand it the arguments."""

import difflib
import importlib
import io
import sys
from collections.abc import Sequence
from typing import NamedTuple

from miniawq.errors import INTERRUPTED, DoesNotFit, MissingExtra


class Verb(NamedTuple):
    """The module that has the `build_parser` and `main` of a verb, and what the verb does."""

    module: str
    does: str


VERBS = {
    "generate": Verb("miniawq.generate", "write text with a model"),
    "quantize": Verb("miniawq.quantize.__main__", "make an AWQ INT4 checkpoint from a dense one"),
    "evaluate": Verb("miniawq.commands.evaluate", "perplexity, and KL divergence against a reference"),
    "bench": Verb("miniawq.commands.bench", "how fast a checkpoint runs here, and at what cost"),
    "plan": Verb("miniawq.commands.plan", "what is in a checkpoint, and what memory it needs"),
    "convert": Verb("miniawq.commands.convert", "one INT4 layout to another, losslessly"),
    "oracle": Verb("miniawq.oracle.__main__", "check any implementation of AWQ INT4 for the properties it must have"),
}
SHORT = {"chat": ["generate", "--interactive"]}  # what other programs have a verb for
ABOUT = "miniawq.commands.about"
FIRST = "`miniawq generate` tells a fairy tale by a model that comes with it, and `miniawq VERB --help` has examples.\n"


def with_its_verb(words: Sequence[str]) -> list[str]:
    """A command line whose verb is one of VERBS, if it has one."""
    return [*SHORT.get(words[0], words[:1]), *words[1:]] if words else []


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments after the verb to its module; no other verb's module is imported."""
    arguments = with_its_verb(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in VERBS:
        try:
            module = importlib.import_module(VERBS[arguments[0]].module)
        except KeyboardInterrupt:  # torch takes seconds to load
            print(f"miniawq {arguments[0]}: interrupted", file=sys.stderr or io.StringIO())
            return INTERRUPTED
        except MissingExtra as error:
            print(f"miniawq {arguments[0]}: {error}", file=sys.stderr or io.StringIO())
            return error.exit_code
        except (MemoryError, ImportError) as error:
            if isinstance(error, ImportError) and not any(word in str(error) for word in ("map segment", "allocate")):
                raise
            full = DoesNotFit("there is not enough memory to load torch", str(error), "raise the limit (ulimit -v)")
            print(f"miniawq: {full}", file=sys.stderr or io.StringIO())
            return full.exit_code
        return module.main(arguments[1:])
    does = {name: verb.does for name, verb in VERBS.items()} | {name: " ".join(words) for name, words in SHORT.items()}
    lines = [f"  {name:10} {what}\n" for name, what in does.items()]
    usage = "usage: miniawq VERB [--help] ...\n\n" + "".join(lines) + f"\n{FIRST}"
    match arguments:
        case ["--version"]:
            print(importlib.import_module(ABOUT).about())
        case ["--help" | "-h"]:
            print(usage, end="")
        case []:
            print(usage, end="", file=sys.stderr or io.StringIO())
            return 2
        case [word, *_]:
            word = word[:100]
            nearest = difflib.get_close_matches(word, does, 1)
            meant = f"  did you mean {nearest[0]!r}?\n" if nearest else ""
            print(f"miniawq: there is no verb {word!r}\n{meant}{usage}", end="", file=sys.stderr or io.StringIO())
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
