"""What a chat template may name: operators, methods, filters and globals, each with its limit. Knows no environment.

These are allow-lists. Whatever can take long or grow is charged to the rendering's budget from its arguments, before it
runs; whatever is not here does not exist for a template.

Source: Jinja 3.1 filters.py for the filters' meaning; transformers for tojson and the globals
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, Undefined, pass_context, pass_environment
from jinja2 import TemplateError as JinjaError
from jinja2.filters import FILTERS as _FILTERS_OF_JINJA
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS as _TESTS_OF_JINJA
from jinja2.utils import Namespace
from markupsafe import Markup

from qwq_lite.prompt.template_limits import (
    MAX_DIGITS,
    MAX_INT,
    MAX_UNIQUE,
    OBJECT_BYTES,
    PART_BYTES,
    SCALARS,
    budget_now,
    charge_text,
    check_key,
    cost,
    limit_error,
    text_of,
    width_of,
)


def _whole(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise limit_error("a whole number beyond 2 ** 60")
    return value


_JINJA_FILTERS: Mapping[str, Callable[..., Any]] = _FILTERS_OF_JINJA
_JINJA_TESTS: Mapping[str, Callable[..., Any]] = {**_TESTS_OF_JINJA}  # type: ignore[dict-item]  # Jinja's have no types


# --- operators ---

_ARITHMETIC = ImmutableSandboxedEnvironment.default_binop_table
_CONVERSIONS = re.compile(r"%(?:%|(?:\(\w{1,64}\))?[-+ #0]{0,5}\d{0,3}(?:\.\d{0,3})?[sdifgeE])")


def calculate(sign: str, left: Any, right: Any) -> Any:
    budget = budget_now()
    budget.step()
    if isinstance(left, int | float) and isinstance(right, int | float):
        if sign == "**" and right > 60 and abs(_whole(left)) > 1 and isinstance(left, int):
            raise limit_error("a power beyond the 60th")
        return _whole(_ARITHMETIC[sign](left, right))
    if isinstance(left, Undefined) or isinstance(right, Undefined):
        return _ARITHMETIC[sign](left, right)  # raises, and names what is undefined
    if sign == "+" and isinstance(left, str) and isinstance(right, str):
        budget.check(cost(left, right))
        return charge_text(left + right)
    if sign == "+" and isinstance(left, list | tuple) and type(left) is type(right):
        budget.grow(8 * (len(left) + len(right)))
        return _ARITHMETIC[sign](left, right)
    if sign == "*" and isinstance(left, int):
        left, right = right, left
    if sign == "*" and isinstance(left, str | list | tuple) and isinstance(right, int):
        budget.grow(max(right, 0) * (cost(left) if isinstance(left, str) else 8 * len(left)))
        return left * right
    if sign == "%" and isinstance(left, str):
        return _formatted(left, right)
    raise TypeError(f"{type(left).__name__} {sign} {type(right).__name__}")


def _formatted(form: str, value: Any) -> str:
    conversions = _CONVERSIONS.findall(form)
    if isinstance(form, Markup) or "%" in _CONVERSIONS.sub("", form):
        raise limit_error("a % format other than plain ones with at most three digits")
    budget = budget_now()
    budget.scan(form)
    budget.check(4 * len(form) + len(conversions) * (8000 + budget.weigh(value)))
    if isinstance(value, Mapping):
        return charge_text(str(form % {key: _printed(item) for key, item in value.items()}))
    return charge_text(str(form % (tuple(map(_printed, value)) if isinstance(value, tuple) else _printed(value))))


def _printed(value: Any) -> Any:
    return value if isinstance(value, SCALARS) else text_of(value)


def contains(container: Any, value: Any) -> bool:
    budget = budget_now()
    if isinstance(container, str) and isinstance(value, str):
        budget.scan(container, value)
        return value in container
    if isinstance(container, Mapping):
        return check_key(value) in container
    budget.weigh(value)
    budget.weigh(container)
    return value in container


def weighed(value: Any) -> Any:
    """A value that is compared."""
    budget_now().weigh(value)
    return value


def joined(values: Iterable[Any]) -> str:
    """What `~` makes."""
    return _join("", values)


def call_weighed(function: Callable[..., Any], *args: Any) -> Any:
    """A call that compares what it is given."""
    return function(*map(weighed, args))


# --- methods ---


class Allowed(functools.partial[Any]):
    """A function that templates may call."""


def _call_method(name: str, text: str, *args: Any, **options: Any) -> Any:
    """A method of str whose result is about as long as the text, or a part of it, or its parts."""
    budget, given = budget_now(), [*args, *options.values()]
    for value in given:
        budget.weigh(value)
    words = [value for value in given if isinstance(value, str)]
    budget.scan(text, *words, letters="strip" in name)
    if name in ("split", "rsplit") and words:
        most = [value for value in given if isinstance(value, int) and value >= 0]
        budget.check(cost(text) + OBJECT_BYTES * min(text.count(words[0]), *most, len(text)))
    elif "split" in name:
        budget.check(PART_BYTES * len(text))
    else:
        budget.check(3 * cost(text))  # no character has more than three of the other case
    result = getattr(text, name)(*args, **options)
    for part in result if isinstance(result, list | tuple) else [result]:
        budget.grow(cost(part) if isinstance(part, str) else 0)
    return result


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    budget = budget_now()
    budget.scan(text, old)
    found = text.count(old)
    budget.check(
        (len(text) + (found if count < 0 else min(found, count)) * len(new)) * max(width_of(text), width_of(new))
    )
    return charge_text(str.replace(text, old, new, count))


def _join(between: str, values: Iterable[Any]) -> str:
    budget = budget_now()
    texts = [text_of(value) for value in budget.each(values)]
    budget.check((sum(map(len, texts)) + len(texts) * len(between)) * max(map(width_of, [between, *texts])))
    return charge_text(str.join(between, texts))


def _format(text: str, *args: Any) -> str:
    """str.format with empty fields alone: others reach attributes or pad."""
    parts = text.split("{}", maxsplit=len(args))
    if any(brace in part for part in parts for brace in "{}"):
        raise JinjaError("a format with fields other than {}, or more of them than values, is unsafe")
    values = [*map(text_of, args[: len(parts) - 1]), ""]
    return _join("", [piece for pair in zip(parts, values, strict=True) for piece in pair])


_CALLED = (
    "strip lstrip rstrip split rsplit splitlines startswith endswith lower upper title capitalize find rfind index"
)
_CALLED += (
    " rindex count removeprefix removesuffix partition rpartition isdigit isalpha isspace isalnum isupper islower"
)
_CALLED += " isnumeric isdecimal istitle isascii casefold swapcase"
_TEXT: dict[str, Callable[..., Any]] = {name: functools.partial(_call_method, name) for name in _CALLED.split()}
_GROWING: dict[str, Callable[..., Any]] = {"replace": _replace, "join": _join, "format": _format}
_MAPPING: dict[str, Callable[..., Any]] = {
    "get": lambda mapping, key, default=None: mapping.get(check_key(key), default),
    "items": lambda mapping: mapping.items(),
    "keys": lambda mapping: mapping.keys(),
    "values": lambda mapping: mapping.values(),
}
_LIST: dict[str, Callable[..., Any]] = {
    "index": lambda values, value: weighed(values).index(weighed(value)),
    "count": lambda values, value: weighed(values).count(weighed(value)),
}
LOOP = {"index", "index0", "first", "last", "length", "revindex", "revindex0"}
LOOP |= {"previtem", "nextitem", "depth", "depth0", "cycle", "changed"}


def method(value: Any, name: str) -> Callable[..., Any] | None:
    if isinstance(value, str):
        # A text that is marked safe escapes what it takes in: no real template asks that of these three.
        found = _TEXT.get(name) or (None if isinstance(value, Markup) else _GROWING.get(name))
    elif isinstance(value, Mapping):
        found = _MAPPING.get(name)
    else:
        found = _LIST.get(name) if isinstance(value, list | tuple) else None
    return Allowed(found, value) if found else None


# --- filters, tests and globals ---


def _apply_text(name: str, value: Any, *args: Any, **options: Any) -> Any:
    """A filter that turns a text into one of about the same length."""
    text, budget = text_of(value), budget_now()
    budget.scan(text, *(word for word in (*args, *options.values()) if isinstance(word, str)), letters=True)
    budget.check(PART_BYTES * len(text))
    return charge_text(_JINJA_FILTERS[name](text, *args, **options))


def _apply_list(name: str, *given: Any, **options: Any) -> Any:
    """A filter that compares values; sorting compares each about log2(n) times, and lower case is a copy."""
    budget = budget_now()
    *environment, values = given[: 1 if name == "dictsort" else 2]
    args = given[len(environment) + 1 :]
    _check_names(args, options)
    values = values if isinstance(values, Mapping) else list(budget.each(values))
    budget.check(budget.weigh(values, times=1 + len(values).bit_length()) // 6)
    if name == "unique" and len(values) > MAX_UNIQUE:
        raise limit_error(f"the unique ones of {len(values):,} values, more than {MAX_UNIQUE:,}")
    result = _JINJA_FILTERS[name](*environment, values, *args, **options)
    return iter(list(budget.each(result))) if name == "unique" else result


def _apply_each(name: str, context: Context, values: Any, *args: Any, **options: Any) -> Iterator[Any]:
    """A filter that applies another one, or a test. An iterator, as Jinja's: it has no length and is true when empty."""
    budget = budget_now()
    _check_names(args, options)
    return iter(list(budget.each(_JINJA_FILTERS[name](context, budget.each(values or ()), *args, **options))))


