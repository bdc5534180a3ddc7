"""The README, the site and the repository say what is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from zipfile import ZipFile

import nbformat
import pytest
from helpers import COMPARED, ROOT, examples_of, load
from mkdocs.exceptions import PluginError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import hbp

REPOSITORY = "https://github.com/somebody/hbp"  # for instance
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.md")])]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (code, shown) in enumerate(examples_of(page))
    if not (shown and page.name in COMPARED)  # Those run in test_howto.
]
# Where a link may lead. Whatever is added here is a place that readers can reach.
PUBLIC_HOSTS = {
    "arxiv.org",
    "curvlinops.readthedocs.io",
    "docs.backpack.pt",
    "docs.pytorch.org",
    "doi.org",
    "docs.astral.sh",
    # Not places but names: of the parts of an SVG figure.
    "creativecommons.org",
    "matplotlib.org",
    "purl.org",
    "www.w3.org",
    "127.0.0.1",  # the browser checks serve the site to themselves
    # Places where the repository may be, and a notebook may be opened.
    "colab.research.google.com",
    "example.org",
    "github.com",
}
# Written so that the expression does not match itself.
MACHINE_PATH = re.compile(r"""(?<![\w.])/(?:wor[k]|roo[t]|hom[e]|User[s]|tm[p])/""")


def load_hook(name: str) -> ModuleType:
    """Import a hook as mkdocs does: its neighbours can be imported from it."""
    folder = ROOT / "docs" / "hooks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return load(folder / f"{name}.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as `make docs` builds it."""
    katex = ROOT / "docs" / "hooks" / "node_modules"
    if not katex.exists() and "CI" not in os.environ:
        pytest.skip("KaTeX is not installed: `make docs` installs it with npm")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    names = {str(example.id) for example in EXAMPLES}
    assert {"uses.md-0", "convert.md-0", "index.md-0"} <= names


def test_readme_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("name", [path.stem for path in TUTORIALS])
def test_site_has_the_tutorials(site: Path, name: str) -> None:
    html = (site / "tutorials" / name / "index.html").read_text("utf-8")
    assert 'class="highlight"' in html
    assert 'class="output highlight"' in html
    assert re.search(rf'<img alt="[^"]+" src="[^"]*{name}_\d+_\d\.(svg|png)"', html)
    assert len(html.encode()) <= 60 * 1024, "a page is to be light"
    script = f"tutorials/{name}.py"
    assert (site / script).read_bytes() == (ROOT / script).read_bytes()
    notebook = (site / "tutorials" / f"{name}.ipynb").read_text("utf-8")
    assert not re.search(r"\]\((?!https://|#)[^)]*\.(md|ipynb)", notebook)


