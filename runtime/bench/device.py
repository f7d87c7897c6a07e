"""Where a call's time goes on a GPU: copies, work, and the host that gives it out.

A backend that tells (runtime/engines: `time_calls`) is asked after the measurement, by some calls
more: what notes times inside of CUDA graphs costs a little.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import median

from vmoe.runtime.engine import Engine
from vmoe.runtime.engines import Times

from .forms import Form
from .measuring import Took

CALLS = 20


@dataclass(frozen=True)
class Told(Took):
    """What a call answers whose time is the GPU's own work."""

    times: Times


def alone(form: Form, engine: Engine) -> Form:
    """Return a form whose time is the GPU's own work; its backend must be one that tells."""

    def call(number: int) -> Told:
        engine.last_times()
        form.call(number)
        times = engine.last_times() or Times()
        return Told(times.device_ms, times)

    return dataclasses.replace(form, call=call)


def times(form: Form, engine: Engine) -> Times | None:
    """Return the medians of some calls; None of a backend that does not tell."""
    if not engine.time_calls():
        return None
    form.call(0)  # graphs are captured anew
    told = []
    for number in range(CALLS):
        answer = form.call(number)
        told.append(answer.times if isinstance(answer, Told) else engine.last_times() or Times())
    return Times(*(median(column) for column in zip(*told, strict=True)))
