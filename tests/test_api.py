"""The public contract of a tokenizer: ranks, sizes, ranges, saving, loading, layouts over devices."""

import functools
import json
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
import toys
from safetensors.numpy import save_file

import tokenizers
from tokenizers import convert
from tokenizers.convert import engine
from tokenizers.parallel.mesh import make_mesh
from tokenizers.train import checkpoint


def pixels(*shape):
    return np.floor((refweights.image_like("api", shape) + 1) * 127.5 + 0.5).astype(np.uint8)


CLIP = pixels(2, 5, 16, 16, 3)
PICTURE = CLIP[:, 0]
TOKENIZERS = {
    "causal": toys.causal,
    "continuous causal": functools.partial(toys.causal, "continuous"),
    "image": toys.image,
    "image tokens": functools.partial(toys.image, "tokens"),
    "continuous image": functools.partial(toys.image, "continuous"),
}
each_tokenizer = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)


# --- ranks -----------------------------------------------------------------------------------------------------------

GRIDS = {
    # name: grid of the picture, grid of the clip
    "causal": ((2, 4, 4), (2, 3, 4, 4)),
    "continuous causal": ((2, 4, 4), (2, 3, 4, 4)),
    "image": ((2, 4, 4), (2, 5, 4, 4)),
    "image tokens": ((2, 16), (2, 5, 16)),
    "continuous image": ((2, 4, 4), (2, 5, 4, 4)),
}


@pytest.mark.parametrize("kind", [0, 1], ids=["picture", "clip"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_whatever_rank_goes_in_comes_out(name, kind):
    tok, given, grid = TOKENIZERS[name](), (PICTURE, CLIP)[kind], GRIDS[name][kind]
    enc = tok.encode(given)
    chex.assert_shape(enc.latents, (*grid, tok.spec.latent_channels))
    if tok.spec.codebook_size:
        chex.assert_shape(enc.indices, grid)
        chex.assert_type(enc.indices, jnp.int32)
        assert enc.mean is enc.logvar is None
        np.testing.assert_array_equal(tok.decode_indices(enc.indices), tok.decode(enc.latents))
        np.testing.assert_array_equal(tok.indices_to_latents(enc.indices), enc.latents)
    else:
        assert enc.indices is None
        chex.assert_shape([enc.mean, enc.logvar], enc.latents.shape)
        np.testing.assert_array_equal(enc.latents, enc.mean)
    restored = tok.reconstruct(given)
    chex.assert_shape([tok.decode(enc.latents), restored], given.shape)
    chex.assert_type(restored, jnp.float32)


def test_the_encoding_is_that_of_the_module():
    tok = toys.causal()
    x = jnp.asarray(CLIP).astype(jnp.float32) / 127.5 - 1
    direct = jax.jit(functools.partial(tok.module.apply, method="encode"))({"params": tok.params}, x)
    ours = tok.encode(CLIP)
    np.testing.assert_array_equal(ours.indices, direct.indices)
    # Programs that are fused in other ways: float32 rounding.
    np.testing.assert_allclose(ours.latents, direct.latents, atol=1e-6)
    np.testing.assert_array_equal(ours.indices, tok.encode(x).indices)


def test_an_image_is_the_first_frame_of_a_clip():
    tok = toys.causal()
    np.testing.assert_array_equal(tok.encode(PICTURE).indices, tok.encode(CLIP).indices[:, 0])


def test_an_image_tokenizer_treats_the_frames_of_a_video_one_by_one():
    tok = toys.image()
    clip = tok.encode(CLIP)
    for t in range(CLIP.shape[1]):
        np.testing.assert_array_equal(clip.indices[:, t], tok.encode(CLIP[:, t]).indices)


@pytest.mark.parametrize(
    ("make", "method", "shape", "message"),
    [
        (toys.causal, "decode", (2, 3, 4, 4, 4), r"end in 3 channels; got shape \(2, 3, 4, 4, 4\)"),
        (toys.causal, "decode", (4, 4, 3), r"accepted: \(B, H', W'\) or \(B, T', H', W'\), each with channels last"),
        (toys.image, "decode", (1, 1, 1, 4, 4, 3), r"latents have shape .* accepted: "),
        (functools.partial(toys.image, "tokens"), "decode", (2, 5, 4, 4, 3), r"accepted: \(B, N\) or \(B, T, N\)"),
    ],
)
def test_latents_of_another_shape_are_refused(make, method, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(make(), method)(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("make", "indices", "message"),
    [
        (toys.causal, np.full((1, 4, 4), 125), r"from 125 to 125; those of causal3d lie in \[0, 125\)"),
        (toys.causal, np.full((1, 4, 4), -1), "from -1 to -1"),
        (toys.causal, np.zeros((1, 4, 4), np.float32), "unknown dtype of indices 'float32'"),
        (toys.causal, np.zeros((16,), np.int32), r"accepted: \(B, H', W'\)"),
        (functools.partial(toys.causal, "continuous"), np.zeros((1, 4, 4), np.int32), "continuous: it has no indices"),
    ],
)
def test_indices_that_are_none_are_refused(make, indices, message):
    with pytest.raises(ValueError, match=message):
        make().decode_indices(indices)


# --- ranges and sizes ------------------------------------------------------------------------------------------------


def test_floats_outside_the_range_pass_unclipped():
    tok = toys.image("continuous")
    bright = np.full((1, 16, 16, 3), 1.5, np.float32)
    direct = tok.module.apply({"params": tok.params}, bright, method="encode")
    np.testing.assert_allclose(tok.encode(bright).mean, direct.mean, atol=1e-6)  # float32 rounding
    assert np.abs(tok.encode(np.clip(bright, -1, 1)).mean - direct.mean).max() > 1e-3


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 3, 16, 16), np.uint8), "look channels-first"),
        (np.full((1, 16, 16, 3), 255.0, np.float32), "floats must be in"),
        (np.zeros((1, 16, 16, 3), np.int64), "pixels are int64"),
        (np.zeros((16, 16, 3), np.uint8), "needs a batch axis"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "reconstruct"])
