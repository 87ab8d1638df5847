"""template: what chat templates use keeps its meaning under the limits."""

# ruff: noqa: E501 - a case a line reads better
from __future__ import annotations

import json
import threading
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwq_lite.errors import TemplateError
from qwq_lite.prompt.template import Template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b>\n\nthere "},
    {
        "role": "assistant",
        "content": "<think>\nHm.\n</think>\n\nYes.",
        "tool_calls": [{"name": "f", "arguments": {"a": 1}}],
    },
    {"role": "user", "content": [{"type": "text", "text": "你好"}, {"type": "image"}]},
]
VALUES = {"messages": MESSAGES, "add_generation_prompt": True, "numbers": [3, 1, 2, 1], "words": ["b", "A", "c"]}

SAME_AS_JINJA = [
    # loops
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.revindex0 }} {% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ loop.length }}{{ loop.last }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem }}>{{ (loop.nextitem or m).role }} {% endfor %}",
    "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.length }}{{ m.role }}{% endfor %}",
    "{% for m in nothing %}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% for a, b in {'x': 1, 'y': [2]}.items() %}{{ a }}{{ b }}{{ loop.cycle('-', '+') }}{% endfor %}",
    "{% for n in [1, [2, [3]]] recursive %}{{ loop.depth }}{% if n is iterable %}({{ loop(n) }}){% else %}{{ n }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m.role == 'user') }}{% endfor %}",
    "{% for letter in 'abc' %}{{ letter }},{% endfor %}{% for i in range(2, 9, 3) %}{{ i }}{% endfor %}",
    # macros and blocks
    "{% macro m(a, b='x') %}[{{ a }}{{ b }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, c=4) }}",
    "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}in{% endcall %}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter lower %}ABC{{ x }}{% endfilter %}",
    "{% with a = 1, b = [2] %}{{ a }}{{ b }}{% endwith %}{% raw %}{{ raw }}{% endraw %}{# comment #}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.found }}",
    # methods
    "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}|{{ messages[2]['content'].split('</think>', 1) }}",
    "{{ ' a b '.strip() }}{{ 'a b'.split() }}{{ 'aXb'.partition('X') }}{{ 'a\nb'.splitlines() }}{{ 'ab'.replace('a', 'cc') }}",
    "{{ 'ab'.startswith('a') }}{{ 'ab'.startswith(('x', 'a')) }}{{ 'abab'.rfind('ab') }}{{ 'abab'.count('ab') }}{{ 'x'.find('y') }}",
    "{{ 'ab'.upper() }}{{ 'a b'.title() }}{{ 'ab'.removeprefix('a') }}{{ 'ab'.removesuffix('b') }}{{ '12'.isdigit() }}",
    "{{ ', '.join(['a', 'b']) }}{{ '<{}>'.format('x') }}{{ '{}{}'.format(1, none) }}{{ [1, 2, 1].index(2) }}{{ [1, 2, 1].count(1) }}",
    "{{ messages[0].get('role') }}{{ messages[0].get('x', 'd') }}{{ messages[0].keys() | list }}{{ messages[0].values() | list }}",
    "{{ messages[0].role }}{{ messages[0]['role'] }}{{ {'items': 1}['items'] }}{{ {'_a': 1}._a }}{{ {1: 2}[1] }}",
    # filters
    "{{ messages | length }}{{ ' x ' | trim }}{{ 'xax' | trim('x') }}{{ 12 | string }}{{ nothing | default('d') }}{{ '' | default('d', true) }}",
    "{{ numbers | sort }}{{ words | sort(case_sensitive=true) }}{{ numbers | sort(reverse=true) }}{{ messages[:2] | sort(attribute='role') }}",
    "{{ numbers | unique | list }}{{ numbers | min }}{{ numbers | max }}{{ numbers | first }}{{ numbers | last }}{{ numbers | reverse | list }}",
    "{{ {'b': 1, 'A': 2} | dictsort }}{{ {'a': 1} | items | list }}{{ 'abc' | list }}{{ 'abc' | reverse }}{{ 'aBC' | capitalize }}",
    "{{ messages | map(attribute='role') | join(',') }}{{ words | map('upper') | join }}{{ messages | join('|', attribute='role') }}",
    "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}{{ numbers | select('odd') | list }}{{ numbers | reject('eq', 1) | list }}",
    "{{ 'a\n\nb' | indent }}{{ 'a\nb' | indent(2, first=true) }}{{ 'a\n\nb' | indent('> ', blank=true) }}{{ 'aba' | replace('a', 'x', 1) }}",
    "{{ '42' | int }}{{ 'x' | int(7) }}{{ '1.5' | float }}{{ 1.55 | round(1) }}{{ 1.2 | round(0, 'ceil') | int }}{{ -3 | abs }}{{ 'ff' | int(base=16) }}",
    "{{ '<a>' | safe }}{{ '<' | safe + '<' }}{{ '<' + ('>' | safe) }}{{ ('<' | safe) ~ '<' }}{{ ('<' | safe).strip() + '&' }}",
    "{{ none | map('upper') | list }}{% if [] | map('upper') %}an iterator is true{% endif %}",
    # tests, comparisons, operators
    "{{ messages is defined }}{{ x is not defined }}{{ none is none }}{{ 'a' is string }}{{ {} is mapping }}{{ [] is iterable }}{{ [] is sequence }}",
    "{{ 3 is odd }}{{ 4 is divisibleby 2 }}{{ true is boolean }}{{ 1 is number }}{{ 1 is sameas 1 }}{{ 1 is in [1] }}{{ 'a' is eq 'a' }}{{ 2 is gt 1 }}",
    "{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ 5 not in numbers }}{{ 1 < 2 < 3 }}{{ [1, [2]] == [1, [2]] }}{{ 'user' in ['user'] }}",
    "{{ 1 + 2 * 3 - 4 / 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ -7 // 2 }}{{ [1] + [2] }}{{ (1,) + (2,) }}{{ 'ab' * 2 }}{{ 2 * [0] }}",
    "{{ '%s-%d' % ('a', 3) }}{{ '%.2f%%' % 1.234 }}{{ '%(a)5s|%-3s' % {'a': 1} if false else '' }}{{ 'a' ~ 1 ~ none ~ [1] }}",
    "{{ messages[1:3] | length }}{{ messages[::-1][0].role }}{{ 'hello'[1:-1] }}{{ 'hello'[::2] }}{{ numbers[-1] }}{{ numbers[9] }}",
    "{{ 'x' if nothing else 'y' }}{{ 'x' if nothing }}{{ nothing }}{{ none }}{{ true }}{{ 1.0 }}{{ {'a': [1, 'b']} }}{{ (1, 'é') }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict([['a', 1]]) }}{{ namespace({'a': 1}).a }}{{ not messages }}{{ messages[0].role and 1 }}",
    "{% if add_generation_prompt %}\n  {%- if true -%}  x  {%- endif %}\n{% endif %}\n",
]


