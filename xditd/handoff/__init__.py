"""The hand-off: tensors between processes through shared memory that nobody can pull away.

`segments` (sealed memory), `slots` (who has which bytes of it), `passing` (descriptors over AF_UNIX), `records`
(what is said there), `lease` (a client's end) and `arena` (a client's shared memory as a whole).
"""
