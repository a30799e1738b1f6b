"""VGG-16 up to its last hidden layer: PyTorch's means over a grid, and torchvision's names."""

import jax
import numpy as np
import pytest

from tokenizers.convert.engine import flatten, official_names, to_tree
from tokenizers.convert.lpips import VGG_HIDDEN
from tokenizers.losses import perceptual
from tokenizers.networks import vgg, weights

IMAGE = jax.ShapeDtypeStruct((1, 64, 48, 3), np.float32)


@pytest.mark.parametrize("shape", [(4, 4), (7, 9), (14, 3)])
def test_means_over_a_grid_are_those_of_adaptive_pooling(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    expected = np.empty((2, 7, 7, 3))
    for i in range(7):
        for j in range(7):  # from floor(start) to ceil(end)
            rows = slice(int(np.floor(i * shape[0] / 7)), int(np.ceil((i + 1) * shape[0] / 7)))
            columns = slice(int(np.floor(j * shape[1] / 7)), int(np.ceil((j + 1) * shape[1] / 7)))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(vgg.mean_grid(x, 7), expected, rtol=1e-5, atol=1e-6)


def test_published_names_of_the_hidden_layers():
    module = vgg.VGG16Hidden()
    target = jax.eval_shape(module.init, jax.random.key(0), IMAGE)
    assert jax.eval_shape(module.apply, target, IMAGE).shape == (1, 4096)
    assert target["params"]["fc1"]["kernel"].shape == (25088, 4096)
    names = official_names(VGG_HIDDEN, flatten(target))
    assert names["params/fc1/kernel"] == "classifier.0.weight"
    assert names["params/fc2/bias"] == "classifier.3.bias"
    assert names["params/trunk/conv5_3/kernel"] == "features.28.weight"
    assert len(set(names.values())) == 30
    with pytest.raises(ValueError, match=r"missing 'classifier\.3\.bias'"):
        to_tree(VGG_HIDDEN, target, {})
    with pytest.raises(weights.MissingWeights, match="vgg16-397923af.pth"):
        vgg.load_hidden("no/such/folder")


class Means:
    """In the place of the network: the mean colour of pixels in [0, 1]."""

    def apply(self, variables, pixels):
        return pixels.mean((1, 2))


def test_the_loss_compares_what_the_network_sees_in_frames():
    rng = np.random.default_rng(1)
    one, other = (rng.uniform(-1, 1, (2, 3, 4, 4, 3)).astype(np.float32) for _ in range(2))
    expected = np.square((one.mean((2, 3)) - other.mean((2, 3))) / 2).mean()
    np.testing.assert_allclose(perceptual.hidden_loss(Means(), {})(one, other), expected, rtol=1e-4)
