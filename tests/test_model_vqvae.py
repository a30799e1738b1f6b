"""VQ-VAE and VQ-VAE-2 against Sonnet's and rosinality's code: codes, pixels, losses, gradients, codebooks, Adam."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refweights
from reference import Case, cases, normal, relative_l2

import tokenizers
from tokenizers import registry
from tokenizers.convert import vqvae as conversion
from tokenizers.convert.engine import flatten, to_official, unflatten
from tokenizers.models.vqvae import join_levels, split_levels
from tokenizers.parallel import mesh as meshes
from tokenizers.parallel import platform
from tokenizers.quantize.vq import VectorQuantizer

# float32 against float32 of other libraries. Observed: latents and pixels 6e-7, losses 3e-7, gradient norms 2e-6.
OUTPUT, LOSS, GRADIENT = 1e-5, 1e-5, 1e-4
KEY = jax.random.key(0)


def drawn(case, key):
    """An input; codebooks are normal numbers about a vector."""
    value = case.input(key)
    shift = case.meta["inputs"][key].get("add_vector")
    return value if shift is None else value + np.asarray(shift, np.float32)


# Sonnet: one level ---------------------------------------------------------------------------------------------------


def sonnet_tensor(name, shape, scale):
    """Sonnet's kernels were drawn in PyTorch's layout."""
    if len(shape) == 4:  # (kh, kw, in, out), or (kh, kw, out, in) where transposed
        return scale * refweights.weight(name, (shape[3], shape[2], *shape[:2])).transpose(2, 3, 1, 0)
    return refweights.weight(name, tuple(shape))


def sonnet_weights(case):
    codebook = "vector_quantizer_ema" if case.meta["config"]["vq_use_ema"] else "vector_quantizer"
    (override,) = case.meta["weight_overrides"].values()
    scale = np.float32(override["scale"])
    state = {name: sonnet_tensor(name, shape, scale) for name, shape, _ in case.meta["state_dict"]}
    return state | {f"{codebook}/embeddings": drawn(case, "codebook").T}


@functools.cache
def sonnet(name):
    case = Case("vqvae", name)
    return case, tokenizers.from_official("vqvae", case.meta["config"], sonnet_weights(case))


def vq_loss(config, losses):
    """Sonnet's weights: beta on the commitment, one on the codebook where it is learned."""
    return config["commitment_cost"] * losses["commitment"] + losses.get("codebook", 0.0)


def perplexity(indices, size):
    p = np.bincount(np.ravel(indices), minlength=size) / np.size(indices)
    return np.exp(-np.sum(p * np.log(p + 1e-10)))


@pytest.mark.parametrize("name", cases("vqvae", "notebook_small|full_notebook_cifar"))
def test_one_level_encodes_and_decodes_as_sonnet_does(name):
    case, tok = sonnet(name)
    config, expected = case.meta["config"], case.outputs
    pixels = drawn(case, "image") * 2  # theirs are in [-0.5, 0.5]
    encoding = tok.encode(pixels)
    np.testing.assert_array_equal(encoding.indices, expected["indices"])
    assert relative_l2(encoding.latents, expected["quantize"]) < OUTPUT
    recon = tok.decode_indices(encoding.indices)
    assert relative_l2(recon / 2, expected["recon"]) < OUTPUT
    error = jnp.mean(jnp.square((recon - pixels) / 2)) / config["data_variance"]
    np.testing.assert_allclose(error, expected["recon_error"], rtol=LOSS)
    np.testing.assert_allclose(vq_loss(config, encoding.losses), expected["vq_loss"], rtol=LOSS)
    np.testing.assert_allclose(error + vq_loss(config, encoding.losses), expected["loss"], rtol=LOSS)
    np.testing.assert_allclose(perplexity(encoding.indices, config["num_embeddings"]), expected["perplexity"], 1e-5)
    z = tok.module.apply(tok.variables, pixels / 2, method=lambda m, x: m.network.to_codes(m.network.encoder(x)))
    assert relative_l2(z, expected["prequant"]) < OUTPUT


