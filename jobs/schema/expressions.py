"""Linked values: `lora_alpha: "2*lora_r"`, computed by walking a syntax tree and never by `eval`."""

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
    """The syntax tree of an arithmetic expression; ValueError with a sentence when it is anything else.

    Numbers, dotted names, + - * / //, unary minus, parentheses, min, max and round. No power: `9**9**9` is a hang.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"an expression may be {_MAX_LENGTH} characters long, this one has {len(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r} is not an arithmetic expression") from error
    _check(tree, text)
    return tree


def names(tree: ast.expr) -> set[str]:
    """The dotted names that an expression reads."""
    if isinstance(tree, ast.Name | ast.Attribute):
        return {_dotted(tree)}
    if isinstance(tree, ast.Call):
        return set().union(*(names(argument) for argument in tree.args))
    return set().union(*(names(child) for child in ast.iter_child_nodes(tree) if isinstance(child, ast.expr)), set())


def evaluate(tree: ast.expr, values: Mapping[str, Number]) -> Number:
    """The value of a parsed expression. A whole result of whole numbers stays an int (`lora_r/2` with 16 is 8)."""
    result = _value(tree, values)
    return int(result) if isinstance(result, float) and result.is_integer() else result


def _value(tree: ast.expr, values: Mapping[str, Number]) -> Number:
    match tree:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name() | ast.Attribute():
            return values[_dotted(tree)]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=function), args=arguments):
            return _FUNCTIONS[function](*(_value(argument, values) for argument in arguments))
    raise ValueError(f"{ast.unparse(tree)} cannot be evaluated")


def _check(tree: ast.expr, text: str) -> None:
    match tree:
        case ast.Constant(value=value) if isinstance(value, int | float) and not isinstance(value, bool):
            return None
        case ast.Name() | ast.Attribute():
            _dotted(tree)
            return None
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _check(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            _check(left, text)
            return _check(right, text)
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if function in _FUNCTIONS and arguments:
            for argument in arguments:
                _check(argument, text)
            return None
    raise ValueError(f"{text!r} may hold numbers, field names, + - * / //, parentheses, min, max and round")


def _dotted(tree: ast.expr) -> str:
    if isinstance(tree, ast.Name):
        return tree.id
    if isinstance(tree, ast.Attribute):
        return f"{_dotted(tree.value)}.{tree.attr}"
    raise ValueError(f"{ast.unparse(tree)} is not a field name")
