"""OmniTokenizer against the authors' code: networks, codes, names; its causal form; its training."""

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
from tokenizers.convert import omnitokenizer as table
from tokenizers.models import omnitokenizer

# Summation orders differ in float32. Observed on CPU: 2e-6 for released sizes, 8e-7 for small ones.
TOLERANCE = 1e-5

FAST = "small_vq_rope_t5"
CASES = [
    pytest.param(name, marks=[] if name == FAST else pytest.mark.slow)
    for name in cases("omnitokenizer", "(small|full)_.*")
]


def config_of(case):
    """The case's arguments, and in which of two ways its code attended."""
    return case.meta["config"] | {"sdpa": case.meta.get("sdpa", True)}


@functools.cache
def official(name):
    case = Case("omnitokenizer", name)
    return case, tokenizers.from_official("omnitokenizer", config_of(case), case.weights())


def pixels_of(case):
    return case.input("video") * 2  # theirs are in [-0.5, 0.5]


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_original_does(name):
    case, tok = official(name)
    expected = case.outputs
    encoding = tok.encode(pixels_of(case), strict=True)

    def same(value, key):
        assert relative_l2(np.asarray(value).reshape(expected[key].shape), expected[key]) < TOLERANCE, key

    if encoding.indices is None:
        same(encoding.mean, "posterior_mean")
        same(encoding.logvar, "posterior_logvar")
        np.testing.assert_allclose(encoding.losses["kl"], expected["kl_sum_per_batch"], rtol=TOLERANCE)
        reconstruction = tok.decode(encoding.latents)
    else:
        # Not even the fragile positions flip.
        np.testing.assert_array_equal(
            np.asarray(encoding.indices).reshape(expected["indices"].shape), expected["indices"]
        )
        np.testing.assert_allclose(0.25 * encoding.losses["commitment"], expected["commitment_loss"], rtol=TOLERANCE)
        reconstruction = tok.decode_indices(encoding.indices)
    side = case.meta.get("crop_recon")
    same(np.asarray(reconstruction)[..., :side, :side, :] / 2, "recon")


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("omnitokenizer", "small_vq_rope_t17|small_vq_defer_pool_t9"))
def test_tokens_and_what_the_quantizer_reads_are_the_originals(name):
    case, tok = official(name)
    for method, key in (("encoded", "encoder_out"), ("prequantized", "prequant")):
        found = tok.module.apply(tok.variables, pixels_of(case), method=method)
        assert relative_l2(found, case.outputs[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", cases("omnitokenizer", "small_vae_rope_image|small_vq_rel_nosdpa_t5"))
def test_weights_go_back_to_their_official_names(name):
    case, tok = official(name)
    weights, back = case.weights(), tok.export_official()
    computed = {"codebook.N", "codebook.z_avg"}
    chex.assert_trees_all_equal(
        {key: value for key, value in back.items() if key not in computed},
        {key: weights[key] for key in back if key not in computed},
    )
    left = {key for key in weights if key not in back and "discriminator" not in key}
    unused = ("context_norm", "spatial_rel_pos_bias", "codebook")
    assert all(any(word in key for word in unused) for key in left), left
    weights["encoder.extra.weight"] = weights.pop("pre_vq_conv.1.weight")
    with pytest.raises(ValueError, match=r"missing 'pre_vq_conv.1.weight'(.|\n)*unexpected 'encoder.extra.weight'"):
        tokenizers.from_official("omnitokenizer", config_of(case), weights)


@pytest.mark.parametrize("name", cases("omnitokenizer", "full_.*"))
def test_the_table_of_variants_is_what_the_arguments_say(name):
    case = Case("omnitokenizer", name)
    variant = "omnitokenizer-" + case.meta["official_release"].removesuffix(".ckpt").replace("_", "-")
    built = registry.build("omnitokenizer", **table.fields_from_official(config_of(case)))
    assert built == registry.build(variant)
    facts = tokenizers.describe(variant)
    assert not facts["causal"]
    assert "not causal" in facts["note"]
    # What the authors' code computes and drops is no parameter here.
    dropped = ("discriminator", "context_norm", "spatial_rel_pos_bias", "codebook", ".beta", "_index")
    used = sum(np.prod(shape) for key, shape, _ in case.meta["state_dict"] if not any(word in key for word in dropped))
    assert facts["parameters"] == used


CONFIG = {
    "patch_embed": "linear", "patch_size": 8, "temporal_patch_size": 2, "spatial_depth": 4, "temporal_depth": 4,
    "embedding_dim": 512, "enc_block": "ttww", "dec_block": "tttt", "twod_window_size": 8, "dim_head": 64, "heads": 8,
    "causal_in_temporal_transformer": True, "causal_in_peg": True, "spatial_pos": "rel", "n_codes": 8192,
    "codebook_dim": 8, "l2_code": True, "no_random_restart": True,
}  # fmt: skip


def test_the_release_of_other_attention_is_known_by_its_name():
    fields = table.fields_from_official(CONFIG | {"sdpa": False})
    assert registry.build("omnitokenizer", **fields) == registry.build("omnitokenizer-imagenet-only")
    misspelt = {key.replace("causal_in_t", "casual_in_t"): value for key, value in CONFIG.items()}
    assert table.fields_from_official(misspelt) == table.fields_from_official(CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_embed": "cnn"}, "patch_embed 'cnn'. Accepted: linear"),
        ({"use_external_codebook": True}, "use_external_codebook True"),
        ({"enc_block": "ttan"}, "letter of enc_block='ttan' 'a'. Accepted: t, w"),
        ({"spatial_pos": "sine"}, "spatial_pos 'sine'.*Accepted: rope, rel"),
        ({"n_code": 3}, "argument of OmniTokenizer 'n_code'. Did you mean 'n_codes'"),
    ],
)
def test_arguments_of_other_networks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        table.fields_from_official(CONFIG | changes)


# --- other sizes, and the causal form


@pytest.mark.slow
def test_windows_at_the_border_hold_what_is_there():
    x = np.random.default_rng(0).normal(size=(1, 1, 3, 5, 8)).astype(np.float32)
    layer = omnitokenizer.WindowedAttention(2, 2, np.float32)
    variables = layer.init(jax.random.key(0), x)
    whole = layer.apply(variables, x)
    np.testing.assert_allclose(whole[:, :, :2, :4], layer.apply(variables, x[:, :, :2, :4]), atol=1e-6)
    # Nothing but itself is in the window of the corner.
    np.testing.assert_allclose(whole[:, :, 2:, 4:], layer.apply(variables, x[:, :, 2:, 4:]), atol=1e-6)
    np.testing.assert_allclose(whole[:, :, 2:, :2], layer.apply(variables, x[:, :, 2:, :2]), atol=1e-6)


@functools.cache
def toy(**changes):
    """A tokenizer in use; random weights of any kind take longer to make than to run."""
    bottleneck = {"name": "vq", "codebook_size": 16, "code_dim": 4, "update": "ema"}
    fields = {"bottleneck": bottleneck, "latent_channels": 4, "patch": (2, 4, 4), "width": 8, "encoder_blocks": "tw"}
    fields |= {"decoder_blocks": "t", "temporal_depth": 1, "heads": 2, "head_dim": 4, "window": 2}
    module = registry.build("omnitokenizer", **(fields | changes))
    leaves, tree = jax.tree.flatten(registry.abstract_variables(module))
    values = [refweights.uniform(f"leaf{i}", leaf.shape) for i, leaf in enumerate(leaves)]
    return Tokenizer(module, jax.tree.unflatten(tree, values), "omnitokenizer", fields | changes)


STREAMS = [
    {},
    {"pool": (2, 2), "patch": (4, 8, 8)},
    {"temporal_positions": "alibi", "attention_window": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", STREAMS, ids=str)
def test_chunks_of_a_stream_are_the_whole_clip(changes):
    tok = toy(**changes)
    time = tok.spec.compression[0]
    clip = refweights.image_like("omni/clip", (1, 1 + 5 * time, 16, 24, 3))
    whole = tok.encode(clip)
    cut = 1 + 2 * time
    chunks = list(tok.encode_stream([clip[:, :cut], clip[:, cut : cut + time], clip[:, cut + time :]]))
    assert [chunk.latents.shape[1] for chunk in chunks] == [3, 1, 2]
    np.testing.assert_array_equal(np.concatenate([chunk.indices for chunk in chunks], axis=1), whole.indices)
    streamed = np.concatenate(list(tok.decode_stream(chunks)), axis=1)
    # Summation orders of attention differ: observed 5e-7.
    np.testing.assert_allclose(streamed, tok.decode(whole.latents), atol=1e-5)
    np.testing.assert_array_equal(tok.encode(clip[:, 0]).indices, whole.indices[:, 0])


@pytest.mark.parametrize("changes", [{"layout": "scrambled"}, {"causal_attention": False}, {"causal_positions": False}])
def test_what_is_not_causal_says_so(changes):
    module = registry.build("omnitokenizer", **changes)
    assert not module.spec.causal
    assert registry.build("omnitokenizer").spec.causal


@pytest.mark.slow
def test_weights_with_mixed_up_positions_are_not_causal():
    tok = toy(layout="scrambled")
    clip = refweights.image_like("omni/clip", (1, 5, 16, 24, 3))
    later = clip.copy()
    later[:, 3:] *= -1
    a, b = (tok.module.apply(tok.variables, x, method="prequantized")[:, 0] for x in (clip, later))
    assert np.abs(a - b).max() > 1e-3
    with pytest.raises(ValueError, match="cannot stream: it is not causal"):
        next(tok.encode_stream([clip]))
