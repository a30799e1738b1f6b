"""The FID Inception network and its input pipelines against the authors' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

from tokenizers.convert import inception as names
from tokenizers.networks import inception
from tokenizers.networks.weights import MissingWeights


def pixels(case, key="image"):
    """The 8-bit images of a case (its json says how they are drawn)."""
    entry = case.meta["inputs"][key]
    shape = tuple(entry["shape"])
    if entry["fn"] == "randint":
        unit = (refweights.uniform(entry["seed_name"], shape).astype(np.float64) + 1) / 2
        return np.minimum(np.floor(unit * entry["n"]), entry["n"] - 1).astype(np.uint8)
    assert entry["fn"] == "image_uint8"
    signal = refweights.image_like(entry["seed_name"], shape).astype(np.float64)
    return np.clip(np.rint((signal + 1) * 127.5), 0, 255).astype(np.uint8)


@functools.cache
def compiled():
    return jax.jit(inception.InceptionV3().apply)


def loaded(state):
    """The variables, through `load`."""
    state = names.torchvision_names(state)
    # pytorch-fid's module has no classifier, its file does.
    state.setdefault("fc.weight", np.zeros((1008, 2048), np.float32))
    state.setdefault("fc.bias", np.zeros(1008, np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "read_state_dict", lambda path: state)
        return inception.load(__file__)[1]


# Float32 rounding of resampling weights; features: sums in another order through 48 layers (7e-7 measured).
RESIZING, FEATURES = 1e-6, 1e-5


@pytest.mark.parametrize("name", cases("inception_fid", "tf1_bilinear.*"))
def test_tensorflow_resizing(name):
    case = Case("inception_fid", name)
    actual = inception.resize_tensorflow(jnp.float32(pixels(case)), tuple(case.meta["config"]["size"]))
    assert relative_l2(actual, case.outputs["out"]) < RESIZING


@pytest.mark.parametrize("name", cases("inception_fid", "clean_resize_down"))
@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "lanczos", "box"])
def test_pillow_resizing(name, filter):
    case = Case("inception_fid", name)
    key = f"clean_{filter}" if filter.startswith("bi") else filter
    width, height = case.meta["config"][key]["size_wh"]
    actual = inception.resize_pillow(pixels(case), (height, width), filter)
    np.testing.assert_array_equal(actual, case.outputs[key])


@pytest.mark.parametrize("name", cases("inception_fid", "clean_resize_down"))
def test_half_pixel_resizing(name):
    case = Case("inception_fid", name)
    actual = inception.resize_half_pixel(jnp.float32(pixels(case)), (24, 20))
    assert relative_l2(actual, case.outputs["pytorch_bilinear"]) < RESIZING


@pytest.mark.parametrize("name", cases("inception_fid", "clean_resize_to_299"))
def test_clean_and_pytorch_pipelines(name):
    case = Case("inception_fid", name)
    images = pixels(case)
    clean = inception.preprocess_clean(images)[:, ::5, ::5] * 128 + 128
    assert relative_l2(clean, case.outputs["clean"]) < RESIZING
    legacy = (inception.preprocess_pytorch(images)[:, ::5, ::5] + 1) * 127.5
    assert relative_l2(legacy, case.outputs["legacy_pytorch"]) < RESIZING


@pytest.mark.parametrize("name", cases("inception_fid", "fidelity.*"))
def test_features_equal_torch_fidelity(name):
    case = Case("inception_fid", name)
    features = compiled()(loaded(case.weights()), inception.preprocess_tensorflow(pixels(case)))
    for key in ("64", "192", "768", "2048", "logits_unbiased", "logits"):
        assert relative_l2(features[key], case.outputs[f"features_{key}"]) < FEATURES, key


@pytest.mark.parametrize("name", cases("inception_fid", "pytorch_fid.*"))
def test_features_equal_pytorch_fid(name):
    case = Case("inception_fid", name)
    features = compiled()(loaded(case.weights()), inception.preprocess_pytorch(case.input("image01")))
    for key in ("64", "192", "768", "2048"):
        assert relative_l2(features[key], case.outputs[f"features_{key}"]) < FEATURES, key


def test_8_bit_and_unit_range_images_are_the_same_to_pytorch_fid():
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), dtype=np.uint8)
    unit = np.float32(images) / np.float32(255)
    actual = inception.preprocess_pytorch(images)
    np.testing.assert_allclose(actual, inception.preprocess_pytorch(unit), atol=1e-6)


def test_missing_weights_and_unknown_filters(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)
    with pytest.raises(MissingWeights, match=r"pt_inception-2015-12-05-6726825d\.pth"):
        inception.load()
    with pytest.raises(ValueError, match="Did you mean 'bicubic'"):
        inception.resize_pillow(np.zeros((1, 4, 4, 3), np.uint8), (2, 2), "cubic")
