"""Benchmarks: `pytest benchmarks/ --benchmark-compare`. NOTES.md says how times are taken."""
