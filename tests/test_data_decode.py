"""Whatever a file holds, what comes out is upright uint8 RGB, and clips have the frames that were asked for."""

import functools
import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import reference
from PIL import Image

from tokenizers.data.decode import decode_clip, decode_image, probe, spread_frames
from tokenizers.data.records import Record, Unusable

# Frame n of a test video is uniformly gray with level 16 + 8 n; lossy coding moves a flat level by less than 4.
BASE, STEP = 16, 8


def image_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo_bytes(seed: int, size: tuple[int, int] = (40, 56), kind: str = "PNG") -> bytes:
    """A random coloured image whose pixels differ from those of every other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return image_bytes(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC), kind)


def write_video(
    target, frames: int, rate=10, codec="mpeg4", size=(48, 64), times=None, container=None, gop=6, first=0, bframes=0
) -> None:
    """A video whose frames carry their number as gray level; ``times`` in milliseconds makes the rate variable."""
    with av.open(target, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, options={"g": str(gop), "bf": str(bframes)})
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            level = BASE + STEP * (number + first)
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), "rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


def numbers(clip: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - BASE) / STEP) for frame in clip]


def test_gray_is_repeated_and_palette_and_one_bit_are_expanded():
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    out = decode_image(image_bytes(gray))
    assert out.dtype == np.uint8
    assert out.shape == (16, 16, 3)
    np.testing.assert_array_equal(out[..., 0], np.asarray(gray))
    np.testing.assert_array_equal(out, decode_image(image_bytes(gray.convert("P"))))
    assert set(np.unique(decode_image(image_bytes(gray.convert("1"))))) == {0, 255}


def test_sixteen_bit_gray_is_scaled_not_clipped():
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        out = decode_image(image_bytes(Image.fromarray(deep), kind))
        np.testing.assert_array_equal(out[..., 1], np.arange(256, dtype=np.uint8).reshape(16, 16))


def test_pixels_without_a_value_range_are_refused():
    with pytest.raises(Unusable, match="value range"):
        decode_image(image_bytes(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))


def test_transparency_is_composited_on_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:2, :, 3], pixels[2:, :, 3] = 255, 0
    out = decode_image(image_bytes(Image.fromarray(pixels)))
    assert (out[:2] == [200, 0, 0]).all()
    assert (out[2:] == 255).all()


def test_cmyk_jpeg_has_the_right_colours():
    red = Image.new("RGB", (16, 16), (220, 30, 30)).convert("CMYK")
    out = decode_image(image_bytes(red, "JPEG", quality=95))
    # JPEG's quantisation at this quality moves a flat colour by a few levels; swapped or inverted inks by 100 or more.
    assert np.abs(out.astype(int) - [220, 30, 30]).max() < 12


def test_channel_order_of_jpeg_and_png_is_rgb():
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        out = decode_image(image_bytes(Image.new("RGB", (16, 16), (250, 120, 10)), kind))
        assert np.abs(out.astype(int) - [250, 120, 10]).max() < 8, kind


def test_exif_orientation_is_applied_and_known_to_the_probe():
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 0, 0), (0, 0, 8, 16))  # The left quarter is red ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... and turning by 90 degrees clockwise puts it on top.
    data = image_bytes(image, "JPEG", exif=exif, quality=95)
    out = decode_image(data)
    assert out.shape == (32, 16, 3)
    assert out[:6, :, 0].min() > 200
    assert out[10:, :, 0].max() < 60
    assert probe(Record("image", data, "x")) == (32, 16)


def test_decoding_smaller_keeps_what_the_caller_needs():
    data = photo_bytes(0, (512, 640), "JPEG")
    out = decode_image(data, at_least=(32, 48))
    assert 96 <= out.shape[0] < 512
    assert 96 <= out.shape[1] < 640


@pytest.mark.parametrize("cut", [0, 1, 20, 400])
def test_a_damaged_image_is_unusable(cut):
    data = photo_bytes(1)
    for damaged in (data[:cut], b"no image" + data[cut:]):
        with pytest.raises(Unusable, match="not a readable image"):
            decode_image(damaged)


@pytest.mark.parametrize(
    ("container", "codec", "bframes"),
    [("mp4", "mpeg4", 2), ("mp4", "libx264", 2), ("matroska", "mpeg4", 0), ("avi", "mpeg4", 0), ("mpegts", "mpeg4", 2)],
)
def test_native_clips_are_consecutive_frames_from_every_start(container, codec, bframes):
    buffer = io.BytesIO()
    write_video(buffer, 20, codec=codec, container=container, bframes=bframes)
    starts = set()
    for seed in range(12):
        got = numbers(decode_clip(buffer.getvalue(), 4, stride=2, rng=np.random.default_rng(seed)))
        assert got == list(range(got[0], got[0] + 8, 2)), got
        starts.add(got[0])
    assert min(starts) <= 3
    assert max(starts) >= 10
    assert len(starts) >= 6
    assert numbers(decode_clip(buffer.getvalue(), 5)) == [0, 1, 2, 3, 4]
    assert numbers(decode_clip(buffer.getvalue(), 20)) == list(range(20))


def test_a_stream_without_time_stamps_is_read_by_counting():
    buffer = io.BytesIO()
    write_video(buffer, 20, codec="libx264", container="h264")
    assert numbers(decode_clip(buffer.getvalue(), 4, stride=3)) == [0, 3, 6, 9]
    got = numbers(decode_clip(buffer.getvalue(), 4, rng=np.random.default_rng(3)))
    assert got == list(range(got[0], got[0] + 4))


@pytest.mark.parametrize(
    ("fps", "stride", "expected"),
    [
        (10.0, 1, [0, 1, 2, 3, 4]),  # the video's own rate
        (5.0, 1, [0, 2, 4, 6, 8]),  # every second frame
        (20.0, 2, [0, 1, 2, 3, 4]),  # frames repeated, then dropped again
        (20.0, 1, [0, 0, 1, 1, 2]),  # frames repeated; halfway between two the earlier one
        (4.0, 1, [0, 2, 5, 7, 10]),  # 0, 2.5, 5, 7.5, 10: halfway between two the earlier one
        (2.5, 1, [0, 4, 8, 12, 16]),
    ],
)
def test_resampling_takes_the_frames_nearest_in_time(fps, stride, expected):
    buffer = io.BytesIO()
    write_video(buffer, 20, container="mp4")
    assert numbers(decode_clip(buffer.getvalue(), 5, fps=fps, stride=stride)) == expected


@pytest.mark.parametrize("name", reference.cases("vidtok", "frame_sampling"))
def test_spread_frames_are_the_ones_that_vidtok_trains_on(name):
    case = reference.Case("vidtok", name)
    for number, call in enumerate(case.meta["calls"]):
        total, frames = call["total_frames"], call["sample_num_frames"]
        expected = case.outputs[f"frame_idx_{number}"]
        room = case.outputs.get(f"randint_bounds_{number}", (0, total))[1]
        offset = call.get("start_index", 0)  # given, not drawn: the same clip of the video's rest
        draw = (call.get("forced_random_start", 0) + 0.5) / (room + 1) if room > 0 else 0.9
        draw = 0.0 if "start_index" in call else draw
        got = spread_frames(total - offset, call["video_fps"], frames, call["sample_fps"], draw) + offset
        np.testing.assert_array_equal(got, expected)


def test_spread_sampling_reads_those_frames_and_repeats_the_last_of_a_short_video():
    buffer = io.BytesIO()
    write_video(buffer, 20, container="mp4")  # ten frames a second
    read = functools.partial(decode_clip, buffer.getvalue(), sampling="spread")
    assert numbers(read(5, fps=5.0)) == [0, 2, 4, 6, 9]
    assert numbers(read(5, fps=5.0, rng=np.random.default_rng(0))) == [7, 9, 11, 13, 16]
    assert numbers(read(6, fps=1.0)) == [0, 3, 7, 11, 15, 19]
    assert numbers(read(22)) == [*range(20), 19, 19]
    with pytest.raises(ValueError, match="frame sampling"):
        read(5, sampling="spraed")


def test_resampling_follows_variable_time_stamps():
    # The second half runs at half the rate of the first: by time, not by frame number.
    times = [100 * n for n in range(10)] + [1000 + 200 * n for n in range(10)]
    buffer = io.BytesIO()
    write_video(buffer, 20, rate=1000, times=times, container="matroska")
    assert numbers(decode_clip(buffer.getvalue(), 6, fps=2.5)) == [0, 4, 8, 11, 13, 15]


@pytest.mark.parametrize("options", [{}, {"fps": 5.0}, {"fps": 30.0}])
def test_too_short_and_damaged_videos_are_unusable(options):
    buffer = io.BytesIO()
    write_video(buffer, 6, container="mp4")
    with pytest.raises(Unusable, match="too short: 6 frames"):
        decode_clip(buffer.getvalue(), 30, **options)
    with pytest.raises(Unusable, match="no video stream|not a readable video"):
        decode_clip(buffer.getvalue()[: len(buffer.getvalue()) // 2], 2, **options)
    with pytest.raises(Unusable):
        decode_clip(b"", 2, **options)


def test_a_video_cut_off_after_its_index_is_not_filled_up():
    buffer = io.BytesIO()
    write_video(buffer, 24, container="matroska")
    data = buffer.getvalue()
    with pytest.raises(Unusable):
        decode_clip(data[: len(data) // 2], 24)


def test_a_phone_video_is_turned_upright():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :16] = 255  # The left quarter is white ...
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")), *stream.encode()]:
            out.mux(packet)
    data = bytearray(buffer.getvalue())
    # ... and the track's matrix turns by 90 degrees clockwise, which puts it on top. 36 bytes, 40 into the header box.
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    clip = decode_clip(bytes(data), 1)
    assert clip.shape == (1, 64, 48, 3)
    assert clip[0, :12].min() > 200
    assert clip[0, 20:].max() < 60
    assert probe(Record("video", bytes(data), "x")) == (64, 48)


def test_video_colours_are_rgb_in_full_range():
    for codec in ("mpeg4", "libx264"):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as out:
            stream = out.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for colour in ([250, 120, 10], [255, 255, 255], [0, 0, 0]):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, np.uint8), "rgb24")
                for packet in stream.encode(frame):
                    out.mux(packet)
            for packet in stream.encode():
                out.mux(packet)
        clip = decode_clip(buffer.getvalue(), 3).astype(int).mean((1, 2))
        # Coding in limited-range YUV costs a few levels; a wrong range costs 16, a swapped channel 240.
        np.testing.assert_allclose(clip, [[250, 120, 10], [255, 255, 255], [0, 0, 0]], atol=8)


def test_large_videos_are_reduced_while_decoding():
    buffer = io.BytesIO()
    write_video(buffer, 3, container="mp4", size=(480, 640))
    assert decode_clip(buffer.getvalue(), 3, at_least=(64, 48)).shape == (3, 128, 171, 3)
    assert decode_clip(buffer.getvalue(), 3, at_least=(400, 400)).shape == (3, 480, 640, 3)
