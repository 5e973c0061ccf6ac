"""Measuring a loaded model, and drawing what was measured."""