def test_pixels_in_another_layout_or_range_are_refused(method, array, message):
    with pytest.raises(ValueError, match=message):
        getattr(toys.causal(), method)(array)


def test_nested_lists_are_arrays():
    tok = toys.image()
    np.testing.assert_array_equal(tok.encode(list(PICTURE)).indices, tok.encode(PICTURE).indices)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(toys.causal, (1, 4, 13, 18, 3)), (toys.image, (1, 13, 18, 3)), (toys.image, (1, 4, 13, 18, 3))],
    ids=["clip", "picture", "frames"],
)
def test_a_size_that_does_not_fit_is_filled_up_and_cut_back(make, shape):
    tok, x = make(), pixels(*shape)
    larger = (1, *([5] if tok.spec.video else shape[1:-3]), 16, 20, 3)
    by_hand = np.pad(x, [(0, want - size) for want, size in zip(larger, shape, strict=True)], mode="edge")
    enc = tok.encode(x)
    np.testing.assert_array_equal(enc.indices, tok.encode(by_hand, strict=True).indices)
    restored = tok.reconstruct(x)
    chex.assert_shape(restored, shape)
    crop = tuple(slice(size) for size in shape)
    np.testing.assert_array_equal(restored, tok.decode(enc.latents)[crop])
    with pytest.raises(ValueError, match="heights must be multiples of 4"):
        tok.encode(x, strict=True)


def test_a_tokenizer_of_one_size_fills_smaller_pictures_and_refuses_larger_ones():
    tok = toys.image("tokens")
    chex.assert_shape(tok.encode(PICTURE[:, :9]).indices, (2, 16))
    chex.assert_shape(tok.reconstruct(PICTURE[:, :9]), (2, 9, 16, 3))
    with pytest.raises(ValueError, match="height and width must be 16 and 16"):
        tok.encode(pixels(1, 20, 16, 3))


# --- making, casting, compiling --------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights():
    make = functools.partial(tokenizers.create, "causal3d", **toys.CAUSAL, **toys.DISCRETE)
    chex.assert_trees_all_equal(make().params, toys.causal().params)
    kernels = [tok.params["encoder"]["conv_in"]["kernel"] for tok in (make(seed=1), toys.causal())]
    assert not np.array_equal(*kernels)


def test_it_says_in_one_line_what_it_is():
    assert repr(toys.causal()) == "<Tokenizer causal3d: compression (2, 4, 4), 125 codes, 0.01 M parameters>"
    assert "2 channels, continuous" in repr(toys.image("continuous"))


def test_cast_changes_the_computation_and_nothing_else():
    tok = toys.image("continuous")
    half = tok.cast(jnp.bfloat16)
    chex.assert_trees_all_equal(half.params, tok.params)
    # dtype is a field of the toy that its layers do not read; what a model must do with it is its own test.
    assert half.module.dtype == jnp.bfloat16
    assert half.decode(tok.encode(PICTURE).latents).dtype == jnp.float32


