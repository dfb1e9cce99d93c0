"""The faults that tests and `benchmarks/faults.py` make: broken disks, power cuts, kills, bad model folders."""
