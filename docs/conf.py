"""How Sphinx makes one site of README, docs and notebooks: `make docs`.

The source is the whole repository, so that links which work on the forge work here too.
New documents and notebooks need no line here: they are found by name.
"""

import shutil
from html import escape
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers.special import TextLexer
from sphinx import addnodes

ROOT = Path(__file__).parent.parent

project = html_title = "Federated learning for hospitals"
extensions = ["myst_nb"]
root_doc = "README"
include_patterns = ["*.md", "data/*.md", "docs/**.md", "notebooks/[0-9][0-9]_*.ipynb"]
exclude_patterns = [".venv", "build", "runs", "**/.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

html_theme = "furo"
html_favicon = "pics/icon.svg"
html_copy_source = html_show_sphinx = html_show_copyright = False
html_math_renderer = "mathml"  # browsers know it; MathJax would come from another host

nb_execution_mode = "off"  # the outputs are committed
nb_ipywidgets_js = {}  # it would come from another host
suppress_warnings = ["mystnb.unknown_mime_type"]  # of record(): its text is shown
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

SIDEBAR = """

```{toctree}
:hidden:
:glob:
:caption: Notebooks
notebooks/*
```

```{toctree}
:hidden:
:glob:
:caption: Guides
docs/*
docs/*/*
data/*
```

```{toctree}
:hidden:
:glob:
:caption: Project
[A-Q]*
[S-Z]*
```
"""
linked = set()  # source files and folders that documents link to


def add_sidebar(app, docname, source):
    if docname == root_doc:
        source[0] += SIDEBAR


def page_of(path):
    """The name of the page that shows a source file or folder."""
    name = path.relative_to(ROOT).as_posix()
    return f"source/{name}/index" if path.is_dir() else f"source/{name}"


def link_to_sources(app, doctree):
    """Let links to source files and folders lead to pages that show them."""
    for node in list(doctree.findall(nodes.Element)):
        if not isinstance(node, addnodes.download_reference | addnodes.pending_xref):
            continue
        path = (ROOT / app.env.docname).parent.joinpath(node["reftarget"]).resolve()
        if path.exists() and ROOT in path.parents and path.suffix != ".csv":
            linked.add(path)
            uri = app.builder.get_relative_uri(app.env.docname, page_of(path))
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri))


def source_pages(app):
    """A page for each linked file, and for each file of a linked folder."""
    folders = {path for path in linked if path.is_dir()}
    inside = {path for folder in folders for path in folder.rglob("[a-zA-Z_]*.*")}
    files = {path for path in inside if "__pycache__" not in path.parts}
    for path in sorted(linked - folders | files):
        if path.is_file():
            language = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
            code = path.read_text(encoding="utf-8")
            body = app.builder.highlighter.highlight_block(code, language)
            yield source_page(path, body)
    for folder in folders:
        start, items = page_of(folder), ""
        for path in sorted(path for path in files if folder in path.parents):
            if path.is_file():
                uri = app.builder.get_relative_uri(start, page_of(path))
                name = escape(path.relative_to(folder).as_posix())
                items += f'<li><a href="{uri}">{name}</a></li>'
        yield source_page(folder, f"<ul>{items}</ul>")


def source_page(path, body):
    title = escape(path.relative_to(ROOT).as_posix())
    context = {"title": title, "body": f"<h1>{title}</h1>{body}"}
    return page_of(path), context, "page.html"


def write_math(block):
    def visit(self, node):
        self.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode

    return visit, None


def write_index(app, error):
    if not error:
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app):
    app.add_lexer("nft", TextLexer)
    app.add_html_math_renderer("mathml", write_math(False), write_math(True))
    app.connect("source-read", add_sidebar)
    app.connect("doctree-read", link_to_sources, priority=100)  # before downloads
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", write_index)
