"""TiTok and TA-TiTok against the authors' code: latents, tokens, logits, pixels, activations inside."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import refweights
from reference import Case, cases, relative_l2

import tokenizers
from tokenizers import registry
from tokenizers.convert import engine
from tokenizers.convert import titok as conversion
from tokenizers.convert.engine import to_official
from tokenizers.models import titok
from tokenizers.parallel import platform
from tokenizers.quantize.gaussian import reparameterize

# float32 against float32 of PyTorch. Observed: losses 1e-6, latents 2e-6, pixels 1.1e-5 behind the 24 + 24 layers, the
# sharp softmax and the convolutions of the largest.
OUTPUT, LOSS = 3e-5, 1e-5


@functools.lru_cache(maxsize=2)  # released sizes have 400 million parameters
def converted(name):
    case = Case("titok", name)
    return case, tokenizers.from_official("titok", case.meta["config"], case.weights())


def drawn(case, key):
    """An input; ``post`` says what was done to it after drawing."""
    entry = case.meta["inputs"].get(key)
    if entry is None:
        return None
    value = case.input(key)
    scale = {"x*sqrt(3)": np.float32(np.sqrt(3.0)), "(x+1)/2": np.float32(1.0)}[entry["post"]]
    return value * scale  # pixels stay in [-1, 1]: theirs are in [0, 1]


def stored(text, value):
    """What is kept of an output: its description ends in a slice, or says what was done to it."""
    if "mean and population std" in text:
        value = np.asarray(value, np.float64)
        return np.asarray([value.mean(), value.std()])
    if flat := re.search(r"flattened row-major then \[::(\d+)\]", text):
        return value.ravel()[:: int(flat[1])]
    if cut := re.search(r"slice \[([^\]]*)\]", text):
        bounds = ([int(n) if n.strip() else None for n in entry.split(":")] for entry in cut[1].split(","))
        return value[tuple(slice(*entry) for entry in bounds)]
    return value


def agree(case, key, value, tolerance=OUTPUT):
    kept = [name for name in case.outputs if name in (key, f"{key}_strided", f"{key}_crop", f"{key}_mean_std")]
    assert kept, key
    for name in kept:
        assert relative_l2(stored(case.meta["outputs"][name], value), case.outputs[name]) < tolerance, name


def _slow_if_full(name):
    return pytest.param(name, marks=pytest.mark.slow) if name.startswith("full") else name


@pytest.mark.parametrize("name", [_slow_if_full(n) for n in cases("titok", "(tiny_(vq|vae|tatitok)|full)_.*")])
def test_latents_tokens_and_pixels_are_the_official_ones(name):
    case, tok = converted(name)
    expected, module, variables = case.outputs, tok.module, tok.variables
    pixels, text = drawn(case, "image"), drawn(case, "text")
    latent = module.apply(variables, pixels, method="prequantized")
    agree(case, "latent", latent)
    encoding = tok.encode(pixels)
    chex.assert_shape(encoding.latents, (len(pixels), module.tokens, module.latent_channels))
    if module.spec.codebook_size is None:
        assert relative_l2(encoding.mean, expected["mean"]) < OUTPUT
        assert relative_l2(encoding.logvar, expected["logvar"]) < OUTPUT
        # Theirs is a row of sums per token; summed over them and averaged over the batch.
        np.testing.assert_allclose(encoding.losses["kl"], expected["kl"].sum(-1).mean(), rtol=LOSS)
        latents = reparameterize(encoding.mean, encoding.logvar, drawn(case, "noise"))
    else:
        sure = expected["index_margin"] >= 1e-3
        np.testing.assert_array_equal(np.asarray(encoding.indices)[sure], expected["indices"][sure])
        losses = {"commitment": case.meta["config"]["model"]["vq_model"]["commitment_cost"], "codebook": 1.0}
        parts = [weight * encoding.losses[key] for key, weight in losses.items()]
        np.testing.assert_allclose([sum(parts), *parts], expected["quant_losses"], rtol=1e-4)
        latents = tok.indices_to_latents(expected["indices"])
    assert relative_l2(latents, expected["z_q"]) < OUTPUT

    def decode(module, latents, text):
        """Logits and mixture where there are such, and what decode gives."""
        filled = module.filled(latents, text)
        if module.head != "proxy_pixels":
            return None, None, module.decode(latents, text=text)
        logits = module.to_pixels.proxies(filled)
        return logits, module.to_pixels.mixture(logits), module.decode(latents, text=text)

    logits, mixture, decoded = jax.jit(functools.partial(module.apply, method=decode))(variables, latents, text)
    if module.head == "proxies":
        agree(case, "proxy_logits", decoded)
        np.testing.assert_array_equal(jnp.argmax(decoded, -1), expected["proxy_argmax"])
        return
    if logits is not None:
        agree(case, "proxy_logits", logits)
        agree(case, "soft_quantized", mixture)
    agree(case, "recon", (decoded + 1) / 2)


@pytest.mark.parametrize("name", cases("titok", "tiny_blocks_.*"))
def test_activations_are_the_official_ones(name):
    case, tok = converted(name)
    pixels, text = drawn(case, "image"), drawn(case, "text")
    seen = {}

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            seen["/".join(context.module.path)] = result
        return result

    with nn.intercept_methods(record):
        encoding = tok.module.apply(tok.variables, pixels, method="encode")
        latents = encoding.latents
        if encoding.mean is not None and "noise" in case.meta["inputs"]:
            latents = reparameterize(encoding.mean, encoding.logvar, drawn(case, "noise"))
        tok.module.apply(tok.variables, latents, text=text, method="decode")
    names = {
        "ln_pre": "transformer/norm_in", "ln_post": "norm_out", "attn": "attention", "transformer": "transformer/block",
    }  # fmt: skip
    compared = 0
    for key, value in case.outputs.items():
        part, *rest = key.split(".")
        if part not in ("encoder", "decoder") or not rest or rest[0] not in names:
            continue
        place = names[rest[0]] + (rest[1] if len(rest) > 1 else "")
        inner = f"/{names.get(rest[2], rest[2])}" if len(rest) > 2 else ""
        ours = np.asarray(seen[f"{part[:2]}code_tokens/{place}{inner}"])
        assert relative_l2(ours.reshape(value.shape), value) < OUTPUT, key
        compared += 1
    assert compared >= 10


class Pretrained(Case):
    """The frozen VQGAN of a case, whose tensors are in a table of their own."""

    def __init__(self, case):
        entry = case.meta["modules"]["pretrained_tokenizer"]
        self.meta = {"state_dict": entry["state_dict"], "weight_overrides": entry["weight_overrides"]}


PROXY_CONFIG = {
    "encoder_decoder": {
        "channel_mult": [1, 1, 2, 2, 4],
        "num_resolutions": 5,
        "dropout": 0.0,
        "hidden_channels": 128,
        "num_channels": 3,
        "num_res_blocks": 2,
        "resolution": 256,
        "z_channels": 256,
    },
    "quantizer": {"num_embeddings": 1024, "embedding_dim": 256, "commitment_cost": 0.25},
}


@pytest.mark.parametrize("name", cases("titok", "train_stage1_.*"))
def test_training_steps_of_the_first_stage_are_the_official_ones(name):
    """Cross entropy to MaskGIT's tokens, quantizer losses, gradients, clipping, AdamW without decay of some."""
    case, tok = converted(name)
    meta, expected = case.meta, case.outputs
    pixels = drawn(case, "image")
    proxies = tokenizers.from_official("maskgit_vqgan", PROXY_CONFIG, Pretrained(case).weights())
    codes = proxies.encode(pixels).indices.reshape(len(pixels), -1)
    sure = expected["proxy_margin"] >= 1e-3
    np.testing.assert_array_equal(np.asarray(codes)[sure], expected["proxy_codes"][sure])
    codes = expected["proxy_codes"]
    commitment = meta["config"]["model"]["vq_model"]["commitment_cost"]
    options = meta["config"]["optimizer"]["params"]

    def decayed(params):
        paths = engine.official_names(conversion.TABLE, engine.flatten({"params": params}))
        flat = {path: name not in meta["no_weight_decay"] for path, name in paths.items()}
        return engine.unflatten(flat)["params"]

    adamw = optax.chain(
        optax.clip_by_global_norm(meta["params"]["max_grad_norm"]),
        optax.adamw(
            options["learning_rate"],
            b1=options["beta1"],
            b2=options["beta2"],
            weight_decay=options["weight_decay"],
            mask=decayed,
        ),
    )

    @functools.partial(jax.jit, compiler_options=platform.run_once_options())
    def step(params, optimizer):
        def objective(params):
            logits, encoding = tok.module.apply({"params": params}, pixels, train=True)
            flat = logits.reshape(len(pixels), -1, logits.shape[-1])
            reconstruction = optax.softmax_cross_entropy_with_integer_labels(flat, codes).mean()
            parts = {"commitment_loss": commitment * encoding.losses["commitment"]}
            parts["codebook_loss"] = encoding.losses["codebook"]
            parts["quantizer_loss"] = parts["commitment_loss"] + parts["codebook_loss"]
            total = reconstruction + parts["quantizer_loss"]
            parts |= {"reconstruction_loss": reconstruction, "total_loss": total}
            return total, (parts, logits, encoding.indices)

        grads, aux = jax.grad(objective, has_aux=True)(params)
        updates, optimizer = adamw.update(grads, optimizer, params)
        return optax.apply_updates(params, updates), optimizer, grads, aux

    def official(tree):
        return to_official(conversion.TABLE, {"params": jax.device_get(tree)})

    params, optimizer = tok.params, adamw.init(tok.params)
    for i in range(2):
        params, optimizer, grads, (parts, logits, indices) = step(params, optimizer)
        losses = [parts[key] for key in meta[f"step{i}_loss_names"]]
        np.testing.assert_allclose(losses, expected[f"step{i}_losses"], rtol=1e-4)
        grads, after = official(grads), official(params)
        if i == 0:
            np.testing.assert_array_equal(indices, expected["indices"])
            assert relative_l2(logits[..., ::4], expected["logits"]) < OUTPUT
            norms = [np.linalg.norm(grads[key]) for key in meta["grad_norm_names"]]
            np.testing.assert_allclose(norms, expected["grad_norms"], rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(np.linalg.norm(norms), expected["grad_total_norm"], rtol=1e-4)
            for key in meta["params"]["picks"]:
                theirs = expected[f"grad:{key}"]
                assert relative_l2(stored(meta["outputs"][f"grad:{key}"], grads[key]), theirs) < 1e-3, key
        for key in meta["params"]["picks"]:
            theirs = expected[f"step{i}_param:{key}"]
            ours = stored(meta["outputs"][f"step{i}_param:{key}"], after[key])
            # The first steps of Adam are signs: where a gradient is rounding noise, so is the step.
            close = np.abs(ours - theirs) < 0.05 * options["learning_rate"]
            assert close.mean() > 0.99, key


# What holds without the originals ------------------------------------------------------------------------------------

SMALL = {"tokens": 5, "input_size": (32, 48), "encoder": (16, 1, 2), "decoder": (24, 2, 2), "latent_channels": 4}
CODES = {"name": "vq", "codebook_size": 16, "code_dim": 4}


def small(**fields):
    module = registry.build("titok", **{**SMALL, "bottleneck": CODES, **fields})
    leaves, tree = jax.tree.flatten(registry.abstract_variables(module))
    values = [refweights.uniform(f"titok/{i}", leaf.shape) for i, leaf in enumerate(leaves)]
    return tokenizers.Tokenizer(module, jax.tree.unflatten(tree, values), "titok", {})


def test_an_image_of_any_shape_that_the_tables_have_is_a_few_tokens():
    tok = small()
    pixels = refweights.image_like("titok/any", (2, 32, 48, 3))
    encoding = tok.encode(pixels)
    chex.assert_shape(encoding.indices, (2, 5))
    chex.assert_shape(tok.decode_indices(encoding.indices), pixels.shape)
    chex.assert_shape(tok.reconstruct(pixels[None]), (1, *pixels.shape))
    with pytest.raises(ValueError, match="patch=16 must divide"):
        small(input_size=(32, 40))


def test_swapped_axes_mix_tokens():
    """Changing what one latent token says changes every code of the first releases, and one of the later ones."""
    x = refweights.image_like("titok/swap", (1, 32, 48, 3))
    for swapped, expected in ((False, False), (True, True)):
        tok = small(swapped=swapped, encoder=(16, 0, 2))  # no attention, which would mix them as well
        before = tok.module.apply(tok.variables, x, method="prequantized")
        params = jax.tree.map(jnp.asarray, tok.params)
        row = params["encode_tokens"]["latent_positions"].at[2].multiply(-3.0)
        params["encode_tokens"] = {**params["encode_tokens"], "latent_positions": row}
        after = tok.module.apply({"params": params}, x, method="prequantized")
        changed = jnp.any(jnp.abs(after - before) > 1e-6, axis=-1)[0]
        assert bool(changed.all()) == expected
        assert int(changed.sum()) >= 1


def test_text_is_read_where_it_belongs_and_refused_elsewhere():
    tok = small(text=(3, 7))
    latents = refweights.uniform("titok/latents", (2, 5, 4))
    text = refweights.uniform("titok/text", (2, 3, 7))

    def decode(text):
        return tok.module.apply(tok.variables, latents, text=text, method="decode")

    assert not np.allclose(decode(text), decode(-text), atol=1e-3)
    with pytest.raises(ValueError, match=r"reads text=features of shape \(B, 3, 7\), got None"):
        decode(None)
    with pytest.raises(ValueError, match=r"got \(2, 4, 7\)"):
        decode(jnp.zeros((2, 4, 7)))
    expected = decode(text)
    chex.assert_trees_all_close(tok.decode(latents, text=text), expected, atol=1e-5)
    frames = tok.decode(latents[:, None].repeat(2, axis=1), text=text)  # a caption of a clip is one of its frames
    chex.assert_trees_all_close(frames[:, 1], expected, atol=1e-5)
    pixels = refweights.image_like("titok/text", (2, 32, 48, 3))
    chex.assert_shape(tok.reconstruct(pixels, text=text), pixels.shape)
    indices = tok.encode(pixels).indices
    chex.assert_shape(tok.decode_indices(indices, text=text), pixels.shape)
    with pytest.raises(ValueError, match=r"reads text of shape \(2, 3, 7\); got None"):
        tok.decode(latents)
    plain = small()
    with pytest.raises(ValueError, match=r"reads no text; got \(2, 3, 7\)"):
        plain.decode(latents, text=text)
    with pytest.raises(ValueError, match=r"reads no text, got \(2, 3, 7\)"):
        plain.module.apply(plain.variables, latents, text=text, method="decode")


def test_remat_changes_nothing():
    tok = small()
    pixels = refweights.image_like("titok/remat", (1, 32, 48, 3))

    def gradient(module):
        def loss(params):
            reconstruction, encoding = module.apply({"params": params}, pixels, train=True)
            return jnp.square(reconstruction - pixels).mean() + encoding.losses["commitment"]

        # Each program runs once: quick to compile is all that counts.
        return jax.jit(jax.grad(loss), compiler_options=platform.run_once_options())(tok.params)

    # The recomputed forward pass may be fused differently.
    chex.assert_trees_all_close(gradient(tok.module), gradient(tok.module.clone(remat=True)), rtol=1e-3, atol=1e-5)


def test_official_names_round_trip_and_say_what_is_missing():
    for name in cases("titok", "tiny_(vq_l2_legacy_stage1|tatitok_vae)"):
        case, tok = converted(name)
        state = case.weights()
        back = to_official(conversion.TABLE, jax.device_get(dict(tok.variables)))
        chex.assert_trees_all_equal(back, state)
        del state["decoder.mask_token"]
        with pytest.raises(ValueError, match=r"missing 'decoder\.mask_token'"):
            tokenizers.from_official("titok", case.meta["config"], state)


def test_released_sizes_have_the_published_parameter_counts():
    millions = {"titok-b64": 204.8, "titok-s128": 83.7, "titok-sl256-vq8k": 330.3, "titok-ll32-vae-c16": 606.9}
    for name, count in millions.items():
        assert abs(registry.parameter_count(registry.build(name)) / 1e6 - count) < 0.6, name
    assert set(titok.VARIANTS) >= set(millions)


def test_configs_it_does_not_know_are_refused():
    case = Case("titok", cases("titok", "tiny_vq_nonlegacy")[0])

    def fields(**changes):
        model = {**case.meta["config"]["model"]["vq_model"], **changes}
        return conversion.fields_from_official({**case.meta["config"], "model": {"vq_model": model}})

    assert fields()["head"] == "patches"
    with pytest.raises(ValueError, match="unknown key of an official titok config 'token_siz'.*token_size"):
        fields(token_siz=3)
    with pytest.raises(ValueError, match="unknown quantize_mode 'fsq'"):
        fields(quantize_mode="fsq")
    with pytest.raises(ValueError, match="unknown vit_enc_model_size 'huge'"):
        fields(vit_enc_model_size="huge")
    with pytest.raises(ValueError, match="needs is_legacy=True"):
        fields(finetune_decoder=True)
    with pytest.raises(ValueError, match="vit_dec_patch_size"):
        fields(vit_dec_patch_size=32)
