"""Sphinx: the pages of this folder, the README and the API as a site that needs no network. `make docs` builds it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # autodoc reads this checkout, wherever another case_fast is installed

from case_fast import __version__  # noqa: E402

project = "case_fast"
author = copyright = "The case_fast authors"
release = __version__
html_title = f"case_fast {release}"
html_theme = "furo"
html_show_sphinx = False
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # links to headings as GitHub makes them
default_role = "code"  # `name` in a docstring is code, as it is on the pages
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
