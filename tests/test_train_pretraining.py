"""Pre-training of tokenizers that understand: VTP's joint objective against the authors' parts."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from official_training import lpips_variables
from reference import Case, cases, relative_l2
from vitok_training import LPIPSWeights

import tokenizers
from configs import base, vtp_large, vtp_stage2
from tokenizers.losses import perceptual, reconstruction
from tokenizers.models import vtp
from tokenizers.networks.lpips import LPIPS
from tokenizers.nn.heads import PrototypeHead
from tokenizers.parallel import mesh as meshes
from tokenizers.parallel.mesh import make_mesh
from tokenizers.train import build, loop, optim, pretraining
from tokenizers.train.config import flatten, to_dict
from tokenizers.train.objective import Objective, Term, mean_reduction
from tokenizers.train.state import new_state
from tokenizers.train.step import make_step
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


# What holds without the originals ------------------------------------------------------------------------------------


def tiny(**changes):
    config = vtp_large.get_config("smoke")
    tower = (("width", 16), ("layers", 1), ("heads", 2), ("context", 12), ("features", 16))
    config.model.update({"encoder": (32, 1, 2), "decoder": (32, 1, 2), "latent_channels": 8, "text_tower": tower})
    config.pretraining.distillation.head.update({"prototypes": 32, "hidden": 16, "bottleneck": 8})
    config.data.streams.pairs.update({"resolutions": ((32, 32),)})
    config.pretraining.distillation.whole.size = config.pretraining.distillation.parts.size = 32
    config.update_from_flattened_dict(changes)
    return config


def trained(config, steps=2, **mesh):
    """(state, metrics of every step) of a few steps on drawn shapes."""
    config = to_dict(config)
    mesh = make_mesh(**(mesh or {"devices": jax.devices()[:1]}))
    data = build.data(config, 0, 1)
    with jax.set_mesh(mesh):
        recipe = build.recipe(config)
        state, curve = build.initial_state(config, recipe, mesh), []
        step = jax.jit(make_step(recipe), out_shardings=build.out_shardings(state, mesh))
        with data.batches() as batches:
            for _, batch in zip(range(steps), batches, strict=False):
                inputs = {name: meshes.global_batch(mesh, array) for name, array in recipe.inputs(batch).items()}
                state, metrics = step(state, {}, inputs)
                curve.append(jax.device_get(metrics))
    return jax.device_get(state), curve


@pytest.mark.slow
def test_eight_devices_do_what_one_does():
    config = tiny(**{"mesh.smallest": 256})
    alone, curve = trained(config)
    spread, other = trained(config, data=2, fsdp=4)
    for mine, theirs in zip(curve, other, strict=True):
        chex.assert_trees_all_close(mine, theirs, rtol=1e-4)
    # Adam divides by the size of a gradient: where that is nearly nothing, so is what two sums have in common.
    chex.assert_trees_all_close(alone.teacher, spread.teacher, atol=1e-5)
    assert {"loss/contrast", "loss/ibot", "loss/dino_local", "loss/dino_global", "loss/l1_imagenet"} <= curve[0].keys()


def test_images_that_are_not_finite_change_nothing_but_counters():
    """Neither does the teacher follow, nor do its centers move."""
    config = to_dict(tiny(**{"pretraining.distillation.targets": "centering"}))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        recipe = build.recipe(config)
        first = jax.jit(recipe.initialize)()
        inputs = {name: jnp.zeros(a.shape, a.dtype) for name, a in recipe.inputs_of((16, 1, 32, 32, 3)).items()}
        inputs["pixels"] = jnp.full((16, 1, 32, 32, 3), jnp.nan)
        state, metrics = jax.jit(make_step(recipe))(first, {}, inputs)
    assert not np.isfinite(metrics["loss/generator"])
    assert (int(state.step), int(state.skipped)) == (1, 1)
    tiny_run.only_counters_differ(state, first)


def moved(config):
    """Names of the parts of the model that one step changes, and the metrics of the step."""
    recipe = build.recipe(to_dict(config))
    first = jax.jit(recipe.initialize)()
    state, curve = trained(config, steps=1)
    names = state.params["model"].keys()
    return {name for name in names if not _same(first.params["model"][name], state.params["model"][name])}, curve[0]


def _same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


OFF = {
    "contrast": {"pretraining.contrast.weight": 0.0, "model.clip": False},
    "reconstruction": {"pretraining.reconstruction.weight": 0.0},
    "distillation": {"pretraining.distillation.weight": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("alone", OFF)
def test_each_objective_can_be_left_out(alone):
    """And trains the parts that it is about."""
    changes = {key: value for name, part in OFF.items() if name != alone for key, value in part.items()}
    config = tiny(**changes, **{"optimizer.weight_decay": 0.0, "optimizer.warmup": 0})
    parts, metrics = moved(config)
    encoder = {"trunk", "trunk_norm"}
    expected = {
        "contrast": encoder | {"visual_proj", "text_transformer", "logit_scale"},
        "reconstruction": encoder | {"feature_bottleneck", "pixel_decoder"},
        "distillation": encoder,
    }
    assert parts == expected[alone]
    assert ("psnr" in metrics) == (alone == "reconstruction")
    assert ("loss/ibot" in metrics) == (alone == "distillation")


@pytest.mark.slow
def test_centering_moves_its_centers_and_prototypes_wait():
    changes = {f"pretraining.distillation.{name}": value for name, value in (("targets", "centering"), ("frozen", 1))}
    config = tiny(**changes, **{"optimizer.weight_decay": 0.0, "optimizer.warmup": 0})
    recipe = build.recipe(to_dict(config))
    first = jax.jit(recipe.initialize)().params["objective"]["head"]["prototypes"]
    state, _ = trained(config, steps=1)
    np.testing.assert_array_equal(state.params["objective"]["head"]["prototypes"], first)
    assert all(np.any(center != 0) for center in state.teacher["centers"].values())
    state, _ = trained(config, steps=2)
    assert np.any(state.params["objective"]["head"]["prototypes"] != first)


@pytest.mark.slow
def test_a_run_goes_on_with_its_teacher(tmp_path):
    """Bit for bit: a run that was asked to stop half way against one that was not."""
    config = tiny(**{"evaluation.final_report": False})
    loop.run(config, tmp_path / "whole")
    half = tiny(**{"evaluation.final_report": False, "steps": 2})
    for name in ("pretraining.distillation.momentum.steps", "optimizer.schedule"):
        half.update_from_flattened_dict({name: dict(_flat(config))[name]})
    loop.run(half, tmp_path / "parts")
    loop.run(config, tmp_path / "parts")
    whole, parts = (tokenizers.load(tmp_path / name).params for name in ("whole", "parts"))
    chex.assert_trees_all_equal(whole, parts)


def _flat(config):
    return flatten(config.to_dict()).items()


REFUSED = {
    "contrast.weight=0 leaves the text tower untrained": {"pretraining.contrast.weight": 0.0},
    "loss='siglip' needs config.model.clip_bias": {"pretraining.contrast.loss": "siglip"},
    "Did you mean 'sinkhorn'": {"pretraining.distillation.targets": "sinkhorm"},
    "gives no objective a weight": {key: value for part in OFF.values() for key, value in part.items()},
    "batch_size=16 is no multiple": {"pretraining.reconstruction.every": 3},
    "must divide the 16 whole views": {"pretraining.distillation.masks.group": 12},
    "parts.size=24 is no multiple of 16": {"pretraining.distillation.parts.size": 24},
    "config.accumulate=2 is not read by recipe 'pretraining'": {"accumulate": 2},
    "config.discriminator.name='patchgan_2d' is not read": {"discriminator.name": "patchgan_2d"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build.recipe(to_dict(tiny(**REFUSED[message])))


def test_contrast_needs_captions():
    recipe = build.recipe(to_dict(tiny()))
    with pytest.raises(ValueError, match="needs captions: set config.data.source"):
        recipe.inputs({"pixels": np.zeros((16, 1, 32, 32, 3), np.uint8)})


@pytest.mark.slow
def test_the_second_stage_leaves_what_is_understood_alone(tmp_path):
    """To the last bit, while the decoder learns against a discriminator."""
    first = tiny(**{"evaluation.final_report": False, "steps": 2})
    loop.run(first, tmp_path / "first")
    config = vtp_stage2.get_config("smoke")
    config.model.update(first.model)
    config.data = first.data
    config.init_from = str(tmp_path / "first")
    config.update_from_flattened_dict({"steps": 3, "evaluation.final_report": False})
    loop.run(config, tmp_path / "second")
    one, two = (tokenizers.load(tmp_path / name) for name in ("first", "second"))
    moved = {name for name in one.params if not _same(one.params[name], two.params[name])}
    assert moved == {"pixel_decoder"}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(one.encode(pixels).latents, two.encode(pixels).latents)
    np.testing.assert_array_equal(one.image_embedding(pixels), two.image_embedding(pixels))
