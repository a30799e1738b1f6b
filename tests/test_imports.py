"""The arrows of docs/architecture.md: who may import whom."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "tokenizers"
FOUNDATION = {"errors", "types", "pixels"}
ALLOWED = {
    "errors": set(),
    "types": set(),
    "pixels": {"types"},
    "parallel": FOUNDATION,
    "nn": FOUNDATION | {"parallel"},
    "quantize": FOUNDATION | {"parallel", "nn"},
    "models": FOUNDATION | {"parallel", "nn", "quantize"},
    "registry": FOUNDATION | {"models", "quantize", "convert"},
    "convert": {"errors", "types"},
    "networks": FOUNDATION | {"parallel", "nn", "convert"},
    "discriminators": FOUNDATION | {"parallel", "nn"},
    "losses": {"errors", "pixels", "networks"},
    "generators": FOUNDATION | {"parallel", "nn", "convert", "registry"},
    "data": {"errors"},
    "captions": set(),
    "bands": FOUNDATION | {"parallel", "nn", "tiling"},
    "streaming": FOUNDATION | {"parallel", "nn", "bands"},
    "tiling": FOUNDATION,
    "api": FOUNDATION | {"captions", "registry", "streaming", "tiling", "parallel", "convert"},
    "loading": FOUNDATION | {"api", "registry", "parallel", "convert", "generators", "train"},
    "generation": FOUNDATION | {"parallel", "nn", "networks", "data", "loading", "generators", "evaluate", "train"},
    "scaling": {"errors", "train"},
    "media": {"errors", "data"},
    "commands": FOUNDATION | {"media", "api", "data", "parallel"},
    "evaluate": FOUNDATION | {"captions", "parallel", "networks", "convert", "data", "loading", "losses"},
    "train": FOUNDATION
    | {
        "parallel",
        "nn",
        "registry",
        "captions",
        "api",
        "loading",
        "discriminators",
        "generators",
        "losses",
        "networks",
        "data",
        "evaluate",
    },
    "__init__": set(),
    "__main__": {"media", "registry", "loading", "parallel", "commands"},
}


def _files():
    return sorted(PACKAGE.rglob("*.py"))


def _part(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: pathlib.Path):
    """(part of our package or None, top-level module or None) of every import, those inside functions too."""
    depth = len(path.relative_to(PACKAGE).parts)  # a relative import of this level leaves the package's root
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield None, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield None, node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            for name in [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]:
                yield name, None


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    part = _part(path)
    for ours, theirs in _imports(path):
        if ours is not None and ours != part:
            assert ours in ALLOWED[part], f"{path} imports {ours}; {part} may import {sorted(ALLOWED[part])}"
        assert theirs not in ("tokenizers", "configs", "tests"), f"{path} imports {theirs} absolutely"
        if part == "data":
            assert theirs not in ("jax", "flax", "optax", "chex"), f"{path}: worker processes must not start jax"
        if theirs == "orbax":
            assert path == PACKAGE / "train" / "checkpoint.py", f"{path} imports orbax"


def test_every_part_has_its_arrows():
    assert {_part(path) for path in _files()} == set(ALLOWED)
