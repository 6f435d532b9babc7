"""Speed of layer_norm and rms_norm beside PyTorch's: ``pytest benchmarks/test_norm.py``."""

OPS = ("layer_norm", "rms_norm")


def test_norm(measure, case, dtype, direction, contender):
    measure(case, dtype, direction, contender)
