"""The pages of the documentation as data: their blocks of code, links, headings, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SHELL, PYTHON = "sh", "python"
# A comment stands right before a block, with at most one empty line between.
BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>not run|run by|exit): (?P<said>[^\n]+?) -->\n+)?"
    r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FENCED = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file.
        language: sh, python, text ...
        code: what is between the fences.
        not_run: why it is not run.
        run_by: the test that runs it in place of this page's.
        exit_code: of its last command.
    """

    page: Path
    language: str
    code: str
    not_run: str | None = None
    run_by: str | None = None
    exit_code: int = 0

    @property
    def commands(self) -> list[str]:
        """Of a block of the shell: its commands, lines that go on joined."""
        joined = re.sub(r"\\\n\s*", "", self.code)
        return [line for line in joined.splitlines() if line and not line.startswith("#")]

    @property
    def path(self) -> str | None:
        """Of a block of Python that is a file of the repository: its path, in the first line."""
        found = re.match(r"# (\S+/\S+\.py)\n", self.code)
        return found[1] if found else None


def pages() -> list[Path]:
    """Return all pages of the site that are written by hand."""
    return sorted(path for path in DOCS.rglob("*.md"))


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks, in order."""
    made = []
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        said = {found["kind"]: found["said"]}
        not_run, run_by = said.get("not run"), said.get("run by")
        exit_code = int(said.get("exit", 0))
        made.append(Block(page, found["language"], found["code"], not_run, run_by, exit_code))
    return made


def prose(page: Path) -> str:
    """Return a page without its blocks."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Return the links of a page as they are written."""
    return LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Return the names that headings of a page have as targets, on GitHub and on the site."""
    return {anchor(heading) for heading in HEADING.findall(prose(page))}


def anchor(heading: str) -> str:
    """Return a heading's name: lower case, without signs, words joined by hyphens."""
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)).strip().lower()
    return re.sub(r"[\s]+", "-", plain)


def tables(page: Path) -> Iterator[tuple[str, str]]:
    """Yield each table, with the text of its section that stands before it."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        before = text[: found.start()]
        yield before[before.rfind("\n#") + 1 :], found[0]
