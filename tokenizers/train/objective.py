"""What the tokenizer is asked to minimise, put together from ``config.loss``."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import api, errors, loading, registry
from ..losses import alignment, consistency, flow, perceptual, reconstruction, tokens
from ..networks import convnext, foundation, lpips, raft, vgg, weights
from ..types import Spec
from .frames import FRAMES, View, all_frames

Metrics = dict[str, jax.Array]
# (prediction, target, frozen variables) -> scalar
TermFunction = Callable[[jax.Array, jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted part of the reconstruction loss.

    Attributes:
      name: in metrics.
      weight: in the sum.
      function: the part, unweighted.
      network: names the frozen network it reads.
      perceptual: it compares what a network sees in single frames.
    """

    name: str
    weight: float
    function: TermFunction
    network: str = ""
    perceptual: bool = False


def mean_reduction(total: jax.Array, target: jax.Array, params: Mapping) -> jax.Array:
    """The weighted sum of the terms, each a mean over elements."""
    return total


def logvar_reduction(total: jax.Array, target: jax.Array, params: Mapping) -> jax.Array:
    """Gaussian-like likelihood with one learned log-variance, summed over a frame (latent diffusion, VidTok).

    The official code sums ``rec / exp(logvar) + logvar`` over the elements of a frame and averages over frames; with a
    scalar log-variance that is the mean loss times the number of elements.
    """
    elements = target.shape[-3] * target.shape[-2] * target.shape[-1]
    return elements * (total / jnp.exp(params["logvar"]) + params["logvar"])


