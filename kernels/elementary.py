"""Elementary functions that Triton's language lacks on some backend (libdevice is missing in the interpreter)."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x) of a float32 block to a few units in the last place.

    Below 0.625 the odd polynomial of Cephes' tanhf (the formula through exp would cancel there), above it
    1 - 2 / (e^{2|x|} + 1).
    """
    a = tl.abs(x)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    # e^{2|x|} is inf beyond |x| = 44, where 2 / inf = 0 is the right answer.
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, x + x * z * p, tl.where(x < 0, -large, large))
