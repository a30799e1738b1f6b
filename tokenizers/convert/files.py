"""Weight files as ``{name: array}``: .safetensors, .npz, PyTorch (.pth .pt .ckpt .bin, both layouts), TorchScript.

Needs neither PyTorch nor trust: pickles are read by an interpreter that knows tensors, plain containers and records
without behaviour, and refuses every other class by name. What a file is decides its content, not its suffix.

References for the layouts: https://github.com/huggingface/safetensors#format,
https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from ..errors import unknown
from .unpickle import REMEDY, TORCH_DTYPES, NumpyArray, Record, Refused, Storage, Tensor, Unpickler

# A checkpoint that is not itself a state dict holds it under one of these names.
WRAPPERS = ("state_dict", "model", "generator", "module", "model_state_dict", "params", "net", "autoencoder", "vae")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_state_dict(path: str | pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Every tensor of a weight file under its official name.

    Args:
      path: a .safetensors, .npz, PyTorch or TorchScript file.
      key: where in a checkpoint the state dict is, dots for nesting (``"ema.model"``). Without it, as long as there is
        one of `WRAPPERS` in what was read, it is entered; several of them side by side are refused with their names.

    Returns:
      Arrays in the dtypes of the file (bfloat16 and float8 as those of ml_dtypes). TorchScript archives give the
      parameters and buffers of the module tree as ``encoder.conv_in.weight``. A prefix ``module.`` or ``_orig_mod.``
      that all names share is taken off.

    Raises:
      ValueError: a truncated, foreign or unsafe file; names the file, the reason and the remedy.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"There is no weight file {str(path)!r}.")
    try:
        with contextlib.ExitStack() as stack:
            return _named_arrays(_select(_read(path, stack), key))
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except (
        ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError, MemoryError, struct.error,
        OSError, ImportError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        # Parsers of damaged files fail in all these ways; the reader needs the file and what to do about it.
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is truncated or not a weight file ({reason}). {REMEDY}") from error


def _read(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """The tree of objects in a file; what it opens for reading tensors later is closed with the stack."""
    file = stack.enter_context(path.open("rb"))
    head = file.read(64)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        archive = stack.enter_context(zipfile.ZipFile(file))
        names = archive.namelist()
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in archive.infolist()):
            raise Refused(f"a zip archive whose compression no weight file uses. {REMEDY}")
        if any(name.endswith("data.pkl") for name in names):
            return _read_torch_zip(archive, names)
        if all(name.endswith(".npy") for name in names):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        raise Refused(f"a zip archive, but neither PyTorch's nor NumPy's: it holds {', '.join(names[:4])}. {REMEDY}")
    if head.startswith(b"version https://git-lfs"):
        raise Refused("this is a Git LFS pointer, not the file it stands for. Fetch the real one with `git lfs pull`.")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(pickle.PROTO):
        return _read_torch_legacy(path, file)
    raise Refused(f"not a .safetensors, .npz, PyTorch or TorchScript file: it starts with {head[:16]!r}. {REMEDY}")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > data.size:
        raise Refused(f"truncated: its header alone needs {start} bytes, it has {data.size}. {REMEDY}")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if start + last > data.size:
            raise Refused(f"truncated: {name!r} ends at byte {start + last} of {data.size}. {REMEDY}")
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise Refused(str(unknown(f"dtype of {name!r}", entry["dtype"], _SAFETENSORS_DTYPES)))
        dtype = TORCH_DTYPES[_SAFETENSORS_DTYPES[entry["dtype"]]]
        arrays[name] = np.frombuffer(data[start + first : start + last].tobytes(), dtype).reshape(entry["shape"])
    return arrays


# --- PyTorch files ---------------------------------------------------------------------------------------------------


def _read_torch_zip(archive: zipfile.ZipFile, names: list[str]) -> Any:
    pickled = min((name for name in names if name.endswith("data.pkl")), key=len)
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise Refused(f"its numbers are big-endian. {REMEDY}")

    def storage(pid):
        _, dtype, key, _, size = pid
        return Storage(dtype, size, read=lambda: archive.read(f"{folder}data/{key}"))

    with archive.open(pickled) as file:
        return Unpickler(file, storage).load()


def _read_torch_legacy(path: pathlib.Path, file: BinaryIO) -> Any:
    """The layout before PyTorch 1.6: five pickles in a row, then the storages in the order of the fifth."""
    storages: dict[str, Storage] = {}

    def storage(pid):
        _, dtype, key, _, size, view = pid
        whole = storages.setdefault(key, Storage(dtype, size))
        if view is None:
            return whole
        view_key, offset, view_size = view
        return storages.setdefault(view_key, Storage(dtype, view_size, offset=offset, whole=whole))

    def next_pickle():
        return Unpickler(file, storage).load()

    first = next_pickle()
    if first != _LEGACY_MAGIC:
        return first  # a plain pickle of arrays
    _version, system = next_pickle(), next_pickle()
    if not system["little_endian"]:
        raise Refused(f"its numbers are big-endian. {REMEDY}")
    tree, keys = next_pickle(), next_pickle()
    place, end = file.tell(), path.stat().st_size
    for key in keys:
        file.seek(place)
        count = int.from_bytes(file.read(8), "little", signed=True)
        size = count * storages[key].dtype.itemsize
        if size < 0 or place + 8 + size > end:
            raise Refused(f"truncated: a storage ends at byte {place + 8 + size} of {end}. {REMEDY}")
        storages[key].read = _section(file, place + 8, size)
        place += 8 + size
    return tree


def _section(file: BinaryIO, start: int, size: int) -> Callable[[], bytes]:
    def read():
        file.seek(start)
        return file.read(size)

    return read


# --- from a checkpoint to named tensors ------------------------------------------------------------------------------


def _select(tree: Any, key: str | None) -> Any:
    if key is not None:
        for part in key.split("."):
            children = _children(tree)
            if part not in children:
                raise Refused(str(unknown("key", part, children)))
            tree = children[part]
        return tree
    while isinstance(tree, Mapping):
        found = [name for name in WRAPPERS if isinstance(tree.get(name), Mapping | Record)]
        if len(found) > 1:
            raise Refused(f"it holds several sets of weights; say which with key=: {', '.join(found)}.")
        if not found:
            break
        tree = tree[found[0]]
    return tree


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, Mapping):
        return {str(name): child for name, child in node.items()}
    if isinstance(node, Record):
        state = node.__dict__
        if "_modules" in state and "_parameters" in state:  # a whole pickled torch.nn.Module
            parts = (state["_parameters"], state.get("_buffers") or {}, state["_modules"])
            return {str(name): child for part in parts for name, child in part.items()}
        return {str(name): child for name, child in state.items()}
    return {}


def _walk(node: Any, name: str, found: dict[str, Any], above: tuple[int, ...] = ()) -> None:
    if isinstance(node, NumpyArray):
        node = node.value
    if isinstance(node, Tensor | np.ndarray):
        found[name] = node
    elif id(node) not in above:
        for child_name, child in _children(node).items():
            _walk(child, f"{name}.{child_name}" if name else child_name, found, (*above, id(node)))


def _named_arrays(tree: Any) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    _walk(tree, "", found)
    if not found or "" in found:
        holds = ", ".join(_children(tree)) or type(tree).__name__
        raise Refused(
            f"it holds no named tensors, but: {holds}. (A frozen TorchScript archive has its weights as constants "
            f"without names: export it without torch.jit.freeze.) {REMEDY}"
        )
    for prefix in ("module.", "_orig_mod."):  # left by data-parallel wrappers and torch.compile
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return {name: value.array() if isinstance(value, Tensor) else value for name, value in found.items()}
