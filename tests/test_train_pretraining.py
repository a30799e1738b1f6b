"""Pre-training of tokenizers that understand: VTP's joint objective against the authors' parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_training import lpips_variables
from reference import Case, cases, relative_l2
from vitok_training import LPIPSWeights

import tokenizers
from configs import base
from tokenizers.losses import perceptual, reconstruction
from tokenizers.models import vtp
from tokenizers.networks.lpips import LPIPS
from tokenizers.nn.heads import PrototypeHead
from tokenizers.train import optim, pretraining
from tokenizers.train.objective import Objective, Term, mean_reduction
from tokenizers.train.state import new_state
from tokenizers.train.views import Crops, Masks


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Relative errors."""

    loss: float
    gradient: float
    after: float


# Observed with the rotation in float32: losses 3e-7, gradients 1.2e-4 (of the layer that latents leave through, whose
# gradient is that of the reconstruction alone), parameters 1.7e-5.
EXACT = Tolerance(2e-6, 5e-4, 1e-4)
# In bfloat16 roundings go the other way here and there; the authors' own outputs move by 2e-3 for an image that
# differs by 1e-6 of itself.
ROUNDED = Tolerance(2e-3, 3e-2, 1e-3)

_SIDES = {"vision_encoder": "vision", "text_encoder": "text", "pixel_decoder": "decoder"}
_RENAMED = {
    "vision_norm_type": "vision_norm_layer",
    "vision_vit_feature_bottleneck": "vision_feature_bottleneck",
    "text_heads": "text_num_heads",
    "text_layers": "text_depth",
}


def published(config):
    """The authors' training config with the names of their ``config.json``."""
    flat = {}
    for part, side in _SIDES.items():
        for key, value in config["vtp_model"][part].items():
            key = f"{side}_{key}"
            flat[_RENAMED.get(key, key)] = value
    for key in ("vision_model_type", "decoder_model_type", "text_norm_kwargs", "text_act_kwargs"):
        flat.pop(key, None)
    flat.pop("text_output_tokens", None)  # what a method returns besides
    kept = ("train_clip", "train_reconstruction", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
    return flat | {key: config["training"][key] for key in kept}


def head_params(weights):
    dense = {f"mlp.{2 * i}": f"hidden_{i}" for i in range(3)}
    params = {
        ours: {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]} for name, ours in dense.items()
    }
    return params | {
        "prototypes": weights["last_layer.weight_v"].T,
        "prototype_norms": weights["last_layer.weight_g"][:, 0],
    }


class Joint:
    """A case of the joint objective as a recipe, its state and its views."""

    def __init__(self, name):
        self.case = case = Case("vtp", name)
        run, config = case.meta["run"], case.meta["config"]
        weights = case.weights()
        official = published(config)
        rotation = {"fp32": "float32", "bf16": "bfloat16"}[run["rope_dtype"]]

        def model(weights):
            tok = tokenizers.from_official("vtp", official, weights)
            return tok.module.clone(rotation=rotation), tok.params

        self.module, student = model(weights)
        of_teacher = {k.removeprefix("teacher_"): v for k, v in weights.items() if k.startswith("teacher_")}
        _, taught = model(weights | of_teacher)
        head = config["vtp_model"]["dino_head"]
        of_head = lambda prefix: head_params(case.weights(prefix + "dino_head."))  # noqa: E731
        params = {"model": student, "objective": {"head": of_head("")}}
        weight, given = run["weights"], run["optimizer"]
        loss = Objective(
            terms=(
                Term("l1", 1.0, lambda p, t, _: reconstruction.l1_imagenet(p, t)),
                Term("lpips", 1.0, lambda p, t, v: perceptual.lpips_loss(LPIPS(), v)(p, t), "lpips"),
            ),
            reduction=mean_reduction,
            bottleneck={},
            frozen={},
            params={},
        )
        adamw = {"name": "adamw", "lr": given["lr"], "b1": given["betas"][0], "b2": given["betas"][1]}
        adamw |= {"eps": given["eps"], "weight_decay": given["weight_decay"], "decay": "all", "clip": 0.0}
        optimizer, rate = optim.make(base.optimizer(**adamw).to_dict(), 1)
        count = case.meta["inputs"]["global_crops"]["shape"][0] // 2
        self.count = count
        self.tolerance = EXACT if rotation == "float32" else ROUNDED
        self.recipe = pretraining.Recipe(
            model=self.module,
            objective=loss,
            optimizer=optimizer,
            learning_rate=rate,
            contrast=pretraining.Contrast(weight["clip"], run["clip_loss"], scales=(1e-9, 1e9)),
            reconstruction=pretraining.Reconstruction(weight["rec"]),
            distillation=pretraining.Distillation(
                whole=Crops(2, 64, (0.3, 1.0)),
                parts=Crops(run["n_local_crops"], 32, (0.05, 0.3)),
                masks=Upper((4, 4), 2 * count, limit=run["upperbound"]),
                head=PrototypeHead(head["out_dim"], head["hidden_dim"], head["bottleneck_dim"], head["nlayers"]),
                teacher_temperature=lambda step: jnp.float32(run["teacher_temp"]),
                momentum=lambda step: jnp.float32(run["ema_momentum"]),
                weight=weight["ssl"],
                koleo=weight["koleo"],
            ),
            seed=0,
            ema_decay=0.0,
            ema_warmup=False,
        )
        state = self.recipe.settled(new_state(params, {}, student, optimizer.init(params), None))
        teacher = {"model": {name: taught[name] for name in state.teacher["model"]}, "head": of_head("teacher_")}
        self.state = state.replace(teacher=state.teacher | teacher)
        self.networks = {"lpips": lpips_variables(LPIPSWeights())}

    def views(self):
        case = self.case

        def pixels(key):
            return ((case.input(key) * vtp.STD + vtp.MEAN) * 2 - 1).astype(np.float32)

        def by_image(x):  # theirs: view after view
            return np.moveaxis(x.reshape(-1, self.count, *x.shape[1:]), 0, 1)

        masks = by_image(case.input("masks").astype(bool))
        return pretraining.Views(
            images=pixels("clip_image"),
            texts=case.input("clip_text").astype(np.int32),
            reconstructed=pixels("rec_image"),
            whole=by_image(pixels("global_crops")),
            parts=by_image(pixels("local_crops")),
            masks=masks.reshape(-1, masks.shape[-1]),
        )


