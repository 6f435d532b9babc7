"""tests/ops/test_attention.py again, by Triton in the interpreter."""

from test_attention import *  # noqa: F403
