"""The MAGVIT family against the authors' code: Open-MAGVIT2, IBQ, MAGVIT's 3D VQ and the public reconstruction."""

import dataclasses
import functools
import math

import chex
import jax
import numpy as np
import pytest
import refweights
from official_training import remembered
from reference import Case, cases, relative_l2
from test_discriminators import from_official, official_entry

import tokenizers
from configs import base, ibq_imagenet_16384, open_magvit2_imagenet_256, open_magvit2_video_128
from tokenizers import registry
from tokenizers.api import Tokenizer
from tokenizers.convert import engine, ibq, magvit2
from tokenizers.convert import lpips as lpips_table
from tokenizers.losses import adversarial, perceptual
from tokenizers.models.magvit2 import inflate
from tokenizers.networks.lpips import LPIPS
from tokenizers.parallel import platform
from tokenizers.train import build, optim
from tokenizers.train.objective import Term
from tokenizers.train.state import AdversaryState, new_state
from tokenizers.train.step import make_step

# float32 sums in another order. Observed: latents 2.1e-6, reconstructions 2.7e-6.
TOLERANCE = 2e-5


def compiled(function):
    """Small programs that run a few times: compiling is what takes the time."""
    return jax.jit(function, compiler_options=platform.run_once_options())


def official_weights(case):
    """The case's weights; those of Flax were drawn in PyTorch's layout."""
    weights = {name: value for name, value in case.weights().items() if not name.startswith("loss.")}
    for name, shape, _ in case.meta["state_dict"]:
        if name.endswith(".kernel"):
            drawn = refweights.weight(name, (shape[-1], shape[-2], *shape[:-2]))
            weights[name] = np.moveaxis(drawn, (0, 1), (-1, -2))
    return weights


@functools.lru_cache(maxsize=2)
def official(name):
    case = Case("magvit2", name)
    return case, tokenizers.from_official("magvit2", case.meta["config"], official_weights(case))


# --- inference -------------------------------------------------------------------------------------------------------

FAST = ("small_lfq_image_nonsquare", "lucidrains_small_firstframe_t5")
# MAGVIT's own networks have pixels in [0, 1]; the cases hold those.
UNIT_RANGE = "magvit1_"