def training(tok, loss, learning_rate):
    """A jitted Adam step on ``loss(recon, pixels, encoding)``, and what it starts from."""
    adam = optax.adam(learning_rate)

    @jax.jit
    def step(params, state, optimizer, pixels):
        def objective(params):
            (recon, encoding), new = tok.module.apply(
                {"params": params, **state}, pixels, train=True, mutable=list(state)
            )
            return loss(recon, pixels, encoding), (new, recon, encoding)

        (value, (new, recon, encoding)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer = adam.update(grads, optimizer)
        return optax.apply_updates(params, updates), new, optimizer, (value, recon, encoding), grads

    params = tok.params
    state = {key: value for key, value in tok.variables.items() if key != "params"}
    return step, (params, state, adam.init(params))


def official(tree):
    """Gradients, or changes, of the parameters under their official names."""
    return to_official(conversion.TABLE, {"params": jax.device_get(tree)})


def compare_step(case, number, before, after, grads):
    """Norms of all gradients, some gradients and what Adam made of them."""
    expected = case.outputs
    grads, before, after = official(grads), official(before), official(after)
    norms = np.asarray([np.linalg.norm(grads[name]) for name in case.meta["grad_norm_names"]])
    np.testing.assert_allclose(norms, expected[f"s{number}_grad_norms"], rtol=GRADIENT, atol=1e-6)
    for name in case.meta["step_tensors"]:
        key = name.replace("/", "__").replace(".", "_")
        if f"s{number}_grad__{key}" in expected:
            assert relative_l2(grads[name], expected[f"s{number}_grad__{key}"]) < GRADIENT
        # Adam divides tiny gradients by their own size: rounding decides a few entries. Observed 1e-3.
        change = after[name] - before[name]
        assert relative_l2(change, expected[f"s{number}_delta__{key}"]) < 5e-3, name


@pytest.mark.parametrize("name", cases("vqvae", "notebook_train_.*"))
def test_training_steps_are_those_of_sonnet(name):
    case, tok = sonnet(name)
    config, expected = case.meta["config"], case.outputs

    def loss(recon, pixels, encoding):
        error = jnp.mean(jnp.square((recon - pixels) / 2)) / config["data_variance"]
        return error + vq_loss(config, encoding.losses)

    step, (params, state, optimizer) = training(tok, loss, case.meta["learning_rate"])
    for i in range(case.meta["steps"]):
        pixels = drawn(case, f"image_{i}") * 2
        old = params
        params, state, optimizer, (value, recon, encoding), grads = step(params, state, optimizer, pixels)
        np.testing.assert_array_equal(encoding.indices, expected[f"s{i}_indices"])
        np.testing.assert_allclose(value, expected[f"s{i}_loss"], rtol=1e-4)
        error = np.mean(np.square((recon - pixels) / 2)) / config["data_variance"]
        np.testing.assert_allclose(error, expected[f"s{i}_recon_error"], rtol=1e-4)
        np.testing.assert_allclose(vq_loss(config, encoding.losses), expected[f"s{i}_vq_loss"], rtol=1e-4)
        used = perplexity(encoding.indices, config["num_embeddings"])
        np.testing.assert_allclose(used, expected[f"s{i}_perplexity"], rtol=1e-5)
        compare_step(case, i, old, params, grads)
        codes = tok.module.apply(
            {"params": params, **state}, jnp.arange(config["num_embeddings"]), method="indices_to_latents"
        )
        assert relative_l2(codes, expected[f"s{i}_codebook"]) < 1e-4


def quantizer_step(vq, beta):
    """A jitted ``(variables, x, g) -> (encoding, new state, loss, its gradients, gradient of sum(latents * g))``."""

    @jax.jit
    def step(variables, x, g):
        params, state = ({k: v for k, v in variables.items() if (k == "params") == own} for own in (True, False))

        def objective(params, x, of_loss):
            encoding, new = vq.apply({**params, **state}, x, train=True, mutable=["codebook"])
            loss = beta * encoding.losses["commitment"] + encoding.losses.get("codebook", 0.0)
            return (loss if of_loss else jnp.sum(encoding.latents * g)), (encoding, new, loss)

        grads, (encoding, new, loss) = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x, True)
        _, through = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x, False)[0]
        return encoding, new, loss, grads, through

    return step