def test_a_causal_tokenizer_in_bfloat16_returns_float32_near_that_of_float32():
    tok = toys.causal("continuous")
    restored = tok.cast(jnp.bfloat16).reconstruct(CLIP)
    assert restored.dtype == jnp.float32
    exact = tok.reconstruct(CLIP)
    # bfloat16 has 8 bits of mantissa: a few thousandths per layer.
    assert np.linalg.norm(restored - exact) / np.linalg.norm(exact) < 0.05


def test_methods_can_be_part_of_a_compiled_function():
    tok = toys.image()
    together = jax.jit(lambda x: tok.decode_indices(tok.encode(x).indices))
    np.testing.assert_allclose(together(PICTURE), tok.reconstruct(PICTURE), atol=1e-6)  # float32 rounding


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_a_saved_folder_is_the_same_tokenizer_bit_for_bit(kind, tmp_path):
    tok = toys.causal(kind)
    tok.save(tmp_path / "saved")
    back = tokenizers.load(tmp_path / "saved")
    chex.assert_trees_all_equal(back.variables, dict(tok.variables))
    assert back.module == tok.module
    back.save(tmp_path / "again")
    for name in ("tokenizer.json", "weights.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(ValueError, match="is not empty; choose a new folder"):
        tok.save(tmp_path / "saved")


def test_codebook_statistics_are_saved_too(tmp_path):
    bottleneck = {"name": "vq", "codebook_size": 8, "code_dim": 3, "learning": "ema"}
    tok = tokenizers.create("causal3d", bottleneck=bottleneck, latent_channels=3, **toys.CAUSAL)
    assert set(tok.variables) == {"params", "codebook"}
    tok.save(tmp_path / "saved")
    chex.assert_trees_all_equal(tokenizers.load(tmp_path / "saved").variables, dict(tok.variables))


def _cut(folder):
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _rename(folder):
    config = json.loads((folder / "tokenizer.json").read_text())
    config["fields"]["channels"] = [16]
    (folder / "tokenizer.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "incomplete or damaged"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "incomplete or damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "incomplete or damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds neither config.json"),
        (_rename, "does not fit its model"),
    ],
)
def test_a_damaged_folder_is_refused(damage, message, tmp_path):
    toys.causal().save(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path / "saved")


def test_a_run_gives_its_averaged_weights():
    tok = tokenizers.load(toys.run())
    shapes = jax.tree.map(jnp.zeros_like, tok.params)
    ema = checkpoint.load_weights(toys.run(), {"ema": shapes})["ema"]
    chex.assert_trees_all_equal(tok.params, ema)
    trained = checkpoint.load_weights(toys.run(), {"params": {"model": shapes, "objective": {}}})["params"]["model"]
    kernels = [tree["encoder"]["conv_in"]["kernel"] for tree in (ema, trained)]
    assert not np.array_equal(*kernels)
    assert tok.spec.compression == (2, 8, 8)
    chex.assert_trees_all_equal(tokenizers.load(toys.run(), step=2).params, ema)


def _damaged_run(damage):
    def make(folder):
        shutil.copytree(toys.run(), folder)
        damage(folder)
        return folder

    return make


def _truncate(folder):
    for file in (folder / "checkpoints/2").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "checkpoints"), "no step was saved yet"),
        (lambda folder: shutil.rmtree(folder / "checkpoints/2"), "holds no complete checkpoint"),
        (_truncate, "checkpoints/2 cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model'), "not readable JSON"),
        (lambda folder: (folder / "config.json").unlink(), "holds neither config.json"),
    ],
)
def test_a_damaged_run_is_refused(damage, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tokenizers.load(_damaged_run(damage)(tmp_path / "run"))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"model": "causal3d"}, "knows its model"),
        ({"channels": (8,)}, "knows its model"),
        ({"step": 3}, "step=3 belongs to a run"),
    ],
)
def test_what_a_saved_folder_does_not_need_is_refused(keywords, message, tmp_path):
    toys.causal().save(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path / "saved", **keywords)


