"""The scripts behind the numbers in the documentation; run as `python -m benchmarks.NAME`."""
