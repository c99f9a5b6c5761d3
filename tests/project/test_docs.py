"""The pages' code runs, their commands and links are valid, and the pictures and the API reference are current."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

import bert_fused
from bert_fused.__main__ import parse
from bert_fused.tune.candidates import chip_of, modelled_clocks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import draw  # noqa: E402

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "design").glob("*.md")),
]


def blocks(language: str) -> dict[str, str]:
    return {
        f"{page.relative_to(ROOT)}-{i}": block
        for page in PAGES
        for i, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    }


PYTHON, CONSOLE = blocks("python"), blocks("console")


@pytest.mark.parametrize("name", PYTHON)
def test_code_of_a_page_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU: by PyTorch, not by Triton's interpreter."""
    monkeypatch.setenv("BERT_FUSED_DISABLE", "1")
    exec(compile(PYTHON[name], name, "exec"), {})


def test_pages_have_code_and_every_block_is_looked_at() -> None:
    for page, least in (("README.md", 3), ("docs/how-it-works.md", 4)):
        assert sum(name.startswith(page) for name in PYTHON) >= least
    fences = sum(len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * (len(PYTHON) + len(CONSOLE))


def assert_valid(line: str) -> None:
    """The command parses, or its make target, script or extra exists."""
    words = shlex.split(line, comments=True)
    if words[0] == "bert-fused":
        parse(words[1:])
    elif words[:3] == ["python", "-m", "bert_fused"]:
        parse(words[3:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[0] in ("python", "torchrun"):
        (script,) = (word for word in words if word.endswith(".py"))
        text = (ROOT / script).read_text()
        options = words[words.index(script) + 1 :]
        assert all(f'"{option}"' in text for option in options if option.startswith("--")), line
    elif words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"\.\[(\w+)\]", words[2])[1]
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), line
    else:
        pytest.fail(f"not a command of ours: {line}")


@pytest.mark.parametrize("name", CONSOLE)
def test_commands_of_a_block_are_valid(name: str) -> None:
    for line in CONSOLE[name].splitlines():
        assert line.startswith("$ "), line
        assert_valid(line[2:])


def test_commands_in_the_text_are_valid() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    found = re.findall(r"`((?:bert-fused|python -m bert_fused|make) [^`]+)`", text)
    assert len(found) >= 10
    for command in found:
        assert_valid(command)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]+)#?([^)]*)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
            assert not anchor or anchor in anchors(page.parent / target), f"{page.name} links {target}#{anchor}"


def test_design_is_split_into_short_pages_that_its_readme_lists() -> None:
    folder = ROOT / "docs" / "design"
    listed = (folder / "README.md").read_text()
    for page in folder.glob("*.md"):
        lines = page.read_text().splitlines()
        assert len(lines) < 150, page.name
        assert max(map(len, lines)) <= 120, page.name
        assert page.name == "README.md" or f"| [{page.name}]({page.name}) |" in listed, page.name


def drawn(svg: Path) -> list[str]:
    """The texts of a picture, and its shapes to a tenth of a point."""
    elements = [e for e in ET.parse(svg).iter() if e.tag.endswith(("}path", "}text"))]
    shapes = [(element.get("d") or element.get("transform") or "") for element in elements]
    rounded = [re.sub(r"-?\d+\.?\d*", lambda number: f"{float(number[0]):.1f}", shape) for shape in shapes]
    return [shape + (element.text or "") for shape, element in zip(rounded, elements, strict=True)]


def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    draw.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in draw.FOLDER.iterdir()}
    for path in tmp_path.iterdir():
        assert drawn(path) == drawn(draw.FOLDER / path.name), f"{path.name} is stale: make pictures"
        assert "<dc:date>" not in path.read_text()


def test_the_timeline_is_the_models_and_says_so() -> None:
    """Its ends are the clocks of the cycle model for so many tiles on each SM."""
    tiles = draw.TILES_PER_SM * chip_of(draw.ARCH).sms
    columns = draw.N // draw.TILE.block_n
    assert tiles % columns == 0
    rows = tiles // columns * draw.TILE.block_m
    configs = (draw.TILE, replace(draw.TILE, persistent=1))
    for (title, timelines), config in zip(draw.timelines().items(), configs, strict=True):
        end = max(start + length for spans in timelines for start, length, _ in spans)
        assert end == modelled_clocks(config, rows, draw.N, draw.K, draw.ARCH), title
        for spans in timelines:
            for (start, length, _), (later, _, _) in itertools.pairwise(spans):
                assert later >= start + length
    assert "MODELLED, not measured" in (draw.FOLDER / "tile-timeline.svg").read_text()


def test_the_api_reference_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E", "-b", "html", "docs/api"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text()
    for name in bert_fused.__all__:
        assert f'id="bert_fused.{name}"' in page, name
