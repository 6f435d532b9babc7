"""``python -m benchmarks.gpu``: every kernel checked on the GPU that is there, then timed against its peers. See ``__main__``."""
