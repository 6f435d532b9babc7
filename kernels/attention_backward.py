"""Attention backward, without atomics: every gradient is written by exactly one program, in a fixed order of summation.

With P = exp(score - lse), z the dropout factors (0 or 1 / (1 - p)) and delta = rowsum(dout · out) - dlse:
    dV = (P z)ᵀ dout;   dS = P (z · dout Vᵀ - delta);   dmask = dS;   dslope = -Σ dS |i + diagonal - j|
    dS' = dS (1 - tanh²) (softcap);   dQ = softmax_scale · dS' K;   dK = softmax_scale · dS'ᵀ Q
P is computed anew from q, k and lse (FlashAttention-2's backward, Dao 2023), in four kernels: delta; dQ (a block of rows, loops
over keys); dK and dV (a block of keys, loops over the query heads of its group and their rows, transposed so that P and dS are
the left operands of their products); dmask (a tile of the mask's own shape, loops over what it is broadcast along), which
recomputes dS rather than store it for all (Nq, Nk).
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels import configs
from fastattn.kernels.attention_score import (
    LOG2E,
    Features,
    Inputs,
    dot_visible,
    edge_count,
    edge_start,
    keep_pairs,
    key_programs,
    keys_of_program,
    line_of,
    load_rows,
    mask_operand,
    operand,
    place_of,
    row_programs,
    rows_of_program,
    score_tile,
    store_rows,
    visible_range,
    visit_range,
)


@triton.jit
def attention_delta_kernel(
    out, dout, dlse, delta, sizes, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta[b, h, i] = Σ_d dout · out - dlse, float32 contiguous, of all rows that there are. Grid: (row blocks · H · B,)."""
    blocks = tl.cdiv(sizes.rows, BLOCK_M)
    program = tl.program_id(0)
    row_start = program % blocks * BLOCK_M
    head = program // blocks % sizes.heads
    batch = program // blocks // sizes.heads
    o = load_rows(out, batch, head, 0, row_start, sizes.rows, BLOCK_M, DIM, BLOCK_DIM, True).to(tl.float32)
    do = load_rows(dout, batch, head, 0, row_start, sizes.rows, BLOCK_M, DIM, BLOCK_DIM, True).to(tl.float32)
    total = tl.sum(o * do, 1)
    row = row_start + tl.arange(0, BLOCK_M)
    line = (tl.cast(batch, tl.int64) * sizes.heads + head) * sizes.rows
    if dlse is not None:
        total -= tl.load(dlse + line + row, mask=row < sizes.rows, other=0.0)
    tl.store(delta + line + row, total, mask=row < sizes.rows)


@triton.jit
def attention_sequence_sum_kernel(x, total, inputs, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """total[s, h] = Σ of x (B, H, Nq) over the rows of sequence s, in order. Grid: (H, sequences)."""
    place = place_of(tl.program_id(1), inputs, FEATURES)
    line = line_of(place, tl.program_id(0), inputs)
    lane = tl.arange(0, BLOCK_M)
    partial = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, place.rows, BLOCK_M):
        partial += tl.load(x + line + start + lane, mask=start + lane < place.rows, other=0.0)
    tl.store(total + tl.program_id(1) * inputs.sizes.heads + tl.program_id(0), tl.sum(partial, 0))


