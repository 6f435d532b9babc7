"""Speed of linear beside PyTorch's: ``pytest benchmarks/test_linear.py``."""

OPS = ("linear",)


def test_linear(measure, case, dtype, direction, contender):
    measure(case, dtype, direction, contender)
