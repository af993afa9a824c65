"""Is every byte of a dataset still what was written, and do its selections leak?

`verify` re-reads what journals name; `leakage` proves the hold-out; `inventory` tells what no
line names, for `verify` and `prune`.
"""
