"""Sphinx's settings for ``make docs``: the site of the repository's own Markdown pages, where they are.

The source folder is the repository, so that a link between pages is the same on a code host and in the site. A link to
a file that is no page is a download, or leads to the code host where ``-D repository=ADDRESS`` says which; a link to a
folder leads to its README. What stands in the site's margin are the links in the lists of a few pages (``CONTENTS``).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import lopt

ROOT = Path(__file__).resolve().parents[1]

project = "lopt"
version = release = lopt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md"]
include_patterns += ["benchmarks/README.md", "benchmarks/results/experiments/*/README.md", "lopt/weights/README.md"]
# Not walked through.
exclude_patterns = [".*", "*.egg-info", "build", "cmake", "csrc", "cuda", "dist", "examples", "out", "python_tests"]
exclude_patterns += ["runs"]

myst_heading_anchors = 4  # as code hosts make them
suppress_warnings = ["myst.header"]  # sections of the changelog repeat

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "transformers"]  # what a callback is for need not be installed
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_param = False
napoleon_use_rtype = False
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"lopt {release}"
html_static_path = ["static"]
templates_path = ["templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"  # browsers draw it; nothing is fetched
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

#: Pages whose links, heading by heading, are the site's table of contents.
CONTENTS = ("docs/index", "docs/guide-experiments", "docs/notebook/README", "docs/reference/index")
HEADING, ITEM = re.compile(r"#+ (.+)"), re.compile(r"\* \[([^]]+)\]\(([^)]+)\.md\)|\| .*\]\(([^)]+)\.md\) \|$")


def contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the table of contents that the lists of a page are."""
    if page not in CONTENTS:
        return
    parts: list[tuple[str, list[str]]] = []
    for line in source[0].splitlines():
        if heading := HEADING.match(line):
            parts.append((heading[1], []))
        elif item := ITEM.match(line):
            title, listed, cell = item.groups()
            parts[-1][1].append(f"{title} <{listed}>" if title and page == root_doc else listed or cell)
    for caption, pages in parts:
        if pages:
            captioned = f":caption: {caption}\n" if page == root_doc else ""
            source[0] += "\n```{toctree}\n:hidden:\n" + captioned + "\n" + "\n".join(pages) + "\n```\n"


class RepositoryLinks(SphinxTransform):
    """Links to what is in the repository and is no page."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        here, host = (ROOT / self.env.docname).parent, self.config.repository
        for node in self._links():
            target, _, anchor = node["reftarget"].partition("#")
            if node.get("refdomain") == "doc":  # Markdown that is no page; its name is that from the root
                target = os.path.relpath(ROOT / f"{target}.md", here)
            path = here.joinpath(target).resolve()
            if not target or not path.is_relative_to(ROOT) or not path.exists():
                continue  # Sphinx warns
            page = self.env.path2doc(str(path / "README.md"))
            same = {"refdoc": self.env.docname, "reftype": "myst", "refexplicit": True}
            if page in self.env.found_docs:
                new: nodes.Element = pending_xref(refdomain="doc", reftarget=page, reftargetid=None, **same)
            elif host:
                kind = "tree" if path.is_dir() else "blob"
                place = f"{path.relative_to(ROOT)}#{anchor}".removesuffix("#")
                new = nodes.reference(refuri=f"{host}/{kind}/HEAD/{place}")
            elif path.is_dir():
                new = nodes.inline()
            else:
                new = download_reference(refdomain=None, reftarget=target, **same)
            new.extend(node.children)
            node.replace_self(new)

    def _links(self) -> Iterator[nodes.Element]:
        yield from list(self.document.findall(download_reference))
        for node in list(self.document.findall(pending_xref)):
            page = node["reftarget"] if node.get("refdomain") == "doc" else None
            if node.get("reftype") == "myst" and page not in self.env.found_docs:
                yield node


def formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """As MathML."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def first_page(app: Sphinx, error: Exception | None) -> None:
    """The address of the site itself leads to its first page."""
    if error is None and app.builder.format == "html":
        page = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={root_doc}.html">'
        (Path(app.outdir) / "index.html").write_text(page + f'<a href="{root_doc}.html">lopt</a>\n')


def setup(app: Sphinx) -> None:
    app.add_config_value("repository", "", "env", str)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.add_transform(RepositoryLinks)
    app.connect("source-read", contents)
    app.connect("build-finished", first_page)
