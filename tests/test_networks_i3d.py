"""I3D and its three input pipelines against the authors' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases, relative_l2
from test_networks_inception import pixels

from tokenizers.convert import i3d as names
from tokenizers.convert.engine import to_official
from tokenizers.networks import i3d
from tokenizers.networks.weights import MissingWeights


@functools.cache
def compiled():
    def apply(variables, video):
        found = i3d.I3D().apply(variables, video)
        return found["logits"], found["pooled"]

    return jax.jit(apply)


def loaded(state):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(i3d, "read_state_dict", lambda path: state)
        return i3d.load(__file__)[1]


@pytest.mark.slow  # 13 s to compile on two cores
@pytest.mark.parametrize("name", cases("i3d_fvd", "full_i3d.*"))
def test_logits_equal_the_authors(name):
    case = Case("i3d_fvd", name)
    logits, pooled = compiled()(loaded(case.weights()), case.input("video"))
    # Sums of up to 7 * 7 * 7 * 832 float32 products through 22 layers (7e-7 measured).
    assert relative_l2(logits, case.outputs["logits"]) < 1e-5
    assert relative_l2(pooled, case.outputs["avg_pool_features"][:, :, 0, 0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("i3d_fvd", "fvd_end_to_end_small"))
def test_logits_of_8_bit_videos_equal_omnitokenizer(name):
    case = Case("i3d_fvd", name)
    variables = loaded(case.weights())
    for key in ("real", "fake"):
        logits, _ = compiled()(variables, i3d.preprocess_squash(pixels(case, key)))
        assert relative_l2(logits, case.outputs[f"logits_{key}"]) < 1e-5


@pytest.mark.parametrize("name", cases("i3d_fvd", "full_i3d.*"))
def test_published_names_and_shapes_fit_the_network(name):
    # Shapes alone: zeros of the listed tensors, loaded strictly and given back.
    listed = {name: tuple(shape) for name, shape, _ in Case("i3d_fvd", name).meta["state_dict"]}
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in listed.items()}
    back = to_official(names.TABLE, loaded(zeros))
    assert {name: value.shape for name, value in back.items()} == {
        name: shape for name, shape in listed.items() if not name.endswith("num_batches_tracked")
    }


def test_taps_and_frame_counts():
    # Temporal sizes by TensorFlow's SAME rule: 17 -> 9 -> 5 -> 3, two windows of the last pool.
    shapes = jax.eval_shape(
        lambda x: i3d.I3D().init_with_output(jax.random.key(0), x)[0],
        jax.ShapeDtypeStruct((2, 17, 224, 224, 3), jnp.float32),
    )
    assert shapes["Conv3d_1a_7x7"].shape == (2, 9, 112, 112, 64)
    assert shapes["Mixed_3c"].shape == (2, 9, 28, 28, 480)
    assert shapes["Mixed_5c"].shape == (2, 3, 7, 7, 1024)
    assert shapes["pooled"].shape == (2, 2, 1024)
    assert shapes["logits"].shape == (2, 400)
    short = jax.ShapeDtypeStruct((1, 8, 224, 224, 3), jnp.float32)
    with pytest.raises(ValueError, match="T at least 9; got"):
        jax.eval_shape(i3d.I3D().init, jax.random.key(0), short)


PIPELINES = {
    "omni": (i3d.preprocess_squash, "video_u8"),
    "videogpt": (i3d.preprocess_truncated, "video_f"),
    "styleganv": (i3d.preprocess_cropped, "video_f"),
}


@pytest.mark.parametrize("name", cases("i3d_fvd", "preprocess"))
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pipelines_equal_the_authors(name, pipeline):
    case = Case("i3d_fvd", name)
    preprocess, key = PIPELINES[pipeline]
    video = pixels(case, key) if key == "video_u8" else case.input(key)
    actual = preprocess(video, case.meta["config"]["resolution"])
    # Resampling weights in float32, on values of either sign (4e-7 measured).
    assert relative_l2(actual, case.outputs[pipeline]) < 2e-6


def test_tall_and_wide_videos_are_cropped_in_the_middle():
    video = np.zeros((1, 1, 28, 56, 3), np.float32)
    video[:, :, :, 14:42] = 1
    assert np.all(i3d.preprocess_cropped(video, 28) == 1)
    assert np.all(i3d.preprocess_cropped(video.swapaxes(2, 3), 28) == 1)


def test_missing_weights(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)
    with pytest.raises(MissingWeights, match=r"i3d_pretrained_400\.pt"):
        i3d.load()