REDUCTIONS = {"mean": mean_reduction, "logvar": logvar_reduction}


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How latents are brought close to the features of a frozen network (`losses.alignment`).

    Attributes:
      features: ``(pixels (B, H, W, 3) in [-1, 1], frozen variables) -> (B, h, w, F)`` on the grid of the latents.
      weight: of the two losses, next to the reconstruction loss.
      cosine_weight, cosine_margin, distance_weight, distance_margin: of the two losses.
      layer: path of the encoder's last kernel, where gradients of alignment and reconstruction are made equally
        strong before ``weight`` counts; "" takes ``weight`` as it is.
      project: what the learned projection (``params["alignment"]``) brings to the channels of the other: latents,
        features.
      network: names the frozen network that ``features`` reads.
    """

    features: TermFunction
    weight: float
    cosine_weight: float = 1.0
    cosine_margin: float = 0.0
    distance_weight: float = 1.0
    distance_margin: float = 0.0
    layer: str = ""
    project: str = "latents"
    network: str = "foundation"

    def __call__(self, latents, target, frozen, params) -> tuple[jax.Array, Metrics]:
        """Loss, unweighted, of latents ``(N, h, w, D)`` of images ``(..., H, W, 3)``, and its two parts."""
        images = target.reshape(-1, *target.shape[-3:])
        features = jax.lax.stop_gradient(self.features(images, frozen.get(self.network)))
        if self.project == "latents":
            latents = alignment.project(latents, params["alignment"])
        else:
            features = alignment.project(features, params["alignment"])
        parts = {
            "alignment_cosine": alignment.cosine(latents, features, self.cosine_margin),
            "alignment_distance": alignment.distance_matrix(latents, features, self.distance_margin),
        }
        total = self.cosine_weight * parts["alignment_cosine"] + self.distance_weight * parts["alignment_distance"]
        return total, parts


@dataclasses.dataclass(frozen=True)
class Windows:
    """Clips enter the network as overlapping windows that should agree (`losses.consistency`); images as they are.

    Attributes:
      frames: of a window.
      step: frames between the starts of two neighbours.
    """

    frames: int
    step: int

    def cut(self, clip: jax.Array) -> jax.Array:
        """``(B, T, H, W, C)`` -> ``(B * n, frames, H, W, C)``."""
        return clip if clip.shape[1] == 1 else consistency.to_windows(clip, self.frames, self.step)

    def join(self, windows: jax.Array, latents: jax.Array, items: int) -> tuple[jax.Array, Metrics]:
        """The clips ``(items, T, H, W, C)`` of their windows, and how far these disagree on pixels and latents."""
        count = windows.shape[0] // items
        if windows.shape[1] == 1:
            return windows, dict.fromkeys(CONSISTENCY, jnp.zeros((), jnp.float32))
        shift = self.step // (self.frames // latents.shape[1])
        scale = consistency.latent_scale(windows.shape, latents.shape)
        values = (
            consistency.disagreement(windows, count, self.step),
            scale * consistency.disagreement(latents, count, shift),
        )
        return consistency.from_windows(windows, count, self.step), dict(zip(CONSISTENCY, values, strict=True))


CONSISTENCY = ("frame_consistency", "latent_consistency")


def of_pixels(prediction: jax.Array, target: jax.Array, frozen: Mapping) -> Metrics:
    """How good a reconstruction is, next to its loss."""
    return {"psnr": psnr(prediction, target)}


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of the autoencoder without its adversarial part.

    Attributes:
      terms: parts of the reconstruction loss.
      reduction: how their weighted sum becomes the loss.
      bottleneck: weight of every loss term the bottleneck returns.
      frozen: variables of frozen networks by name; an argument of the jitted step, not constants in it.
      params: initial values of the objective's own parameters.
      alignment: of latents with a frozen network, or ``None``.
      windows: in which clips enter the network, or ``None``: whole. Their disagreement counts as a bottleneck's losses.
      method: of the model, which gives what the terms compare and the encoding; by default its call: pixels.
      quality: ``(prediction, target, frozen variables) -> metrics`` that are only shown.
      frames: of a clip, which ones the perceptual terms see, of `frames.FRAMES`.
    """

    terms: tuple[Term, ...]
    reduction: Callable[[jax.Array, jax.Array, Mapping], jax.Array]
    bottleneck: Mapping[str, float]
    frozen: Mapping[str, Any]
    params: Mapping[str, Any]
    alignment: Alignment | None = None
    windows: Windows | None = None
    method: str = "__call__"
    quality: Callable[[jax.Array, jax.Array, Any], Metrics] = of_pixels
    frames: Callable[[jax.Array, tuple[int, ...]], View] = all_frames

    def reconstruction(self, prediction, target, frozen, params, view: View = lambda clips: clips):
        """``(loss, its parts)`` of a reconstruction ``(B, T, H, W, C)`` in [-1, 1] against its target.

        ``view`` gives what perceptual terms see, see `frames`.
        """
        parts = {term.name: self._part(term, prediction, target, frozen, view) for term in self.terms}
        total = sum(term.weight * parts[term.name] for term in self.terms)
        return self.reduction(total, target, params), parts

    def perception(self, prediction, target, frozen, view: View) -> jax.Array:
        """The weighted sum of the perceptual terms alone."""
        terms = [term for term in self.terms if term.perceptual]
        return sum(term.weight * self._part(term, prediction, target, frozen, view) for term in terms)

    def _part(self, term: Term, prediction, target, frozen, view: View) -> jax.Array:
        if term.perceptual:
            prediction, target = view(prediction), view(target)
        return term.function(prediction, target, frozen.get(term.network))

    def regularization(
        self, losses: Mapping[str, jax.Array], scheduled: Mapping[str, jax.Array] | None = None
    ) -> tuple[jax.Array, Metrics]:
        """Weighted sum of the bottleneck's loss terms, and the terms; weights of this step replace constant ones."""
        missing = set(losses) - set(self.bottleneck)
        if missing:
            raise ValueError(
                f"the bottleneck returns the loss terms {sorted(losses)}, but config.loss.bottleneck has no weight for "
                f"{sorted(missing)}; give each one (0.0 switches it off)."
            )
        unused = {name for name, weight in self.bottleneck.items() if weight or name in (scheduled or {})} - set(losses)
        if unused:
            raise ValueError(
                f"config.loss.bottleneck weights {sorted(unused)}, which this bottleneck does not return; "
                f"it returns {sorted(losses)}."
            )
        weights = dict(self.bottleneck) | dict(scheduled or {})
        total = sum((weights[name] * value for name, value in losses.items()), jnp.zeros((), jnp.float32))
        return total, dict(losses)


