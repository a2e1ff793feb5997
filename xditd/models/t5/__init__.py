"""T5's encoder."""
