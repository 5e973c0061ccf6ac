"""The search: which trials run, which are cut, and what is shipped."""
