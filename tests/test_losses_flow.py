"""RAFT and the flow loss against torchvision and Cosmos's training code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

from configs import base
from tokenizers.convert.engine import to_official
from tokenizers.convert.raft import TABLE
from tokenizers.losses.flow import flow_loss, flow_of_clip
from tokenizers.networks import raft
from tokenizers.parallel import platform
from tokenizers.train import objective

CASES = cases("cosmos", "train_loss_flow_raft")


def official_weights(case):
    ((pattern, change),) = case.meta["raft_weight_overrides"].items()
    (name,) = (name for name, _, _ in case.meta["state_dict"] if pattern.replace("\\", "") == name)
    state = case.weights()
    return state | {name: state[name] * np.float32(change["scale"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_flow_and_its_loss_are_the_authors(name, mode):
    case = Case("cosmos", name)
    x, other = case.input("x"), case.input("other")
    recon = x + np.float32(case.meta["mix"]) * (other - x)
    np.testing.assert_allclose([recon.mean(), recon.std()], case.outputs["recon_checksum"], rtol=1e-4)
    module, variables = raft.RAFT(), raft.from_official(official_weights(case))
    train = mode == "train"

    def both(variables, recon):
        loss = flow_loss(module, variables, train=train)
        return jax.value_and_grad(lambda y: 0.01 * loss(y, x))(recon)

    flow = platform.jit(lambda v, y: flow_of_clip(module, v, y, train=train))(variables, x)
    error = relative_l2(flow[:, :, ::8, ::8], case.outputs[f"flow_x_{mode}"])
    loss, gradient = platform.jit(both)(variables, recon)
    places = tuple(slice(*place) for place in case.meta["slices"][f"grad_recon_{mode}"])
    of_gradient = relative_l2(gradient[places], case.outputs[f"grad_recon_{mode}"])
    print(f"flow {error:.1e}, gradient {of_gradient:.1e}, loss {loss} {case.outputs[f'flow_loss_{mode}'][0]}")
    assert error < 5e-4
    np.testing.assert_allclose(loss, case.outputs[f"flow_loss_{mode}"][0], rtol=1e-4)
    # Twelve updates look up a piecewise linear function, and the slope of |a - b| jumps: 4e-4 and 9e-4 observed.
    assert of_gradient < 2e-3


def test_weights_lead_there_and_back():
    module, picture = raft.RAFT(), jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), picture, picture)
    state = to_official(TABLE, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), dict(shapes)))
    state = {name: refweights.weight(name, value.shape) for name, value in state.items()}
    extra = {"context_encoder.convnormrelu.1.num_batches_tracked": np.int64(3)}
    back = to_official(TABLE, raft.from_official(state | extra))
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)
    assert sum(value.size for name, value in state.items() if "running" not in name) == 5_257_536  # torchvision's


def test_comparisons_are_read_between_positions():
    pairs = jnp.asarray(refweights.uniform("pairs", (1, 1, 2, 16, 12)))
    flow = jnp.array([[[[3.25, 2.5], [-40.0, 1.0]]]])  # the second position moves out of the picture
    found = np.asarray(raft.look_up((pairs,), flow))[0, 0]
    assert found.shape == (2, 81)
    np.testing.assert_array_equal(found[1], 0)
    values = np.pad(np.asarray(pairs)[0, 0, 0], ((0, 1), (0, 1)))
    for i, j in ((4, 4), (5, 3)):  # offset of x, of y; 4 is none
        x, y = 3 + i - 4, 2 + j - 4
        corners = values[y : y + 2, x : x + 2]
        expected = (np.outer([0.5, 0.5], [0.75, 0.25]) * corners).sum()
        np.testing.assert_allclose(found[0, 9 * i + j], expected, atol=1e-6)


def test_a_constant_flow_stays_one_away_from_the_edge():
    flow = jnp.broadcast_to(jnp.array([1.0, -2.0]), (1, 3, 4, 2))
    mask = jnp.asarray(refweights.uniform("mask", (1, 3, 4, 576)))
    fine = raft.upsample(flow, mask)
    assert fine.shape == (1, 24, 32, 2)
    np.testing.assert_allclose(fine[0, 8:16, 8:24], np.broadcast_to([8.0, -16.0], (8, 16, 2)), rtol=1e-5)


def test_a_single_frame_does_not_move():
    x = jnp.zeros((1, 1, 256, 256, 3))
    assert flow_loss(raft.RAFT(), {})(x, x) == 0


def test_small_pictures_are_refused():
    with pytest.raises(ValueError, match="multiples of 8 and at least 128"):
        raft.RAFT().init(jax.random.key(0), jnp.zeros((1, 64, 128, 3)), jnp.zeros((1, 64, 128, 3)))


def test_the_recipe_asks_for_its_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_WEIGHTS", str(tmp_path))
    config = base.get_base().loss
    config.flow_weight = 0.01
    with pytest.raises(ValueError, match="raft_large_C_T_SKHT_V2"):
        objective.build(config)
