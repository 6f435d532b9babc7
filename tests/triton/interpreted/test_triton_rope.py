"""tests/ops/test_rope.py again, by Triton in the interpreter."""

from test_rope import *  # noqa: F403
