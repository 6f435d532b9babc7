"""Speed of rope beside PyTorch's: ``pytest benchmarks/test_rope.py``."""

OPS = ("rope",)


def test_rope(measure, case, dtype, direction, contender):
    measure(case, dtype, direction, contender)
