"""Figures that several packages draw."""
