"""The faults that tests and `benchmarks/faults.py` make: broken disks, power cuts, kills, bad model
folders.
"""

NOTES = "MIS_MLX_FAULTS"  # names the file in which `benchmarks/faults.py` wants the tests' notes
