"""The catalog: what a model file is, by its header alone, and what its inputs must be. No torch.

`roots` (where files lie), `extra_paths` (ComfyUI's yaml), `header` (what a file says of itself), `detection` and
`families` (what it therefore is), `catalog` (all of it, cached).
"""
