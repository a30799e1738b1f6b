"""Pictures and videos survive the way to a file and back; what cannot be read or written says so."""

import numpy as np
import pytest
import refweights
from PIL import Image

from tokenizers import media


def frames(count, height, width):
    x = refweights.image_like("media", (1, count, height, width, 3))[0]
    return np.floor((x + 1) * 127.5 + 0.5).astype(np.uint8)


def test_a_picture_survives(tmp_path):
    picture = frames(1, 20, 30)[0]
    media.write(tmp_path / "new/picture.png", picture)
    item = media.read(tmp_path / "new/picture.png")
    np.testing.assert_array_equal(item.pixels, picture)
    assert item.fps == 0


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)], ids=["even", "odd"])
@pytest.mark.parametrize("ending", media.WRITABLE_VIDEOS)
def test_a_video_keeps_size_length_and_rate(ending, height, width, tmp_path):
    t, y, x = np.meshgrid(np.arange(5) * 10, np.arange(height), np.arange(width), indexing="ij")
    clip = np.stack([60 + 2 * x + t, 60 + 2 * y, 200 - x - y], axis=-1).astype(np.uint8)  # smooth
    media.write(tmp_path / f"clip{ending}", clip, fps=30000 / 1001)
    item = media.read(tmp_path / f"clip{ending}")
    assert item.pixels.shape == clip.shape
    assert item.fps == pytest.approx(30000 / 1001, rel=1e-3)
    # Conversion to luma and chroma in 8 bits, H.264 at high quality: a level or two of 255.
    assert np.abs(item.pixels.astype(int) - clip).mean() < 2


def test_a_video_is_read_and_written_frame_by_frame(tmp_path):
    clip = frames(6, 32, 32)
    with media.VideoWriter(tmp_path / "clip.mp4", 8) as writer:
        for start in range(0, 6, 2):
            writer.add(clip[start : start + 2])
    with media.open_video(tmp_path / "clip.mp4") as video:
        assert (video.fps, video.frames) == (8, 6)
        first = next(iter(video))
        assert (first.shape, first.dtype) == ((32, 32, 3), np.uint8)
        assert len(list(video)) == 5


def test_an_animation_is_a_video(tmp_path):
    pictures = [Image.fromarray(frame) for frame in frames(3, 17, 19)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    item = media.read(tmp_path / "a.gif")
    assert item.pixels.shape == (3, 17, 19, 3)
    assert item.fps == pytest.approx(10)


def test_an_error_leaves_no_half_written_video(tmp_path):
    def write():
        with media.VideoWriter(tmp_path / "clip.mp4", 8) as writer:
            writer.add(frames(2, 16, 16))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"no picture", "not a readable image"),
        ("a.mp4", b"no video", "not a readable video"),
        ("a.mp3", b"", "unknown file ending '.mp3'. Did you mean '.mp"),
    ],
)
def test_unreadable_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        media.read(tmp_path / name)
    assert name.split(".")[1] in str(error.value)


@pytest.mark.parametrize(("name", "shape"), [("a.mp4", (8, 8, 3)), ("a.png", (2, 8, 8, 3)), ("a.gif", (2, 8, 8, 3))])
def test_endings_that_cannot_be_written_are_refused(name, shape, tmp_path):
    with pytest.raises(ValueError, match="cannot be written with that ending. Accepted: "):
        media.write(tmp_path / name, np.zeros(shape, np.uint8))
    assert not (tmp_path / name).exists()
