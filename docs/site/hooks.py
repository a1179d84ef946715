"""Hooks of mkdocs: pages of what lies outside docs/, so that a fact stays in one place and every link leads to a page.

A page is a section of README.md, another document of the repository, or the text of a file that a page links to. Links
are written as GitHub takes them, relative to the file that they are in; here they become links between pages.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify_unicode
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# page -> its title and the sections of README.md that it consists of
SECTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "judge.md": ("Judge your engine", ("Judge your engine", "An engine of your own, in three steps")),
    "results.md": ("What comes out", ("What comes out",)),
    "checks.md": ("What is checked", ("What is checked",)),
    "native.md": ("The engine in short", ("The engine",)),
    "train.md": ("Train a model", ("Train a model",)),
    "commands.md": ("The commands", ("The commands",)),
}
# page -> the document that it shows
DOCUMENTS: Mapping[str, str] = {
    "contributing.md": "CONTRIBUTING.md",
    "kt-kernel-judged.md": "reports/examples/kt_kernel-0.7.2/README.md",
    "emulation.md": "native/emulation/README.md",
}
FILES = "files"  # the folder of pages that show a file
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".sh": "bash", ".json": "json"}
_FENCE = re.compile(r"^(`{3,})[^`]*\n.*?^\1`*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]*)(#[^)\s]*)?(?=\))")


def sections(text: str) -> dict[str, str]:
    """The sections of a Markdown text by heading of the second level, without the heading."""
    found, heading = {}, ""
    shown = _FENCE.sub(lambda fence: re.sub(r"[^\n]", "x", fence[0]), text)
    marks = [*re.finditer(r"^## (.+)$", shown, re.MULTILINE)]
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        heading = mark[1].strip()
        found[heading] = text[mark.end() : following.start() if following else len(text)].strip()
    return found


def page_of(path: str, anchor: str) -> str:
    """The page and anchor for a link to `path` of the repository: "contract.md#calls"."""
    if path == "README.md":
        for page, (_, headings) in SECTIONS.items():
            if anchor[1:] in map(_slug, headings[1:]):
                return page + anchor
            if anchor[1:] == _slug(headings[0]):
                return page
        return "index.md"
    for page, document in DOCUMENTS.items():
        if path == document:
            return page + anchor
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + anchor
    if not (ROOT / path).is_file():
        raise PluginError(f"a link leads to {path}, which is no file of the repository")
    # mkdocs leaves out what begins with a dot
    return f"{FILES}/{path.lstrip('.')}.md"


def _slug(heading: str) -> str:
    return slugify_unicode(heading, "-")


def _outside_of_code(text: str) -> Iterator[tuple[bool, str]]:
    """The parts of a Markdown text: whether it is a fenced block, and the part."""
    end = 0
    for fence in _FENCE.finditer(text):
        yield False, text[end : fence.start()]
        yield True, fence[0]
        end = fence.end()
    yield False, text[end:]


def linked(text: str, origin: str) -> set[str]:
    """The paths in the repository that a document links to. origin: its own."""
    folder = posixpath.dirname(origin)
    return {
        posixpath.normpath(posixpath.join(folder, link[1]))
        for code, part in _outside_of_code(text)
        if not code
        for link in _LINK.finditer(part)
        if link[1]
    }


def with_page_links(text: str, origin: str, page: str) -> str:
    """A document with its links to the repository's files as links between pages."""
    folder, here = posixpath.dirname(origin), posixpath.dirname(page)

    def rewritten(link: re.Match[str]) -> str:
        if not link[1]:
            return link[0]
        target, mark, anchor = page_of(posixpath.normpath(posixpath.join(folder, link[1])), link[2] or "").partition(
            "#"
        )
        return posixpath.relpath(target, here or ".") + mark + anchor

    return "".join(part if code else _LINK.sub(rewritten, part) for code, part in _outside_of_code(text))


def _generated() -> dict[str, tuple[str, str]]:
    """Page -> its origin and text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    by_heading = sections(readme)
    found = {}
    for page, (title, headings) in SECTIONS.items():
        parts = [f"# {title}"]
        for place, heading in enumerate(headings):
            parts += [f"## {heading}"] * bool(place) + [by_heading[heading]]
        found[page] = ("README.md", "\n\n".join(parts) + "\n")
    for page, path in DOCUMENTS.items():
        found[page] = (path, (ROOT / path).read_text(encoding="utf-8"))
    return found


def _shown(path: str) -> str:
    """The page of a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = max(re.findall(r"`{3,}", text), key=len, default="``") + "`"
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    name = posixpath.basename(path)
    head = "---\nhide:\n  - toc\nsearch:\n  exclude: true\n---\n"
    return f"{head}# {name}\n\n`{path}`\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of what lies outside docs/."""
    generated = _generated()
    config["extra"]["origins"] = {page: origin for page, (origin, _) in generated.items()}
    texts = [*generated.values()]
    for file in files.documentation_pages():
        texts.append((f"docs/{file.src_uri}", file.content_string))
    pages = {page: text for page, (_, text) in generated.items()}
    for origin, text in texts:
        for path in linked(text, origin):
            page = page_of(path, "").partition("#")[0]
            if page.startswith(f"{FILES}/"):
                pages[page] = _shown(path)
                config["extra"]["origins"][page] = path
    for page, text in sorted(pages.items()):
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links between pages."""
    src = page.file.src_uri
    if src.startswith(f"{FILES}/"):
        return markdown
    return with_page_links(markdown, config["extra"]["origins"].get(src, f"docs/{src}"), src)
