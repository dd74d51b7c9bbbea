"""Reports: the JSON of a run, rendered for people. No torch here."""

from __future__ import annotations

from adaptkit.report.markdown import render_markdown

__all__ = ["render_markdown"]
