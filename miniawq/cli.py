"""What all command lines share: kebab-case flags, three-line errors, exit codes, logging to stderr.

Everything that is said goes to stderr through `say` or through logging, and so through `errors.clean`; text on stdout
stays as it was written. A closed stream reads as empty and swallows what is written: the exit code is that of the work.
"""

import argparse
import difflib
import errno
import io
import logging
import mmap
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TextIO

import torch

from miniawq import __version__
from miniawq.errors import INTERRUPTED, MESSAGE_CHARACTERS, DoesNotFit, MiniawqError, clean

LEAST_BYTES = 64 << 20
# Destinations of the flags that all verbs have, which --help leaves out.
COMMON = {
    "help",
    "help_all",
    "debug",
    "version",
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "trust_remote_code",
}


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes `--max_tokens` for `--max-tokens`, and tells which flag a mistyped one may be.

    Its help is a screen: the flags with the destinations `essential` (if there are none: all that are not common to all
    verbs), examples, and the page that tells more. --help-all has every flag.
    """

    essential: Collection[str] = ()
    examples: Collection[str] = ()
    page = ""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_kebab(argument) for argument in args], namespace)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[:1] if "unrecognized" in message else []
        for flag in unknown:
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            nearest = difflib.get_close_matches(flag.partition("=")[0], known, 1)
            message += f"; did you mean {nearest[0]}?" if nearest and flag.startswith("-") else ""
        super().error(clean(message))

    def format_help(self) -> str:
        essential = self.essential or {action.dest for action in self._actions} - COMMON
        lines = [help_line(action) for action in self._actions if action.dest in essential]
        examples = [f"  {example}" for example in self.examples]
        more = f"{self.prog} --help-all has every flag; {self.page} tells more."
        return "\n".join(
            [self.format_usage(), self.description or "", "", *lines, "", "examples:", *examples, "", more, ""]
        )

    def format_whole_help(self) -> str:
        """With every flag."""
        return super().format_help()


class _WholeHelp(argparse.Action):
    """--help-all."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        assert isinstance(parser, _Parser)
        parser._print_message(parser.format_whole_help(), sys.stdout)
        parser.exit()


def help_line(action: argparse.Action) -> str:
    """A flag and what it does, in 80 columns."""
    return textwrap.fill(f"  {names_of(action):26} {action.help}", 80, subsequent_indent=" " * 29)


def names_of(action: argparse.Action) -> str:
    """How a flag is written: its short name, its first long one, and what follows them."""
    short = [name for name in action.option_strings if not name.startswith("--")]
    long = [name for name in action.option_strings if name.startswith("--")]
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    names = ", ".join([*short[:1], *long[:1]])
    return (names + value) if names else str(action.metavar or action.dest)


def _kebab(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def parser(
    verb: str,
    description: str,
    *,
    usage: str = "",
    examples: Collection[str] = (),
    page: str = "",
    essential: Collection[str] = (),
) -> argparse.ArgumentParser:
    """A parser for `miniawq VERB` with the flags that every verb has. `essential` is for a verb with so many flags that
    its help has the most important ones alone.
    """
    prog = f"miniawq {verb}"
    made = _Parser(prog=prog, description=description, usage=f"{prog} {usage}", allow_abbrev=False)
    made.essential, made.examples, made.page = essential, examples, page
    made.add_argument("--help-all", nargs=0, action=_WholeHelp, help="show every flag")
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
    _open_streams()
    log = logging.getLogger("miniawq")
    before = log.level
    try:
        arguments = parser.parse_args(argv)
        level = logging.DEBUG if arguments.debug else logging.INFO
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_CleanFormatter("%(message)s"))
        logging.basicConfig(handlers=[handler])
        log.setLevel(level)
        return _exit_code(main_body, arguments, parser.prog)
    except KeyboardInterrupt:  # while the first one was told
        return INTERRUPTED
    finally:
        log.setLevel(before)  # for whoever calls this from Python
        # What a full disk or a reader who has left did not take is dropped: Python would complain at exit.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                _mute(stream)


def _exit_code(main_body: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace, prog: str) -> int:
    try:
        _require_memory()
        code = main_body(arguments) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say(f"\n{prog}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`).
        return 0
    except BaseException as caught:
        error = _known(caught)
        if error is None:
            raise
        if arguments.debug:
            traceback.print_exc()
        say(f"{prog}: {error}")
        return error.exit_code


def _require_memory() -> None:
    """DoesNotFit if next to nothing is left beside the imports: where a thread cannot begin, Python waits for ever."""
    try:
        mmap.mmap(-1, LEAST_BYTES).close()  # address space alone: nothing is written
    except OSError as error:
        why = f"{LEAST_BYTES >> 20} MiB are wanted beside what Python and torch take: {error.strerror}"
        raise DoesNotFit("there is not enough memory to begin", why, "raise the limit (ulimit -v)") from error


def say(text: str, limit: int | None = MESSAGE_CHARACTERS, end: str = "\n") -> None:
    """Write a cleaned line to stderr, or nothing if stderr takes nothing: what is done counts, not what is said."""
    try:
        print(clean(text, limit), end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _mute(sys.stderr)


class _CleanFormatter(logging.Formatter):
    """Cleans notices. A traceback, which --debug asks for, has any length."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record), None if record.exc_info else MESSAGE_CHARACTERS)


def _open_streams() -> None:
    """Make the closed ones of stdin, stdout and stderr such that they can be used: Python gives None for them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It takes the free number, or the next file to be written would.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8


def _mute(stream: TextIO) -> None:
    """Let what is in the buffer of a stream, and what comes, go nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass


# Words of torch, safetensors, Python and Rust for memory that the system does not give.
FULL = (
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
    "threadpoolbuilderror",
)


def _known(error: BaseException) -> MiniawqError | None:
    """The error as a user is told it; None if it is a bug."""
    if isinstance(error, MiniawqError):
        return error
    if isinstance(error, SystemExit | GeneratorExit):
        return None
    # torch reports a full GPU by a class of its own, and a full host by a plain RuntimeError.
    is_full = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error).lower() for word in FULL
    )
    why = str(error).partition("\n")[0]
    if is_full or getattr(error, "errno", None) == errno.ENOMEM:
        fix = "ask for less, or end what else uses the device"
        return DoesNotFit("the memory of the device is full", why or "Python could not get more", fix)
    if isinstance(error, OSError):
        return MiniawqError(
            "the system cannot read or write this", why, "check the path, its rights and the space left"
        )
    if type(error).__name__ == "PanicException":  # of a library in Rust; it is no Exception
        return MiniawqError("a library has failed", why, "a file may be damaged: download it again")
    return None
