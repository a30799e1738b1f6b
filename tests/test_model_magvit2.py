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
from tokenizers.convert import engine, ibq, magvit2
from tokenizers.convert import lpips as lpips_table
from tokenizers.losses import adversarial, perceptual
from tokenizers.networks.lpips import LPIPS
from tokenizers.parallel import platform
from tokenizers.train import build
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
IBQ_CONFIG = {"ddconfig": IBQ_NETWORK, "n_embed": 16384, "embed_dim": 256, "beta": 0.25}
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LFQ_CONFIG | {"ddconfig": NETWORK | {"double_z": True}}, "double_z of ddconfig True"),
        (LFQ_CONFIG | {"ddconfig": NETWORK | {"tanh_out": True}}, "key of ddconfig 'tanh_out'"),
        (LFQ_CONFIG | {"ddconfig": NETWORK | {"out_ch": 1}}, "in_channels=3 and out_ch=1"),
        (LFQ_CONFIG | {"n_embed": 1024}, "n_embed=1024 do not fit"),
        (LFQ_CONFIG | {"num_codebooks": 2}, "key of an Open-MAGVIT2 config 'num_codebooks'"),
        (LFQ_CONFIG | {"token_factorization": True, "factorized_bits": [6, 6]}, r"factorized_bits=\[6, 6\] must be"),
        (IBQ_CONFIG | {"l2_normalize": True}, "l2_normalize of an IBQ config True"),
        (IBQ_CONFIG | {"code_dim": 3}, "key of an IBQ config 'code_dim'"),
        (VQVAE | {"norm_type": "LN"}, "norm_type of vqvae 'LN'. .*'GN'"),
        (VQVAE | {"latent_normalize": True}, "latent_normalize of vqvae True"),
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
        self.state, metrics = step(self.state, self.frozen, self.pixels)
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
