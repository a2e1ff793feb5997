"""What the daemon's deciding costs, and what it is worth: many clients on four replicas whose ranks do timed no-work.

    python -m bench.dispatch            # 100 clients × 20 runs, and the four policies with one slow replica
    python -m bench.dispatch --small    # to try the script

`swarm` plays the clients, `watched` is the daemon with a clock around its decisions, `rank` is a rank that may be slower
than the others.
"""
