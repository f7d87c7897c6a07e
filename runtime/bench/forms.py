"""The calls that are compared, of one bundle: routed, forced, each part alone, all experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmoe.errors import SettingError, nearest

from .subjects import Subject

FREE, ROUTE, WORST, ROUTER, EXPERT, ALL = (
    "free",
    "route",
    "worst route",
    "router alone",
    "expert",
    "all experts",
)


@dataclass(frozen=True)
class Form:
    """One thing to call.

    Attributes:
        subject: name of its bundle.
        name: `free`, `route 0`, `router alone`, `expert 0 alone`, `all experts`.
        call: takes the number of a round.
    """

    subject: str
    name: str
    call: Callable[[int], object]


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


def of(subject: Subject, force_route: str) -> list[Form]:
    """Return the forms of a bundle.

    A dense counterpart, which has one expert and no router, and any baseline, is called as it is.
    `all experts` runs every expert in turn on every clip, the router each time.

    Raises:
        SettingError: --force-route is none of this model's.
    """
    engine, name = subject.engine, subject.name
    forms = [Form(name, FREE, lambda n: engine.infer(subject.of_round(n)))]
    if subject.baseline:
        return forms
    experts = subject.bundle.experts
    asked = routes_asked(force_route, experts)
    if experts == 1:
        return forms
    forms += [Form(name, route(i), _forced(subject, i)) for i in asked]
    if subject.bundle.lowering == "split" and asked:
        forms.append(Form(name, ROUTER, _part(subject, "router")))
        forms += [Form(name, expert(i), _part(subject, f"expert{i}")) for i in asked]
    if len(asked) == experts:
        forms.append(Form(name, ALL, lambda n: engine.run_all(subject.of_round(n))))
    return forms


def _forced(subject: Subject, index: int) -> Callable[[int], object]:
    return lambda n: subject.engine.infer(subject.of_round(n), force_route=index)


def _part(subject: Subject, part: str) -> Callable[[int], object]:
    return lambda n: subject.engine.run_part(part, subject.of_round(n))
