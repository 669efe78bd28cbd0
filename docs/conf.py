"""The site: ``make docs``. Sphinx reads the Markdown pages where they stand and the docstrings of every public name."""

from pathlib import Path

import pruning_core

ROOT = Path(__file__).parents[1]

project = "pruning_core"
author = "the authors of pruning_core"
copyright = f"2026, {author}"
release = version = pruning_core.__version__

# The source folder is the whole checkout, so that links between README, apps and docs hold here as they do on a forge.
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "apps/*/README.md",
    "tests/README.md",
    "pruning_core/sparse_format/FORMAT.md",
]
exclude_patterns = [".*", "docs/_build", "runs", "build", "dist"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # README begins with its title, pages of the API with a second level here and there

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
default_role = "code"
highlight_language = "python"

html_theme = "furo"
html_title = f"pruning_core {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_static/root"]  # index.html at the top leads to the first page
html_copy_source = False
html_show_sphinx = False
