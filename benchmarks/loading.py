r"""Is data loading hidden behind compute? The share of an epoch that the training waits for clips.

    python benchmarks/loading.py --quick
    python benchmarks/loading.py --out benchmarks/results/loading.json \
        --out benchmarks/results/loading.md --overwrite

Figures, at two workers, of epochs of adversarial training (PGD with three steps, then an update;
tsm, width 0.25, four experts, clips 8x64x64, batches of 16):

wait_share_rendered
    camera-motion, whose clips are rendered anew in every epoch.
wait_share_decoded
    Video files of 320x240 (MPEG-4, four seconds), as UCF-101's are, augmented; each is decoded in
    every epoch, as where nothing can be kept.

The value is the median over epochs but the first, in which the workers start (`first`). Beside it
stand the share without workers (`alone`), and what an epoch takes with and without them, in
seconds. Two workers need two cores that the training leaves free: on a CPU it is given `--threads`
of them, and `cores` says how many there are.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cv2
import figures
import numpy as np
import torch
from figures import Figure
from torch.nn.functional import cross_entropy

from vmoe import checkpoint, cli
from vmoe.attacks.methods import pgd
from vmoe.batches import shuffled
from vmoe.clips import ClipSpec, Frame
from vmoe.data import DataSet, DataSettings, _kept, open_data
from vmoe.data._textures import picture
from vmoe.data.camera_motion import LABELS, camera_path, look
from vmoe.loading import Loader
from vmoe.models import ModelSettings, VideoMoE, build
from vmoe.runtime.bench import context as contexts

REACH = 0.05
WORKERS = 2
SIZE = (240, 320)  # of a video, height and width
FRAMES, FPS = 100, 25.0
CLASSES = ("pan", "zoom")


@dataclass(frozen=True)
class NeverKept:
    """Clips of video files that are decoded each time."""

    data: DataSet

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""
        return self.data.labels

    def __len__(self) -> int:
        """How many clips."""
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Return clip and label."""
        _kept.share_memory(1 << 40)  # among so many processes: nothing is left for this one
        return self.data[index]

    def at_epoch(self, epoch: int) -> NeverKept:
        """Return the same in another epoch."""
        return NeverKept(self.data.at_epoch(epoch))


@cli.command(
    "loading.py", "python benchmarks/loading.py --quick", "python benchmarks/loading.py --json"
)
@click.option("--quick", is_flag=True, help="Under a minute; tells the direction.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads of torch.")
@figures.result_options
@cli.device_option
def main(
    quick: bool, threads: int, out: tuple[Path, ...], overwrite: bool, as_json: bool, device: str
) -> None:
    """Measure the share of an epoch that waits for clips."""
    figures.check_files(out, overwrite=overwrite)
    torch.set_num_threads(threads)
    where = checkpoint.device(device)
    context = contexts.read()
    clips, epochs = (32, 2) if quick else (320, 4)
    spec = ClipSpec()
    rendered = open_data("camera-motion", "train", spec, DataSettings(clips=clips))
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        _write_videos(videos, clips)
        os.environ["XDG_CACHE_HOME"] = folder  # what is known of these videos goes with them
        files = NeverKept(open_data(str(videos), "train", spec))
        found = [
            _figure("wait_share_rendered", rendered, epochs, where),
            _figure("wait_share_decoded", files, epochs, where),
        ]
    figures.say(found, as_json=as_json)
    figures.write(out, "Loading", found, context, {}, {})


def _figure(name: str, data: DataSet, epochs: int, where: torch.device) -> Figure:
    """Train some epochs with and without workers, in turn."""
    spec, classes = ClipSpec(), len(data.labels)
    twin = build(ModelSettings("tsm", 0.25, 4, classes), spec).to(where)
    took: dict[int, list[float]] = {0: [], WORKERS: []}
    share: dict[int, list[float]] = {0: [], WORKERS: []}
    with Loader(data, 16, where) as alone, Loader(data, 16, where, WORKERS) as helped:
        for epoch in range(epochs):
            for workers, loader in ((0, alone), (WORKERS, helped)):
                begin, waited_s = time.monotonic(), loader.waited_s
                _train(twin, loader, epoch)
                took[workers].append(time.monotonic() - begin)
                share[workers].append((loader.waited_s - waited_s) / took[workers][-1])
    later = share[WORKERS][1:]
    more: dict[str, Any] = {"first": share[WORKERS][0], "alone": float(np.median(share[0][1:])),
                            "epoch_s": float(np.median(took[WORKERS][1:])),
                            "alone_s": float(np.median(took[0][1:])),
                            "clips": len(data), "cores": len(os.sched_getaffinity(0))}  # fmt: skip
    spread = (max(later) - min(later)) / 2
    return Figure(name, float(np.median(later)), "share", REACH, "lower", len(later), spread,
                  more=more)  # fmt: skip


def _train(twin: VideoMoE, loader: Loader, epoch: int) -> None:
    """Walk over the data once, as adversarial training does."""
    how = pgd.Settings(steps=3, early_stop=False)
    optimiser = torch.optim.SGD(twin.parameters(), lr=1e-3)
    for batch in loader.batches(shuffled(len(loader), epoch), epoch):
        found = pgd.attack(twin.eval(), batch.clip, batch.label, how, batch.index)
        loss = cross_entropy(twin.train()(found.adversarial).logits, batch.label)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        float(loss.detach())  # waits for a GPU, as the training's own log of it does


def _write_videos(folder: Path, count: int) -> None:
    """Write videos of a camera that moves over a picture, in folder/train and folder/val."""
    times = np.arange(FRAMES) / FPS
    for number in range(count):
        rng = np.random.default_rng(number)
        image, label = picture(rng), CLASSES[number % len(CLASSES)]
        place = folder / "train" / label
        place.mkdir(parents=True, exist_ok=True)
        fourcc = cv2.VideoWriter.fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(place / f"{number}.mp4"), fourcc, FPS, SIZE[::-1])
        move = LABELS[1] if label == "pan" else LABELS[5]
        for pose in camera_path(move, times, rng):
            writer.write(look(image, pose, SIZE))
        writer.release()


if __name__ == "__main__":
    main()