def marked(names):
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(cases("magvit2", "(small|full|lucidrains|magvit1_(small|full))_.*")))
def test_encoding_and_decoding_are_the_authors(name):
    case, tok = official(name)
    expected, pixels = case.outputs, case.input(next(iter(case.meta["inputs"])))
    unit = name.startswith(UNIT_RANGE)
    pixels = 2 * pixels - 1 if unit else pixels

    @compiled
    def run(variables, pixels, indices):
        module = tok.module.bind(variables)
        encoding = module.encode(pixels)
        return module.prequantized(pixels), encoding, module.decode(module.indices_to_latents(indices))

    z, encoding, decoded = run(tok.variables, pixels, expected["indices"])
    assert relative_l2(z, expected["z" if "z" in expected else "prequant"]) < TOLERANCE
    np.testing.assert_array_equal(encoding.indices, expected["indices"])
    if "codebook_entry" in expected:
        np.testing.assert_array_equal(encoding.latents, expected["codebook_entry"])
    decoded = np.asarray((decoded + 1) / 2 if unit else decoded, np.float64)
    assert relative_l2(decoded, expected["recon"]) < TOLERANCE
    if "recon_stats" in expected:
        found = [decoded.mean(), decoded.std(), np.abs(decoded).max(), np.linalg.norm(decoded)]
        np.testing.assert_allclose(found, expected["recon_stats"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", cases("magvit2", FAST[0]))
def test_public_methods_agree_with_the_original(name):
    case, tok = official(name)
    encoding = tok.encode(case.input("x"), strict=True)
    np.testing.assert_array_equal(encoding.indices, case.outputs["indices"])
    assert relative_l2(tok.decode_indices(case.outputs["indices"]), case.outputs["recon"]) < TOLERANCE


@pytest.mark.parametrize("name", marked(cases("magvit2", "(small|lucidrains_small|magvit1_small)_.*")))
def test_weights_go_back_under_their_official_names(name):
    case, tok = official(name)
    expected = official_weights(case)
    if tok.name == "magvit2_pytorch":  # a norm that is never applied
        last = max(int(entry.split(".")[1]) for entry in expected if entry.startswith("encoder_layers."))
        expected = {
            entry: value for entry, value in expected.items() if not entry.startswith(f"encoder_layers.{last}.")
        }
    if tok.name == "magvit":
        expected = {entry.replace(".", "/"): value for entry, value in expected.items()}
    chex.assert_trees_all_equal(tok.export_official(), expected)


def test_checkpoints_are_read_for_their_averages():
    case = Case("magvit2", FAST[0])
    weights = official_weights(case)
    averages = {f"model_ema.{name.replace('.', '')}": 2 * value for name, value in weights.items()}
    counters = {"model_ema.decay": np.float32(0.999), "model_ema.num_updates": np.int32(7)}
    for table in (magvit2, ibq):
        found = table.official_names(weights | averages | counters)
        chex.assert_trees_all_equal(found, {name: 2 * value for name, value in weights.items()})
    assert magvit2.official_names(weights).keys() == weights.keys()


def test_wrong_tensors_are_refused_by_name():
    case = Case("magvit2", FAST[0])
    weights = official_weights(case) | {"loss.discriminator.main.0.bias": np.zeros(64)}
    weights["decoder.adaptive.0.alpha.weight"] = weights.pop("decoder.adaptive.0.gamma.weight")
    with pytest.raises(ValueError, match=r"missing 'decoder.adaptive.0.gamma.weight'(.|\n)*unexpected 'decoder.adapti"):
        tokenizers.from_official("magvit2", case.meta["config"], weights)


# --- sizes and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [  # Published counts, in millions.
        ("open-magvit2-imagenet-256-262144", 49.75, 65.38),
        ("open-magvit2-imagenet-128-262144", 48.42, 63.6),
        pytest.param("open-magvit2-video-128-262144", 144.87, 225.68, marks=pytest.mark.slow),
        pytest.param("ibq-imagenet-16384", 46.75, 59.9, marks=pytest.mark.slow),
    ],
)
def test_released_sizes_are_the_published_ones(name, encoder, decoder):
    params = registry.abstract_variables(registry.build(name))["params"]
    for coder, millions in (("encoder", encoder), ("decoder", decoder)):
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[coder]))
        assert abs(count / 1e6 - millions) < 0.06, coder


@pytest.mark.parametrize("name", cases("magvit2", "full_.*|magvit1_full_.*"))
def test_the_table_of_variants_is_what_the_configs_say(name):
    names = {
        "full_lfq_imagenet256_L": "open-magvit2-imagenet-256-262144",
        "full_lfq_imagenet128_L": "open-magvit2-imagenet-128-262144",
        "full_lfq_video128_t5": "open-magvit2-video-128-262144",
        "full_ibq_16384": "ibq-imagenet-16384",
        "magvit1_full_3dvq_B_ucf101": "magvit-3dvq-b-1024",
    }
    config = Case("magvit2", name).meta["config"]
    system = magvit2.system_of(config)
    fields = tokenizers.convert.system(system).fields_from_official(config)
    assert registry.build(system, **fields) == registry.build(names[name])


NETWORK = {
    "double_z": False, "z_channels": 18, "resolution": 128, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4,
}  # fmt: skip
LFQ_CONFIG = {"ddconfig": NETWORK, "n_embed": 262144, "embed_dim": 18, "use_ema": True}
IBQ_NETWORK = NETWORK | {"z_channels": 256, "resolution": 256, "attn_resolutions": [16], "dropout": 0.0}
IBQ_CONFIG = {
    "ddconfig": IBQ_NETWORK, "n_embed": 16384, "embed_dim": 256, "beta": 0.25, "use_entropy_loss": True,
}  # fmt: skip
VQVAE = {
    "architecture": "3dcnn", "codebook_size": 1024, "filters": 64, "num_enc_res_blocks": 2, "num_dec_res_blocks": 2,
    "channel_multipliers": [1, 2, 2, 4], "temporal_downsample": [True, True, False], "embedding_dim": 256,
    "conv_downsample": False, "deconv_upsample": False, "activation_fn": "swish", "norm_type": "GN",
}  # fmt: skip
LAYERED = {"image_size": 16, "init_dim": 16, "max_dim": 32, "codebook_size": 256, "layers": ["residual"]}


