"""Merge, export and benchmark trained models, and compare every export with its source."""
