"""The recipe of a tokenizer that understands: reconstruction, self-distillation and image-text contrast together.

VTP (https://arxiv.org/abs/2512.13687, section 3): one ViT is trained by three losses at once,
``w_rec (L1 + LPIPS) + w_ssl (iBOT + DINO) + w_clip CLIP``. A batch is of image-text pairs. All of them meet the texts,
every so-manieth is reconstructed, every so-manieth is cropped into views of which the student sees parts and guesses
what the teacher, its moving average, makes of the whole (DINOv2, https://arxiv.org/abs/2304.07193).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from .. import captions, registry
from .. import pixels as pixel_values
from ..losses import contrastive, distillation
from ..nn.heads import PrototypeHead
from ..parallel.constrain import constrain, whole
from . import optim
from .objective import Metrics, Objective, psnr
from .state import TrainState, new_state
from .step import OfPixels
from .views import Crops, Masks

Array = jax.Array

# What the teacher has of its own; the rest of the model it does not use.
TAUGHT = ("trunk", "trunk_norm", "feature_bottleneck", "visual_proj")


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Images against texts.

    Attributes:
      weight: of the loss; 0 leaves it out, and its passes with it.
      loss: ``clip`` or ``siglip``.
      drop: rate of stochastic depth in the images' pass.
      scales: the factor of the similarities stays between these two, after every step.
    """

    weight: float = 1.0
    loss: str = "clip"
    drop: float = 0.0
    scales: tuple[float, float] = (1.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Pixels from latents; which losses is the objective's matter.

    Attributes:
      weight: of the loss; 0 leaves it out.
      every: one image of so many takes part.
      drop: rate of stochastic depth in the encoder.
    """

    weight: float = 0.1
    every: int = 8
    drop: float = 0.0


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The student's views against the teacher's.

    Attributes:
      whole, parts: views that the teacher sees as well, two of each image, and those that only the student sees.
      masks: of the student's whole views, for iBOT.
      head: on class tokens and patches alike.
      teacher_temperature, momentum: by the step.
      weight: of the losses; 0 leaves them out.
      every: one image of so many takes part.
      targets: how the teacher's logits become targets: ``sinkhorn`` or ``centering``.
      student_temperature: of the student's logits.
      koleo: weight of KoLeo beside the two losses.
      frozen: steps in which the prototypes stay as they are.
      drop: rate of stochastic depth in the student.
    """

    whole: Crops
    parts: Crops
    masks: Masks
    head: PrototypeHead
    teacher_temperature: optax.Schedule
    momentum: optax.Schedule
    weight: float = 1.0
    every: int = 4
    targets: str = "sinkhorn"
    student_temperature: float = 0.1
    koleo: float = 0.0
    frozen: int = 0
    drop: float = 0.0


@struct.dataclass
class Views:
    """What the losses see of a batch of B images; pixels in [-1, 1].

    Attributes:
      images: ``(B, H, W, 3)``.
      texts: token ids ``(B, L)``.
      reconstructed: ``(B / every, H, W, 3)``.
      whole: ``(n, 2, h, w, 3)``, n = B / every.
      parts: ``(n, count, h', w', 3)``.
      masks: bool ``(2 n, patches)``, of ``whole`` image by image.
    """

    images: Array
    texts: Array
    reconstructed: Array
    whole: Array
    parts: Array
    masks: Array


@dataclasses.dataclass(frozen=True)
class Recipe(OfPixels):
    """All that a step needs to know, see `step.Trainable`."""

    model: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    contrast: Contrast
    reconstruction: Reconstruction
    distillation: Distillation
    seed: int
    ema_decay: float
    ema_warmup: bool
    accumulate: int = 1
    program: str = ""

    @property
    def networks(self) -> Mapping[str, Any]:
        return self.objective.frozen

    def at(self, step: int) -> Recipe:
        return self

    def told(self) -> list[str]:
        return []

    def summary(self) -> list[str]:
        found = self.distillation
        parts = {
            f"{self.contrast.loss}, all images": self.contrast.weight,
            f"reconstruction, 1 image of {self.reconstruction.every}": self.reconstruction.weight,
            f"self-distillation, 1 image of {found.every}, in 2 views of {found.whole.size} pixels and "
            f"{found.parts.count} of {found.parts.size}": found.weight,
        }
        return ["objectives: " + "; ".join(f"{weight:g} x {name}" for name, weight in parts.items() if weight)]

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        pixels = np.ascontiguousarray(batch["pixels"])
        if not self.contrast.weight:
            return {"pixels": pixels}
        if "caption" not in batch:
            raise ValueError(
                "image-text contrast needs captions: set config.data.source to captions, parquet or tar with texts, or "
                "shapes; or config.pretraining.contrast.weight=0 to train without."
            )
        return {"pixels": pixels, "texts": captions.token_ids(batch["caption"], self.model.text_length)}

    def inputs_of(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        found = {"pixels": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        if self.contrast.weight:
            found["texts"] = jax.ShapeDtypeStruct((shape[0], self.model.text_length), jnp.int32)
        return found

    def initialize(self) -> TrainState:
        model_key, head_key = jax.random.split(jax.random.key(self.seed))
        example = jnp.zeros(registry.example_shape(self.model))
        params = {"model": self.model.init(model_key, example)["params"], "objective": dict(self.objective.params)}
        if self.distillation.weight:
            width = self.model.latent_channels if self._narrow else self.model.encoder[0]
            head = self.distillation.head.init(head_key, jnp.zeros((1, width)))["params"]
            params["objective"]["head"] = head
        ema = jax.tree.map(jnp.copy, params["model"])
        state = new_state(params, {}, ema, self.optimizer.init(params), None)
        return state.replace(teacher=self._first_teacher(params))

    def settled(self, state: TrainState) -> TrainState:
        return state.replace(teacher=self._first_teacher(state.params))

    @property
    def _narrow(self) -> bool:
        """Whether heads read tokens behind the layer that latents leave through."""
        return not self.model.bottleneck_ae_only

    def _first_teacher(self, params: Mapping) -> Any:
        if not self.distillation.weight:
            return None
        center = jnp.zeros((self.distillation.head.prototypes,), jnp.float32)
        copied = jax.tree.map(jnp.copy, _taught(params))
        return copied | {"centers": {"views": center, "patches": jnp.copy(center)}}

    def views(self, inputs: Mapping[str, Array], key: Array) -> Views:
        """The views of a batch; a loss that is left out gets none."""
        images = pixel_values.to_float(inputs["pixels"])[:, 0]
        whole_key, parts_key, mask_key = jax.random.split(key, 3)
        distilled = images[:: self.distillation.every]  # every so-manieth: each device takes its own
        found, none = self.distillation, jnp.zeros((0,))
        if found.weight:
            distilled = constrain(distilled, "batch", None, None, None)
            shown = [crops(k, distilled) for crops, k in ((found.whole, whole_key), (found.parts, parts_key))]
            masks = found.masks(mask_key, 2 * len(distilled)).reshape(2 * len(distilled), -1)
        return Views(
            images=images,
            texts=inputs.get("texts", none),
            reconstructed=images[:: self.reconstruction.every] if self.reconstruction.weight else none,
            whole=shown[0] if found.weight else none,
            parts=shown[1] if found.weight else none,
            masks=masks if found.weight else none,
        )

    def update(
        self, state: TrainState, networks: Mapping[str, Any], inputs: Mapping[str, Array], key: Array
    ) -> tuple[TrainState, Metrics]:
        """``inputs``: ``pixels`` uint8 or float ``(B, 1, H, W, 3)``, ``texts`` int32 ``(B, L)``."""
        view_key, drop_key = jax.random.split(key)
        views = self.views(inputs, view_key)
        return self.learn(state, networks, views, drop_key)

    def learn(self, state: TrainState, networks: Mapping, views: Views, key: Array) -> tuple[TrainState, Metrics]:
        """One step on given views."""
        loss = jax.value_and_grad(self.loss, has_aux=True)
        (_, (metrics, centers)), grads = loss(state.params, state.teacher, networks, views, state.step, key)
        metrics["grad_norm/generator"] = optim.global_norm(grads)
        finite = optim.finite(metrics)
        grads = self._held(grads, state.step)
        params, optimizer = optim.descend(self.optimizer, grads, state.optimizer, state.params, finite)
        if self.contrast.weight:
            scale = params["model"]["logit_scale"]
            scale = optim.held(finite, jnp.clip(scale, *np.log(self.contrast.scales)), scale)
            params = params | {"model": params["model"] | {"logit_scale": scale}}
        teacher = state.teacher
        if teacher is not None:
            momentum = self.distillation.momentum(state.step)
            metrics |= {"teacher_momentum": momentum}
            old, rate = {name: teacher[name] for name in ("model", "head")}, jnp.where(finite, 1 - momentum, 0.0)
            centers = optim.held(finite, centers, teacher["centers"])
            teacher = optim.follow(old, _taught(params), rate) | {"centers": centers}
        ema = optim.ema_update(state.ema, params["model"], self.ema_decay, state.step, self.ema_warmup, finite)
        return state.replace(params=params, ema=ema, optimizer=optimizer, teacher=teacher), metrics

    def _held(self, grads: Any, step: Array) -> Any:
        """Without those of the prototypes while these are frozen (DINO: in the first epoch)."""
        if not self.distillation.weight or not self.distillation.frozen:
            return grads
        moves = (step >= self.distillation.frozen).astype(jnp.float32)
        head = dict(grads["objective"]["head"])
        head |= {name: moves * head[name] for name in ("prototypes", "prototype_norms") if name in head}
        return grads | {"objective": grads["objective"] | {"head": head}}

    def loss(
        self, params: Mapping, teacher: Any, networks: Mapping, views: Views, step: Array, key: Array
    ) -> tuple[Array, tuple[Metrics, Any]]:
        """(weighted sum, (metrics, the teacher's new centers))."""
        keys = jax.random.split(key, 3)
        params = whole(params)
        total, metrics, centers = jnp.zeros((), jnp.float32), {}, None
        if self.contrast.weight:
            value = self._contrast(params["model"], views, keys[0])
            total, metrics = total + self.contrast.weight * value, metrics | {"loss/contrast": value}
        if self.reconstruction.weight:
            value, more = self._reconstruction(params, networks, views.reconstructed, keys[1])
            total, metrics = total + self.reconstruction.weight * value, metrics | more
        if self.distillation.weight:
            value, more, centers = self._distillation(params, whole(teacher), views, step, keys[2])
            total, metrics = total + self.distillation.weight * value, metrics | more
        return total, (metrics | {"loss/generator": total}, centers)

    def _apply(self, params: Mapping, key: Array, *inputs: Array, method: str, **options: Any) -> Any:
        return self.model.apply({"params": params}, *inputs, rngs={"dropout": key}, method=method, **options)

    def _contrast(self, params: Mapping, views: Views, key: Array) -> Array:
        image = self._apply(params, key, views.images, method="image_features", drop=self.contrast.drop)
        text = self._apply(params, key, views.texts, method="text_features")
        image, text = (constrain(contrastive.normalize(x), "batch", None) for x in (image, text))
        scale = jnp.exp(params["logit_scale"].reshape(()))
        if self.contrast.loss == "siglip":
            return contrastive.siglip_loss(image, text, scale, params["logit_bias"].reshape(()))
        return contrastive.clip_loss(image, text, scale)

    def _reconstruction(self, params: Mapping, networks, images: Array, key: Array) -> tuple[Array, Metrics]:
        options = {"bottleneck": True, "drop": self.reconstruction.drop}
        ((_, latents),) = self._apply(params["model"], key, images, method="features", **options)
        y = self._apply(params["model"], key, latents, method="decode")
        names = ("batch", None, "height", "width", "channel")
        y, images = constrain(y[:, None], *names), constrain(images[:, None], *names)
        value, parts = self.objective.reconstruction(y, images, networks, params["objective"])
        return value, {f"loss/{name}": part for name, part in parts.items()} | {"psnr": psnr(y, images)}

    def _distillation(self, params, teacher, views: Views, step: Array, key: Array) -> tuple[Array, Metrics, Any]:
        found, count = self.distillation, views.whole.shape[0]
        whole_key, parts_key = jax.random.split(key)
        images = views.whole.reshape(-1, *views.whole.shape[2:])
        chosen, weights = _masked(views.masks, found.masks)
        temperature = found.teacher_temperature(step)

        def tokens(model, key, pixels, **options):
            options |= {"bottleneck": self._narrow}
            ((first, patches),) = self._apply(model, key, pixels, method="features", **options)
            return first, patches.reshape(len(patches), -1, patches.shape[-1])

        def logits(head, tokens):
            return found.head.apply({"params": head}, tokens)

        def by_view(x):  # (n v) k -> v n k
            return jnp.moveaxis(x.reshape(count, -1, x.shape[-1]), 1, 0)

        taught = params["model"] | teacher["model"]
        first, patches = jax.lax.stop_gradient(tokens(taught, key, images))
        of_views = logits(teacher["head"], first)
        of_patches = logits(teacher["head"], _taken(patches, chosen))
        targets, patch_targets, centers = _targets(
            found.targets, of_views, of_patches, weights > 0, temperature, teacher["centers"]
        )

        head = params["objective"]["head"]
        own, own_patches = tokens(params["model"], whole_key, images, masks=views.masks, drop=found.drop)
        parts = views.parts.reshape(-1, *views.parts.shape[2:])
        part, _ = tokens(params["model"], parts_key, parts, drop=found.drop)
        across, local = distillation.dino_losses(
            by_view(logits(head, own)), by_view(logits(head, part)), by_view(targets), found.student_temperature
        )
        ibot = distillation.ibot_loss(
            logits(head, _taken(own_patches, chosen)),
            jax.lax.stop_gradient(patch_targets),
            weights,
            2 * count,
            found.student_temperature,
        )
        koleo = sum(distillation.koleo_loss(view) for view in by_view(own))
        losses = {"dino_global": across, "dino_local": local, "ibot": ibot, "koleo": koleo}
        metrics = {f"loss/{name}": value for name, value in losses.items()}
        return across + local + ibot + found.koleo * koleo, metrics, jax.lax.stop_gradient(centers)


def _taught(params: Mapping) -> dict[str, Any]:
    """Of the parameters, what the teacher is the average of."""
    model = {name: params["model"][name] for name in TAUGHT if name in params["model"]}
    return {"model": model, "head": params["objective"]["head"]}


def _masked(masks: Array, settings: Masks) -> tuple[Array, Array]:
    """Per group of crops: places of masked patches ``(groups, most)`` and their weights; 0 where there are fewer."""
    groups = masks.reshape(-1, settings.group, masks.shape[-1])
    chosen, weights = jax.vmap(lambda m: distillation.masked_patches(m, settings.most))(groups)
    return constrain(chosen, "batch", None), weights.reshape(-1)


def _taken(patches: Array, chosen: Array) -> Array:
    """``(crops, n, d)`` -> ``(groups * most, d)``: every group takes its own, so that nothing crosses devices."""
    groups = patches.reshape(chosen.shape[0], -1, patches.shape[-1])
    taken = jnp.take_along_axis(groups, chosen[..., None], axis=1)
    return taken.reshape(-1, patches.shape[-1])


def _targets(kind: str, views: Array, patches: Array, valid: Array, temperature: Array, centers: Mapping) -> tuple:
    """(targets of views, of patches, next centers)."""
    if kind == "sinkhorn":
        found = distillation.sinkhorn(views, temperature), distillation.sinkhorn(patches, temperature, valid)
        return *found, centers
    return (
        distillation.centered(views, centers["views"], temperature),
        distillation.centered(patches, centers["patches"], temperature),
        {
            "views": distillation.next_center(centers["views"], views),
            "patches": distillation.next_center(centers["patches"], patches, valid=valid),
        },
    )
