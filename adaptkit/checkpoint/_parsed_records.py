"""Checks of dataclasses that are built from parsed JSON, which can hold any types."""

import re
from dataclasses import fields
from functools import cache
from typing import Any


def reason(error: Exception) -> str:
    """Describe an error from building a record of a document's entries, without names from the Python code."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    unknown = re.search("unexpected keyword argument (.*)", str(error))
    missing = re.search("missing .* arguments?: (.*)", str(error))
    return f"unknown key {unknown[1]}" if unknown else f"missing: {missing[1]}" if missing else str(error)


def typed(record: Any) -> Any:
    """Return the record if its fields have their declared types, which parsed JSON does not guarantee.

    Raises:
        TypeError: names the field.
    """
    for name, kind in _types(record.__class__):
        value = getattr(record, name)
        if kind == tuple[int, ...]:
            fits = isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)
        else:
            fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits:
            raise TypeError(f"{name} is {value!r}")
    return record


@cache
def _types(record: type) -> tuple[tuple[str, Any], ...]:
    return tuple((part.name, part.type) for part in fields(record))
