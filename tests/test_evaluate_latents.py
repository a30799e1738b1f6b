"""What is said of latents: cases whose answer is known, and the same numbers however the data is cut up."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import toys
from test_evaluate_run import PatchTokenizer

from tokenizers.evaluate import latents, plots, run
from tokenizers.evaluate.latents import Space
from tokenizers.parallel.mesh import make_mesh
from tokenizers.types import Encoding, Spec

RNG = np.random.default_rng(0)
SPECTRUM = ("spectrum", "uniformity", "effective_rank")


def space_of(values, pixels=None, valid=None):
    """What is kept of latents ``(N, h, w, D)``."""
    pixels = np.zeros((len(values), 1, 16, 16, 3), np.uint8) if pixels is None else pixels
    valid = np.ones(len(values), bool) if valid is None else valid
    space = Space()
    encoding = Encoding(jnp.asarray(values, jnp.float32))
    space.add(latents.look(None, SPECTRUM, jnp.asarray(pixels), encoding, jnp.asarray(valid))[0], valid)
    return space


def falling(count, size, channels, exponent):
    """Pictures whose power falls as frequency to the ``exponent``."""
    frequency = np.hypot(*np.meshgrid(np.arange(size), np.arange(size)))
    frequency[0, 0] = 1
    coefficients = RNG.normal(size=(count, size, size, channels)) * (frequency ** (exponent / 2))[..., None]
    return scipy.fft.idctn(coefficients, axes=(1, 2), norm="ortho")


def test_white_noise_has_every_frequency_and_every_channel():
    found = space_of(3 + RNG.normal(size=(200, 16, 16, 6))).summary(SPECTRUM)
    assert found["latents_slope"] == pytest.approx(0, abs=0.02)
    # A quarter of a disk of radius 1/4 is missing from a square of side 1/2: 1 - pi / 16, up to the grid.
    high = np.hypot(*np.indices((16, 16))) > 8
    assert found["latents_high_share"] == pytest.approx(high.sum() / (16**2 - 1), abs=0.005)
    assert found["effective_rank"] == pytest.approx(6, abs=0.01)
    assert found["uniformity"] == pytest.approx(latents.even(6), abs=0.01)
    assert found["uniformity_of_even"] == latents.even(6)


@pytest.mark.parametrize("exponent", [-2.0, -1.0])
def test_the_slope_is_the_exponent_whatever_the_scale_of_a_channel(exponent):
    values = falling(200, 16, 2, exponent) * np.array([1.0, 50.0])
    space = space_of(values)
    assert space.latents.slope() == pytest.approx(exponent, abs=0.08)
    frequency, power = space.latents.curve()
    assert np.all(np.diff(frequency) > 0)
    assert frequency[-1] < 0.5
    assert np.average(power, weights=space.latents.counts[space.latents.counts > 0]) == pytest.approx(1)
    assert space.latents.high_share() < 1 - np.pi / 16


def test_pixels_are_compared_at_the_size_of_the_latents():
    blocks = RNG.integers(0, 256, size=(100, 1, 8, 8, 3)).astype(np.uint8)
    pixels = np.repeat(np.repeat(blocks, 4, axis=2), 4, axis=3)[:, :, :30]  # two rows that padding brings back
    space = space_of(RNG.normal(size=(100, 8, 8, 2)), pixels)
    assert space.pixels.slope() == pytest.approx(0, abs=0.05)
    np.testing.assert_allclose(latents._shrunk(jnp.asarray(pixels[:, 0]), (8, 8)), blocks[:, 0] / 127.5 - 1, atol=1e-6)


def test_batches_and_rows_that_do_not_count_change_nothing():
    values = RNG.normal(size=(10, 8, 8, 3)) * np.array([1, 2, 3]) + 5
    pixels = RNG.integers(0, 256, size=(10, 1, 16, 16, 3)).astype(np.uint8)
    whole = space_of(values, pixels).summary(SPECTRUM)
    filled = np.concatenate([values[6:], 100 + values[:2]]), np.concatenate([pixels[6:], pixels[:2]])
    parts = space_of(values[:6], pixels[:6]).merge(space_of(*filled, np.array([True] * 4 + [False] * 2)))
    for key, value in parts.summary(SPECTRUM).items():
        assert value == pytest.approx(whole[key], rel=1e-4), key
    assert Space().summary(SPECTRUM)["effective_rank"] is None


def test_the_effective_rank_counts_directions():
    assert latents.effective_rank(np.eye(5) * 0.3) == pytest.approx(5)
    assert latents.effective_rank(np.ones((4, 4))) == pytest.approx(1, abs=1e-9)
    assert latents.effective_rank(np.diag([3.0, 1.0, 0.0])) == pytest.approx(
        np.exp(-0.75 * np.log(0.75) + 0.5 * np.log(2))
    )
    assert latents.effective_rank(np.zeros((3, 3))) == 0
    mixed = RNG.normal(size=(4, 4))
    turned = np.linalg.qr(mixed)[0]
    assert latents.effective_rank(turned @ np.diag([4.0, 2, 1, 1]) @ turned.T) == pytest.approx(
        latents.effective_rank(np.diag([4.0, 2, 1, 1]))
    )


def test_uniformity_knows_its_ends():
    assert latents.uniformity(np.array([[1.0], [-1.0]])) == pytest.approx(-8)  # distance 2
    assert latents.uniformity(np.ones((7, 3))) == 0
    one, _ = scipy.integrate.quad(lambda angle: np.exp(4 * np.cos(angle) - 4) / np.pi, 0, np.pi)
    assert latents.even(2) == pytest.approx(np.log(one))
    three, _ = scipy.integrate.quad(lambda cosine: np.exp(4 * cosine - 4) / 2, -1, 1)  # Archimedes: even in the cosine
    assert latents.even(3) == pytest.approx(np.log(three))
    assert latents.even(1) == pytest.approx(latents.uniformity(RNG.choice([-1.0, 1.0], size=(2000, 1))), abs=0.01)
    assert latents.even(512) == pytest.approx(-4, abs=0.05)  # all distances are the root of 2
    clumped = np.concatenate([RNG.normal(0, 0.01, (300, 4)) + 1, RNG.normal(0, 0.01, (300, 4)) - 1])
    assert latents.uniformity(clumped) > latents.even(4) + 0.5


def evaluate(tokenizer, pixels, mesh=None, metrics=latents.METRICS, batch=8):
    parts = [{"pixels": pixels[i : i + batch], "stream": "s"} for i in range(0, len(pixels), batch)]
    return run.evaluate(tokenizer, parts, metrics=metrics, mesh=mesh, baseline_items=0, preview_items=0)["overall"]


def test_means_of_patches_are_equivariant_to_scale():
    blocks = RNG.integers(0, 256, size=(8, 4, 4, 3)).astype(np.uint8)
    pixels = np.repeat(np.repeat(blocks, 8, axis=1), 8, axis=2)  # 2x2 patches of one colour
    assert evaluate(PatchTokenizer(discrete=False), pixels, metrics=("scale_equivariance",))["scale_psnr"] > 80
    # Halving averages four patches: a checkerboard of them becomes grey, in the latents as in the picture.
    board = np.broadcast_to(255 * ((np.indices((32, 32)) // 4).sum(0) % 2)[..., None], (8, 32, 32, 3)).astype(np.uint8)
    small = latents.halved(jnp.asarray(board))
    assert small.shape == (8, 16, 16, 3)
    expected = 10 * np.log10(255**2 / np.mean((127.5 - np.asarray(small)) ** 2))
    found = evaluate(PatchTokenizer(discrete=False), board, metrics=("scale_equivariance",))["scale_psnr"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_eight_devices_find_the_same_and_the_plot_is_drawn():
    pixels = np.clip(128 + 60 * falling(16, 24, 3, -1.5), 0, 255).astype(np.uint8)
    one = evaluate(toys.image("continuous"), pixels)
    eight = evaluate(toys.image("continuous"), pixels, make_mesh(data=4, fsdp=2), batch=6)
    for key, value in one.items():
        if isinstance(value, float):
            # The same sums in another order; 0.01 of them is what uniformity's choice of vectors cannot change.
            assert eight[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    assert one["pixels_slope"] == pytest.approx(-1.5, abs=0.5)
    assert np.isfinite(one["scale_psnr"])
    space = space_of(RNG.normal(size=(2, 8, 8, 2)), RNG.integers(0, 256, (2, 1, 16, 16, 3)).astype(np.uint8))
    assert plots.spectra({"a": space, "b": Space()}).startswith(b"\x89PNG")
    assert plots.spectra({"b": Space()}) is None


def test_what_is_missing_is_said():
    pixels = RNG.integers(0, 256, size=(8, 16, 16, 3)).astype(np.uint8)
    sequence = evaluate(toys.image("tokens"), pixels)
    assert sequence["latents_slope"] == "not computed: needs a grid of at least 4x4 latents, got 16"
    assert sequence["scale_psnr"] == "not computed: needs latents before a codebook; codes cannot be averaged"
    assert 1 <= sequence["effective_rank"] <= 3
    small = evaluate(toys.image("continuous"), pixels[:, :8, :8])
    assert small["pixels_high_share"] == "not computed: needs a grid of at least 4x4 latents, got 2x2"
    assert small["scale_psnr"] == "not computed: needs even grids of at least 4x4 latents, got 2x2"
    both = [{"pixels": pixels}, {"pixels": pixels[:, :8, :8]}]
    found = run.evaluate(toys.image("continuous"), both, metrics=("spectrum",), baseline_items=0, preview_items=0)
    assert found["overall"]["latents_slope"].startswith("not computed"), "no average over those that happen to fit"
    same = evaluate(toys.image("continuous"), np.zeros_like(pixels), metrics=("spectrum",))
    assert same["pixels_slope"] == "not computed: needs pictures and latents that vary"
    video = Spec((1, 4, 4), 2, None, True, True, "", tokens_per_item=16)
    assert latents.scale_reason(Encoding(jnp.zeros((1, 16, 2))), video, None).startswith("a grid of latents")
