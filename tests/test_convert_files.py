"""Weight files: what PyTorch wrote is read number by number, and nothing in a file is ever run."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers.convert.files import read_state_dict

FILES = pathlib.Path(__file__).parent / "fixtures" / "torch_files"  # written by PyTorch 2.13

GRID = np.arange(24, dtype=np.float32).reshape(4, 6)
CHECKPOINT = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
    "transposed": GRID.T,
    "window": GRID[1:3, 2:5],
    "shared": GRID.ravel()[20:],
    "expanded": np.array([[1.5, -2.0]] * 3, np.float32),
    "bfloat16": np.array([1.0, -0.3330078125, 1e20]).astype(ml_dtypes.bfloat16),
    "half": np.array([0.5, -65504.0], np.float16),
    "double": np.array([0.1]),
    "int64": np.array(2**40),
    "uint8": np.array([0, 255], np.uint8),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.array([3.0], np.float32),
}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


# --- a small writer of PyTorch files ----------------------------------------------------------------------------------


class Fakes:
    """Classes under names that are not installed, for the time of one pickling."""

    def __init__(self):
        self.modules = {}

    def __call__(self, full_name: str):
        module, _, name = full_name.rpartition(".")
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            self.modules.setdefault(".".join(parts[:i]), types.ModuleType(module))
        parent = self.modules[module]
        if not hasattr(parent, name):
            setattr(parent, name, type(name, (), {"__module__": module}))
        return getattr(parent, name)


class Storage:
    def __init__(self, array, key):
        self.array, self.key = np.array(array, order="C"), key


class Writer(pickle.Pickler):
    """Pickles numpy arrays the way PyTorch pickles tensors: numbers in storages beside the pickle."""

    def __init__(self, file, fakes, legacy):
        super().__init__(file, protocol=2)
        self.fakes, self.legacy, self.storages = fakes, legacy, {}

    def reducer_override(self, obj):
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        storage = Storage(obj, str(len(self.storages)))
        self.storages[storage.key] = storage
        strides = tuple(s // obj.itemsize for s in storage.array.strides)
        return self.fakes("torch._utils._rebuild_tensor_v2"), (storage, 0, obj.shape, strides, False, OrderedDict())

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        kind = self.fakes({"f4": "torch.FloatStorage", "i8": "torch.LongStorage"}[obj.array.dtype.str[1:]])
        return ("storage", kind, obj.key, "cpu", obj.array.size, *([None] if self.legacy else []))


def pickled(tree, legacy=False, fakes=None):
    """The pickle of a tree and its storages."""
    fakes = fakes or Fakes()
    for name in ("torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "torch.LongStorage"):
        fakes(name)
    file = io.BytesIO()
    with mock.patch.dict(sys.modules, fakes.modules):
        writer = Writer(file, fakes, legacy)
        writer.dump(tree)
    return file.getvalue(), [storage.array for storage in writer.storages.values()]


def zip_file(tree, fakes=None) -> bytes:
    """What torch.save writes since 1.6."""
    data, storages = pickled(tree, fakes=fakes)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, array in enumerate(storages):
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return out.getvalue()


def legacy_file(tree) -> bytes:
    """What torch.save wrote before 1.6."""
    data, storages = pickled(tree, legacy=True)
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    parts = [pickle.dumps(item, protocol=2) for item in head]
    parts += [data, pickle.dumps([str(i) for i in range(len(storages))], protocol=2)]
    parts += [len(array.ravel()).to_bytes(8, "little") + array.tobytes() for array in storages]
    return b"".join(parts)


WRITERS = {"zip": zip_file, "legacy": legacy_file}


@pytest.fixture
def write(tmp_path):
    def write(data: bytes, name="weights.pth"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


# --- what is read -----------------------------------------------------------------------------------------------------


def test_zip_checkpoint_of_pytorch():
    assert_same(read_state_dict(FILES / "zip_checkpoint.pth"), CHECKPOINT)


def test_legacy_checkpoint_of_pytorch():
    expected = {name: value for name, value in CHECKPOINT.items() if name != "bfloat16"}
    assert_same(read_state_dict(FILES / "legacy_checkpoint.pth"), expected)


def test_torchscript_archive_gives_the_names_of_the_module_tree():
    with np.load(FILES / "script_expected.npz") as expected:
        assert_same(read_state_dict(FILES / "script.jit"), dict(expected))


def test_the_optimizer_of_a_checkpoint_is_reached_by_key():
    state = read_state_dict(FILES / "zip_checkpoint.pth", key="optimizer.state.0")
    np.testing.assert_array_equal(state["exp_avg"], [1, 1])


def test_numpy_arrays_in_a_checkpoint_are_read_too():
    assert_same(read_state_dict(FILES / "zip_checkpoint.pth", key="extra"), {"arr": np.arange(3)})


def test_safetensors_with_bfloat16(write):
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    numbers = np.array([1.5, -3]).astype(ml_dtypes.bfloat16)
    data = struct.pack("<Q", len(text)) + text + numbers.tobytes() + np.float32(7).tobytes()
    expected = {"a.weight": numbers, "b": np.array([[7]], np.float32)}
    assert_same(read_state_dict(write(data)), expected)
    with pytest.raises(ValueError, match=r"weights\.pth.*truncated: 'b'"):
        read_state_dict(write(data[:-1]))


arrays = st.dictionaries(
    st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True),
    st.tuples(st.sampled_from(["<f4", "<i8"]), st.lists(st.integers(0, 3), max_size=3)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(arrays)
def test_every_format_returns_what_was_written(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("formats")
    tree = {n: np.arange(np.prod(s, dtype=int), dtype=d).reshape(s) for n, (d, s) in shapes.items()}
    for format_name, writer in WRITERS.items():
        (folder / format_name).write_bytes(writer(tree))
        assert_same(read_state_dict(folder / format_name), tree)
    np.savez(folder / "a.npz", **tree)
    assert_same(read_state_dict(folder / "a.npz"), tree)
    safetensors.numpy.save_file(tree, folder / "a.safetensors")
    assert_same(read_state_dict(folder / "a.safetensors"), tree)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", WRITERS)
def test_wrappers_and_parallel_prefixes_are_taken_off(write, format_name):
    tensor = np.ones(3, np.float32)
    tree = {"step": 3, "model": {"state_dict": {"module.a.weight": tensor, "module.b": tensor}}}
    assert_same(read_state_dict(write(WRITERS[format_name](tree))), {"a.weight": tensor, "b": tensor})


def test_two_sets_of_weights_need_a_key(write):
    one, two = np.ones(1, np.float32), np.zeros(1, np.float32)
    path = write(zip_file({"model": {"w": one}, "generator": {"w": two}, "ema": {"model": {"w": two}}}))
    with pytest.raises(ValueError, match=r"weights\.pth.*key=: model, generator"):
        read_state_dict(path)
    assert_same(read_state_dict(path, key="model"), {"w": one})
    assert_same(read_state_dict(path, key="ema.model"), {"w": two})
    with pytest.raises(ValueError, match="unknown key 'emma'. Did you mean 'ema'"):
        read_state_dict(path, key="emma")


def test_records_of_training_frameworks_do_not_hide_the_weights(write):
    fakes = Fakes()
    callback = fakes("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    record = fakes("omegaconf.dictconfig.DictConfig")()
    record.__dict__["lr"] = 1e-4
    tree = {"callbacks": {callback: {"best": 1.0}}, "hyper_parameters": record, "state_dict": {"w": np.ones(2, "<f4")}}
    assert_same(read_state_dict(write(zip_file(tree, fakes))), {"w": np.ones(2, np.float32)})


# --- what is refused --------------------------------------------------------------------------------------------------


class Attack:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


@pytest.mark.parametrize("format_name", WRITERS)
def test_code_in_a_pickle_is_refused_by_name(write, format_name):
    path = write(WRITERS[format_name]({"w": np.ones(1, np.float32), "x": Attack()}))
    with pytest.raises(ValueError, match=r"weights\.pth.*class 'posix\.system'.*safetensors"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["my_project.model.Net", "builtins.eval", "builtins.getattr", "numpy.load"])
def test_unknown_classes_are_refused_by_name(write, name):
    data = pickle.PROTO + b"\x02" + pickle.GLOBAL + "{}\n{}\n".format(*name.rsplit(".", 1)).encode() + pickle.STOP
    with pytest.raises(ValueError, match=f"class '{name}'"):
        read_state_dict(write(data))


def test_a_file_cannot_change_the_reader(write):
    # BUILD writes attributes on what is on top of the stack: here on the tensor function itself.
    state = pickle.dumps((None, {"__defaults__": (1,)}), protocol=2)[2:-1]
    function = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"
    data = pickle.PROTO + b"\x02" + function + state + pickle.BUILD + pickle.STOP
    with pytest.raises(ValueError, match="no named tensors"):
        read_state_dict(write(data))
    assert_same(read_state_dict(FILES / "zip_checkpoint.pth"), CHECKPOINT)


@pytest.mark.parametrize("format_name", WRITERS)
def test_truncated_files_name_the_file_and_the_remedy(write, format_name):
    data = WRITERS[format_name]({"a": np.arange(50, dtype=np.float32), "b": np.ones(3, np.float32)})
    for length in (20, len(data) // 3, len(data) // 2, len(data) - 3):
        with pytest.raises(ValueError, match=r"weights\.pth.*(truncated|damaged).*Download it again"):
            read_state_dict(write(data[:length]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a .safetensors"),
        (b"<html>404 Not Found</html>", "not a .safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    ],
)
def test_foreign_files(write, data, reason):
    with pytest.raises(ValueError, match=rf"weights\.pth.*{reason}"):
        read_state_dict(write(data))


def test_a_tensor_larger_than_its_storage_is_refused(write):
    data = zip_file({"w": np.arange(6, dtype=np.float32).reshape(2, 3)})
    # BININT1 3 is the number of columns and the stride of a row: a longer row reaches past the storage.
    with pytest.raises(ValueError, match="does not fit its storage"):
        read_state_dict(write(rewritten(data, b"K\x03", b"K\x09")))


def rewritten(data: bytes, old: bytes, new: bytes) -> bytes:
    """A zip file with bytes of its pickle replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(old, new))
    return out.getvalue()


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no weight file '.*nothing\.pth'"):
        read_state_dict(tmp_path / "nothing.pth")


# The same damage on every run: CPython itself prints a complaint about one byte string in thousands.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_files_only_ever_raise_value_errors(tmp_path_factory, data):
    source = data.draw(st.sampled_from(["zip_checkpoint.pth", "legacy_checkpoint.pth", "script.jit"]))
    content = bytearray((FILES / source).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "weights.pth"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):  # any other error fails the test; harmless damage is read
        read_state_dict(path)
