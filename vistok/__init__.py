"""``tokenizers`` under a name that Hugging Face's package of that name does not have: ``import vistok``."""

import importlib.util
import pathlib
import sys

_folder = pathlib.Path(__file__).resolve().parent.parent / "tokenizers"
_spec = importlib.util.spec_from_file_location(
    __name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
)
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
