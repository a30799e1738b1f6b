"""Training steps of VA-VAE and EQ-VAE: `official_training` for cases that give LPIPS, projection and draws apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import official_training
import refweights
from reference import Case, relative_l2

from tokenizers.train.autoencoder import Recipe

# Summation orders differ in float32. Observed on CPU: losses 3e-5, weights 2e-6, norms of gradients below 1e-3.
LOSS, WEIGHT, GRADIENT = 1e-4, 1e-3, 1e-3
# Single gradients: 2e-5 in most cases. In train_vf_mae_64_gan_off_margin0 up to 2.3e-3: one value of the reconstruction
# is 7e-7 below its target in float64 and 3e-8 above it in our float32, where the slope of L1 has the other sign; in
# float64 the step has the authors' gradients to 1e-5. train_pp_style_vanilla: 7e-5 in float64; in float32 3e-5 or 3e-3,
# as the compiler orders sums.
TENSOR = 5e-3
# Parameters; and how much they changed: Adam's first step is the sign of a gradient, however small. Observed: 3e-7; and
# 2e-7, but 0.068 = 2 / sqrt(864) in one case, one sign of 864.
PARAMETER, CHANGE = 1e-4, 1e-1

_TRUNK = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
_TRUNK |= {17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
_LIN = (64, 128, 256, 512, 512)


class TrainingCase(Case):
    """A case of one step; LPIPS is not in its state dict and drawn under torchvision's names."""

    def __init__(self, system, name):
        super().__init__(system, name)
        self.meta["learning_rate"] = self.meta["run"]["lr"]

    def weights(self, prefix=""):
        found = super().weights()
        shapes = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(_LIN)}
        for place, (out, into) in _TRUNK.items():
            shapes |= {f"features.{place}.weight": (out, into, 3, 3), f"features.{place}.bias": (out,)}
        found |= {f"loss.perceptual_loss.{name}": refweights.weight(name, shape) for name, shape in shapes.items()}
        return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}

    def stored(self, key, value):
        """The part of a value that the case keeps."""
        return np.asarray(value)[tuple(slice(*part) for part in self.meta["reduce"].get(key, ()))]


class Training(official_training.Training):
    """One step of such a case.

    Args:
      case, system, table, bottleneck, fresh_forward: as in `official_training`.
      objective: fields of the objective in place of those of latent diffusion.
      own: the objective's parameters besides the log-variance.
      recipe: fields of the recipe.
      foundation: variables of the foundation model.
    """

    def __init__(self, case, system, table, bottleneck, fresh_forward, objective, own, recipe, foundation=None):
        super().__init__(case, system, table, bottleneck, fresh_forward, noise="normal")
        objective = dataclasses.replace(self.recipe.objective, **objective)
        self.recipe: Recipe = dataclasses.replace(self.recipe, objective=objective, **recipe)
        params = {"model": self.state.params["model"], "objective": self.state.params["objective"] | own}
        self.state = self.state.replace(params=params, optimizer=self.recipe.optimizer.init(params))
        self.frozen["foundation"] = foundation

    def gradients(self):
        return super().gradients() | projection(self.state.optimizer[0]["objective"])

    def parameters(self, state):
        model = official_training.to_official(self.table, {"params": state.params["model"]})
        return model | projection(state.params["objective"])


def projection(params):
    """The learned projection in the authors' names and layout."""
    found = params.get("alignment", {})
    names = {"kernel": "linear_proj.weight", "bias": "linear_proj.bias"}
    return {names[key]: v.T[:, :, None, None] if key == "kernel" else np.asarray(v) for key, v in found.items()}