def build(config: Mapping, spec: Spec | None = None) -> Objective:
    """The objective that ``config.loss`` describes.

    Args:
      config: ``config.loss``.
      spec: of the tokenizer; needed where latents are aligned and where windows of clips should agree.

    Raises:
      ValueError: for unknown names, and for a frozen network whose weight file is missing.
    """
    if config["reconstruction"] == TOKENS:
        return _of_tokens(config)
    pixel = errors.pick(
        "reconstruction loss", config["reconstruction"], {**reconstruction.RECONSTRUCTION, TOKENS: None}
    )
    terms = [Term(config["reconstruction"], config["reconstruction_weight"], lambda p, t, _: pixel(p, t))]
    frozen = {}
    if config["perceptual"] is not None:
        net = errors.pick("perceptual loss", config["perceptual"], {"lpips_vgg": "vgg", "lpips_alex": "alex"})
        distance, frozen["lpips"] = lpips.load(config["perceptual_path"] or None, net)
        terms.append(Term("lpips", config["perceptual_weight"], _with(perceptual.lpips_loss, distance), "lpips", True))
    if config["convnext_weight"]:
        classes, frozen["convnext"] = convnext.load(config["convnext_path"] or None)
        loss = _with(perceptual.convnext_loss, classes)
        terms.append(Term("convnext", config["convnext_weight"], loss, "convnext", True))
    if config["vgg_hidden_weight"]:
        hidden, frozen["vgg_hidden"] = vgg.load_hidden(config["vgg_path"] or None)
        loss = _with(perceptual.hidden_loss, hidden)
        terms.append(Term("vgg_hidden", config["vgg_hidden_weight"], loss, "vgg_hidden", True))
    if config["content_weight"] or config["gram_weight"]:
        features, frozen["vgg"] = vgg.load(config["vgg_path"] or None)
        layers = tuple(config["vgg_layers"])
        if len(layers) != len(perceptual.COSMOS_LAYER_WEIGHTS) or min(layers) < 0 or not any(layers):
            raise ValueError(
                f"config.loss.vgg_layers={layers} must be {len(perceptual.COSMOS_LAYER_WEIGHTS)} numbers of at least "
                "0, not all of them 0."
            )
        for name, loss in (("content", perceptual.content_loss), ("gram", perceptual.gram_loss)):
            weighted = functools.partial(loss, layer_weights=layers)
            terms.append(Term(name, config[f"{name}_weight"], _with(weighted, features), "vgg", True))
    if config["flow_weight"]:
        motion, frozen["raft"] = raft.load(config["flow_path"] or None)
        # Statistics of the batch in its norms, as in the authors' training.
        loss = functools.partial(flow.flow_loss, train=True)
        terms.append(Term("flow", config["flow_weight"], _with(loss, motion), "raft"))
    reduction = errors.pick("loss reduction", config["reduction"], REDUCTIONS)
    params = {"logvar": jnp.asarray(config["logvar"], jnp.float32)} if reduction is logvar_reduction else {}
    aligned = None
    if config["alignment"]["network"] is not None:
        aligned, frozen["foundation"], params["alignment"] = _alignment(config["alignment"], spec)
    windows, weights = _windows(config["consistency"], spec)
    return Objective(
        tuple(terms),
        reduction,
        {**config["bottleneck"], **weights},
        frozen,
        params,
        aligned,
        windows,
        frames=errors.pick("frames of a clip", config["frames"], FRAMES),
    )


# A value of config.loss.reconstruction: not pixels are compared, but guesses of another tokenizer's tokens.
TOKENS = "tokens"
_PIXEL_TERMS = {
    "perceptual": None, "convnext_weight": 0.0, "vgg_hidden_weight": 0.0, "content_weight": 0.0, "gram_weight": 0.0,
    "flow_weight": 0.0, "reduction": "mean",
}  # fmt: skip