@pytest.mark.parametrize("name", cases("vqvae", "sonnet_vq.*"))
def test_quantizers_are_those_of_sonnet(name):
    case = Case("vqvae", name)
    config, expected = case.meta["config"], case.outputs
    size, dim, ema = config["num_embeddings"], config["embedding_dim"], "ema" in name
    averages = {"decay": config.get("decay"), "epsilon": config.get("epsilon", 1e-5)}
    follow = {"learning": "ema", "initial_cluster_size": 0.0, "debias": True, **averages} if ema else {}
    vq = VectorQuantizer(size, dim, **follow)
    codes = jnp.asarray(drawn(case, "codebook"))
    variables = vq.init(KEY, codes)
    if ema:
        np.testing.assert_array_equal(variables["codebook"]["embed_avg"], 0)
        variables = {"codebook": variables["codebook"] | {"codes": codes}}
    else:
        variables = {"params": {"codebook": codes}}
        adam = optax.adam(case.meta["learning_rate"])
        optimizer = adam.init(variables)
    step, g = quantizer_step(vq, config["commitment_cost"]), case.input("g")
    for i in range(case.meta["steps"]):
        encoding, new, loss, (grads, grad_x), through = step(variables, case.input(f"x{i}"), g)
        np.testing.assert_array_equal(encoding.indices, expected[f"s{i}_indices"])
        assert relative_l2(encoding.latents, expected[f"s{i}_quantize"]) < OUTPUT
        np.testing.assert_allclose(loss, expected[f"s{i}_loss"], rtol=LOSS)
        assert relative_l2(grad_x, expected[f"s{i}_loss_grad_x"]) < OUTPUT
        np.testing.assert_array_equal(through, expected[f"s{i}_straight_through_grad_x"])
        np.testing.assert_allclose(perplexity(encoding.indices, size), expected[f"s{i}_perplexity"], rtol=1e-5)
        if ema:
            variables = new
            state, t = new["codebook"], i + 1
            assert relative_l2(state["cluster_size"], expected[f"s{i}_ema_cluster_size_hidden"]) < OUTPUT
            weight = 1 - config["decay"] ** t
            assert relative_l2(state["cluster_size"] / weight, expected[f"s{i}_ema_cluster_size_average"]) < OUTPUT
            assert relative_l2(state["embed_avg"] / weight, expected[f"s{i}_ema_dw_average"]) < OUTPUT
            assert state["updates"] == t
            np.testing.assert_array_equal(
                np.all(state["codes"] == 0, axis=1), np.all(expected[f"s{i}_codebook"] == 0, axis=1)
            )
        else:
            assert relative_l2(grads["params"]["codebook"], expected[f"s{i}_loss_grad_codebook"]) < OUTPUT
            updates, optimizer = adam.update(grads, optimizer)
            variables = optax.apply_updates(variables, updates)
        assert relative_l2(vq.apply(variables, method="codebook"), expected[f"s{i}_codebook"]) < OUTPUT
    encoding = vq.apply(variables, case.input("x0"))
    np.testing.assert_array_equal(encoding.indices, expected["eval_indices"])
    assert relative_l2(encoding.latents, expected["eval_quantize"]) < OUTPUT
    from_indices = vq.apply(variables, encoding.indices, method="indices_to_codes")
    assert relative_l2(from_indices, expected["from_indices"]) < OUTPUT


# Two levels ----------------------------------------------------------------------------------------------------------


def two_level_weights(case):
    state = case.weights()
    for level in "tb":
        codes = drawn(case, f"codebook_{level}")
        state |= {
            f"quantize_{level}.embed": codes.T,
            f"quantize_{level}.cluster_size": np.zeros(len(codes), np.float32),
            f"quantize_{level}.embed_avg": codes.T,
        }
    return state


@functools.cache
def two_levels(name):
    case = Case("vqvae", name)
    return case, tokenizers.from_official("vqvae", case.meta["config"], two_level_weights(case))


def prequant(module, pixels):
    net = module.network
    features = net.encoder_bottom(pixels)
    top = net.to_codes_top(net.encoder_top(features))
    explained = net.decoder_top(net.quantize_top(top).latents)
    return top, net.to_codes_bottom(jnp.concatenate([explained, features], axis=-1))


