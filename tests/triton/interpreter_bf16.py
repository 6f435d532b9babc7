"""bfloat16 for Triton's interpreter, for tests only: call ``install()`` before the first kernel runs.

The interpreter keeps bfloat16 as the uint16 of its bits and computes on those integers; casts from float32 truncate. Here every
operation on a bfloat16 value widens it to float32 (exact), computes, and rounds once to nearest even, as the hardware does.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bfloat16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    if not _is_bfloat16(handle):
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round(handle):
    """float32 handle -> bfloat16: adding 0x7FFF plus the lowest kept bit carries exactly when nearest-even rounds up."""
    value = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = np.uint32(0x7FC0)
    return TensorHandle(np.where(np.isnan(value), quiet_nan, rounded).astype(np.uint16), tl.bfloat16)


def install() -> None:
    """Patch the interpreter's builder; a second call changes nothing."""
    if getattr(InterpreterBuilder, "computes_bfloat16", False):
        return
    InterpreterBuilder.computes_bfloat16 = True
    cast, convert, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def cast_impl(self, src, dst_type):
        to_bfloat16 = dst_type.scalar == tl.bfloat16
        if _is_bfloat16(src):
            return src if to_bfloat16 else cast(self, _widen(src), dst_type)
        return _round(cast(self, src, tl.float32)) if to_bfloat16 else cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _is_bfloat16(src) or dst_type.scalar == tl.bfloat16:
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, *rest):
        return dot(self, _widen(a), _widen(b), d, *rest)

    def binary_op(self, lhs, rhs, op):
        if not (_is_bfloat16(lhs) or _is_bfloat16(rhs)):
            return binary(self, lhs, rhs, op)
        result = binary(self, _widen(lhs), _widen(rhs), op)
        return result if result.data.dtype == np.bool_ else _round(result)

    def unary_op(self, arg, op):
        return _round(unary(self, _widen(arg), op)) if _is_bfloat16(arg) else unary(self, arg, op)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