def _check_names(args: Sequence[Any], options: Mapping[str, Any]) -> None:
    for name in (*args, *options.values()):
        if isinstance(name, str):  # an attribute's name is cut at its dots
            budget_now().check(OBJECT_BYTES * len(name))


@pass_environment
def _join_filter(environment: Environment, values: Iterable[Any], between: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        _check_names([attribute], {})
        values = map(make_attrgetter(environment, attribute), values)
    return _join(text_of(between), values)


def _replace_filter(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    plain = [str.__str__(text_of(value)) for value in (text, old, new)]  # the filter drops a mark, as Jinja's does
    return _replace(plain[0], plain[1], plain[2], -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, budget = text_of(value), budget_now()
    margin = len(width) if isinstance(width, str) else width
    if margin > 64:
        raise limit_error(f"an indent of {margin:,}, more than 64")
    budget.check(PART_BYTES * len(text))
    budget.check((len(text) + (1 + len(text.splitlines())) * (margin + 1)) * (4 if not text.isascii() else 5))
    return charge_text(_JINJA_FILTERS["indent"](text, width, first, blank))


def _number(name: str, value: Any, *args: Any, **options: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise limit_error(f"a number of {len(value):,} digits, more than {MAX_DIGITS:,}")
    return _whole(_JINJA_FILTERS[name](value, *args, **options))


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > 20:
        raise limit_error(f"rounding to {precision:,} places, more than 20")
    return _JINJA_FILTERS["round"](value, precision, method)


_TO_ESCAPE = re.compile("[^\\x00-~\ufdd0-\ufdef]")  # all but ASCII and the noncharacters, as in text_of


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: characters as they are, and no HTML escapes."""
    margin = len(indent) if isinstance(indent, str) else indent or 0
    if margin > 16 or any(len(separator) > 16 for separator in separators or ()):
        raise limit_error("JSON with an indent or a separator of more than 16")
    budget = budget_now()
    budget.check(budget.weigh(value))
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return charge_text(_TO_ESCAPE.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text)


def _listed(values: Iterable[Any]) -> list[Any]:
    return list(budget_now().each(values))


def _reverse(value: Any) -> Any:
    if isinstance(value, str):
        return cut(value, slice(None, None, -1))
    return reversed(value) if isinstance(value, list | tuple | Mapping | range) else iter(_listed(value)[::-1])


def cut(value: Any, part: slice) -> Any:
    """A slice, which is a copy."""
    result = value[part]
    if isinstance(result, str | list | tuple):
        budget_now().grow(cost(result) if isinstance(result, str) else 8 * len(result))
    return result


def _raise_exception(message: Any) -> None:
    raise JinjaError(text_of(message)[:1000])


_DATE = re.compile(r"(?:[^%]|%-?[aAbBdDeFHIjmMpSTuUwWxXyYzZ%]){0,100}")


def _strftime_now(form: str) -> str:
    if not _DATE.fullmatch(form):
        raise limit_error("a date in a form that is long or unusual")
    return datetime.now().strftime(form)


def _dict(*args: Any, **options: Any) -> dict[Any, Any]:
    """dict(), from a mapping or from pairs."""
    budget, pairs = budget_now(), args[0] if args else ()
    pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
    return {**{check_key(key): value for key, value in budget.each(pairs)}, **options}


def _namespace(*args: Any, **options: Any) -> Namespace:
    return Namespace(_dict(*args, **options))


_LIKE_TEXT = ["capitalize", "lower", "title", "trim", "upper"]
_COMPARING = ["max", "min", "sort", "unique"]
_APPLYING = ["map", "reject", "rejectattr", "select", "selectattr"]
FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _JINJA_FILTERS[name] for name in ("abs", "count", "d", "default", "first", "items", "last", "length")},
    **{name: functools.partial(_apply_text, name) for name in _LIKE_TEXT},
    **{name: pass_environment(functools.partial(_apply_list, name)) for name in _COMPARING},
    **{name: pass_context(functools.partial(_apply_each, name)) for name in _APPLYING},
    **{name: functools.partial(_number, name) for name in ("float", "int")},
    "dictsort": functools.partial(_apply_list, "dictsort"),
    "indent": _indent,
    "join": _join_filter,
    "list": _listed,
    "replace": _replace_filter,
    "reverse": _reverse,
    "round": _round,
    "safe": lambda value: Markup(text_of(value)),
    "string": text_of,
    "tojson": _tojson,
}


def _test(name: str, value: Any, *args: Any) -> bool:
    """A test that compares, computes or reads text: what it takes is weighed first."""
    for given in (value, *args):
        weighed(given)
    if name in _NUMERIC and not all(isinstance(given, int | float) for given in (value, *args)):
        raise TypeError(f"{name} is a question about numbers")  # "%9d" is even: a format
    return bool(_JINJA_TESTS[name](value, *args))


_NUMERIC = ["divisibleby", "even", "odd"]
_COMPARED = ["==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"]
_SIMPLE = ["boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number"]
_SIMPLE += ["sameas", "sequence", "string", "true", "undefined"]
TESTS: dict[str, Callable[..., Any]] = {
    **{name: test for name, test in _JINJA_TESTS.items() if name in _SIMPLE},
    **{name: functools.partial(_test, name) for name in [*_NUMERIC, *_COMPARED, "lower", "upper"]},
    "in": lambda value, container: contains(container, value),
}
GLOBALS: dict[str, Any] = {
    "dict": Allowed(_dict),
    "namespace": Allowed(_namespace),
    "raise_exception": Allowed(_raise_exception),
    "range": Allowed(safe_range),
    "strftime_now": Allowed(_strftime_now),
}
