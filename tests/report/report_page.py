"""A report that was made, and its page as tags and text."""

import html.parser
import re

import pytest
from made_up_workspace import made_up_contexts, make_run

from saejax.page import style
from saejax.stages.report import run as stage

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


class Report:
    """What the stage made of its inputs: folder, results, page and Markdown.

    No store is searched: the contexts are made up, too. Unless ``draws``, figures are made but not drawn.
    """

    def __init__(self, root, inputs, draws=False, **changes):
        run = make_run(root, inputs, **changes)
        self.root, self.folder = root, run.folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "contexts", lambda run, name, features, count: made_up_contexts(features, count))
            if not draws:
                patch.setattr(style, "save", lambda *figure: '<svg width="1pt" viewBox="0 0 1 1"></svg>')
            self.results = stage.run_report(run)
        self.html = (run.folder / "index.html").read_text(encoding="utf-8")
        self.markdown = (run.folder / "report.md").read_text(encoding="utf-8")
        self.page = Page(self.html)

    @property
    def texts(self) -> list[str]:
        """Visible text of the page and of the Markdown, with plain spaces and without escapes."""
        texts = (self.page.text, self.markdown.replace("&amp;", "&"))
        return [" ".join(re.sub(r"\\(.)", r"\1", text).replace("**", "").split()) for text in texts]
