"""single: one call after another, each with one clip unless --batch says more."""

from __future__ import annotations

from vmoe.runtime.bench import forms
from vmoe.runtime.bench.forms import Form
from vmoe.runtime.bench.settings import BenchSettings
from vmoe.runtime.bench.subjects import Subject

from . import SINGLE


def calls(subject: Subject, settings: BenchSettings, *, whole: bool) -> list[Form]:
    """Return what is called; `whole` adds the parts alone and all experts at the first batch."""
    batches = settings.batches(SINGLE)
    return forms.sweep(subject, SINGLE, batches, settings.force_route, whole=whole)
