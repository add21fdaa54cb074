"""Benchmarks that anyone can run: `./dev bench`. Each compares things in one run, on one machine."""
