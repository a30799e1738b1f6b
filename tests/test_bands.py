"""A stream in tiles gives what whole frames give; what tiles would change is refused."""

import jax
import numpy as np
import pytest
import refweights

from tokenizers import bands, registry
from tokenizers.api import Tokenizer
from tokenizers.models import vidtok
from tokenizers.nn.local import Step, halo
from tokenizers.parallel.mesh import make_mesh

# One level of each kind: two that change height and width, one that changes time.
TWO = {"multipliers": (1, 2, 2), "space_down": (0, 1), "space_up": (1, 2), "time_down": (1,), "time_up": (1,)}
ONE = {"multipliers": (1, 1), "space_down": (0,), "space_up": (1,), "time_down": (), "time_up": ()}
# The projected kind: dense layers lead to the codes and back.
GAUSSIAN, DISCRETE = ({"name": "gaussian"}, 3), ({"name": "fsq", "levels": (8, 8)}, 3)
# Observed: 0, or one rounding of float32 where a library cuts sums elsewhere for another size.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def toy(time="causal", kind=GAUSSIAN, norm="layernorm", **fields):
    bottleneck, channels = kind
    fields = (TWO | fields) | {"channels": 4, "blocks": 1, "latent_channels": channels, "norm": norm, "time": time}
    module = registry.build("vidtok", bottleneck=bottleneck, **fields)
    shapes = registry.abstract_variables(module)
    leaves = enumerate(jax.tree.leaves(shapes))
    drawn = [0.3 * refweights.uniform(f"bands/{number}", leaf.shape) for number, leaf in leaves]
    return Tokenizer(module, jax.tree.unflatten(jax.tree.structure(shapes), drawn), "vidtok", {})


def clip(frames, *size):
    return refweights.image_like("bands", (1, frames, *size, 3))


def largest_difference(some, others):
    pairs = zip(some, others, strict=True)
    return max(float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()) for a, b in pairs)


def test_the_halo_follows_from_the_steps():
    same, halve, double = Step(None, 2), Step(None, 1, down=2), Step(None, 1, up=2)
    assert halo([]) == 0
    assert halo([same, same]) == 4
    assert [halo([same, halve]), halo([same, same, halve]), halo([same, halve, same, halve])] == [2, 3, 3]
    assert [halo([double]), halo([same, double]), halo([double, same, double])] == [1, 5, 7]
    assert halo([same, Step(None, None), same]) is None


def test_all_released_sizes_with_layer_norm_are_local():
    """By hand for 4x8x8: 1 of conv_in; 5, halved 3; 7, 4; 8, 5. And 1; 7, doubled 15; 16, 22, 45; 46, 52, 53 of 8."""
    assert registry.build("vidtok-kl-causal-488-4chn").halo == (5, 7)
    for name, entry in vidtok.VARIANTS.items():
        module = registry.build(name)
        encoder, decoder = module.halo
        assert 4 <= encoder <= decoder <= 14, (name, entry)
        assert module.clone(norm="groupnorm").halo is None


@pytest.mark.parametrize("method", ["encode_stream", "decode_stream"])
def test_what_tiles_would_change_is_refused(method):
    cosmos = Tokenizer(registry.build("cosmos-1.0-cv8x8x8"), {}, "cosmos-1.0-cv8x8x8", {})
    with pytest.raises(ValueError, match="cosmos-1.0-cv8x8x8 cannot be streamed in tiles: .*see whole frames"):
        getattr(cosmos, method)([], tile=256)
    grouped = Tokenizer(registry.build("vidtok", norm="groupnorm"), {}, "vidtok", {})
    with pytest.raises(ValueError, match="vidtok cannot be streamed in tiles"):
        getattr(grouped, method)([], tile=256)
    local = Tokenizer(registry.build("vidtok"), {"params": {}}, "vidtok", {})
    for tile in (112, 252, (256, 112), (256, 252)):
        with pytest.raises(ValueError, match=r"tile=.* does not fit vidtok: .*multiples of \(8, 8\) and above \(112, "):
            getattr(local, method)([], tile=tile)
    assert list(getattr(local, method)([], tile=120)) == []
    with pytest.raises(ValueError, match="tile=256 is for one device"):
        getattr(local.shard(make_mesh(data=8, fsdp=1, context=1)), method)([], tile=256)


def test_a_chunk_in_tiles_is_the_chunk():
    tok, pixels = toy(**ONE), clip(1, 61, 46)  # tiles of 16 cells' width, the last column filled up
    (whole,), (parts,) = tok.encode_stream([pixels]), tok.encode_stream([pixels], tile=(40, 32))
    np.testing.assert_allclose(parts.mean, whole.mean, **ROUNDING)
    (whole,), (tiles,) = tok.decode_stream([parts.latents]), tok.decode_stream([parts.latents], tile=(40, 32))
    np.testing.assert_allclose(tiles, whole, **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(("time", "kind"), [("causal", GAUSSIAN), ("causal-v1.1", DISCRETE)], ids=("v1.0", "v1.1"))
def test_a_stream_in_tiles_is_the_stream(time, kind):
    tok, pixels = toy(time, kind), clip(8, 90, 131)  # in 3 x 7 tiles
    chunks = np.split(pixels, [3, 5, 7], axis=1)  # the last one is filled up
    whole, parts = list(tok.encode_stream(chunks)), list(tok.encode_stream(chunks, tile=(64, 56)))
    np.testing.assert_allclose([x.latents for x in parts][1:], [x.latents for x in whole][1:], **ROUNDING)
    np.testing.assert_allclose(parts[0].latents, whole[0].latents, **ROUNDING)
    given = [x.latents if x.indices is None else x.indices for x in whole]
    frames, tiles = list(tok.decode_stream(given)), list(tok.decode_stream(given, tile=(64, 56)))
    assert [x.shape for x in tiles] == [x.shape for x in frames]
    for some, others in zip(tiles, frames, strict=True):
        np.testing.assert_allclose(some, others, **ROUNDING)


@pytest.mark.slow
def test_a_smaller_halo_would_not_do(monkeypatch):
    tok, pixels = toy(), clip(1, 96, 56)  # two tiles with no cell more in common than they must
    encoder, decoder = tok.module.halo
    (whole,) = tok.encode_stream([pixels])
    (frames,) = tok.decode_stream([whole.latents])
    monkeypatch.setattr(vidtok.Model, "halo", (encoder - 1, decoder))
    (parts,) = tok.encode_stream([pixels], tile=56)
    assert largest_difference([parts.latents], [whole.latents]) > 1e-5  # observed 5e-4, and 1e-7 with all of it
    # With one cell less a single row of pixels would be wrong, by the product of 17 small weights.
    monkeypatch.setattr(vidtok.Model, "halo", (encoder, decoder - 2))
    (tiles,) = tok.decode_stream([whole.latents], tile=56)
    assert largest_difference([tiles], [frames]) > 1e-5  # observed 5e-5


def test_tiles_are_as_few_and_then_as_small_as_can_be():
    places = bands._places(registry.build("vidtok-kl-causal-488-4chn"), "decode", (135, 240), (640, 768))
    assert len(places) == 6
    assert {(down.stop - down.start, across.stop - across.start) for down, across in places} == {(75, 90)}
    assert [(across.first, across.last) for _, across in places[:3]] == [(0, 82), (82, 157), (157, 240)]
