"""A Jinja environment for templates that nobody has vetted: no files, no attributes, no blow-up.

Jinja's own sandbox refuses unsafe attributes and changes to arguments. This one also allows only
harmless filters and methods, and has a budget: every loop turn costs a step, and every value that
an operator, filter, call or literal makes, or that is put out, costs its size. So neither endless
loops nor values that double with each turn run far, whatever they are built from.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

__all__ = ["Budget", "ChatEnvironment", "TemplateLimitError"]

Value = Any  # whatever a template computes

MAX_RANGE = 10_000
MAX_SIZE = 4_000_000
"""Units of one value: its characters, and ELEMENT_COST for each element, nested ones included."""
MAX_WORK = 64_000_000
"""Units of one rendering; see `Budget`."""
ELEMENT_COST = 32
STEP_COST = 64
MAX_SECONDS = 2.0
MAX_INTEGER = 2**63

# fmt: off
FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "groupby", "int", "items", "last", "length", "list", "lower", "map",
    "max", "min", "reject", "rejectattr", "reverse", "round", "safe", "select", "selectattr",
    "sort", "string", "title", "trim", "unique", "upper", "wordcount",
})
METHODS = {
    str: frozenset({
        "capitalize", "casefold", "count", "endswith", "find", "index",
        "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower",
        "isnumeric", "isspace", "istitle", "isupper", "join", "lower",
        "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
        "startswith", "strip", "swapcase", "title", "upper",
    }),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    int: frozenset[str](),
    float: frozenset[str](),
    bytes: frozenset[str](),
}
# fmt: on


class TemplateLimitError(TemplateError):
    """A template that computes too much, or uses what it must not."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new rendering."""
        self._left = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, units: int) -> None:
        """Take `units` off: STEP_COST for a step, its size for a value.

        Raises:
            TemplateLimitError: nothing is left, or the time is up.
        """
        self._left -= units
        if self._left < 0:
            raise TemplateLimitError("it loops too often or makes values that are too large")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it runs longer than {MAX_SECONDS:g} seconds")

    def measured(self, value: Value) -> Value:
        """Return `value` after spending its size.

        Raises:
            TemplateLimitError: the value is too large.
        """
        size = 0
        pending = [value]
        while pending:
            item = pending.pop()
            size += ELEMENT_COST
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, int):
                if abs(item) >= MAX_INTEGER:
                    raise TemplateLimitError("it computes an integer of more than 64 bits")
            else:
                pending += _parts(item)
            if size + ELEMENT_COST * len(pending) > MAX_SIZE:
                raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} units")
        self.spend(size)
        return value

    def counted(self, values: Iterable[Value]) -> Iterator[Value]:
        """Yield `values`, spending a step for each."""
        for value in values:
            self.spend(STEP_COST)
            yield value


def _parts(value: Value) -> Iterable[Value]:
    """Return what a container holds."""
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    return [*value, *value.values()] if isinstance(value, dict) else ()


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled and rendered in.

    Args:
        now: the time for strftime_now.
    """

    intercepted_binops = frozenset(["*", "%", "**"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # the optimizer would compute constants outside of the budget
            auto_reload=False,
            cache_size=0,
            extensions=["jinja2.ext.loopcontrols"],
        )
        self.budget = Budget()
        self.filters = {name: self.filters[name] for name in FILTERS} | {
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            "budget_counted": self.budget.counted,
            "budget_measured": self._measured,
        }
        self.globals = {
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "range": _limited_range,
            "strftime_now": lambda form: now().strftime(str(form)[:200]),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, refuse what a checkpoint's template must not do, and add the budget."""
        tree = super()._parse(source, name, filename)
        for found in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            kind = type(found).__name__.lower()
            raise TemplateLimitError(f"line {found.lineno} uses {kind!r}, which reads files")
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise TemplateLimitError(f"line {loop.lineno} has a recursive loop")
        _BudgetNodes().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Value, attr: str, value: Value) -> bool:
        """Allow the harmless methods of built-in types, and what Jinja allows of others."""
        for kind, methods in METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Value) -> None:
        """Offer no str.format: its widths make texts of any length."""

    def call(self, context: Context, called: Value, /, *args: Value, **kwargs: Value) -> Value:
        """Call what a template calls; `replace` and `join` of texts within the budget."""
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return self._replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            return self._join(args[0], owner)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Value, right: Value) -> Value:
        """Compute an operator, unless its result could be huge."""
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("it formats a text with %")
        if operator == "**" and abs(right) > 64:
            raise TemplateLimitError("it computes a large power")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if not isinstance(value, int | float) and len(value) * times > MAX_SIZE:
                    raise TemplateLimitError(f"it repeats a value {times} times")
        return super().call_binop(context, operator, left, right)

    @pass_context  # or Jinja would compute it for constants when it compiles, and spend nothing
    def _measured(self, context: Context, value: Value) -> Value:
        del context
        return self.budget.measured(value)

    def _replace(self, value: Value, old: Value, new: Value, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        found = text.count(old)
        times = found if count is None or count < 0 else min(count, found)
        self._check_size(len(text) + times * len(new))
        return text.replace(old, new, times)

    def _join(self, values: Iterable[Value], separator: Value = "") -> str:
        between = str(separator)
        parts: list[str] = []
        size = 0
        for value in self.budget.counted(values):
            parts.append(str(self.budget.measured(value)))
            size += len(parts[-1]) + len(between)
            self._check_size(size)
        return between.join(parts)

    def _tojson(self, value: Value, ensure_ascii: bool = False, indent: int | None = None) -> str:
        """Write JSON without HTML escapes, as the authors of chat templates expect it."""
        if indent is not None and not 0 <= indent <= 16:
            raise TemplateLimitError(f"it indents JSON by {indent}")
        return json.dumps(self.budget.measured(value), ensure_ascii=ensure_ascii, indent=indent)

    def _check_size(self, size: int) -> None:
        if size > MAX_SIZE:
            raise TemplateLimitError(f"it makes a text of more than {MAX_SIZE:,} characters")


MAKERS = (
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Pow, nodes.Concat),
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Filter, nodes.Call),
)
"""Expressions that make a value larger than those they are given."""


class _BudgetNodes(NodeTransformer):
    """Wraps loops and every expression that makes a value in the filters that spend."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - named after the node
        self.generic_visit(node)
        node.iter = _filtered("budget_counted", node.iter)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:  # noqa: N802
        self.generic_visit(node.call)  # the call itself must stay a call
        node.body = [self.visit(child) for child in node.body]
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_filtered("budget_measured", child) for child in node.nodes]
        return node

    def visit(self, node: nodes.Node, *args: Value, **kwargs: Value) -> nodes.Node:
        found: nodes.Node = super().visit(node, *args, **kwargs)
        stored = isinstance(found, nodes.Tuple) and found.ctx != "load"
        return (
            _filtered("budget_measured", found)
            if isinstance(found, MAKERS) and not stored
            else found
        )


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _limited_range(*bounds: int) -> range:
    values = range(*bounds)
    try:
        fits = len(values) <= MAX_RANGE
    except OverflowError:
        fits = False
    if not fits:
        raise TemplateLimitError(f"it asks for {values}, more than {MAX_RANGE:,} numbers")
    return values


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message)[:500])
