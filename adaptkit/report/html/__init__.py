"""`report.html`: one file that needs nothing from anywhere."""

from __future__ import annotations

from adaptkit.report.html.page import Facts, render_html

__all__ = ["Facts", "render_html"]
