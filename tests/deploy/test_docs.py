"""That operators find what they look for: every page is linked, every link leads somewhere, and so does every panel."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.deploy.prometheus import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "examples/README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TOPICS = ("Install", "Size", "Tune", "Upgrade", "Migrating from plain vLLM")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = page.parent / parts.path if parts.path else page
        assert target.exists(), link
        assert not parts.fragment or parts.fragment in anchors(target), link


def test_the_readme_links_to_every_page() -> None:
    linked = {(ROOT / urlsplit(link).path).resolve() for link in LINK.findall((ROOT / "README.md").read_text())}
    assert set(PAGES[1:-1]) <= linked
    assert ROOT / "examples" in linked


def test_operators_find_every_topic() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/operating.md").read_text(), flags=re.MULTILINE)
    assert headings == list(TOPICS)


def test_every_example_is_named_with_what_ci_does_with_it() -> None:
    listed = (ROOT / "examples/README.md").read_text()
    names = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert all(f"({name})" in listed for name in names - {"README.md"})
    for test in re.findall(r"`(tests/[^`]+)`", listed):
        assert (ROOT / test).exists(), test
