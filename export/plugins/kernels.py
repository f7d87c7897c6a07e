"""The routed kernels in Triton's language: every sample is answered with its own expert's weights.

They are compiled ahead of time (compiled.py) and launched through the CUDA driver: where they run,
there is no Triton. So every size is an argument, and nothing is compiled for one shape. What they
compute is written out in torch in reference.py; grids and arguments are vmoe.runtime.plugins.calls.

The compiler reads the source as it stands: a kernel is one function, without a helper.
"""

import triton
import triton.language as tl


@triton.jit
def topk(scores, weights, route, experts, k, MOST: tl.constexpr):
    """Softmax and top-k of one row [M]; the lowest index on ties. Grid: (rows,).

    NaN ranks first, as for torch's argmax, so that a route is always an expert that exists.
    """
    row = tl.program_id(0)
    at = tl.arange(0, MOST)
    there = at < experts
    s = tl.load(scores + row * experts + at, mask=there, other=float("-inf"))
    s = tl.where(s != s, float("inf"), s)
    raised = tl.where(there, tl.exp(s - tl.max(s, 0)), 0.0)
    share = raised / tl.sum(raised, 0)
    left = tl.where(there, 1, 0)
    for i in range(k):
        best = tl.max(tl.where(left == 1, s, float("-inf")), 0)
        chosen = tl.min(tl.where((left == 1) & (s == best), at, MOST), 0)
        tl.store(route + row * k + i, chosen)
        tl.store(weights + row * k + i, tl.sum(tl.where(at == chosen, share, 0.0), 0))
        left = tl.where(at == chosen, 0, left)


@triton.jit
def routed_linear(
    x, expert, w, b, y, inner, outer, relu, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """y[n] = W[expert[n]] x[n] + b[expert[n]]; W [M, O, I]. Grid: (N, outer / BLOCK_O).

    Few samples of some hundred numbers each: it reads every weight once, and that is its time.
    """
    n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    e = tl.load(expert + n).to(tl.int64)
    rows = w + e * outer * inner + o[:, None] * inner
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, inner, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        xs = tl.load(x + n * inner + i, mask=i < inner, other=0.0).to(tl.float32)
        inside = (o < outer)[:, None] & (i < inner)[None, :]
        acc += tl.load(rows + i[None, :], mask=inside, other=0.0).to(tl.float32) * xs[None, :]
    out = tl.sum(acc, 1) + tl.load(b + e * outer + o, mask=o < outer, other=0.0).to(tl.float32)
    out = tl.where(relu != 0, tl.maximum(out, 0.0), out)
    tl.store(y + n * outer + o, out.to(y.dtype.element_ty), mask=o < outer)


@triton.jit
def routed_conv3d(
    x, expert, w, b, y, parts,
    channels, frames, height, width, outer, out_frames, out_height, out_width,
    kt, kh, kw, st, sh, sw, pt, ph, pw, relu, splits, steps,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A 3-D convolution as one matrix product [O, K] x [K, P], K = C kt kh kw, P = T' H' W'.

    Grid: (P / BLOCK_P, outer / BLOCK_O, N * splits). A sample with few positions would leave the
    GPU empty: then K is cut in `splits`, whose sums go to `parts` [N, splits, O, P]; the kernel
    `finish` adds them, always in the same order.
    """
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    sample = (tl.program_id(2) // splits).to(tl.int64)
    split = tl.program_id(2) % splits
    e = tl.load(expert + sample).to(tl.int64)

    positions = out_frames * out_height * out_width
    left = (p % out_width) * sw - pw
    top = ((p // out_width) % out_height) * sh - ph
    first = (p // (out_width * out_height)) * st - pt

    taps = kt * kh * kw
    inner = channels * taps
    clip = x + sample * channels * frames * height * width
    rows = w + e * outer * inner + o[:, None] * inner
    begin = split * steps * BLOCK_K
    end = tl.minimum(inner, begin + steps * BLOCK_K)
    acc = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tap = k % taps
        t = first[None, :] + (tap // (kh * kw))[:, None]
        h = top[None, :] + ((tap // kw) % kh)[:, None]
        v = left[None, :] + (tap % kw)[:, None]
        inside = (t >= 0) & (t < frames) & (h >= 0) & (h < height) & (v >= 0) & (v < width)
        inside = inside & (k < end)[:, None] & (p < positions)[None, :]
        at = (((k // taps)[:, None] * frames + t) * height + h) * width + v
        xs = tl.load(clip + at, mask=inside, other=0.0)
        held = (o < outer)[:, None] & (k < end)[None, :]
        ws = tl.load(rows + k[None, :], mask=held, other=0.0)
        acc = tl.dot(ws, xs, acc, input_precision=PRECISION)

    place = o[:, None] * positions + p[None, :]
    inside = (o < outer)[:, None] & (p < positions)[None, :]
    if splits == 1:
        bias = tl.load(b + e * outer + o, mask=o < outer, other=0.0).to(tl.float32)
        out = acc + bias[:, None]
        out = tl.where(relu != 0, tl.maximum(out, 0.0), out)
        tl.store(y + sample * outer * positions + place, out.to(y.dtype.element_ty), mask=inside)
    else:
        chunk = (sample * splits + split) * outer * positions
        tl.store(parts + chunk + place, acc, mask=inside)


@triton.jit
def finish(parts, expert, b, y, outer, positions, relu, splits, BLOCK: tl.constexpr):
    """Sum the splits of a convolution, add the bias. Grid: (outer * positions / BLOCK, N)."""
    n = tl.program_id(1).to(tl.int64)
    e = tl.load(expert + n).to(tl.int64)
    size = outer * positions
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    out = tl.load(b + e * outer + at // positions, mask=inside, other=0.0).to(tl.float32)
    for split in range(splits):
        out += tl.load(parts + (n * splits + split) * size + at, mask=inside, other=0.0)
    out = tl.where(relu != 0, tl.maximum(out, 0.0), out)
    tl.store(y + n * size + at, out.to(y.dtype.element_ty), mask=inside)
