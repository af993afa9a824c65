"""Is every byte of a dataset still what was written, and do its selections leak?

`check` re-reads what journals name, `repair` removes what is damaged, `leakage` proves the
hold-out; `inventory` lists what no journal line names, for `verify` and `prune`.
"""