def check_step(training, metrics, kl):
    """Every logged term, gradients on both sides, parameters and their changes; returns the worst of each."""
    case, expected = training.case, training.case.outputs
    worst = {}

    def close(what, tolerance, actual, desired, key):
        desired = np.asarray(desired)
        error = relative_l2(np.reshape(actual, desired.shape), desired)
        worst[what] = max(worst.get(what, 0.0), error)
        assert error < tolerance, (key, error)

    loss = case.meta["config"]["lossconfig"]["params"]
    regularization = training.recipe.objective.bottleneck["kl"] * metrics["loss/kl"]
    aligned = metrics.get("alignment_weight", 0.0) * metrics.get("loss/alignment", 0.0)
    terms = {
        "kl_loss": kl * metrics["loss/kl"],
        "nll_loss": metrics["loss/generator"] - regularization - aligned,
        "disc_loss": metrics["loss/discriminator"],
        "vf_loss": metrics.get("loss/alignment"),
    }
    runs = case.meta["run"]["global_step"] >= loss["disc_start"]
    total = metrics["loss/generator"]
    if runs:
        terms |= {
            "g_loss": metrics["loss/fooling"],
            "logits_real": metrics["logits/real"],
            "logits_fake": metrics["logits/fake"],
        }
        total += metrics["adaptive_weight"] * metrics["loss/fooling"]
        close("weight", WEIGHT, metrics["adaptive_weight"], expected["log:train/d_weight"], "d_weight")
    for key, value in terms.items():
        if f"log:train/{key}" in expected and (value is not None):
            if not np.any(expected[f"log:train/{key}"]):  # the discriminator waits
                assert value == 0, key
                continue
            close("loss", LOSS, value, expected[f"log:train/{key}"], key)
    if "log:train/vf_weight" in expected:
        close("weight", WEIGHT, metrics["alignment_weight"], expected["log:train/vf_weight"], "vf_weight")
        close("loss", LOSS, metrics["loss/alignment_cosine"], expected["vf_cos"], "vf_cos")
        close("loss", LOSS, metrics["loss/alignment_distance"], expected["vf_distmat"], "vf_distmat")
    # The adaptive weights in it are known to 1e-3.
    close("total", WEIGHT, total, expected["log:train/total_loss"], "total_loss")

    gradients = training.gradients()
    for key in (k for k in expected if k.startswith("gradnorm_") and k != "gradnorm_disc"):
        part = [g for name, g in gradients.items() if name.startswith(key.removeprefix("gradnorm_") + ".")]
        close("gradient", GRADIENT, np.sqrt(sum(np.sum(np.square(g)) for g in part)), expected[key], key)
    for key in (k for k in expected if k.startswith("grad:")):
        close("tensor", TENSOR, case.stored(key, gradients[key.removeprefix("grad:")]), expected[key], key)
    before, after = training.parameters(training.before), training.parameters(training.state)
    for name in case.meta["run"]["grad_tensors"]:
        key = f"after:{name}"
        close("parameter", PARAMETER, case.stored(key, after[name]), expected[key], key)
        change = expected[key] - case.stored(key, before[name])
        if np.any(change):
            close("change", CHANGE, case.stored(key, after[name] - before[name]), change, key)
    if runs:
        _check_discriminator(training, close)
    np.testing.assert_array_equal(training.state.params["objective"]["logvar"], expected["log:train/logvar"][0])
    return worst


def _check_discriminator(training, close):
    case, expected, prefix = training.case, training.case.outputs, "loss.discriminator."
    squares = [np.sum(np.square(g)) for g in jax.tree.leaves(training.state.adversary.optimizer[0])]
    close("gradient", GRADIENT, np.sqrt(sum(squares)), expected["gradnorm_disc"], "gradnorm_disc")
    for name in case.meta["run"]["disc_grad_tensors"]:
        gradient = training.discriminator_gradient(name.removeprefix(prefix))
        key = f"grad_disc:{name}"
        close("tensor", TENSOR, case.stored(key, gradient), expected[key], key)
        key, before = f"after:{name}", case.weights()[name]
        after = before + training.discriminator_change(name.removeprefix(prefix))
        close("parameter", PARAMETER, case.stored(key, after), expected[key], key)
    for name in case.meta["run"].get("disc_buffers", ()):
        found = training.running_statistics(name.removeprefix(prefix))
        close("parameter", PARAMETER, found, expected[f"after:{name}"], name)


def run(training, passes=1):
    """The metrics of the case's step; every pass through the generator draws the same noise."""
    noise = jnp.asarray(training.case.input("noise"))
    return training.step(training.case.meta["run"]["global_step"], [noise] * passes)
