"""What the daemon adds to a denoising step: the whole path beside the bare forward pass, in alternate turns.

python -m bench.step_overhead            # one CUDA device, a FLUX.1-dev-size model of random weights
python -m bench.step_overhead --small    # a tiny model on the CPU, to try the script
"""
