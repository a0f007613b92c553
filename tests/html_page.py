"""A page of HTML as a reader meets it."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser

_VOID = {"meta"}
_FETCHING = {"src", "srcset", "style"}


class HtmlPage(HTMLParser):
    """Its elements, checked to be closed in order and to run and fetch nothing; headings, links and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self.metas: list[dict[str, str | None]] = []
        self.text = ""
        self.title = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        names = {name for name, _ in attrs}
        assert not names & _FETCHING, (tag, attrs)
        assert not any(name.startswith("on") for name in names), (tag, attrs)
        assert "href" not in names or tag == "a", (tag, attrs)
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag == "meta":
            self.metas.append(dict(attrs))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["h2"]:
            self.headings.append(data)
        if self._open == ["html", "head", "title"]:
            self.title += data
        if "style" not in self._open:
            self.text += data

    @property
    def refresh_s(self) -> int | None:
        """After how long the page loads itself again; None: it does not."""
        (seconds,) = [meta["content"] for meta in self.metas if meta.get("http-equiv") == "refresh"] or [None]
        return None if seconds is None else int(seconds)
