"""What is packed: the wheel holds the packages and their types, the source archive all that README and docs point to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent
PACKAGES = ("am_memory", "am_memory_server", "langchain_am_memory")
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})


def packed(builder: type[SdistBuilder | WheelBuilder]) -> set[str]:
    return {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}


@pytest.fixture(scope="module")
def archive() -> set[str]:
    return packed(SdistBuilder)


def test_the_wheel_says_of_each_package_that_it_is_typed() -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed(WheelBuilder)


def test_the_wheel_holds_the_packages_alone() -> None:
    assert {name.split("/")[0] for name in packed(WheelBuilder)} == set(PACKAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_source_archive_holds_what_a_page_links_to(page: Path, archive: set[str]) -> None:
    targets = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    paths = {(page.parent / target).resolve().relative_to(ROOT) for target in targets}
    missing = {
        str(path) for path in paths if not any(path == Path(name) or path in Path(name).parents for name in archive)
    }
    assert not missing


def test_the_source_archive_holds_what_readers_are_told_to_run(archive: set[str]) -> None:
    assert {"Makefile", "CONTRIBUTING.md", "CHANGELOG.md", "Containerfile", "LICENSE"} <= archive
    told = {
        name for page in PAGES for name in re.findall(r"python ((?:benchmarks|examples)/[\w/]+\.py)", page.read_text())
    }
    assert told
    assert told <= archive
