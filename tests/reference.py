"""Plain reference of the YeAM core for one tensor, in the caller's dtype; slow and whole, for checking.

Legend: K sources, M rows, N columns, B blocks of four, w frame width.
"""

import torch


def rays(delta_K, softness=32.0):
    """Steps 1 and 2. delta_K [K, *shape] -> the softened intersection of the sources' tangent planes [*shape]."""
    K, shape = delta_K.shape[0], delta_K.shape[1:]
    flat_Kn = delta_K.reshape(K, -1)
    v_KB4 = torch.nn.functional.pad(flat_Kn, (0, -flat_Kn.shape[1] % 4)).view(K, -1, 4)
    length_KB = v_KB4.norm(dim=-1)
    d_KB4 = v_KB4 / length_KB.clamp(min=torch.finfo(v_KB4.dtype).tiny)[..., None]
    gram_BKK = torch.einsum("kbi,lbi->bkl", d_KB4, d_KB4)
    a_BK = torch.linalg.solve(gram_BKK + softness * torch.eye(K, dtype=d_KB4.dtype), length_KB.T[..., None])[..., 0]
    x_B4 = (1 + softness) * torch.einsum("bk,kbi->bi", a_BK, d_KB4)
    return x_B4.reshape(-1)[: flat_Kn.shape[1]].view(shape)


def agreement(delta_K):
    """0 for unrelated updates, 1 for equal ones (and for a single one)."""
    K = delta_K.shape[0]
    if K == 1:
        return 1.0
    A = delta_K.sum(0).norm() ** 2 / (K * delta_K.reshape(len(delta_K), -1).norm(dim=1).square().sum()).clamp(
        min=1e-300
    )
    return float(((K * A - 1) / (K - 1)).clamp(0, 1))


def departure(x, delta_K):
    """‖x‖² (1 − cos²(x, Σ V_k)): what the rays make other than a multiple of the sum."""
    total = delta_K.sum(0)
    along = (x * total).sum() ** 2 / total.square().sum() if float(total.norm()) > 0 else 0.0
    return float((x.square().sum() - along).clamp(min=0))


def meet(x, delta_K, seed=0, ridge=1.0, axes=16):
    """x moved to where whole rows meet, in the axes of the inputs that the sources use most; of every row, not of a sample."""
    K, rows, columns = delta_K.shape
    moments = [d.T @ d / d.square().sum().clamp(min=torch.finfo(d.dtype).tiny) for d in delta_K]
    axes = min(axes, max(1, 256 // K))
    Q = torch.eye(columns, dtype=x.dtype)
    if K * axes < columns:
        mix = torch.randn(rows, axes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x)
        spans = [torch.linalg.qr(C @ d.T @ mix).Q for d, C in zip(delta_K, moments) if float(C.norm()) > 0]
        left, values, _ = torch.linalg.svd(torch.cat(spans, dim=1), full_matrices=False)
        Q = left[:, values.square() > 1e-3]
    small = [Q.T @ C @ Q for C in moments]
    extra = ridge * K / columns * torch.eye(Q.shape[1], dtype=x.dtype)
    inverse = torch.linalg.inv(sum(small) + extra)
    for d, C in zip(delta_K, small):
        x = x + d @ Q @ (K * (C + extra / K) @ inverse - torch.eye(Q.shape[1], dtype=x.dtype)) @ Q.T
    return x


def spread_columns(x_MN, width, alpha, generator, floor=1e-6, noise=0.0):
    """Equalise the columns of x inside frames of `width`, grouped by a random permutation; noise: its mean square in an element."""
    order = torch.randperm(x_MN.shape[1], generator=generator)
    out_MN = torch.empty_like(x_MN)
    grams = [x_MN[:, J].T @ x_MN[:, J] for J in order.split(width)]
    eigen = [torch.linalg.eigh(C) for C in grams]
    least = floor * max(float(values.max()) for values, _ in eigen)
    for J, (values, Q) in zip(order.split(width), eigen):
        values = values.clamp(min=least)
        signal = (1 - noise * x_MN.shape[0] / values).clamp(min=0.01)
        power = (signal / values) ** (alpha / 2)
        out_MN[:, J] = x_MN[:, J] @ (Q * power) @ Q.T
    return out_MN / out_MN.norm()


def merge(
    base, delta_K, softness=32.0, width=256, rounds=1, lam=1.0, seed=0, depth=1, transposed=False, embedding=False
):
    """The merged tensor. delta_K = weight_k * (source_k - base), stacked; width=None skips the frames; transposed: stored [in, out]."""
    delta_K = delta_K[delta_K.reshape(len(delta_K), -1).any(dim=1)]  # what did not move says nothing
    if len(delta_K) == 0 or float(rays(delta_K, softness).norm()) == 0:
        return base.clone()
    x = rays(delta_K, softness)
    norms_K = delta_K.reshape(len(delta_K), -1).norm(dim=1)
    longest = float(2.5 * x.norm() / norms_K.mean())  # conflict is not blown up
    if x.dim() != 2 or min(x.shape) < 8:
        return base + lam * min(1.0, longest) * x * norms_K.mean() / x.norm()
    alpha = 1 - agreement(delta_K) if float(base.norm()) > 0 else 0.0  # frames are for updates, not for whole weights
    spread = departure(x, delta_K)
    displacement = max(float(norms_K.max() / base.norm().clamp(min=1e-300)), 1e-12)
    shared = max(1.0, float(delta_K.sum(0).square().sum() / norms_K.square().sum()))

    unit = delta_K.reshape(len(delta_K), -1) / norms_K[:, None]
    count = len(unit) ** 2 / float((unit @ unit.T).square().sum())

    def progress_of(x):
        return float((x * delta_K.sum(0)).sum() / norms_K.square().sum())

    def law(progress, region):
        found = max(progress, 1e-3)
        return max(1.7 * found / shared / displacement**0.25, region * found**0.5 / displacement)

    beyond = min(0.78 / (displacement * depth) ** 0.4, 2.7)
    share = max(progress_of(x * norms_K.mean() / x.norm()), 1e-3)
    flat = 1.0
    if float(base.norm()) > 0:
        near = beyond / (0.3 * count**0.5 * share * law(share, 0.16))
        flat = min(1.0, max(beyond / 2.7, near))
    if width and float(base.norm()) > 0:
        ridge = 3.0 if embedding else 1.0
        x = meet(x.T, delta_K.mT, seed, ridge).T if transposed else meet(x, delta_K, seed, ridge)
    if width and alpha > 0:
        generator = torch.Generator().manual_seed(seed)
        edge = 2 * (1 + (min(width, *x.shape) / max(x.shape)) ** 0.5) ** 2
        noise = 0.0 if embedding else edge * spread / x.numel()
        for number in range(rounds):
            known = 0.0 if number else noise
            if x.shape[1] < x.shape[0] or (x.shape[1] == x.shape[0] and not transposed):
                x = spread_columns(x, width, alpha * flat, generator, noise=known)
            else:
                x = spread_columns(x.T, width, alpha * flat, generator, noise=known).T
    x = x * norms_K.mean() / x.norm()
    progress = progress_of(x)
    scale = min(law(progress, 0.136 * beyond**0.5) ** alpha, longest)
    if progress > 0:
        bound = beyond**flat / count**0.5 if width else beyond / count
        scale = min(scale, bound**alpha / progress)
    return base + lam * scale * x
