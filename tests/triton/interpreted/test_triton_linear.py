"""tests/ops/test_linear.py again, by Triton in the interpreter."""

from test_linear import *  # noqa: F403
