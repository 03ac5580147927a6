"""Settings of a command: one dataclass, whose fields are its flags and the keywords of its `main`.

A field's annotation decides how its flag is parsed: `int` takes 512, 4k or 1m, a `Sequence` takes
values separated by commas, a `bool` is a switch.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

SUFFIXES = {"k": 1 << 10, "m": 1 << 20}


def setting(
    default: Any,
    text: str = "",
    choices: Iterable[str] = (),
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    multiple: int = 1,
    **metadata: Any,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: Value of a flag that is not given.
        text: The flag's help.
        choices: Allowed names; of a sequence, of each entry.
        least, above, most, multiple: Allowed numbers; of a sequence, of each entry.
        **metadata: "metavar" and "parse" for argparse, "group" of the help; "name" of the flag if
            it is not the field's; "flag": False for a field without one; "recorded": False for one
            that `recorded` leaves out.
    """
    limits = {"least": least, "above": above, "most": most, "multiple": multiple}
    found = {"help": text, "choices": tuple(choices), **limits, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=found)
    return dataclasses.field(default=default, metadata=found)


def check_settings(settings: Any) -> None:
    """Raise ValueError for the first field whose value is not allowed."""
    for field in dataclasses.fields(settings):
        value, rules = getattr(settings, field.name), field.metadata
        if value is None:
            continue
        is_many = isinstance(value, Sequence) and not isinstance(value, str)
        if rules["choices"]:
            require_some(field.name, value if is_many else [value], rules["choices"])
        elif allowed := _allowed_numbers(rules):
            kind = "integers" if rules["least"] is not None else "numbers"
            text = f"one or more {kind} {_of(allowed)}".rstrip() if is_many else allowed
            values = value if is_many else [value]
            is_allowed = len(values) > 0 and all(_is_within(each, rules) for each in values)
            require(is_allowed, field.name, value, text)


def _of(allowed: str) -> str:
    return f"of {allowed}" if allowed.startswith("at least") else allowed


def _allowed_numbers(rules: Any) -> str:
    least, above, most = rules["least"], rules["above"], rules["most"]
    if rules["multiple"] > 1:
        return f"a multiple of {rules['multiple']} from {least} to {most}"
    if most is not None:
        return f"from {least} to {most}" if above is None else f"above {above} and at most {most}"
    if least is not None:
        return f"at least {least}"
    return "" if above is None else f"above {above}"


def _is_within(value: Any, rules: Any) -> bool:
    least, above, most = rules["least"], rules["above"], rules["most"]
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (rules["multiple"] == 1 or value % rules["multiple"] == 0)
    )


def recorded(settings: Any) -> dict[str, Any]:
    """The settings that a result's line tells."""
    fields = dataclasses.fields(settings)
    names = [field.name for field in fields if field.metadata.get("recorded", True)]
    return {name: getattr(settings, name) for name in names}


def require(is_allowed: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ValueError, naming the flag, unless the value is allowed."""
    if not is_allowed:
        raise ValueError(f"{flag_of(name)} {value!r} is not allowed: it must be {allowed}")


def require_some(name: str, values: Sequence[Any], allowed: Iterable[Any]) -> None:
    """Raise ValueError unless there is a value and each is one of those allowed."""
    allowed = tuple(allowed)
    names = ", ".join(str(choice) for choice in allowed)
    require(len(values) > 0, name, values, f"at least one of {names}")
    for value in values:
        require(value in allowed, name, value, f"one of {names}")


def flag_of(name: str) -> str:
    """A field's flag."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """A flag for each field, in the order of the dataclass, under the headings of its groups."""
    kinds, groups = typing.get_type_hints(settings), {}
    for field in dataclasses.fields(settings):
        if not field.metadata.get("flag", True):
            continue
        title = field.metadata.get("group", "")
        target = parser if not title else groups.get(title) or parser.add_argument_group(title)
        groups[title] = target
        options = _flag_options(field, kinds[field.name])
        flag = field.metadata.get("name", flag_of(field.name))
        target.add_argument(flag, dest=field.name, **{**options, "help": options["help"] or None})


def _flag_options(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    rules, text = field.metadata, field.metadata["help"].replace("%", "%%")
    kind = _without_none(kind)
    if kind is bool:
        is_on = field.default
        return {
            "action": argparse.BooleanOptionalAction if is_on else "store_true",
            "default": is_on,
            "help": text,
        }
    parse, metavar = _PARSERS.get(kind, (str, None))
    options = {"type": rules.get("parse", parse), "default": field.default}
    if rules["choices"] and metavar is None:
        return {**options, "choices": rules["choices"], "help": text}
    if rules["choices"]:
        text = f"{text}: {', '.join(rules['choices'])}".removeprefix(": ")
    return {**options, "metavar": rules.get("metavar", metavar), "help": text}


def _without_none(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return next(each for each in typing.get_args(kind) if each is not types.NoneType)
    return kind


def run_main(main: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """Call `main` with the command line's arguments; a ValueError is the user's mistake."""
    arguments = vars(parser.parse_args())
    try:
        main(**arguments)
    except ValueError as problem:
        parser.error(str(problem))


def command_parser(description: str | None, settings: type | None = None) -> Any:
    """A parser with the docstring as its description, and the flags of a settings dataclass."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if settings is not None:
        add_flags(parser, settings)
    return parser


def number(text: str) -> int:
    """An integer, perhaps in units of 1,024 ("k") or 1,048,576 ("m")."""
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    try:
        return factor * int(text if factor == 1 else text[:-1])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be an integer such as 512, 4k or 1m"
        ) from None


def numbers(text: str) -> tuple[int, ...]:
    """Integers separated by commas."""
    return tuple(number(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(text.split(","))


def floats(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be numbers separated by commas, such as 1e-3,5e-4"
        ) from None


# How a flag's text becomes a value, and what stands for the value in the help.
_PARSERS: dict[Any, tuple[Callable[[str], Any], str | None]] = {
    int: (number, "N"),
    float: (float, "X"),
    Sequence[int]: (numbers, "N,N"),
    Sequence[float]: (floats, "X,X"),
    Sequence[str]: (names, "NAMES"),
}
