"""Weights of other code as ours. One file per system, a TABLE of rules; `engine` applies it, `files` reads the weights.

The conversion file of a tokenizer has ``TABLE``, ``IGNORE`` (official names dropped on purpose) and
``fields_from_official(config)``, our model's fields from the authors' config. Files without the last one belong to the
frozen networks of losses and metrics. Four more functions are optional: ``table_of(module)`` in place of TABLE where
fields of the model decide about names, ``official_names(state_dict)`` brings other layouts of names to the table's,
``fields_from_weights(module, state_dict)`` gives fields that only the tensors tell, and ``system_of(config)`` the
system of a config where the authors' name covers several networks.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from .. import errors
from . import engine


def systems() -> dict[str, ModuleType]:
    """The conversion files of tokenizers, by the name of their system."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    files = {name: importlib.import_module(f".{name}", __name__) for name in names}
    wanted = ("TABLE", "IGNORE", "fields_from_official")
    return {name: file for name, file in files.items() if all(hasattr(file, part) for part in wanted)}


def system(name: str) -> ModuleType:
    """The conversion file of a system.

    Raises:
      ValueError: for a system without one.
    """
    return errors.pick("system with official weights", name, systems())


def rules(file: ModuleType, module: Any) -> Any:
    """The table of a conversion file for a model."""
    return file.table_of(module) if hasattr(file, "table_of") else file.TABLE


def named(file: ModuleType, state_dict: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Official tensors under the names of the file's table."""
    return file.official_names(state_dict) if hasattr(file, "official_names") else state_dict


def variables(file: ModuleType, module: Any, shapes: Any, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Official tensors, `named`, as the variables of a model; ``shapes`` are those of its variables."""
    return engine.to_tree(rules(file, module), shapes, state_dict, ignore=file.IGNORE)


def settled(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a model whose codes also ``moved`` beside the optimizer, with the movement in the parameter.

    (``learning="clustering"`` of `quantize.vq`: official files hold the sum.)
    """

    def settle(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        params, kept = dict(params), {}
        for name, value in statistics.items():
            if name == "moved":
                params["codebook"] = params["codebook"] + value
            elif isinstance(value, Mapping) and name in params:
                params[name], kept[name] = settle(params[name], value)
            else:
                kept[name] = value
        return params, kept

    params, statistics = settle(variables["params"], variables.get("codebook", {}))
    return dict(variables) | {"params": params} | ({"codebook": statistics} if statistics else {})
