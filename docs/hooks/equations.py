r"""Number the equations that are referred to, and link them with the code.

A display formula, `$$` on a line of its own before and after, may carry a label:

    $$
    H_x = W^\top H_z W
    \label{eq-linear}
    $$

The site shows it with a number, counted on each page, and with the anchor `#eq-linear`.
Below stands what implements it: whatever in `src/hbp` cites the label, in a docstring
or in a comment.

A link whose text is the label, `[eq-linear](mathematics.md#eq-linear)`, shows the
number instead. A docstring writes `[words][eq-linear]`, which `help()` shows as it is;
on the site the number follows the words. A label that is used twice, and a reference
to one that no equation has, stop the build.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "hbp"
NAME = r"eq-[a-z0-9]+(?:-[a-z0-9]+)*"
CODE = re.compile(r"^ *(?P<fence>`{3,}).*?^ *(?P=fence) *$|`[^`\n]+`", re.M | re.S)
FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.M | re.S)
LABEL = re.compile(r"\s*\\label\{([^}]*)\}")
LINK = re.compile(rf"\[([^\[\]]*)\](\([^()\s]*#({NAME})\))")
AUTOREF = re.compile(
    rf'(<autoref [^>]*identifier="({NAME})"[^>]*>)(.*?)(</autoref>)', re.S
)

# What one build knows; `on_files` begins anew.
numbers: dict[str, int] = {}
citations: dict[str, list[tuple[str, str]]] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Number the equations of every page, before any page refers to them."""
    numbers.clear()
    for file in files.documentation_pages():
        for number, label in enumerate(labels(file.content_string), start=1):
            if label in numbers:
                raise PluginError(
                    f"{file.src_uri}: \\label{{{label}}} names two equations"
                )
            numbers[label] = number
    citations.clear()
    citations.update(cited_in(PACKAGE))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Set numbers and anchors, which the strict check of links then knows."""
    for label in labels(markdown):
        # Docstrings refer by name alone, without the page.
        config.plugins["autorefs"].register_anchor(
            page, label, title=f"Equation ({numbers[label]})"
        )
    return render(markdown, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the number follow the words by which a docstring refers to an equation."""

    def numbered(match: re.Match[str]) -> str:
        start, label, words, end = match.groups()
        return f"{start}{words} ({number_of(label, page.file.src_uri)}){end}"

    return AUTOREF.sub(numbered, html)


def labels(markdown: str) -> list[str]:
    """The labels of a page's equations, in order."""
    formulas = FORMULA.findall(CODE.sub("", markdown))
    return [name for formula in formulas for name in LABEL.findall(formula)]


def render(markdown: str, uri: str) -> str:
    """The page with numbers for labels, and for the links to them."""

    def link(match: re.Match[str]) -> str:
        words, target, label = match.groups()
        number = number_of(label, uri)
        return f"[({number})]{target}" if words == label else match[0]

    def formula(match: re.Match[str]) -> str:
        return equation(match[1], uri) if LABEL.search(match[1]) else match[0]

    def replace(text: str) -> str:
        text = LINK.sub(link, FORMULA.sub(formula, text))
        if stray := LABEL.search(text):
            raise PluginError(
                f"{uri}: {stray[0].strip()} is in no display formula; put $$ on a line "
                "of its own before and after"
            )
        return text

    return change_prose(markdown, replace)


def equation(formula: str, uri: str) -> str:
    """A display formula with a number, an anchor, and what implements it."""
    names = LABEL.findall(formula)
    if len(names) > 1 or not re.fullmatch(NAME, names[0]):
        raise PluginError(f"{uri}: a formula has one label like eq-name, not {names}")
    label = names[0]
    number = number_of(label, uri)
    tagged = f"$$\n{LABEL.sub('', formula)} \\tag{{{number}}}\n$$"
    parts = [f'<div class="equation" id="{label}" markdown>', tagged]
    if label in citations:
        parts.append(f"In code: {', '.join(map(reference, citations[label]))}")
        parts[-1] += "\n{ .implementation }"
    return "\n\n".join([*parts, "</div>"])


def reference(place: tuple[str, str]) -> str:
    """A link to what the API page tells of a place in the code, if it does."""
    module, name = place
    owner = ".".join(filter(None, [module, name.split(".")[0]]))
    return f"[`{name or module}`][{owner}]{{ optional }}"


def number_of(label: str, uri: str) -> int:
    """The number of an equation."""
    if label not in numbers:
        raise PluginError(f"{uri}: no equation has the label {label}")
    return numbers[label]


def change_prose(markdown: str, change: Callable[[str], str]) -> str:
    """The page with a change to what is no code."""
    parts: list[str] = []
    end = 0
    for code in CODE.finditer(markdown):
        parts += change(markdown[end : code.start()]), code[0]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def cited_in(package: Path) -> dict[str, list[tuple[str, str]]]:
    """Where the source cites each label: module, and class or function within."""
    places: dict[str, dict[tuple[str, str], None]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        source = path.read_text("utf-8")
        spans = list(definitions(ast.parse(source)))
        for line, text in enumerate(source.splitlines(), start=1):
            for label in re.findall(rf"\b{NAME}", text):
                around = [name for name, first, last in spans if first <= line <= last]
                place = module, (around or [""])[-1]
                places.setdefault(label, {})[place] = None
    return {label: list(found) for label, found in places.items()}


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Names of classes and functions with first and last line, outer before inner."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            name = prefix + child.name
            assert child.end_lineno is not None
            yield name, child.lineno, child.end_lineno
            yield from definitions(child, f"{name}.")
