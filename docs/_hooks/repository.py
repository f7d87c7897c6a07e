"""Pages of the site for what stands in the repository outside of docs/.

A page links to `../benchmarks/results/export.md` as it does on GitHub; the site has a page for
each file that is linked so, under repository/, and links lead there. A folder is its README.md;
what is no Markdown is shown as code.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS, SHOWN = "docs", "repository"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
AS_IT_IS = (".md", ".png", ".svg")  # what is a page or a picture already
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yaml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside of docs/ that a page links to, and that such a page does."""
    waiting = [path.relative_to(ROOT).as_posix() for path in (ROOT / DOCS).rglob("*.md")]
    known = set(waiting)
    while waiting:
        origin = waiting.pop()
        if not origin.endswith(".md"):
            continue
        text = FENCED.sub("", (ROOT / origin).read_text(encoding="utf-8"))
        for target in {found(origin, link) for link in LINK.findall(text)} - known - {None}:
            assert target is not None
            known.add(target)
            waiting.append(target)
            if not target.startswith(f"{DOCS}/"):
                files.append(page(config, target))
    return files


def found(origin: str, link: str) -> str | None:
    """Return the file of the repository that a link means, by its path; None where there is none.

    Args:
        origin: path of the page in the repository.
        link: as the page has it, relative to itself.
    """
    path = (ROOT / origin).parent.joinpath(link).resolve()
    path = path / "README.md" if path.is_dir() else path
    return path.relative_to(ROOT).as_posix() if path.is_file() and ROOT in path.parents else None


def page(config: Any, target: str) -> File:
    """Return a file outside of docs/ as a page or a picture of the site."""
    path = ROOT / target
    if path.suffix in AS_IT_IS:
        return File.generated(config, f"{SHOWN}/{target}", abs_src_path=str(path))
    code = path.read_text(encoding="utf-8")
    text = f"# {target}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{code}````\n"
    return File.generated(config, f"{SHOWN}/{target}.md", content=text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links out of docs/, and those of pages that stand outside of it, to the site's pages."""
    here = page.file.src_uri
    shown = here.startswith(f"{SHOWN}/")
    origin = here.removeprefix(f"{SHOWN}/") if shown else f"{DOCS}/{here}"
    code = [match.span() for match in FENCED.finditer(markdown)]

    def turned(match: re.Match[str]) -> str:
        target = found(origin, match[1])
        if target is None or any(a <= match.start() < b for a, b in code):
            return match[1]
        return relative(here, at(target))

    return LINK.sub(turned, markdown)


def at(target: str) -> str:
    """Return where the site has a file of the repository."""
    if target.startswith(f"{DOCS}/"):
        return target.removeprefix(f"{DOCS}/")
    return f"{SHOWN}/{target}" if Path(target).suffix in AS_IT_IS else f"{SHOWN}/{target}.md"


def relative(here: str, target: str) -> str:
    """Return the link from one page of the site to another."""
    up = len(PurePosixPath(here).parts) - 1
    return "../" * up + target
