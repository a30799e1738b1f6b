"""``python -m tokenizers``: files and folders in, files out, one line for what is wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import refweights
import toys

import tokenizers
from tokenizers import media, pixels
from tokenizers.__main__ import main
from tokenizers.commands import files


def clip(frames, *size):
    x = refweights.image_like("command line", (1, frames, *size, 3))[0]
    return np.floor((x + 1) * 127.5 + 0.5).astype(np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A causal tokenizer, saved: what --checkpoint takes."""
    folder = tmp_path_factory.mktemp("saved") / "tokenizer"
    toys.causal().save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with two pictures of one name, one in a folder of its own, and two videos."""
    folder = tmp_path_factory.mktemp("data")
    media.write(folder / "one.png", clip(1, 18, 22)[0])
    media.write(folder / "one.jpg", clip(1, 18, 22)[0])
    media.write(folder / "deep/two.png", clip(1, 18, 22)[0])
    media.write(folder / "deep/film.mp4", clip(8, 16, 20), fps=8)
    media.write(folder / "short.mkv", clip(1, 16, 20), fps=8)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def levels(x):
    return np.asarray(pixels.to_uint8(x))


def test_list_and_describe(capsys):
    run("list")
    assert capsys.readouterr().out.split() == list(tokenizers.available())
    run("list", "--table")
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == list(tokenizers.available())
    assert ["| causal3d-fsq-488-16777216", "images, clips", "4x8x8", "16777216 codes"] in [row[:4] for row in rows]
    run("describe", tokenizers.available()[0])
    assert "compression      (4, 8, 8)" in capsys.readouterr().out


def test_a_folder_goes_to_tokens_and_back(saved, data, tmp_path):
    run("encode", data, tmp_path / "tokens", "--checkpoint", saved, "--chunk_frames", 4)
    assert names(tmp_path / "tokens") == ["deep/film.npz", "deep/two.npz", "one.jpg.npz", "one.png.npz", "short.npz"]
    tok, film = toys.causal(), media.read(data / "deep/film.mp4").pixels
    with np.load(tmp_path / "tokens/deep/film.npz") as stored:
        np.testing.assert_array_equal(stored["indices"], tok.encode(film[None]).indices[0])
        assert json.loads(str(stored["facts"]))["shape"] == [8, 16, 20, 3]
    run("decode", tmp_path / "tokens", tmp_path / "out", "--checkpoint", saved, "--chunk_frames", 4)
    assert names(tmp_path / "out") == ["deep/film.mp4", "deep/two.png", "one.jpg.png", "one.png.png", "short.mp4"]
    picture = media.read(data / "one.png").pixels
    expected = levels(tok.reconstruct(picture[None])[0])
    np.testing.assert_array_equal(media.read(tmp_path / "out/one.png.png").pixels, expected)
    restored = media.read(tmp_path / "out/deep/film.mp4")
    assert (restored.pixels.shape, restored.fps) == (film.shape, 8)
    # What H.264 makes of random weights' output, in levels of 255.
    assert np.abs(restored.pixels.astype(int) - levels(tok.reconstruct(film[None])[0])).mean() < 12


def test_reconstruct_writes_one_file_or_a_folder(saved, data, tmp_path):
    run("reconstruct", data / "one.png", tmp_path / "a.png", "--checkpoint", saved, "--side_by_side")
    picture = media.read(data / "one.png").pixels
    both = media.read(tmp_path / "a.png").pixels
    np.testing.assert_array_equal(both[:, :22], picture)
    np.testing.assert_array_equal(both[:, 22:], levels(toys.causal().reconstruct(picture[None])[0]))
    film = ("reconstruct", data / "deep/film.mp4")
    run(*film, tmp_path / "b.mkv", "--checkpoint", saved, "--chunk_frames", 4, "--side_by_side")
    assert media.read(tmp_path / "b.mkv").pixels.shape == (8, 16, 40, 3)
    run(*film, tmp_path / "folder", "--checkpoint", saved, "--chunk_frames", 4)
    assert names(tmp_path / "folder") == ["film.mp4"]


def test_a_video_through_an_image_tokenizer(monkeypatch, data, tmp_path):
    tok = toys.image()
    monkeypatch.setattr("tokenizers.__main__._load", lambda arguments: tok)
    run("encode", data / "deep/film.mp4", tmp_path / "film.npz", "--checkpoint", "-", "--chunk_frames", 3)
    film = media.read(data / "deep/film.mp4").pixels
    with np.load(tmp_path / "film.npz") as stored:
        np.testing.assert_array_equal(stored["indices"], tok.encode(film[None]).indices[0])
    run("decode", tmp_path / "film.npz", tmp_path / "film.mp4", "--checkpoint", "-", "--chunk_frames", 3)
    assert media.read(tmp_path / "film.mp4").pixels.shape == film.shape


def test_continuous_latents_are_stored_as_they_are(monkeypatch, data, tmp_path):
    tok = toys.image("continuous")
    monkeypatch.setattr("tokenizers.__main__._load", lambda arguments: tok)
    run("encode", data / "deep/film.mp4", tmp_path / "film.npz", "--checkpoint", "-")
    film = media.read(data / "deep/film.mp4").pixels
    with np.load(tmp_path / "film.npz") as stored:
        np.testing.assert_allclose(stored["latents"], tok.encode(film[None]).latents[0], atol=1e-5)
    run("decode", tmp_path / "film.npz", tmp_path / "film.mp4", "--checkpoint", "-")


def test_a_long_video_is_never_in_memory_as_a_whole():
    read = 0

    def frames():
        nonlocal read
        for frame in clip(40, 16, 20):
            read += 1
            yield frame

    tok = toys.causal()
    parts = files._encodings(tok.spec, tok, frames(), chunk_frames=4)
    next(parts)
    assert read == 5
    next(parts)
    assert read == 9


def failure(capsys, *arguments):
    """The one line that a command prints before it ends with status 2."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_what_is_wrong_is_said_in_one_line(saved, data, tmp_path, capsys):
    def fails(*arguments):
        return failure(capsys, *arguments, "--checkpoint", saved)

    assert "does not exist" in fails("encode", data / "nothing", tmp_path)
    assert "unknown file ending '.txt'" in fails("encode", data / "notes.txt", tmp_path / "a.npz")
    assert "holds no file with one of the endings .npz" in fails("decode", data, tmp_path)
    assert "was not written by" in fails("decode", data / "one.png", tmp_path / "a.png")
    assert "end in .npz" in fails("encode", data / "one.png", tmp_path / "a.tokens")
    assert "a picture cannot be written" in fails("reconstruct", data / "one.png", tmp_path / "a.mp4")
    assert "is the input itself" in fails("reconstruct", data / "one.png", data / "one.png")
    assert "unknown precision 'bf16'" in fails("encode", data, tmp_path, "--precision", "bf16")
    assert "not a positive number" in fails("encode", data, tmp_path, "--chunk_frames", "0")
    assert "invalid choice: 'recon'" in failure(capsys, "recon")
    assert "unknown variant" in failure(capsys, "describe", "cosal")
    assert "are required: --checkpoint" in failure(capsys, "encode", data, tmp_path)
    assert not names(tmp_path)


