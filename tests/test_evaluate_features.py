"""LPIPS, Inception and I3D in evaluation: the protocol's preprocessing, and reasons instead of made-up numbers."""

import dataclasses

import jax
import numpy as np
import pytest
import refweights
from reference import Case, cases

from tokenizers.evaluate import features
from tokenizers.evaluate.protocols import PROTOCOLS
from tokenizers.networks import inception, weights

ALL = ("lpips", "rfid", "inception_score", "fvd")


def uint8_input(entry):
    base = refweights.image_like(entry["seed_name"], tuple(entry["shape"])).astype(np.float64)
    if "noise_scale" in entry:
        base = base + entry["noise_scale"] * refweights.uniform(entry["noise_seed"], tuple(entry["shape"]))
    return np.floor((np.clip(base, -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)


def as_reconstruction(pixels):
    return (pixels / 127.5 - 1).astype(np.float32)


def test_without_weights_every_network_metric_says_what_it_needs(monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    networks = features.Networks(PROTOCOLS["tokenbench"], (*ALL, "psnr"), {}, None)
    clip = np.zeros((1, 10, 64, 64, 3), np.uint8)
    found, reasons = networks(clip, as_reconstruction(clip))
    assert found == {}
    assert set(reasons) == set(ALL)
    assert "VGG-16" in reasons["lpips"]
    assert "Inception" in reasons["rfid"]
    assert "I3D" in reasons["fvd"]
    assert all(weights.VARIABLE in reason for reason in reasons.values())


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'inception'"):
        features.Networks(PROTOCOLS["tokenbench"], ALL, {"inceptoin": "x.pth"}, None)


@pytest.mark.parametrize("name", cases("metrics", "tokenbench_lpips.*"))
def test_tokenbench_lpips_equals_the_authors(name, tmp_path):
    from safetensors.numpy import save_file

    case = Case("metrics", name)
    path = tmp_path / "lpips.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in case.weights().items()}, path)
    networks = features.Networks(PROTOCOLS["tokenbench"], ("lpips",), {"lpips": path}, None)
    for pair, (first, second) in case.meta["pairs"].items():
        a, b = (uint8_input(case.meta["inputs"][key])[None] for key in (first, second))
        found, reasons = networks(a, as_reconstruction(b))
        assert reasons == {}
        # Signed random layers cancel, which leaves a little more than float32 noise.
        np.testing.assert_allclose(found["lpips"], case.outputs[f"lpips/{pair}"], rtol=2e-4)


@pytest.mark.parametrize("name", cases("metrics", "tokenbench_fvd.*"))
def test_tokenbench_fvd_preprocessing_equals_the_authors(name):
    case = Case("metrics", name)
    prepare = features.FVD_INPUT[PROTOCOLS["tokenbench"].fvd]
    for key in case.meta["videos"]:
        pixels = uint8_input(case.meta["inputs"][key])
        actual = np.asarray(prepare(pixels[None].astype(np.float32)))[0]
        cut = tuple(slice(*bounds) for bounds in case.meta["slices"][f"preprocessed/{key}"])
        # Both interpolate in float32.
        np.testing.assert_allclose(actual[cut], case.outputs[f"preprocessed/{key}"], atol=2e-5)


def test_clean_fid_resizing_on_the_device_equals_pillow():
    pixels = uint8_input({"seed_name": "clean", "shape": (1, 340, 61, 3)})  # one side shrinks, the other grows
    actual = features.FID_INPUT["clean"](pixels.astype(np.float32))
    # Pillow stores float32 between its two passes.
    np.testing.assert_allclose(actual, inception.preprocess_clean(pixels), atol=1e-4)


@pytest.mark.slow
def test_inception_and_i3d_features_of_identical_pictures_agree(monkeypatch):
    for network in ("inception", "i3d"):
        module = features.inception.InceptionV3() if network == "inception" else features.i3d.I3D()
        shape = (1, 299, 299, 3) if network == "inception" else (1, 9, 224, 224, 3)
        variables = jax.jit(module.init)(jax.random.key(0), np.zeros(shape, np.float32))
        monkeypatch.setattr(getattr(features, network), "load", lambda path, found=(module, variables): found)
    monkeypatch.setattr(features.weights, "find", lambda name, path=None: path)
    protocol = dataclasses.replace(PROTOCOLS["tokenbench"])
    networks = features.Networks(protocol, ("rfid", "inception_score", "fvd"), {}, None)
    clip = uint8_input({"seed_name": "clip", "shape": (2, 9, 40, 40, 3)})
    found, reasons = networks(clip, as_reconstruction(clip))
    assert reasons == {}
    assert found["inception"][0].shape == (2, 9, 2048)
    assert found["logits"].shape == (2, 9, 1008)
    assert found["i3d"][0].shape == (2, 400)
    for pair in (found["inception"], found["i3d"]):
        np.testing.assert_array_equal(*pair)
    _, reasons = networks(clip[:, :8], as_reconstruction(clip[:, :8]))
    assert reasons == {"fvd": "clips of at least 9 frames, got 8"}
