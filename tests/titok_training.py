"""TiTok's training cases through this repository's step: the authors' losses, gradients and updates."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from official_training import drawn, remembered
from reference import relative_l2
from test_discriminators_blur import TABLE as JUDGE_TABLE
from test_discriminators_blur import variables_of
from test_networks_convnext import frozen_convnext, frozen_lpips, module_weights, stored

import tokenizers
from configs import base
from tokenizers.convert import engine
from tokenizers.convert import titok as conversion
from tokenizers.convert.engine import to_official
from tokenizers.discriminators import blur
from tokenizers.losses import adversarial, balance, perceptual, reconstruction
from tokenizers.networks.convnext import ConvNeXt
from tokenizers.networks.lpips import LPIPS
from tokenizers.train import optim
from tokenizers.train.adversary import Adversary
from tokenizers.train.autoencoder import Recipe
from tokenizers.train.objective import Objective, Term, mean_reduction
from tokenizers.train.state import AdversaryState, new_state
from tokenizers.train.step import make_step

UNDECAYED = {
    "encode_tokens/patches/kernel": "encoder.patch_embed.weight",
    "decode_tokens/embed/kernel": "decoder.decoder_embed.weight",
}
PERCEPTUAL = {
    "convnext_s": {"convnext": 1.0},
    "lpips-convnext_s-1.0-0.1": {"lpips": 1.0 / 1.1, "convnext": 0.1 / 1.1},
}


def optimizer(meta, frozen=(), trained=None):
    """The recipe's, at the constant learning rate of the cases."""
    options = meta["config"]["optimizer"]["params"]
    undecayed = tuple(ours for ours, theirs in UNDECAYED.items() if trained is None or theirs in trained)
    config = base.optimizer(
        name="adamw",
        lr=options["learning_rate"],
        b1=options["beta1"],
        b2=options["beta2"],
        weight_decay=options["weight_decay"],
        clip=meta["params"]["max_grad_norm"],
        undecayed=undecayed if trained is not None else (),
        frozen=frozen,
    )
    return optim.make(config, 1)[0]


class Given(nn.Module):
    """In the place of CLIP: the features of a case, by their number."""

    def __call__(self, numbers):
        return self.get_variable("features", "all")[numbers]


