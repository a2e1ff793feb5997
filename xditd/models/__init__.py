"""The models: what their files hold and how their networks are called. A folder for each family.

A family's folder has `keys` (which parameter comes from which tensor of a file), `config` (what diffusers' class is
told) and `network` (the network on a device, with ComfyUI's inputs and outputs); `families` is the table of them.
`reading` fills a network from a file; `making` writes small files in the real formats. Nothing here knows of
ranks, messages or other processes.
"""
