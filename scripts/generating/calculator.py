"""The tool of the chat's demo: arithmetic, without Python's `eval`."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARS = 1000
# Powers grow fast: 9 ** 9 ** 9 would fill the memory.
MAX_POWER_BITS = 4096
MAX_ROUND_DIGITS = 1000
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "round": lambda number, digits=0: _round(number, digits),
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "sin", "cos", "tan")},
}
CONSTANTS = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """
    Evaluate an arithmetic expression.

    Args:
        expression: What to evaluate, for example "2 + 3".
    """
    # The docstring is what the model is told; what it does not say is told by the errors.
    if len(expression) > MAX_CHARS:
        raise ValueError(f"expression has {len(expression)} characters; allowed: {MAX_CHARS}")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value)
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no expression ({error.msg})") from None
    except (ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r}: {error or type(error).__name__}") from None


def _value(node: ast.expr) -> Any:
    """A number."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(op=ast.Pow()):
            return _power(_value(node.left), _value(node.right))
        case ast.BinOp() if type(node.op) in BINARY:
            return BINARY[type(node.op)](_value(node.left), _value(node.right))
        case ast.UnaryOp() if type(node.op) in UNARY:
            return UNARY[type(node.op)](_value(node.operand))
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
            return _call(name, [_value(argument) for argument in node.args])
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed: numbers, + - * / // % **, parentheses, "
        f"{', '.join([*CONSTANTS, *FUNCTIONS])}"
    )


def _call(name: str, arguments: list[Any]) -> Any:
    try:
        return FUNCTIONS[name](*arguments)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def _round(number: Any, digits: Any) -> Any:
    if not isinstance(digits, int) or abs(digits) > MAX_ROUND_DIGITS:
        raise ValueError(f"digits is {digits}; allowed: at most {MAX_ROUND_DIGITS}")
    return round(number, digits) if digits else round(number)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int):
        if base.bit_length() * abs(exponent) > MAX_POWER_BITS:
            raise ValueError(f"{base} ** {exponent} is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError(f"{base} ** {exponent} is no real number")
    return result
