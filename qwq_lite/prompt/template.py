"""Chat templates come from strangers: a Jinja sandbox with limits on time, memory and work. Knows no vocabulary, no engine.

A template may name what `template_builtins` lists. A budget belongs to each rendering and is charged wherever work can repeat
or a value can grow: loops, calls, operators, comparisons, literals, output. Jinja's own code generator writes those
charges into the template's code. Between two charges stands straight-line code, which the size of the source bounds. The
compiler evaluates nothing (constant folding is off), so compiling is bounded by the source too.

In this process that is best effort. It ends no single call into C, no defect of Jinja or of Python's compiler, and it does
not count what the host itself passes in: a worker process with limits of the operating system is the last line.

Source: Jinja 3.1 sandbox.py and compiler.py; transformers for the tags
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from jinja2 import TemplateAssertionError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing

from qwq_lite.errors import TemplateError
from qwq_lite.prompt import template_builtins
from qwq_lite.prompt.template_limits import (
    CURRENT,
    FIELD,
    MAX_INT,
    SCALARS,
    TIME_LIMIT_S,
    Budget,
    budget_now,
    check_key,
    cost,
    text_of,
)

MAX_SOURCE = 64 * 1024  # characters; the longest that a model is known to ship has 17,000
MAX_NODES = 5_000  # of the syntax tree: the compiler's tables of names grow with its square; known templates have 1,300
_CALL_STEPS = 8  # a call of a macro takes about as long as eight turns of a loop
_ARGUMENT_BYTES = 64  # each layer of Jinja between a call and a macro copies the references
_TAGS = {"fromimport": "from", "evalcontextmodifier": "autoescape"}
_EACH = "(each)"  # a filter under a name that no template can write
_SURROGATE = re.compile("[\ud800-\udfff]")


class Template:
    """A chat template that compiled. Any thread may render.

    Raises: TemplateError when the source does not parse, is too large, or uses what chat templates may not.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"{FIELD} has {len(source):,} characters, at most {MAX_SOURCE:,} are allowed; use another template"
            )
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            reason = "undefined or not allowed in a chat template; use another one or "
            what = reason if isinstance(error, TemplateAssertionError) else ""
            raise TemplateError(
                f"{FIELD}, line {error.lineno}: {_line(error.message)}; {what}convert the model again"
            ) from error
        except RecursionError as error:
            raise TemplateError(f"{FIELD} is nested too deeply; convert the model again") from error
        except TemplateError:
            raise
        except Exception as error:  # Python's compiler refuses in many ways, MemoryError among them
            raise TemplateError(f"{FIELD} does not compile: {_said(error)}; convert the model again") from error

    def render(self, values: Mapping[str, Any], time_limit_s: float = TIME_LIMIT_S) -> str:
        """The template's text, with `values` for its variables.

        Raises: TemplateError with what the template objected to, or with the limit that it met.
        """
        token = CURRENT.set(Budget(time_limit_s))
        try:
            return self._template.render(values)
        except TemplateError:
            raise
        except Exception as error:  # MemoryError too: a template's demand, and freed by now
            raise TemplateError(f"{FIELD} refuses these messages: {_said(error)}") from error
        finally:
            CURRENT.reset(token)


def _line(text: str | None) -> str:
    """A stranger's text as part of a message: short, one line, nothing that a terminal would obey."""
    shown = "".join(letter if letter.isprintable() else " " for letter in (text or "")[:300])
    return " ".join(shown.split())


def _said(error: Exception) -> str:
    return _line(str(error)) or type(error).__name__


