"""A rank: one process that holds one model on one device, alone or as one of a world. Started, never imported.

`python -m xditd.rank` reads a RankSpec on its standard input, then takes orders over ZeroMQ (`main`, `loop`).
`denoiser` and `vae` answer the orders of their part, `sampling` is the sampling loop, `transfer` moves tensors
between slots, device and the other ranks; `parallel` and `shards` split one network's work among a world, on
`xfuser_seam`, the one file that knows xfuser. `echo` is the rank without a model.
"""
