"""Measure models, compare and recommend them, and report the results."""
