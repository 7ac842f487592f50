"""What keeps the pages from readers who hear them or use no mouse; each found by axe-core (book/_tools/browser.mjs)."""

import re
from pathlib import Path

from .repairs import made

BODY = {
    # the words that are seen are a better name than this one
    "name of a fold": (re.compile(r' aria-label="Toggle hidden content"'), ""),
    # a role that was withdrawn, inside a list that needs items
    "role of a reference": (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
    # a long signature is written as definitions of nothing
    "long signature": (
        re.compile(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>"),
        lambda m: f'<span class="sig-lines">{m[1].replace("<dd>", "<span>").replace("</dd>", "</span>")}</span>',
    ),
}
# the theme's own parts can only be reached when the pages are written
PAGE = {
    "name of the search button": (
        re.compile(r'(<button class="btn search-button-field[^>]*?) title="Search" aria-label="Search"'),
        r"\1",
    ),
    "title of the theme switch": (re.compile(r'(<i class="theme-switch[^>]*?) +title="[^"]*"'), r"\1"),
    "region of the contents": (
        re.compile(r'(<div id="pst-primary-sidebar" class="[^"]*")>'),
        r'\1 role="region" aria-label="Contents">',
    ),
}


def replace(text, rules):
    """Apply each rule wherever it matches, and count how often."""
    for name, (pattern, replacement) in rules.items():
        text, count = pattern.subn(replacement, text)
        made[name] += count
    return text


def _body(app, pagename, templatename, context, doctree):
    if "body" in context:
        context["body"] = replace(context["body"], BODY)


def _pages(app, exception):
    if exception is None and app.builder.format == "html":
        for path in Path(app.outdir).rglob("*.html"):
            text = path.read_text(encoding="utf8")
            if (better := replace(text, PAGE)) != text:
                path.write_text(better, encoding="utf8")


def setup(app):
    made.update(dict.fromkeys((*BODY, *PAGE), 0))
    app.connect("html-page-context", _body)
    app.connect("build-finished", _pages)
