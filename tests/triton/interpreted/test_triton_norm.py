"""tests/ops/test_norm.py again, by Triton in the interpreter."""

from test_norm import *  # noqa: F403
