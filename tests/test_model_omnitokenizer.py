"""OmniTokenizer against the authors' code: networks, codes, names; its causal form; its training."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import official_training
import optax
import pytest
import refweights
from reference import Case, cases, relative_l2

import tokenizers
from configs import base, omnitokenizer_stage1, omnitokenizer_stage2
from tokenizers import registry
from tokenizers.api import Tokenizer
from tokenizers.convert import engine
from tokenizers.convert import lpips as lpips_table
from tokenizers.convert import omnitokenizer as table
from tokenizers.discriminators import tats
from tokenizers.losses import adversarial, perceptual, reconstruction
from tokenizers.losses.balance import constant_weight
from tokenizers.models import omnitokenizer
from tokenizers.networks.lpips import LPIPS
from tokenizers.parallel import platform
from tokenizers.train import optim
from tokenizers.train.adversary import Adversary
from tokenizers.train.autoencoder import Recipe
from tokenizers.train.objective import Objective, Term, mean_reduction
from tokenizers.train.state import AdversaryState, new_state
from tokenizers.train.step import make_step

# Summation orders differ in float32. Observed on CPU: 2e-6 for released sizes, 8e-7 for small ones.
TOLERANCE = 1e-5
LOSS, GRADIENT, CHANGE = 1e-4, 1e-3, 1e-2

FAST = "small_vq_rope_t5"
CASES = [
    pytest.param(name, marks=[] if name == FAST else pytest.mark.slow)
    for name in cases("omnitokenizer", "(small|full)_.*")
]


def config_of(case):
    """The case's arguments, and in which of two ways its code attended."""
    return case.meta["config"] | {"sdpa": case.meta.get("sdpa", True)}


@functools.cache
def official(name):
    case = Case("omnitokenizer", name)
    return case, tokenizers.from_official("omnitokenizer", config_of(case), case.weights())


