"""Templates that loop, allocate, crash or lie: each ends in a refusal, soon, and the next template is rendered."""

import json
import os
import time

import psutil
import pytest

from miniawq.errors import MiniawqError, UnsupportedCheckpoint, UsageError
from miniawq.text import worker
from miniawq.text.chat import read_templates, render
from tests.helpers.marks import thorough_but

ASK = [{"role": "user", "content": "Who spins?"}]
DOUBLED = "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
TOO_LONG = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}" + 3 * "{% endfor %}",
    "a comparison of lists in lists": DOUBLED + "{% set a = ns.a %}" + DOUBLED + "{{ a == ns.a }}",
    "a power": "{% set x = 10 ** (10 ** 9) %}",
    "a shift by powers": "{% set x = (2 ** 90000000) % 7 ** 60000000 %}",
    "macros that call each other": "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) }}{% endfor %}{% endmacro %}"
    "{% macro g(n) %}{% if n < 30 %}{{ g(n + 1) }}{{ g(n + 1) }}{% endif %}{% endmacro %}{{ g(0) }}",
    "groups": "{% for i in range(99999) %}{% set x = range(99999) | list | sort | unique | list %}{% endfor %}",
}
TOO_MUCH = {
    "text": "{{ 'x' * 10 ** 10 }}",
    "lists": "{{ [0] * 10 ** 10 }}",
    "center": "{% set x = 'x'.center(10 ** 10) %}",
    "ljust": "{% set x = 'x'.ljust(10 ** 10) %}",
    "rjust": "{% set x = 'x'.rjust(10 ** 10) %}",
    "zfill": "{% set x = 'x'.zfill(10 ** 10) %}",
    "expandtabs": "{% set x = '\\t'.expandtabs(10 ** 9) * 9 %}",
    "a width": "{% set x = '%9999999999d' % 1 %}",
    "a filter's width": "{% set x = '%9999999999d' | format(1) %}",
    "a format": "{% set x = '{:>9999999999}'.format(1) %}",
    "indent": "{% set x = [[1]] | tojson(indent=10 ** 10) %}",
    "the filter indent": "{% set x = 'a' | indent(10 ** 10, true) %}",
    "lipsum": "{% set x = lipsum(n=10 ** 6) %}{% set y = x * 1000 %}",
    "doubled text": "{% set ns = namespace(a='x') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "the text of lists in lists": DOUBLED + "{{ ns.a }}",
    "the JSON of lists in lists": DOUBLED + "{% set x = ns.a | tojson %}",
    "batches": "{% set x = [1] | batch(10 ** 10, 'x') | list %}",
    "a joiner": "{% set j = joiner('x' * 10 ** 9) %}{{ j() }}{{ j() }}",
    "a cycler": "{% set c = cycler('x' * 10 ** 9, 'y') %}{{ c.next() }}",
    "replacements": "{% set x = ('a' * 10 ** 5).replace('a', 'b' * 10 ** 6) %}",
}
BROKEN = {
    "deep": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "deep lists": "{{ " + "[" * 9000 + "]" * 9000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "generated code": "{% for a in b %}{% set loop = 1 %}{% endfor %}{% macro m(x, x) %}{% endmacro %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a list raised": "{{ raise_exception([1, 2]) }}",
    "nothing raised": "{{ raise_exception(none) }}",
    "the undefined raised": "{{ raise_exception(undefined_thing) }}",
    "a huge text raised": "{{ raise_exception('x' * 10 ** 7) }}",
    "half a surrogate pair raised": r"{{ raise_exception('\ud800') }}",
    "no arguments": "{{ raise_exception() }}",
    "a bad date": "{{ strftime_now(5) }}",
    "the clock of half a pair": r"{{ strftime_now('\ud800') }}",
    "no filter": "{{ 1 | no_such_filter }}",
    "digits": "{{ 10 ** 9000 }}",
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 0.4)


@pytest.mark.parametrize("kind", thorough_but([*TOO_LONG][:1], TOO_LONG))
def test_a_template_that_takes_too_long_is_ended(kind):
    started = time.monotonic()
    with pytest.raises(
        UnsupportedCheckpoint, match=r"takes too much\n  it was ended|failed\n  (Memory|Overflow|Recur)"
    ):
        render(TOO_LONG[kind], ASK)
    assert time.monotonic() - started < 4
    assert render("{{ messages[0].content }}", ASK) == "Who spins?"


@pytest.mark.parametrize("kind", thorough_but([*TOO_MUCH][::2], TOO_MUCH))
def test_a_template_that_takes_too_much_memory_is_ended(kind):
    before = psutil.Process().memory_info().rss
    with pytest.raises(UnsupportedCheckpoint, match=r"the chat template (failed|takes too much)\n  "):
        render(TOO_MUCH[kind], ASK)
    assert psutil.Process().memory_info().rss - before < 100 << 20
    assert render("{{ messages[0].content }}", ASK) == "Who spins?"


def test_a_system_without_limits_has_the_watch(monkeypatch):
    """macOS and Windows do not hold a process to an address space."""
    monkeypatch.setattr(worker, "SECONDS", 4.0)
    unlimited = worker.TemplateWorker()
    monkeypatch.setattr(worker, "MEMORY", 120 << 20)
    held = (
        '{% set x = "x" * (4 * 10 ** 8) %}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}'
    )
    request = json.dumps({"template": held, "now": "2026-11-29", "values": {}})
    with pytest.raises(UnsupportedCheckpoint, match="ended when it had 120 MiB"):
        unlimited.ask(request.encode())


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_template_is_refused_in_few_words(kind):
    with pytest.raises(MiniawqError) as caught:
        render(BROKEN[kind], ASK)
    assert type(caught.value) in (UnsupportedCheckpoint, UsageError)
    assert len(str(caught.value)) < 2500


def test_one_process_serves_all_templates():
    render("a", ASK)
    first = worker._current.process.pid
    started = time.monotonic()
    for number in range(20):
        assert render("{{ n }}", ASK, variables={"n": number}) == str(number)
    assert time.monotonic() - started < 1
    assert worker._current.process.pid == first
    worker._current.process.kill()
    worker._current.process.wait()
    assert render("a", ASK) == "a"


def test_a_machine_that_starts_no_process_says_so(monkeypatch):
    monkeypatch.setattr(worker, "_current", None)
    monkeypatch.setattr(worker.sys, "executable", os.devnull)
    with pytest.raises(UnsupportedCheckpoint, match="the chat template cannot be run"):
        render("a", ASK)


def test_text_passes_through_the_process_as_it_is():
    text = "".join(map(chr, [*range(1, 0x3000, 7), 0x2028, 0xFEFF, 0x1F389, 0x10FFFF])) + "\r\n\t\\\"'"
    assert render("{{ messages[0].content }}|{{ x }}", [{"role": "user", "content": text}], variables={"x": text}) == (
        f"{text}|{text}"
    )
    assert render(r"{{ '\ud800' }}", ASK) == "\ud800"
    names = {"self": 1, "no name": 2, "loop": 3}
    assert render("{{ loop }}", ASK, variables=names) == "3"


def test_what_is_no_file_is_no_template(tmp_path):
    """A FIFO would be waited for."""
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "device.jinja").symlink_to(os.devnull)
    (tmp_path / "additional_chat_templates" / "directory.jinja").mkdir()
    assert read_templates(tmp_path, {}) == {}
