"""What all command lines share: kebab-case flags, three-line errors, exit codes, logging to stderr."""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence

from miniawq import __version__
from miniawq.errors import MiniawqError

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
    """A parser for `miniawq VERB` with the flags every verb has."""
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
    except MiniawqError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`); stderr is closed too, or Python complains at exit.
        sys.stderr.close()
        return 0
