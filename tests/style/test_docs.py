# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Documents name only what is there, and the changelog keeps its form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#]+?)(#[^)]*)?\)")
# A path of this tree as documents write it: `folder/file.ext` or `folder/`.
PATH = re.compile(r"`((?:kvm_ffi|devices|api|daemon|systemd|tests|bench|lab|guest|docs)/[\w./-]*)`")
REQUIRED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")


@pytest.mark.parametrize("name", REQUIRED)
def test_document_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    links = [
        m[1] for m in LINK.finditer(text) if "://" not in m[1] and not m[1].startswith("mailto:")
    ]
    bad = [link for link in links if not (document.parent / link).exists()]
    bad += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert not bad


def test_changelog_keeps_its_form() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    assert headings
    assert headings[0] == "## [Unreleased]"
    assert all(
        re.fullmatch(r"## \[(Unreleased|\d+\.\d+\.\d+)\]( - \d{4}-\d\d-\d\d)?", h) for h in headings
    )


def test_every_make_target_that_is_promised_has_a_rule() -> None:
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    phony = makefile.split(".PHONY:")[1].split("\n\n")[0].replace("\\\n", " ").split()
    told = re.findall(r"`?make ([a-z-]+)", "\n".join(p.read_text() for p in DOCUMENTS))
    shown = re.findall(r"^# make ([\w-]+)", makefile, re.MULTILINE)
    assert set(phony) | set(shown) <= rules
    assert {"demo", "serve", "test"} <= set(told) & rules
