"""How Sphinx builds these pages: `make docs`. What is made from the code itself is in extension.py."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the extension; the package of this checkout, installed or not

project = "snell_dist"
author = "the snell_dist developers"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "extension"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "snell_dist"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}

smartquotes = False

myst_heading_anchors = 3
# Docstrings are plain text whose `words` are code; see extension.plain.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
toc_object_entries = False