def pixels_of(case):
    return case.input("video") * 2  # theirs are in [-0.5, 0.5]


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_original_does(name):
    case, tok = official(name)
    expected = case.outputs
    encoding = tok.encode(pixels_of(case), strict=True)

    def same(value, key):
        assert relative_l2(np.asarray(value).reshape(expected[key].shape), expected[key]) < TOLERANCE, key

    if encoding.indices is None:
        same(encoding.mean, "posterior_mean")
        same(encoding.logvar, "posterior_logvar")
        np.testing.assert_allclose(encoding.losses["kl"], expected["kl_sum_per_batch"], rtol=TOLERANCE)
        reconstruction = tok.decode(encoding.latents)
    else:
        # Not even the fragile positions flip.
        np.testing.assert_array_equal(
            np.asarray(encoding.indices).reshape(expected["indices"].shape), expected["indices"]
        )
        np.testing.assert_allclose(0.25 * encoding.losses["commitment"], expected["commitment_loss"], rtol=TOLERANCE)
        reconstruction = tok.decode_indices(encoding.indices)
    side = case.meta.get("crop_recon")
    same(np.asarray(reconstruction)[..., :side, :side, :] / 2, "recon")


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("omnitokenizer", "small_vq_rope_t17|small_vq_defer_pool_t9"))
def test_tokens_and_what_the_quantizer_reads_are_the_originals(name):
    case, tok = official(name)
    for method, key in (("encoded", "encoder_out"), ("prequantized", "prequant")):
        found = tok.module.apply(tok.variables, pixels_of(case), method=method)
        assert relative_l2(found, case.outputs[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", cases("omnitokenizer", "small_vae_rope_image|small_vq_rel_nosdpa_t5"))
def test_weights_go_back_to_their_official_names(name):
    case, tok = official(name)
    weights, back = case.weights(), tok.export_official()
    computed = {"codebook.N", "codebook.z_avg"}
    chex.assert_trees_all_equal(
        {key: value for key, value in back.items() if key not in computed},
        {key: weights[key] for key in back if key not in computed},
    )
    left = {key for key in weights if key not in back and "discriminator" not in key}
    unused = ("context_norm", "spatial_rel_pos_bias", "codebook")
    assert all(any(word in key for word in unused) for key in left), left
    weights["encoder.extra.weight"] = weights.pop("pre_vq_conv.1.weight")
    with pytest.raises(ValueError, match=r"missing 'pre_vq_conv.1.weight'(.|\n)*unexpected 'encoder.extra.weight'"):
        tokenizers.from_official("omnitokenizer", config_of(case), weights)


@pytest.mark.parametrize("name", cases("omnitokenizer", "full_.*"))
def test_the_table_of_variants_is_what_the_arguments_say(name):
    case = Case("omnitokenizer", name)
    variant = "omnitokenizer-" + case.meta["official_release"].removesuffix(".ckpt").replace("_", "-")
    built = registry.build("omnitokenizer", **table.fields_from_official(config_of(case)))
    assert built == registry.build(variant)
    facts = tokenizers.describe(variant)
    assert not facts["causal"]
    assert "not causal" in facts["note"]
    # What the authors' code computes and drops is no parameter here.
    dropped = ("discriminator", "context_norm", "spatial_rel_pos_bias", "codebook", ".beta", "_index")
    used = sum(np.prod(shape) for key, shape, _ in case.meta["state_dict"] if not any(word in key for word in dropped))
    assert facts["parameters"] == used


CONFIG = {
    "patch_embed": "linear", "patch_size": 8, "temporal_patch_size": 2, "spatial_depth": 4, "temporal_depth": 4,
    "embedding_dim": 512, "enc_block": "ttww", "dec_block": "tttt", "twod_window_size": 8, "dim_head": 64, "heads": 8,
    "causal_in_temporal_transformer": True, "causal_in_peg": True, "spatial_pos": "rel", "n_codes": 8192,
    "codebook_dim": 8, "l2_code": True, "no_random_restart": True,
}  # fmt: skip


def test_the_release_of_other_attention_is_known_by_its_name():
    fields = table.fields_from_official(CONFIG | {"sdpa": False})
    assert registry.build("omnitokenizer", **fields) == registry.build("omnitokenizer-imagenet-only")
    misspelt = {key.replace("causal_in_t", "casual_in_t"): value for key, value in CONFIG.items()}
    assert table.fields_from_official(misspelt) == table.fields_from_official(CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_embed": "cnn"}, "patch_embed 'cnn'. Accepted: linear"),
        ({"use_external_codebook": True}, "use_external_codebook True"),
        ({"enc_block": "ttan"}, "letter of enc_block='ttan' 'a'. Accepted: t, w"),
        ({"spatial_pos": "sine"}, "spatial_pos 'sine'.*Accepted: rope, rel"),
        ({"n_code": 3}, "argument of OmniTokenizer 'n_code'. Did you mean 'n_codes'"),
    ],
)
def test_arguments_of_other_networks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        table.fields_from_official(CONFIG | changes)


# --- other sizes, and the causal form


@pytest.mark.slow
def test_windows_at_the_border_hold_what_is_there():
    x = np.random.default_rng(0).normal(size=(1, 1, 3, 5, 8)).astype(np.float32)
    layer = omnitokenizer.WindowedAttention(2, 2, np.float32)
    variables = layer.init(jax.random.key(0), x)
    whole = layer.apply(variables, x)
    np.testing.assert_allclose(whole[:, :, :2, :4], layer.apply(variables, x[:, :, :2, :4]), atol=1e-6)
    # Nothing but itself is in the window of the corner.
    np.testing.assert_allclose(whole[:, :, 2:, 4:], layer.apply(variables, x[:, :, 2:, 4:]), atol=1e-6)
    np.testing.assert_allclose(whole[:, :, 2:, :2], layer.apply(variables, x[:, :, 2:, :2]), atol=1e-6)


@functools.cache
def toy(**changes):
    """A tokenizer in use; random weights of any kind take longer to make than to run."""
    bottleneck = {"name": "vq", "codebook_size": 16, "code_dim": 4, "learning": "ema"}
    fields = {"bottleneck": bottleneck, "latent_channels": 4, "patch": (2, 4, 4), "width": 8, "encoder_blocks": "tw"}
    fields |= {"decoder_blocks": "t", "temporal_depth": 1, "heads": 2, "head_dim": 4, "window": 2}
    module = registry.build("omnitokenizer", **(fields | changes))
    leaves, tree = jax.tree.flatten(registry.abstract_variables(module))
    values = [refweights.uniform(f"leaf{i}", leaf.shape) for i, leaf in enumerate(leaves)]
    return Tokenizer(module, jax.tree.unflatten(tree, values), "omnitokenizer", fields | changes)


STREAMS = [
    {"encoder_blocks": "ttw", "temporal_depth": 2},
    {"pool": (2, 2), "patch": (4, 8, 8)},
    {"temporal_positions": "alibi", "attention_window": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", STREAMS, ids=str)
def test_chunks_of_a_stream_are_the_whole_clip(changes):
    tok = toy(**changes)
    time = tok.spec.compression[0]
    clip = refweights.image_like("omni/clip", (1, 1 + 5 * time, 16, 24, 3))
    whole = tok.encode(clip)
    cut = 1 + 2 * time
    chunks = list(tok.encode_stream([clip[:, :cut], clip[:, cut : cut + time], clip[:, cut + time :]]))
    assert [chunk.latents.shape[1] for chunk in chunks] == [3, 1, 2]
    np.testing.assert_array_equal(np.concatenate([chunk.indices for chunk in chunks], axis=1), whole.indices)
    streamed = np.concatenate(list(tok.decode_stream(chunks)), axis=1)
    # Summation orders of attention differ: observed 5e-7.
    np.testing.assert_allclose(streamed, tok.decode(whole.latents), atol=1e-5)
    np.testing.assert_array_equal(tok.encode(clip[:, 0]).indices, whole.indices[:, 0])


def test_the_program_does_not_grow_with_the_depth():
    pixels, lines = jax.ShapeDtypeStruct((1, 5, 32, 32, 3), jnp.float32), []
    for depth in (2, 6):
        deep = {"encoder_blocks": "t" * depth + "w" * depth, "decoder_blocks": "t" * depth, "temporal_depth": depth}
        module = registry.build("omnitokenizer", width=8, heads=1, **deep)
        program = jax.jit(module.apply).lower(registry.abstract_variables(module), pixels)
        lines.append(program.as_text().count("\n"))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("changes", [{"layout": "scrambled"}, {"causal_attention": False}, {"causal_positions": False}])
def test_what_is_not_causal_says_so(changes):
    module = registry.build("omnitokenizer", **changes)
    assert not module.spec.causal
    assert registry.build("omnitokenizer").spec.causal


@pytest.mark.slow
def test_weights_with_mixed_up_positions_are_not_causal():
    tok = toy(layout="scrambled")
    clip = refweights.image_like("omni/clip", (1, 5, 16, 24, 3))
    later = clip.copy()
    later[:, 3:] *= -1
    a, b = (tok.module.apply(tok.variables, x, method="prequantized")[:, 0] for x in (clip, later))
    assert np.abs(a - b).max() > 1e-3
    with pytest.raises(ValueError, match="cannot stream: it is not causal"):
        next(tok.encode_stream([clip]))


# --- training


def place(name):
    """Where an entry of a discriminator's state dict lives here, ``model1.2.weight`` say; None for counters, noise."""
    found = re.fullmatch(r"model(\d)\.(\d)\.(\w+)", name)
    if found is None or found[3] == "num_batches_tracked":
        return None
    stage, index, leaf = int(found[1]), int(found[2]), found[3]
    where = "out" if stage == LAST else str(stage)
    if index == (1 if stage in (1, 2) else 0):
        return "params", f"conv_{where}", {"weight": "kernel"}.get(leaf, leaf)
    if leaf.startswith("running_"):
        return "batch_stats", f"norm_{where}", leaf.removeprefix("running_")
    return "params", f"norm_{where}", {"weight": "scale"}.get(leaf, leaf)


LAST = 4


def discriminator(case, kind):
    """(module, its variables): ``image`` or ``video``."""
    make = {"image": tats.tats_2d, "video": tats.tats_3d}[kind]
    variables = {"params": {}, "batch_stats": {}}
    for name, value in case.weights(f"{kind}_discriminator.").items():
        if place(name) is not None:
            collection, layer, leaf = place(name)
            value = engine.kernel.to_ours(value) if leaf == "kernel" else value
            variables[collection].setdefault(layer, {})[leaf] = jnp.asarray(value)
    return make(case.meta["config"].get("disc_channels", 64)), variables


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "disc_full" else ())
        for name in cases("omnitokenizer", "disc_.*")
    ],
)
def test_discriminators_are_the_originals(name):
    case = Case("omnitokenizer", name)
    clip, expected = pixels_of(case), case.outputs
    frames = {"image": clip[:, 0], "video": clip}
    for kind, pixels in frames.items():
        module, variables = discriminator(case, kind)
        run = jax.jit(
            functools.partial(module.apply, train=True, method="features", mutable=["batch_stats"]),
            compiler_options=platform.run_once_options(),
        )
        (logits, features), _ = run(variables, pixels)
        assert relative_l2(logits, expected[f"{kind}_logits"]) < TOLERANCE
        for index, feature in enumerate(features):
            theirs = expected[f"{kind}_feat{index}"]
            assert relative_l2(np.asarray(feature).reshape(-1)[: theirs.size], theirs) < TOLERANCE


