"""The demo's model, and the words that it knows. Data, and pure Python."""
