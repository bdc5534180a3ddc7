"""What a page must have, and what it can do without.

An image without a text alternative stops the build, wherever it comes from. Markup
that changes nothing is left out: a page of code would be twice as large with it.
"""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

# Names, numbers, strings, punctuation: they can have the colour of plain code.
PLAIN = "kc|mf|mi|n|nb|nn|o|ow|p|s1|s2|sa|si|w"
PLAIN_TOKEN = re.compile(rf'<span class="(?:{PLAIN})">([^<]*)</span>')
INDENT = re.compile(r"\n\s+")
PREFORMATTED = re.compile(r"(<(pre|textarea|script)\b.*?</\2>)", re.S)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Check the images of a page, and return it as it is."""
    for image in re.findall(r"<img\b[^>]*>", html):
        if not re.search(r'\balt="[^"]*\w', image):
            raise PluginError(
                f"{page.file.src_uri} shows an image without a text alternative: "
                f"{image}. Write it between the brackets of ![...](...)."
            )
    return html


def on_post_page(output: str, **_: Any) -> str:
    """Return the page without markup that changes nothing."""
    # Every third piece is the name of an element, every second its text.
    pieces = PREFORMATTED.split(output)
    pieces[::3] = [INDENT.sub("\n", piece) for piece in pieces[::3]]
    pieces[1::3] = [plainer(piece) for piece in pieces[1::3]]
    del pieces[2::3]
    return "".join(pieces)


def plainer(code: str) -> str:
    """Return a block of code with fewer marks; in text, quotes need no escape."""
    if not code.startswith("<pre"):
        return code
    code = PLAIN_TOKEN.sub(r"\1", code).replace("<span></span>", "")
    return code.replace("&quot;", '"').replace("&#39;", "'")
