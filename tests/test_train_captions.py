"""Decoders that read captions: CLIP's features of texts, in training and in pictures of held-out items."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import eval_default, tatitok_bl32_vae
from tokenizers.convert import clip as names
from tokenizers.convert.engine import flatten, official_names, to_official
from tokenizers.evaluate import captioned, session
from tokenizers.networks import clip, weights
from tokenizers.nn.text import TextTower
from tokenizers.parallel.mesh import make_mesh
from tokenizers.train import build, loop
from tokenizers.train.step import make_step

TINY = {"width": 8, "layers": 1, "heads": 2, "features": None, "activation": "quick_gelu", "pool": "all"}
TEXTS = ["a red circle", "a small blue square on a plain green background"]


@pytest.fixture
def tiny_clip(monkeypatch):
    """`clip.load("tiny")` with random weights from OpenAI's names, in half precision, the image's half beside them."""
    module = clip.TextFeatures(**TINY)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 77), np.int32))
    rng = np.random.default_rng(0)
    state = to_official(names.TABLE, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float16), shapes))
    state |= {"visual.conv1.weight": np.zeros(3, np.float16), "text_projection": np.zeros((8, 8), np.float16)}
    monkeypatch.setitem(clip.TEXT, "tiny", (TINY, "clip_vitl14_336"))
    monkeypatch.setattr(weights, "find", lambda name, path: name)
    monkeypatch.setattr(clip, "read_state_dict", lambda path: state)
    return state


def config():
    found = tatitok_bl32_vae.get_config("smoke")
    found.steps, found.optimizer.warmup = 2, 0
    found.model.update({"text": (77, 8), "encoder": (16, 1, 2), "decoder": (16, 1, 2)})
    found.captions.network = "tiny"
    found.discriminator.update({"name": None})
    found.data.update({"source": "shapes", "drawings": 16, "held_out": "0.5"})
    found.data.streams.image.batch_size = 8
    found.evaluation.max_items = 8
    found.log.tensorboard = False
    return found


def test_features_are_those_of_every_position_behind_the_final_norm(tiny_clip):
    module, variables = clip.load("tiny")
    ids = np.array([[49406, 320, 736, 49407, 0], [49406, 49407, 0, 0, 0]])
    found = jax.jit(module.apply)(variables, ids)
    _, before = jax.jit(TextTower(**(TINY | {"pool": "argmax"})).apply)(variables, ids)
    norm, before = variables["params"]["norm"], np.asarray(before)
    centred = before - before.mean(-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        variables["params"]["positions"], tiny_clip["positional_embedding"].astype(np.float32)
    )


def test_the_published_network_has_the_published_names():
    module, shapes = clip.load("clip_vitl14_336", weights.SHAPES)
    assert (module.context, module.width) == (77, 768)
    tensors = set(official_names(names.TABLE, [f"{path}" for path in flatten_layers(shapes)]).values())
    assert len(tensors) == 12 * 12 + 4
    assert {"token_embedding.weight", "transformer.resblocks.11.attn.in_proj_weight", "ln_final.bias"} <= tensors
    with pytest.raises(weights.MissingWeights, match="ViT-L-14-336px.pt"):
        clip.load("clip_vitl14_336", "no/such/folder")


def flatten_layers(shapes):
    for path in flatten(shapes):
        head, found, tail = path.partition("/layers/")
        yield from (f"{head}/layers/{i}/{tail}" for i in range(12)) if found else (path,)


@pytest.mark.slow
def test_a_step_reads_the_captions_of_its_batch(tiny_clip):
    recipe = build.recipe(config().to_dict())
    pixels = np.random.default_rng(1).integers(0, 256, (2, 1, 32, 32, 3), np.uint8)
    inputs = recipe.inputs({"pixels": pixels, "caption": TEXTS})
    shapes = recipe.inputs_of(pixels.shape)
    assert {key: (a.shape, a.dtype) for key, a in inputs.items()} == {k: (a.shape, a.dtype) for k, a in shapes.items()}
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        state, step = jax.jit(recipe.initialize)(), jax.jit(make_step(recipe))
        networks = dict(recipe.networks)
        _, first = step(state, networks, inputs)
        _, again = step(state, networks, inputs)
        _, swapped = step(state, networks, inputs | {"texts": inputs["texts"][::-1]})
        new, _ = step(state, networks, inputs)
    assert first["loss/l2"] == again["loss/l2"] != swapped["loss/l2"]
    kernel = ("decode_tokens", "text", "kernel")
    assert (at(new.params["model"], kernel) != at(state.params["model"], kernel)).any()
    with pytest.raises(ValueError, match="config.captions.network reads captions"):
        recipe.inputs({"pixels": pixels})


def at(tree, path):
    for name in path:
        tree = tree[name]
    return jnp.asarray(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions.network": None}, r"reads features of captions \(77, 8\): set config.captions.network"),
        ({"model.text": None}, "decoder reads no captions"),
        ({"model.text": (77, 16)}, r"config.model.text=\(77, 16\) must be the features of 'tiny': \(77, 8\)"),
        ({"captions.network": "clip"}, "network of texts 'clip'"),
        ({"loss.equivariance.probability": 0.5}, "transforms maps of latents"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_does_not_go_together_is_refused(tiny_clip, changes, message):
    wrong = config()
    wrong.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        build.recipe(wrong.to_dict())


def test_evaluation_says_what_it_reads(tiny_clip):
    module = build.recipe(config().to_dict()).model
    given = {"network": "tiny", "path": "", "template": ""}
    assert captioned.of(module.clone(text=None), given | {"network": None}, ()) is None
    with pytest.raises(ValueError, match="decoder reads captions: set config.captions.network"):
        captioned.of(module, given | {"network": None}, ())
    for template, classes in (("a photo", ("cat",)), ("a {}", ())):
        with pytest.raises(ValueError, match="needs {} where a class's name belongs"):
            captioned.of(module, given | {"template": template}, classes)
    named = captioned.of(module, given | {"template": "a {}"}, ("cat", "dog"))
    plain = captioned.of(module, given, ())
    np.testing.assert_array_equal(named.ids({"label": [1, -1]}), plain.ids({"caption": ["a dog", ""]}))
    with pytest.raises(ValueError, match="these data have none"):
        plain.ids({"label": [1]})


@pytest.mark.slow
def test_it_trains_on_captioned_drawings(tiny_clip, tmp_path):
    assert loop.run(config(), tmp_path / "run")
    assert "held_out/psnr" in (tmp_path / "run" / "metrics.jsonl").read_text()
    evaluation = eval_default.get_config()
    evaluation.update({"metrics": ("psnr",), "baseline_items": 0, "preview_items": 0})
    of_captions = session.evaluate_checkpoint(tmp_path / "run", evaluation)["overall"]["psnr"]
    evaluation.captions.template = "a photo of a {}"  # drawings have classes
    of_classes = session.evaluate_checkpoint(tmp_path / "run", evaluation)["overall"]["psnr"]
    assert np.isfinite(of_captions)
    assert of_captions != of_classes