@dataclasses.dataclass(frozen=True)
class Upper(Masks):
    """Masks that are given, in a buffer of a given size."""

    limit: int = 0

    @property
    def most(self):
        return self.limit


def official_names(params, module):
    """Parameters (or gradients) of model and head as the authors' training code calls and stores them."""
    found = tokenizers.Tokenizer(module, {"params": params["model"]}, "vtp", {}).export_official()
    found["proj.weight"] = found.pop("visual_proj.weight")
    found["dino_head.mlp.0.weight"] = np.asarray(params["head"]["hidden_0"]["kernel"]).T
    found["dino_head.last_layer.weight_g"] = np.asarray(params["head"]["prototype_norms"])[:, None]
    return found


NAMES = [
    pytest.param(name, marks=[] if name.endswith("small_rope32") else pytest.mark.slow)
    for name in cases("vtp", "train_joint.*")
]


@pytest.mark.parametrize("name", NAMES)
def test_the_joint_objective_is_the_authors(name):
    """Losses, gradients, and what one step makes of student and teacher."""
    joint = Joint(name)
    recipe, case, key = joint.recipe, joint.case, jax.random.key(0)

    @jax.jit
    def run(state, networks, views):
        inputs = (state.params, state.teacher, networks, views, state.step, key)
        grads, (metrics, _) = jax.grad(recipe.loss, has_aux=True)(*inputs)
        return metrics, grads, recipe.learn(state, networks, views, key)[0]

    metrics, grads, new = run(joint.state, joint.networks, joint.views())
    for theirs in ("clip", "dino_local", "dino_global", "ibot", "koleo", "l1", "lpips", "total"):
        ours = {"clip": "contrast", "total": "generator"}.get(theirs, theirs)
        assert relative_l2(metrics[f"loss/{ours}"].reshape(1), case.outputs[f"loss_{theirs}"]) < joint.tolerance.loss
    module = joint.module

    def flat(params):
        return {"model": params["model"], "head": params["objective"]["head"]}

    found = {f"grad:{key}": value for key, value in official_names(flat(grads), module).items()}
    found |= {f"after:{key}": value for key, value in official_names(flat(new.params), module).items()}
    teacher = {"model": new.params["model"] | new.teacher["model"], "head": new.teacher["head"]}
    found |= {f"after:teacher_{key}": value for key, value in official_names(teacher, module).items()}
    compared = [key for key in case.outputs if key.startswith(("grad:", "after:")) and not key.endswith("__stats")]
    assert len(compared) > 25
    for key in compared:
        kept = case.meta["reduce"].get(key)
        value = found[key] if kept is None else found[key][tuple(slice(*entry) for entry in kept)]
        error = relative_l2(value.reshape(case.outputs[key].shape), case.outputs[key])
        assert error < (joint.tolerance.gradient if key.startswith("grad") else joint.tolerance.after), (key, error)