def _of_tokens(config: Mapping) -> Objective:
    """Cross entropy of the model's `guess` to the tokens of a frozen tokenizer (TiTok's first stage)."""
    pixel_terms = [name for name, off in _PIXEL_TERMS.items() if config[name] != off]
    if pixel_terms or config["alignment"]["network"] is not None or config["consistency"]["weight"]:
        raise ValueError(
            f"config.loss.reconstruction={TOKENS!r} compares tokens; losses of pixels and latents do not go with it: "
            f"{pixel_terms or ['alignment', 'consistency']}."
        )
    tokenizer = another(config["tokens"], "config.loss.tokens")
    codes = tokenizer.module.spec.codebook_size

    def of(target: jax.Array, variables) -> jax.Array:  # (b t h w c) -> (b t h' w')
        images = target.reshape(-1, *target.shape[2:])
        found = tokenizer.module.apply(variables, images, method="encode").indices
        return jax.lax.stop_gradient(found.reshape(*target.shape[:2], *found.shape[1:]))

    def missed(guess: jax.Array, target: jax.Array, variables) -> jax.Array:
        if guess.shape[-1] != codes:
            raise ValueError(
                f"the tokenizer of config.loss.tokens has {codes} tokens, the model guesses among {guess.shape[-1]}; "
                "config.model.proxy says what that tokenizer is."
            )
        return tokens.cross_entropy(guess, of(target, variables))

    return Objective(
        terms=(Term(TOKENS, config["reconstruction_weight"], missed, TOKENS),),
        reduction=mean_reduction,
        bottleneck=dict(config["bottleneck"]),
        frozen={TOKENS: tokenizer.variables},
        params={},
        method="guess",
        quality=lambda p, t, frozen: {"token_accuracy": tokens.accuracy(p, of(t, frozen[TOKENS]))},
    )


RANDOM = "random"


def another(config: Mapping, where: str) -> api.Tokenizer:
    """A frozen tokenizer beside the one that is trained.

    Args:
      config: ``model`` (its name and fields) and ``path``: its run or saved folder, which know their model themselves,
        or a weight file; "" looks for a published file in ``$TOKENIZERS_WEIGHTS``; "random" has random weights, which
        teach nothing but show that a recipe runs.
      where: the config's name, for errors.
    """
    fields, path = dict(config["model"]), config["path"]
    name = fields.pop("name")
    if path == RANDOM:
        return loading.create(name, **fields)
    system = registry.system_of(name)
    if not path and system not in weights.PUBLISHED:
        raise ValueError(f"{where}.path must say where the weights of {name!r} are; it is empty.")
    path = pathlib.Path(path).expanduser() if path else weights.find(system)
    if loading.knows_its_model(path):
        return loading.load(path)
    return loading.load(weights.find(system, path) if system in weights.PUBLISHED else path, model=name, **fields)


def _windows(config: Mapping, spec: Spec | None) -> tuple[Windows | None, dict[str, float]]:
    if not config["weight"]:
        return None, {}
    if spec is None or not spec.video:
        raise ValueError(f"config.loss.consistency is for tokenizers of video; this one has {spec}.")
    return Windows(config["frames"], config["step"]), dict.fromkeys(CONSISTENCY, config["weight"])


def _alignment(config: Mapping, spec: Spec | None) -> tuple[Alignment, Any, dict[str, np.ndarray]]:
    """``(alignment, frozen variables, projection)``."""
    stride = (1, foundation.STRIDE, foundation.STRIDE)
    if spec is None or spec.video or spec.compression != stride or spec.codebook_size is not None:
        raise ValueError(
            f"config.loss.alignment is for continuous latents of images on the grid of the features, one per "
            f"{foundation.STRIDE}x{foundation.STRIDE} pixels; this tokenizer has {spec}."
        )
    network, variables = foundation.load(config["network"], config["path"] or None)
    sizes = {"latents": (spec.latent_channels, network.width), "features": (network.width, spec.latent_channels)}
    size = errors.pick("alignment projection of", config["project"], sizes)
    # As PyTorch starts a convolution; its bias is there where features are projected.
    rng, bound = np.random.default_rng(0), size[0] ** -0.5
    projection = {"kernel": rng.uniform(-bound, bound, size).astype(np.float32)}
    if config["project"] == "features":
        projection["bias"] = rng.uniform(-bound, bound, size[1:]).astype(np.float32)
    names = ("weight", "cosine_weight", "cosine_margin", "distance_weight", "distance_margin", "layer", "project")
    found = Alignment(lambda images, frozen: network.apply(frozen, images), **{name: config[name] for name in names})
    return found, variables, projection


def _with(loss: Callable, module) -> TermFunction:
    """A perceptual loss of a network whose variables come as an argument."""
    return lambda prediction, target, variables: loss(module, variables)(prediction, target)


def psnr(prediction, target) -> jax.Array:
    """Mean PSNR in dB of the items, values clipped to [-1, 1]."""
    error = jnp.square(jnp.clip(prediction, -1, 1) - target).mean(axis=tuple(range(1, target.ndim)))
    return jnp.mean(10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10)))
