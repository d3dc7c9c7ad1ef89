"""The program of the worker process (`worker.py`) that runs chat templates: no file of miniawq imports it.

A request and its answer are one line of JSON each. What goes wrong is an answer too; only what the parent stops, or
what stops Python itself, ends the process.

The environment of a template is that of Hugging Face transformers (`utils/chat_template_utils.py`):

    blocks       trim_blocks, lstrip_blocks; {% break %} and {% continue %}; {% generation %} passes its body through
    filters      tojson without HTML escapes
    functions    raise_exception(message), strftime_now(format)
"""

import faulthandler
import json
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MAX_RENDERED_CHARACTERS = 1 << 24
MAX_REASON_CHARACTERS = 2000
ORPHAN_SECONDS = 60  # after which a request ends the process even if the parent, which watches it, was killed


class TemplateRefusal(Exception):
    """What a template says with `raise_exception`."""


def serve_templates(memory: int) -> None:
    """Answer the requests on stdin until there are no more, with at most so many bytes of memory."""
    if resource:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin.buffer:
        faulthandler.dump_traceback_later(ORPHAN_SECONDS, exit=True)
        answer = json.dumps(template_answer(json.loads(line)), ensure_ascii=False)
        sys.stdout.buffer.write(answer.encode("utf-8", "surrogatepass") + b"\n")
        sys.stdout.buffer.flush()
        faulthandler.cancel_dump_traceback_later()


def template_answer(request: dict[str, Any]) -> dict[str, str]:
    """{"text": ...}, or {"refused", "invalid" or "failed": the reason}. A template can raise whatever Python can."""
    try:
        parsed = parse_template(request["template"])
    except Exception as error:
        return {"invalid": _reason(error)}
    parsed.globals["strftime_now"] = datetime.fromisoformat(request["now"]).strftime
    try:
        return {"text": _written(parsed.generate(request["values"]))}
    except TemplateRefusal as error:
        return {"refused": _reason(error).partition(": ")[2]}
    except Exception as error:
        return {"failed": _reason(error)}


def _reason(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {str(error)[:MAX_REASON_CHARACTERS]}"
    except Exception:
        return type(error).__name__


def _written(pieces: Any) -> str:
    kept: list[str] = []
    size = 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > MAX_RENDERED_CHARACTERS:
            raise OverflowError(f"it writes more than {MAX_RENDERED_CHARACTERS} characters")
    return "".join(kept)


class GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


@lru_cache(maxsize=8)
def parse_template(template: str) -> Any:
    """The compiled template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own tojson writes < > & ' as escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateRefusal(message)


if __name__ == "__main__":
    serve_templates(int(sys.argv[-1]))
