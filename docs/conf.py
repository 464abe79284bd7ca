"""How `make docs` builds the documentation: no warning passes, and no page asks another machine for anything."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import loopdiag

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "loopdiag"
author = "The loopdiag developers"
project_copyright = f"2026, {author}"
release = version = loopdiag.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "command_line",
    "mathml",
]
exclude_patterns = ["extensions"]
nitpicky = True
nitpick_ignore_regex = [
    # Other libraries, whose pages a build without a network cannot ask for, the shapes of their arrays, type variables.
    (r"py:.*", r"(?!loopdiag\.)\w+\..*"),
    (r"py:class", r"(Bool|Float|Int|Tensor|Module|ndarray|PreTrainedTokenizerFast|'.*'|loopdiag\..*T)"),
]
# In docstrings a name stands in single backticks.
default_role = "code"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "loopdiag"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def leave_out(app: Sphinx, docname: str, source: list[str]) -> None:
    """Lines such as `findings*` are for pages that another command writes; without one there is nothing to list."""
    there = {page.stem for page in Path(app.srcdir).glob("*.md")}
    source[0] = re.sub(r"^(\w+)\*\n", lambda line: line[0] if line[1] in there else "", source[0], flags=re.MULTILINE)


def offer_as_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links to Markdown outside this folder, such as a model card, lead to the file: it is no page of the site."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", leave_out)
    app.connect("source-read", offer_as_files)
