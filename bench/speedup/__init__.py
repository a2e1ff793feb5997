"""Two ranks of a CPU against one, under every strategy."""
