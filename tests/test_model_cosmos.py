"""The Cosmos tokenizers against the authors' code: every network, bottleneck and frame count."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
import safetensors.numpy
from reference import FOLDERS, Case, cases, relative_l2

import tokenizers
from tokenizers import registry, streaming
from tokenizers.convert import cosmos, engine
from tokenizers.parallel import platform
from tokenizers.quantize.fsq import FSQ
from tokenizers.quantize.gaussian import reparameterize

SYSTEM = "cosmos"
# Sums in another order. Observed on CPU: 2e-6 in both.
LATENTS, PIXELS = 1e-5, 1e-5


def marked(names):
    """Cases that the repository keeps run always, the others when slow tests do."""
    kept = {path.stem for path in (FOLDERS[0] / SYSTEM).glob("*.json")}
    return [pytest.param(name, marks=[] if name in kept else pytest.mark.slow) for name in names]


def stored(case, name, value):
    """The part of a value that a case keeps."""
    value = np.asarray(value)
    if f"{name}__stats" in case.outputs:
        mean, std, largest, *shape = case.outputs[f"{name}__stats"]
        assert tuple(int(n) for n in shape if n) == value.shape
        np.testing.assert_allclose([value.mean(), value.std()], [mean, std], atol=1e-4 * largest)
    places = case.meta["slices"].get(name, ())
    return value[tuple(slice(*place) for place in places)]


def scaled(case, key):
    """An input with the factor that the case multiplies it with."""
    factor = re.fullmatch(r"\*([\d.]+)", case.meta["inputs"][key].get("post", ""))
    return case.input(key) * np.float32(factor[1] if factor else 1)


def official(case):
    return tokenizers.from_official(SYSTEM, case.meta["config"], case.weights())


def assert_same(case, name, value, tolerance):
    error = relative_l2(stored(case, name, value), case.outputs[name])
    print(f"{name}: {error:.1e}")  # shown with -rP
    assert error < tolerance, (name, error)


def run_once(function, *args):
    return jax.jit(function, compiler_options=platform.run_once_options())(*args)


def check_autoencoder(case):
    tok = official(case)

    def both(variables, x, given):
        encoding = tok.module.apply(variables, x, method="encode")
        return encoding, tok.module.apply(variables, given, method="decode")

    for key in [name for name in case.meta["inputs"] if not name.endswith("_noise")]:
        given = next(
            case.outputs[name] for name in (f"latent_{key}", f"mean_{key}", f"codes_{key}") if name in case.outputs
        )
        encoding, decoded = run_once(both, tok.variables, case.input(key), given)
        assert_same(case, f"recon_{key}", decoded, PIXELS)
        if f"latent_{key}" in case.outputs:
            assert_same(case, f"latent_{key}", encoding.latents, LATENTS)
        elif f"mean_{key}" in case.outputs:
            assert_same(case, f"mean_{key}", encoding.mean, LATENTS)
            assert_same(case, f"logvar_{key}", encoding.logvar, LATENTS)
            sample = reparameterize(encoding.mean, encoding.logvar, scaled(case, f"{key}_noise"))
            assert_same(case, f"sample_{key}", sample, LATENTS)
        else:
            indices = case.outputs[f"indices_{key}"]
            if tok.spec.codebooks > 1:  # their quantizers are axis 1
                indices = np.moveaxis(indices, 1, -1)
            assert case.outputs[f"margin_{key}"].min() > 1e-3  # no position is fragile
            np.testing.assert_array_equal(encoding.indices, indices)
            np.testing.assert_allclose(tok.indices_to_latents(indices), given, atol=1e-6)


@pytest.mark.parametrize("name", marked(cases(SYSTEM, "small_.*")))
def test_small_networks_compute_the_authors_numbers(name):
    check_autoencoder(Case(SYSTEM, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SYSTEM, "full_.*"))
def test_released_sizes_compute_the_authors_numbers(name):
    check_autoencoder(Case(SYSTEM, name))


@pytest.mark.parametrize("name", cases(SYSTEM, "module_fsq"))
def test_fsq_is_the_authors(name):
    case = Case(SYSTEM, name)
    for key, entry in case.meta["inputs"].items():
        if key.endswith("_ct"):
            continue
        fsq, cotangent = FSQ(tuple(entry["levels"])), case.input(f"{key}_ct")

        def weighted(z, cotangent=cotangent, fsq=fsq):
            encoding = fsq(z)
            return jnp.sum(encoding.latents * cotangent), encoding

        (_, encoding), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(scaled(case, key))
        expected = {
            name.removesuffix(f"_{key}"): value for name, value in case.outputs.items() if name.endswith(f"_{key}")
        }
        safe = expected["margin"] >= 1e-3  # elsewhere the last bits of tanh may decide
        assert (~safe).sum() <= 1
        np.testing.assert_array_equal(np.asarray(encoding.indices)[safe], expected["indices"][safe])
        np.testing.assert_allclose(np.asarray(encoding.latents)[safe], expected["codes"][safe], atol=1e-6)
        np.testing.assert_allclose(fsq.indices_to_codes(expected["indices"]), expected["decoded"], atol=1e-6)
        np.testing.assert_allclose(fsq.indices_to_codes(jnp.arange(64)), expected["codebook_head"], atol=1e-6)
        assert relative_l2(gradient, expected["grad"]) < 1e-5


# Millions, without the convolutions that the code of 0.1 stores and never uses (counted from the authors' modules).
PARAMETERS = {
    "cosmos-ci8x8": 76.79,
    "cosmos-ci16x16": 81.51,
    "cosmos-di8x8": 79.00,
    "cosmos-di16x16": 83.72,
    "cosmos-cv4x8x8": 73.19,
    "cosmos-cv8x8x8": 105.65,
    "cosmos-cv8x16x16": 110.90,
    "cosmos-dv4x8x8": 104.67,
    "cosmos-dv8x8x8": 105.65,
    "cosmos-dv8x16x16": 110.90,
    "cosmos-1.0-cv8x8x8": 105.65,
    "cosmos-1.0-dv8x16x16": 110.90,
    "cosmos-tokenize1-cv8x8x8-720p": 105.65,
    "cosmos-tokenize1-dv8x16x16-720p": 110.90,
    "cosmos-tokenize1-cv4x8x8-360p": 110.21,
    "cosmos-tokenize1-dv4x8x8-360p": 112.62,
    "cosmos-tokenize1-ci8x8-360p": 81.38,
    "cosmos-tokenize1-ci16x16-360p": 84.33,
    "cosmos-tokenize1-di8x8-360p": 83.60,
    "cosmos-tokenize1-di16x16-360p": 86.55,
}


def test_every_release_is_there():
    assert set(PARAMETERS) == {name for name in registry.available() if name.startswith("cosmos-")}


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_sizes_have_the_published_number_of_parameters(name):
    module = registry.build(name)
    assert registry.parameter_count(module) == pytest.approx(PARAMETERS[name] * 1e6, abs=0.006e6)
    size = name.removeprefix("cosmos-").removesuffix("-360p").removesuffix("-720p").split("-")[-1]
    steps = tuple(int(number) for number in size[2:].split("x"))
    assert module.spec.compression == ((1, *steps) if size[1] == "i" else steps)
    assert module.spec.codebook_size == (64000 if size[0] == "d" else None)


def test_images_and_clips_have_the_documented_shapes():
    for name, shape, latents in [
        ("cosmos-di16x16", (1, 64, 96, 3), (1, 4, 6, 6)),
        ("cosmos-dv8x16x16", (1, 17, 64, 96, 3), (1, 3, 4, 6, 6)),
        ("cosmos-cv4x8x8", (1, 1, 64, 96, 3), (1, 1, 8, 12, 16)),
    ]:
        module = registry.build(name)
        shapes = registry.abstract_variables(module)
        reconstruction, encoding = jax.eval_shape(module.apply, shapes, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert (reconstruction.shape, encoding.latents.shape) == (shape, latents)


# ----------------------------------------------------------------------------------------------- streaming, one image


TINY = {
    "bottleneck": {"name": "fsq", "levels": (8, 5, 5)},
    "latent_channels": 3,
    "compression": (8, 8),
    "channels": 8,
    "encoder_multipliers": (1, 2, 2),
    "decoder_multipliers": (1, 2, 2),
    "blocks": 1,
    "z_channels": 8,
}


def tiny(**fields):
    """A small model in whose weights nothing is zero."""
    tok = tokenizers.create("cosmos", **TINY | fields)
    leaves, tree = jax.tree.flatten(tok.variables)
    moved = [leaf + 0.1 * refweights.uniform(f"leaf{i}", leaf.shape) for i, leaf in enumerate(leaves)]
    return dataclasses.replace(tok, variables=jax.tree.unflatten(tree, moved))


def clip(frames, height=16, width=16):
    return refweights.image_like("cosmos/stream", (1, frames, height, width, 3))


def cut(x, *lengths):
    assert sum(lengths) == x.shape[1]
    return np.split(x, np.cumsum(lengths)[:-1], axis=1)


def joined(parts):
    return np.concatenate([np.asarray(part) for part in parts], axis=1)


def check_stream(tok, x, lengths):
    whole = tok.encode(x)
    parts = list(tok.encode_stream(cut(x, *lengths)))
    np.testing.assert_array_equal(joined(part.indices for part in parts), whole.indices)
    np.testing.assert_allclose(joined(part.latents for part in parts), whole.latents, atol=1e-5)
    expected = np.asarray(tok.decode(whole.latents))
    decoded = joined(tok.decode_stream(parts))
    assert decoded.shape == x.shape
    # Convolutions over other numbers of frames add up in another order; observed 2e-6.
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("lengths", [(9, 16), pytest.param((3, 1, 14, 7), marks=pytest.mark.slow)])
def test_chunks_give_what_the_whole_clip_gives(lengths):
    check_stream(tiny(), clip(25), lengths)


REARRANGED = {"patcher": "rearrange", "schedule": "legacy", "compression": (8, 16), "encoder_attention": (0,)}
HALF_PATCHES = {"patch": 2, "compression": (4, 8), "decoder_attention": (1,)}
BASE = {"network": "base", "patch": 2, "num_groups": 1}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [REARRANGED, HALF_PATCHES, BASE], ids=["rearranged", "half patches", "base"])
def test_every_video_network_streams(fields):
    check_stream(tiny(**fields), clip(17, 16, 32), (1, 8, 8))


@pytest.mark.parametrize("window", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_hundreds_of_frames_come_out_as_in_one_pass(window):
    def programs():
        return streaming._encode_chunk.cache_size(), streaming._decode_chunk.cache_size()

    tok, before = tiny(attention_window=window), programs()
    check_stream(tok, clip(257), (65, 64, 64, 64))
    if window:  # the state has constant size: a program for the first chunk, one for all others
        assert programs() == (before[0] + 2, before[1] + 2)


def test_a_window_changes_only_what_lies_before_it():
    x = clip(33)  # five latent frames
    continuous = {"bottleneck": {"name": "identity"}, "latent_channels": 4}
    models = [tiny(**continuous, attention_window=window) for window in (None, 2)]
    exact, narrow = (np.asarray(tok.encode(x).latents) for tok in models)
    np.testing.assert_allclose(narrow[:, :2], exact[:, :2], atol=1e-5)
    assert np.abs(narrow[:, 2:] - exact[:, 2:]).max() > 1e-3


def test_an_image_is_the_first_frame_of_a_clip():
    tok, x = tiny(), clip(25)
    image, video = tok.encode(x[:, 0]), tok.encode(x)
    np.testing.assert_array_equal(image.indices, video.indices[:, 0])
    np.testing.assert_allclose(tok.decode(image.latents), tok.decode(video.latents)[:, 0], atol=1e-4)


def test_with_clip_statistics_the_base_network_is_not_causal():
    tok = tiny(network="base", patch=2, num_groups=8)
    assert not tok.spec.causal
    with pytest.raises(ValueError, match="it is not causal"):
        tok.encode_stream([clip(9)])


# ---------------------------------------------------------------------------------------------- files, configs, errors


def dv():
    """Config and weights of a small case, with the unused convolutions and the constants that files hold."""
    case = Case(SYSTEM, "small_dv8x16x16_fsq")
    state = case.weights()
    constants = ("encoder.patcher3d.wavelets", "encoder.patcher3d._arange", "encoder.patcher3d.patch_size_buffer")
    constants += ("decoder.unpatcher3d.wavelets", "quantizer._levels", "quantizer._basis")
    constants += ("quantizer.implicit_codebook",)
    return case.meta["config"], state | dict.fromkeys(constants, np.zeros(2))


def test_training_checkpoints_are_read_and_their_averages_preferred():
    config, state = dv()
    plain = tokenizers.from_official(SYSTEM, config, state)
    network = {f"network.{name}": value for name, value in state.items()}
    other = {name: value + 1 for name, value in network.items()}
    averages = {"ema.network-" + name.replace(".", "-"): value for name, value in state.items()}
    for checkpoint in (network, averages | other):
        tok = tokenizers.from_official(SYSTEM, config, checkpoint)
        jax.tree.map(np.testing.assert_array_equal, tok.variables, plain.variables)


def test_official_names_lead_there_and_back():
    config, state = dv()
    tok = tokenizers.from_official(SYSTEM, config, state)
    exported = engine.to_official(cosmos.TABLE, jax.device_get(dict(tok.variables)))
    for name, value in exported.items():
        np.testing.assert_array_equal(value, state[name])
    left = set(state) - set(exported)
    assert {name for name in left if "quantizer" not in name and "patcher" not in name} == {
        f"{place}.conv3d.{leaf}"
        for place in ("encoder.down.1.downsample.conv2", "decoder.up.2.upsample.conv1")
        for leaf in ("weight", "bias")
    }


def test_weights_tell_how_many_levels_there_are():
    config, state = (lambda case: (case.meta["config"], case.weights()))(Case(SYSTEM, "small_cv4x8x8_haar4_repo"))
    tok = tokenizers.from_official(SYSTEM, config, state)
    assert (tok.module.encoder_multipliers, tok.module.decoder_multipliers) == ((2, 4, 4), (2, 4))
    assert tok.spec.compression == (4, 8, 8)


def test_strict_about_tensors():
    config, state = dv()
    del state["decoder.mid.attn_1.1.q.conv3d.weight"]
    state["encoder.surplus.weight"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        tokenizers.from_official(SYSTEM, config, state)
    assert "missing 'decoder.mid.attn_1.1.q.conv3d.weight'" in str(error.value)
    assert "unexpected 'encoder.surplus.weight'" in str(error.value)


def test_a_saved_file_loads_by_name(tmp_path):
    tok = tokenizers.create("cosmos", **TINY)
    state = engine.to_official(cosmos.TABLE, jax.device_get(dict(tok.variables)))
    safetensors.numpy.save_file(state, tmp_path / "weights.safetensors")
    loaded = tokenizers.load(tmp_path / "weights.safetensors", model="cosmos", **TINY)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, tok.variables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "CX"}, "unknown Cosmos tokenizer 'CX'"),
        ({"channel": 3}, "unknown key of a Cosmos config 'channel'. Did you mean 'channels'"),
        ({"encoder": "FACTORISED"}, "unknown Cosmos encoder 'FACTORISED'. Did you mean 'FACTORIZED'"),
        ({"quantizer": "LFQ"}, "unknown quantizer 'LFQ'"),
        ({"levels": [8, 8]}, "embedding_dim=6 must be the number of levels, 2"),
        ({"z_factor": 2}, "z_factor=2 does not fit"),
        ({"dropout": 0.1}, "dropout=0.1 is not supported. Accepted: 0.0"),
        ({"patch_method": "dct"}, "unknown patcher 'dct'"),
        ({"patch_size": 3}, "must be powers of two; got 3"),
        ({"channels": None}, "the Cosmos config lacks 'channels'"),
        ({"legacy_mode": 2}, "unknown legacy_mode 2"),
    ],
)
def test_configs_that_no_model_fits_are_refused(changes, message):
    config, state = dv()
    config = {key: value for key, value in (config | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        tokenizers.from_official(SYSTEM, config, state)


def test_images_and_clips_do_not_mix():
    with pytest.raises(ValueError, match="images and clips do not mix"):
        tokenizers.create("cosmos", **TINY, network="image", decoder_network="factorized")


def test_one_release_has_norms_of_one_group_that_its_config_does_not_tell():
    fields = cosmos.fields_from_official(DI16)
    assert fields["num_groups"] == 1
    assert cosmos.fields_from_official(DI16 | {"patch_size": 4})["num_groups"] == 32
    assert cosmos.fields_from_official(DI16 | {"num_groups": 8})["num_groups"] == 8


DI16 = {
    "name": "DI", "encoder": "Default", "decoder": "Default", "quantizer": "FSQ", "channels": 128, "dropout": 0.0,
    "channels_mult": [2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [32], "resolution": 1024, "patch_size": 2,
    "patch_method": "haar", "spatial_compression": 16, "z_channels": 256, "z_factor": 1, "embedding_dim": 6,
    "levels": [8, 8, 8, 5, 5, 5], "num_quantizers": 4, "in_channels": 3, "out_channels": 3,
}  # fmt: skip
