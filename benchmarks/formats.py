"""Decoded frames per second by format: the same pictures and clips, as every format that the data layer reads.

    python benchmarks/formats.py [--formats jpeg h264 ...] [--size 64 64] [--frames 9] [--batch 8]
        [--workers 0 1 2] [--batches 20] [--picture 512 512] [--video 480 640] [--seconds 2.5]

Photographs of scikit-image, scaled to ``--picture``, and clips of a virtual camera over them, of ``--video`` pixels at
24 frames per second, are written to a temporary folder. A batch is what training reads: random crops of pictures, or a
clip of ``--frames`` frames from a random place of a video, at ``--size``. Columns:

    KiB           of a picture or video
    CPU, ms       of a frame, of all threads without workers; hardly depends on what else the machine does
    frames/s      by number of worker processes; 0: threads of this one
"""

import argparse
import io
import os
import pathlib
import sys
import tarfile
import tempfile

os.environ.setdefault("SVT_LOG", "1")  # errors alone

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tokenizers.data import camera, embedded  # noqa: E402
from tokenizers.data.benchmark import measure  # noqa: E402
from tokenizers.data.records import Record  # noqa: E402
from tokenizers.data.shards import write_array_record  # noqa: E402

RATE = 24
# Name: (ending, options of Pillow).
PICTURES = {
    "jpeg": (".jpg", {"quality": 92}),
    "png": (".png", {}),
    "webp": (".webp", {"quality": 90}),
    "avif": (".avif", {"quality": 80}),
    "bmp": (".bmp", {}),
}
# Name: (ending, encoder of FFmpeg, its options).
VIDEOS = {
    "h264": (".mp4", "libx264", {"crf": "20", "preset": "fast"}),
    "h265": (".mp4", "libx265", {"crf": "22", "preset": "fast", "x265-params": "log-level=error"}),
    "vp9": (".webm", "libvpx-vp9", {"crf": "30", "b": "0", "cpu-used": "5"}),
    "av1": (".mkv", "libsvtav1", {"crf": "30", "preset": "8", "svtav1-params": "lp=2"}),
    "mpeg4": (".avi", "mpeg4", {"q:v": "4"}),
    "mjpeg": (".mov", "mjpeg", {"q:v": "3"}),
    "gif": (".gif", "gif", {}),
}
# Name: (its files, how they are bundled).
SHARDS = {
    "tar of jpeg": ("jpeg", "tar"),
    "parquet of jpeg": ("jpeg", "parquet"),
    "array_record of jpeg": ("jpeg", "array_record"),
    "tar of h264": ("h264", "tar"),
    "array_record of h264": ("h264", "array_record"),
}
MADE = ("embedded", "shapes")
FORMATS = (*MADE, *PICTURES, *VIDEOS, *SHARDS)


def write_pictures(folder, name, size):
    ending, options = PICTURES[name]
    for number, source in enumerate(embedded.TRAIN):
        photograph = Image.fromarray(embedded.photograph(source)).resize(size[::-1])
        photograph.save(folder / f"{number:03}{ending}", **options)


def write_videos(folder, name, size, frames):
    ending, encoder, options = VIDEOS[name]
    sources = embedded.TRAIN[:6]
    for number, (photo, cutouts) in enumerate(zip(sources, sources[::-1], strict=True)):
        pictures = [embedded.photograph(name) for name in (photo, cutouts)]
        clip = camera.virtual_camera_clip(*pictures, frames, size, np.random.default_rng(number))
        with av.open(str(folder / f"{number:03}{ending}"), "w") as container:
            stream = container.add_stream(encoder, rate=RATE, options=options)
            stream.height, stream.width = size
            stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(name, "yuv420p")
            for frame in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def bundle(files, kind, target):
    """One shard of all files; parquet in groups of ten rows."""
    if kind == "tar":
        with tarfile.open(target, "w") as archive:
            for file in files:
                entry = tarfile.TarInfo(file.name)
                entry.size = file.stat().st_size
                archive.addfile(entry, io.BytesIO(file.read_bytes()))
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({"image": [file.read_bytes() for file in files]})
        parquet.write_table(table, target, row_group_size=10)
    else:
        medium = "video" if files[0].suffix == ".mp4" else "image"
        write_array_record(str(target), [Record(medium, file.read_bytes(), file.name) for file in files])


def written(name, root, options):
    """(folder of a format, KiB of an item); written when it is first asked for."""
    folder = root / name.replace(" ", "_")
    if name in SHARDS:
        inner, kind = SHARDS[name]
        source, kib = written(inner, root, options)
        folder.mkdir(exist_ok=True)
        bundle(sorted(source.iterdir()), kind, folder / f"shard.{kind}")
        return folder, kib
    if not folder.exists():
        folder.mkdir()
        if name in PICTURES:
            write_pictures(folder, name, options.picture)
        else:
            write_videos(folder, name, options.video, round(options.seconds * RATE))
    sizes = [file.stat().st_size for file in folder.iterdir()]
    return folder, sum(sizes) / len(sizes) / 2**10


def rows(name, root, options):
    """Lines of the table: pictures, and clips where a format has them."""
    video = name in VIDEOS or name.endswith("h264")
    config = {"source": name, "path": "", "held_out": "", "virtual_camera": True, "drawings": 1_000}
    kib = 0.0
    if name not in MADE:
        folder, kib = written(name, root, options)
        config |= {"source": "auto", "path": str(folder)}
    for frames in {"embedded": (1, options.frames)}.get(name, (options.frames if video else 1,)):
        batch = options.batch if frames > 1 else options.batch * options.frames  # as many frames
        stream = {"frames": frames, "resolutions": (tuple(options.size),), "batch_size": batch}
        found = [measure(config | {"streams": {"all": stream}}, n, options.batches) for n in options.workers]
        own = [f["cpu_seconds_per_frame"] for f, n in zip(found, options.workers, strict=True) if n == 0]
        kind = "virtual camera" if frames > 1 and not video else "clips" if video else "pictures"
        speeds = " | ".join(f"{f['frames_per_second']:.0f}" for f in found)
        cpu = f"{1e3 * own[0]:.1f}" if own else ""
        print(f"| {name} | {kind} | {kib:.0f} | {cpu} | {speeds} |", flush=True)
        assert not any(f["skipped"] for f in found), found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), help="height and width of a batch")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8, help="clips; of pictures as many as these have frames")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--picture", type=int, nargs=2, default=(512, 512), help="height and width of the files")
    parser.add_argument("--video", type=int, nargs=2, default=(480, 640))
    parser.add_argument("--seconds", type=float, default=2.5, help="of a video")
    options = parser.parse_args()
    print(f"| format | | KiB | CPU, ms | {' | '.join(f'{n} workers' for n in options.workers)} |")
    print("|---|---|---|---|" + "---|" * len(options.workers))
    with tempfile.TemporaryDirectory() as root:
        for name in options.formats:
            rows(name, pathlib.Path(root), options)


if __name__ == "__main__":
    main()
