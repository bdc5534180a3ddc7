"""Turn the executed notebooks in `tutorials/` into pages of the site.

Each notebook becomes one Markdown page that exists only while the site is built,
with its figures as files beside it. So links, search, admonitions and the strict
build treat a tutorial like any other page. A notebook that was not run, that
stores an error, or that has a figure without alternative text stops the build.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbformat import NotebookNode

TUTORIALS = Path(__file__).resolve().parents[2] / "tutorials"
FIGURES = {"image/svg+xml": ".svg", "image/png": ".png", "image/jpeg": ".jpg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page, and its figures, for every notebook."""
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        page, figures = render(nbformat.read(path, as_version=4), path.stem)
        for name, content in {f"{path.stem}.md": page, **figures}.items():
            uri = f"tutorials/{name}"
            files.append(File.generated(config, uri, content=content))
    return files


def render(notebook: NotebookNode, name: str) -> tuple[str, dict[str, str | bytes]]:
    """Return a notebook's Markdown, and its figures by file name."""
    parts: list[str] = []
    figures: dict[str, str | bytes] = {}
    for number, cell in enumerate(notebook.cells, start=1):
        where = f"{name}.ipynb, cell {number}"
        if cell.cell_type == "markdown":
            parts.append(links_for_site(cell.source))
        elif cell.cell_type == "code" and cell.source.strip():
            if cell.execution_count is None:
                raise PluginError(f"{where} was not run: `make execute` runs it")
            parts.append(fenced(cell.source, "python"))
            for output in cell.outputs:
                parts.append(render_output(output, cell, where, name, figures))
    return "\n\n".join(parts) + "\n", figures


def render_output(
    output: NotebookNode,
    cell: NotebookNode,
    where: str,
    name: str,
    figures: dict[str, str | bytes],
) -> str:
    """Return the Markdown of one output; a figure is added to `figures`."""
    if output.output_type == "error":
        raise PluginError(f"{where} stores an error: {output.ename}: {output.evalue}")
    if output.output_type == "stream":
        if output.name == "stderr":
            raise PluginError(f"{where} stores a warning: {output.text.strip()}")
        return fenced(output.text.rstrip("\n"), "{ .text .output }")
    for kind, suffix in FIGURES.items():
        if kind in output.data:
            alt = cell.metadata.get("alt")
            if not alt:
                raise PluginError(f"{where} shows a figure: give the cell an alt text")
            file = f"{name}-{len(figures) + 1}{suffix}"
            data = output.data[kind]
            figures[file] = data if suffix == ".svg" else base64.b64decode(data)
            return f"![{alt}]({file})"
    if "text/plain" in output.data:
        return fenced(output.data["text/plain"], "{ .text .output }")
    raise PluginError(f"{where} has an output of unknown kind: {list(output.data)}")


def fenced(text: str, info: str) -> str:
    """Return text as a fenced block whose fence does not occur in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    space = " " if info.startswith("{") else ""
    return f"{fence}{space}{info}\n{text}\n{fence}"


def links_for_site(markdown: str) -> str:
    """Point links at pages: to a sibling notebook, or into `docs/`."""
    markdown = re.sub(r"\]\((\w+)\.ipynb(#[\w-]*)?\)", r"](\1.md\2)", markdown)
    return re.sub(r"\]\(\.\./docs/", "](../", markdown)