def built(config):
    system = magvit2.system_of(config)
    return registry.build(system, **tokenizers.convert.system(system).fields_from_official(config))


def test_configs_are_read_as_files_or_as_arguments():
    target = "src.Open_MAGVIT2.models.lfqgan.VQModel"
    whole = {"seed_everything": True, "model": {"class_path": target, "init_args": LFQ_CONFIG}, "data": {}}
    assert built(whole) == built(LFQ_CONFIG) == registry.build("open-magvit2-imagenet-256-262144")
    video = {"class_path": target.replace("lfqgan", "video_lfqgan")}
    video["init_args"] = LFQ_CONFIG | {"ddconfig": NETWORK | {"ch_mult": [1, 2, 2, 4]}}
    assert built({"model": video}) == registry.build("open-magvit2-video-128-262144")
    assert built(IBQ_CONFIG) == registry.build("ibq-imagenet-16384")
    # Both are read by nobody: the authors' class replaces the quantizer that would normalise.
    assert built(IBQ_CONFIG | {"l2_normalize": True, "cosine_similarity": True}) == built(IBQ_CONFIG)
    assert built(IBQ_CONFIG | {"use_entropy_loss": False}).bottleneck.entropy is None
    assert built(VQVAE) == built({"vqvae": VQVAE})
    halves = built(LAYERED | {"layers": ["compress_time", ["compress_space", 24], ["compress_time"], "attend_time"]})
    assert halves.spec.compression == (4, 2, 2)
    assert halves.latent_channels == 32


