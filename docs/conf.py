"""Sphinx settings: Markdown pages by MyST; no package is imported, so the pages build without torch."""

project = "Ascend multimodal"
author = "The Ascend multimodal contributors"
copyright = author
version = release = "0.1.0"

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 2

html_theme = "furo"
html_title = project
