"""Errors that say what was wrong, the value, what is accepted and the nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def unknown(what: str, value: Any, accepted: Iterable[Any]) -> ValueError:
    """A ``ValueError`` for a name outside a closed set: ``unknown("loss", "l3", ("l1", "l2"))``."""
    names = [str(name) for name in accepted]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {what} {value!r}.{hint} Accepted: {', '.join(names) or 'none'}.")


def pick(what: str, value: Any, table: dict) -> Any:
    """``table[value]``, or the error of `unknown`."""
    if value not in table:
        raise unknown(what, value, table)
    return table[value]
