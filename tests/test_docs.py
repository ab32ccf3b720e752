"""README and docs say only what is there: the page of keys is the schema's, and whatever they name exists.

No torch, no mcore: everything is read from files, the schema and Hydra's composition.
"""

import functools
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from train.settings import config_groups, known_keys, load_settings

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = sorted((_ROOT / "docs").glob("*.md"))
_ALL = [_ROOT / "README.md", *_PAGES]
_FOLDERS = ("train", "model", "parallel", "upcycle", "launch", "configs", "tests", "docs", "constraints", ".ci")


@functools.cache
def _build_configuration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_configuration", _ROOT / "docs" / "build_configuration.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _blocks(text: str) -> list[str]:
    """Fenced code, fences left out."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _code(page: Path) -> list[str]:
    """Everything a reader would take literally: fenced code and code spans."""
    text = page.read_text()
    return [*_blocks(text), *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))]


def _anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_keys_is_what_the_schema_says() -> None:
    built = _build_configuration()
    assert built.unknown_keys() == []
    assert built.PAGE.read_text() == built.render(), "run `python docs/build_configuration.py`"
    for key in known_keys():
        assert "." not in key or f"| `{key}` |" in built.PAGE.read_text()


@pytest.mark.parametrize("page", _ALL, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in _anchors(found), f"{page.name}: {target}"


@pytest.mark.parametrize("page", _ALL, ids=lambda page: page.name)
def test_presets_keys_files_and_targets_exist(page: Path) -> None:
    presets, keys = config_groups(), set(known_keys())
    targets = set(re.findall(r"^([\w-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    keys_page = _build_configuration().PAGE.read_text()
    for code in _code(page):
        for group, name in re.findall(rf"(?<![\w.\-+])({'|'.join(presets)})=([a-z]\w*)", code):
            assert name in presets[group], f"{page.name}: {group}={name}"
        for key in re.findall(
            rf"(?<![\w.+/])((?:{'|'.join(presets)}|run|parallel|evaluation|upcycle)\.[\w.\[\]]+)=", code
        ):
            listed, _, element = key.partition("].")
            name = re.sub(r"\[\d*$", "", listed)
            assert name in keys, f"{page.name}: {key}"
            assert not element or f"| `{name}[].{element}` |" in keys_page, f"{page.name}: {key}"
        for path in re.findall(rf"(?<![\w/.])((?:{'|'.join(map(re.escape, _FOLDERS))})/[\w/.\-]+\.\w+)", code):
            assert (_ROOT / path).exists() or (_ROOT / f"{path}.py").exists(), f"{page.name}: {path}"
        for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", code):
            assert target in targets, f"{page.name}: make {target}"


def _commands() -> list[tuple[str, int, list[str]]]:
    """Starts of runs in fenced code: where, how many processes, overrides."""
    found = []
    for page in _ALL:
        for block in _blocks(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                start = re.search(r"-m (?:train|launch local --processes \d+ --)(?= [^\s.]*=)", line)
                if start is None or "--cfg" in line:
                    continue
                sizes = re.findall(r"--(?:nnodes|nproc-per-node|processes)[= ](\d+)", line)
                processes = 1
                for size in sizes:
                    processes *= int(size)
                found.append((page.name, processes, shlex.split(line[start.end() :])))
    return found


def test_commands_are_accepted() -> None:
    """Every start of a run that a reader could copy passes the checks a run makes before it starts."""
    commands = _commands()
    assert len(commands) >= 6
    for page, processes, overrides in commands:
        try:
            load_settings(overrides, processes)
        except Exception as error:
            raise AssertionError(f"{page}: {processes} processes, {overrides}: {error}") from error


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w\-]+\.md)\)", (_ROOT / "docs" / "index.md").read_text()))
    assert linked == {page.name for page in _PAGES} - {"index.md"}
    assert "docs/index.md" in (_ROOT / "README.md").read_text()


def test_an_installation_has_every_package() -> None:
    listed = set(tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    tops = {name.partition(".")[0] for name in listed}
    found = {".".join(f.parent.relative_to(_ROOT).parts) for top in tops for f in (_ROOT / top).rglob("__init__.py")}
    assert listed == found
