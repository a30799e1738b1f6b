"""What a person sees of a run: a progress line, ``metrics.jsonl``, TensorBoard, and wandb when asked for."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pathlib
import sys
import time
import uuid
from collections.abc import Iterator, Mapping

import numpy as np
import PIL.Image
import tqdm

from .config import write_atomically

_CLIP_FPS = 8


class RunLog:
    """Writes scalars, pictures and clips of a run, and shows its progress.

    Args:
      folder: folder of the run.
      first_step: steps already done; lines of ``metrics.jsonl`` beyond it (written by a run that was killed after its
        last checkpoint) are dropped, so that the file is the curve of one uninterrupted run.
      last_step: length of the run.
      config: ``config.log``: ``every``, ``tensorboard``, ``wandb`` (project name or None).
      writes: whether this process is the one that writes; the others stay silent.
      frames: frames trained on so far.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        first_step: int,
        last_step: int,
        config: Mapping,
        writes: bool = True,
        frames: int = 0,
    ):
        self._every = config["every"]
        self._folder = folder if writes else None
        self._file = self._board = self._wandb = self._bar = None
        if writes:
            self._wandb = _wandb(config["wandb"], folder) if config["wandb"] else None
            (folder / "pictures").mkdir(exist_ok=True)
            _drop_after(folder / "metrics.jsonl", first_step)
            self._file = (folder / "metrics.jsonl").open("a")
            self._board = _tensorboard(folder, first_step) if config["tensorboard"] else None
            if sys.stderr.isatty():
                self._bar = tqdm.tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True)
        self._last = last_step
        self._waited = 0.0
        self._mark = (time.perf_counter(), first_step, frames)

    def due(self, step: int) -> bool:
        """Whether scalars of this step are written."""
        return step % self._every == 0 or step in (1, self._last)

    def scalars(self, step: int, values: Mapping[str, float], shown: tuple[str, ...] = ()) -> None:
        """Appends one line to ``metrics.jsonl``; names in ``shown`` appear in the progress line."""
        if self._folder is None:
            return
        line = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({name: value for name, value in line.items() if name != "step"}, step=step)
        if shown:
            self._show(step, {name: line[name] for name in shown if line.get(name) is not None})

    def speed(self, step: int, frames: int) -> dict[str, float]:
        """Of the time since the last call: seconds per step, frames per second, the share without a batch to work on.

        ``frames`` counts all frames so far.
        """
        now = time.perf_counter()
        before, first, seen = self._mark
        waited, self._waited = self._waited, 0.0
        self._mark = (now, step, frames)
        seconds = max(now - before, 1e-9)
        return {
            "seconds_per_step": seconds / max(step - first, 1),
            "frames_per_second": (frames - seen) / seconds,
            "input_wait": waited / seconds,
        }

    def waited(self, seconds: float) -> None:
        """So long the devices had nothing to do for want of a batch."""
        self._waited += seconds

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside does not count as training time: compiling, evaluating."""
        began = time.perf_counter()
        try:
            yield
        finally:
            then, step, frames = self._mark
            self._mark = (then + time.perf_counter() - began, step, frames)

    def progress(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        named = {name.removeprefix("loss/").replace("/", " "): value for name, value in values.items()}
        text = "  ".join(f"{name} {value:.4g}" for name, value in named.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            seconds = values.get("seconds_per_step")
            left = f"  left {_duration(seconds * (self._last - step))}" if seconds else ""
            print(f"step {step}/{self._last}  {text}{left}", flush=True)

    def message(self, text: str) -> None:
        """One line for the person, above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._folder is not None:
            print(text, flush=True)

    def media(self, step: int, pictures: Mapping[str, np.ndarray], clips: Mapping[str, np.ndarray]) -> None:
        """Keeps uint8 pictures ``(H, W, 3)`` and clips ``(T, H, W, 3)`` by name: as files, in TensorBoard and wandb."""
        if self._folder is None:
            return
        for name, image in pictures.items():
            PIL.Image.fromarray(image).save(self._folder / "pictures" / f"{name}_{step:08d}.png")
            if self._board:
                self._board.add_image(f"held_out/{name}", image, step, dataformats="HWC")
            if self._wandb:
                self._wandb.log({f"held_out/{name}": self._wandb.Image(image)}, step=step)
        for name, frames in clips.items():
            data = _gif(frames)
            (self._folder / "pictures" / f"{name}_{step:08d}.gif").write_bytes(data)
            if self._board:
                self._board.file_writer.add_summary(_gif_summary(f"held_out/{name}_clip", frames, data), step)
            if self._wandb:
                video = np.moveaxis(frames, -1, 1)  # wandb wants (T, C, H, W)
                self._wandb.log({f"held_out/{name}_clip": self._wandb.Video(video, fps=_CLIP_FPS)}, step=step)

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _gif(frames: np.ndarray) -> bytes:
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // _CLIP_FPS, loop=0)
    return buffer.getvalue()


def _gif_summary(name: str, frames: np.ndarray, data: bytes):
    """TensorBoard shows an image summary whose bytes are a GIF as a moving picture."""
    from tensorboardX.proto.summary_pb2 import Summary

    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary(value=[Summary.Value(tag=name, image=image)])


def _drop_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line of a killed write
        if entry["step"] <= step:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def _plain(value) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _tensorboard(folder: pathlib.Path, first_step: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)


def _wandb(project: str, folder: pathlib.Path):
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"config.log.wandb={project!r} needs the wandb package: pip install wandb.") from error
    kept = folder / "wandb_id.txt"  # one id per folder: a resumed run continues its own curve
    if not kept.exists():
        write_atomically(kept, uuid.uuid4().hex)
    wandb.init(project=project, dir=str(folder), name=folder.name, id=kept.read_text(), resume="allow")
    return wandb
