"""multi: a query is one window of each of N streams, answered as the runtime does.

Windows that are due together are stacked, routed by one run of the router, and each expert runs
once on those that are its own (runtime/batches.py). How well that goes depends on the routes:
`free` takes those of the clips; `mixed routes` deals two or more streams out to all experts in
turn, the least that they can share.
"""

from __future__ import annotations

from vmoe.errors import SettingError
from vmoe.runtime.batches import stacked
from vmoe.runtime.bench import forms
from vmoe.runtime.bench.forms import Form
from vmoe.runtime.bench.settings import BenchSettings
from vmoe.runtime.bench.subjects import Subject
from vmoe.runtime.engine import Prediction
from vmoe.runtime.online import is_online

from . import MULTI


def calls(subject: Subject, settings: BenchSettings) -> list[Form]:
    """Return the queries, for each number of streams."""
    made = []
    for streams in settings.stream_counts(MULTI):
        sized = subject.at(streams)
        made.append(_query(sized, forms.FREE, None))
        experts = subject.bundle.experts
        if experts > 1 and streams > 1 and not subject.baseline:
            routes = [stream % experts for stream in range(streams)]
            made.append(_query(sized, forms.MIXED, routes))
    return made


def _query(subject: Subject, name: str, routes: list[int] | None) -> Form:
    engine = subject.engine

    def call(number: int) -> Prediction:
        if is_online(engine.bundle):
            raise SettingError(
                "it follows each stream frame by frame, which is no query: use --scenario stream"
            )
        return engine.infer(stacked(list(subject.of_round(number))), force_route=routes)

    return forms.form(subject, name, call, scenario=MULTI, streams=subject.batch)
