"""LPIPS: the authors' numbers, finite gradients, and weights that come from files or not at all."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

from tokenizers.convert import lpips as names
from tokenizers.convert.engine import to_official
from tokenizers.networks import lpips, vgg
from tokenizers.networks.weights import PUBLISHED, MissingWeights, find

# Compiling the gradient of a VGG takes seconds per image size: by default one size, and the small trunk.
QUICK_GRADIENTS = ("vgg_eps_sensitive", "alex")
SLOW_DISTANCES = ("vgg", "taming_vgg")  # the same network as in the other cases
NAMES = cases("lpips", "(?!published|.*features).*")


def marked(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow) if slow(name) else name for name in names]


@functools.cache
def case(name):
    """The case, LPIPS with its weights through a file of all of them, and the two images in [-1, 1]."""
    case = Case("lpips", name)
    config = case.meta["config"]
    fields = {
        "net": config.get("net", "vgg"),
        "lin": config.get("lpips", True),
        "version": config.get("version", "0.1"),
    }
    module, variables = load_state(case.weights(), **fields)
    images = [case.input(key) for key in ("x", "y") if key in case.meta["inputs"]]
    if case.meta.get("normalize"):
        images = [2 * image - 1 for image in images]
    return case, module, variables, images


def load_state(state, **fields):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips, "read_state_dict", lambda path: dict(state))
        return lpips.load("weights.pth", **fields)


@functools.cache
def computed(name, with_gradient):
    """Map or terms of a case, and the gradient of their sum by y."""
    reference, module, variables, (x, y) = case(name)
    method = "spatial_map" if "map" in reference.outputs else "per_layer"

    def total(y, variables, x):
        value = module.apply(variables, x, y, method=method)
        return value.sum(), value

    if not with_gradient:
        return jax.jit(total)(y, variables, x)[1], None
    (_, value), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(y, variables, x)
    return value, gradient


# Float32 sums over up to 4608 products in 13 layers, in another order than the authors' (1e-6 measured).
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", marked(NAMES, lambda name: name in SLOW_DISTANCES))
def test_distances_equal_the_authors(name):
    outputs = case(name)[0].outputs
    actual, _ = computed(name, name in QUICK_GRADIENTS)
    if "map" in outputs:
        assert relative_l2(actual, outputs["map"]) < TOLERANCE
        return
    assert relative_l2(actual.sum(-1), outputs["value"]) < TOLERANCE
    if "per_layer" in outputs:
        # The linear layers of the cases have both signs, so a single term may cancel to little of its sum.
        expected = outputs["per_layer"]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", marked(NAMES, lambda name: name not in QUICK_GRADIENTS))
def test_gradients_equal_the_authors(name):
    reference = case(name)[0]
    _, gradient = computed(name, True)
    if reference.meta["normalize"]:
        gradient = 2 * gradient  # the authors' is by pixels in [0, 1]
    assert relative_l2(gradient, reference.outputs["grad_y"]) < 1e-4  # 4e-6 measured


@pytest.mark.parametrize("name", cases("lpips", ".*features"))
def test_taps_equal_the_authors(name):
    reference, module, variables, (x,) = case(name)
    taps = jax.jit(functools.partial(module.apply, method="features"))(variables, x)
    assert len(taps) == sum(key.startswith("relu") for key in reference.outputs)
    for i, tap in enumerate(taps, start=1):
        stored = reference.meta["output_info"][f"relu{i}"].get("stored_slice", "[:]")
        expected = reference.outputs[f"relu{i}"]
        sliced = eval(f"tap{stored}", {"tap": np.asarray(tap)})  # "[:, ::4, ::4]", a slice written in the case
        assert relative_l2(sliced, expected) < TOLERANCE, i


def test_black_features_have_a_finite_gradient():
    # With large negative biases every feature is zero, where the plain norm has an infinite slope.
    module = lpips.LPIPS(net="alex")
    x = refweights.image_like("black", (1, 40, 40, 3))
    target = jax.eval_shape(module.init, jax.random.key(0), x, x)
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, -1000 if leaf.ndim == 1 else 0.01, np.float32), target)
    value, gradient = jax.jit(jax.value_and_grad(lambda y, v: module.apply(v, x, y).sum()))(0.5 * x, variables)
    assert value == 0
    assert not np.any(gradient)  # and so no nan


def test_compute_dtype_changes_the_trunk_not_the_result():
    reference, module, variables, (x, y) = case("alex")
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, x, y)
    assert half.dtype == jnp.float32
    # Eight bits of mantissa through five layers (0.024 measured).
    assert relative_l2(half, reference.outputs["value"]) < 0.05


@pytest.mark.parametrize("shapes", [((1, 30, 40, 3),) * 2, ((1, 40, 40, 1),) * 2, ((1, 40, 40, 3), (2, 40, 40, 3))])
def test_images_that_do_not_fit_are_refused(shapes):
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    with pytest.raises(ValueError, match="at least 31; got"):
        jax.eval_shape(lpips.LPIPS(net="alex").init, jax.random.key(0), x, y)


@pytest.mark.parametrize("field", ["net", "version"])
def test_unknown_choices_name_the_accepted_ones(field):
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    with pytest.raises(ValueError, match="Accepted: "):
        jax.eval_shape(lpips.LPIPS(**{field: "vgh"}).init, jax.random.key(0), x, x)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def alex_files(tmp_path):
    """The published layout: torchvision's trunk in one file, the linear layers in another."""
    state = names.torchvision_names(case("alex")[0].weights())
    trunk = {name: value for name, value in state.items() if name.startswith("features.")}
    lin = {name: value for name, value in state.items() if name.startswith("lin") and not name.startswith("lins")}
    np.savez(tmp_path / "alexnet.npz", **trunk, **{"classifier.1.weight": np.zeros((2, 2), np.float32)})
    np.savez(tmp_path / "alex.npz", **lin)
    (tmp_path / "alexnet.npz").rename(tmp_path / "alexnet.pth")
    (tmp_path / "alex.npz").rename(tmp_path / "alex.pth")
    return tmp_path