def test_tokens_of_two_factors_are_two_indices():
    case, whole = official(FAST[0])
    config = case.meta["config"] | {"token_factorization": True, "factorized_bits": [4, 8]}
    tok = tokenizers.from_official("magvit2", config, official_weights(case))
    encoding, index = tok.encode(case.input("x")), case.outputs["indices"]
    np.testing.assert_array_equal(encoding.indices, np.stack([index % 16, index // 16], axis=-1))
    np.testing.assert_array_equal(tok.decode_indices(encoding.indices), tok.decode(encoding.latents))
    assert tok.spec.bits_per_token == whole.spec.bits_per_token == 12


def test_normalized_latents_of_magvit_choose_by_direction():
    assert built(VQVAE | {"latent_normalize": True}).bottleneck.distance == "direction"
    assert built(VQVAE | {"latent_normalize": False}).bottleneck.distance == "euclidean"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LFQ_CONFIG | {"ddconfig": NETWORK | {"double_z": True}}, "double_z of ddconfig True"),
        (LFQ_CONFIG | {"ddconfig": NETWORK | {"tanh_out": True}}, "key of ddconfig 'tanh_out'"),
        (LFQ_CONFIG | {"ddconfig": NETWORK | {"out_ch": 1}}, "in_channels=3 and out_ch=1"),
        (LFQ_CONFIG | {"n_embed": 1024}, "n_embed=1024 do not fit"),
        (LFQ_CONFIG | {"num_codebooks": 2}, "key of an Open-MAGVIT2 config 'num_codebooks'"),
        (LFQ_CONFIG | {"token_factorization": True, "factorized_bits": [6, 6]}, r"factorized_bits=\[6, 6\] must be"),
        (IBQ_CONFIG | {"l2_normalise": True}, "key of an IBQ config 'l2_normalise'"),
        (IBQ_CONFIG | {"remap": "used.npy"}, "remap of an IBQ config 'used.npy'"),
        (IBQ_CONFIG | {"code_dim": 3}, "key of an IBQ config 'code_dim'"),
        (VQVAE | {"norm_type": "LN"}, "norm_type of vqvae 'LN'. .*'GN'"),
        (VQVAE | {"temporal_downsample": [True, False]}, "one entry between any two levels"),
        (VQVAE | {"entropy_loss_ratio": 0.1, "entropy_loss_type": "hard"}, "unknown entropy_loss_type 'hard'"),
        (LAYERED | {"layers": ["gateloop_time"]}, "layer of magvit2_pytorch 'gateloop_time'.*attend_time"),
        (LAYERED | {"layers": [["residual", 2]]}, "consecutive_residual alone takes a number"),
        (LAYERED | {"num_codebooks": 2}, "num_codebooks of a VideoTokenizer config 2"),
        (LAYERED | {"codebook_size": 100}, "codebook_size of a VideoTokenizer config 100"),
        (LAYERED | {"kernel": 3}, "key of a VideoTokenizer config 'kernel'"),
        ({"model": {}}, "a magvit2 config has 'ddconfig'"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_configs_of_other_networks_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: built(config).init(jax.random.key(0), np.zeros((1, 5, 16, 16, 3))))


# --- training --------------------------------------------------------------------------------------------------------


def lpips_variables():
    """The cases' LPIPS, which they do not list: drawn by torchvision's names of VGG and those of the linear layers."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    target = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    table = lpips_table.table("vgg")
    shapes = engine.to_official(table, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), dict(target)))
    state = {name: refweights.weight(name, value.shape) for name, value in shapes.items()}
    return engine.to_tree(table, target, state, lpips_table.IGNORE)


# The published configs, and what the cases change of them.
RECIPES = {
    "train_lfq_image": (open_magvit2_imagenet_256, {}),
    # Before its start the authors' discriminator runs without consequences, but for the anchors of LeCam.
    "train_lfq_image_before_disc_start": (open_magvit2_imagenet_256, {"factor": 0.0}),
    "train_lfq_image_adaptive_enlarge": (
        open_magvit2_imagenet_256,
        {"adaptive": True, "weight": 0.8, "discriminator_loss": "vanilla"},
    ),
    "train_lfq_video": (open_magvit2_video_128, {}),
    "train_ibq": (ibq_imagenet_16384, {}),
}


class Training:
    """A training case, as a run of this library's own step from the published config."""

    def __init__(self, name):
        self.case = case = Case("magvit2", name)
        loss = case.meta["config"]["lossconfig"]["params"]
        self.weights = case.weights()
        tok = tokenizers.from_official("magvit2", case.meta["config"], official_weights(case))
        published, changes = RECIPES[name]
        config = published.get_config()
        config.loss.perceptual = None  # its weights are the case's: see below
        config.discriminator.update(changes)
        for optimizer in (config.optimizer, config.discriminator.optimizer):
            optimizer.update({"schedule": "constant", "drops": (), "warmup": 0, "lr": case.meta["training"]["lr"]})
        ratio, steps = loss.get("codebook_enlarge_ratio", 0), loss.get("codebook_enlarge_steps", 1)
        for term in ("entropy_sample", "entropy_codebook") if ratio else ():
            weight = config.loss.bottleneck[term]
            config.schedules.loss[term] = base.schedule(
                kind="linear", start=(1 + ratio) * weight, end=weight, steps=steps
            )
        recipe = build.recipe(config.to_dict())
        assert recipe.adversary.lecam_weight == loss["lecam_loss_weight"]
        lpips = LPIPS()
        term = Term("lpips", 1.0, lambda p, t, frozen: perceptual.lpips_loss(lpips, frozen)(p, t), "lpips")
        self.frozen = {"lpips": lpips_variables()}
        objective = dataclasses.replace(recipe.objective, terms=(*recipe.objective.terms, term), frozen=self.frozen)
        opposing = dataclasses.replace(recipe.adversary, optimizer=remembered(recipe.adversary.optimizer))
        self.recipe = dataclasses.replace(
            recipe,
            model=tok.module,
            objective=objective,
            optimizer=remembered(recipe.optimizer),
            adversary=opposing,
        )
        self.pixels = case.input("x")
        self.pixels = self.pixels if self.pixels.ndim == 5 else self.pixels[:, None]
        self.state = self.start(dict(tok.variables)["params"])

    def start(self, params):
        adversary = self.recipe.adversary
        official_names = self.case.weights("loss.discriminator.")
        self.last = max(int(entry.split(".")[1]) for entry in official_names)
        pixels = self.pixels if self.recipe.model.spec.video else self.pixels[:, 0]
        opponent = from_official(adversary.module, official_names, pixels)
        params = {"model": params, "objective": {}}
        opponent = AdversaryState(
            params=opponent["params"],
            statistics={"batch_stats": opponent["batch_stats"]},
            ema=opponent["params"],
            optimizer=adversary.optimizer.init(opponent["params"]),
            lecam=adversarial.lecam_init(*self.case.meta["training"]["lecam_ema"]),
            balance=adversary.weight.init(np.zeros((), np.float32)),
        )
        state = new_state(params, {}, params["model"], self.recipe.optimizer.init(params), opponent)
        return state.replace(step=np.asarray(self.case.meta["training"]["global_step"], np.int32))

    def step(self):
        step = compiled(make_step(self.recipe.at(int(self.state.step))))
        self.state, metrics = step(self.state, self.frozen, {"pixels": self.pixels})
        return metrics

    def official(self, params, opponent):
        """Our parameters (or gradients) under the authors' names."""
        system = tokenizers.convert.system(magvit2.system_of(self.case.meta["config"]))
        found = engine.to_official(
            tokenizers.convert.rules(system, self.recipe.model), {"params": jax.device_get(params)}
        )
        for name in self.case.weights("loss.discriminator."):
            if name.endswith((".weight", ".bias")):
                entry = np.asarray(official_entry(opponent, name, self.last))
                found[f"loss.discriminator.{name}"] = np.moveaxis(entry, (-1, -2), (0, 1)) if entry.ndim > 1 else entry
        return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cases("magvit2", "train_.*") if name in RECIPES])