# --- official weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def official(monkeypatch):
    """A conversion file for causal3d, as if its authors had written PyTorch; the state dict of `toys.causal`."""
    table = types.SimpleNamespace(
        TABLE=(engine.Rule(r"params/(.*)/(?:kernel|scale|bias)", r"net.\1.{leaf}"),),
        IGNORE=(r"loss\..*",),
        fields_from_official=lambda config: {
            "channels": tuple(config["ch_mult"]),
            **{key: value for key, value in toys.CAUSAL.items() if key != "channels"},
            "bottleneck": {"name": "fsq", "levels": tuple(config["levels"])},
            "latent_channels": len(config["levels"]),
        },
    )
    monkeypatch.setattr(convert, "systems", lambda: {"causal3d": table})
    return engine.to_official(table.TABLE, dict(toys.causal().variables))


CONFIG = {"ch_mult": [8], "levels": [5, 5, 5]}


def test_an_official_state_dict_becomes_the_same_tokenizer(official):
    tok = tokenizers.from_official("causal3d", CONFIG, official | {"loss.logvar": np.zeros(())})
    chex.assert_trees_all_equal(tok.variables, dict(toys.causal().variables))
    assert tok.module == toys.causal().module


def test_an_official_file_becomes_the_same_tokenizer(official, tmp_path):
    save_file(official, tmp_path / "official.safetensors")
    tok = tokenizers.load(tmp_path / "official.safetensors", model="causal3d", **toys.CAUSAL, **toys.DISCRETE)
    chex.assert_trees_all_equal(tok.params, toys.causal().params)
    tok.save(tmp_path / "saved")
    chex.assert_trees_all_equal(tokenizers.load(tmp_path / "saved").params, tok.params)
    with pytest.raises(ValueError, match="say which tokenizer it belongs to.*causal3d"):
        tokenizers.load(tmp_path / "official.safetensors")
    with pytest.raises(ValueError, match="problems"):
        tokenizers.load(tmp_path / "official.safetensors", model="causal3d-fsq-488-16777216")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("net.encoder.conv_in.weight"), "missing 'net.encoder.conv_in.weight'"),
        (lambda s: s.update({"net.extra": np.zeros(3, np.float32)}), "unexpected 'net.extra'"),
        (lambda s: s.update({"net.encoder.conv_in.bias": np.zeros(3, np.float32)}), "misshapen 'net.encoder.conv_in.b"),
    ],
)
def test_official_weights_that_do_not_fit_are_named(official, change, message):
    change(official)
    with pytest.raises(ValueError, match=message):
        tokenizers.from_official("causal3d", CONFIG, official)


def test_systems_without_official_weights_are_refused(official, tmp_path):
    with pytest.raises(ValueError, match="unknown system with official weights 'causal2d'. Did you mean 'causal3d'"):
        tokenizers.from_official("causal2d", {}, {})
    with pytest.raises(ValueError, match="does not exist; accepted: a run of train.py"):
        tokenizers.load(tmp_path / "nothing.pth")


# --- several devices -------------------------------------------------------------------------------------------------

MESHES = {
    "height": {"data": 2, "fsdp": 2, "context": 2, "split": "height"},
    "time": {"data": 4, "context": 2, "split": "time"},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_over_devices_it_is_the_same_tokenizer(mesh):
    tok, x = toys.causal("continuous"), pixels(8, 5, 16, 16, 3)
    spread = tok.shard(make_mesh(**MESHES[mesh]))
    # Sums over split axes are taken in another order.
    alone, ours = tok.encode(x), spread.encode(x)
    np.testing.assert_allclose(ours.latents, alone.latents, atol=1e-5)
    np.testing.assert_allclose(spread.decode(ours.latents), tok.decode(alone.latents), atol=1e-5)


def test_large_parameters_are_split_and_any_batch_is_taken():
    tok = toys.image("wide")
    spread = tok.shard(make_mesh(data=2, fsdp=4))
    kernel = spread.params["inner"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (256, 64)
    x = pixels(8, 16, 16, 3)
    for given in (x, jnp.asarray(x), x[:3], jax.device_put(x, kernel.sharding.mesh.devices.flat[3])):
        enc = spread.encode(given)
        np.testing.assert_array_equal(enc.indices, tok.encode(np.asarray(given)).indices)
        np.testing.assert_allclose(spread.decode_indices(enc.indices), tok.decode_indices(enc.indices), atol=1e-5)
    assert len(spread.encode(x).latents.sharding.device_set) == 8


def test_a_spread_tokenizer_saves_whole_weights(tmp_path):
    tok = toys.causal()
    tok.shard(make_mesh(data=2, fsdp=4)).save(tmp_path / "saved")
    chex.assert_trees_all_equal(tokenizers.load(tmp_path / "saved").params, tok.params)
