"""A page as tags and text."""

import html.parser

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """Tags (with attributes), ids and visible text of a page; refuses tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def attributes(self, *names):
        return [attrs[name] for _, attrs in self.tags for name in names if attrs.get(name)]