@pytest.mark.parametrize("name", cases("vqvae", "vqvae2_small|full_vqvae2_default"))
def test_two_levels_encode_and_decode_as_the_original(name):
    case, tok = two_levels(name)
    expected, pixels = case.outputs, drawn(case, "image")
    encoding = tok.encode(pixels)
    top, bottom = split_levels(encoding.indices)
    np.testing.assert_array_equal(top, expected["indices_top"])
    np.testing.assert_array_equal(bottom, expected["indices_bottom"])
    for ours, theirs in zip(split_levels(encoding.latents), ("quant_top", "quant_bottom"), strict=True):
        assert relative_l2(ours, expected[theirs]) < OUTPUT
    for ours, theirs in zip(
        tok.module.apply(tok.variables, pixels, method=prequant), ("prequant_top", "prequant_bottom"), strict=True
    ):
        assert relative_l2(ours, expected[theirs]) < OUTPUT
    np.testing.assert_allclose(encoding.losses["commitment"], expected["latent_loss"][0], rtol=LOSS)
    assert relative_l2(tok.decode(encoding.latents), expected["recon"]) < OUTPUT
    assert relative_l2(tok.decode_indices(encoding.indices), expected["recon"]) < OUTPUT


@pytest.mark.parametrize("name", cases("vqvae", "vqvae2_train"))
def test_training_steps_of_two_levels_are_the_original_ones(name):
    case, tok = two_levels(name)
    expected = case.outputs

    def loss(recon, pixels, encoding):
        return jnp.mean(jnp.square(recon - pixels)) + 0.25 * encoding.losses["commitment"]

    step, (params, state, optimizer) = training(tok, loss, case.meta["learning_rate"])
    for i in range(case.meta["steps"]):
        pixels, old = drawn(case, f"image_{i}"), params
        params, state, optimizer, (value, recon, encoding), grads = step(params, state, optimizer, pixels)
        np.testing.assert_allclose(value, expected[f"s{i}_loss"], rtol=1e-4)
        np.testing.assert_allclose(np.mean(np.square(recon - pixels)), expected[f"s{i}_recon_loss"], rtol=1e-4)
        np.testing.assert_allclose(encoding.losses["commitment"], np.squeeze(expected[f"s{i}_latent_loss"]), rtol=1e-4)
        compare_step(case, i, old, params, grads)
        for level in ("top", "bottom"):
            statistics = state["codebook"]["network"][f"quantize_{level}"]
            assert relative_l2(statistics["codes"], expected[f"s{i}_codebook_{level[0]}"]) < 1e-4
            assert relative_l2(statistics["cluster_size"], expected[f"s{i}_cluster_size_{level[0]}"]) < 1e-5


# What holds without the originals ------------------------------------------------------------------------------------

SMALL = {"channels": 8, "blocks": 1, "block_channels": 4, "latent_channels": 4}
CODES = {"name": "vq", "codebook_size": 16, "code_dim": 4, "learning": "ema"}


