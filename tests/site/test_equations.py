"""The equations of the mathematics: checked, numbered, and cited by the code."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, load
from mkdocs.exceptions import PluginError

PAGE = "\n".join(
    (ROOT / "docs" / f"{name}.md").read_text("utf-8")
    for name in ("mathematics", "solving")
)
CELL = re.compile(
    r'^\?\?\? example "Check it yourself"\n\n {4}```python\n(.*?)^ {4}```$', re.M | re.S
)


hook = load(ROOT / "docs" / "hooks" / "equations.py")


def sections() -> dict[str, str]:
    """The page by heading."""
    parts = re.split(r"^##+ (.+?)(?: \{ #[\w-]+ \})?$", PAGE, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


CELLS = {
    title: textwrap.dedent(code)
    for title, text in sections().items()
    for code in CELL.findall(text)
}


@pytest.mark.parametrize("title", CELLS)
def test_cell_runs(title: str) -> None:
    exec(compile(CELLS[title], title, "exec"), {"__name__": "cell"})


@pytest.mark.parametrize("title", CELLS)
def test_cell_asserts_something_in_double_precision(title: str) -> None:
    assert re.search(r"^ *assert ", CELLS[title], re.M)
    assert "float64" in CELLS[title] or ".double()" in CELLS[title]
    # As wide as the column of a page.
    assert max(map(len, CELLS[title].splitlines())) <= 70


def test_sections_with_equations_have_one_cell() -> None:
    counts = {
        title: len(CELL.findall(text))
        for title, text in sections().items()
        if r"\label{" in text
    }
    assert len(counts) > 15
    assert {title: count for title, count in counts.items() if count != 1} == {}
    # None is written in a way that this file does not find.
    assert PAGE.count("```python") == len(CELLS) == len(counts)


def test_code_and_page_cite_each_other() -> None:
    labels = hook.labels(PAGE)
    cited = hook.cited_in(ROOT / "src" / "hbp")
    assert len(labels) > 25
    assert sorted(labels) == sorted(cited)


def test_layers_cite_their_rules() -> None:
    """What reads the source finds a class by its docstring, a method by a comment."""
    cited = hook.cited_in(ROOT / "src" / "hbp")
    assert ("hbp.core.layers.linear", "HBPLinear") in cited["eq-linear"]
    product = "hbp.core.operators", "KroneckerBlock.product"
    assert product in cited["eq-linear-product"]
    assert ("hbp.core.module", "") in cited["eq-hbp"]


class TestHook:
    """What it makes of a page, and what stops the build."""

    formula = "$$\na = b\n\\label{eq-one}\n$$"

    @pytest.fixture(autouse=True)
    def known(self) -> Iterator[None]:
        hook.numbers.update({"eq-one": 1, "eq-two": 2})
        hook.citations["eq-one"] = [("hbp.a", "B.c"), ("hbp.a", "")]
        yield
        hook.numbers.clear()
        hook.citations.clear()

    def render(self, markdown: str) -> str:
        return hook.render(markdown, "page.md")

    def test_equations_get_number_anchor_and_code(self) -> None:
        assert self.render(f"Text.\n\n{self.formula}\n\nText.") == (
            "Text.\n\n"
            '<div class="equation" id="eq-one" markdown>\n\n'
            "$$\na = b \\tag{1}\n$$\n\n"
            "In code: [`B.c`][hbp.a.B]{ optional }, [`hbp.a`][hbp.a]{ optional }\n"
            "{ .implementation }\n\n</div>\n\nText."
        )

    def test_other_formulas_stay(self) -> None:
        text = "$$\na = b\n$$\n\nand $a$"
        assert self.render(text) == text

    def test_links_by_the_label_show_the_number(self) -> None:
        links = "[eq-two](mathematics.md#eq-two) and [words](#eq-two)"
        shown = "[(2)](mathematics.md#eq-two) and [words](#eq-two)"
        assert self.render(links) == shown

    @pytest.mark.parametrize(
        "code", ["```\n{}\n```", "    ```text\n    {}\n    ```", "`[eq-no](#eq-no)`"]
    )
    def test_code_stays(self, code: str) -> None:
        text = code.format(self.formula)
        assert self.render(text) == text
        assert hook.labels(text) == []

    @pytest.mark.parametrize(
        ("markdown", "message"),
        [
            ("[eq-no](#eq-no)", "no equation has the label eq-no"),
            ("[words](a.md#eq-no)", "no equation has the label eq-no"),
            ("Text $$a \\label{eq-one}$$", r"\\label\{eq-one\} is in no display"),
            ("$$\na\n\\label{eq-one}\n\\label{eq-two}\n$$", "one label"),
            ("$$\na\n\\label{One}\n$$", "one label like eq-name"),
        ],
    )
    def test_mistakes_stop_the_build(self, markdown: str, message: str) -> None:
        with pytest.raises(PluginError, match=message):
            self.render(markdown)

    def files(self, **pages: str) -> SimpleNamespace:
        found = [
            SimpleNamespace(src_uri=f"{name}.md", content_string=text)
            for name, text in pages.items()
        ]
        return SimpleNamespace(documentation_pages=lambda: found)

    def test_numbers_count_by_page(self) -> None:
        other = self.formula.replace("one", "other")
        second = self.formula.replace("one", "second")
        hook.on_files(self.files(a=f"{self.formula}\n\n{other}", b=second), None)
        assert hook.numbers == {"eq-one": 1, "eq-other": 2, "eq-second": 1}

    @pytest.mark.parametrize("pages", [("a", "a"), ("a", "b")])
    def test_a_label_for_two_stops_the_build(self, pages: tuple[str, str]) -> None:
        texts = dict.fromkeys(pages, self.formula)
        if len(texts) == 1:
            texts = {"a": f"{self.formula}\n\n{self.formula}"}
        with pytest.raises(PluginError, match=r"\\label\{eq-one\} names two equations"):
            hook.on_files(self.files(**texts), None)

    def test_numbers_follow_the_words_of_docstrings(self) -> None:
        page = SimpleNamespace(file=SimpleNamespace(src_uri="api.md"))
        html = '<autoref domain="py" identifier="eq-two">the <em>rule</em></autoref>'
        shown = hook.on_page_content(html, page, None, None)
        assert shown == html.replace("</autoref>", " (2)</autoref>")
        with pytest.raises(PluginError, match=r"api\.md: no equation .* eq-no"):
            hook.on_page_content(html.replace("eq-two", "eq-no"), page, None, None)


def test_citations_name_the_innermost_definition(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text('"""See eq-one."""\n', "utf-8")
    source = """
    class A:
        '''[Words][eq-one].'''

        def f(self):
            # eq-two
            return seq-two
    """
    (package / "m.py").write_text(textwrap.dedent(source), "utf-8")
    assert hook.cited_in(package) == {
        "eq-one": [("pack", ""), ("pack.m", "A")],
        "eq-two": [("pack.m", "A.f")],
    }
