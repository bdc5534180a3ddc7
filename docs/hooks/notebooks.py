"""Turn the executed notebooks in `tutorials/` into pages of the site.

nbconvert makes one Markdown page of each notebook, which exists only while the site
is built, with its figures as files beside it. So links, search, admonitions and the
strict build treat a tutorial like any other page. A notebook that was not run, that
stores an error, or that has a figure without alternative text stops the build.

A page has a bar of actions, and lines that say how long it takes to read, and where and
when the notebook was run.
Folded are neighbouring cells with the tag "solution", the setup, the code that draws a
figure unless it is short, and the assertions that end a cell: what they print is the
line that stays.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from repository import address, colab_link, source_link
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS, DIST = ROOT / "tutorials", ROOT / "dist"
# The last two groups are a notebook or page, and a place in it.
LINK = re.compile(r"\[([^\]]*)\]\((\.\./docs/)?([\w/-]+)\.(?:ipynb|md)(#[\w-]*)?\)")
FIGURES = {"image/svg+xml", "image/png", "image/jpeg"}
LONGEST_LOG, SHOWN_LOG = 24, 4  # lines
LONGEST_DRAWING = 12  # lines
FOLDS = {
    "setup": "Code of the setup",
    "solution": "Solution",
    "figure": "Code of the figure",
}
# The loop over cells and outputs is nbconvert's.
TEMPLATE = """
{%- extends 'base/null.j2' -%}
{%- block any_cell %}{{ super() }}

{% endblock -%}
{%- block markdowncell %}{{ cell.source | site_links }}{% endblock -%}
{%- block input %}
{%- if cell.source %}{{ cell.source | fence("python") }}{% endif %}{% endblock -%}
{%- block output %}

{{ output | shown(cell) }}{% endblock -%}
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add, for every notebook, its page, its figures, and files to download."""
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        minutes = minutes_to_read(notebook)
        page, figures = render(notebook, path.stem)
        record = notebook.metadata.get("hbp", {})
        runs = {key: run for key, run in record.items() if key != "code"}
        download = alone(path, config.site_url or "").encode()
        archive = zipped(path.name, download)
        page = with_header(page, path.stem, runs, minutes, bool(archive))
        script = path.with_suffix(".py")
        downloads = {path.name: download, script.name: script.read_bytes()}
        if archive:
            downloads[f"{path.stem}.zip"] = archive
        for name, content in {f"{path.stem}.md": page, **figures, **downloads}.items():
            uri = f"tutorials/{name}"
            files.append(File.generated(config, uri, content=content))
    return files


def alone(path: Path, site: str) -> str:
    """Return a notebook whose links lead to the site, or nowhere if it has no address.

    Beside the notebook that somebody has downloaded there is nothing.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(partial(link_from_afar, site), cell.source)
    return nbformat.writes(notebook)


def link_from_afar(site: str, link: re.Match[str]) -> str:
    """Return a link to a page of the site, with its whole address or without any."""
    words, folder, page, place = link.groups(default="")
    folder = "" if folder else "tutorials/"
    return f"[{words}]({site.rstrip('/')}/{folder}{page}/{place})" if site else words


def zipped(name: str, notebook: bytes) -> bytes:
    """Return a notebook and the wheel that its first cell installs, if there is one."""
    archive = BytesIO()
    for wheel in DIST.glob("*.whl"):
        with ZipFile(archive, "w", ZIP_DEFLATED) as file:
            file.writestr(name, notebook)
            file.write(wheel, wheel.name)
    return archive.getvalue()


