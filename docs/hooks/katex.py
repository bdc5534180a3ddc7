"""Serve KaTeX, which sets the formulas, from the site itself."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

DIST = Path(__file__).parent / "node_modules" / "katex" / "dist"
WANTED = ["katex.min.js", "katex.min.css", "contrib/auto-render.min.js"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add KaTeX's script, style sheet and fonts to the files of the site."""
    if not DIST.is_dir():
        raise PluginError(
            "KaTeX is not installed, so the formulas cannot be shown. `make docs` "
            "installs it and needs npm, which comes with Node.js."
        )
    fonts = [f"fonts/{path.name}" for path in sorted(DIST.glob("fonts/*.woff2"))]
    for name in [*WANTED, *fonts]:
        content = (DIST / name).read_bytes()
        files.append(File.generated(config, f"assets/katex/{name}", content=content))
    return files
