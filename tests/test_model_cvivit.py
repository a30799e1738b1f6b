"""C-ViViT against the code it is known by, and its causal form."""

import functools

import chex
import jax
import numpy as np
import pytest
import refweights
from reference import Case, cases, relative_l2

import tokenizers
from tokenizers import registry
from tokenizers.api import Tokenizer
from tokenizers.convert import cvivit as table
from tokenizers.parallel import platform

# Summation orders differ in float32. Observed on CPU: 1e-6 for the widths of the README, 6e-7 otherwise.
TOLERANCE = 1e-5

FAST = "small_lfq_nonsquare_t7"
CASES = [
    pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in cases("cvivit", "(small|full)_.*")
]


@functools.cache
def official(name):
    case = Case("cvivit", name)
    return case, tokenizers.from_official("cvivit", case.meta["config"], case.weights())


def pixels_of(case):
    return case.input("video") * 2 - 1  # theirs are in [0, 1]


def stored(value, expected):
    """The part of it that the case has, which for large arrays is the first values."""
    value = np.asarray(value)
    return value if value.shape == expected.shape else value.reshape(-1)[: expected.size].reshape(expected.shape)


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_original_does(name):
    case, tok = official(name)
    expected = case.outputs
    encoding = tok.encode(pixels_of(case), strict=True)
    np.testing.assert_array_equal(np.asarray(encoding.indices).reshape(expected["indices"].shape), expected["indices"])
    reconstruction = (tok.decode_indices(encoding.indices) + 1) / 2
    assert relative_l2(reconstruction, expected["recon"]) < TOLERANCE


@pytest.mark.parametrize("name", cases("cvivit", "small_lfq_nonsquare_t7|small_lfq_t5"))
@pytest.mark.slow
def test_what_the_quantizer_reads_is_what_the_originals_does(name):
    case, tok = official(name)
    found = tok.module.apply(tok.variables, pixels_of(case), method="prequantized")
    assert relative_l2(stored(found, case.outputs["prequant"]), case.outputs["prequant"]) < TOLERANCE


@pytest.mark.parametrize("name", cases("cvivit", "small_lfq_image|small_cosine_vq_t5"))
def test_weights_go_back_to_their_official_names(name):
    case, tok = official(name)
    weights = case.weights()
    back = tok.export_official()
    codes = "vq._codebook.embed"
    if codes in weights:  # drawn at random; the original keeps unit vectors
        weights[codes] /= np.linalg.norm(weights[codes], axis=-1, keepdims=True)
    for key, value in back.items():
        if key.startswith("vq._codebook") and key != codes:
            assert key not in case.weights() or "lfq" not in name
            continue
        np.testing.assert_allclose(value, weights[key], rtol=1e-6, err_msg=key)
    unused = {key for key in weights if "null_kv" in key or "context_norm" in key}
    assert set(weights) - set(back) - unused == ({"vq._codebook.initted"} & set(weights))
    gone = weights.pop("to_pixels.0.weight")
    with pytest.raises(ValueError, match=r"missing 'to_pixels.0.weight'"):
        tokenizers.from_official("cvivit", case.meta["config"], weights)
    with pytest.raises(ValueError, match=r"unexpected 'to_pixels.1.weight'"):
        tokenizers.from_official(
            "cvivit", case.meta["config"], weights | {"to_pixels.0.weight": gone, "to_pixels.1.weight": gone}
        )


CONFIG = {
    "dim": 512, "codebook_size": 65536, "image_size": 256, "patch_size": 32, "temporal_patch_size": 2,
    "spatial_depth": 4, "temporal_depth": 4, "dim_head": 64, "heads": 8,
}  # fmt: skip


def test_configs_become_models():
    built = registry.build("cvivit", **table.fields_from_official(CONFIG))
    assert built == registry.build("cvivit-phenaki-pytorch")
    oblong = registry.build("cvivit", **table.fields_from_official(CONFIG | {"patch_size": (16, 32)}))
    assert oblong.spec.compression == (2, 16, 32)
    facts = tokenizers.describe("cvivit-phenaki-pytorch")
    assert not facts["causal"]
    assert "not causal" in facts["note"]
    facts = tokenizers.describe("cvivit-phenaki")
    assert facts["causal"]
    assert facts["codebook_size"] == 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 5000}, "codebook_size=5000 .* power of two"),
        ({"heads_": 3}, "argument of CViViT 'heads_'. Did you mean 'heads'"),
        ({"attn_dropout": 0.1}, "attn_dropout=0.1"),
        ({"lookup_free_quantization_kwargs": {"num_codebooks": 2}}, "num_codebooks"),
        ({"patch_size": 24}, "patch_size=24 must divide image_size=256"),
    ],
)
def test_configs_of_other_networks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        table.fields_from_official(CONFIG | changes)


# --- the causal form


@functools.cache
def toy(**changes):
    """A tokenizer in use; random weights of any kind take longer to make than to run."""
    fields = {"bottleneck": {"name": "lfq", "bits": 6, "bit_order": "big", "entropy": "clamped"}, "latent_channels": 6}
    fields |= {"patch": (2, 4, 4), "width": 12, "spatial_depth": 1, "temporal_depth": 1, "heads": 3, "head_dim": 4}
    module = registry.build("cvivit", **(fields | changes))
    leaves, tree = jax.tree.flatten(registry.abstract_variables(module))
    values = [refweights.uniform(f"leaf{i}", leaf.shape) for i, leaf in enumerate(leaves)]
    return Tokenizer(module, jax.tree.unflatten(tree, values), "cvivit", fields | changes)


CLIP = refweights.image_like("cvivit/clip", (1, 11, 8, 12, 3))


def test_chunks_of_a_stream_are_the_whole_clip():
    tok = toy()
    chunks = list(tok.encode_stream([CLIP[:, :6], CLIP[:, 6:]]))
    assert [chunk.latents.shape[1] for chunk in chunks] == [3, 3]
    indices = np.concatenate([chunk.indices for chunk in chunks], axis=1)
    np.testing.assert_array_equal(indices, tok.encode(CLIP).indices)


@pytest.mark.slow
def test_chunks_of_latents_are_decoded_as_the_whole():
    tok = toy()
    indices = tok.encode(CLIP).indices
    streamed = np.concatenate(list(tok.decode_stream([indices[:, :3], indices[:, 3:4], indices[:, 4:]])), axis=1)
    # Summation orders of attention differ: observed 3e-7.
    np.testing.assert_allclose(streamed, tok.decode_indices(indices), atol=1e-5)


def changes_of_the_first_latent(tok, clip):
    """How much of it comes from later frames."""
    clips = np.concatenate([clip, clip])
    clips[1, 3:] *= -1
    encode = jax.jit(
        functools.partial(tok.module.apply, method="prequantized"), compiler_options=platform.run_once_options()
    )
    first = np.asarray(encode(tok.variables, clips))[:, 0]
    return np.abs(first[1] - first[0]).max() / np.abs(first).max()


@pytest.mark.parametrize("layout", ["scrambled", pytest.param("grid", marks=pytest.mark.slow)])
def test_only_the_papers_form_is_causal(layout):
    tok = toy(layout=layout)
    assert (changes_of_the_first_latent(tok, CLIP) > 1e-3) == (layout == "scrambled")
    assert tok.spec.causal == (layout == "grid")
    if layout == "scrambled":
        with pytest.raises(ValueError, match="cannot stream: it is not causal"):
            next(tok.encode_stream([CLIP]))
        chex.assert_trees_all_equal_shapes(tok.params, toy().params)
