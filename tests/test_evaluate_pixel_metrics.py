"""PSNR, SSIM and MS-SSIM against the authors' code and scikit-image, and what they promise about layout and size."""

import chex
import jax
import numpy as np
import pytest
import refweights
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import Case, cases
from skimage.metrics import structural_similarity

from tokenizers.evaluate import pixel_metrics
from tokenizers.evaluate.protocols import PROTOCOLS

# The reference values are stored as float32; the authors' own SSIM runs in float32 with larger cancellation than ours.
DECIBELS = 2e-4
SIMILARITY = 2e-5


def uint8_input(entry):
    base = refweights.image_like(entry["seed_name"], tuple(entry["shape"])).astype(np.float64)
    if "noise_scale" in entry:
        base = base + entry["noise_scale"] * refweights.uniform(entry["noise_seed"], tuple(entry["shape"]))
    pixels = np.floor((np.clip(base, -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)
    return pixels if pixels.ndim == 4 else pixels[None]


def pixels_between(name, shape, noise=0.1):
    clean = refweights.image_like(name, shape)
    noisy = np.clip(clean + noise * refweights.uniform(name + "/noise", shape), -1, 1)
    return (clean + 1) * 127.5, (noisy + 1) * 127.5


@pytest.mark.parametrize("name", cases("metrics", "(?!.*(lpips|fvd|predict1)).*psnr.*"))
def test_tokenbench_psnr_and_ssim_equal_the_authors(name):
    case = Case("metrics", name)
    protocol = PROTOCOLS["tokenbench"]
    for pair, (first, second) in case.meta["pairs"].items():
        a, b = uint8_input(case.meta["inputs"][first]), uint8_input(case.meta["inputs"][second])
        if f"checksum/{pair}" in case.outputs:
            assert [a.sum(), b.sum()] == case.outputs[f"checksum/{pair}"].tolist()
        reconstruction = (b / 127.5 - 1).astype(np.float32)[None]  # rounds back to exactly b
        values = protocol.prepare(a[None], reconstruction)
        np.testing.assert_allclose(protocol.psnr(*values), case.outputs[f"psnr/{pair}"], atol=DECIBELS)
        np.testing.assert_allclose(protocol.ssim(*values), case.outputs[f"ssim/{pair}"], atol=SIMILARITY)


@pytest.mark.parametrize("name", cases("metrics", "predict1.*"))
def test_predict1_validation_metrics_equal_the_authors(name):
    case = Case("metrics", name)
    protocol = PROTOCOLS["predict1"]
    for pair, (first, second) in case.meta["pairs"].items():
        x, y = case.input(first), case.input(second)
        reconstruction = np.clip(np.float32(0.7) * x + np.float32(0.3) * y, -1, 1)
        reference = np.floor((x + 1) / 2 * 255 + 0.5).astype(np.uint8)
        values = protocol.prepare(reference, reconstruction)
        # The authors average over all frames of the batch; every item here has as many.
        np.testing.assert_allclose(protocol.psnr(*values).mean(), case.outputs[f"psnr/{pair}"][0], atol=DECIBELS)
        np.testing.assert_allclose(protocol.ssim(*values).mean(), case.outputs[f"ssim/{pair}"][0], atol=SIMILARITY)


@pytest.mark.parametrize("name", cases("vidtok", "eval_metrics.*"))
def test_vidtok_metrics_equal_the_authors(name):
    case = Case("vidtok", name)
    protocol = PROTOCOLS["vidtok"]

    def unit(key):
        gain = case.meta["inputs"][key].get("post", "").removeprefix("*") or 1
        return (np.clip(case.input(key) * np.float32(gain), -1, 1) + 1) / 2

    x, y = unit("x"), unit("y")
    np.testing.assert_allclose(protocol.psnr(x, y), case.outputs["psnr_protocol"][None], atol=DECIBELS)
    np.testing.assert_allclose(protocol.ssim(x, y), case.outputs["ssim_protocol"][None], atol=SIMILARITY)
    np.testing.assert_allclose(protocol.psnr(x, x), case.outputs["psnr_identical"][None], atol=DECIBELS)
    # 400 pixels against 256: pooled by two first
    np.testing.assert_allclose(
        protocol.ssim(unit("big_x"), unit("big_y")), case.outputs["ssim_big"][None], atol=SIMILARITY
    )
    kernel = np.asarray(pixel_metrics.WINDOWS["gaussian"][0])
    np.testing.assert_allclose(np.outer(kernel, kernel), case.outputs["gaussian_kernel"][0], atol=1e-7)


@pytest.mark.parametrize("window", ["uniform", "gaussian"])
def test_ssim_equals_scikit_image_on_odd_sizes(window):
    a, b = pixels_between("ssim/odd", (2, 37, 52, 3))
    options = {} if window == "uniform" else {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(p.astype(np.float64), q.astype(np.float64), data_range=255, channel_axis=-1, **options)
        for p, q in zip(a, b, strict=True)
    ]
    actual = pixel_metrics.ssim(a, b, data_range=255.0, window=window)
    np.testing.assert_allclose(actual, expected, atol=SIMILARITY)


def test_ms_ssim_equals_a_direct_evaluation_of_its_definition():
    a, b = pixels_between("msssim", (1, 172, 164, 1), noise=0.3)
    product, p, q = 1.0, a[0, ..., 0].astype(np.float64), b[0, ..., 0].astype(np.float64)
    for scale, weight in enumerate(pixel_metrics.MS_SSIM_WEIGHTS):
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        # K1 = large makes the luminance term one, which leaves the contrast term
        options["K1"] = 0.01 if scale == 4 else 1e6
        product *= structural_similarity(p, q, **options) ** weight
        if scale < 4:
            p, q = (np.pad(z, [(0, n % 2) for n in z.shape], mode="edge") for z in (p, q))
            p, q = (z.reshape(z.shape[0] // 2, 2, z.shape[1] // 2, 2).mean((1, 3)) for z in (p, q))
    np.testing.assert_allclose(pixel_metrics.ms_ssim(a, b, data_range=255.0), [product], atol=SIMILARITY)


def test_identical_pictures_score_one():
    a, _ = pixels_between("same", (1, 164, 161, 3))
    np.testing.assert_allclose(pixel_metrics.ms_ssim(a, a, data_range=255.0), 1.0, atol=1e-6)
    np.testing.assert_allclose(pixel_metrics.ssim(a, a, data_range=255.0), 1.0, atol=1e-6)


def test_too_small_pictures_are_refused_with_the_size_they_need():
    small = np.zeros((1, 160, 200, 3), np.float32)
    with pytest.raises(ValueError, match=r"at least 161 pixels.*160x200"):
        pixel_metrics.ms_ssim(small, small, data_range=255.0)
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 8"):
        pixel_metrics.ssim(small[:, :8], small[:, :8], data_range=255.0, window="gaussian")
    with pytest.raises(ValueError, match="Did you mean 'gaussian'"):
        pixel_metrics.ssim(small, small, data_range=255.0, window="gausian")
    with pytest.raises(ValueError, match="one shape"):
        pixel_metrics.psnr(small, small[..., :1], data_range=255.0)


def test_float32_sums_stay_exact_on_large_pictures():
    noise = refweights.uniform("large", (1, 540, 960, 3))
    a, b = 128 + 100 * noise, 128 + 99 * noise
    mse = np.mean((a.astype(np.float64) - b) ** 2)
    # 1e-4 dB is far below the second decimal that papers print.
    np.testing.assert_allclose(pixel_metrics.psnr(a, b, data_range=255.0), [10 * np.log10(255**2 / mse)], atol=1e-4)


def test_items_do_not_depend_on_the_sharding():
    a, b = pixels_between("sharded", (8, 2, 24, 32, 3))
    protocol = PROTOCOLS["tokenbench"]

    def both(p, q):
        return protocol.psnr(p, q), protocol.ssim(p, q)

    alone = jax.jit(both)(a, b)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)
    layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    spread = jax.jit(both)(jax.device_put(a, layout), jax.device_put(b, layout))
    chex.assert_trees_all_close(alone, spread, rtol=1e-6)  # another order of the same sums


def test_a_protocol_names_what_its_data_lacks():
    assert PROTOCOLS["vidtok"].departures((17, 256, 256)) == []
    found = PROTOCOLS["vidtok"].departures((16, 128, 256))
    assert found == ["128x256 pixels instead of 256x256", "16 frames instead of 17"]
