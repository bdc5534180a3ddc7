"""The README, the site and the repository say what is true."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mkdocs.exceptions import PluginError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import hbp

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    )
]
# Where a link may lead. Whatever is added here is a place that readers can reach.
PUBLIC_HOSTS = {
    "arxiv.org",
    "doi.org",
    # Not places but names: of the parts of an SVG figure.
    "creativecommons.org",
    "matplotlib.org",
    "purl.org",
    "www.w3.org",
    "127.0.0.1",  # the browser checks serve the site to themselves
}
# Written so that the expression does not match itself.
MACHINE_PATH = re.compile(r"""(?<![\w.])/(?:wor[k]|roo[t]|hom[e]|User[s]|tm[p])/""")


def load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert {"README.md-0", "convert.md-0", "index.md-0"} <= names


def test_readme_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("name", ["01_single_layer_mnist", "02_sequential_cifar10"])
def test_site_has_the_tutorials(site: Path, name: str) -> None:
    html = (site / "tutorials" / name / "index.html").read_text("utf-8")
    assert 'class="highlight"' in html
    assert 'class="output highlight"' in html
    assert re.search(rf'<img alt="[^"]+" src="[^"]*{name}-\d+\.(svg|png)"', html)


def test_site_documents_every_public_name(site: Path) -> None:
    anchors = set(re.findall(r'id="([\w.]+)"', (site / "api/index.html").read_text()))
    public = [
        value
        for name, value in vars(hbp).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert public
    for value in public:
        places = {f"hbp.{value.__name__}", f"{value.__module__}.{value.__name__}"}
        assert places & anchors, f"docs/api.md lacks {value.__name__}"


def test_site_shows_no_markup_of_another_language(site: Path) -> None:
    """Docstrings are Markdown here; a Sphinx role would be shown as it is typed."""
    html = (site / "api" / "index.html").read_text("utf-8")
    assert re.findall(r":(?:class|func|meth|mod|attr|math):|::</p>", html) == []


def test_site_asks_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text("utf-8")
        loaded = re.findall(r'(?:src|<link[^>]+href)="((?:https?:)?//[^"]+)"', html)
        assert loaded == [], page


def test_overview_figure_is_what_its_script_draws() -> None:
    drawn = load(ROOT / "tools" / "draw_overview.py").draw()
    assert (ROOT / "docs/assets/overview.svg").read_text("utf-8") == drawn


class TestNotebookHook:
    """What stops the build of the site."""

    hook = load(ROOT / "docs" / "hooks" / "notebooks.py")
    figure = new_output("display_data", data={"image/svg+xml": "<svg/>"})

    def render(self, *cells) -> tuple[str, dict]:
        return self.hook.render(new_notebook(cells=list(cells)), "name")

    def test_cells_become_markdown(self) -> None:
        said = new_output("stream", name="stdout", text="1\n")
        cell = new_code_cell("print(1)", execution_count=1, outputs=[said])
        page, figures = self.render(new_markdown_cell("# Title"), cell)
        assert page == (
            "# Title\n\n```python\nprint(1)\n```\n\n``` { .text .output }\n1\n```\n"
        )
        assert figures == {}

    def test_figures_become_files(self) -> None:
        cell = new_code_cell(
            "plot()", execution_count=1, outputs=[self.figure], metadata={"alt": "Two"}
        )
        page, figures = self.render(cell)
        assert "![Two](name-1.svg)" in page
        assert figures == {"name-1.svg": "<svg/>"}

    def test_links_are_those_of_the_site(self) -> None:
        links = "[a](02_b.ipynb#c) [d](../docs/api.md#e) [f](https://arxiv.org)"
        page, _ = self.render(new_markdown_cell(links))
        assert page == "[a](02_b.md#c) [d](../api.md#e) [f](https://arxiv.org)\n"

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
            self.render(new_code_cell("1", execution_count=1, outputs=[output]))


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