class _Generator(CodeGenerator):
    """Jinja's code generator, with charges in the code it writes."""

    def fail_at(self, node: nodes.Node, found: str) -> NoReturn:
        raise TemplateAssertionError(found, node.lineno, self.name, self.filename)

    def refuse(self, node: nodes.Node, frame: Frame) -> NoReturn:
        name = type(node).__name__.removeprefix("Scoped").lower()
        self.fail_at(node, f"the tag {_TAGS.get(name, name)}")

    visit_Block = visit_Extends = visit_Include = visit_Import = visit_FromImport = refuse  # noqa: N815
    visit_EvalContextModifier = visit_ScopedEvalContextModifier = refuse  # noqa: N815

    def wrapped(self, function: str, node: nodes.Node, frame: Frame) -> None:
        self.write(f"environment.{function}(")
        self.visit(node, frame)
        self.write(")")

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.value, int) and node.value > MAX_INT:
            self.fail_at(node, "a whole number beyond 2 ** 60")
        if isinstance(node.value, str) and _SURROGATE.search(node.value):
            self.fail_at(node, "half of a surrogate pair in a text")
        super().visit_Const(node, frame)

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:  # noqa: N802
        size = sum(cost(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if size:
            self.writeline(f"environment.charge({size})")
        super().visit_Output(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.counted(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx != "load":
            return super().visit_Tuple(node, frame)
        self.write("environment.counted(")
        super().visit_Tuple(node, frame)
        return self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.counted({")
        for pair in node.items:
            self.wrapped("key", pair.key, frame)
            self.write(": ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("})")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin"):
            self.write("(not " if node.ops[0].op == "notin" else "(")
            self.write("environment.contained(")
            self.visit(node.expr, frame)
            self.write(", ")
            self.visit(node.ops[0].expr, frame)
            self.write("))")
            return
        if any(operand.op in ("in", "notin") for operand in node.ops):
            self.fail_at(node, "`in` within a chain of comparisons")  # its cost is the pair's, which a chain hides
        self.write("(")
        self.wrapped("weighed", node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:  # noqa: N802
        self.write(f" {operators[node.op]} ")
        self.wrapped("weighed", node.expr, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node, frame)
        self.write("environment.cut(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(bound or nodes.Const(None), frame)
            self.write(", ")
        return self.write("))")


class _Generation(Extension):
    """`{% generation %}`, by which transformers finds a reply's tokens for training: here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's declaration

    def parse(self, parser: Parser) -> nodes.Node:
        scope = nodes.Scope(lineno=next(parser.stream).lineno)
        scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return scope


@pass_context
def _output(context: Context, value: Any) -> str:
    """A value that is printed. It takes the context because Jinja would otherwise run it on constants while it compiles."""
    text = text_of(value)
    budget_now().grow(cost(text))
    return text


class _Each:
    """What a loop runs over: a step an item, and as long as it was."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]  # a TypeError tells Jinja to count by itself

    def __iter__(self) -> Iterator[Any]:
        budget = budget_now()
        for value in self._values:
            budget.step()
            yield value


class _Sandbox(ImmutableSandboxedEnvironment):
    """Every way from a template to a value: what it may see, call and compute."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    key = staticmethod(check_key)
    cut = staticmethod(template_builtins.cut)
    weighed = staticmethod(template_builtins.weighed)
    joined = staticmethod(template_builtins.joined)

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        for number, node in enumerate(list(source.find_all(nodes.Node))):
            if number > MAX_NODES:
                raise TemplateAssertionError(f"more than {MAX_NODES:,} parts", node.lineno)
            if isinstance(node, nodes.For):
                node.iter = nodes.Filter(node.iter, _EACH, [], [], None, None, lineno=node.lineno)
        return super()._generate(source, *args, **options)

    def charge(self, size: int) -> None:
        budget_now().grow(size)

    def counted(self, values: Any) -> Any:
        budget_now().grow(8 * len(values))
        return values

    def contained(self, value: Any, container: Any) -> bool:
        return template_builtins.contains(container, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return template_builtins.calculate(operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        found = self._attribute(obj, attribute)
        if found is missing and isinstance(obj, Mapping):
            found = obj.get(attribute, missing)
        return self.undefined(obj=obj, name=attribute) if found is missing else found

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, SCALARS):  # a message about a missing element spells its name
            return self.undefined(f"{type(argument).__name__} is undefined as a key, which is text or a number")
        name: Any = check_key(argument)
        if isinstance(obj, Mapping | str | list | tuple | range):
            try:
                return obj[name]
            except (TypeError, LookupError):
                pass
        found = self._attribute(obj, name) if isinstance(name, str) else missing
        return self.undefined(obj=obj, name=name) if found is missing else found

    def _attribute(self, obj: Any, name: str) -> Any:
        if isinstance(obj, Undefined):
            return obj[name]  # raises, and names what is undefined
        if isinstance(obj, Namespace) and not name.startswith("_"):
            return getattr(obj, name, missing)
        if isinstance(obj, LoopContext) and name in template_builtins.LOOP:
            value = getattr(obj, name)
            return (
                template_builtins.Allowed(template_builtins.call_weighed, value)
                if callable(value) and name in ("changed", "cycle")
                else value
            )
        method = template_builtins.method(obj, name)
        if method is not None:
            return method
        hidden = hasattr(type(obj), name) or (name.startswith("__") and not isinstance(obj, Mapping))
        return self.unsafe_undefined(obj, name) if hidden else missing

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: N805
        budget = budget_now()
        budget.step(_CALL_STEPS)
        budget.grow(_ARGUMENT_BYTES * (len(args) + len(options)))
        if isinstance(__obj, LoopContext):
            args = (_Each(args[0]), *args[1:]) if args else args
        elif not isinstance(__obj, template_builtins.Allowed | Macro | Undefined):
            raise SecurityError(f"a call of a {type(__obj).__name__} is unsafe")
        return __context.call(__obj, *args, **options)


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        optimized=False,
        finalize=_output,
    )
    environment.filters = {**template_builtins.FILTERS, _EACH: _Each}
    environment.tests = dict(template_builtins.TESTS)
    environment.globals = dict(template_builtins.GLOBALS)
    return environment
