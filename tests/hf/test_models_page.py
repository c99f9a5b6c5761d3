"""``docs/models.md`` against the installed transformers."""

import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import transformers

from bert_fused.hf.recognize import _BLOCKS, INTERMEDIATE, POOLER


def test_a_folder_is_checked_inside_a_model() -> None:
    assert families.check(families.read("distilbert")) == {"FFN": "model"}


def test_the_page_lists_every_folder_of_the_installed_transformers() -> None:
    folders = list(families.folders())
    holders = {block: [f.name for f in folders if block in f.blocks.values()] for block in _BLOCKS.values()}
    assert len(holders[INTERMEDIATE]) >= 60
    assert len(holders[POOLER]) >= 44
    assert sum(bool(folder.blocks) for folder in folders) >= 126  # as in transformers 5.0; 166 in 5.23
    assert all(holders.values()), "a block that no class of transformers has"

    page = families.PAGE.read_text()
    if f"transformers {transformers.__version__}." not in page:
        return  # the rest is of another version
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [[folder.name, ", ".join(folder.types)] for folder in folders]
    for row, folder in zip(rows, folders, strict=True):
        model, alone = (cell.split(", ") if cell else [] for cell in row[2:4])
        left = row[4].split("; ") if row[4] else []
        named = [*model, *alone, *(entry.partition(":")[0] for entry in left)]
        assert sorted(named) == sorted([*folder.blocks, *folder.others])
        assert {f"{name}: {reason}" for name, reason in folder.others.items()} <= set(left)
    served = [row for row in rows if row[2] or row[3]]
    assert len(served) >= 62
    assert f"**{len(served)} of {len(rows)} model folders" in page
    assert "DIFFERS" not in page


@pytest.mark.slow
def test_the_models_page_is_current(tmp_path: Path) -> None:
    command = [sys.executable, "tests/support/families.py", "--out", str(tmp_path / "page.md")]
    root = families.PAGE.parent.parent
    subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": "."}, check=True)
    assert (tmp_path / "page.md").read_text() == families.PAGE.read_text()
