"""Flags of train.py and eval.py: absl's parser, with errors that a person can act on.

``ml_collections`` reads ``--config=<file>[:argument]`` and ``--config.<field>=<value>``; here is what it does not do:
say in one line which file or field is wrong and what was probably meant.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from .. import errors
from .config import flatten

_OVERRIDE = re.compile(r"--?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_FILE = re.compile(r"--?config(?:=(.*))?", re.DOTALL)


def parse(argv: Sequence[str], default: str | None = None) -> list[str]:
    """For the ``flags_parser`` of ``app.run``: what is left of ``argv``; a wrong flag ends the program in one line.

    Args:
      argv: the program and its arguments.
      default: config file when ``--config`` is absent.
    """
    argv = list(argv)
    if default is not None and _named_file(argv) is None:
        argv.insert(1, f"--config={default}")
    try:
        return _parse(argv)
    except (ValueError, flags.Error) as error:
        sys.exit(f"error: {error}")


def _parse(argv: list[str]) -> list[str]:
    holder = flags.FLAGS["config"]
    filename = _named_file(argv)
    if filename:
        config = _load(holder, filename)
        for argument in argv[1:]:
            override = _OVERRIDE.fullmatch(argument)
            if override:
                _check_field(config, override[1])
    try:
        rest = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        raise _wrong_type(config if filename else {}, error) from error
    if filename:
        _check_elements(config, flags.FLAGS["config"].value)
    return rest


def _named_file(argv: Sequence[str]) -> str | None:
    for place, argument in enumerate(argv):
        found = _FILE.fullmatch(argument)
        if found:
            return found[1] if found[1] is not None else next(iter(argv[place + 1 :]), None)
    return None


def _load(holder: flags.Flag, filename: str) -> Any:
    """The config of a file before any override."""
    path = pathlib.Path(filename.split(":", 1)[0])
    if not path.is_file():
        here = sorted(str(file) for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise errors.unknown("config file", str(path), here)
    try:
        loaded = holder.parser.parse(filename)
        len(loaded)  # a file that failed to load says so at its first use
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"config file {filename}: {_last_line(error)}") from error
    return loaded


def _check_field(config: Any, name: str) -> None:
    node = config
    done: list[str] = []
    for part in name.split("."):
        key, _, _ = part.partition("[")
        if not isinstance(node, Mapping) and not hasattr(node, "keys"):
            raise ValueError(f"config.{'.'.join(done)} has no fields of its own, so config.{name} cannot be set.")
        if key not in node:
            where = ".".join(["config", *done])
            raise errors.unknown("config field", f"{where}.{key}", [f"{where}.{field}" for field in node])
        node = node[key]
        done.append(part)


def _wrong_type(config: Any, error: flags.IllegalFlagValueError) -> ValueError:
    found = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL)
    if found is None:
        return ValueError(_last_line(error))
    node = config
    for part in found[1].split("."):
        node = node[part]
    wanted = "a group of fields" if hasattr(node, "keys") else f"{type(node).__name__}, such as {node!r}"
    return ValueError(f"config.{found[1]}={found[2]!r} has the wrong type: it takes {wanted}.")


def _check_elements(before: Any, after: Any) -> None:
    """Tuples keep the type of their elements: ``(64, 128)`` does not become ``("a",)``."""
    old, new = flatten(before.to_dict()), flatten(after.to_dict())
    for name, value in new.items():
        example = old.get(name)
        if not isinstance(example, tuple) or not example or not isinstance(value, tuple):
            continue
        accepted = {type(element) for element in example}
        accepted |= {int} if float in accepted else set()
        for element in value:
            if type(element) not in accepted:
                raise ValueError(f"config.{name}={value!r} has the wrong type: it takes a tuple such as {example!r}.")


def _last_line(error: Exception) -> str:
    """The sentence of an error whose text holds a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Pass --help")]
    return lines[-1].removeprefix("ValueError: ") if lines else type(error).__name__
