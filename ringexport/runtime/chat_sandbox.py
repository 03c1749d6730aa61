"""A Jinja environment for templates that nobody has vetted: no files, no attributes, no blow-up.

Jinja's own sandbox refuses unsafe attributes and changes to arguments. This one also allows only
harmless filters and methods, and has a budget (`chat_budget`): every loop turn, filter, call,
test, comparison and subscript costs a step and the size of what it reads, and every value that is
made or put out costs its size. Operations whose time is not linear in those sizes are replaced or
refused, so neither endless loops, nor values that double with each turn, nor a single call runs
far.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import ignore_case, make_attrgetter
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.runtime import TemplateReference as Blocks
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from ringexport.runtime.chat_budget import (
    MAX_INTEGER,
    MAX_SIZE,
    MAX_WORK,
    Budget,
    TemplateLimitError,
)

__all__ = ["ChatEnvironment", "TemplateLimitError"]

Value = Any  # whatever a template computes

MAX_RANGE = 10_000
MAX_DIGITS = 20
"""Digits that `round` takes; jinja's own raises 10 to their power."""

# fmt: off
FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "groupby", "int", "items", "last", "length", "list", "lower", "map",
    "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr",
    "sort", "string", "title", "trim", "upper", "wordcount",
})
METHODS: dict[Any, frozenset[str]] = {
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
    tuple: frozenset({"count", "grouper", "index", "list"}),  # two are those of `groupby`
}
# fmt: on
QUADRATIC = frozenset(
    {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"}
)
"""Of strings: CPython's time for these is the product of both lengths."""
CONSTANT_TIME = frozenset({"count", "d", "default", "first", "last", "length"})
SLOW_TEXT = frozenset({"title", "wordcount"})
"""Linear, but with regular expressions: a character costs twenty times as much as elsewhere."""
SUBSCRIPT_COST = 256
MACRO_COST = 2048
MAX_NODES = 10_000
MAX_STATEMENTS = 1_500
"""Of the syntax tree: Jinja's compiler takes time in proportion to their square."""
OPEN_TYPES = (BlockReference, Blocks, LoopContext, Macro, Namespace, Undefined)
"""Besides those of METHODS, the only types whose attributes Jinja's sandbox may give away."""
SCALARS = (str, int, float, type(None))


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are compiled and rendered in.

    Args:
        now: the time for strftime_now.
    """

    intercepted_binops = frozenset(["*", "%", "**", "-"])

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
        own = {
            "join": self._join,
            "replace": self._replace,
            "round": _round,
            "tojson": self._tojson,
            "unique": self._unique,
        }
        allowed: dict[str, Value] = dict(self.filters)
        allowed = {name: allowed[name] for name in FILTERS} | own
        self.filters = {name: self._guarded(name, made) for name, made in allowed.items()} | {
            "budget_counted": self.budget.counted,
            "budget_key": _scalar_key,
            "budget_measured": self._measured,
            "budget_read": self._read,
        }
        tests: dict[str, Value] = dict(self.tests)
        self.tests = {name: self._guarded(name, test) for name, test in tests.items()}
        self.globals = {
            "dict": _dict,
            "namespace": lambda *args, **values: Namespace(_dict(*args, **values)),
            "raise_exception": _raise_exception,
            "range": _limited_range,
            "strftime_now": lambda form: now().strftime(str(form)[:200]),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, refuse what a checkpoint's template must not do, and add the budget."""
        tree = super()._parse(source, name, filename)
        for kind, limit, what in (
            (nodes.Node, MAX_NODES, "expressions"),
            (nodes.Stmt, MAX_STATEMENTS, "statements"),
        ):
            if sum(1 for _ in tree.find_all(kind)) > limit:
                raise TemplateLimitError(f"it has more than {limit:,} {what}")
        for found in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            tag = type(found).__name__.lower()
            raise TemplateLimitError(f"line {found.lineno} uses {tag!r}, which reads files")
        for found in tree.find_all(nodes.EvalContextModifier):
            # Jinja computes its condition when it compiles, outside of the budget.
            raise TemplateLimitError(f"line {found.lineno} uses 'autoescape'")
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise TemplateLimitError(f"line {loop.lineno} has a recursive loop")
        for constant in tree.find_all(nodes.Const):
            if isinstance(constant.value, int) and abs(constant.value) >= MAX_INTEGER:
                raise TemplateLimitError(f"line {constant.lineno} has an integer of over 64 bits")
        _BudgetNodes().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Value, attr: str, value: Value) -> bool:
        """Allow the harmless methods of built-in types, and what Jinja allows of its own."""
        for kind, methods in METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return isinstance(obj, OPEN_TYPES) and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Value, argument: Value) -> Value:
        """Subscript at a price; `map(attribute="a.b.c")` and its like come here too."""
        self.budget.spend(SUBSCRIPT_COST)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Value) -> None:
        """Offer no str.format: its widths make texts of any length."""

    def call(self, context: Context, called: Value, /, *args: Value, **kwargs: Value) -> Value:
        """Call what a template calls; methods of texts within the budget."""
        self.budget.step(*args, *kwargs.values())
        if isinstance(called, Macro):
            self.budget.spend(MACRO_COST)
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str):
            self._charge_text(name, owner, args, kwargs)
            if name == "replace":
                return self._replace(owner, *args, **kwargs)
            if name == "join":
                return self._join(args[0], owner)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Value, right: Value) -> Value:
        """Compute an operator, unless its result could be huge."""
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("it formats a text with %")
        if operator == "-" and not (_is_number(left) and _is_number(right)):
            raise TemplateLimitError("it subtracts what is no number")
        if operator == "**" and abs(right) > 64:
            raise TemplateLimitError("it computes a large power")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if not isinstance(value, int | float) and len(value) * times > MAX_SIZE:
                    raise TemplateLimitError(f"it repeats a value {times} times")
        return super().call_binop(context, operator, left, right)

    def _guarded(self, name: str, made: Callable[..., Value]) -> Callable[..., Value]:
        """Wrap a filter or test: it pays for what it reads, and a filter for what it makes.

        `map` and `select` reach filters and tests by name, so the wrapping is here and not in the
        template's syntax tree.
        """

        @functools.wraps(made)  # keeps Jinja's mark for filters that take the environment
        def guarded(*args: Value, **kwargs: Value) -> Value:
            given = args[1:] if hasattr(made, "jinja_pass_arg") else args
            read = given[1:] if name in CONSTANT_TIME else given
            self.budget.step(*read, *kwargs.values())
            if name in QUADRATIC and given:
                self._charge_text(name, str(self.budget.measured(given[0])), given[1:], kwargs)
            if name in SLOW_TEXT:
                self.budget.spend(20 * len(str(self.budget.measured(given[0]))))
            if name in {"string", "safe", "e", "escape"}:
                self.budget.measured(given[0])  # the text of a container has all it holds
            result = made(*args, **kwargs)
            if isinstance(result, Iterator):
                return self.budget.counted(result)
            return result if name in CONSTANT_TIME else self.budget.measured(result)

        return guarded

    def _charge_text(
        self, name: str, text: str, args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> None:
        """Spend what a method of a text reads, and refuse those that would take too long."""
        self.budget.step(text)
        if name not in QUADRATIC:
            return
        lengths = [len(value) for value in (*args, *kwargs.values()) if isinstance(value, str)]
        pairs = len(text) * max(lengths, default=0)
        if pairs > MAX_WORK:
            raise TemplateLimitError(f"it calls {name!r} with texts that are too long")
        self.budget.spend(pairs // 16)

    @pass_context  # or Jinja would compute it for constants when it compiles, and spend nothing
    def _measured(self, context: Context, value: Value) -> Value:
        del context
        return self.budget.measured(value)

    @pass_context
    def _read(self, context: Context, value: Value) -> Value:
        del context
        self.budget.step(value)
        return value

    def _replace(self, value: Value, old: Value, new: Value, count: int | None = None) -> str:
        text, old, new = (str(self.budget.measured(part)) for part in (value, old, new))
        found = text.count(old)
        times = found if count is None or count < 0 else min(count, found)
        self._check_size(len(text) + times * len(new))
        return text.replace(old, new, times)

    def _join(self, values: Iterable[Value], separator: Value = "") -> str:
        between = str(self.budget.measured(separator))
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
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent)
        parts: list[str] = []
        size = 0
        for part in encoder.iterencode(self.budget.measured(value)):
            size += len(part)
            self._check_size(size)
            parts.append(part)
        return "".join(parts)

    def _unique(
        self,
        values: Iterable[Value],
        case_sensitive: bool = False,
        attribute: str | int | None = None,
    ) -> Iterator[Value]:
        """Yield the first of equal values; keys must be scalars, see `_scalar_key`."""
        postprocess = None if case_sensitive else ignore_case
        getter = make_attrgetter(self, attribute, postprocess=postprocess)
        seen = set()
        for value in self.budget.counted(values):
            key = _scalar_key(getter(value))
            if key not in seen:
                seen.add(key)
                yield value

    def _check_size(self, size: int) -> None:
        if size > MAX_SIZE:
            raise TemplateLimitError(f"it makes a text of more than {MAX_SIZE:,} characters")
        self.budget.spend(0)


MAKERS = (
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Pow, nodes.Concat),
    *(nodes.List, nodes.Tuple, nodes.Dict, nodes.Filter, nodes.Call),
)
"""Expressions that make a value larger than those they are given."""


