"""Programs: everything that owns data, time or files."""

import os

# Batches of small SVDs are several times slower with BLAS threads on busy cores. Read
# when the BLAS is loaded, so before anything imports it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
