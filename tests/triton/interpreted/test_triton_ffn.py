"""tests/ops/test_ffn.py again, by Triton in the interpreter."""

from test_ffn import *  # noqa: F403
