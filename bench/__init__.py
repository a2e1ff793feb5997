"""Benchmarks: what xditd costs, beside its peers and beside no daemon at all. Figures live in docs/benchmarks.md."""