def test_a_training_step_is_the_authors(name):
    run = Training(name)
    expected = run.case.outputs
    log = {key.removeprefix("log."): value for key, value in expected.items() if key.startswith("log.")}
    metrics = run.step()
    same_terms(run, {key: float(value) for key, value in metrics.items()}, log)
    lecam = np.stack(run.state.adversary.lecam)
    np.testing.assert_allclose(lecam, expected["after.lecam_ema"], rtol=1e-4, atol=1e-7)

    norms = {"generator": "grad_norm_total_generator", "discriminator": "grad_norm_total_discriminator"}
    for part, key in norms.items():
        np.testing.assert_allclose(metrics[f"grad_norm/{part}"], expected[key], rtol=1e-3, atol=1e-12, err_msg=key)
    state = run.state
    gradients = run.official(state.optimizer[0]["model"], state.adversary.optimizer[0])
    after = run.official(state.params["model"], state.adversary.params)
    averages = run.official(state.ema, state.adversary.ema)
    compared = 0
    for key, value in expected.items():
        kind, _, entry = key.partition(".")
        if kind not in ("grad", "gradnorm", "after", "after_ema") or entry == "lecam_ema":
            continue
        ours = {"grad": gradients, "gradnorm": gradients, "after": after, "after_ema": averages}[kind][entry]
        compared += 1
        if kind == "gradnorm":
            np.testing.assert_allclose(np.linalg.norm(ours), value, rtol=1e-3, atol=1e-12, err_msg=key)
            continue
        ours = ours.ravel()[: value.size].reshape(value.shape)
        # Observed: gradients 1e-4. A step of Adam has the size of the rate whatever that of the gradient.
        assert relative_l2(ours, value) < (1e-3 if kind == "grad" else 1e-4), key
    assert compared > 30


