"""Weights of other code as ours. One file per system, a TABLE of rules; `engine` applies it, `files` reads the weights.

The conversion file of a tokenizer has ``TABLE``, ``IGNORE`` (official names dropped on purpose) and
``fields_from_official(config)``, our model's fields from the authors' config; ``table_of(module)`` as well where names
depend on the fields of the model. Files without the last one belong to the
frozen networks of losses and metrics. Two more functions are optional: ``official_names(state_dict)`` brings other
layouts of names to the table's, ``fields_from_weights(module, state_dict)`` gives fields that only the tensors tell.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def systems() -> dict[str, ModuleType]:
    """The conversion files of tokenizers, by the name of their system."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    files = {name: importlib.import_module(f".{name}", __name__) for name in names}
    wanted = ("TABLE", "IGNORE", "fields_from_official")
    return {name: file for name, file in files.items() if all(hasattr(file, part) for part in wanted)}
