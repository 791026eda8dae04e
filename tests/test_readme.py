"""README.md and docs/: links, make targets and configuration keys exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([a-z]+(?: [a-z]+)*)", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert {word for words in named for word in words.split()} <= targets


def test_fields_that_the_training_page_lists_are_all_there_are() -> None:
    import dataclasses

    from drl_fast.engine.config import RunConfig

    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page.partition("## Configurations")[2], re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named - {"field"} == {field.name for field in dataclasses.fields(RunConfig)}
