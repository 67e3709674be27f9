"""The operator once more, from the formulas alone, element by element in float64 with numpy: an independent oracle.

Nothing of the library is used. Gradients are written out from the definitions (the factor f is a constant).
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def kernel(name: str, a: Array, b: Array, p: dict[str, float]) -> tuple[Array, Array, Array]:
    """K [out, in], and dK_oi/db_o, dK_oi/da_i [out, in, r] (for one pair of rows; snella's softmax apart)."""
    diff, half = b[:, None] - a[None], a.shape[1] // 2
    if name in ("distance", "snella"):
        k, up = np.zeros(diff.shape[:2]), np.zeros_like(diff)
        for sign, part in ((0.1, slice(0, half)), (-0.1, slice(half, None))):
            d = np.sqrt((diff[..., part] ** 2).sum(-1))
            k += sign * d
            up[..., part] = sign * diff[..., part] / np.where(d == 0, np.inf, d)[..., None]
        return k, up, -up
    dot = np.einsum("or,ir->oi", b, a)
    if name == "linear":
        return dot, np.broadcast_to(a[None], diff.shape), np.broadcast_to(b[:, None], diff.shape)
    if name == "sigmoid":
        s = 1 / (1 + np.exp(-p["beta"] * dot))
        slope = (p["alpha"] * p["beta"] * s * (1 - s))[..., None]
        return p["alpha"] * s + p["gamma"], slope * a[None], slope * b[:, None]
    e = np.exp(-p["beta"] * (diff**2).sum(-1))
    slope = (-2 * p["alpha"] * p["beta"] * e)[..., None] * diff
    return p["alpha"] * e + p["gamma"], slope, -slope


def merged(name: str, a: Array, b: Array, p: dict[str, float]) -> Array:
    k = kernel(name, a, b, p)[0]
    if name != "snella":
        return k
    return k + p["alpha"] * softmax(k / p["gamma"]) + p["beta"]


def softmax(k: Array) -> Array:
    e = np.exp(k - k.max(0))
    return e / e.sum(0)


def threshold(m: Array, s: float, sparsify: str) -> float:
    ordered = sorted(m.flatten().tolist())
    if sparsify == "paper":
        return ordered[max(int(np.ceil(np.round(s * len(ordered), 9))) - 1, 0)]
    place = s * (len(ordered) - 1)
    low = int(np.floor(place))
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def factor(m: Array, t: float, sparsify: str) -> Array:
    if sparsify == "paper":
        return np.maximum(m - t, 0)
    return np.where(m > t, m if sparsify == "released" else 1.0, 0.0)


def layer(
    x: Array, w: Array, bias: Array, a: Array, b: Array, g: Array, *, s: float, name: str, sparsify: str, groups: int,
    scope: str, p: dict[str, float], scale: Array | None = None,
) -> dict[str, Array]:  # fmt: skip
    """y and the gradients of x, a, b for upstream g; scale [tokens, in]: what dropout and drop path do to x."""
    rank, rows = b.shape[1], len(b) // groups
    parts = [(a[:, i * rank : (i + 1) * rank], b[i * rows : (i + 1) * rows]) for i in range(groups)]
    ks = [merged(name, *part, p) for part in parts]
    dense = sparsify == "dense" or (s == 0 and name != "snella")
    whole = np.abs(np.concatenate(ks))
    fs = []
    for k in ks:
        t = 0.0 if dense else threshold(whole if scope == "matrix" else np.abs(k), s, sparsify)
        fs.append(np.ones_like(k) if dense else factor(np.abs(k), t, sparsify))
    delta = np.concatenate([k * f for k, f in zip(ks, fs, strict=True)])
    xs = x if scale is None else x * scale
    gd = g.T @ xs
    ga, gb = [], []
    for i, (part, f) in enumerate(zip(parts, fs, strict=True)):
        k, up, down = kernel(name, *part, p)
        gk = gd[i * rows : (i + 1) * rows] * f
        if name == "snella":
            soft = softmax(k / p["gamma"])
            gk = gk + p["alpha"] / p["gamma"] * soft * (gk - (soft * gk).sum(0))
        gb.append((gk[..., None] * up).sum(1))
        ga.append((gk[..., None] * down).sum(0))
    through = g @ delta
    gx = g @ w + (through if scale is None else through * scale)
    y = x @ w.T + bias + xs @ delta.T
    return {"y": y, "x": gx, "a": np.concatenate(ga, 1), "b": np.concatenate(gb), "delta": delta}
