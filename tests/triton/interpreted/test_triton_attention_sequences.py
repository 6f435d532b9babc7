"""tests/ops/test_attention_sequences.py again, by Triton in the interpreter."""

from test_attention_sequences import *  # noqa: F403
