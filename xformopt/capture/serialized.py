"""Judge the JSON of a serialized graph by what its reader would evaluate.

`torch.export.load` does more with this text than parse it: shape expressions go through an evaluator, guards
and value names become Python source, targets are looked up by attribute from `torch` and called, tree specs
may import modules. So every string must be of a harmless form, or be one of the few never evaluated.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

__all__ = ["Unsafe", "check_graph"]

PLAIN = re.compile(r"[\w.@+\- /]*")
# never evaluated: shown to people, or passed to an operator as the constant it is
FREE = frozenset({"metadata", "as_string", "as_strings"})
NAMESPACES = ("aten", "prims", "quantized_decomposed", "torchvision", "xf")
HIGHER_ORDER = ("cond", "map_impl", "scan", "while_loop", "wrap_with_autocast", "wrap_with_set_grad_enabled")
OPERATORS = re.compile(
    rf"torch\.ops\.({'|'.join(NAMESPACES)})\.(?!from_file)\w+\.\w+"
    rf"|torch\.ops\.higher_order\.({'|'.join(HIGHER_ORDER)})"
    r"|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift|getitem)"
    r"|math\.(trunc|floor|ceil|sqrt)"
    r"|torch\.sym_(not|int|float|ite|max|min|sqrt|sum)"
)
SYMPY = (
    "Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Lt Le Gt Ge And Or Not Piecewise "
    "Equality Unequality LessThan GreaterThan StrictLessThan StrictGreaterThan"
)
TORCH_SYMPY = (
    "FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift Identity "
    "PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat"
)
PYTHON = "max min int float round abs size stride storage_offset dim trunc floor ceil sqrt"
FUNCTIONS = frozenset(f"{SYMPY} {TORCH_SYMPY} {PYTHON}".split())
SYNTAX = (
    ast.Expression,
    ast.expr_context,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.Subscript,
    ast.Name,
    ast.Constant,
    ast.keyword,
    ast.Tuple,
)
LONGEST = 20_000


class Unsafe(Exception):  # noqa: N818
    """A value that a reader would do more with than read; `str()` says which."""


def check_graph(graph: Any) -> None:
    """Check a parsed ``models/<name>.json``.

    Raises:
        Unsafe: A string in it could be evaluated as something other than a name, a size or an operator.

    """
    _check_value(graph, "the graph")


def _check_value(value: Any, key: str) -> None:
    if key in FREE and _is_remark(value):
        return
    if isinstance(value, dict):
        _check_dict(value, key)
    elif isinstance(value, list):
        for item in value:
            _check_value(item, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_dict(value: dict[str, Any], key: str) -> None:
    if key == "range_constraints":
        for expression, bounds in value.items():
            _check_expression(expression, key)
            _check_value(bounds, "bounds")
        return
    for name, item in value.items():
        _check_plain(name, key)
        _check_value(item, name)


def _is_remark(value: Any) -> bool:
    """Tell whether a free field holds only text: a value may bear such a name, but hides nothing by it."""
    if isinstance(value, dict):
        return all(isinstance(item, str) and not name.startswith("as_") for name, item in value.items())
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _check_text(text: str, key: str) -> None:
    if key in ("expr_str", "guards_code"):
        _check_expression(text, key)
    elif key in ("in_spec", "out_spec"):
        _check_tree(text, key)
    elif key in ("target", "as_operator"):
        if not OPERATORS.fullmatch(text):
            raise Unsafe(f'the operator "{_short(text)}", which is not one that computes on tensors or sizes')
    else:
        _check_plain(text, key)


def _check_plain(text: str, key: str) -> None:
    if not PLAIN.fullmatch(text):
        raise Unsafe(f'the text "{_short(text)}" in "{key}", where a plain name belongs')


def _check_tree(text: str, key: str) -> None:
    try:
        version, tree = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise Unsafe(f'the text "{_short(text)}" in "{key}", which is not a tree of containers') from error
    if version != 1:
        raise Unsafe(f'the version {_short(str(version))} in "{key}", which is not known')
    _check_node(tree, key)


def _check_node(tree: Any, key: str) -> None:
    """Check one container. torch knows only registered types; two ways to name one import a module."""
    kind, context = (tree.get("type"), tree.get("context")) if isinstance(tree, dict) else (tree, None)
    if kind == "collections.defaultdict" or not isinstance(kind, str | None):
        raise Unsafe(f'the container "{_short(str(kind))}" in "{key}", which could import a module')
    try:
        context = json.loads(context) if isinstance(context, str) else context
    except (ValueError, RecursionError) as error:
        raise Unsafe(f'the text "{_short(str(context))}" in "{key}", which is not JSON') from error
    if _names_enumeration(context):
        raise Unsafe(f'an enumeration in "{key}", which would import a module')
    for child in tree.get("children_spec", []) if isinstance(tree, dict) else []:
        _check_node(child, key)


def _names_enumeration(value: Any) -> bool:
    if isinstance(value, dict):
        return "__enum__" in value or any(map(_names_enumeration, value.values()))
    return isinstance(value, list) and any(map(_names_enumeration, value))


def _check_expression(text: str, key: str) -> None:
    """Accept arithmetic, comparisons and known functions over names, numbers and sizes; nothing else."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) <= LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or not all(_is_arithmetic(node) for node in ast.walk(tree)):
        raise Unsafe(f'the text "{_short(text)}" in "{key}", where an arithmetic expression belongs')


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _called(node.func) in FUNCTIONS
    if isinstance(node, ast.Attribute):
        return node.attr in FUNCTIONS
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or bool(PLAIN.fullmatch(node.value))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        # a tower of powers would take forever to evaluate
        exponent = node.right.value if isinstance(node.right, ast.Constant) else None
        return isinstance(exponent, int) and exponent <= 64
    return isinstance(node, SYNTAX)


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:80]}..."
