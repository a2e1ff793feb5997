"""What handing tensors from a client to a rank and back costs: xditd beside its peers, in one interleaved run.

    python -m bench.handoff

`payloads` says what travels and what must come back, `peers/` has one file per stack, `race` runs them in turns,
`report` writes the tables.
"""
