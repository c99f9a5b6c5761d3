"""The pages' code runs, their commands and links are valid, and the pictures and the API reference are current."""

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
from bert_fused.kernels.configs import Config
from bert_fused.tune.candidates import EPILOGUE, ISSUE, LATENCY, chip_of, modelled_clocks, step_clocks

ROOT = Path(__file__).parents[2]
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
    for page, least in (("README.md", 2), ("docs/how-it-works.md", 4)):
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


def test_the_timeline_shows_the_clocks_of_the_cycle_model() -> None:
    """Each block's spans, four tiles on an SM: two blocks of a plain grid, then a persistent one."""
    tile, (M, N, K), arch = Config("tma", "bfloat16", 128, 128, 64, 4, 3), (2816, 3072, 768), 90
    assert M // tile.block_m * N // tile.block_n == 4 * chip_of(arch).sms
    svg = ROOT / "docs" / "pictures" / "tile-timeline.svg"
    lengths = {
        "load": LATENCY,
        "product": K / tile.block_k * step_clocks(tile, arch),
        "epilogue": tile.block_m * tile.block_n * EPILOGUE / ISSUE,
    }
    ends = []
    for block in ET.parse(svg).iterfind("{*}g"):
        end = 0.0
        for span in block:
            start, length = float(span.get("x")), float(span.get("width"))
            assert start >= end
            assert length == lengths[span.get("class")]
            end = start + length
        ends.append(end)
    for end, config in ((max(ends[:2]), tile), (ends[2], replace(tile, persistent=1))):
        assert end == modelled_clocks(config, M, N, K, arch)
        assert f": {end:,.0f} clocks" in svg.read_text()
    assert "MODELLED, not measured" in svg.read_text()


@pytest.mark.slow
def test_the_api_reference_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E", "-b", "html", "docs/api"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text()
    for name in bert_fused.__all__:
        assert f'id="bert_fused.{name}"' in page, name
