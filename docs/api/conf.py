"""Sphinx, for ``make docs``: the API reference from the docstrings. Every warning is an error there."""

import os
import sys

sys.path.insert(0, os.path.abspath("../.."))

import bert_fused

project = "bert_fused"
author = "the bert_fused authors"
version = release = bert_fused.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"description": "BERT's dense blocks as single Triton kernels", "nosidebar": True}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
nitpicky = True
# Names of other projects, whose own documentation is not at hand offline.
nitpick_ignore_regex = [(r"py:.*", r"(torch|transformers|collections)\b.*")]
