"""Speed of attention and scaled_dot_product_attention beside PyTorch's: ``pytest benchmarks/test_attention.py``."""

OPS = ("attention", "scaled_dot_product_attention")


def test_attention(measure, case, dtype, direction, contender):
    measure(case, dtype, direction, contender)
