"""The site of docs/: it builds with warnings as errors, loads nothing from another server, and its links have targets.

Needs the extra `docs`, which `make setup` installs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import ktverify
import ktverify.experts
from ktverify.system.files import ROOT

for _module in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(_module, reason="the extra docs is not installed: make setup")

# of an element, what the browser loads without being asked
LOADED = {
    "script": ("src",), "link": ("href",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",),
    "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "embed": ("src",), "track": ("src",),
    "use": ("href", "xlink:href"), "image": ("href", "xlink:href"), "input": ("src",), "body": ("background",),
}  # fmt: skip
# relations of a link element that load nothing
NOT_LOADED = {"canonical", "next", "prev", "edit", "license"}
OUTSIDE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """What a page loads, links to and may be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if not (tag == "link" and found.get("rel", "") in NOT_LOADED):
            for name in LOADED.get(tag, ()):
                self.loaded += [part for part in re.split(r",\s+", found.get(name, "")) if part]
        self.loaded += urls_of_css(found.get("style", ""))
        self._in_style = tag == "style"
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.places |= {found[name] for name in ("id", "name") if name in found}

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loaded += urls_of_css(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


def urls_of_css(text: str) -> list[str]:
    """What a style sheet loads."""
    found = re.findall(r"url\(\s*['\"]?([^'\")]*)", text)
    return found + re.findall(r"@import\s+['\"]([^'\"]*)", text)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {
        str(path.relative_to(site)): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))
    }


@pytest.mark.slow
def test_a_page_loads_nothing_from_another_server(site: Path, pages: dict[str, Page]) -> None:
    assert len(pages) > 20
    loaded = {f"{name}: {url}" for name, page in pages.items() for url in page.loaded if OUTSIDE.match(url)}
    sheets = [*site.rglob("*.css")]
    assert sheets
    for sheet in sheets:
        urls = urls_of_css(sheet.read_text(encoding="utf-8"))
        loaded |= {f"{sheet.name}: {url}" for url in urls if OUTSIDE.match(url)}
    assert loaded == set()
    # the theme's script would fetch these from a CDN for such blocks
    assert not [name for name, page in pages.items() if page.places & {"__mermaid"}]
    for name in pages:
        assert 'class="mermaid"' not in (site / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_link_within_the_site_leads_to_a_place(site: Path, pages: dict[str, Page]) -> None:
    wrong = []
    for name, page in pages.items():
        if name == "404.html":
            # its addresses begin at the server's root
            continue
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, place = link.partition("#")
            target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(path))) if path else name
            target = "index.html" if target == "." else target
            if not (site / target).is_file():
                wrong.append(f"{name}: {link}: no such page")
            elif (
                place and not place.startswith("__") and target in pages and unquote(place) not in pages[target].places
            ):
                wrong.append(f"{name}: {link}: no such place")
    assert wrong == []


@pytest.mark.slow
def test_the_site_has_the_public_names_alone(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    headings = [re.sub(r"<[^>]+>", " ", heading) for heading in re.findall(r"<h3[^>]*>(.*?)</h3>", text, re.DOTALL)]
    shown = {name for heading in headings for name in re.findall(r"ktverify\.[\w.]+", heading)}
    own = {f"ktverify.{name}" for name in ktverify.__all__}
    more = {f"ktverify.experts.{name}" for name in ktverify.experts.__all__ if name not in ktverify.__all__}
    assert shown == own | more
    assert not re.search(r'<h4[^>]*id="[^"]*\._[a-z]', text)


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<link rel="preconnect" href="//fonts.gstatic.com">',
        '<img srcset="a.png 1x, HTTP://example.org/b.png 2x">',
        "<p style=\"background: url('http://example.org/a.png')\">",
        '<style>@import "https://example.org/a.css";</style>',
        "<style>@font-face { src: url(https://example.org/a.woff2) }</style>",
    ],
)
def test_what_a_page_loads_from_outside_is_found(text: str) -> None:
    assert [url for url in Page(text).loaded if OUTSIDE.match(url)]


def test_a_link_of_a_reader_loads_nothing() -> None:
    assert not Page(
        '<a href="https://example.org">x</a><img src="a.png"><link rel="canonical" href="http://a">'
    ).loaded[1:]


# ---- the hooks


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_section_of_the_readme_is_on_a_page(hooks: ModuleType) -> None:
    found = hooks.sections((ROOT / "README.md").read_text(encoding="utf-8"))
    # the last one only links to other pages
    assert {*found} - {"Further"} == {heading for _, headings in hooks.SECTIONS.values() for heading in headings}


def test_a_heading_within_code_is_none(hooks: ModuleType) -> None:
    assert hooks.sections("# a\n\n## b\n\n```\n## c\n```\ntext\n") == {"b": "```\n## c\n```\ntext"}


@pytest.mark.parametrize(
    ("text", "origin", "page", "expected"),
    [
        ("[a](docs/contract.md#calls)", "README.md", "judge.md", "[a](contract.md#calls)"),
        ("[a](../README.md#what-comes-out)", "docs/x.md", "x.md", "[a](results.md)"),
        ("[a](../README.md)", "docs/x.md", "x.md", "[a](index.md)"),
        ("[a](../CONTRIBUTING.md#words)", "docs/x.md", "x.md", "[a](contributing.md#words)"),
        ("[a](../LICENSE)", "docs/x.md", "scoreboard/x.md", "[a](../files/LICENSE.md)"),
        ("[a](https://example.org/x.md)", "docs/x.md", "x.md", "[a](https://example.org/x.md)"),
        ("[a](#calls)", "docs/x.md", "x.md", "[a](#calls)"),
        ("```\n[a](../LICENSE)\n```", "docs/x.md", "x.md", "```\n[a](../LICENSE)\n```"),
    ],
)
def test_links_between_files_become_links_between_pages(
    hooks: ModuleType, text: str, origin: str, page: str, expected: str
) -> None:
    assert hooks.with_page_links(text, origin, page) == expected


def test_a_link_to_a_file_that_is_not_there_fails(hooks: ModuleType) -> None:
    with pytest.raises(Exception, match=r"a link leads to no/such\.py, which is no file of"):
        hooks.with_page_links("[a](../no/such.py)", "docs/x.md", "x.md")
