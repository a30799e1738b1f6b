"""Losses between views and between modalities: the authors' numbers, whole, in blocks and over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, cases, relative_l2

from tokenizers.losses import contrastive, distillation
from tokenizers.nn.heads import PrototypeHead
from tokenizers.parallel.mesh import make_mesh

# float32 in another order of summation. Observed: losses 2e-7, gradients 2e-6.
LOSS, GRADIENT = 1e-5, 1e-4


def close(case, key, value):
    expected = case.outputs[key]
    value = np.asarray(value).reshape(expected.shape)
    assert relative_l2(value, expected) < (GRADIENT if "grad" in key else LOSS), key


# ----------------------------------------------------------------------------------------------------------- contrast


def contrast(case, **options):
    bias = jnp.float32(case.meta["run"]["logit_bias"])

    def clip(image, text, log_scale, bias):
        features = contrastive.normalize(image), contrastive.normalize(text)
        return contrastive.clip_loss(*features, jnp.exp(log_scale), **options)

    def siglip(image, text, log_scale, bias):
        features = contrastive.normalize(image), contrastive.normalize(text)
        return contrastive.siglip_loss(*features, jnp.exp(log_scale), bias, **options)

    inputs = (case.input("image"), case.input("text"), jnp.float32(case.meta["run"]["logit_scale_log"]), bias)
    run = {"clip": clip, "siglip": siglip}
    return {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*inputs) for name, loss in run.items()}


@pytest.mark.parametrize("name", cases("ssl", "clip_siglip"))
@pytest.mark.parametrize("most", [2**24, 12, 1])
def test_contrast_is_that_of_open_clip_in_any_number_of_blocks(name, most):
    case = Case("ssl", name)
    for loss, (value, gradients) in contrast(case, max_similarities=most).items():
        close(case, f"{loss}_loss", value)
        for key, gradient in zip(("image", "text", "logit_scale", "logit_bias"), gradients, strict=True):
            if (loss, key) != ("clip", "logit_bias"):
                close(case, f"{loss}_grad_{key}", gradient)


def unit(seed, *shape):
    return contrastive.normalize(jax.random.normal(jax.random.key(seed), shape))


def test_contrast_over_devices_is_global_and_holds_no_square():
    mesh = make_mesh(data=4, fsdp=2)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    image, text = unit(0, 512, 16), unit(1, 512, 16)

    def losses(image, text):
        few = {"max_similarities": 2**12}
        softmax = contrastive.clip_loss(image, text, 20.0, **few)
        return softmax + contrastive.siglip_loss(image, text, 10.0, -10.0, **few)

    step = jax.value_and_grad(losses, argnums=(0, 1))
    alone = jax.jit(step)(image, text)
    with jax.set_mesh(mesh):
        program = jax.jit(step, in_shardings=(rows, rows)).lower(image, text).compile()
        spread = program(*jax.device_put((image, text), rows))
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-6)
    for ours, theirs in zip(spread[1], alone[1], strict=True):
        assert relative_l2(ours, theirs) < 1e-5
    assert program.memory_analysis().temp_size_in_bytes < 512 * 512 * 4  # the similarities alone


# ------------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("name", cases("ssl", "dino"))
def test_dino_is_that_of_the_authors(name):
    case = Case("ssl", name)
    run = case.meta["run"]
    teacher, center = case.input("teacher"), case.input("center")[0]
    views = lambda x, n: jnp.asarray(x).reshape(n, -1, x.shape[-1])  # noqa: E731
    targets = distillation.sinkhorn(teacher, run["teacher_temp"], iterations=run["n_iterations"])
    close(case, "sinkhorn", targets)
    close(case, "centered", distillation.centered(teacher, center, run["teacher_temp"]))
    after = distillation.next_center(center, teacher, run["center_momentum"])
    close(case, "center_after", after)
    close(case, "centered_after", distillation.centered(teacher, after, run["teacher_temp"]))
    count = run["n_local_crops"]
    local = views(case.input("student_local"), count)
    pairwise = distillation.dino_loss(local, views(targets, 2), run["student_temp"])
    close(case, "raw_loss_pairwise", pairwise)

    def loss(own, local):
        parts = distillation.dino_losses(own, local, views(targets, 2), run["student_temp"])
        return sum(parts), parts

    student = views(case.input("student_global"), 2)
    (_, parts), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(student, local)
    close(case, "loss_local", parts[1])
    swapped = distillation.cross_entropy(student, views(targets, 2), run["student_temp"]).mean()
    # The case pairs the rows as they stand; which teacher's view that is, the caller decides.
    close(case, "loss_global", swapped * 2 / (2 + 2 * count))
    close(case, "grad_student_local", gradients[1])


@pytest.mark.parametrize("name", cases("ssl", "ibot"))
def test_ibot_is_that_of_the_authors(name):
    case = Case("ssl", name)
    run, masks = case.meta["run"], jnp.asarray(case.input("masks"), bool)
    teacher, student = case.input("teacher_patches"), case.input("student_patches")
    count, size = int(masks.sum()), int(masks.sum()) + 3
    indices, weights = jax.jit(distillation.masked_patches, static_argnums=1)(masks, size)
    np.testing.assert_array_equal(indices[:count], case.outputs["mask_indices_list"])
    np.testing.assert_allclose(weights[:count], case.outputs["masks_weight"])
    assert not weights[count:].any()
    pick = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])[indices]  # noqa: E731
    targets = distillation.sinkhorn(pick(teacher), run["teacher_temp"], weights > 0)
    close(case, "sinkhorn", targets[:count])
    assert not targets[count:].any()

    def loss(student):
        return distillation.ibot_loss(pick(student), targets, weights, len(masks), run["student_temp"])

    value, gradient = jax.value_and_grad(loss)(student)
    close(case, "loss_masked", value)
    close(case, "grad_student_patches", gradient)
    center = case.input("center")[0]
    targets = distillation.centered(pick(teacher), center, run["teacher_temp"])
    close(case, "centered", targets[:count])
    close(case, "loss_masked_centered", distillation.ibot_loss(pick(student), targets, weights, len(masks)))
    close(case, "center_after", distillation.next_center(center, pick(teacher), valid=weights > 0))


@pytest.mark.parametrize("name", cases("ssl", "koleo"))
def test_koleo_is_that_of_the_authors(name):
    case = Case("ssl", name)
    value, gradient = jax.value_and_grad(distillation.koleo_loss)(case.input("x"))
    close(case, "loss", value)
    close(case, "grad", gradient)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", cases("ssl", "meta_.*"))
def test_all_terms_together_are_dinov2s(name, devices):
    case = Case("ssl", name)
    run, masks = case.meta["run"], jnp.asarray(case.input("masks"), bool)
    views = lambda x, n: jnp.asarray(x).reshape(n, -1, x.shape[-1])  # noqa: E731
    indices, weights = distillation.masked_patches(masks, 6)
    pick = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])[indices]  # noqa: E731

    def targets(logits, valid):
        if run["centering"] == "centering":
            return distillation.centered(logits, jnp.zeros(logits.shape[-1]), run["teacher_temp"])
        return distillation.sinkhorn(logits, run["teacher_temp"], valid)

    def loss(student, teacher_cls, teacher_patches):
        of_views = views(targets(teacher_cls, None), 2)
        across, local = distillation.dino_losses(
            views(student["global"], 2), views(student["local"], run["n_local_crops"]), of_views
        )
        of_patches = targets(pick(teacher_patches), weights > 0)
        ibot = distillation.ibot_loss(pick(student["patches"]), of_patches, weights, len(masks))
        koleo = run["koleo_weight"] * sum(distillation.koleo_loss(half) for half in views(student["cls_tokens"], 2))
        parts = {"dino_local": local, "dino_global": across, "ibot": ibot, "koleo_weighted": koleo}
        return sum(parts.values()), parts

    student = {key: case.input(f"student_{key}") for key in ("global", "local", "patches", "cls_tokens")}
    mesh = make_mesh(data=min(devices, 4), devices=jax.devices()[:devices], fsdp=-1)  # four images
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    inputs = (student, case.input("teacher_cls"), case.input("teacher_patches"))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=spread)
        (total, parts), gradients = step(*jax.device_put(inputs, spread))
    close(case, "total", total)
    for key, value in parts.items():
        close(case, key, value)
    for key, value in gradients.items():
        close(case, f"grad_student_{key}", value)


@pytest.mark.parametrize("name", cases("ssl", "dino_head.*"))
def test_the_head_is_that_of_the_authors(name):
    case = Case("ssl", name)
    config, weights = case.meta["config"], case.weights()
    module = PrototypeHead(
        config["out_dim"], config["hidden_dim"], config["bottleneck_dim"], config["nlayers"], config["use_weight_norm"]
    )
    dense = ["mlp"] if config["nlayers"] == 1 else [f"mlp.{2 * i}" for i in range(config["nlayers"])]
    names = {f"{n}.weight": (f"hidden_{i}", "kernel") for i, n in enumerate(dense)}
    names |= {f"{n}.bias": (f"hidden_{i}", "bias") for i, n in enumerate(dense)}
    names |= {"last_layer.weight": ("prototypes",), "last_layer.weight_v": ("prototypes",)}
    names |= {"last_layer.weight_g": ("prototype_norms",)}
    params = {}
    for key, value in weights.items():
        *scope, leaf = names[key]
        value = value[:, 0] if key.endswith("_g") else value.T
        (params.setdefault(scope[0], {}) if scope else params)[leaf] = value
    x, dy = case.input("x"), case.input("dy")
    y, pull = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
    close(case, "y", y)
    grads, grad_x = pull(jnp.asarray(dy))
    close(case, "grad_x", grad_x)
    for key in weights:
        value = grads
        for part in names[key]:
            value = value[part]
        close(case, f"grad:{key}", value.T)