def same_terms(run, metrics, log):
    """Every number that the authors log."""
    nll = metrics["loss/l1"] + metrics["loss/lpips"]
    active = run.recipe.adversary.factor
    weight = active * metrics["adaptive_weight"]
    terms = {
        "reconstruct_loss": metrics["loss/l1"],
        "perceptual_loss": metrics["loss/lpips"],
        "nll_loss": nll,
        "g_loss": weight * metrics["loss/fooling"],
        "total_loss": metrics["loss/generator"] + weight * metrics["loss/fooling"],
        "disc_loss": metrics["loss/discriminator"],
    }
    entropies = metrics["loss/entropy_sample"], metrics["loss/entropy_codebook"]
    if "codebook_quant_loss" in log:  # IBQ
        terms["codebook_quant_loss"] = (
            metrics["loss/index_propagation"] + metrics["loss/commitment"] + 0.25 * metrics["loss/codebook"]
        )
        terms["codebook_sample_entropy_loss"], terms["codebook_avg_entropy_loss"] = entropies
        terms["codebook_entropy_loss"] = entropies[0] - entropies[1]
        terms["unsacled_g_loss"] = metrics["loss/fooling"]
    else:
        terms["per_sample_entropy"], terms["codebook_entropy"] = entropies
        terms["commit_loss"] = metrics["loss/commitment"]
    if "entropy_loss" in log:
        terms["entropy_loss"] = entropies[0] - entropies[1]
    if active:
        terms["logits_real"], terms["logits_fake"] = metrics["logits/real"], metrics["logits/fake"]
        np.testing.assert_allclose(metrics["adaptive_weight"], log["d_weight"], rtol=1e-3)
    for key, value in terms.items():
        # Means of logits cancel.
        np.testing.assert_allclose(value, log[key], rtol=1e-4, atol=1e-5 if "logits" in key else 1e-7, err_msg=key)


LUCIDRAINS = {"commitment": 1.0, "entropy_sample": 0.1, "entropy_codebook": -0.25}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("magvit2", "lucidrains_small_.*"))
def test_losses_and_gradients_are_those_of_the_reconstruction(name):
    case, tok = official(name)
    expected, pixels = case.outputs, case.input("video")

    def loss(params):
        reconstruction, encoding = tok.module.apply({"params": params}, pixels, train=True)
        error = ((reconstruction - pixels) ** 2).mean()
        auxiliary = sum(LUCIDRAINS[term] * value for term, value in encoding.losses.items())
        return error + auxiliary, (error, auxiliary)

    (total, (error, auxiliary)), grads = compiled(jax.value_and_grad(loss, has_aux=True))(tok.params)
    np.testing.assert_allclose(total, expected["total_loss(no gan, no vgg)"], rtol=1e-4)
    np.testing.assert_allclose(error, expected["recon_loss"], rtol=1e-4)
    np.testing.assert_allclose(auxiliary, expected["lfq_aux_loss"], rtol=1e-4)
    grads = engine.to_official(tokenizers.convert.magvit2_pytorch.table_of(tok.module), {"params": grads})
    for key, value in expected.items():
        if key.startswith("grad."):
            ours = grads[key.removeprefix("grad.")]
            assert relative_l2(ours.ravel()[: value.size].reshape(value.shape), value) < 1e-3, key


