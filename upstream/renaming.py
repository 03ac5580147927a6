"""Transformers' functions with other things under the names that they look up.

A class that a function finds by its global name cannot be replaced in Transformers' module, where
every model would get it.
"""

import functools
import types
from collections.abc import Callable
from typing import Any


def with_names(function: Any, **names: Any) -> Callable[..., Any]:
    """A function's code with other things under these global names of its module."""
    code = function.__code__
    missing = set(names) - set(code.co_names)
    if missing:
        raise AttributeError(f"{function.__qualname__} does not use {missing}")
    known = {**function.__globals__, **names}
    made = types.FunctionType(
        code, known, argdefs=function.__defaults__, closure=function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(made)
