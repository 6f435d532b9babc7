"""tests/ops/test_loss.py again, by Triton in the interpreter."""

from test_loss import *  # noqa: F403