class Training:
    """A run of a training case with pixels; one program, for the step at which the discriminator starts."""

    def __init__(self, case):
        self.case, meta = case, case.meta
        losses, model = meta["config"]["losses"], meta["config"]["model"]["vq_model"]
        tok = tokenizers.from_official("titok", meta["config"], case.weights())
        self.start = losses["discriminator_start"]
        self.pixels = jnp.asarray(case.input("image"))[:, None]  # theirs are in [0, 1], ours in [-1, 1]
        self.text = case.input("text") * np.float32(3**0.5) if "text" in meta["inputs"] else None
        self.noise = (case.input("noise") * np.float32(3**0.5),) if "noise" in meta["inputs"] else ()
        module, model_state = tok.module, {}
        if model.get("clustering_vq"):
            module = module.clone(bottleneck=module.bottleneck.clone(learning="clustering"))
            shapes = jax.eval_shape(module.init, jax.random.key(0), self.pixels[:, 0])["codebook"]
            model_state = {"codebook": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)}
        self.module = module
        # Squares of differences in [0, 1] are a quarter of those in [-1, 1].
        terms = [Term("l2", 0.25 * losses["reconstruction_weight"], lambda p, t, _: reconstruction.l2(p, t))]
        makers = {
            "lpips": (LPIPS(), perceptual.lpips_loss, frozen_lpips),
            "convnext": (ConvNeXt(), perceptual.convnext_loss, frozen_convnext),
        }
        self.frozen = {}
        for name, share in PERCEPTUAL[losses["perceptual_loss"]].items():
            network, loss, load = makers[name]
            self.frozen[name] = load(case)
            apply = functools.partial(lambda p, t, v, loss, network: loss(network, v)(p, t), loss=loss, network=network)
            terms.append(Term(name, share * losses["perceptual_weight"], apply, name))
        if model.get("quantize_mode") == "vae":
            bottleneck = {"kl": losses["kl_weight"]}
        else:
            weight = losses["quantizer_weight"]
            bottleneck = {"commitment": weight * model["commitment_cost"], "codebook": weight}
        frozen = (r"^model/encode_tokens/", r"^model/bottleneck/") if model["finetune_decoder"] else ()
        judge = blur.maskbit_2d()
        variables = variables_of(judge, self.judge_weights(), self.pixels[:, 0].shape)
        self.recipe = Recipe(
            model=module,
            objective=Objective(tuple(terms), mean_reduction, bottleneck, {}, {}),
            optimizer=remembered(optimizer(meta, frozen, set(meta["trainable"]))),
            learning_rate=optax.constant_schedule(1e-4),
            adversary=Adversary(
                module=judge,
                generator_loss=adversarial.GENERATOR["hinge"],
                discriminator_loss=adversarial.DISCRIMINATOR["hinge"],
                optimizer=remembered(optimizer(meta)),
                weight=balance.constant_weight(losses["discriminator_weight"]),
                factor=losses["discriminator_factor"],
                start=self.start,
                generator_start=self.start,
                lecam_weight=losses["lecam_regularization_weight"],
                lecam_decay=0.999,
                feature_matching_weight=0.0,
                r1_weight=0.0,
                r1_every=16,
                ema_decay=0.0,
                fresh_forward=False,
                lecam=adversarial.lecam_of_means,
            ),
            seed=0,
            ema_decay=0.999,
            ema_warmup=False,
            accumulate=1,
            frozen=frozen,
            captions=None if self.text is None else Given(),
        ).at(self.start)
        if self.text is not None:
            self.frozen["captions"] = {"features": {"all": jnp.asarray(self.text)}}
        params = {"model": tok.params, "objective": {}}
        adversary = AdversaryState(
            params=variables["params"],
            statistics={},
            ema=None,
            optimizer=self.recipe.adversary.optimizer.init(variables["params"]),
            lecam=adversarial.lecam_init(),
            balance=self.recipe.adversary.weight.init(self.pixels),
        )
        optimizer_state = self.recipe.optimizer.init(params)
        state = new_state(params, model_state, tok.params, optimizer_state, adversary)
        self.state = state.replace(step=jnp.int32(self.start))
        self.program = jax.jit(self._step)

    def judge_weights(self):
        entry = self.case.meta["modules"]["discriminator"]
        weights = module_weights(self.case, "discriminator")
        return {name: value for name, value in weights.items() if name not in entry["buffers_computed"]}

    def _step(self, state, frozen, pixels):
        inputs = {"pixels": pixels, "texts": jnp.arange(pixels.shape[0])}
        with drawn("normal" if self.noise else None, self.noise):
            return make_step(self.recipe)(state, frozen, inputs)

    def step(self):
        """(state before, state after, metrics)."""
        before = self.state
        self.state, metrics = self.program(before, self.frozen, self.pixels)
        return before, self.state, jax.device_get(metrics)


def official(tree):
    """Parameters of the generator under the authors' names."""
    return to_official(conversion.TABLE, {"params": jax.device_get(tree)})


def official_judge(tree):
    return {
        f"discriminator.{name}": value
        for name, value in to_official(JUDGE_TABLE, {"params": jax.device_get(tree)}).items()
    }


def names(params):
    """The authors' names of each of our parameters, by its path: one, or one for every layer."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {"params": params})
    found = {}
    for path, name in engine.official_names(conversion.TABLE, engine.per_layer(engine.flatten(shapes))).items():
        head, layers, tail = path.partition(f"/{engine.LAYERS}/")
        found.setdefault(head + layers + tail.partition("/")[2], []).append(name)
    return found


def official_decay(training):
    """Names of the authors' parameters that weight decay leaves alone, as our optimizer has it."""
    params = training.state.params["model"]
    mask = engine.flatten({"params": optim._decayed("kernels", tuple(UNDECAYED))(params)})
    return {name for path, found in names(params).items() if not mask[path] for name in found}


def worst(case, prefix, values, names):
    """Largest relative error of stored entries ``{prefix}:{name}``."""
    found = {}
    for name in names:
        key = f"{prefix}:{name}"
        found[name] = relative_l2(stored(case, key, values[name]), case.outputs[key])
    return found


def close_steps(case, prefix, values, names, rate):
    """Share of the entries of each parameter that are where the authors' are, up to 5 % of a step."""
    found = {}
    for name in names:
        key = f"{prefix}:{name}"
        found[name] = float(np.mean(np.abs(stored(case, key, values[name]) - case.outputs[key]) < 0.05 * rate))
    return found
