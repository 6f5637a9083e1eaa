"""What options may name, for modules that are imported before PyTorch and MAX, which take seconds."""

DTYPES = ("float32", "float16", "bfloat16")
"""What can be computed in, and stored; the most precise first."""
HOST = "host"
TARGETS = (HOST, "sm_80", "sm_90a")
"""What there is to compile for: this machine's CPU, or a GPU by its architecture."""
GPU = ("gpu", "cuda", "cuda:0")
"""What the first GPU is called, by MAX and by PyTorch: there is none of another number here."""
