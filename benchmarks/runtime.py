"""What serving costs around the engine, and what it survives.

    stream_overhead          CPU time of the pipeline around the engine, decoding apart, over the
                             engine's own, one stream of 640x480 at 25 fps; full-size r3d18.
                             `without_resizing`: of frames that have the clip's size already
    shipped_stream_overhead  the same of the model that ships
    many_streams             CPU time of the engine alone at a batch of N over the pipeline's with
                             N streams, per window
    capture_to_label_p50     of a live source at 25 fps; reach is one hop + engine + 30 ms
    reconnect_s              an RTSP server on loopback killed and started again: the longest time
                             from its return to the first frame
    frozen_s                 an RTSP server that freezes: time until that is known, over the read
                             timeout
    mixed_windows            windows with frames of two connections, read from their pixels
    lost_windows             of 16 file streams of 640x480 at once: nothing may be lost (`block`)
    memory_growth            of the process over those, after the first fifth

Forms that are compared take turns in one run; values are ratios of medians, and `minima` the same
of the least. Times of faults are wall time. CPU time is of the whole process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import figures
import runtime_faults
import runtime_speed
from figures import Figure

from vmoe import cli
from vmoe.runtime.bench import context
from vmoe.runtime.threads import serving


@cli.command(
    "runtime.py",
    "python benchmarks/runtime.py --quick",
    "python benchmarks/runtime.py --out benchmarks/results/runtime.json",
    "python benchmarks/runtime.py --quick --json",
)
@click.option("--quick", is_flag=True, help="Under a minute; tells the direction.")
@click.option("--only", type=click.Choice(["speed", "faults"]), help="One half alone.")
@click.option("--minutes", type=float, default=10.0, show_default=True,
              help="How long 16 streams run; not with --quick.")  # fmt: skip
@figures.result_options
def main(
    quick: bool, only: str | None, minutes: float, out: tuple[Path, ...], overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure what serving costs around the engine, and what it survives."""
    figures.check_files(out, overwrite=overwrite)
    machine = context.read()
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as name, serving():
        folder = Path(name)
        if only != "faults":
            found += runtime_speed.measure(folder, quick=quick)
        if only != "speed":
            found += runtime_faults.measure(folder, quick=quick, minutes=minutes)
    figures.say(found, as_json=as_json)
    figures.write(out, "The streaming runtime", found, machine, {}, {"quick": quick})


if __name__ == "__main__":
    main()