def lpips_variables():
    """LPIPS with the weights of the cases, which do not list them: drawn under torchvision's names."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    target = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), target)
    names = engine.to_official(lpips_table.table("vgg"), zeros)
    state = {name: refweights.weight(name, value.shape) for name, value in names.items()}
    return engine.to_tree(lpips_table.table("vgg"), target, state)


class Training:
    """One step of a case, through `train.step.make_step`.

    The authors' pixels span half of ours: weights of L1 are half of theirs. Their adversarial weight does not touch
    their feature matching, which in `Adversary` is a part of the generator's loss.
    """

    def __init__(self, name):
        self.case = case = Case("omnitokenizer", name)
        config, lr = case.meta["config"], case.meta["training"]["lr"]
        self.tok = tokenizers.from_official("omnitokenizer", config_of(case), case.weights())
        pixels = jnp.asarray(pixels_of(case))
        self.pixels = pixels if pixels.ndim == 5 else pixels[:, None]
        self.kind = "video" if self.pixels.shape[1] > 1 else "image"
        weight = config[f"{self.kind}_gan_weight"]
        frames = case.meta["inputs"].get("frame_idx", {"values": [0, 0]})["values"]

        def lpips(prediction, target, variables):
            drawn = (x[np.arange(2), np.asarray(frames)] / 2 for x in (prediction, target))
            return perceptual.lpips_loss(LPIPS(), variables)(*drawn)

        self.module, self.opponent = discriminator(case, self.kind)
        self.optimizer = official_training.remembered(optim.make(self.settings(lr), 1)[0])
        self.recipe = Recipe(
            model=self.tok.module,
            objective=Objective(
                terms=(
                    Term("l1", 4.0 / 2, lambda p, t, _: reconstruction.l1(p, t)),
                    Term("lpips", config["perceptual_weight"], lpips, "lpips"),
                ),
                reduction=mean_reduction,
                bottleneck={"kl": config["kl_weight"]} if config.get("use_vae") else {"commitment": 0.25},
                frozen={},
                params={},
            ),
            optimizer=self.optimizer,
            learning_rate=optax.constant_schedule(lr),
            adversary=self.adversary(weight, config["gan_feat_weight"], lr) if weight else None,
            seed=0,
            ema_decay=0.0,
            ema_warmup=False,
            accumulate=1,
        )
        adversary = None
        if weight:
            optimizer = self.recipe.adversary.optimizer
            adversary = AdversaryState(
                params=self.opponent["params"],
                statistics={"batch_stats": self.opponent["batch_stats"]},
                ema=None,
                optimizer=optimizer.init(self.opponent["params"]),
                lecam=adversarial.lecam_init(),
                balance=self.recipe.adversary.weight.init(self.pixels),
            )
        params = {"model": self.tok.params, "objective": {}}
        statistics = {key: value for key, value in self.tok.variables.items() if key != "params"}
        self.before = new_state(params, statistics, self.tok.params, self.optimizer.init(params), adversary)
        self.frozen = {"lpips": lpips_variables()}

    def settings(self, lr):
        return base.optimizer(lr=lr, b1=0.5, b2=0.9, clip=1.0)

    def adversary(self, weight, matching, lr):
        return Adversary(
            module=self.module,
            generator_loss=adversarial.linear_generator,
            discriminator_loss=adversarial.hinge_discriminator,
            optimizer=official_training.remembered(optim.make(self.settings(lr), 1)[0]),
            weight=constant_weight(1.0),
            factor=weight,
            start=0,
            generator_start=0,
            lecam_weight=0.0,
            lecam_decay=0.999,
            feature_matching_weight=matching / weight,
            r1_weight=0.0,
            r1_every=16,
            ema_decay=0.0,
            fresh_forward=True,
        )

    def step(self):
        """Takes it: (state, metrics, gradient of the generator's loss in the discriminator or None)."""
        noise = self.case.meta["inputs"].get("vae_noise")
        noise = [] if noise is None else [jnp.asarray(self.case.input("vae_noise"))] * 2

        def program(state, frozen, pixels, noise):
            with official_training.drawn("normal" if noise else None, noise):
                return make_step(self.recipe)(state, frozen, {"pixels": pixels})

        return jax.jit(program)(self.before, self.frozen, self.pixels, noise)

    def leaked(self):
        """Gradient of the generator's loss in the discriminator's parameters, and the codebook after one pass."""
        adversary = self.recipe.adversary
        noise = [jnp.asarray(self.case.input("vae_noise"))] if "vae_noise" in self.case.meta["inputs"] else []

        def judged(params, pixels):
            variables = self.opponent | {"params": params}
            return adversary.module.apply(variables, pixels, train=True, method="features", mutable=["batch_stats"])[0]

        def program(params, variables, pixels):
            with official_training.drawn("normal" if noise else None, noise):
                (fake, _), statistics = self.tok.module.apply(
                    variables, pixels, train=True, mutable=["codebook"], rngs={"bottleneck": jax.random.key(0)}
                )

            def loss(params):
                (logits, found), (_, wanted) = judged(params, fake), judged(params, pixels)
                matching = adversarial.feature_matching(wanted, found)
                value = adversary.generator_loss(logits) + adversary.feature_matching_weight * matching
                return adversary.factor * value, matching

            gradients, matching = jax.grad(loss, has_aux=True)(params)
            return gradients, statistics, matching

        return jax.jit(program)(self.opponent["params"], dict(self.tok.variables), self.pixels)


def first(value, expected):
    return np.asarray(value).reshape(-1)[: expected.size].reshape(expected.shape)


@pytest.mark.slow  # LPIPS' network makes it a minute
@pytest.mark.parametrize("name", cases("omnitokenizer", "train_step_.*"))
def test_a_training_step_is_that_of_the_original(name):
    training = Training(name)
    expected = training.case.outputs
    state, metrics = training.step()
    found = {}

    def close(value, key, tolerance):
        found[key] = float(np.max(np.abs(np.asarray(value) / expected[key] - 1)))
        assert found[key] < tolerance, (key, found[key])

    def same(value, key, tolerance):
        found[key] = relative_l2(first(value, expected[key]), expected[key])
        assert found[key] < tolerance, (key, found[key])

    close(2 * metrics["loss/l1"], "log.recon_loss", LOSS)
    if "log.perceptual_loss" in expected:
        close(4 * metrics["loss/lpips"], "log.perceptual_loss", LOSS)
    if training.case.meta["config"].get("use_vae"):
        close(1e-6 * metrics["loss/kl"], "log.kl_loss", LOSS)
    else:
        close(0.25 * metrics["loss/commitment"], "log.commitment_loss", LOSS)
    close(metrics["grad_norm/generator"], "grad_norm_generator", GRADIENT)
    gradients = engine.to_official(table.TABLE, {"params": state.optimizer[0]["model"]})
    after = engine.to_official(table.TABLE, {"params": state.params["model"], **state.model_state})
    before = training.case.weights()
    for key in expected:
        kind, _, name = key.partition(".")
        if kind == "grad" and name in gradients and np.linalg.norm(expected[key]) < 1e-6:
            assert np.linalg.norm(gradients[name]) < 1e-6, name  # attention over one frame
        elif kind == "grad" and name in gradients:
            same(gradients[name], key, GRADIENT)
        elif kind == "after" and name.startswith("codebook.") and name in after:  # after both passes
            # Where the original's discriminator does not step, its second pass still changes the codebook.
            passes = "after" if training.recipe.adversary is not None else "after_g_forward"
            if f"{passes}.{name}" in expected:
                same(after[name], f"{passes}.{name}", LOSS)
        elif kind == "after" and name in gradients:
            # Adam makes a step of full size of the smallest gradient, whatever its rounding.
            clear = np.abs(first(gradients[name], expected[key])) > 1e-5
            start = first(before[name], expected[key])
            found[key] = relative_l2((first(after[name], expected[key]) - start)[clear], (expected[key] - start)[clear])
            assert found[key] < CHANGE, (key, found[key])
            same(after[name], key, LOSS)
    if training.recipe.adversary is not None:
        check_discriminator(training, state, metrics, close, same)
    print(name, {key: f"{value:.1e}" for key, value in found.items()})


def check_discriminator(training, state, metrics, close, same):
    """Its losses and its step.

    The authors clear no gradients between the two backward passes: what the generator's loss says about the
    discriminator's parameters is added to the discriminator's own gradient, and larger. Here it is not.
    """
    kind, expected, adversary = training.kind, training.case.outputs, training.recipe.adversary
    leak, statistics, matching = training.leaked()
    close(matching, f"log.{kind}_gan_feat_loss", LOSS)
    fooling = metrics["loss/fooling"] - adversary.feature_matching_weight * matching
    # A small difference of two large numbers.
    np.testing.assert_allclose(fooling, expected[f"log.g_{kind}_loss"], atol=LOSS * abs(metrics["loss/fooling"]))
    close(metrics["loss/discriminator"], "log.discloss", LOSS)
    close(metrics["loss/discriminator"] / adversary.factor, f"log.d_{kind}_loss", LOSS)
    close(metrics["logits/real"], f"log.logits_{kind}_real", GRADIENT)
    close(metrics["logits/fake"], f"log.logits_{kind}_fake", GRADIENT)
    for name in ("embeddings", "N"):
        key = f"after_g_forward.codebook.{name}"
        if key in expected:
            same(engine.to_official(table.TABLE, statistics)[f"codebook.{name}"], key, LOSS)
    total = jax.tree.map(jnp.add, leak, state.adversary.optimizer[0])
    close(optax.tree.norm(leak), "grad_norm_leaked_into_discriminators_by_G", GRADIENT)
    close(optax.tree.norm(total), "grad_norm_discriminator(D-loss + leaked G-loss gradients)", GRADIENT)
    params = training.opponent["params"]
    updates, _ = adversary.optimizer.update(total, adversary.optimizer.init(params), params)
    stepped = {"params": optax.apply_updates(params, updates), **state.adversary.statistics}
    for key in expected:
        when, _, name = key.partition(f".{kind}_discriminator.")
        if not name or place(name) is None:
            continue
        collection, layer, leaf = place(name)
        if collection == "batch_stats":
            # Theirs count the real pixels of the generator's pass as well. No step reads them.
            continue
        value = {"grad": {"params": total}, "after": stepped}[when][collection][layer][leaf]
        value = engine.kernel.to_official(np.asarray(value)) if leaf == "kernel" else value
        same(value, key, GRADIENT if when == "grad" else LOSS)


@pytest.mark.parametrize("strategy", ["average", "first"])
@pytest.mark.parametrize("name", cases("omnitokenizer", "inflate_.*"))
def test_patches_are_inflated_as_the_originals(name, strategy):
    """The next stage has patches of more frames."""
    case = Case("omnitokenizer", name)
    module = registry.build("omnitokenizer", **table.fields_from_official(config_of(case)))
    shapes = registry.abstract_variables(module)
    before = engine.to_tree(table.TABLE, shapes, case.weights(), table.IGNORE)["params"]
    frames = case.meta["training"]["target_temporal_patch_size"]
    after = registry.abstract_variables(module.clone(patch=(frames, *module.patch[1:])))["params"]
    after = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), after)
    found = engine.to_official(table.TABLE, {"params": omnitokenizer.next_stage(before, after, strategy)})
    checked = 0
    for key, expected in case.outputs.items():
        if key.startswith(f"{strategy}."):
            np.testing.assert_allclose(
                first(found[key.removeprefix(f"{strategy}.")], expected), expected, rtol=1e-6, err_msg=key
            )
            checked += 1
    assert checked == 8
    for key in ("encoder.to_patch_emb_first_frame.2.weight", "pre_vq_conv.1.weight"):
        np.testing.assert_array_equal(found[key], case.weights()[key])
    assert not any(np.isnan(value).any() for value in found.values())