class _BudgetNodes(NodeTransformer):
    """Wraps loops and every expression that reads or makes a value in the filters that spend."""

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

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:  # noqa: N802
        self.generic_visit(node)  # it can have thousands of operands, so each pays first
        node.nodes = [_filtered("budget_measured", child) for child in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        node.expr = _filtered("budget_read", node.expr)
        for operand in node.ops:
            operand.expr = _filtered("budget_read", operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:  # noqa: N802
        self.generic_visit(node)
        node.key = _filtered("budget_key", node.key)
        return node

    def visit(self, node: nodes.Node, *args: Value, **kwargs: Value) -> nodes.Node:
        found: nodes.Node = super().visit(node, *args, **kwargs)
        stored = isinstance(found, nodes.Tuple) and found.ctx != "load"
        if isinstance(found, MAKERS) and not stored:
            return _filtered("budget_measured", found)
        if isinstance(found, nodes.Getitem) and isinstance(found.arg, nodes.Slice):
            return _filtered("budget_read", found)
        return found


def _filtered(name: str, node: nodes.Node) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float)


def _scalar_key(value: Value) -> Value:
    """Return a key of a dictionary; tuples are refused, whose hashes can be made to collide."""
    if not isinstance(value, SCALARS):
        raise TemplateLimitError(f"it uses a {type(value).__name__} as a key")
    return value


def _dict(*pairs: Iterable[tuple[Value, Value]], **values: Value) -> dict[Value, Value]:
    """Return a dictionary of an iterable of pairs or a dictionary, and of keywords."""
    result: dict[Value, Value] = {}
    for given in pairs:
        items = given.items() if isinstance(given, dict) else given
        result.update((_scalar_key(key), value) for key, value in items)
    return result | values


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    """Round as Jinja does, for numbers and up to MAX_DIGITS digits."""
    if not _is_number(value):
        raise TypeError(f"it rounds a {type(value).__name__}")
    if type(precision) is not int or abs(precision) > MAX_DIGITS:
        raise TemplateLimitError(f"it rounds to {str(precision)[:40]} digits")
    if method == "common":
        return round(value, precision)
    if method not in {"ceil", "floor"}:
        raise TypeError("it rounds by a method that is not common, ceil or floor")
    scale: float = 10**precision
    rounded = math.ceil(value * scale) if method == "ceil" else math.floor(value * scale)
    return rounded / scale


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
