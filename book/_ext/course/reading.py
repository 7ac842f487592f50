"""What keeps the pages from readers who hear them or use no mouse; each found by axe-core (book/_tools/browser.mjs)."""

import re
from pathlib import Path

_BODY = (
    # the words that are seen are a better name than this one
    (re.compile(r' aria-label="Toggle hidden content"'), ""),
    # a role that was withdrawn, inside a list that needs items
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
    # a long signature is written as definitions of nothing
    (
        re.compile(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>"),
        lambda m: f'<span class="sig-lines">{m[1].replace("<dd>", "<span>").replace("</dd>", "</span>")}</span>',
    ),
)
_PAGE = (
    (re.compile(r'(<button class="btn search-button-field[^>]*?) title="Search" aria-label="Search"'), r"\1"),
    (re.compile(r'(<i class="theme-switch[^>]*?) +title="[^"]*"'), r"\1"),
    (re.compile(r'(<div id="pst-primary-sidebar" class="[^"]*")>'), r'\1 role="region" aria-label="Contents">'),
)


def _replace(text, rules):
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _body(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = _replace(context["body"], _BODY)


def _pages(app, exception):
    """The theme's own parts can only be reached when the pages are written."""
    if exception is None and app.builder.format == "html":
        for path in Path(app.outdir).rglob("*.html"):
            text = path.read_text(encoding="utf8")
            if (better := _replace(text, _PAGE)) != text:
                path.write_text(better, encoding="utf8")


def setup(app):
    app.connect("html-page-context", _body)
    app.connect("build-finished", _pages)
