"""The protocol: what travels between client, daemon and ranks. The specification is protocol.md.

`messages` (client and daemon), `orders` (daemon and ranks), `tensors` (how a tensor is described),
`codec` (bytes to structs, or a refusal), `errors` (the codes).
"""
