"""Speed of cross_entropy and linear_cross_entropy beside PyTorch's: ``pytest benchmarks/test_loss.py``."""

OPS = ("cross_entropy", "linear_cross_entropy")


def test_loss(measure, case, dtype, direction, contender):
    measure(case, dtype, direction, contender)