def render(notebook: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook's Markdown, and its figures by file name."""
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code":
            check(cell, f"{name}.ipynb, cell {number}")
    notebook.cells = with_folds(notebook.cells)
    exporter = MarkdownExporter(
        raw_template=TEMPLATE,
        filters={"fence": fence, "shown": shown, "site_links": site_links},
        config=Config({"ExtractOutputPreprocessor": {"enabled": True}}),
    )
    page, resources = exporter.from_notebook_node(
        notebook, {"unique_key": name, "output_files_dir": ""}
    )
    return page.strip() + "\n", resources["outputs"]


def check(cell: NotebookNode, where: str) -> None:
    """Raise PluginError for a cell that must not be published."""
    if cell.execution_count is None:
        raise PluginError(f"{where} was not run: `make execute` runs it")
    for output in cell.outputs:
        if output.output_type == "error":
            raise PluginError(
                f"{where} stores an error: {output.ename}: {output.evalue}"
            )
        if output.output_type == "stream":
            if output.name == "stderr":
                raise PluginError(f"{where} stores a warning: {output.text.strip()}")
        elif FIGURES & set(output.data):
            if not cell.metadata.get("alt"):
                raise PluginError(f"{where} shows a figure: give the cell an alt text")
        elif "text/plain" not in output.data:
            raise PluginError(
                f"{where} has an output of unknown kind: {list(output.data)}"
            )


def with_folds(cells: list[NotebookNode]) -> list[NotebookNode]:
    """Put setup, solutions and claims between the marks of folded boxes."""
    folded: list[NotebookNode] = []
    for kind, group in groupby(cells, kinds(cells)):
        if kind is None:
            folded += [
                part
                for cell in group
                for claimed in without_claims(cell)
                for part in without_drawing(claimed)
            ]
        else:
            folded += [opening(FOLDS[kind], kind), *group, new_markdown_cell("///")]
    return folded


def kinds(cells: list[NotebookNode]) -> Callable[[NotebookNode], str | None]:
    """Tell which cells belong into a fold, and into which."""
    setup: list[str] = []
    for cell in cells:
        begins = cell.cell_type == "code" and "HBP_INSTALL" in cell.source
        if begins or (setup and cell.cell_type == "code"):
            setup.append(cell.id)
        elif setup:
            break

    def kind(cell: NotebookNode) -> str | None:
        if "solution" in cell.metadata.get("tags", []):
            return "solution"
        return "setup" if cell.id in setup else None

    return kind


def opening(title: str, kind: str) -> NotebookNode:
    """Return the first mark of a folded box."""
    return new_markdown_cell(f"/// details | {title}\n    type: {kind}")


def without_claims(cell: NotebookNode) -> Iterator[NotebookNode]:
    """Yield a cell up to the claims that end it, and these in a fold."""
    body = ast.parse(cell.source).body if cell.cell_type == "code" else []
    claims: list[ast.stmt] = []
    while body and (isinstance(body[-1], ast.Assert) or printed(body[-1])):
        claims.insert(0, body.pop())
    if not any(isinstance(claim, ast.Assert) for claim in claims):
        yield cell
        return
    lines, end = cell.source.split("\n"), body[-1].end_lineno if body else 0
    words = " ".join(filter(None, map(printed, claims)))
    for output in cell.outputs:
        if output.output_type == "stream":
            said = "".join(printed(claim) + "\n" for claim in claims if printed(claim))
            output.text = output.text.removesuffix(said)
    cell.outputs = [o for o in cell.outputs if o.get("text") != ""]
    cell.source = "\n".join(lines[:end])
    if body:
        yield cell
    yield opening(f"✓ Checked{': ' if words else ''}{words}", "checked")
    yield new_markdown_cell(fence("\n".join(lines[end:]).strip("\n"), "python"))
    yield new_markdown_cell("///")


def without_drawing(cell: NotebookNode) -> Iterator[NotebookNode]:
    """Yield the code of a figure in a fold, unless it is short, and then the figure."""
    if cell.metadata.get("alt") and cell.source.count("\n") >= LONGEST_DRAWING:
        yield opening(FOLDS["figure"], "figure")
        yield new_markdown_cell(fence(cell.source, "python"))
        yield new_markdown_cell("///")
        cell.source = ""
    yield cell


def printed(statement: ast.stmt) -> str:
    """Return what a statement prints, if all it does is to print a sentence."""
    match statement:
        case ast.Expr(
            ast.Call(
                func=ast.Name("print"), args=[ast.Constant(str(words))], keywords=[]
            )
        ):
            return words
    return ""


def minutes_to_read(notebook: NotebookNode) -> int:
    """Return how long text and code take at 200 words a minute."""
    words = sum(len(cell.source.split()) for cell in notebook.cells)
    return max(1, round(words / 200))


def with_header(
    page: str, name: str, runs: dict[str, dict], minutes: int, has_archive: bool
) -> str:
    """Return the page with a bar of actions and its runs below the title."""
    title, _, rest = page.partition("\n")
    where = address()
    actions = [
        ("Open in Colab", colab_link(where, f"tutorials/{name}.ipynb"), ""),
        ("Download with hbp", f"{name}.zip" if has_archive else "", "{ download }"),
        ("Download .ipynb", f"{name}.ipynb", "{ download }"),
        ("Download .py", f"{name}.py", "{ download }"),
        ("View source", source_link(where, f"tutorials/{name}.py"), ""),
    ]
    links = [f"- [{label}]({to}){how}" for label, to, how in actions if to]
    bar = '<nav class="hbp-actions" aria-label="This tutorial" markdown>'
    lines = [f"About {minutes} minutes to read."]
    lines += [f"Ran {run_in_words(run)}." for run in runs.values()]
    parts = [title, bar, "\n".join(links), "</nav>"]
    parts.append("<br>\n".join(lines) + "\n{ .hbp-run }")
    return "\n\n".join(parts) + "\n" + rest


def run_in_words(run: dict) -> str:
    """Say how long a run took, where and when."""
    minutes, seconds = divmod(run["seconds"], 60)
    time = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return (
        f"in {time} on {run['machine']}, {run['date']}, "
        f"with torch {run['torch']}, at commit {run['commit']}"
    )


def fence(text: str, info: str) -> str:
    """Return text as a fenced block whose fence does not occur in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    space = " " if info.startswith("{") else ""
    return f"{fence}{space}{info}\n{text}\n{fence}"


def shown(output: NotebookNode, cell: NotebookNode) -> str:
    """Return the Markdown of an output: a figure, or what was printed."""
    for file in output.get("metadata", {}).get("filenames", {}).values():
        return f"![{cell.metadata.alt}]({file})"
    text = output.text if "text" in output else output.data["text/plain"]
    return fence(shortened(text.rstrip("\n")), "{ .text .output }")


def shortened(log: str) -> str:
    """Return a long log without its middle, which is in the notebook to download."""
    lines = log.split("\n")
    is_model = re.match(r"\w+\($", lines[0])
    if len(lines) <= LONGEST_LOG or is_model:
        return log
    half = SHOWN_LOG // 2
    gap = f"... {len(lines) - 2 * half} more lines in the notebook ..."
    return "\n".join([*lines[:half], gap, *lines[-half:]])


def site_links(markdown: str) -> str:
    """Point links at pages: to a sibling notebook, or into `docs/`."""
    markdown = re.sub(r"\]\((\w+)\.ipynb(#[\w-]*)?\)", r"](\1.md\2)", markdown)
    return re.sub(r"\]\(\.\./docs/", "](../", markdown)
