"""Speed of ffn and glu_ffn beside PyTorch's: ``pytest benchmarks/test_ffn.py``."""

OPS = ("ffn", "glu_ffn")


def test_ffn(measure, case, dtype, direction, contender):
    measure(case, dtype, direction, contender)
