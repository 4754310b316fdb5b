"""Hooks of mkdocs: pages that stand for documents elsewhere in the repository get their text, and links are rewritten.

Links to files that aren't pages become plain text.
On GitHub the same links lead to the files themselves. Set `repo_url` in mkdocs.yml to link to them from the site too.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {  # file of the repository -> page of the site
    "recipes/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "measurements.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
PAGES = ELSEWHERE | {"README.md": "index.md", "README.zh.md": "index.md"}
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^][]|\[[^]]*\])*)\]\((?P<target>[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links relative to the page's file in the repository become links of the site."""
    name = re.sub(r"\.zh\.md$", ".md", page.file.src_uri)
    source = next((path for path, built in ELSEWHERE.items() if built == name), f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(page.file.src_uri)
    if not source.startswith("docs/"):
        markdown = (ROOT / source).read_text(encoding="utf-8")

    def changed(link: re.Match[str]) -> str:
        target, hash_, anchor = link["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        if inside:
            anchor = "" if path.startswith("README") else hash_ + anchor
            return f"{link['picture']}[{link['text']}]({posixpath.relpath(inside, folder or '.')}{anchor})"
        if config.repo_url:
            return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return link["text"]

    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # code stays as it is
    return "".join(piece if number % 2 else LINK.sub(changed, piece) for number, piece in enumerate(pieces))
