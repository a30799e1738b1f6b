"""ConvNeXt-S and the perceptual losses of TiTok against the authors' code, and where the weights come from."""

import functools
import re

import jax
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

from tokenizers.convert import convnext as names
from tokenizers.convert import lpips as lpips_names
from tokenizers.convert.engine import to_official, to_tree
from tokenizers.losses import perceptual
from tokenizers.networks import convnext, weights
from tokenizers.networks.lpips import LPIPS
from tokenizers.parallel import platform

# Float32 sums in another order than PyTorch's, 36 blocks deep. Observed: see each use.
TOLERANCE = 1e-5
IMAGE = jax.ShapeDtypeStruct((1, convnext.SIZE, convnext.SIZE, 3), np.float32)


def module_weights(case, name):
    """The official state dict of one of the networks of a case."""
    return {key: refweights.weight(key, tuple(shape)) for key, shape, _ in case.meta["modules"][name]["state_dict"]}


def frozen_convnext(case):
    target = jax.eval_shape(convnext.ConvNeXt().init, jax.random.key(0), IMAGE)
    return to_tree(names.TABLE, target, module_weights(case, "convnext_small"))


def frozen_lpips(case):
    state = module_weights(case, "vgg16") | module_weights(case, "lpips_lins")
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    target = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    return to_tree(lpips_names.table("vgg"), target, state)


def stored(case, key, value):
    found = re.search(r"flattened row-major then \[::(\d+)\]", case.meta["outputs"][key])
    return np.asarray(value).ravel()[:: int(found[1])] if found else value


@pytest.mark.slow  # ConvNeXt-S and VGG-16 at their size, with gradients
@pytest.mark.parametrize("name", cases("titok", "perceptual_.*"))
def test_perceptual_losses_are_the_official_ones(name):
    """A weighted mean of LPIPS and ConvNeXt, or one of them; gradients by pixels in [0, 1]."""
    case = Case("titok", name)
    expected, kind = case.outputs, case.meta["config"]["model_name"]
    one, other = case.input("input"), case.input("target")  # pixels in [0, 1] there are pixels in [-1, 1] here
    found = re.search(r"-([\d.]+)-([\d.]+)$", kind)
    share = {"lpips": float(found[1]), "convnext": float(found[2])} if found else {}
    share = share or {"lpips": float("lpips" in kind), "convnext": float("convnext" in kind)}
    variables = {}
    if share["convnext"]:
        variables["convnext"] = frozen_convnext(case)
    if share["lpips"]:
        variables["lpips"] = frozen_lpips(case)

    @functools.partial(jax.jit, compiler_options=platform.run_once_options())
    def losses(target, variables):
        def total(target):
            parts = {}
            if "lpips" in variables:
                parts["lpips"] = perceptual.lpips_loss(LPIPS(), variables["lpips"])(one, target)
            if "convnext" in variables:
                parts["convnext"] = perceptual.convnext_loss(convnext.ConvNeXt(), variables["convnext"])(one, target)
            return sum(share[key] * part for key, part in parts.items()) / sum(share.values())

        return jax.value_and_grad(total)(target)

    value, gradient = losses(other, variables)
    assert relative_l2(value, expected["loss_mean"].squeeze()) < TOLERANCE
    assert relative_l2(stored(case, "grad_target", 2 * gradient), expected["grad_target"]) < 1e-4
    if "convnext" in variables:
        for image, key in ((one, "input"), (other, "target")):
            standard = convnext.standardize(image)
            if key == "input":
                assert relative_l2(stored(case, "convnext_in", standard), expected["convnext_in"]) < TOLERANCE
            logits = jax.jit(convnext.ConvNeXt().apply)(variables["convnext"], standard)
            assert relative_l2(logits, expected[f"convnext_logits_{key}"]) < TOLERANCE
    if "lpips" in variables:
        terms = jax.jit(functools.partial(LPIPS().apply, method="per_layer"))(variables["lpips"], one, other)
        # The linear layers of the cases have both signs, so a single term may cancel to little of its sum.
        scale = np.abs(expected["lpips_per_layer"]).max()
        np.testing.assert_allclose(terms, expected["lpips_per_layer"], rtol=1e-4, atol=1e-6 * scale)


def test_published_names_and_nothing_else():
    """Torchvision's names both ways, for all 344 tensors; a file with another is refused, and so is no file."""
    target = jax.eval_shape(convnext.ConvNeXt().init, jax.random.key(0), IMAGE)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), target)
    state = to_official(names.TABLE, zeros)
    assert len(state) == 344
    for key, shape in {
        "features.0.0.weight": (96, 3, 4, 4),
        "features.2.1.weight": (192, 96, 2, 2),
        "features.5.26.block.0.weight": (384, 1, 7, 7),
        "features.5.26.layer_scale": (384, 1, 1),
        "features.7.2.block.5.weight": (768, 3072),
        "classifier.2.weight": (1000, 768),
    }.items():
        assert state[key].shape == shape, key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convnext, "read_state_dict", lambda path: state)
        patch.setattr(weights, "find", lambda name, path: path)
        module, variables = convnext.load("convnext.pth")
        jax.eval_shape(module.apply, variables, IMAGE)
        state["features.8.weight"] = np.zeros(3)
        with pytest.raises(ValueError, match=r"features\.8\.weight"):
            convnext.load("convnext.pth")
        del state["features.8.weight"], state["features.1.0.layer_scale"]
        with pytest.raises(ValueError, match=r"missing 'features\.1\.0\.layer_scale'"):
            convnext.load("convnext.pth")
    with pytest.raises(weights.MissingWeights, match="convnext_small-0c510722.pth"):
        convnext.load("no/such/folder")
