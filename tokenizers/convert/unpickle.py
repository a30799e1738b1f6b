"""Pickles of PyTorch without PyTorch and without trust: tensors, plain containers and records; all else is refused.

Reference for the layout: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

REMEDY = (
    "Download it again or, where it opens in the authors' own code, save its tensors once as .safetensors "
    "(safetensors.torch.save_file(state_dict, path)) and give that file."
)

TORCH_DTYPES = {
    "float64": np.dtype("<f8"), "double": np.dtype("<f8"), "float32": np.dtype("<f4"), "float": np.dtype("<f4"),
    "float16": np.dtype("<f2"), "half": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("<i8"), "long": np.dtype("<i8"), "int32": np.dtype("<i4"), "int": np.dtype("<i4"),
    "int16": np.dtype("<i2"), "short": np.dtype("<i2"), "int8": np.dtype("i1"), "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "uint64": np.dtype("<u8"), "bool": np.dtype("?"),
    "complex64": np.dtype("<c8"), "complex128": np.dtype("<c16"),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
# Classes that published checkpoints carry beside their weights. Like TorchScript's own, they become records that hold
# what was stored and can do nothing.
_RECORDS = (
    "__torch__.", "torch.nn.modules.", "pytorch_lightning.", "lightning.", "omegaconf.",
    "argparse.Namespace", "typing.Any", "torch.device", "dall_e.",
)  # fmt: skip


class Refused(ValueError):
    """A reason that is already written for the reader."""


@dataclasses.dataclass
class Storage:
    """A flat buffer of a file or a view of one, read when a tensor asks for it: optimizer states never are."""

    dtype: np.dtype
    size: int
    read: Callable[[], bytes] | None = None
    offset: int = 0
    whole: Storage | None = None

    @functools.cached_property
    def data(self) -> np.ndarray:
        if self.whole is not None:
            return self.whole.data[self.offset * self.dtype.itemsize :]
        data = np.frombuffer(self.read(), np.uint8)
        if data.size < self.size * self.dtype.itemsize:
            raise Refused(f"truncated: a storage has {data.size} of {self.size * self.dtype.itemsize} bytes. {REMEDY}")
        return data


@dataclasses.dataclass
class Tensor:
    """A strided view of a storage, not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    def array(self) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        data = self.storage.data
        flat = data[: data.size // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min((self.offset, *self.shape, *self.strides)) < 0 or last >= flat.size:
            raise Refused(f"damaged: a tensor of shape {self.shape} does not fit its storage of {flat.size}. {REMEDY}")
        strides = tuple(s * self.dtype.itemsize for s in self.strides)
        return np.ascontiguousarray(as_strided(flat[self.offset :], self.shape, strides)).reshape(self.shape)


class Record:
    """An instance of a class that we do not run: its stored state, and nothing else."""

    def __new__(cls, *_args, **_kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **_kwargs):
        self.__dict__["arguments"] = args

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = (state[0] or {}) | state[1]
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    # Subclasses of dict and list (configuration objects) are filled item by item.
    def __setitem__(self, key, value):
        self.__dict__.setdefault("items", []).append((key, value))

    def append(self, value):
        self.__dict__.setdefault("items", []).append(value)

    def extend(self, values):
        self.__dict__.setdefault("items", []).extend(values)


class NumpyArray:
    """An ndarray inside a pickle: rebuilt from its bytes, without NumPy's own pickle support."""

    def __init__(self, *_args):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = np.frombuffer(data, dtype.name).reshape(shape, order="F" if fortran else "C")


class _NumpyDtype:
    def __init__(self, name, *_args):
        if str(name).strip("<>|=")[:1] not in tuple("fiub"):
            raise Refused(f"a NumPy array of dtype {name!r} is not a number. {REMEDY}")
        self.name = str(name)

    def __setstate__(self, state):
        if state[1] in ("<", ">") and self.name[0] not in "<>":
            self.name = state[1] + self.name


def _rebuild_tensor(storage, offset, shape, strides, *_flags):
    return Tensor(storage, int(offset), tuple(shape), tuple(strides), storage.dtype)


def _rebuild_tensor_with_dtype(storage, offset, shape, strides, _grad, _hooks, dtype, *_flags):
    return Tensor(storage, int(offset), tuple(shape), tuple(strides), dtype)


def _scalar(dtype, data=b""):
    return np.frombuffer(data, dtype.name)[0]


class Unpickler(pickle.Unpickler):
    """Knows tensors, containers, numbers and records; refuses everything else by name.

    What it hands to the pickle is made anew for every file, so that no file can leave a trace in this module.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[tuple], Storage]):
        super().__init__(file, encoding="latin1")  # files of Python 2 have byte strings as keys
        self._storage = storage

    def persistent_load(self, pid):
        if isinstance(pid, tuple) and pid[0] == "module":
            return pid[1]  # the class's source code follows in the tuple: of no use here
        if not isinstance(pid, tuple) or pid[0] != "storage":
            raise Refused(f"it points to an outside object {pid!r}. {REMEDY}")
        return self._storage(pid)

    def find_class(self, module, name):
        full = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return TORCH_DTYPES[_STORAGES[name]]
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        known = self._functions().get(full)
        if known is not None:
            return known
        if any(full == prefix or (prefix.endswith(".") and full.startswith(prefix)) for prefix in _RECORDS):
            return type(name, (Record,), {})
        raise Refused(
            f"it holds an object of class {full!r}. Only tensors and plain containers are read; that class "
            "would run code. Convert the file in the authors' environment: save its state dict as .safetensors."
        )

    @staticmethod
    def _functions() -> dict[str, Any]:
        numpy = {
            f"numpy.{core}.multiarray.{name}": function
            for core in ("core", "_core")
            for name, function in (("_reconstruct", lambda *a: NumpyArray(*a)), ("scalar", lambda *a: _scalar(*a)))
        }
        return numpy | {
            "torch._utils._rebuild_tensor": lambda *a: _rebuild_tensor(*a),
            "torch._utils._rebuild_tensor_v2": lambda *a: _rebuild_tensor(*a),
            "torch._utils._rebuild_tensor_v3": lambda *a: _rebuild_tensor_with_dtype(*a),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda function, _type, args, _state: function(*args),
            "torch.Size": lambda values=(): tuple(values),
            "torch.Tensor": type("Tensor", (Record,), {}),
            "torch.jit._pickle.build_intlist": lambda values: list(values),
            "torch.jit._pickle.build_doublelist": lambda values: list(values),
            "torch.jit._pickle.build_boollist": lambda values: list(values),
            "torch.jit._pickle.build_tensorlist": lambda values: list(values),
            "torch.jit._pickle.restore_type_tag": lambda value, _type: value,
            "collections.OrderedDict": collections.OrderedDict,
            "collections.defaultdict": lambda *_: type("defaultdict", (dict,), {})(),
            "collections.Counter": lambda *_: type("Counter", (dict,), {})(),
            "builtins.dict": dict, "builtins.list": list, "builtins.set": set, "builtins.tuple": tuple,
            "builtins.int": int, "builtins.float": float, "builtins.bool": bool, "builtins.str": str,
            "__builtin__.dict": dict, "__builtin__.list": list, "__builtin__.set": set, "__builtin__.long": int,
            "numpy.dtype": type("dtype", (_NumpyDtype,), {}),
            "numpy.ndarray": type("ndarray", (), {}),
            "_codecs.encode": lambda text, _encoding: text.encode("latin1"),
        }  # fmt: skip
