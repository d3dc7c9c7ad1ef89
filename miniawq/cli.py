"""What all command lines share: kebab-case flags, three-line errors, exit codes, logging to stderr."""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from miniawq import __version__
from miniawq.errors import DoesNotFit, MiniawqError

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--max_tokens` for `--max-tokens`."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_kebab(argument) for argument in args], namespace)


def _kebab(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def parser(verb: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser for `miniawq VERB` with the flags that every verb has."""
    made = _Parser(prog=f"miniawq {verb}", description=description, epilog=epilog, allow_abbrev=False)
    made.add_argument("--debug", action="store_true", help="show the traceback of an error, and debug messages")
    made.add_argument("--version", action="version", version=f"miniawq {__version__}")
    return made


def run(
    main_body: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv`, call `main_body` with the result and return the exit code.

    Errors go to stderr as what, why and what to do; other exceptions are bugs and keep their traceback.
    """
    arguments = parser.parse_args(argv)
    level = logging.DEBUG if arguments.debug else logging.INFO
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("miniawq").setLevel(level)
    try:
        return main_body(arguments) or 0
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`); stderr is closed too, or Python complains at exit.
        sys.stderr.close()
        return 0
    except Exception as caught:
        error = _known(caught)
        if error is None:
            raise
        if arguments.debug:
            traceback.print_exc()
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code


def _known(error: Exception) -> MiniawqError | None:
    """The error as a user is told it; None if it is a bug."""
    if isinstance(error, MiniawqError):
        return error
    # torch reports a full GPU by a class of its own, and a full host by a plain RuntimeError.
    is_full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    if not is_full:
        return None
    why = str(error).partition("\n")[0] or "Python could not get more"
    return DoesNotFit("the memory of the device is full", why, "ask for less, or see what fits with `miniawq plan`")
