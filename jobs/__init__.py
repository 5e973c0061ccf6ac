"""The nouns of lorafleet and their pure arithmetic: what a job asks for, what a run holds, what a report says.

Nothing here imports torch, ray or transformers: every command that only reads or plans answers at once.
"""
