"""How pages are read; and the ids that the threat model names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import pages

# Of MITRE's dist/ATLAS.yaml, version 5.6.0.
ATLAS = {
    "AML.M0001": "Limit Model Artifact Release",
    "AML.M0003": "Model Hardening",
    "AML.M0004": "Restrict Number of AI Model Queries",
    "AML.M0006": "Use Ensemble Methods",
    "AML.M0008": "Validate AI Model",
    "AML.M0010": "Input Restoration",
    "AML.M0011": "Restrict Library Loading",
    "AML.M0013": "Code Signing",
    "AML.M0014": "Verify AI Artifacts",
    "AML.M0015": "Adversarial Input Detection",
    "AML.M0016": "Vulnerability Scanning",
    "AML.M0024": "AI Telemetry Logging",
    "AML.T0010.003": "Model",
    "AML.T0015": "Evade AI Model",
    "AML.T0018": "Manipulate AI Model",
    "AML.T0020": "Poison Training Data",
    "AML.T0024.002": "Extract AI Model",
    "AML.T0029": "Denial of AI Service",
    "AML.T0040": "AI Model Inference API Access",
    "AML.T0041": "Physical Environment Access",
    "AML.T0042": "Verify Attack",
    "AML.T0043": "Craft Adversarial Data",
    "AML.T0043.000": "White-Box Optimization",
    "AML.T0043.001": "Black-Box Optimization",
    "AML.T0043.002": "Black-Box Transfer",
    "AML.T0044": "Full AI Model Access",
    "AML.T0046": "Spamming AI System with Chaff Data",
}
# Of transcripts of the index of NIST AI 100-2e2025; the publication itself was not at hand.
NIST = {
    "NISTAML.01": "availability",
    "NISTAML.013": "Data Poisoning",
    "NISTAML.014": "Energy-latency",
    "NISTAML.02": "integrity",
    "NISTAML.022": "Evasion",
    "NISTAML.023": "Backdoor Poisoning",
    "NISTAML.025": "Black-box Evasion",
    "NISTAML.031": "Model Extraction",
    "NISTAML.05": "Supply Chain Attacks",
    "NISTAML.051": "Model Poisoning",
}


@pytest.mark.parametrize(
    ("pattern", "known"),
    [(r"AML\.[TM]\d{4}(?:\.\d{3})?", ATLAS), (r"NISTAML\.\d+", NIST)],
    ids=["atlas", "nist"],
)
def test_the_threat_model_names_ids_as_the_catalogues_do(
    pattern: str, known: dict[str, str]
) -> None:
    text = (pages.DOCS / "threat-model.md").read_text()
    assert set(re.findall(pattern, text)) == known.keys()
    for name, title in known.items():
        assert re.search(rf"{name} {title}\b|{title}, {name}\b", text), f"{name} is {title}"


def test_blocks_with_what_is_said_of_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\n# a comment\na \\\n    b\nc\n```\n"
        "<!-- not run: needs a Jetson -->\n```sh\nd\n```\n\n"
        "<!-- run by: tests/x.py::test_y -->\n\n```python\ne\n```\n"
        "<!-- exit: 3 -->\n```sh\nf\n```\n"
        "```python\n# a/b.py\ng\n```\n"
    )
    first, jetson, other, failing, file = pages.blocks(page)
    assert (first.commands, first.not_run, first.exit_code) == (["a b", "c"], None, 0)
    assert (jetson.not_run, jetson.commands) == ("needs a Jetson", ["d"])
    assert (other.run_by, other.language, other.path) == ("tests/x.py::test_y", "python", None)
    assert failing.exit_code == 3
    assert file.path == "a/b.py"


def test_links_anchors_and_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One: `two` [three](x.md)\n\nsee [a](b.md#c)\n\n## Four\n\nby this\n\n| a |\n| - |\n\n"
        "```text\n# no heading [no](link)\n```\n"
    )
    assert pages.links(page) == ["x.md", "b.md#c"]
    assert pages.anchors(page) == {"one-two-three", "four"}
    assert list(pages.tables(page)) == [("## Four\n\nby this\n\n", "| a |\n| - |\n")]