def test_tokens_of_another_tokenizer_are_refused(saved, data, tmp_path, capsys):
    run("encode", data / "one.png", tmp_path / "one.npz", "--checkpoint", saved)
    message = failure(capsys, "decode", tmp_path / "one.npz", tmp_path / "a.png", "--checkpoint", toys.run())
    assert "its compression is [2, 4, 4], that of the given one [2, 8, 8]" in message


def test_one_bad_file_does_not_stop_the_others(saved, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/bad.png").write_bytes(b"no picture")
    command = ("reconstruct", tmp_path / "data", tmp_path / "out", "--checkpoint", saved, "--chunk_frames", 4)
    assert main([*map(str, command)]) == 2
    assert "1 of 6 files were left out, the first: " in capsys.readouterr().err
    assert len(names(tmp_path / "out")) == 5


def test_convert_makes_a_folder_of_a_run(tmp_path, capsys):
    run("convert", toys.run(), tmp_path / "folder")
    assert "compression (2, 8, 8)" in capsys.readouterr().out
    one, other = (tokenizers.load(path) for path in (toys.run(), tmp_path / "folder"))
    np.testing.assert_array_equal(
        one.params["decoder"]["conv_in"]["kernel"], other.params["decoder"]["conv_in"]["kernel"]
    )
    assert "is not empty" in failure(capsys, "convert", toys.run(), tmp_path / "folder")


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(5):
        media.write(tmp_path / f"photographs/{number}.png", rng.integers(0, 256, (20, 24, 3)).astype(np.uint8))
    (tmp_path / "photographs/broken.png").write_bytes(b"no picture")
    return tmp_path / "photographs"


def tokenize(source, target, saved):
    sizes = ("--size", 16, 16, "--batch_size", 2, "--shard_items", 2)
    return ("tokenize-dataset", source, target, "--checkpoint", saved, *sizes)


def read_shards(folder):
    shards = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    return {key: np.concatenate([shard[key] for shard in shards]) for key in ("indices", "names")}


def test_a_data_set_becomes_shards_of_tokens(saved, photographs, tmp_path, capsys):
    run(*tokenize(photographs, tmp_path / "tokens", saved))
    assert "5 items in 3 shards, 1 unusable" in capsys.readouterr().out
    found = read_shards(tmp_path / "tokens")
    assert [name.rsplit("/", 1)[1] for name in found["names"]] == [f"{number}.png" for number in range(5)]
    assert found["indices"].shape == (5, 4, 4)
    cropped = files.media.read(photographs / "3.png").pixels
    assert cropped.shape == (20, 24, 3)
    assert len(np.unique(found["indices"])) > 1


def test_an_interrupted_data_set_goes_on_and_a_finished_one_stays(saved, photographs, tmp_path, capsys):
    run(*tokenize(photographs, tmp_path / "whole", saved))
    run(*tokenize(photographs, tmp_path / "part", saved))
    (tmp_path / "part/tokens-00001.npz").unlink()
    (tmp_path / "part/tokens-00002.npz").unlink()
    about = json.loads((tmp_path / "part/dataset.json").read_text())
    for key in ("items", "unusable", "complete"):
        del about[key]
    (tmp_path / "part/dataset.json").write_text(json.dumps(about))
    first = (tmp_path / "part/tokens-00000.npz").stat().st_mtime_ns
    capsys.readouterr()
    run(*tokenize(photographs, tmp_path / "part", saved))
    assert "5 items in 3 shards, 1 unusable" in capsys.readouterr().out
    assert (tmp_path / "part/tokens-00000.npz").stat().st_mtime_ns == first
    whole, part = read_shards(tmp_path / "whole"), read_shards(tmp_path / "part")
    for key in whole:
        np.testing.assert_array_equal(whole[key], part[key])
    before = {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in names(tmp_path / "part")}
    run(*tokenize(photographs, tmp_path / "part", saved))
    assert before == {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in names(tmp_path / "part")}


def test_a_folder_with_other_tokens_is_not_touched(saved, photographs, tmp_path, capsys):
    run(*tokenize(photographs, tmp_path / "tokens", saved))
    media.write(photographs / "9.png", np.zeros((16, 16, 3), np.uint8))
    assert "made in another way (data: " in failure(capsys, *tokenize(photographs, tmp_path / "tokens", saved))
    assert "is not empty and holds no dataset.json" in failure(capsys, *tokenize(photographs, photographs, saved))
    wrong = [18 if argument == 16 else argument for argument in tokenize(photographs, tmp_path / "other", saved)]
    assert "heights must be multiples of 4" in failure(capsys, *wrong)


def test_the_module_runs():
    command = [sys.executable, "-m", "tokenizers", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=toys.ROOT)
    assert done.stdout.split() == list(tokenizers.available())


def test_numbered_pictures_are_a_video(saved, tmp_path):
    film = clip(6, 16, 20)
    for number, frame in enumerate(film):
        media.write(tmp_path / f"in/{number + 8:04}.png", frame)
    (tmp_path / "in/notes.png").write_text("no number")
    pattern = tmp_path / "in/%04d.png"
    np.testing.assert_array_equal(media.read(pattern).pixels, film)
    run("reconstruct", pattern, tmp_path / "out/%03d.png", "--checkpoint", saved, "--chunk_frames", 4)
    assert names(tmp_path / "out") == [f"{number:03}.png" for number in range(1, 7)]
    expected = levels(toys.causal().reconstruct(film[None])[0])
    np.testing.assert_array_equal(media.read(tmp_path / "out/%03d.png").pixels, expected)
    assert main(["reconstruct", str(tmp_path / "none/%04d.png"), str(tmp_path / "x"), "--checkpoint", str(saved)]) == 2


def test_tokens_can_be_safetensors(saved, data, tmp_path):
    options = ("--checkpoint", saved)
    run("encode", data / "deep", tmp_path / "tokens", *options, "--format", "safetensors")
    assert names(tmp_path / "tokens") == ["film.safetensors", "two.safetensors"]
    run("decode", tmp_path / "tokens", tmp_path / "out", *options)
    expected = levels(toys.causal().reconstruct(media.read(data / "deep/two.png").pixels[None])[0])
    np.testing.assert_array_equal(media.read(tmp_path / "out/two.png").pixels, expected)
    assert media.read(tmp_path / "out/film.mp4").pixels.shape == (8, 16, 20, 3)
    (tmp_path / "tokens/film.safetensors").write_bytes(b"broken")
    assert main(["decode", str(tmp_path / "tokens/film.safetensors"), str(tmp_path / "x"), *map(str, options)]) == 2


def test_large_frames_pass_in_tiles(saved, data, tmp_path):
    options = ("--checkpoint", saved, "--tile", 8, 8, "--tile_overlap", 4)
    run("reconstruct", data / "one.png", tmp_path / "one.png", *options)
    expected = toys.causal().tiled(8, overlap=4).reconstruct(media.read(data / "one.png").pixels[None])[0]
    np.testing.assert_array_equal(media.read(tmp_path / "one.png").pixels, levels(expected))
    run("reconstruct", data / "deep/film.mp4", tmp_path / "film.mp4", *options)
    assert media.read(tmp_path / "film.mp4").pixels.shape == (8, 16, 20, 3)