def test_trunk_and_linear_files_and_the_weights_folder(alex_files, monkeypatch):
    expected = case("alex")[2]
    paths = [alex_files / "alexnet.pth", alex_files / "alex.pth"]
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)
    for given in (paths, paths[::-1], alex_files):
        chex.assert_trees_all_equal(lpips.load(given, "alex")[1], expected)
    with pytest.raises(MissingWeights, match="lpips_alex.*TOKENIZERS_WEIGHTS is not set.*PerceptualSimilarity"):
        lpips.load(paths[0], "alex")
    monkeypatch.setenv("TOKENIZERS_WEIGHTS", str(alex_files))
    chex.assert_trees_all_equal(lpips.load(None, "alex")[1], expected)
    chex.assert_trees_all_equal(lpips.load(paths[0], "alex")[1], expected)


def test_variables_go_back_to_the_published_names():
    reference, module, variables, _ = case("alex")
    state = to_official(names.table("alex"), variables)
    expected = names.torchvision_names(reference.weights())
    chex.assert_trees_all_equal(state, {name: expected[name] for name in state})
    assert set(expected) - set(state) == {name for name in expected if name.startswith(("lins.", "scaling_layer."))}


def test_missing_weights_are_never_random(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENIZERS_WEIGHTS", raising=False)
    for load in (lpips.load, vgg.load):
        with pytest.raises(MissingWeights, match=r"VGG-16.*vgg16-397923af\.pth.*torchvision.*TOKENIZERS_WEIGHTS"):
            load()
    for name, published in PUBLISHED.items():
        with pytest.raises(MissingWeights, match="neither a file nor a folder"):
            find(name, tmp_path / "nowhere")
        (tmp_path / name / published.names[0]).parent.mkdir(parents=True)
        (tmp_path / name / published.names[0]).touch()
        assert find(name, tmp_path / name) == tmp_path / name / published.names[0]


@pytest.mark.parametrize("key", sorted(names.PUBLISHED_LIN_SUMS))
def test_published_linear_layers_are_told_apart(key):
    version, net = key
    facts = Case("lpips", "published_lin_weights_facts").outputs
    prefix = f"v{version.replace('.', '')}_{net}_lin"
    # Layers of the published sizes and sums: count, sum, min, max, first four values are what is known of them.
    state = {}
    for name, (count, total, *_) in facts.items():
        if name.startswith(prefix):
            value = np.full((1, int(count), 1, 1), total / count, np.float32)
            state[f"lin{name.removeprefix(prefix)}.model.1.weight"] = value
    names.check_published_lin(state, net, version)
    with pytest.raises(ValueError, match=f"version '{version}' for '{net}', not of version '0.2'"):
        names.check_published_lin(state, net, "0.2")
    # Somebody's own layers pass.
    names.check_published_lin({name: value * 1.01 for name, value in state.items()}, net, "0.2")
