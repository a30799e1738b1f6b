"""Visual tokenizers in JAX: the public names, and nothing else, are listed here.

Names are imported on first use, so that ``tokenizers.data`` can be used in worker processes without starting JAX.
"""

import importlib

_PUBLIC = {
    "available": ".registry",  # names of the released variants
    "describe": ".registry",  # facts about one of them
    "create": ".loading",  # random weights
    "load": ".loading",  # a training run, a saved folder or an official weight file
    "from_official": ".loading",  # an official config and state dict
    "Tokenizer": ".api",
    "Encoding": ".types",
    "Spec": ".types",
    "Variant": ".types",
}

__all__ = sorted(_PUBLIC)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_PUBLIC))
