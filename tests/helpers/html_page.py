"""What a browser reads in a page."""

from html.parser import HTMLParser
from os import PathLike
from pathlib import Path

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, its text, and whether all are closed."""

    def __init__(self, path: Path | PathLike[str]) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, text):
        if not {"script", "style"} & set(self.open):
            self.pieces.append(text)

    def of(self, tag: str, **attributes) -> list[dict]:
        return [its for name, its in self.elements if name == tag and attributes.items() <= its.items()]
