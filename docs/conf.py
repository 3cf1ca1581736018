"""Settings of the documentation site. Build it with ``make docs``: any warning fails the build."""

project = "distill"
copyright = "the distill authors"
author = "the distill authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links to headings, with the anchors that GitHub gives them
highlight_language = "text"  # of indented blocks, which are command lines; Python blocks name their language
exclude_patterns = ["_build"]
nitpicky = False  # no page of torch or Lightning is fetched, so their types cannot be linked

# The docstrings use single backticks for code, as Markdown does.
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "distill"
