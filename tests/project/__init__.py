"""Tests of the repository: its architecture, pages, packaging and releases."""