@pytest.mark.parametrize("levels", [1, 2])
def test_any_size_goes_in_and_comes_back(levels):
    tok = tokenizers.create("vqvae", **SMALL, bottleneck=CODES, levels=levels)
    pixels = refweights.image_like("vqvae/size", (2, 21, 35, 3))
    encoding = tok.encode(pixels)
    side = 4 * levels
    h, w = -(-21 // side), -(-35 // side)
    chex.assert_shape(encoding.indices, (2, h if levels == 1 else 5 * h, w))
    chex.assert_shape(encoding.latents, (*encoding.indices.shape, 4))
    np.testing.assert_array_equal(tok.decode_indices(encoding.indices), tok.decode(encoding.latents))
    chex.assert_shape(tok.reconstruct(pixels), pixels.shape)
    video = tok.reconstruct(pixels[None])
    np.testing.assert_allclose(video[0], tok.reconstruct(pixels), atol=1e-5)


def test_two_levels_take_any_bottleneck():
    layer = {"name": "vq", "codebook_size": 8, "code_dim": 4}
    tok = tokenizers.create("vqvae", **SMALL, bottleneck={"name": "residual", "layers": (layer, layer)}, levels=2)
    encoding = tok.encode(refweights.image_like("vqvae/residual", (1, 16, 8, 3)))
    chex.assert_shape(encoding.indices, (1, 10, 1, 2))
    np.testing.assert_allclose(tok.decode_indices(encoding.indices), tok.decode(encoding.latents), atol=1e-5)
    assert (tok.spec.codebook_size, tok.spec.codebooks) == (8, 2)


def test_rows_of_two_levels_read_from_coarse_to_fine():
    top, bottom = np.arange(6).reshape(1, 2, 3, 1), 100 + np.arange(24).reshape(1, 4, 6, 1)
    joined = join_levels(top, bottom)
    np.testing.assert_array_equal(joined.ravel(), [*range(6), *range(100, 124)])
    chex.assert_trees_all_equal(split_levels(joined), (top, bottom))
    with pytest.raises(ValueError, match="5 rows of tokens"):
        split_levels(joined[:, :4])


def test_statistics_on_eight_devices_are_those_of_one():
    module = registry.build("vqvae", **SMALL, bottleneck=CODES, levels=2)
    pixels = refweights.image_like("vqvae/sharded", (8, 8, 8, 3))
    leaves, tree = jax.tree.flatten(registry.abstract_variables(module))
    variables = jax.tree.unflatten(
        tree,
        [
            np.ones((), bool) if leaf.dtype == bool else 0.3 * normal(f"vqvae/leaf{i}", leaf.shape) ** 2
            for i, leaf in enumerate(leaves)
        ],
    )

    def step(variables, pixels):
        return module.apply(variables, pixels, train=True, mutable=["codebook"])

    # Each program runs once: quick to compile is all that counts.
    options = platform.run_once_options()
    expected = jax.jit(step, compiler_options=options)(variables, pixels)
    mesh = meshes.make_mesh(data=4, fsdp=2, context=1)
    with jax.set_mesh(mesh):
        actual = jax.jit(step, compiler_options=options)(variables, meshes.global_batch(mesh, pixels))
    # Sums over the batch in another order.
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    for level in ("quantize_top", "quantize_bottom"):
        after, before = (v["codebook"]["network"][level]["codes"] for v in (expected[1], variables))
        assert not np.array_equal(after, before)


def test_official_names_round_trip_and_say_what_is_missing():
    case = Case("vqvae", cases("vqvae", "vqvae2_small")[0])
    state = two_level_weights(case)
    tok = tokenizers.from_official("vqvae", case.meta["config"], state)
    back = to_official(conversion.TABLE, jax.device_get(dict(tok.variables)))
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)
    del state["dec.blocks.4.weight"]
    with pytest.raises(ValueError, match=r"missing 'dec\.blocks\.4\.weight'"):
        tokenizers.from_official("vqvae", case.meta["config"], state)


def test_statistics_of_sonnet_are_taken_where_there_are_any():
    case = Case("vqvae", cases("vqvae", "notebook_small")[0])
    state = {f"{name}:0": value for name, value in sonnet_weights(case).items()}
    size, dim = case.meta["config"]["num_embeddings"], case.meta["config"]["embedding_dim"]
    prefix = "vector_quantizer_ema"
    state |= {
        f"{prefix}/ema_cluster_size/hidden:0": np.full(size, 2.0, np.float32),
        f"{prefix}/ema_cluster_size/counter:0": np.int64(7),
        f"{prefix}/ema_dw/hidden:0": np.full((dim, size), 3.0, np.float32),
        f"{prefix}/ema_dw/counter:0": np.int64(7),
        f"{prefix}/ema_dw/average:0": np.zeros((dim, size), np.float32),
        f"{prefix}/ema_cluster_size/average:0": np.zeros(size, np.float32),
    }
    statistics = flatten(dict(tokenizers.from_official("vqvae", case.meta["config"], state).variables))
    renamed = {name.replace("vector_quantizer_ema/emb", "vector_quantizer/emb"): v for name, v in state.items()}
    again = flatten(dict(tokenizers.from_official("vqvae", case.meta["config"], renamed).variables))
    chex.assert_trees_all_equal(again, statistics)
    prefix = "codebook/network/bottleneck/"
    assert statistics[prefix + "updates"] == 7
    assert (statistics[prefix + "cluster_size"] == 2).all()
    assert (statistics[prefix + "embed_avg"] == 3).all()
    assert unflatten(statistics)


def test_configs_it_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"unknown in_channel 1\..*Accepted: 3"):
        conversion.fields_from_official({"in_channel": 1})
    with pytest.raises(ValueError, match="unknown field of an official vqvae config 'num_hidden'.*num_hiddens"):
        conversion.fields_from_official({"num_hidden": 3})
    with pytest.raises(ValueError, match="unknown number of levels 3"):
        registry.abstract_variables(registry.build("vqvae", levels=3))
    assert conversion.fields_from_official({"channel": 256})["channels"] == 256
