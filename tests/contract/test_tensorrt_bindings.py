"""TensorRT's real bindings, over stub libraries: what we rely on is there in every version."""

from __future__ import annotations

from tests.bindings import VERSIONS, Bindings


def test_the_version_that_was_asked_for_is_imported(bindings: Bindings) -> None:
    wanted = VERSIONS[bindings.version].partition("==")[2]
    assert bindings.surface()["version"] == wanted
