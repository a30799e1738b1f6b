"""Every source format gives back what was put in, and damaged shards lose only what is damaged."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from test_data_decode import numbers, photo_bytes, write_video

from tokenizers.data import shards
from tokenizers.data.decode import decode_clip, decode_image
from tokenizers.data.records import Record, Unusable
from tokenizers.data.sources import open_source

PHOTOS = [photo_bytes(seed) for seed in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def content(record: Record) -> bytes:
    if isinstance(record.data, bytes):
        return record.data
    with open(record.data, "rb") as file:
        return file.read()


def write_tar(path, members: list[tuple[str, bytes]], mode="w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def check(source, captions: list[str] | None = None, kind: str = "image") -> None:
    """The source holds the photos in order, also after a trip to a worker process."""
    for one in (source, pickle.loads(pickle.dumps(source))):
        assert one.kind == kind
        assert [content(one[i]) for i in range(len(one))] == PHOTOS
        assert all(one.name(i) in one[i].name for i in range(len(one)))
        assert one.has_captions == bool(captions)
        if captions:
            assert [one[i].caption for i in range(len(one))] == captions


def test_image_folder_is_recursive_sorted_and_follows_links(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "b", data / ".hidden", elsewhere):
        folder.mkdir(parents=True)
    for number, name in enumerate(["a1.png", "a2.PNG", "b/1.jpeg", "b/2.png"]):
        (data / name).write_bytes(PHOTOS[number])
    for number in (4, 5):
        (elsewhere / f"{number}.png").write_bytes(PHOTOS[number])
    (data / "c").symlink_to(elsewhere)
    (data / "b" / "loop").symlink_to(data)
    (data / ".DS_Store.png").write_bytes(b"junk")
    (data / ".hidden" / "x.png").write_bytes(b"junk")
    (data / "notes.md").write_text("not an image")
    check(open_source("images", str(data)))
    check(open_source("auto", str(data)))
    assert len(open_source("images", str(data / "*.png"))) == 1
    assert len(open_source("auto", str(data / "a1.png"))) == 1


def test_video_folder(tmp_path):
    for number in range(3):
        write_video(str(tmp_path / f"{number}.mp4"), 4, first=number)
    source = open_source("auto", str(tmp_path))
    assert source.kind == "video"
    assert [numbers(decode_clip(source[i].data, 1)) for i in range(3)] == [[0], [1], [2]]


def test_captions_beside_the_images(tmp_path):
    for number, photo in enumerate(PHOTOS):
        (tmp_path / f"{number}.png").write_bytes(photo)
        (tmp_path / f"{number}.txt").write_text(f"photo {number}\n")
    (tmp_path / "without.png").write_bytes(PHOTOS[0])
    source = open_source("auto", str(tmp_path))
    check(source, [f"photo {n}" for n in range(6)])
    assert source.dropped == [(str(tmp_path / "without.png"), "no caption")]


def test_captions_in_a_metadata_file(tmp_path):
    (tmp_path / "train").mkdir()
    lines = []
    for number, photo in enumerate(PHOTOS):
        (tmp_path / "train" / f"{number}.png").write_bytes(photo)
        lines.append(json.dumps({"file_name": f"train/{number}.png", "text": f"photo {number}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    check(open_source("auto", str(tmp_path)), [f"photo {n}" for n in range(6)])
    (tmp_path / "metadata.jsonl").write_text('{"file": 1}')
    with pytest.raises(ValueError, match="metadata.jsonl, line 1"):
        open_source("captions", str(tmp_path))


def test_tar_shards_with_text_and_json_captions(tmp_path):
    members = []
    for number in range(3):
        members += [(f"a/{number}.png", PHOTOS[number]), (f"a/{number}.txt", f"photo {number}".encode())]
    write_tar(tmp_path / "0.tar", members)
    members = [("._junk.png", b"junk")]
    for number in range(3, 6):
        caption = json.dumps({"caption": f"photo {number}"}).encode()
        members += [(f"{number}.json", caption), (f"{number}.png", PHOTOS[number])]
    write_tar(tmp_path / "1.tar", members)
    check(open_source("auto", str(tmp_path)), [f"photo {n}" for n in range(6)])


def test_tar_shards_are_indexed_once_and_again_when_they_change(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    write_tar(path, [(f"{n}.png", photo) for n, photo in enumerate(PHOTOS)])
    check(open_source("tar", str(path)))
    assert (tmp_path / "0.tar.index.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_scan_tar", lambda path: pytest.fail("scanned again"))
        check(open_source("tar", str(path)))
    write_tar(path, [("only.png", PHOTOS[0])])
    assert len(open_source("tar", str(path))) == 1
    (tmp_path / "0.tar.index.json").write_text("{cut off")
    assert len(open_source("tar", str(path))) == 1


def test_the_index_of_a_read_only_folder_goes_to_the_cache(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    write_tar(path, [(f"{n}.png", photo) for n, photo in enumerate(PHOTOS)])
    real = shards.write_atomically

    def read_only(place, data):
        if os.path.dirname(place) == str(tmp_path):
            raise PermissionError(place)
        real(place, data)

    monkeypatch.setattr(shards, "write_atomically", read_only)
    check(open_source("tar", str(path)))
    assert sorted(os.listdir(tmp_path)) == ["0.tar"]
    monkeypatch.setattr(shards, "_scan_tar", lambda path: pytest.fail("scanned again"))
    check(open_source("tar", str(path)))


def test_a_damaged_tar_keeps_the_samples_before_the_damage(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, [(f"{n}.png", photo) for n, photo in enumerate(PHOTOS)])
    whole = path.read_bytes()
    last = whole.rindex(PHOTOS[-1])
    path.write_bytes(whole[: last + 100])
    source = open_source("tar", str(path))
    assert "cut off" in source.dropped[0][1] or "damaged" in source.dropped[0][1]
    assert [content(source[i]) for i in range(5)] == PHOTOS[:5]
    if len(source) == 6:
        with pytest.raises(Unusable, match="ends within"):
            source[5]
    third = whole.rindex(PHOTOS[3]) - 512
    path.write_bytes(whole[:third] + b"\x01" * 512 + whole[third + 512 :])
    source = open_source("tar", str(path))
    assert "damaged after 3 samples" in source.dropped[0][1]
    assert [content(source[i]) for i in range(3)] == PHOTOS[:3]


def test_compressed_tars_are_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", PHOTOS[0])], "w:gz")
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        open_source("tar", str(tmp_path))


@pytest.mark.parametrize("layout", ["struct", "binary"])
def test_parquet(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(shards.ParquetSource, "kept_row_groups", 1)
    for part in range(2):
        rows = PHOTOS[3 * part : 3 * part + 3]
        column = rows if layout == "binary" else [{"bytes": row, "path": None} for row in rows]
        table = pa.table({"id": [1, 2, 3], "image": column, "text": [f"photo {3 * part + n}" for n in range(3)]})
        parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=2)
    check(open_source("auto", str(tmp_path)), [f"photo {n}" for n in range(6)])
    (tmp_path / "2.parquet").write_bytes(b"PAR1 not really")
    source = open_source("parquet", str(tmp_path))
    assert len(source) == 6
    assert "not a readable Parquet file" in source.dropped[0][1]


def test_parquet_without_a_pixel_column_lists_what_it_has(tmp_path):
    parquet.write_table(pa.table({"picture": [b"x"]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="it has picture; accepted: image"):
        open_source("parquet", str(tmp_path))


def test_array_record_of_records_and_of_bare_bytes(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(tmp_path / "0.array_record")
    records = [Record("image", photo, f"{n}.png", f"photo {n}") for n, photo in enumerate(PHOTOS)]
    assert shards.write_array_record(path, records) == 6
    source = open_source("auto", str(tmp_path))
    check(source, [f"photo {n}" for n in range(6)])
    assert source[2].name.endswith("(2.png)")
    bare = str(tmp_path / "bare.arrayrecord")
    writer = ArrayRecordWriter(bare, "group_size:1")
    for photo in PHOTOS:
        writer.write(photo)
    writer.close()
    check(open_source("array_record", bare))
    damaged = str(tmp_path / "damaged.arrayrecord")
    writer = ArrayRecordWriter(damaged, "group_size:1")
    for entry in (b"TKR\x01\x05\x00\x00\x00{junk", b"TKR\x01", PHOTOS[0]):
        writer.write(entry)
    writer.close()
    source = open_source("array_record", damaged)
    for index in (0, 1):
        with pytest.raises(Unusable, match="damaged header"):
            source[index]
    assert source[2].data == PHOTOS[0]
    (tmp_path / "1.array_record").write_bytes(b"x" * 100)
    source = open_source("array_record", str(tmp_path / "?.array_record"))
    assert len(source) == 6
    assert "not a readable ArrayRecord" in source.dropped[0][1]


def test_clips_survive_tar_and_array_record(tmp_path):
    buffer = io.BytesIO()
    write_video(buffer, 8, container="mp4")
    write_tar(tmp_path / "0.tar", [("clip.mp4", buffer.getvalue())])
    record = Record("video", buffer.getvalue(), "clip")
    shards.write_array_record(str(tmp_path / "0.array_record"), [record])
    for kind in ("tar", "array_record"):
        source = open_source(kind, str(tmp_path))
        assert source.kind == "video"
        assert numbers(decode_clip(source[0].data, 4, stride=2)) == [0, 2, 4, 6]


def test_errors_say_what_was_found_and_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'images'"):
        open_source("image", str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        open_source("images", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="no images in .*found no files"):
        open_source("images", str(tmp_path))
    with pytest.raises(ValueError, match="needs a path"):
        open_source("auto", "")
    with pytest.raises(ValueError, match="has no path"):
        open_source("embedded", str(tmp_path))
    (tmp_path / "a.png").write_bytes(PHOTOS[0])
    write_video(str(tmp_path / "a.mp4"), 2)
    with pytest.raises(ValueError, match="found 1 image, 1 video.*name its kind"):
        open_source("auto", str(tmp_path))
    assert np.asarray(decode_image(open_source("images", str(tmp_path))[0].data)).shape == (40, 56, 3)
