"""Templates that try to hang the process, to fill its memory, or to reach what lies behind Jinja.

Counts end almost all of them, so that the outcome is the same on every machine; the few that only the clock ends say so.

What the sandbox cannot end, and the worker process must:
    one call into C that a defect of Python makes slow, or a crash of Python's compiler
    a host that raises sys.setrecursionlimit far beyond its stack
    what the host passes in by itself: messages of gigabytes, objects with costly methods of their own
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from qwq_lite.errors import TemplateError
from qwq_lite.prompt import template, template_limits
from qwq_lite.prompt.template import Template
from qwq_lite.prompt.template_limits import Budget

BILLION = "{% set ns = namespace(a=['x']) %}{% for i in range(30) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
TUPLES = BILLION.replace("['x']", "('x',)").replace("[ns.a, ns.a]", "(ns.a, ns.a)")
DOUBLE = "{% set ns = namespace(s='ab') %}{% for i in range(19) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"  # 2 ** 20
DEEP = "{% set ns = namespace(a=()) %}{% for i in range(90000) %}{% set ns.a = (ns.a,) %}{% endfor %}"
MANY = "{% for i in range(100000) %}{% for j in range(100000) %}"
END = "{% endfor %}{% endfor %}"

BY_COUNT = {
    # time: loops
    "loops in loops": MANY + END,
    "loops in loops that test": "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}x" + END,
    "a recursive loop": "{% for x in [1] recursive %}{% for k in range(99999) %}{% endfor %}{{ loop([1]) }}{% endfor %}",
    "macros that call twice": "{% macro m(n) %}{% if n %}{% set a = m(n - 1) %}{% set b = m(n - 1) %}{% endif %}"
    "{% endmacro %}{{ m(40) }}",
    "call blocks that call twice": "{% macro m(n, caller=none) %}{% if n %}{% call m(n - 1) %}{% endcall %}{% call m(n - 1) %}"
    "{% endcall %}{% endif %}{% endmacro %}{{ m(40) }}",
    "map over much, often": "{% for i in range(1000) %}{% set x = range(100000) | map('string') | list %}{% endfor %}",
    "select over much, often": "{% for i in range(1000) %}{% set x = range(100000) | select('odd') | list %}{% endfor %}",
    "sort much, often": "{% set l = range(100000) | list %}{% for i in range(1000) %}{% set x = l | sort %}{% endfor %}",
    "the largest, often": "{% set l = range(9999) | list %}{% for i in range(9999) %}{% set x = l | max %}{% endfor %}",
    "constant work": "{{ range(100000) | list | sort | list | sort | list | sort }}",
    # time: searches
    "in a long list, often": "{% set l = range(99999) | list %}{% for i in l %}{% if -1 in l %}{% endif %}{% endfor %}",
    "in a long text": DOUBLE + "{% if ns.s[:500000] + 'x' in ns.s %}{% endif %}",
    "searched from the right": DOUBLE + "{{ ns.s.rfind('ab' + 'bb' + ns.s[:300000]) }}",
    "split from the right": DOUBLE + "{{ ns.s.rsplit('ab' + 'bb' + ns.s[:300000]) }}",
    "counted": DOUBLE + "{% for i in range(100000) %}{% set x = ns.s.count('ab') %}{% endfor %}",
    "stripped of very many": DOUBLE + "{{ ns.s.strip('c' * 600000 + ns.s[:400000]) }}",
    "trimmed of very many": DOUBLE + "{{ ns.s[:700000] | trim('c' * 600000 + ns.s[:400000]) }}",
    "compared, often": DOUBLE + "{% set t = ns.s[:-1] + 'x' %}{% for i in range(100000) %}{% if t == ns.s %}{% endif %}"
    "{% endfor %}",
    "lists compared": DOUBLE + "{% set t = ns.s[:-1] + 'x' %}{{ [ns.s] * 99999 == [t] * 99999 }}",
    "found in a list of long texts": DOUBLE + "{% set t = ns.s[:-1] + 'x' %}{{ t in [ns.s] * 99999 }}",
    "changed": BILLION + "{% for i in [1, 2] %}{{ loop.changed(ns.a) }}{% endfor %}",
    # memory: texts
    "a text multiplied": "{{ 'a' * 1000000000 }}",
    "a text multiplied from the left": "{{ 1000000000 * 'a' }}",
    "a constant folded": "{% if false %}{{ ('a' * 90000) * 90000 }}{% endif %}{{ 'a' * 90000 * 90000 }}",
    "a text doubled": DOUBLE.replace("19", "60"),
    "a text doubled by ~": DOUBLE.replace("19", "60").replace("ns.s + ns.s", "ns.s ~ ns.s"),
    "a text doubled by join": DOUBLE.replace("19", "60").replace("ns.s + ns.s", "[ns.s, ns.s] | join"),
    "a text doubled by format": DOUBLE.replace("19", "60").replace("ns.s + ns.s", "'{}{}'.format(ns.s, ns.s)"),
    "a text doubled by %": DOUBLE.replace("19", "60").replace("ns.s + ns.s", "'%s%s' % (ns.s, ns.s)"),
    "a text doubled by a block": DOUBLE.replace("19", "60").replace(
        "{% set ns.s = ns.s + ns.s %}", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"
    ),
    "a text doubled by a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}"
    + DOUBLE.replace("19", "60").replace("ns.s + ns.s", "m(ns.s)"),
    "a text doubled by a filter block": DOUBLE.replace("19", "60").replace(
        "{% set ns.s = ns.s + ns.s %}",
        "{% set x %}{% filter upper %}{{ ns.s }}{{ ns.s }}{% endfilter %}{% endset %}{% set ns.s = x %}",
    ),
    "a text escaped again and again": "{% set ns = namespace(s='&' | safe) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + '&&&&&&&&' * (2 ** i) %}{% endfor %}",
    "json of json": "{% set ns = namespace(s='\"') %}{% for i in range(60) %}{% set ns.s = ns.s | tojson %}{% endfor %}",
    "replace": DOUBLE + "{{ ns.s.replace('a', ns.s) }}",
    "replace nothing": DOUBLE + "{{ ns.s | replace('', ns.s) }}",
    "join by much": DOUBLE + "{{ ns.s.join(range(10000) | map('string')) }}",
    "join filter by much": DOUBLE + "{{ range(10000) | join(ns.s) }}",
    "split at each": DOUBLE + "{{ [ns.s.split('a'), ns.s.split('b')] }}",
    "indent by much": "{{ 'a\nb' | indent(1000000000) }}",
    "indent many": DOUBLE + "{{ ('\n' + ns.s[:100000]).replace('a', '\n') | indent(64) | indent(64) }}",
    "print much": "{% for i in range(100000) %}" + "x" * 2000 + "{% endfor %}",
    "print much from a macro": "{% macro m() %}"
    + "x" * 2000
    + "{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "print a long text often": DOUBLE + "{% for i in range(1000) %}{{ ns.s }}{% endfor %}",
    "keep many texts": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['a' * 999] %}{% endfor %}",
    "slice often": DOUBLE
    + "{% set n = namespace(l=[]) %}{% for i in range(999) %}{% set n.l = n.l + [ns.s[i:]] %}{% endfor %}",
    "lower case often": DOUBLE
    + "{% set n = namespace(l=[]) %}{% for i in range(999) %}{% set n.l = n.l + [ns.s.upper()] %}"
    "{% endfor %}",
    "a format pads": "{{ '%1000000000d' % 1 }}",
    "a format pads by a star": "{{ '%*d' % (1000000000, 1) }}",
    "a format repeats": DOUBLE + "{{ ('%(a)s' * 1000) % {'a': ns.s} }}",
    "json indents": "{{ [1] | tojson(indent=1000000000) }}",
    "a date is long": "{{ strftime_now('%A' * 1000000) }}",
    # memory: lists
    "a list multiplied": "{{ [1] * 1000000000 }}",
    "a list doubled": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "a list of letters": DOUBLE.replace("19", "22") + "{{ ns.s | list }}",
    "literals kept": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, ["
    + "1," * 3000
    + "]] %}{% endfor %}",
    "arguments spread, deep": "{% set l = range(9999) | list %}{% macro m() %}{{ varargs[0] }}{{ m(*l) }}{% endmacro %}{{ m() }}",
    "laughs printed": BILLION + "{{ ns.a }}",
    "laughs joined": BILLION + "{{ ns.a ~ '' }}",
    "laughs as text": BILLION + "{{ ns.a | string | length }}",
    "laughs dumped": BILLION + "{{ ns.a | tojson }}",
    "laughs compared": BILLION.replace("range(30)", "range(40)") + "{{ ns.a == ns.a[:1] + ns.a[:1] }}",
    "laughs sorted": BILLION + "{{ [ns.a, ns.a] | sort }}",
    "laughs selected": BILLION + "{{ [ns.a] | select('equalto', ns.a[:]) | list }}",
    "laughs formatted": BILLION + "{{ '%s' % ns.a[0] }}",
    "laughs raised": BILLION + "{{ raise_exception(ns.a) }}",
    "laughs as items": "{% set ns = namespace(a={'x': 1}) %}{% for i in range(30) %}"
    "{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a.items() | list }}",
    "deep lists printed": DEEP + "{{ ns.a }}",
    "deep lists compared": DEEP + "{{ ns.a == ns.a[:] }}",
    "a namespace printed": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "a namespace in a list": "{% set ns = namespace(a=1) %}{{ [ns] }}",
    # numbers
    "a huge power": "{{ 10 ** 1000000000 }}",
    "a power of powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "squared, often": "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "many digits": "{{ ('9' * 1000000) | int }}",
    "many digits, halves": "{{ ('9' * 1000000) | float }}",
    "a large float as a whole number": "{{ 1e300 | int }}",
    "rounded to very many places": "{{ 5 | round(-1000000000) }}",
    "very many unique ones": "{{ range(100000) | unique | list }}",
}

REFUSED = {
    "unique ones that collide": "{{ range(0, 100000 * 2305843009213693951, 2305843009213693951) | unique | list }}",
    "a test divides a format": "{{ '%1000000000d' is divisibleby(1) }}",
    "a test formats": "{{ '%1000000000d' is even }}",
    "a range too long": "{{ range(1000000000) }}",
    "a number too long": "{{ 1" + "0" * 30 + " }}",
    "a number beyond Python's": "{{ " + "9" * 60_000 + " }}",
    "a tuple as a key": TUPLES + "{{ {ns.a: 1} }}",
    "a tuple as an index": TUPLES + "{{ {}[ns.a].x }}",
    "a tuple as what to get": TUPLES + "{{ {}.get(ns.a) }}",
    "a tuple in a mapping": TUPLES + "{{ ns.a in {} }}",
    "keys taken away": TUPLES + "{{ {}.keys() - [ns.a] }}",
    "power of a negative": "{{ (0 - 8) ** 0.5 < 1 }}",
    "a float too large": "{{ 10.0 ** 1000 }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a caller without end": "{% macro m(caller=none) %}{% call m() %}{% endcall %}{% endmacro %}{{ m() }}",
    "a loop without end": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "deep lists": "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
    "many times not": "{{ " + "not " * 16_000 + "1 }}",
    "many signs": "{{ " + "-" * 50_000 + "1 }}",
    "a long sum": "{{ 1" + " + 1" * 16_000 + " }}",
    "many filters": "{{ 'a'" + " | trim" * 9_000 + " }}",
    "many attributes": "{{ a" + ".a" * 30_000 + " }}",
    "many ifs": "{{ " + "1 if 1 else " * 5_000 + "1 }}",
    "blocks in blocks": "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000,
    "loops in many loops": "{% for x in [1] %}" * 30 + "{% endfor %}" * 30,
    "very many parts": "{{a}}" * 13_000,
    "a very long source": "x" * 200_000,
    "include": "{% include 'a' %}",
    "include that forgives": "{% include 'a' ignore missing %}",
    "import": "{% import 'a' as a %}",
    "from import": "{% from 'a' import b %}",
    "extends": "{% extends 'a' %}",
    "a block": "{% block a %}{{ self.a() }}{% endblock %}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "autoescape that computes": "{% autoescape ('a' | replace('a', 'b')) %}{% endautoescape %}",
    "in within a chain": "{{ 1 in [1] in [[1]] }}",
    "half of a surrogate pair": "{{ '\\ud800' }}",
    "a filter that is out": "{{ [1] | sum }}",
    "a test that is out": "{{ 1 is filter }}",
    "a global that is out": "{{ lipsum(n=100000) }}",
    "a method that pads": "{{ 'a'.center(1000000000) }}",
    "a method that fills": "{{ 'a'.zfill(1000000000) }}",
    "tabs": "{{ 'a\t'.expandtabs(1000000000) }}",
    "bytes of a number": "{{ (5).to_bytes(1000000000, 'big') }}",
    "a format with a width": "{{ '{:1000000000}'.format(1) }}",
    "a format with an attribute": "{{ '{0.__class__}'.format(1) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "a date with a strange directive": "{{ strftime_now('%Q%n') }}",
    "a call of a text": "{{ 'a'() }}",
    "a call of what the host gave": "{{ host() }}",
    "an attribute of what the host gave": "{{ host.__globals__.x }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by index": "{{ ''['__class__']['__mro__'] }}",
    "classes by map": "{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "a macro's parts": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "a method's parts": "{{ ''.upper.func.__globals__ }}",
    "a loop's parts": "{% for x in [1] %}{{ loop._iterable.x }}{% endfor %}",
    "a namespace's parts": "{{ namespace().__init__.__globals__ }}",
    "the context": "{{ self._TemplateReference__context.environment.x }}",
    "changing a message": "{{ messages.append(1) }}",
    "changing a mapping": "{{ messages[0].update({'role': 'system'}) }}",
    "a bad escape": "{{ '\\N{nothing}' }}",
    "keywords twice": "{{ dict(a=1, a=2) }}",
    "a slice among indexes": "{{ messages[1:2, 3] }}",
    "a slice without a step": "{{ messages[::0] }}",
}


def render(source: str, **values: Any) -> str:
    return Template(source).render({"messages": [{"role": "user", "content": "Hi"}], "host": render, **values})


@pytest.mark.parametrize("source", BY_COUNT.values(), ids=BY_COUNT)
def test_a_count_ends_it(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    message = str(caught.value)
    assert message.startswith("tokenizer.chat_template asks for ")
    assert message.endswith("use another template")
    assert "more time" not in message


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_it_is_refused(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    message = str(caught.value)
    assert message.startswith("tokenizer.chat_template")
    assert "\n" not in message
    assert len(message) < 500


def test_the_clock_ends_what_the_counts_let_pass() -> None:
    costly = "{% for i in range(100000) %}" + "{% set a = i %}" * 1500 + "{% endfor %}"
    with pytest.raises(TemplateError, match=r"more time than 0\.05 s"):
        Template(costly).render({}, time_limit_s=0.05)


def test_the_clock_is_read_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    spent = Budget(2.0)
    spent.step()
    now[0] = 2.5
    with pytest.raises(TemplateError, match="more time than 2 s"):
        spent.step()


def test_a_message_about_a_hostile_text_is_one_short_line_without_control_characters() -> None:
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('\x1b[31mred\n' * 90000) }}")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500


def test_memory_that_runs_out_is_a_template_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(value: object) -> str:
        raise MemoryError

    compiled = Template("{{ 1 }}")
    monkeypatch.setattr(template, "text_of", exhaust)
    with pytest.raises(TemplateError, match="MemoryError"):
        compiled.render({})


def test_a_budget_is_one_renderings_own() -> None:
    nearly = "{% for i in range(90000) %}{% endfor %}" * (template_limits.MAX_STEPS // 100_000)
    compiled = Template(nearly)
    assert [compiled.render({}, time_limit_s=60) for _ in range(2)] == ["", ""]
