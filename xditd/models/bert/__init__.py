"""BERT's text encoder."""
