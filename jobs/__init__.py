"""Data types of lorafleet and pure functions on them: job files, runs and reports.

Nothing here imports torch, ray or transformers, so that commands that only read or plan
start at once.
"""
