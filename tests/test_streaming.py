"""A stream of chunks gives what the whole clip gives, whatever the chunks; memory and programs do not grow."""

import functools
import itertools

import chex
import numpy as np
import pytest
import refweights
import toys
from hypothesis import given
from hypothesis import strategies as st

from tokenizers import streaming
from tokenizers.parallel.mesh import make_mesh
from tokenizers.types import Spec


def clip(frames, *size):
    x = refweights.image_like("stream", (2, frames, *(size or (16, 16)), 3))
    return np.floor((x + 1) * 127.5 + 0.5).astype(np.uint8)


def cut(x, *lengths):
    ends = list(itertools.accumulate(lengths))
    assert ends[-1] == x.shape[1]
    return np.split(x, ends[:-1], axis=1)


def joined(parts):
    return np.concatenate([np.asarray(part) for part in parts], axis=1)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 1), st.integers(1, 8))
def test_regrouped_frames_are_the_same_frames(lengths, first, group):
    total = sum(lengths)
    x = np.arange(total).reshape(1, total, 1)
    taken = 0

    def chunks():
        nonlocal taken
        for length in lengths:
            yield x[:, taken : taken + length]
            taken += length

    given_out, lead = [], first
    for portion in streaming.regroup(chunks(), first, group):
        assert portion.shape[1] > 0
        assert (portion.shape[1] - lead) % group == 0
        lead = 0
        given_out.append(portion)
    if not total:
        assert not given_out
        return
    out = joined(given_out)
    assert 0 <= out.shape[1] - total < group
    np.testing.assert_array_equal(out[:, :total], x)
    assert (out[:, total:] == total - 1).all()


@pytest.mark.parametrize("lengths", [(5, 4), (1, 2, 2, 2, 2)])
def test_encoding_chunks_is_encoding_the_whole(lengths):
    tok, x = toys.causal(), clip(9)
    whole = tok.encode(x)
    parts = list(tok.encode_stream(cut(x, *lengths)))
    np.testing.assert_array_equal(joined(part.indices for part in parts), whole.indices)
    np.testing.assert_allclose(joined(part.latents for part in parts), whole.latents, atol=1e-5)


@pytest.mark.parametrize("lengths", [(3, 2), (1, 1, 1, 1, 1)])
def test_decoding_chunks_is_decoding_the_whole(lengths):
    tok, x = toys.causal("continuous"), clip(9)
    latents = np.asarray(tok.encode(x).latents)
    parts = list(tok.decode_stream(cut(latents, *lengths)))
    assert [part.shape[1] for part in parts] == [2 * n - (i == 0) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(joined(parts), tok.decode(latents), atol=1e-5)


def test_a_posterior_is_streamed_too():
    tok, x = toys.causal("continuous"), clip(9)
    whole, parts = tok.encode(x), list(tok.encode_stream(cut(x, 5, 4)))
    for name in ("latents", "mean", "logvar"):
        np.testing.assert_allclose(joined(getattr(part, name) for part in parts), getattr(whole, name), atol=1e-5)


def test_sizes_and_frame_counts_that_do_not_fit_are_filled_up_as_in_encode():
    tok, x = toys.causal(), clip(8, 13, 16)
    whole = tok.encode(x)
    encodings = tok.encode_stream(cut(x, 5, 3))
    pixels = joined(tok.decode_stream(encodings))
    np.testing.assert_allclose(pixels, tok.decode(whole.latents), atol=1e-5)
    np.testing.assert_allclose(pixels[:, :8, :13], tok.reconstruct(x), atol=1e-5)


def test_encodings_latents_and_indices_are_decoded_alike():
    tok, x = toys.causal(), clip(9)
    parts = list(tok.encode_stream(cut(x, 5, 4)))
    from_encodings = joined(tok.decode_stream(parts))
    np.testing.assert_array_equal(joined(tok.decode_stream(part.latents for part in parts)), from_encodings)
    np.testing.assert_array_equal(joined(tok.decode_stream(part.indices for part in parts)), from_encodings)


def test_an_endless_stream_comes_out_as_it_goes_in_without_new_programs():
    tok = toys.causal()
    taken = []

    def endless():
        yield clip(5)
        for number in itertools.count():
            taken.append(number)
            yield clip(4)

    def programs():
        return streaming._encode_chunk.cache_size(), streaming._decode_chunk.cache_size()

    stream = tok.decode_stream(tok.encode_stream(endless()))
    assert [part.shape[1] for part in itertools.islice(stream, 2)] == [5, 4]
    assert len(taken) == 1  # nothing is read ahead
    before = programs()
    assert [part.shape[1] for part in itertools.islice(stream, 6)] == [4] * 6
    assert programs() == before


def test_over_devices_the_stream_is_the_same():
    tok, x = toys.causal("continuous"), clip(9)
    spread = tok.shard(make_mesh(data=2, fsdp=2, context=2, split="height"))
    latents = joined(part.latents for part in spread.encode_stream(cut(x, 5, 4)))
    np.testing.assert_allclose(latents, tok.encode(x).latents, atol=1e-5)  # sums in another order
    np.testing.assert_allclose(joined(spread.decode_stream([latents])), tok.decode(latents), atol=1e-5)


def test_nothing_in_gives_nothing():
    assert list(toys.causal().encode_stream([])) == []
    assert list(toys.causal().decode_stream([])) == []


class _Clips(toys.PatchImage):
    """An image tokenizer that says it is one of clips, causal or not."""

    causal: bool = False

    @property
    def spec(self):
        return Spec((1, 4, 4), 3, 125, self.causal, True, "")


@pytest.mark.parametrize("method", ["encode_stream", "decode_stream"])
@pytest.mark.parametrize(
    ("module", "message"),
    [(toys.PatchImage(), "it is an image tokenizer"), (_Clips(), "it is not causal")],
    ids=["image", "not causal"],
)
def test_other_tokenizers_refuse_before_the_first_chunk(method, module, message):
    tok = toys.tokenizers.Tokenizer(module, {}, "other", {})
    with pytest.raises(ValueError, match=message):
        getattr(tok, method)([])


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([clip(5)[:, 0]], r"accepted: \(B, T, H, W, 3\)"),
        ([clip(5), clip(4, 16, 20)], "only T may change"),
        ([clip(5), clip(4)[:1]], "only T may change"),
        ([clip(5) * 255.0], "floats must be in"),
    ],
)
def test_chunks_that_are_no_clip_are_refused(chunks, message):
    with pytest.raises(ValueError, match=message):
        list(toys.causal().encode_stream(chunks))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), "3\\) latents"),
        (np.zeros((1, 2, 4, 4, 3), np.int32), "indices"),
        (np.full((1, 2, 4, 4), 125), r"lie in \[0, 125\)"),
    ],
)
def test_chunks_that_are_no_latents_are_refused(chunk, message):
    with pytest.raises(ValueError, match=message):
        list(toys.causal().decode_stream([chunk]))


def test_state_is_a_tree_of_arrays_of_constant_size():
    tok = toys.causal()
    step = functools.partial(streaming._encode_chunk, tok.module, tok.variables)
    _, first = step({}, clip(5))
    _, second = step(first, clip(4))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
    assert set(first) == {"stream"}
