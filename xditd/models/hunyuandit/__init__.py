"""HunyuanDiT 1.1 and 1.2, of any width and depth."""