def test_site_documents_every_public_name(site: Path) -> None:
    """In an entry of its own, or among the layers of a rule."""
    html = "".join(page.read_text("utf-8") for page in site.glob("api/*/index.html"))
    anchors = {name.split(".")[-1] for name in re.findall(r'id="(hbp\.[\w.]+)"', html)}
    listed = set(re.findall(r"<code>(HBP[A-Za-z]\w+)</code>", html))
    public = [
        name
        for name, value in vars(hbp).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert public
    assert {*public} <= anchors | listed
    # What is listed is there.
    assert listed <= {*public}


def test_site_shows_no_markup_of_another_language(site: Path) -> None:
    """Docstrings are Markdown here; a Sphinx role would be shown as it is typed."""
    pages = [page.read_text("utf-8") for page in site.glob("api/*/index.html")]
    assert pages
    for html in pages:
        assert re.findall(r":(?:class|func|meth|mod|attr|math):|::</p>", html) == []


def test_what_is_returned_has_one_row(site: Path) -> None:
    """Unless told otherwise, the docstrings' reader takes each line for a value."""
    html = "".join(page.read_text("utf-8") for page in site.glob("api/*/index.html"))
    tables = re.findall(r"Returns:</span></p>\s*<table>.*?</table>", html, re.S)
    assert len(tables) > 10
    assert {table.count('class="doc-section-item"') for table in tables} == {1}


def test_site_asks_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text("utf-8")
        loaded = re.findall(r'(?:src|<link[^>]+href)="((?:https?:)?//[^"]+)"', html)
        assert loaded == [], page


@pytest.mark.parametrize("name", ["overview", "layout"])
def test_figure_is_what_its_script_draws(name: str) -> None:
    drawn = load(ROOT / "tools" / f"draw_{name}.py").draw()
    assert (ROOT / f"docs/assets/{name}.svg").read_text("utf-8") == drawn


def code(source: str, *outputs: NotebookNode, **metadata: Any) -> NotebookNode:
    """An executed cell."""
    return new_code_cell(
        source, execution_count=1, outputs=list(outputs), metadata=metadata
    )


def name_of(path: Path) -> str:
    return path.name


class TestNotebookHook:
    """What a notebook becomes, and what stops the build of the site."""

    hook = load_hook("notebooks")
    figure = new_output("display_data", data={"image/svg+xml": "<svg/>"})

    def render(self, *cells: NotebookNode) -> tuple[str, dict[str, bytes]]:
        return self.hook.render(new_notebook(cells=list(cells)), "name")

    def test_cells_become_markdown(self) -> None:
        said = new_output("stream", name="stdout", text="1\n")
        result = new_output("execute_result", data={"text/plain": "2"})
        cells = new_markdown_cell("# Title"), code("print(1)\n1 + 1", said, result)
        page, figures = self.render(*cells)
        assert page == (
            "# Title\n\n```python\nprint(1)\n1 + 1\n```\n\n"
            "``` { .text .output }\n1\n```\n\n``` { .text .output }\n2\n```\n"
        )
        assert figures == {}

    def test_a_fence_in_the_text_does_not_end_the_block(self) -> None:
        page, _ = self.render(code("'```'"))
        assert page == "````python\n'```'\n````\n"

    @pytest.mark.parametrize("kind", ["display_data", "execute_result"])
    def test_figures_become_files(self, kind: str) -> None:
        data = {"image/svg+xml": "<svg/>", "text/plain": "Drawing"}
        page, figures = self.render(code("plot()", new_output(kind, data), alt="Two"))
        (name,) = figures
        assert f"![Two]({name})" in page
        assert "Drawing" not in page
        assert figures == {name: b"<svg/>"}

    def test_links_are_those_of_the_site(self) -> None:
        links = "[a](02_b.ipynb#c) [d](../docs/api/b.md#e) [f](https://arxiv.org)"
        page, _ = self.render(new_markdown_cell(links))
        assert page == "[a](02_b.md#c) [d](../api/b.md#e) [f](https://arxiv.org)\n"

    def test_neighbouring_solutions_share_a_fold(self) -> None:
        words = new_markdown_cell("Because.", metadata={"tags": ["solution"]})
        page, _ = self.render(code("1"), code("2", tags=["solution"]), words, code("3"))
        opening = "/// details | Solution\n    type: solution"
        assert page.count(opening) == 1
        before, _, rest = page.partition(opening)
        inside, _, after = rest.partition("\n///\n")
        assert "1" in before
        assert "2" in inside
        assert "Because." in inside
        assert "3" in after

    def test_setup_is_folded(self) -> None:
        install, imports = code("os.environ.get('HBP_INSTALL')"), code("import torch")
        words = new_markdown_cell("Now.")
        page, _ = self.render(
            new_markdown_cell("# T"), install, imports, words, code("3")
        )
        fold = page[page.index("/// details") : page.index("\n///\n")]
        assert fold.startswith("/// details | Code of the setup\n    type: setup\n")
        assert "HBP_INSTALL" in fold
        assert "import torch" in fold
        assert "```python\n3\n```" in page.partition("Now.")[2]

    @pytest.mark.parametrize("lines", [12, 13])
    def test_long_code_of_a_figure_is_folded(self, lines: int) -> None:
        source = "x = 1\n" * (lines - 1) + "plot()"
        drawn = new_output("display_data", {"image/svg+xml": "<svg/>"})
        page, (name, *_) = self.render(code(source, drawn, alt="Two"))
        fold, _, rest = page.partition("\n///\n")
        if lines == 12:
            assert "/// details" not in page
            return
        assert fold.startswith(
            "/// details | Code of the figure\n    type: figure\n\n```python\nx = 1"
        )
        assert rest.strip() == f"![Two]({name})"

    def test_claims_are_folded_and_leave_a_line(self) -> None:
        source = (
            'print(x)\n\n# So far.\nassert x > 1\nassert x < 3\nprint("In between.")'
        )
        said = new_output("stream", name="stdout", text="2\nIn between.\n")
        page, _ = self.render(code(source, said))
        assert page == (
            "```python\nprint(x)\n```\n\n``` { .text .output }\n2\n```\n\n"
            "/// details | ✓ Checked: In between.\n    type: checked\n\n"
            "```python\n# So far.\nassert x > 1\nassert x < 3\n"
            'print("In between.")\n```\n\n///\n'
        )

    @pytest.mark.parametrize("source", ['print("Hello.")', "assert x\nx = 2"])
    def test_what_makes_no_claim_at_its_end_stays(self, source: str) -> None:
        assert self.render(code(source))[0] == f"```python\n{source}\n```\n"

    def test_a_model_is_shown_whole(self) -> None:
        layers = [f"  ({k}): HBPReLU()" for k in range(40)]
        said = new_output(
            "stream", name="stdout", text="\n".join(["HBPSequential(", *layers, ")"])
        )
        assert "(20): HBPReLU()" in self.render(code("print(model)", said))[0]

    def test_the_middle_of_a_long_log_is_left_out(self) -> None:
        lines = [f"line {k}" for k in range(100)]
        said = new_output("stream", name="stdout", text="\n".join(lines))
        page, _ = self.render(code("train()", said))
        assert "line 0\n" in page
        assert "line 99\n" in page
        assert "line 50" not in page
        assert "96 more lines" in page

    def test_a_cell_that_was_not_run_stops_the_build(self) -> None:
        with pytest.raises(PluginError, match="cell 1 was not run"):
            self.render(new_code_cell("1"))

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (figure, "give the cell an alt text"),
            (new_output("error", ename="KeyError", evalue="'x'"), "stores an error"),
            (new_output("stream", name="stderr", text="beware"), "stores a warning"),
            (new_output("display_data", data={"a/b": "c"}), "unknown kind"),
        ],
    )
    def test_a_bad_output_stops_the_build(self, output, message: str) -> None:
        with pytest.raises(PluginError, match=message):
            self.render(code("1", output))

    @pytest.mark.parametrize(
        ("site", "expected"),
        [
            ("", "two\nwords, d, [f](https://arxiv.org/b.md) and [g](#h)"),
            (
                "https://arxiv.org/hbp/",
                "[two\nwords](https://arxiv.org/hbp/tutorials/02_b/#c), "
                "[d](https://arxiv.org/hbp/api/b/), "
                "[f](https://arxiv.org/b.md) and [g](#h)",
            ),
        ],
    )
    def test_a_notebook_alone(self, site: str, expected: str, tmp_path: Path) -> None:
        words = "[two\nwords](02_b.ipynb#c), [d](../docs/api/b.md), "
        cell = new_markdown_cell(words + "[f](https://arxiv.org/b.md) and [g](#h)")
        nbformat.write(new_notebook(cells=[cell]), tmp_path / "01_a.ipynb")
        found = nbformat.reads(self.hook.alone(tmp_path / "01_a.ipynb", site), 4)
        assert found.cells[0].source == expected

    def test_a_notebook_with_the_wheel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(self.hook, "DIST", tmp_path)
        assert self.hook.zipped("a.ipynb", b"notebook") == b""
        (tmp_path / "hbp-1.whl").write_bytes(b"wheel")
        with ZipFile(BytesIO(self.hook.zipped("a.ipynb", b"notebook"))) as archive:
            found = {name: archive.read(name) for name in archive.namelist()}
        assert found == {"a.ipynb": b"notebook", "hbp-1.whl": b"wheel"}

    def test_header(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = {
            "seconds": 83,
            "machine": "a computer",
            "date": "2026-01-02",
            "torch": "2.15.0",
            "commit": "abc",
        }
        monkeypatch.setattr(self.hook, "address", lambda: "")
        page = self.hook.with_header("# Title\n\nText\n", "01_a", {"cpu": run}, 7, True)
        assert page.startswith('# Title\n\n<nav class="hbp-actions"')
        assert page.endswith("\n\nText\n")
        assert "[Download .ipynb](01_a.ipynb){ download }" in page
        assert "[Download with hbp](01_a.zip){ download }" in page
        assert "About 7 minutes to read.<br>\nRan in 1 min 23 s on a computer, " in page
        assert "Colab" not in page
        assert "View source" not in page

        monkeypatch.setattr(self.hook, "address", lambda: REPOSITORY)
        page = self.hook.with_header("# Title\n", "01_a", {}, 7, False)
        assert "01_a.zip" not in page
        assert "github/somebody/hbp/blob/main/tutorials/01_a.ipynb" in page
        assert f"[View source]({REPOSITORY}/blob/main/tutorials/01_a.py)" in page


class TestRepository:
    """One address, and what follows from it."""

    hook = load_hook("repository")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        lines = f'[project]\n[project.urls]\nRepository = "{REPOSITORY}.git"\n'
        (tmp_path / "pyproject.toml").write_text(lines)
        return tmp_path

    def test_address(self, root: Path) -> None:
        assert self.hook.address(root) == REPOSITORY
        (root / "pyproject.toml").write_text("[project]\n")
        assert self.hook.address(root) == ""

    def test_colab_reads_from_github_alone(self) -> None:
        name = "tutorials/01_a.ipynb"
        assert self.hook.colab_link("", name) == ""
        assert self.hook.colab_link("https://example.org/hbp", name) == ""
        found = self.hook.colab_link(REPOSITORY, name)
        assert found.endswith(f"/github/somebody/hbp/blob/main/{name}")

    def test_badges(self) -> None:
        readme = "a\n<!-- badges -->\nold\n<!-- end of badges -->\nb\n"
        with_badges = self.hook.with_badges(readme, REPOSITORY)
        assert "old" not in with_badges
        assert with_badges.count(REPOSITORY) == 2
        without = self.hook.with_badges(with_badges, "")
        assert without == "a\n<!-- badges -->\n<!-- end of badges -->\nb\n"

    def test_install_source(self) -> None:
        script = 'x = 1\nhbp_source = ""\n'
        filled = self.hook.with_install_source(script, REPOSITORY)
        assert f'\nhbp_source = "hbp[tutorials] @ git+{REPOSITORY}"\n' in filled
        assert self.hook.with_install_source(filled, "") == script

    def test_readme_links(self) -> None:
        """Picture and link, in the order of the substitutions in pyproject.toml."""
        settings = "replacement = ''\nreplacement = '\\1'\n"
        filled = self.hook.with_readme_links(settings, REPOSITORY)
        assert f"'![\\1]({REPOSITORY}/raw/main/\\2)'\n" in filled
        assert f"'[\\1]({REPOSITORY}/blob/main/\\2)'\n" in filled
        assert self.hook.with_readme_links(filled, "") == settings

    @pytest.mark.parametrize("path", hook.writers(), ids=name_of)
    def test_what_follows_is_up_to_date(self, path: Path) -> None:
        text = path.read_text("utf-8")
        write, where = self.hook.writers()[path], self.hook.address()
        assert write(text, f"{REPOSITORY}/new") != text
        assert write(text, where) == text, "`make sync` writes it anew"


class TestPagesHook:
    """What a page must have, and what it can do without."""

    hook = load_hook("pages")

    @pytest.mark.parametrize("image", ["<img src='a'>", '<img alt="" src="a">'])
    def test_an_image_without_alternative_stops_the_build(self, image: str) -> None:
        page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
        with pytest.raises(PluginError, match=r"a.md shows an image without"):
            self.hook.on_page_content(image, page=page)
        good = '<img alt="A curve." src="a">'
        assert self.hook.on_page_content(good, page=page) == good

    def test_markup_that_changes_nothing_is_left_out(self) -> None:
        page = (
            '<p title="&quot;">\n   a</p>\n\n<pre><span></span><span class="n">x</span>'
            '<span class="w">  </span>\n    <span class="k">if</span> &quot;</pre>'
            "\n  <script>a  \n  b</script>"
        )
        assert self.hook.on_post_page(page) == (
            '<p title="&quot;">\na</p>\n<pre>x  \n    <span class="k">if</span> "</pre>'
            "\n<script>a  \n  b</script>"
        )


def our_files() -> list[Path]:
    """What is, or would be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # An .svg and an .ipynb are text, a .png is not.
    return [ROOT / name for name in names if Path(name).suffix not in {".png", ".gz"}]


def test_files_name_no_machine() -> None:
    findings = []
    for path in our_files():
        if not path.exists():
            continue
        text = path.read_text("utf-8")
        found = MACHINE_PATH.findall(text)
        hosts = re.findall(r"\w+://([\w.-]+)", text)
        found += [host for host in hosts if host not in PUBLIC_HOSTS]
        findings += [f"{path.relative_to(ROOT)}: {what}" for what in found]
    assert findings == []
