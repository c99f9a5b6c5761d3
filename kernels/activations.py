"""Activations and their derivatives, as Triton device functions on fp32 values.

Every function takes an fp32 block and returns one. ``DTYPE`` is the dtype to which the caller rounds the result: GELU
chooses its formula by it, since more digits than that dtype keeps would only cost time.

The functions use only operations that Triton's interpreter also runs (no libdevice, no inline assembly).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(z):
    return tl.exp2(z * LOG2E)


@triton.jit
def _sigmoid_and_slope(z):
    """Return s = sigmoid(z) and its derivative, which would cancel for large z if computed as s * (1 - s)."""
    e = _exp(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e * r, r), e * r * r


@triton.jit
def _clamped_abs(z):
    # Past 16 the factors that callers compute from this round to 0 or 1; without the clamp infinity would meet zero.
    return tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gelu(z, DTYPE: tl.constexpr):
    """Return z * Phi(z), Phi the normal distribution function: erf GELU, torch's ``gelu(approximate="none")``.

    fp32 evaluates erf. fp16 and bf16 use z * Phi(z) = max(z, 0) - t * 2^p(t), t = |z|, with p a minimax polynomial of
    log2(Phi(-t)): one exponential, a third of erf's instructions, and no cancellation in the negative tail.
    Maximum absolute error 1.3e-7 (fp16, degree 6) and 1.9e-6 (bf16, degree 5). Past t = 14 the polynomial of degree 6
    grows again, up to p(16) = -82, which fp16 still rounds to 0. gelu(inf) = inf; in 16 bits gelu(-inf) = -0, its
    limit, and in fp32 NaN, as in torch.
    """
    if DTYPE == tl.float32:
        return 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    t = _clamped_abs(z)
    if DTYPE == tl.float16:
        p = 3.23497248e-05
        p = p * t - 0.0007599260318
        p = p * t + 0.008038201377
        p = p * t - 0.05332250049
        p = p * t - 0.4588599667
        p = p * t - 1.151164353
        p = p * t - 0.9999976954
    else:
        p = -0.0004340815521
        p = p * t + 0.006807961323
        p = p * t - 0.05116205140
        p = p * t - 0.460627617
        p = p * t - 1.150584312
        p = p * t - 1.000045478
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * tl.exp2(p)


@triton.jit
def gelu_grad(z, DTYPE: tl.constexpr):
    """Return erf GELU's derivative, Phi(z) + z * phi(z).

    fp16 and bf16 use 1 - gelu'(t) = exp(-t^2 / 2) * r(t) for t = |z|, with r a minimax polynomial of degree 7
    (maximum absolute error 4.1e-6), and gelu'(-t) = 1 - gelu'(t).
    """
    if DTYPE == tl.float32:
        cdf = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * _exp(-0.5 * z * z)
    t = _clamped_abs(z)
    r = -0.00016856103
    r = r * t + 0.0023191092
    r = r * t - 0.013923767
    r = r * t + 0.049940374
    r = r * t - 0.12582731
    r = r * t + 0.24795984
    r = r * t - 0.79766244
    r = r * t + 0.49999604
    upper_tail = tl.exp2(-0.7213475204444817 * t * t) * r
    return tl.where(z < 0.0, upper_tail, 1.0 - upper_tail)


@triton.jit
def gelu_tanh(z):
    """Return tanh GELU, torch's ``gelu(approximate="tanh")``."""
    # 0.5 * (1 + tanh(u)) = 1 / (1 + 2^(-2u / ln 2)), u = sqrt(2 / pi) * (z + 0.044715 * z^3); multiplying the
    # constants out saves two instructions, and keeps a 128x128 tile from spilling.
    return z / (1.0 + tl.exp2(z * (-2.302208198144325 - 0.1029432395800235 * z * z)))


@triton.jit
def gelu_tanh_grad(z):
    z = tl.where(z < 0.0, -_clamped_abs(z), _clamped_abs(z))
    s, slope = _sigmoid_and_slope(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    return s + z * slope * 1.5957691216057308 * (1.0 + 0.134145 * z * z)


@triton.jit
def silu(z):
    return z / (1.0 + _exp(-z))


@triton.jit
def silu_grad(z):
    s, slope = _sigmoid_and_slope(z)
    return s + z * slope


@triton.jit
def quick_gelu(z):
    """Return z * sigmoid(1.702 * z), transformers' ``QuickGELUActivation``."""
    return z / (1.0 + _exp(-1.702 * z))


@triton.jit
def quick_gelu_grad(z):
    s, slope = _sigmoid_and_slope(1.702 * z)
    return s + 1.702 * z * slope


@triton.jit
def tanh(z):
    # Near zero the exponential form cancels, so a minimax polynomial (relative error 3e-9) takes over.
    t = _clamped_abs(z)
    far = 1.0 - 2.0 / (_exp(2.0 * t) + 1.0)
    s = z * z
    near = z + z * s * ((-0.05143305 * s + 0.13324263) * s - 0.33333241)
    return tl.where(t < 0.25, near, tl.where(z < 0.0, -far, far))


@triton.jit
def apply_activation(z, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Return the activation named ``ACTIVATION`` of the pre-activation ``z``."""
    tl.static_assert(z.dtype == tl.float32)
    if ACTIVATION == "gelu":
        return gelu(z, DTYPE)
    elif ACTIVATION == "gelu_tanh":
        return gelu_tanh(z)
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        return silu(z)
    elif ACTIVATION == "quick_gelu":
        return quick_gelu(z)
    elif ACTIVATION == "tanh":
        return tanh(z)
    else:
        tl.static_assert(ACTIVATION == "none")
        return z


@triton.jit
def apply_gated(a, b, ACTIVATION: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr):
    """Return ``a * b`` with the activation applied to the half that ``GATED`` names; for "", that of a alone."""
    if GATED == "first":
        return apply_activation(a, ACTIVATION, DTYPE) * b
    elif GATED == "second":
        return a * apply_activation(b, ACTIVATION, DTYPE)
    else:
        tl.static_assert(GATED == "")
        return apply_activation(a, ACTIVATION, DTYPE)


@triton.jit
def apply_activation_grad(dy, saved, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Return ``dy`` times the activation's derivative. ``saved``: relu's or tanh's output, else the pre-activation."""
    if ACTIVATION == "gelu":
        return dy * gelu_grad(saved, DTYPE)
    elif ACTIVATION == "gelu_tanh":
        return dy * gelu_tanh_grad(saved)
    elif ACTIVATION == "relu":
        # A NaN output passes its gradient on, as torch's threshold_backward does.
        return tl.where(saved <= 0.0, 0.0, dy)
    elif ACTIVATION == "silu":
        return dy * silu_grad(saved)
    elif ACTIVATION == "quick_gelu":
        return dy * quick_gelu_grad(saved)
    elif ACTIVATION == "tanh":
        return dy * (1.0 - saved * saved)
    else:
        tl.static_assert(ACTIVATION == "none")
        return dy


@triton.jit
def apply_gated_grad(dy, a, b, ACTIVATION: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr):
    """Return the gradients of both halves of a gated activation, given the pre-activations and the result's ``dy``."""
    z = a if GATED == "first" else b
    factor = b if GATED == "first" else a
    activated = apply_activation(z, ACTIVATION, DTYPE)
    saved = activated if ACTIVATION == "relu" or ACTIVATION == "tanh" else z
    d_z = apply_activation_grad(dy * factor, saved, ACTIVATION, DTYPE)
    d_factor = dy * activated
    if GATED == "first":
        return d_z, d_factor
    else:
        return d_factor, d_z
