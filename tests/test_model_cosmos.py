"""The Cosmos tokenizers against the authors' code: every network, bottleneck and frame count."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
import safetensors.numpy
import toys
from official_training import drawn, remembered
from reference import FOLDERS, Case, cases, relative_l2

import tokenizers
from configs import base
from tokenizers import pixels, registry, streaming
from tokenizers.convert import cosmos, engine
from tokenizers.convert.lpips import trunk_table
from tokenizers.losses import consistency, perceptual, reconstruction
from tokenizers.networks.vgg import VGG16
from tokenizers.parallel import platform
from tokenizers.parallel.mesh import make_mesh
from tokenizers.quantize.fsq import FSQ
from tokenizers.quantize.gaussian import reparameterize
from tokenizers.train import optim, schedules
from tokenizers.train.autoencoder import Recipe
from tokenizers.train.objective import Objective, Term, mean_reduction
from tokenizers.train.state import new_state
from tokenizers.train.step import make_step

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


@pytest.mark.parametrize("name", ["small_ci16x16_haar2", "small_cv8x16x16_legacy", "small_dv8x16x16_fsq"])
def test_weights_go_back_to_the_authors_names(name):
    """Each tensor bit for bit; what their code allocates and never uses is left out."""
    theirs = Case(SYSTEM, name).weights()
    ours = official(Case(SYSTEM, name)).export_official()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
    left = [key for key in theirs if key not in ours]
    assert all(any(re.fullmatch(pattern, key) for pattern in cosmos.IGNORE) for key in left), left


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


def tiny(**fields):
    """A small model in whose weights nothing is zero."""
    tok = tokenizers.create("cosmos", **toys.COSMOS | fields)
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
    # With a window the state has constant size: a program for the first chunk, one for all others. Without, the second
    # and third chunk find the clip doubled.
    more = 2 if window else 3
    assert programs() == (before[0] + more, before[1] + more)


@pytest.mark.slow
def test_a_window_changes_only_what_lies_before_it():
    x = clip(33)  # five latent frames
    continuous = {"bottleneck": {"name": "identity"}, "latent_channels": 4}
    models = [tiny(**continuous, attention_window=window) for window in (None, 2)]
    exact, narrow = (np.asarray(tok.encode(x).latents) for tok in models)
    np.testing.assert_allclose(narrow[:, :2], exact[:, :2], atol=1e-5)
    assert np.abs(narrow[:, 2:] - exact[:, 2:]).max() > 1e-3


def check_split(size, mesh):
    """Encoding and decoding one frame and a clip over eight devices gives what one device gives."""
    tok = tiny(bottleneck={"name": "identity"}, latent_channels=4, patch=4, compression=(8, 16))
    spread = tok.shard(make_mesh(**mesh))
    for x in (clip(1, *size)[:, 0], clip(9, *size)) if size[0] < 1000 else (clip(1, *size)[:, 0],):
        alone, latents = tok.encode(x).latents, spread.encode(x).latents
        np.testing.assert_allclose(latents, alone, atol=1e-5 * np.abs(alone).max())
        expected = np.asarray(tok.decode(alone))
        # Sums over split axes add up in another order; observed 2e-6 of the largest value.
        np.testing.assert_allclose(spread.decode(alone), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_frames_split_over_devices_are_exact():
    check_split((32, 128), {"context": 8, "split": "width"})


@pytest.mark.slow
def test_a_4k_frame_split_over_devices_is_exact():
    # Sixteen by sixteen pixels per latent; its attention sees the 32,400 of the frame.
    check_split((2160, 3840), {"context": 8, "split": "width"})


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
    tok = tokenizers.create("cosmos", **toys.COSMOS)
    state = engine.to_official(cosmos.TABLE, jax.device_get(dict(tok.variables)))
    safetensors.numpy.save_file(state, tmp_path / "weights.safetensors")
    loaded = tokenizers.load(tmp_path / "weights.safetensors", model="cosmos", **toys.COSMOS)
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
        tokenizers.create("cosmos", **toys.COSMOS, network="image", decoder_network="factorized")


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


# ------------------------------------------------------------------------------------------------------------ training

# Through VGG16 and the whole network and back, in float32. Observed: losses 2e-6, gradients 3e-5.
LOSS, GRADIENT = 1e-4, 1e-3


def vgg_variables(case):
    entries = case.meta.get("vgg_state_dict") or case.meta["state_dict"]
    state = {name: refweights.weight(name, tuple(shape)) for name, shape, _ in entries}
    ((_, change),) = case.meta["vgg_weight_overrides"].items()  # all kernels
    state = {name: value * np.float32(change["scale"] if value.ndim == 4 else 1) for name, value in state.items()}
    target = jax.eval_shape(VGG16().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    return engine.to_tree(trunk_table("vgg"), target, state)


def content(prediction, target, variables):
    return perceptual.content_loss(VGG16(), variables)(prediction, target)


def gram(prediction, target, variables):
    return perceptual.gram_loss(VGG16(), variables)(prediction, target)


def recipe_of(case):
    return base.optimizer(
        name="adamw", lr=case.meta["lr"], b1=0.5, b2=0.999, eps=1e-8, weight_decay=0.01, decay="all", clip=1.0
    )


def train_step(case, weights):
    """One step of the library's trainer with the case's weights: (before, after, gradients, metrics), official names.

    Args:
      case: of a training step.
      weights: of the terms.
    """
    tok = official(case)
    terms = (
        Term("l1", weights["color"], lambda p, t, _: reconstruction.l1(p, t)),
        Term("content", weights["lpips"], content, "vgg"),
        Term("gram", weights.get("gram", 0.0), gram, "vgg"),
    )
    bottleneck = {"kl": weights["kl"]} if "kl" in weights else {}
    optimizer, rate = optim.make(recipe_of(case), 1)
    optimizer = remembered(optimizer)
    terms = tuple(term for term in terms if term.weight)
    recipe = Recipe(
        model=tok.module,
        objective=Objective(terms, mean_reduction, bottleneck, frozen={}, params={}),
        optimizer=optimizer,
        learning_rate=rate,
        adversary=None,
        seed=0,
        ema_decay=0.9999,
        ema_warmup=False,
        accumulate=1,
    )
    params = {"model": tok.params, "objective": {}}
    state = new_state(params, {}, tok.params, optimizer.init(params), None)
    pixels = jnp.asarray(case.input("x"))
    pixels = pixels if pixels.ndim == 5 else pixels[:, None]
    noise = [jnp.asarray(scaled(case, "noise"))] if "noise" in case.meta["inputs"] else []

    def program(state, frozen, pixels):
        with drawn("normal" if noise else None, noise):
            return make_step(recipe)(state, frozen, {"pixels": pixels})

    after, metrics = run_once(program, state, {"vgg": vgg_variables(case)}, pixels)
    names = [{"params": tree} for tree in (tok.params, after.params["model"], after.ema, after.optimizer[0]["model"])]
    return metrics, *(engine.to_official(cosmos.TABLE, jax.device_get(tree)) for tree in names)


TRAINING = {
    "train_ci8x8_l1_lpips": {"color": 1.0, "lpips": 0.1},
    "train_cv4x8x8_l1_lpips_gram": {"color": 1.0, "lpips": 0.073, "gram": 0.062},
    "train_cv8x8x8_l1_lpips": {"color": 1.0, "lpips": 0.1},
    # The bottleneck's KL is a sum over an item, theirs a mean over its 2 * 4 * 4 * 8 values.
    "train_cv8x8x8_vae_kl": {"color": 1.0, "lpips": 0.1, "kl": 1e-3 / 256},
    "train_dv8x16x16_l1_lpips": {"color": 1.0, "lpips": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SYSTEM, "train_(?!loss|schedules|.*consistency).*"))
def test_training_steps_are_the_authors(name):
    case, weights = Case(SYSTEM, name), TRAINING[name]
    metrics, before, after, ema, gradients = train_step(case, weights)
    for ours, theirs in {"l1": "color", "content": "lpips", "gram": "gram", "kl": "kl"}.items():
        assert (f"loss/{theirs}" in case.outputs) == (f"loss/{ours}" in metrics)
        if f"loss/{ours}" in metrics:
            value = metrics[f"loss/{ours}"] * weights[theirs]
            np.testing.assert_allclose(value, case.outputs[f"loss/{theirs}"][0], rtol=LOSS)
    np.testing.assert_allclose(metrics["loss/generator"], case.outputs["total_loss"][0], rtol=LOSS)
    check_update(case, before, after, ema, gradients)
    np.testing.assert_allclose(metrics["grad_norm/generator"], case.outputs["grad_total_norm"][0], rtol=GRADIENT)


def check_update(case, before, after, ema, gradients):
    norms = [np.linalg.norm(gradients[name]) for name in case.meta["grad_norm_names"]]
    expected = case.outputs["grad_norms"]
    # Biases in front of a norm over all channels have gradients that are rounding errors.
    np.testing.assert_allclose(norms, expected, rtol=GRADIENT, atol=1e-5 * expected.max())
    rate = case.meta["lr"]
    scale = min(1.0, 1.0 / case.outputs["grad_total_norm"][0])
    for key in [key for key in case.outputs if key.startswith("grad/") and not key.endswith("__stats")]:
        assert_same(case, key, gradients[key.removeprefix("grad/")], GRADIENT)
    for key in [key for key in case.outputs if key.startswith("delta/") and not key.endswith("__stats")]:
        name = key.removeprefix("delta/")
        places = tuple(slice(*place) for place in case.meta["slices"].get(key, ()))
        # Adam divides by the gradient: where that is near its own epsilon or rounding, the change is arbitrary.
        gradient = np.abs(gradients[name][places]) * scale
        clear = gradient > max(1e-6, 1e-3 * gradient.max(initial=0.0))
        change = (after[name] - before[name])[places]
        # A parameter near 1 takes changes in steps of 1e-7, a change is 1e-4.
        np.testing.assert_allclose(change[clear], case.outputs[key][clear], rtol=3e-3, atol=2e-3 * rate)
    (key,) = (key for key in case.outputs if key.startswith("ema_delta/") and not key.endswith("__stats"))
    name = key.removeprefix("ema_delta/")
    expected = 1e-4 * (after[name] - before[name])
    # Moved by a ten-thousandth of 1e-4: less than a float32 near 0.1 resolves, in either code.
    np.testing.assert_allclose(ema[name] - before[name], expected, atol=1e-8)


@pytest.mark.parametrize("name", cases(SYSTEM, "train_schedules"))
def test_schedules_are_the_authors(name):
    case = Case(SYSTEM, name)
    steps = {
        "lpips": ((0, 0.1), (499_999, 0.1), (500_000, 0.073)),
        "gram": ((0, 0.0), (499_999, 0.0), (500_000, 0.062)),
        "flow": ((0, 0.0), (249_999, 0.0), (250_000, 0.01)),
        "three": ((0, 1.0), (4_999, 1.0), (5_000, 2.0), (499_999, 2.0), (500_000, 3.0)),
    }
    for key, points in steps.items():
        weight = schedules.schedule(base.schedule(kind="piecewise", points=points))
        values = [weight(step) for step in case.meta["iterations"]]
        np.testing.assert_allclose(values, case.outputs[f"weight/{key}"], rtol=1e-6)
    rates = [optim.schedule(base.optimizer(lr=1e-4, warmup=9), 25)(step) * 1e4 for step in range(25)]
    np.testing.assert_allclose(rates, case.outputs["lr/warmup"], rtol=1e-5)
    # Theirs begins at zero and loses its first step; from the end of the warm-up on it is the same curve.
    cosine = optim.schedule(base.optimizer(lr=1e-4, schedule="cosine", warmup=5, end=1e-4), 20)
    np.testing.assert_allclose(
        [cosine(step) * 1e4 for step in range(5, 25)], case.outputs["lr/cosine"][5:], rtol=1e-4, atol=1e-7
    )


# ------------------------------------------------------------------------------ how the authors use it around the model


def uint8_input(case):
    pixels = np.floor((np.clip(case.input("x").astype(np.float64), -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)
    assert pixels.sum() == case.outputs["input_checksum"][0]
    return pixels


def official_wrapper(tok, window):
    """Reconstructions as image_lib.py and video_lib.py make them: windows, multiples of 16, half of the padding first.

    Yields the frames of a window, their floats with the padding, and where in those they are.
    """

    def split(size, multiple):
        missing = -size % multiple
        return missing // 2, missing - missing // 2

    reconstruct = platform.jit(lambda variables, x: tok.module.apply(variables, x)[0])
    frames, *size = window.shape[1:-1] if window.ndim == 5 else (None, *window.shape[1:-1])
    space = [split(n, 16) for n in size]
    padded = np.pad(window, ((0, 0),) * (window.ndim - 3) + tuple(space) + ((0, 0),))  # black
    crop = [slice(before, before + n) for (before, _), n in zip(space, size, strict=True)]
    if frames is not None:
        time = split(frames - 1, 8)
        padded = np.pad(padded, ((0, 0), time, *((0, 0),) * 3), mode="edge")
        crop.insert(0, slice(time[0], time[0] + frames))
    floats = reconstruct(tok.variables, pixels.to_float(padded))
    return np.asarray(floats), (slice(None), *crop)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SYSTEM, "wrapper_.*"))
def test_the_authors_wrappers_give_their_bytes(name):
    case = Case(SYSTEM, name)
    tok, clip = official(case), uint8_input(case)
    step = case.meta["temporal_window"] or clip.shape[1]
    windows = [clip[:, i : i + step] for i in range(0, clip.shape[1], step)] if clip.ndim == 5 else [clip]
    parts = []
    for i, window in enumerate(windows):
        floats, crop = official_wrapper(tok, window)
        assert floats.shape == tuple(case.outputs[f"padded_shape_{i}"])
        assert_same(case, f"recon_float_{i}", floats, PIXELS)
        region = case.outputs[f"crop_region_{i}"].reshape(2, -1)
        assert [(place.start, place.stop) for place in crop[1:]] == [tuple(pair) for pair in region.T]
        parts.append(np.asarray(pixels.to_uint8(floats[crop])).astype(int))
    found = np.concatenate(parts, axis=1) if clip.ndim == 5 else parts[0]
    difference = np.abs(found - case.outputs["output_uint8"])
    # A float that is half way between two levels goes either way.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SYSTEM, "downstream_chunked_latents"))
def test_chunked_latents_of_the_diffusion_models_are_the_authors(name):
    case = Case(SYSTEM, name)
    tok = official(case)
    # Statistics of every latent frame of a chunk: (channel, frame) -> (frame, 1, 1, channel).
    mean, std = (refweights.uniform(f"cosmos/chunked/{key}", (16, 3)).T[:, None, None] for key in ("mean", "std"))
    mean, std = 0.1 * mean, 1 + 0.3 * std
    encoder = platform.jit(lambda variables, frames: tok.module.apply(variables, frames, method="encode").latents)

    def encode(frames):
        # The public method would refuse the decoded pixels: made from random weights, they reach far beyond 1.
        latents = np.asarray(encoder(tok.variables, frames))
        return (latents - mean[: latents.shape[1]]) / std[: latents.shape[1]]

    def decode(latents):
        return np.asarray(tok.decode(latents * std + mean))

    x = case.input("x34")
    chunks = np.concatenate([encode(x[:, :17]), encode(x[:, 17:])], axis=1)
    assert_same(case, "chunk_latent", chunks, LATENTS)
    decoded = np.concatenate([decode(chunks[:, :3]), decode(chunks[:, 3:])], axis=1)
    assert_same(case, "chunk_recon", decoded, PIXELS)

    x = case.input("x25")  # windows of 17 frames that share 9, or two latents
    latents = np.concatenate([encode(x[:, :17]), encode(x[:, 8:])[:, 2:]], axis=1)
    assert_same(case, "overlap_latent", latents, LATENTS)
    first = decode(latents[:, :3])
    again = encode(first[:, -9:-8])
    second = decode(np.concatenate([again, latents[:, 2:]], axis=1))
    assert_same(case, "overlap_recon", np.concatenate([first, second[:, 9:]], axis=1), PIXELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(SYSTEM, "train_c.*_consistency"))
def test_training_on_overlapping_windows_is_the_authors(name):
    case = Case(SYSTEM, name)
    tok, frames, step, count = official(case), 9, 4, 3
    x = jnp.asarray(case.input("x"))

    def loss(params, vgg):
        windows = consistency.to_windows(x, frames, step)
        decoded, encoding = tok.module.apply({"params": params}, windows, train=True)
        clip = consistency.from_windows(decoded, count, step)
        latents = encoding.latents
        scale = consistency.latent_scale(windows.shape, latents.shape)
        shift = step // (frames // latents.shape[1])
        terms = {
            "color": reconstruction.l1(clip, x),
            "lpips": 0.1 * content(clip, x, vgg),
            "frame_consistency": consistency.disagreement(decoded, count, step),
            "latent_consistency": scale * consistency.disagreement(latents, count, shift),
        }
        # Their total counts the terms of the last module, this one, twice.
        total = sum(terms.values()) + terms["frame_consistency"] + terms["latent_consistency"]
        return total, (terms, clip)

    value_and_gradient = jax.value_and_grad(loss, has_aux=True)
    (total, (terms, clip)), gradients = run_once(value_and_gradient, tok.params, vgg_variables(case))
    for key, value in terms.items():
        np.testing.assert_allclose(value, case.outputs[f"loss/{key}"][0], rtol=LOSS, err_msg=key)
    np.testing.assert_allclose(total, case.outputs["total_loss"][0], rtol=LOSS)
    assert_same(case, "recon", clip, PIXELS)
    optimizer = optim.make(recipe_of(case), 1)[0]
    updates, _ = run_once(lambda g, p: optimizer.update(g, optimizer.init(p), p), gradients, tok.params)
    after = jax.tree.map(jnp.add, tok.params, updates)
    ema = optim.ema_update(tok.params, after, 0.9999, jnp.int32(0), warmup=False)
    names = [{"params": tree} for tree in (tok.params, after, ema, gradients)]
    check_update(case, *(engine.to_official(cosmos.TABLE, jax.device_get(tree)) for tree in names))