def render(source: str, **values: Any) -> str:
    return Template(source).render({**VALUES, **values})


@pytest.mark.parametrize("source", SAME_AS_JINJA)
def test_it_renders_as_jinja_does(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    ).from_string(source)
    assert render(source) == plain.render(VALUES)


# Without the noncharacters: those that mark typed text come through as they are, in ASCII too.
TEXT = st.text(st.characters(exclude_characters="".join(map(chr, range(0xFDD0, 0xFDF0))), codec="utf-8"))


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT, st.lists, max_leaves=9))
def test_json_is_pythons(value: Any) -> None:
    assert render("{{ value | tojson }}", value=value) == json.dumps(value, ensure_ascii=False)
    assert render("{{ value | tojson(indent=2) }}", value=value) == json.dumps(value, ensure_ascii=False, indent=2)
    assert render("{{ value | tojson(ensure_ascii=true) }}", value=value) == json.dumps(value)


def test_json_takes_separators_and_sorted_keys() -> None:
    source = "{{ {'b': [1, 2], 'a': 1} | tojson(separators=(',', ':'), sort_keys=true) }}"
    assert render(source) == '{"a":1,"b":[1,2]}'


def test_the_date_is_todays() -> None:
    before = datetime.now().strftime("%d %b %Y")
    assert render("{{ strftime_now('%d %b %Y') }}") in (before, datetime.now().strftime("%d %b %Y"))


def test_generation_tags_print_their_content_and_open_a_scope() -> None:
    source = "{% for m in [1, 2] %}{% generation %}{% set a = m %}{{ a }}{% endgeneration %}{{ a }},{% endfor %}"
    assert render(source) == "1,2,"


def test_a_filter_that_no_branch_reaches_may_be_unknown() -> None:
    assert render("{% if false %}{{ 'a' | from_json }}{% endif %}x") == "x"


def test_a_long_conversation_is_far_from_the_limits() -> None:
    messages = [{"role": "user", "content": "word 你好 " * 100}] * 1000
    source = (
        "{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    )
    assert render(source, messages=messages).count("<|im_end|>") == 1000


def test_threads_share_a_template_and_not_its_budget() -> None:
    template = Template("{% for i in range(40000) %}{% endfor %}{{ name }}")
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.extend(template.render({"name": "x"}, 60) for _ in range(10)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["x"] * 40


def test_a_refusal_names_the_line_and_what_to_do() -> None:
    with pytest.raises(
        TemplateError, match=r"tokenizer.chat_template, line 2: No filter named 'nope'.*convert the model"
    ):
        Template("\n{{ 1 | nope }}")
