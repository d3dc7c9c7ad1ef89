"""`miniawq VERB` and `python -m miniawq VERB` run the same mains as `python -m miniawq.VERB`."""

import importlib
import sys
from collections.abc import Sequence

from miniawq import __version__

VERBS = {
    "generate": "write text with a model",
    "quantize": "make an AWQ INT4 checkpoint from a dense one",
    "evaluate": "perplexity, and KL divergence against a reference",
    "plan": "what is in a checkpoint, and what memory it needs",
    "convert": "one INT4 layout to another, losslessly",
    "oracle": "check any implementation of AWQ INT4 against the properties it must have",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments behind the verb to its module, importing no other."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in VERBS:
        module = "miniawq.oracle.__main__" if arguments[0] == "oracle" else f"miniawq.{arguments[0]}"
        return importlib.import_module(module).main(arguments[1:])
    usage = "usage: miniawq VERB [--help] ...\n\n" + "".join(f"  {verb:10} {what}\n" for verb, what in VERBS.items())
    match arguments:
        case ["--version"]:
            print(f"miniawq {__version__}")
        case ["--help" | "-h"]:
            print(usage, end="")
        case []:
            print(usage, end="", file=sys.stderr)
            return 2
        case [verb, *_]:
            print(f"miniawq: there is no verb {verb!r}\n{usage}", end="", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
