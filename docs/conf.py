"""The documentation site: the pages of this folder, the records of the benchmarks, and a reference made of docstrings.

``make docs`` builds it into ``build/docs``, without the network. Pages are Markdown that reads on the code host too, so
links to files outside of this folder go by the repository's paths, and are turned here into what the site has.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from revcore import __version__  # noqa: E402

project = "revcore"
author = "the revcore authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
html_theme = "furo"
html_title = f"revcore {version}"
html_show_sphinx = False
html_copy_source = False
highlight_language = "text"
suppress_warnings = ["toc.not_readable"]  # index.md names guides that others write, and may be there before them

# Headings can be linked to by their words, as on the code host. (No level above 3 is linked to.)
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a field is described once, in its class

# A name in a docstring that leads nowhere is a mistake, unless it is another library's or one of the few of ours that
# appear in a signature and are nobody's business.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|flax|jax|numpy|os|pathlib|torch)\..*"),
    ("py:class", r"revcore\.coupling\.FunctionCoupling|revcore\.lattice\.Lattice|revcore_jax\._layout\..*"),
    ("py:class", r"revcore_jax\.nnx\.M|revcore_torch\.hf\.(convert\.Model|kinds\.Settings)|revcore_torch\.session\..*"),
    ("py:class", r"revcore_torch\.revlib\..*"),  # old names: docs/migration.md
    ("py:mod", r"revcore_jax\._.*"),
]

# What lies outside of this folder in the repository, and is a page here.
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "revcore/weights.py": "api/weights",
    **{f"benchmarks/results/{file.name}": f"results/{file.stem}" for file in (ROOT / "docs/results").glob("*.md")},
}


def link_inward(app: Sphinx, doctree: nodes.document) -> None:
    """Turn links that leave this folder: to the pages of :data:`PAGES`, and to downloads of other files.

    A link to a folder is left as its words. What leads nowhere is left to Sphinx, which warns.
    """
    found = [*doctree.findall(addnodes.pending_xref), *doctree.findall(addnodes.download_reference)]
    for link in found:
        path = _path(app, link) if link.get("reftype") == "myst" else ""
        how = {"reftype": "myst", "refexplicit": True, "refdoc": link.get("refdoc")}
        if path in PAGES:
            place = None if path == "README.md" else link.get("reftargetid")  # the front page here has other headings
            new = addnodes.pending_xref(
                "", *link.children, refdomain="doc", reftarget=PAGES[path], reftargetid=place, **how
            )
            link.replace_self(new)
        elif path and (ROOT / path).is_dir():
            link.replace_self(link.children)
        elif path and (ROOT / path).is_file():
            link.replace_self(addnodes.download_reference("", "", *link.children, reftarget=f"/../{path}", **how))


def _path(app: Sphinx, link: nodes.Element) -> str:
    """Return where in the repository a link leads to; ``""`` if it stays in this folder."""
    target = link["reftarget"]
    if target.startswith(f"{ROOT}/") and link.get("refdomain") == "doc":  # MyST has found it, and left out its ending
        path = Path(f"{target}.md")
    else:
        path = Path(app.env.relfn2path(target.partition("#")[0], link["refdoc"])[1])
    inside = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs")
    return path.relative_to(ROOT).as_posix() if inside else ""


def give_title(app: Sphinx, docname: str, source: list[str]) -> None:
    """Head a record of the benchmarks that begins with its figures, as the command printed it, by its file's name."""
    if docname.startswith("results/") and not source[0].startswith("# "):
        source[0] = f"# {docname.removeprefix('results/')}\n\n{source[0]}"


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", link_inward, priority=100)  # before downloads are collected
    app.connect("source-read", give_title)
