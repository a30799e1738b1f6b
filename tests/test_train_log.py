"""What a run shows and keeps: one curve, a progress line, pictures, TensorBoard, wandb when asked for."""

import json
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image

from tokenizers.train.log import RunLog

CONFIG = {"every": 5, "tensorboard": False, "wandb": None}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def open_log(folder, first=0, last=20, **changes):
    return RunLog(folder, first, last, CONFIG | changes)


def test_the_file_is_one_curve_after_a_kill(tmp_path):
    log = open_log(tmp_path)
    for step in (5, 10, 15):
        log.scalars(step, {"loss": step / 2})
    log.scalars(10, {"held_out/psnr": 3.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # killed while writing
    log = open_log(tmp_path, first=10)  # the last checkpoint
    log.scalars(15, {"loss": -1.0})
    log.close()
    found = [(line["step"], line.get("loss")) for line in lines(tmp_path)]
    assert found == [(5, 2.5), (10, 5.0), (10, None), (15, -1.0)]


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    log = open_log(tmp_path)
    log.scalars(1, {"a": float("nan"), "b": np.float32(np.inf), "c": np.int32(3)})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 3.0}]


def test_the_progress_line_has_time_left(tmp_path, capsys):
    log = open_log(tmp_path, last=1000)
    assert [step for step in range(1, 1001) if log.due(step)][:3] == [1, 5, 10]
    shown = {"loss/generator": 0.25, "psnr": 21.5, "seconds_per_step": 2.0, "frames_per_second": 64.0}
    log.scalars(5, shown, tuple(shown))
    log.scalars(6, {"held_out/psnr": 22.25}, ("held_out/psnr",))
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "step 5/1000  generator 0.25  psnr 21.5  seconds_per_step 2  frames_per_second 64  left 33:10"
    assert out[1] == "step 6/1000  held_out psnr 22.25"


def test_speed_leaves_out_compiling_and_evaluating(tmp_path):
    log = open_log(tmp_path)
    time.sleep(0.05)
    with log.untimed():
        time.sleep(0.4)
    values = log.speed(2, 100)
    assert 0.025 <= values["seconds_per_step"] < 0.15
    assert values["frames_per_second"] > 100 / 0.3
    log.close()


def test_waiting_for_batches_is_a_share_of_the_time(tmp_path):
    log = open_log(tmp_path)
    time.sleep(0.1)
    log.waited(0.05)
    assert 0.2 < log.speed(2, 100)["input_wait"] <= 0.5
    time.sleep(0.01)
    assert log.speed(3, 100)["input_wait"] == 0
    log.close()


def test_pictures_and_clips_are_files(tmp_path):
    log = open_log(tmp_path)
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    log.media(7, {"image": image}, {"video": np.stack([image, 255 - image])})
    log.close()
    np.testing.assert_array_equal(Image.open(tmp_path / "pictures" / "image_00000007.png"), image)
    with Image.open(tmp_path / "pictures" / "video_00000007.gif") as clip:
        assert clip.n_frames == 2


def test_tensorboard_gets_scalars_pictures_and_clips(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    log = open_log(tmp_path, tensorboard=True)
    image = np.zeros((8, 8, 3), np.uint8)
    log.scalars(3, {"loss/generator": 0.5, "broken": float("nan")})
    log.media(3, {"image": image}, {"video": np.stack([image, image + 1])})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:  # records: length (8), checksum (4), event, checksum (4)
        size = int.from_bytes(data[:8], "little")
        for value in Event.FromString(data[12 : 12 + size]).summary.value:
            found[value.tag] = value
        data = data[16 + size :]
    assert found["loss/generator"].simple_value == 0.5
    assert "broken" not in found
    assert found["held_out/image"].image.encoded_image_string.startswith(b"\x89PNG")
    assert found["held_out/video_clip"].image.encoded_image_string.startswith(b"GIF8")


class FakeWandb(types.ModuleType):
    """Remembers what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.starts, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.starts.append(options)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, array):  # noqa: N802
        return ("image", array.shape)

    def Video(self, array, fps):  # noqa: N802
        return ("video", array.shape, fps)


def test_wandb_continues_its_own_curve(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    image = np.zeros((8, 6, 3), np.uint8)
    for first in (0, 5):
        log = open_log(tmp_path, first=first, wandb="project")
        log.scalars(first + 5, {"loss": 0.5})
        log.media(first + 5, {"image": image}, {"video": np.stack([image] * 4)})
        log.close()
    assert fake.starts[0]["project"] == "project"
    assert fake.starts[0]["resume"] == "allow"
    assert fake.starts[0]["id"] == fake.starts[1]["id"]
    assert fake.logged[:3] == [
        (5, {"loss": 0.5}),
        (5, {"held_out/image": ("image", (8, 6, 3))}),
        (5, {"held_out/video_clip": ("video", (4, 3, 8, 6), 8)}),
    ]
    assert fake.finished == 2
    other = tmp_path / "elsewhere" / tmp_path.name  # a folder of the same name is another run
    other.mkdir(parents=True)
    open_log(other, wandb="project").close()
    assert fake.starts[2]["id"] != fake.starts[0]["id"]


def test_wandb_that_is_not_installed_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="config.log.wandb='project' needs the wandb package: pip install wandb"):
        open_log(tmp_path, wandb="project")


def test_processes_that_do_not_write_leave_no_trace(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 10, CONFIG, writes=False)
    log.scalars(1, {"a": 1.0}, ("a",))
    log.message("hello")
    log.media(1, {"image": np.zeros((2, 2, 3), np.uint8)}, {})
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
