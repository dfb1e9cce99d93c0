"""Plain `pytest` computes as `scripts/mis test` does: with fast matrix products, each in one
thread, here and in every process that tests start. conftest.py imports this before anything that
imports MLX, which takes no other BLAS afterwards.
"""

import os

from mis_mlx.hardware import blas

os.environ.setdefault(blas.THREADS, "1")  # many processes, small matrices
blas.load_for_children()
