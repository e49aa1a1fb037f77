"""Measurements. `python -m bench.run` writes bench/results/*.json, the only source of numbers in the documents."""
