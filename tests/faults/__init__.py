"""The faults that tests and `benchmarks/faults.py` make: disks, cuts, kills, bad folders."""

NOTES = "MIS_MLX_FAULTS"  # names the file in which `benchmarks/faults.py` wants the tests' notes
