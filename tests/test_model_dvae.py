"""DALL-E's dVAE against the released code, and its training against the paper's formulas."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refweights
from reference import Case, cases, relative_l2

import tokenizers
from tokenizers import registry
from tokenizers.convert import dvae as conversion
from tokenizers.convert.engine import to_official
from tokenizers.models import dvae
from tokenizers.parallel import platform
from tokenizers.quantize.gumbel import gumbel_softmax, kl_to_uniform

# float32 against float32 of PyTorch. Observed: outputs 1e-6, losses 4e-7, gradient norms 3e-6.
OUTPUT, LOSS, GRADIENT = 1e-5, 1e-5, 1e-4


@functools.cache
def converted(name):
    case = Case("dvae", name)
    return case, tokenizers.from_official("dvae", case.meta["config"], case.weights())


def part(case, key, value):
    """The stored part of an output."""
    steps = case.meta.get("slices", {}).get(key)
    return value if steps is None else value[tuple(slice(None, None, int(s)) for s in _steps(steps))]


def _steps(text):
    return [entry.strip(" :") or 1 for entry in text.strip("[]").split(",")]


def _slow_if_full(name):
    return pytest.param(name, marks=pytest.mark.slow) if name.startswith("full") else name


@pytest.mark.parametrize("name", [_slow_if_full(name) for name in cases("dvae", "small.*|full_release")])
def test_tokens_and_pixels_are_the_released_ones(name):
    case, tok = converted(name)
    expected = case.outputs
    pixels = case.input("image01") * 2 - 1
    assert relative_l2(dvae.map_pixels(pixels), expected["mapped"]) < OUTPUT
    logits = tok.module.apply(tok.variables, pixels, method="logits")
    assert relative_l2(part(case, "logits", logits), expected["logits"]) < OUTPUT
    encoding = tok.encode(pixels)
    np.testing.assert_array_equal(encoding.indices, expected["indices"])
    chex.assert_trees_all_equal(encoding.latents, tok.indices_to_latents(encoding.indices))
    statistics = tok.module.apply(tok.variables, encoding.latents, method="statistics")
    assert relative_l2(statistics, expected["stats"]) < OUTPUT
    assert relative_l2((tok.decode_indices(encoding.indices) + 1) / 2, expected["recon01"]) < OUTPUT


@pytest.mark.parametrize("name", cases("dvae", "pixel_mapping"))
def test_pixels_are_mapped_as_released(name):
    case = Case("dvae", name)
    x, expected = case.input("x"), case.outputs
    np.testing.assert_allclose(dvae.map_pixels(2 * x - 1), expected["mapped"], atol=1e-6)
    np.testing.assert_allclose((dvae.unmap_pixels(jnp.asarray(x)) + 1) / 2, expected["unmapped"], atol=1e-6)
    there_and_back = (dvae.unmap_pixels(dvae.map_pixels(2 * x - 1)) + 1) / 2
    np.testing.assert_allclose(there_and_back, expected["roundtrip"], atol=1e-6)


def official_noise(case, key):
    entry = case.meta["inputs"][key]
    u = (refweights.uniform(entry["seed_name"], tuple(entry["shape"])).astype(np.float64) + 1) / 2
    u = u * (1 - 2.0**-20) + 2.0**-21
    return -np.log(np.float32(-np.log(np.float32(u).astype(np.float64))))


@pytest.mark.parametrize("name", cases("dvae", "train_derived"))
def test_training_steps_follow_the_paper(name):
    """Relaxed samples under the recorded noise, the likelihood, the KL, AdamW on all parameters and their average."""
    case, tok = converted(name)
    meta, expected = case.meta, case.outputs
    pixels = case.input("image01") * 2 - 1
    values = pixels.size / len(pixels)
    adamw = optax.adamw(meta["lr"], b1=0.9, b2=0.999, eps=1e-8, weight_decay=meta["weight_decay"])

    @functools.partial(jax.jit, compiler_options=platform.run_once_options())
    def step(params, optimizer, noise, tau, beta):
        def objective(params):
            def apply(value, method):
                return tok.module.apply({"params": params}, value, method=method)

            logits = apply(pixels, "logits")
            choice, _ = gumbel_softmax(logits, noise, tau, hard=False)
            statistics = apply(choice, "statistics")
            nll = jnp.mean(dvae.logit_laplace_nll(statistics, dvae.map_pixels(pixels)))
            kl = kl_to_uniform(logits)
            return nll + beta * kl * (logits[0, ..., 0].size / values), (nll, kl, logits, statistics)

        (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer = adamw.update(grads, optimizer, params)
        return optax.apply_updates(params, updates), optimizer, loss, aux, grads

    def official(tree):
        return to_official(conversion.TABLE, {"params": jax.device_get(tree)})

    params, optimizer = tok.params, adamw.init(tok.params)
    ema = official(params)
    for i in range(meta["steps"]):
        old = official(params)
        noise = official_noise(case, f"gumbel_u_{i}")
        params, optimizer, loss, (nll, kl, logits, statistics), grads = step(
            params, optimizer, noise, meta["tau"][i], meta["beta"][i]
        )
        positions = logits[0, ..., 0].size
        np.testing.assert_allclose(nll * values, expected[f"s{i}_nll_per_image"], rtol=LOSS)
        np.testing.assert_allclose(kl * positions, expected[f"s{i}_kl_per_image"], rtol=LOSS)
        # A small difference of terms around one.
        np.testing.assert_allclose(loss, expected[f"s{i}_loss"], rtol=LOSS, atol=2e-6)
        grads, new = official(grads), official(params)
        norms = np.asarray([np.linalg.norm(grads[name]) for name in meta["grad_norm_names"]])
        np.testing.assert_allclose(norms, expected[f"s{i}_grad_norms"], rtol=GRADIENT, atol=1e-7)
        for name in meta["grad_tensors"]:
            key = name.replace(".", "_")
            if f"s{i}_grad__{key}" in expected:
                found = part(case, f"s{i}_grad__{key}", grads[name])
                assert relative_l2(found, expected[f"s{i}_grad__{key}"]) < GRADIENT, name
            change = part(case, f"s{i}_delta__{key}", new[name] - old[name])
            # Adam divides gradients by their own size, and the change is a difference of close float32 numbers.
            assert relative_l2(change, expected[f"s{i}_delta__{key}"]) < 5e-3, name
        if i == 0:
            assert relative_l2(part(case, "s0_logits", logits), expected["s0_logits"]) < OUTPUT
            assert relative_l2(statistics, expected["s0_stats"]) < OUTPUT
        ema = {name: meta["ema_decay"] * ema[name] + (1 - meta["ema_decay"]) * new[name] for name in new}
    for name in meta["grad_tensors"]:
        key = "ema_minus_param__" + name.replace(".", "_")
        assert relative_l2(part(case, key, ema[name] - new[name]), expected[key]) < 5e-3, name


# What holds without the originals ------------------------------------------------------------------------------------

SMALL = {
    "bottleneck": {"name": "gumbel", "codebook_size": 32, "code_dim": None, "project": False, "hard": False},
    "latent_channels": 32,
    "hidden": 8,
    "blocks": 1,
    "embed": 8,
}


def test_the_density_integrates_to_one():
    x = jnp.linspace(1e-6, 1 - 1e-6, 200001)[:, None]
    for mean, log_scale in ((0.0, 0.0), (1.5, -1.0), (-0.5, 0.4)):
        statistics = jnp.broadcast_to(jnp.asarray([mean, log_scale]), (len(x), 2))
        density = jnp.exp(-dvae.logit_laplace_nll(statistics, x))
        # Trapezoids of a density with a kink, in float32.
        np.testing.assert_allclose(jnp.trapezoid(density[:, 0], x[:, 0]), 1.0, atol=5e-3)


def test_calling_it_gives_pixels_and_both_loss_terms():
    """Relaxed samples while training; the gradients are those of the training case."""
    module = registry.build("dvae", **SMALL)
    pixels = refweights.image_like("dvae/call", (2, 16, 24, 3))
    leaves, tree = jax.tree.flatten(registry.abstract_variables(module))
    variables = jax.tree.unflatten(
        tree, [refweights.uniform(f"dvae/{i}", leaf.shape) / leaf.size**0.25 for i, leaf in enumerate(leaves)]
    )

    @functools.partial(jax.jit, static_argnums=0, compiler_options=platform.run_once_options())
    def call(train, variables, temperature):
        schedule = {"schedule": {"bottleneck": {"temperature": temperature}}}
        rngs = {"bottleneck": jax.random.key(1)}
        return module.apply(variables | schedule, pixels, train=train, rngs=rngs)

    peaks = []
    for temperature in (1.0, 1 / 16):
        reconstruction, encoding = call(True, variables, temperature)
        chex.assert_shape(reconstruction, pixels.shape)
        assert float(jnp.abs(reconstruction).max()) <= 1
        chex.assert_shape(encoding.latents, (2, 2, 3, 32))
        assert set(encoding.losses) == {"kl", "nll"}
        np.testing.assert_allclose(encoding.latents.sum(-1), 1.0, atol=1e-5)
        peaks.append(float(encoding.latents.max(-1).mean()))
    assert peaks[0] < peaks[1] < 1


def test_the_two_published_files_are_joined():
    state = Case("dvae", cases("dvae", "small")[0]).weights()
    halves = [{n.removeprefix(p): v for n, v in state.items() if n.startswith(p)} for p in ("encoder.", "decoder.")]
    assert halves[0].keys() & halves[1].keys()
    chex.assert_trees_all_equal(conversion.merged(*halves), state)


def test_official_names_round_trip():
    case, tok = converted(cases("dvae", "small")[0])
    back = to_official(conversion.TABLE, jax.device_get(dict(tok.variables)))
    chex.assert_trees_all_equal(back, case.weights())


def test_configs_it_does_not_know_are_refused():
    assert conversion.fields_from_official({}) == dict(dvae.VARIANTS["dvae-dalle-f8-8192"].config)
    with pytest.raises(ValueError, match="unknown argument of the official encoder 'n_hidden'.*n_hid"):
        conversion.fields_from_official({"encoder": {"n_hidden": 3}})
    with pytest.raises(ValueError, match="decoder.vocab_size beside encoder.vocab_size=512 8192"):
        conversion.fields_from_official({"encoder": {"vocab_size": 512}})
    with pytest.raises(ValueError, match="unknown input_channels 1"):
        conversion.fields_from_official({"encoder": {"input_channels": 1}})
