"""Run the search: propose trials, stop them at rungs, and evaluate the best ones.

The code runs in two kinds of processes. The driver (`driver`, `sweep`, `compare`,
`ledger`, `proposals`, `searcher`, `scheduler`, `tracking`) is the only writer of the
run's record. Hosts (`trainable`, `distributed_trial`, `trial_run`, `held_out`) train
and evaluate on the nodes, and send reports. Every decision is made from the run's own
files, so an attempt can end at any moment.
"""
