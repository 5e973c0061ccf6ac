"""Run the search: propose trials, stop them at rungs, and evaluate the best ones."""
