"""The calls that are compared, of one bundle: routed, forced, each part alone, all experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vmoe.errors import SettingError, nearest

from .measuring import Clock
from .scenarios import SINGLE
from .subjects import Subject

FREE, ROUTE, WORST, MIXED, ROUTER, EXPERT, ALL = (
    "free",
    "route",
    "worst route",
    "mixed routes",
    "router alone",
    "expert",
    "all experts",
)
PROBES = 3  # calls of each route that tell which is the slowest


@dataclass(frozen=True)
class Form:
    """One thing to call.

    Attributes:
        subject: name of its bundle.
        name: `free`, `route 0`, `mixed routes`, `router alone`, `expert 0 alone`, `all experts`.
        call: takes the number of a round.
        scenario: which one it is of.
        batch: clips of a call.
        streams: that the clips are of; 1 where that means nothing.
        threads: CPU threads of the engine; None is its own choice.
        backend: what runs it.
    """

    subject: str
    name: str
    call: Callable[[int], object]
    scenario: str = SINGLE
    batch: int = 1
    streams: int = 1
    threads: int | None = None
    backend: str = ""


def route(index: int) -> str:
    """Return the name of the form that forces a route."""
    return f"{ROUTE} {index}"


def expert(index: int) -> str:
    """Return the name of the form that runs an expert alone."""
    return f"{EXPERT} {index} alone"


def routes_asked(force_route: str, experts: int) -> tuple[int, ...]:
    """Return the routes that --force-route asks for: all of them, none, or one.

    Raises:
        SettingError: neither all, free nor an expert that there is.
    """
    if force_route == "all":
        return tuple(range(experts))
    if force_route == "free":
        return ()
    if not force_route.isdecimal():
        close = nearest(force_route, ("all", "free"))
        raise SettingError(f"--force-route is {force_route!r}{close} It is all, free or a number.")
    if int(force_route) >= experts:
        raise SettingError(
            f"--force-route is {force_route}; this model has experts 0 to {experts - 1}."
        )
    return (int(force_route),)


def form(
    subject: Subject,
    name: str,
    call: Callable[[int], object],
    *,
    scenario: str = SINGLE,
    streams: int = 1,
) -> Form:
    """Return a form of a bundle, at the batch that the subject has now."""
    backend = subject.engine.backend_name
    return Form(
        subject.name, name, call, scenario, subject.batch, streams, subject.threads, backend
    )


def of(subject: Subject, force_route: str) -> list[Form]:
    """Return the forms of a bundle.

    A dense counterpart, which has one expert and no router, and any baseline, is called as it is.
    `all experts` runs every expert in turn on every clip, the router each time.

    Raises:
        SettingError: --force-route is none of this model's.
    """
    engine = subject.engine
    forms = [form(subject, FREE, lambda n: engine.infer(subject.of_round(n)))]
    if subject.baseline:
        return forms
    experts = subject.bundle.experts
    asked = routes_asked(force_route, experts)
    if experts == 1:
        return forms
    forms += [form(subject, route(i), _forced(subject, i)) for i in asked]
    if subject.bundle.lowering == "split" and asked:
        forms.append(form(subject, ROUTER, _part(subject, "router")))
        forms += [form(subject, expert(i), _part(subject, f"expert{i}")) for i in asked]
    if len(asked) == experts:
        forms.append(form(subject, ALL, lambda n: engine.run_all(subject.of_round(n))))
    return forms


def sweep(
    subject: Subject,
    scenario: str,
    batches: Sequence[int],
    force_route: str,
    *,
    whole: bool,
    wall_ns: Clock = time.perf_counter_ns,
) -> list[Form]:
    """Return the forms of a bundle at each batch.

    At the first, where `whole`, all of them; else two: routed freely, and the slowest of the
    routes that are asked for, by a probe before the measurement.

    Raises:
        SettingError: --force-route is none of this model's.
    """
    made: list[Form] = []
    slowest: str | None = None
    for at, batch in enumerate(batches):
        every = of(subject.at(batch), force_route)
        if at or not whole:
            slowest = slowest or _slowest(every, wall_ns)
            every = [form for form in every if form.name in (FREE, slowest)]
        made += [replace(form, scenario=scenario) for form in every]
    return made


def _slowest(forms: Sequence[Form], wall_ns: Clock) -> str | None:
    """Return the name of the route whose fastest call takes longest; a call that fails is one."""
    routes = [form for form in forms if form.name.startswith(f"{ROUTE} ")]
    if len(routes) < 2:
        return routes[0].name if routes else None

    def fastest(form: Form) -> float:
        took = []
        for number in range(PROBES):
            began = wall_ns()
            try:
                form.call(number)
            except Exception:  # it will fail again where it is measured, and its row says why
                return float("inf")
            took.append(wall_ns() - began)
        return min(took)

    return max(routes, key=fastest).name


def _forced(subject: Subject, index: int) -> Callable[[int], object]:
    return lambda n: subject.engine.infer(subject.of_round(n), force_route=index)


def _part(subject: Subject, part: str) -> Callable[[int], object]:
    return lambda n: subject.engine.run_part(part, subject.of_round(n))
