"""Evaluate linked values such as `lora_alpha: "2*lora_r"` without calling `eval`.

Job files come from other people. A text is parsed into a syntax tree, each node is
compared with a short list of allowed ones, and the evaluation knows only these. An
expression can therefore read numbers and compute, and nothing else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {"min": min, "max": max, "round": round}
_MAX_LENGTH = 200


def parse(text: str) -> ast.expr:
    """Return the syntax tree of an arithmetic expression.

    Numbers, dotted names, + - * / //, unary minus, parentheses, min, max and round are allowed.
    There is no power, because `9**9**9` would hang.

    Raises:
        ValueError: If the text is anything else.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(
            f"an expression may have at most {_MAX_LENGTH} characters, but this one has {len(text)}"
        )
    try:
        tree = ast.parse(text, mode="eval").body
    # ast.parse raises ValueError for null bytes, and RecursionError or MemoryError for deep
    # nesting.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an arithmetic expression") from error
    _check_node(tree, text)
    return tree


def find_names(tree: ast.expr) -> set[str]:
    """Return the dotted names that an expression reads.

    The names are as written, so `lora_r` and `lora.lora_r` differ;
    `field_paths.resolve_path` finds their fields. Names of functions are not included.
    """
    if isinstance(tree, ast.Name | ast.Attribute):
        return {_get_dotted_name(tree)}
    if isinstance(tree, ast.Call):
        return set().union(*(find_names(argument) for argument in tree.args))
    return set().union(
        *(find_names(child) for child in ast.iter_child_nodes(tree) if isinstance(child, ast.expr)),
        set(),
    )


def evaluate(tree: ast.expr, values: Mapping[str, Number]) -> Number:
    """Return the value of a parsed expression.

    A whole result is an int (`lora_r/2` with 16 is 8), because fields such as ranks take
    only integers.

    Args:
        tree: The result of `parse`.
        values: The value of every name that `find_names` returns.

    Raises:
        ZeroDivisionError: The expression divides by zero.
        OverflowError: The result is too large for a float.
    """
    result = _evaluate_node(tree, values)
    return int(result) if isinstance(result, float) and result.is_integer() else result


def _evaluate_node(tree: ast.expr, values: Mapping[str, Number]) -> Number:
    """Return the value of a node of a checked syntax tree."""
    match tree:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name() | ast.Attribute():
            return values[_get_dotted_name(tree)]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate_node(operand, values)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_evaluate_node(left, values), _evaluate_node(right, values))
        case ast.Call(func=ast.Name(id=function), args=arguments):
            return _FUNCTIONS[function](
                *(_evaluate_node(argument, values) for argument in arguments)
            )
    raise ValueError(f"{ast.unparse(tree)} cannot be evaluated")


def _check_node(tree: ast.expr, text: str) -> None:
    """Raise ValueError unless a syntax tree holds only what an expression may hold."""
    match tree:
        case ast.Constant(value=value) if isinstance(value, int | float) and not isinstance(
            value, bool
        ):
            return None
        case ast.Name() | ast.Attribute():
            _get_dotted_name(tree)
            return None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _check_node(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            _check_node(left, text)
            return _check_node(right, text)
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if (
            function in _FUNCTIONS and arguments
        ):
            for argument in arguments:
                _check_node(argument, text)
            return None
    raise ValueError(
        f"{text!r} may only contain numbers, field names, + - * / //, parentheses, min, max and "
        "round"
    )


def _get_dotted_name(tree: ast.expr) -> str:
    """Return the dotted name of a node. Raises ValueError for other nodes."""
    if isinstance(tree, ast.Name):
        return tree.id
    if isinstance(tree, ast.Attribute):
        return f"{_get_dotted_name(tree.value)}.{tree.attr}"
    raise ValueError(f"{ast.unparse(tree)} is not a field name")