@pytest.mark.parametrize("name", marked(cases("magvit2", "magvit1_(small|full)_.*")))
def test_losses_of_the_quantizer_are_those_of_magvit(name):
    case, tok = official(name)
    pixels = 2 * case.input("video") - 1
    losses = compiled(lambda v, x: tok.module.apply(v, x, train=True, method="encode").losses)(tok.variables, pixels)
    terms = {
        "e_latent_loss": 0.25 * losses["commitment"],
        "q_latent_loss": losses["codebook"],
        "entropy_loss": 0.1 * (losses["entropy_sample"] - losses["entropy_codebook"]),
    }
    terms["quantizer_loss"] = sum(terms.values())
    for key, value in terms.items():
        np.testing.assert_allclose(value, case.outputs[key], rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", cases("magvit2", "lr_schedule_.*"))
def test_learning_rates_are_those_of_the_original(name):
    case = Case("magvit2", name)
    given = case.meta["training"]
    shared = {"lr": given["peak_lr"], "warmup": given["warmup"], "warmup_from": given["wp0"], "end": given["wpe"]}
    # Theirs reaches its end one step earlier than the run; lin0 stays up for a twentieth of the way.
    steps = given["max_it"] - 1
    kinds = {
        "cos": base.optimizer(schedule="cosine", **shared),
        "lin0": base.optimizer(schedule="linear", flat=round((steps - given["warmup"]) / 20), **shared),
        "constant": base.optimizer(**shared),
    }
    for kind, config in kinds.items():
        rate = optim.schedule(config, steps)
        ours = [rate(step) for step in given["steps"]]
        # float32: the first steps of a warm-up are differences of numbers near the peak.
        np.testing.assert_allclose(ours, case.outputs[f"lr_{kind}"], rtol=1e-4, atol=2e-11, err_msg=kind)
    published = open_magvit2_imagenet_256.get_config("pretrain_16384")
    rate = optim.schedule(published.optimizer, published.steps)
    np.testing.assert_allclose([rate(step) for step in given["steps"]], case.outputs["lr_cos"], rtol=1e-4, atol=2e-11)


def test_learning_rates_of_images_fall_where_the_authors_say():
    for published, epochs in ((open_magvit2_imagenet_256, (200, 250)), (ibq_imagenet_16384, (250, 300))):
        config = published.get_config()
        rate, epoch = optim.schedule(config.optimizer, config.steps), 1_281_167 // 256
        found = [float(rate(epochs[0] * epoch - 1)), float(rate(epochs[0] * epoch + 1)), float(rate(config.steps))]
        np.testing.assert_allclose(found, [1e-4, 1e-5, 1e-6], rtol=1e-5)
        assert float(rate(epochs[1] * epoch + 1)) < 2e-6


@pytest.mark.parametrize("name", cases("magvit2", "inflate_.*"))
def test_an_image_model_becomes_a_video_model(name):
    case = Case("magvit2", name)
    image = case.meta["training"]["image_spec"]["config"]
    fields = magvit2.fields_from_official(image)
    module = registry.build("magvit2", **fields)
    shapes = registry.abstract_variables(module)
    names = engine.to_official(magvit2.TABLE, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))
    state = {entry: refweights.weight(entry, value.shape) for entry, value in names.items()}
    tok = tokenizers.from_official("magvit2", image, state)
    video = registry.build("magvit2", **magvit2.fields_from_official(case.meta["config"]))
    params = inflate(tok.params, registry.abstract_variables(video)["params"])
    found = engine.to_official(magvit2.table_of(video), {"params": params})
    theirs = {entry: tuple(shape) for entry, shape, _ in case.meta["state_dict"]}
    assert {entry: value.shape for entry, value in found.items()} == theirs
    for key, value in case.outputs.items():
        ours = found[key.removeprefix("after.")]
        np.testing.assert_array_equal(ours.ravel()[: value.size], value.ravel(), err_msg=key)


# --- time ------------------------------------------------------------------------------------------------------------


def used(module):
    """A tokenizer whose parameters are all at work."""
    leaves, tree = jax.tree.flatten(registry.abstract_variables(module))
    values = [0.4 * refweights.uniform(f"leaf{i}", leaf.shape) for i, leaf in enumerate(leaves)]
    return Tokenizer(module, jax.tree.unflatten(tree, values), registry_name(module), registry.fields_of(module))


def registry_name(module):
    return next(name for name, file in registry.systems().items() if file.Model is type(module))


TINY = {"channels": 32, "multipliers": (1, 1), "blocks": 1, "time_levels": (0,)}
CODES = {"bottleneck": {"name": "lfq", "bits": 6}, "latent_channels": 6}
LAYERS = ("residual", "compress_space", "compress_time", ("consecutive_residual", 2), "attend_space", "compress_time")