@pytest.mark.parametrize("strategy", ["center", "average", "first", "last"])
@pytest.mark.parametrize("name", cases("omnitokenizer", "inflate_.*"))
def test_discriminators_are_inflated_as_the_originals(name, strategy):
    case = Case("omnitokenizer", name)
    (_, images), (_, clips) = (discriminator(case, kind) for kind in ("image", "video"))
    found = tats.inflated(images, clips, strategy)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, clips)
    expected = case.outputs[f"dis_{strategy}.video_discriminator.model1.1.weight"]
    kernel = engine.kernel.to_official(np.asarray(found["params"]["conv_1"]["kernel"]))
    np.testing.assert_allclose(first(kernel, expected), expected, rtol=1e-6)
    np.testing.assert_array_equal(found["params"]["conv_0"]["bias"], images["params"]["conv_0"]["bias"])
    np.testing.assert_array_equal(found["params"]["norm_out"]["scale"], clips["params"]["norm_out"]["scale"])
    with pytest.raises(ValueError, match="strategy of inflation 'middle'"):
        tats.inflated(images, clips, "middle")


@pytest.mark.parametrize("name", cases("omnitokenizer", "lr_schedules"))
def test_learning_rates_are_the_originals(name):
    case = Case("omnitokenizer", name)
    steps = case.meta["training"]["steps"]
    for stage, config in (
        ("stage1", omnitokenizer_stage1.get_config()),
        ("stage2", omnitokenizer_stage2.get_config()),
    ):
        for who, optimizer in (("gen", config.optimizer), ("disc", config.discriminator.optimizer)):
            rate = optim.schedule(optimizer, config.steps)
            values = [rate(jnp.int32(step)) for step in steps]
            # Cosines of float32 numbers.
            np.testing.assert_allclose(values, case.outputs[f"{stage}_{who}_lr"], rtol=1e-4, err_msg=f"{stage} {who}")