@triton.jit
def _pair_gradient(
    raw, dp, lse, delta, keep, row, key, place, head, slope, inputs, FEATURES: tl.constexpr, MASKED: tl.constexpr
):
    """From raw = q·k and dp = dout·v, float32 tiles of either orientation (``lse``, ``delta``, ``row``, ``key`` broadcast to
    them):

    (P z without z's scale, dS at the mask, dS' at the raw score, visible).
    """
    s, capped, visible = score_tile(raw, row, key, place, head, slope, inputs, FEATURES, MASKED)
    p = tl.math.exp2((s - lse) * LOG2E)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dropped = p
    if FEATURES.dropout:
        dp = tl.where(keep, dp * inputs.dropout.scale, 0.0)
        dropped = tl.where(keep, p, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    ds_raw = ds
    if FEATURES.softcap:
        ds_raw = ds * (1.0 - capped * capped)
        if MASKED:
            ds_raw = tl.where(visible, ds_raw, 0.0)
    return dropped, ds, ds_raw, visible


@triton.jit
def _queries_step(
    dq, dslope, q, do, lse, delta, row_start, visit, place, head, slope, inputs,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, SLOPES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the full blocks of keys of ``visit`` (or with MASKED the others) to dq [BLOCK_M, block_d], unscaled, and dslope."""
    begin, full_begin, full_end, end = visit
    row = row_start + tl.arange(0, BLOCK_M)
    head_k = head // inputs.sizes.group
    blocks = edge_count(begin, full_begin, full_end, end, BLOCK_N) if MASKED else (full_end - full_begin) // BLOCK_N
    for index in tl.range(0, blocks):
        start = edge_start(index, begin, full_begin, full_end, BLOCK_N) if MASKED else full_begin + index * BLOCK_N
        # [BLOCK_N, block_d], [BLOCK_N, block_dv]
        k = load_rows(
            inputs.k, place.sequence, head_k, place.key_first, start, place.keys,
            BLOCK_N, FEATURES.head_dim, FEATURES.block_d, MASKED,
        )  # fmt: skip
        v = load_rows(
            inputs.v, place.sequence, head_k, place.key_first, start, place.keys,
            BLOCK_N, FEATURES.head_dim_v, FEATURES.block_dv, MASKED,
        )  # fmt: skip
        key = start + tl.arange(0, BLOCK_N)
        # [BLOCK_M, BLOCK_N]
        raw = tl.dot(q, tl.trans(k), input_precision=FEATURES.precision)
        dp = tl.dot(do, tl.trans(v), input_precision=FEATURES.precision)
        keep = True
        if FEATURES.dropout:
            keep = keep_pairs(row, start, place, head, inputs, BLOCK_M, BLOCK_N)
        _, ds, ds_raw, visible = _pair_gradient(
            raw,
            dp,
            lse[:, None],
            delta[:, None],
            keep,
            row[:, None],
            key[None, :],
            place,
            head,
            slope,
            inputs,
            FEATURES,
            MASKED,
        )
        if SLOPES:
            distance = tl.abs(row[:, None] + place.diagonal - key[None, :]).to(tl.float32)
            dslope -= tl.sum(ds * distance, 1)
        if MASKED:
            dq = dot_visible(ds_raw.to(k.dtype), k, visible, dq, FEATURES)
        else:
            dq = tl.dot(ds_raw.to(k.dtype), k, dq, input_precision=FEATURES.precision)
    return dq, dslope


@triton.jit
def attention_backward_queries_kernel(
    inputs, dout, lse, delta, dq, dslopes,
    FEATURES: tl.constexpr, SLOPES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq (B, H, Nq, D) and, with SLOPES, dslopes (B, H, Nq) float32: each row's part. Grid: ``row_programs``."""
    place, head, row_start = rows_of_program(inputs, FEATURES, BLOCK_M)
    if row_start >= place.rows:
        return
    row = row_start + tl.arange(0, BLOCK_M)
    row_last = tl.minimum(row_start + BLOCK_M, place.rows) - 1
    line = line_of(place, head, inputs)

    q = load_rows(
        inputs.q, place.sequence, head, place.row_first, row_start, place.rows,
        BLOCK_M, FEATURES.head_dim, FEATURES.block_d, True,
    )  # fmt: skip
    do = load_rows(
        dout, place.sequence, head, place.row_first, row_start, place.rows,
        BLOCK_M, FEATURES.head_dim_v, FEATURES.block_dv, True,
    )  # fmt: skip
    lse_row = tl.load(lse + line + row, mask=row < place.rows, other=0.0)
    delta_row = tl.load(delta + line + row, mask=row < place.rows, other=0.0)
    slope = 0.0
    if FEATURES.alibi:
        slope = tl.load(inputs.slopes + place.sequence * inputs.slopes_batch + head)
    gradient = tl.full([BLOCK_M, FEATURES.block_d], 0.0, tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)

    visit = visible_range(row_start, row_last, place, inputs, FEATURES, BLOCK_N)
    if FEATURES.mask == "none":
        gradient, dslope = _queries_step(
            gradient, dslope, q, do, lse_row, delta_row, row_start, visit, place, head, slope, inputs,
            FEATURES, False, SLOPES, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    gradient, dslope = _queries_step(
        gradient, dslope, q, do, lse_row, delta_row, row_start, visit, place, head, slope, inputs,
        FEATURES, True, SLOPES, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    gradient = gradient * inputs.score.scale
    store_rows(
        dq, place.sequence, head, place.row_first, row_start, place.rows,
        gradient, BLOCK_M, FEATURES.head_dim, FEATURES.block_d,
    )  # fmt: skip
    if SLOPES:
        tl.store(dslopes + line + row, dslope, mask=row < place.rows)


@triton.jit
def _keys_step(
    dk, dv, k, v, dout, lse, delta, key_start, visit, place, head, slope, inputs,
    FEATURES: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add full blocks of rows of query head ``head`` (or with MASKED the others) to dk [BLOCK_N, block_d], unscaled, and dv."""
    begin, full_begin, full_end, end = visit
    key = key_start + tl.arange(0, BLOCK_N)
    line = line_of(place, head, inputs)
    blocks = edge_count(begin, full_begin, full_end, end, BLOCK_M) if MASKED else (full_end - full_begin) // BLOCK_M
    for index in tl.range(0, blocks):
        start = edge_start(index, begin, full_begin, full_end, BLOCK_M) if MASKED else full_begin + index * BLOCK_M
        row = start + tl.arange(0, BLOCK_M)
        # [BLOCK_M, block_d], [BLOCK_M, block_dv]
        q = load_rows(
            inputs.q, place.sequence, head, place.row_first, start, place.rows,
            BLOCK_M, FEATURES.head_dim, FEATURES.block_d, MASKED,
        )  # fmt: skip
        do = load_rows(
            dout, place.sequence, head, place.row_first, start, place.rows,
            BLOCK_M, FEATURES.head_dim_v, FEATURES.block_dv, MASKED,
        )  # fmt: skip
        lse_row = tl.load(lse + line + row, mask=row < place.rows, other=0.0)
        delta_row = tl.load(delta + line + row, mask=row < place.rows, other=0.0)
        # [BLOCK_N, BLOCK_M]
        raw = tl.dot(k, tl.trans(q), input_precision=FEATURES.precision)
        dp = tl.dot(v, tl.trans(do), input_precision=FEATURES.precision)
        keep = True
        if FEATURES.dropout:
            keep = tl.trans(keep_pairs(row, key_start, place, head, inputs, BLOCK_M, BLOCK_N))
        p, _, ds, _ = _pair_gradient(
            raw, dp, lse_row[None, :], delta_row[None, :], keep, row[None, :], key[:, None], place, head, slope, inputs,
            FEATURES, MASKED,
        )  # fmt: skip
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=FEATURES.precision)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=FEATURES.precision)
    return dk, dv


@triton.jit
def attention_backward_keys_kernel(
    inputs, dout, lse, delta, dk, dv, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dk (B, Hk, Nk, D) and dv (B, Hk, Nk, Dv), summed over the group of query heads. Grid: ``key_programs``."""
    place, head_k, key_start = keys_of_program(inputs, FEATURES, BLOCK_N)
    if key_start >= place.keys:
        return
    key_last = tl.minimum(key_start + BLOCK_N, place.keys) - 1

    k = load_rows(
        inputs.k, place.sequence, head_k, place.key_first, key_start, place.keys,
        BLOCK_N, FEATURES.head_dim, FEATURES.block_d, True,
    )  # fmt: skip
    v = load_rows(
        inputs.v, place.sequence, head_k, place.key_first, key_start, place.keys,
        BLOCK_N, FEATURES.head_dim_v, FEATURES.block_dv, True,
    )  # fmt: skip
    dk_sum = tl.full([BLOCK_N, FEATURES.block_d], 0.0, tl.float32)
    dv_sum = tl.full([BLOCK_N, FEATURES.block_dv], 0.0, tl.float32)
    # Key j is seen by rows j - diagonal - right .. j - diagonal + left.
    before = inputs.score.right + place.diagonal
    after = inputs.score.left - place.diagonal
    masked: tl.constexpr = FEATURES.mask != "none"
    visit = visit_range(key_start, key_last, place.rows, before, after, BLOCK_M, FEATURES.right, FEATURES.left, masked)
    for member in tl.range(0, inputs.sizes.group):
        head = head_k * inputs.sizes.group + member
        slope = 0.0
        if FEATURES.alibi:
            slope = tl.load(inputs.slopes + place.sequence * inputs.slopes_batch + head)
        if FEATURES.mask == "none":
            dk_sum, dv_sum = _keys_step(
                dk_sum, dv_sum, k, v, dout, lse, delta, key_start, visit, place, head, slope, inputs,
                FEATURES, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        dk_sum, dv_sum = _keys_step(
            dk_sum, dv_sum, k, v, dout, lse, delta, key_start, visit, place, head, slope, inputs,
            FEATURES, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    dk_sum = dk_sum * inputs.score.scale
    if FEATURES.dropout:
        dv_sum = dv_sum * inputs.dropout.scale
    store_rows(
        dk, place.sequence, head_k, place.key_first, key_start, place.keys,
        dk_sum, BLOCK_N, FEATURES.head_dim, FEATURES.block_d,
    )  # fmt: skip
    store_rows(
        dv, place.sequence, head_k, place.key_first, key_start, place.keys,
        dv_sum, BLOCK_N, FEATURES.head_dim_v, FEATURES.block_dv,
    )  # fmt: skip


@triton.jit
def attention_mask_gradient_kernel(
    inputs, dout, lse, delta, dmask, extents,
    FEATURES: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dmask, a tile of the mask's own shape: the sum of dS over everything that the mask is broadcast along.

    extents = (batches, heads, row blocks, key blocks) that one program sums over, 1 where the mask is full along that axis.
    Grid: (mask row blocks · mask key blocks, mask heads, mask batches).
    """
    sum_batch, sum_head, sum_row, sum_key = extents
    key_blocks = tl.cdiv(tl.cdiv(inputs.sizes.keys, BLOCK_N), sum_key)
    first_row = tl.program_id(0) // key_blocks * BLOCK_M
    first_key = tl.program_id(0) % key_blocks * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, sum_batch * sum_head * sum_row * sum_key):
        start_n = first_key + step % sum_key * BLOCK_N
        start_m = first_row + step // sum_key % sum_row * BLOCK_M
        head = tl.program_id(1) + step // (sum_key * sum_row) % sum_head
        batch = tl.program_id(2) + step // (sum_key * sum_row * sum_head)
        head_k = head // inputs.sizes.group
        place = place_of(batch, inputs, FEATURES)
        row = start_m + tl.arange(0, BLOCK_M)
        key = start_n + tl.arange(0, BLOCK_N)
        q = load_rows(inputs.q, batch, head, 0, start_m, place.rows, BLOCK_M, FEATURES.head_dim, FEATURES.block_d, True)
        k = load_rows(
            inputs.k, batch, head_k, 0, start_n, place.keys, BLOCK_N, FEATURES.head_dim, FEATURES.block_d, True
        )
        raw = tl.dot(q, tl.trans(k), input_precision=FEATURES.precision)
        do = load_rows(dout, batch, head, 0, start_m, place.rows, BLOCK_M, FEATURES.head_dim_v, FEATURES.block_dv, True)
        v = load_rows(
            inputs.v, batch, head_k, 0, start_n, place.keys, BLOCK_N, FEATURES.head_dim_v, FEATURES.block_dv, True
        )
        dp = tl.dot(do, tl.trans(v), input_precision=FEATURES.precision)
        line = line_of(place, head, inputs)
        lse_row = tl.load(lse + line + row, mask=row < place.rows, other=0.0)
        delta_row = tl.load(delta + line + row, mask=row < place.rows, other=0.0)
        slope = 0.0
        if FEATURES.alibi:
            slope = tl.load(inputs.slopes + batch * inputs.slopes_batch + head)
        keep = True
        if FEATURES.dropout:
            keep = keep_pairs(row, start_n, place, head, inputs, BLOCK_M, BLOCK_N)
        _, ds, _, _ = _pair_gradient(
            raw, dp, lse_row[:, None], delta_row[:, None], keep, row[:, None], key[None, :], place, head, slope, inputs,
            FEATURES, True,
        )  # fmt: skip
        total += ds

    base = (
        dmask.ptr + tl.cast(tl.program_id(2), tl.int64) * dmask.batch + tl.cast(tl.program_id(1), tl.int64) * dmask.head
    )
    element = dmask.ptr.dtype.element_ty
    row = first_row + tl.arange(0, BLOCK_M)
    key = first_key + tl.arange(0, BLOCK_N)
    if MASK_ROWS and MASK_KEYS:
        inside = (row < inputs.sizes.rows)[:, None] & (key < inputs.sizes.keys)[None, :]
        tl.store(base + row.to(tl.int64)[:, None] * dmask.row + key[None, :], total.to(element), mask=inside)
    elif MASK_ROWS:
        tl.store(base + row.to(tl.int64) * dmask.row, tl.sum(total, 1).to(element), mask=row < inputs.sizes.rows)
    elif MASK_KEYS:
        tl.store(base + key, tl.sum(total, 0).to(element), mask=key < inputs.sizes.keys)
    else:
        tl.store(base, tl.sum(tl.sum(total, 1), 0).to(element))


def launch_backward(
    inputs: Inputs,
    features: Features,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    slopes_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill gradients = (dq, dk, dv); returns delta (B, H, Nq) and each row's part of the slopes' gradient, same shape or (0,)."""
    dq, dk, dv = gradients
    batch, heads, rows, _ = out.shape
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    slopes_rows = torch.empty_like(lse) if slopes_grad else lse.new_empty(0)
    arch, dtype = configs.arch_of(out), inputs.q.ptr.dtype
    widest = max(features.block_d, features.block_dv)

    block_m = 64
    attention_delta_kernel[(triton.cdiv(rows, block_m) * heads * batch,)](
        out=operand(out),
        dout=operand(dout),
        dlse=None if dlse is None else dlse.contiguous(),
        delta=delta,
        sizes=inputs.sizes,
        DIM=features.head_dim_v,
        BLOCK_DIM=features.block_dv,
        BLOCK_M=block_m,
        num_warps=4,
    )
    config = configs.attention_backward_keys(widest, dtype, features.extras, arch)
    attention_backward_keys_kernel[(key_programs(inputs, features, config.block_n),)](
        inputs=inputs,
        dout=operand(dout, features.q_packed),
        lse=lse,
        delta=delta,
        dk=operand(dk, features.k_packed),
        dv=operand(dv, features.k_packed),
        FEATURES=features,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.options,
    )
    config = configs.attention_backward_queries(widest, dtype, features.extras, arch)
    attention_backward_queries_kernel[(row_programs(inputs, features, config.block_m),)](
        inputs=inputs,
        dout=operand(dout, features.q_packed),
        lse=lse,
        delta=delta,
        dq=operand(dq, features.q_packed),
        dslopes=slopes_rows if slopes_grad else None,
        FEATURES=features,
        SLOPES=slopes_grad,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.options,
    )
    return delta, slopes_rows


def sequence_sums(inputs: Inputs, features: Features, x: torch.Tensor) -> torch.Tensor:
    """(sequences, H): the sums of x (B, H, Nq) float32 contiguous over each sequence's rows."""
    count = inputs.sequences.count if inputs.sequences is not None else x.shape[0]
    total = x.new_empty(count, x.shape[1])
    attention_sequence_sum_kernel[(x.shape[1], count)](
        x=x, total=total, inputs=inputs, FEATURES=features, BLOCK_M=1024, num_warps=4
    )
    return total


def mask_gradient(
    inputs: Inputs, features: Features, dout: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, dmask: torch.Tensor
) -> None:
    """Fill dmask (contiguous, the mask's own shape)."""
    batch, heads, rows, _ = dout.shape
    keys = inputs.sizes.keys
    config = configs.attention_mask_gradient(
        max(features.block_d, features.block_dv), inputs.q.ptr.dtype, configs.arch_of(dout)
    )
    row_blocks, key_blocks = triton.cdiv(rows, config.block_m), triton.cdiv(keys, config.block_n)
    full = tuple(extent > 1 for extent in dmask.shape)
    every = (batch, heads, row_blocks, key_blocks)
    extents = tuple(1 if kept else count for kept, count in zip(full, every, strict=True))
    grid_m, grid_n = (count if kept else 1 for kept, count in zip(full[2:], every[2:], strict=True))
    attention_mask_gradient_kernel[(grid_m * grid_n, dmask.shape[1], dmask.shape[0])](
        inputs=inputs,
        dout=operand(dout),
        lse=lse.contiguous(),
        delta=delta,
        dmask=mask_operand(dmask),
        extents=extents,
        FEATURES=features,
        MASK_ROWS=full[2],
        MASK_KEYS=full[3],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **config.options,
    )