def streaming_models():
    yield registry.build("magvit2", family="video-causal", **TINY, **CODES)
    layered = {"channels": 8, "widest": 8, "latent_channels": 8, "num_heads": 2, "head_dim": 4, "conv_in": (3, 3, 3)}
    codes = {"bottleneck": {"name": "lfq", "bits": 6, "bit_order": "big", "entropy": None}}
    for first_frame in (False, True):
        yield registry.build(
            "magvit2_pytorch", layers=(*LAYERS, "attend_time"), first_frame=first_frame, **layered, **codes
        )


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_streams_are_the_whole_clip(index):
    tok = used(list(streaming_models())[index])
    clip = refweights.image_like("magvit2/clip", (1, 13, 8, 8, 3))
    whole = tok.encode(clip)
    chunks = list(tok.encode_stream([clip[:, :5], clip[:, 5:9], clip[:, 9:]]))
    factor = tok.spec.compression[0]
    np.testing.assert_array_equal(np.concatenate([c.indices for c in chunks], axis=1), whole.indices)
    latents = np.concatenate([c.latents for c in chunks], axis=1)
    np.testing.assert_allclose(latents, whole.latents, atol=1e-5)
    seen = 1 + 4 // factor
    parts = list(tok.decode_stream(np.split(np.asarray(whole.latents), [seen, seen + 4 // factor], axis=1)))
    decoded = tok.decode(whole.latents)
    # Sums over chunks are those over the clip, in another order. Observed 2e-6 of values up to 1.
    np.testing.assert_allclose(np.concatenate(parts, axis=1), decoded, atol=2e-5 * float(np.abs(decoded).max()))
    # A picture is the first frame, and nothing of a frame is seen before it.
    np.testing.assert_array_equal(tok.encode(clip[:, 0]).indices, whole.indices[:, 0])
    later = clip.copy()
    later[:, 5:] *= -1
    changed = tok.encode(later).indices != whole.indices
    assert not changed[:, :seen].any()
    assert changed[:, seen:].any()


def test_released_video_models_are_not_causal_and_say_so():
    names = ("open-magvit2-video-128-262144", "magvit2-video-causal-128-262144")
    released, causal = (registry.build(name) for name in names)
    assert not released.spec.causal
    assert "not causal" in registry.variants()[names[0]][1].note
    assert causal.spec.causal
    with pytest.raises(ValueError, match="cannot stream: it is not causal"):
        list(Tokenizer(released, {}, "magvit2", {}).encode_stream([np.zeros((1, 5, 16, 16, 3), np.float32)]))


@pytest.mark.slow
def test_norms_over_the_clip_look_ahead_and_norms_over_frames_do_not():
    clip = refweights.image_like("magvit2/clip", (1, 9, 8, 8, 3))
    other = clip.copy()
    other[:, 5:] *= -1
    changes = {}
    for family in ("video", "video-causal"):
        tok = used(registry.build("magvit2", family=family, **TINY, **CODES))
        run = compiled(lambda v, x, tok=tok: tok.module.apply(v, x, method="prequantized"))
        a, b = run(tok.variables, clip), run(tok.variables, other)
        changes[family] = float(np.abs(a[:, 0] - b[:, 0]).max())
    assert changes["video"] > 1e-3
    assert changes["video-causal"] == 0
    # Of a clip of one frame the two are one network.
    models = [used(registry.build("magvit2", family=family, **TINY, **CODES)) for family in ("video", "video-causal")]
    one = [compiled(lambda v, x, tok=tok: tok.module.apply(v, x)[0])(tok.variables, clip[:, :1]) for tok in models]
    np.testing.assert_allclose(*one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_inflated_causal_model_starts_as_the_image_model():
    fields = TINY | CODES
    image = used(registry.build("magvit2", family="image", **fields))
    video = registry.build("magvit2", family="video-causal", **fields)
    params = inflate(image.params, registry.abstract_variables(video)["params"])
    clip = refweights.image_like("magvit2/inflated", (1, 1, 8, 8, 3))
    of_image = image.reconstruct(clip[:, 0])
    of_video = Tokenizer(video, {"params": params}, "magvit2", {}).reconstruct(clip)
    np.testing.assert_allclose(of_video[:, 0], of_image, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the image model has"):
        inflate({"encoder": {}}, params)


def test_compute_in_bfloat16_keeps_float32_at_both_ends():
    module = registry.build("magvit2", family="image", dtype="bfloat16", remat=True, **TINY | CODES)
    pixels = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    reconstruction, encoding = jax.eval_shape(module.apply, registry.abstract_variables(module), pixels)
    assert reconstruction.dtype == encoding.latents.dtype == np.float32
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(registry.abstract_variables(module)))


def test_one_latent_position_is_refused():
    module = registry.build("magvit2", **TINY | CODES)
    with pytest.raises(ValueError, match="variance of at least 2 latent positions"):
        jax.eval_shape(module.apply, registry.abstract_variables(module), np.zeros((1, 2, 2, 3), np.float32))
