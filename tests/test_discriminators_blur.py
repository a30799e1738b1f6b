"""MaskBit's discriminator against TiTok's code: logits, every stage, and the gradient that fools it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

from tokenizers.convert.engine import Rule, to_tree
from tokenizers.discriminators import blur
from tokenizers.parallel import platform

# The authors' names. The blur of a stage is computed, and its last two layers are `to_logits`.
TABLE = (
    Rule(r"params/conv_in/\w+", "block_in.0.{leaf}"),
    Rule(r"params/conv_(\d)/\w+", r"blocks.\1.0.{leaf}"),
    Rule(r"params/norm_(\d)/\w+", r"blocks.\1.2.{leaf}"),
    Rule(r"params/conv_mid/\w+", "to_logits.0.{leaf}"),
    Rule(r"params/conv_out/\w+", "to_logits.2.{leaf}"),
)
IGNORE = (r"blocks\.\d\.1\.kernel",)


def variables_of(module, state, shape):
    return to_tree(TABLE, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape)), state, ignore=IGNORE)


def stored(text, value):
    found = re.search(r"flattened row-major then \[::(\d+)\]", text)
    return np.asarray(value).ravel()[:: int(found[1])] if found else value


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if "small" in n else pytest.mark.slow) for n in cases("titok", "discriminator_.*")],
)
def test_logits_stages_and_gradient_are_the_official_ones(name):
    case = Case("titok", name)
    config, expected, about = case.meta["config"], case.outputs, case.meta["outputs"]
    module = blur.maskbit_2d(config.get("hidden_channels", 128), config.get("num_stages", 3))
    module = module.clone(blur=config.get("blur_resample", True))
    pixels = case.input("image")
    variables = variables_of(module, case.weights(), pixels.shape)

    def judge(pixels):
        logits, features = module.apply(variables, pixels, method="features")
        return logits.mean(), (logits, features)

    grad = jax.jit(jax.grad(judge, has_aux=True), compiler_options=platform.run_once_options())
    gradient, (logits, features) = grad(pixels)
    # Observed: logits 1e-6, stages 1e-6, gradients 4e-5.
    assert relative_l2(logits, expected["logits"]) < 1e-5
    for i, feature in enumerate(features):
        assert relative_l2(stored(about[f"block{i}"], feature), expected[f"block{i}"]) < 1e-5
    pooled = blur.adaptive_max_pool(features[-1], 16)
    assert relative_l2(stored(about["pool"], pooled), expected["pool"]) < 1e-5
    # By pixels in [0, 1] there.
    assert relative_l2(stored(about["grad_x"], 2 * gradient), expected["grad_x"]) < 3e-4


def test_windows_of_the_pool_cover_an_image_of_any_size():
    x = refweights.uniform("blur/pool", (1, 5, 32, 2))
    pooled = blur.adaptive_max_pool(x, 16)
    rows = [x[0, i * 5 // 16 : -(-(i + 1) * 5 // 16)].max(0).reshape(16, 2, 2).max(1) for i in range(16)]
    np.testing.assert_array_equal(pooled[0], np.stack(rows))


def test_a_clip_is_judged_frame_by_frame():
    module = blur.maskbit_2d(32, 2)
    clip = refweights.image_like("blur/clip", (2, 3, 24, 40, 3))
    judge = jax.jit(
        lambda clip, images: [module.init_with_output(jax.random.key(0), x)[0] for x in (clip, images)],
        compiler_options=platform.run_once_options(),
    )
    logits, single = judge(clip, clip[1])
    assert logits.shape == (6, 16, 16, 1)
    np.testing.assert_allclose(logits[3:], single, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="group norms"):
        blur.maskbit_2d(32, 2, norm="batch")
