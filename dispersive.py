"""Dispersive Loss, and the transformer, objectives and samplers that it was published with.

Time is SiT's: t = 0 is noise, t = 1 is data, x_t = t*x + (1-t)*noise, velocity v = x - noise.
GaussianDiffusion and its network use DiT's step numbers instead: 0 is next to the data, 999 is noise.
Images and latents are (B, C, H, W). Labels are (B,) int64; num_classes is the null label, "no class".
"""
import math

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ----------------------------------------
# Losses. This section can be pasted alone into other code: it needs only math and torch.

KINDS = ("infonce", "cosine", "hinge", "covariance")

def dispersive_loss(z, kind="infonce", tau=0.5, margin=1.0, group=None):
    """Push the representations of a batch apart (Wang & He 2025, arXiv 2506.09027, table 1).

    z: activations (B, ...) of any floating dtype, flattened to (B, dim).
    kind, with D(a, b) = |a - b|^2 / dim, or -cos(a, b) for "cosine"; the means include i = j:
        "infonce", "cosine"   log mean_ij exp(-D(z_i, z_j) / tau)
        "hinge"               mean_ij max(0, margin - D(z_i, z_j))^2
        "covariance"          mean_{k != l} C_kl^2, C the correlation of features k and l
    group: the number of consecutive samples that are compared with each other (default: B; the
        paper: 16). The loss is the mean over the groups.
    Returns a scalar in at least float32. Add it to the training loss, times 0.5 in the paper.
    Second derivatives are NaN or infinite on purpose, since they would be wrong.
    ValueError for an unknown kind or a group that does not divide B.

    D is divided by dim because with a sum over thousands of features exp(-D / tau) is zero for all
    pairs of different samples: the loss is then a constant, without gradient.
    """
    check_known(kind, "kind", KINDS)
    if kind == "covariance":
        z = standardize(split_groups(z, group))  # (groups, n, dim)
        variances = z.square().mean(-2)  # C_kk, (groups, dim)
        return mean_off_diagonal(gram(z).square(), variances)
    return repulsion(pairwise_distances(z, kind, group), kind, tau, margin)

def pairwise_distances(z, kind="infonce", group=None):
    """dispersive_loss's D of all pairs in the groups of z: (B, ...) -> (groups, n, n)."""
    z = split_groups(z, group)  # (groups, n, dim)
    if kind == "cosine":
        products = gram(z)
        lengths = diagonal_of(products).clamp(min=1e-24).sqrt()
        return -products / (lengths[..., :, None] * lengths[..., None, :])
    # |a|^2 + |b|^2 - 2ab loses its digits where all samples share a large offset. A common shift
    # changes no distance, and needs no gradient: measure from the first sample of the group.
    products = gram(z - z[:, :1].detach())
    squares = diagonal_of(products)
    D = (squares[..., :, None] + squares[..., None, :] - 2 * products) / z.shape[-1]
    # Rounding may go below zero. D_ii is masked: the parts of its gradient cancel, but near the loss's
    # floor they are so large that adding them would round away the gradients of the other pairs.
    itself = torch.eye(D.shape[-1], dtype=torch.bool, device=D.device)
    return D.clamp(min=0).masked_fill(itself, 0)

def repulsion(D, kind="infonce", tau=0.5, margin=1.0):
    """The dispersive loss of distances D (groups, n, n), for every kind but "covariance"."""
    if kind == "hinge":
        return (margin - D).relu().square().mean()
    return (-D / tau).logsumexp((-2, -1)).mean() - 2 * math.log(D.shape[-1])

def contrastive_loss(z, z_pos, kind="infonce", tau=0.5, margin=1.0, cov_weight=1.0, group=None):
    """The contrastive counterpart of dispersive_loss; z_pos is a second view. All j include j = i.

        "infonce", "cosine"   mean_i [D(z_i, z_pos_i) / tau + log sum_j exp(-D(z_i, z_pos_j) / tau)]
        "hinge"               mean_i [D(z_i, z_pos_i)^2 + mean_j max(0, margin - D(z_i, z_pos_j))^2]
        "covariance"          mean_k (1 - C_kk)^2 + cov_weight * mean_{k != l} C_kl^2, C_kl between
                              the views: Barlow Twins (Zbontar et al. 2021), with means, not sums
    """
    check_known(kind, "kind", KINDS)
    if z.shape != z_pos.shape:
        raise ValueError(f"the two views differ in shape: {tuple(z.shape)}, {tuple(z_pos.shape)}")
    z, z_pos = split_groups(z, group), split_groups(z_pos, group)  # (groups, n, dim) each
    if kind == "covariance":
        z, z_pos = standardize(z), standardize(z_pos)
        correlations = (z * z_pos).mean(-2)  # C_kk, (groups, dim)
        redundancy = mean_off_diagonal(gram(z) * gram(z_pos), correlations)
        return (1 - correlations).square().mean() + cov_weight * redundancy
    n = z.shape[1]
    both = torch.cat([z, z_pos], 1).flatten(0, 1)  # as one set, which `gram` needs
    D = pairwise_distances(both, kind, group=2 * n)[:, :n, n:]  # from the first view to the second
    positive = diagonal_of(D)
    if kind == "hinge":
        return positive.square().mean() + (margin - D).relu().square().mean()
    return (positive / tau + (-D / tau).logsumexp(-1)).mean()

def repa_loss(h, target):
    """REPA (Yu et al. 2024, arXiv 2410.06940): minus the mean cosine of tokens and features, (B, T, D)."""
    if h.shape != target.shape:
        raise ValueError(f"tokens and features differ: {tuple(h.shape)}, {tuple(target.shape)}")
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    return -torch.nn.functional.cosine_similarity(h, target.to(h.dtype), dim=-1).mean()

def repa_projector(dim, feature_dim, width=2048):
    """REPA's trained map from the tokens of a block (..., dim) to features (..., feature_dim)."""
    return torch.nn.Sequential(torch.nn.Linear(dim, width), torch.nn.SiLU(), torch.nn.Linear(width, width),
                               torch.nn.SiLU(), torch.nn.Linear(width, feature_dim))

def dispersive_floor(kind, n, tau=0.5, margin=1.0):
    """Smallest possible value of dispersive_loss for n samples. InfoNCE gets close to it early."""
    return {"infonce": -math.log(n),
            "cosine": 1 / tau + math.log1p((n - 1) * math.exp(-n / (tau * (n - 1)))) - math.log(n),
            "hinge": margin ** 2 / n,
            "covariance": 1 / (n - 1)}[kind]  # about, if dim >> n; random features reach it

@torch.no_grad()
def mean_distance(z, group=None):
    """Mean of |z_i - z_j|^2 / dim over pairs i != j in the groups of z (B, ...), a scalar."""
    D = pairwise_distances(z, group=group)
    n = D.shape[-1]
    return D.mean() * n / (n - 1)  # the mean includes the n zeros of i = j

@torch.no_grad()
def effective_rank(z, group=None):
    """How many directions the samples of z (B, ...) spread over, a scalar from 1 to group - 1: exp
    of the entropy of the variances along them (Roy & Vetterli 2007, who take their square roots)."""
    z = split_groups(z, group)
    eigenvalues = torch.linalg.eigvalsh(gram(z - z.mean(-2, keepdim=True))).clamp(min=0)
    total = eigenvalues.sum(-1, keepdim=True).clamp(min=1e-30)  # a collapsed group has rank 1
    return torch.special.entr(eigenvalues / total).sum(-1).exp().mean()

def check_known(name, what, known):
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")

def split_groups(z, group):
    """(B, ...) -> (groups, n, dim), in at least float32."""
    n = len(z) if group is None else group
    if n < 2:
        raise ValueError(f"dispersion compares samples: it needs at least 2 in a group, got {n}")
    if len(z) % n:
        raise ValueError(f"cannot split activations {tuple(z.shape)} into groups of {n} samples")
    return z.reshape(len(z) // n, n, -1).to(torch.promote_types(z.dtype, torch.float32))

def gram(z):
    """Inner products of the samples within every group, (groups, n, dim) -> (groups, n, n)."""
    groups, n, _ = z.shape
    rows = z.flatten(0, 1)  # one product of all rows: GPUs are slow at many small products
    with torch.autocast(z.device.type, enabled=False):  # autocast would round to 16 bits
        products = (rows @ rows.detach().mT).view(groups, n, groups, n)
    each = torch.arange(groups, device=z.device)
    products = products[each, :, each]  # of the rows of each group, (groups, n, n)
    # One factor was held fixed, so these products carry half of the gradient. They are symmetric,
    # so their transposes carry the other half: the backward pass needs one large product, not two.
    change = products - products.detach()  # zero, with half of the gradient
    # pow(1.5): zero value and gradient, but an infinite second derivative, which would else be wrong
    return products.detach() + change + change.mT + change.pow(1.5)

def diagonal_of(x):
    """(groups, n, n) -> (groups, n). Not by Tensor.diagonal, whose gradient torch 2.13 compiles wrongly."""
    return (x * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).sum(-1)

def standardize(z):
    """Zero mean and unit population variance over the group; constant features become zero."""
    z = z - z[:, :1].detach()  # a constant feature becomes exactly zero; less its mean, it may not
    z = z - z.mean(1, keepdim=True)
    return z * (z.square().mean(1, keepdim=True) + 1e-20).rsqrt()

def mean_off_diagonal(products, diagonal):
    """mean_{k != l} C_kl^2, a scalar, of correlations C = a^T b / n between standardised a and b.
    products: gram(a) * gram(b), (groups, n, n). diagonal: C_kk, (groups, dim)."""
    # C is dim x dim, far too large. But factors rotate inside a trace, so n x n matrices suffice:
    # sum_kl C_kl^2 = trace(b^T a a^T b) / n^2 = trace(a a^T b b^T) / n^2 = sum_ij (a a^T)_ij (b b^T)_ij / n^2
    n, dim = products.shape[-1], diagonal.shape[-1]
    everything = products.sum((-2, -1)) / n ** 2  # (groups,)
    return ((everything - diagonal.square().sum(-1)) / (dim * (dim - 1))).mean()

# ----------------------------------------
# Transformer. Parameter names and initialisation are those of the published DiT and SiT.

class TimestepEmbedder(nn.Module):
    """Times or steps (B,) -> (B, dim): sinusoids of 128 frequencies, then a small network."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        exponents = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) / 128 * exponents)  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], -1)  # (B, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))

class PatchEmbedder(nn.Module):
    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj(x).flatten(2).transpose(1, 2)  # (B, T, D), a token for each patch
        return x.contiguous()  # else every layer norm copies its input

class LabelEmbedder(nn.Module):
    def __init__(self, labels, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(labels, dim)

    def forward(self, y):
        return self.embedding_table(y)

def position_embedding(dim, side):
    """Fixed sinusoids (1, side*side, dim): the first half of dim says the column, the second the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, dim/4)
    line = torch.cat([angles.sin(), angles.cos()], -1).float()  # (side, dim/2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], -1)[None]

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D/heads) each
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))

class Block(nn.Module):
    """Transformer block with adaptive layer norm: c shifts, scales and gates both branches."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)  # for both branches
        self.attn = Attention(dim, num_heads)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential()  # whose layers have their published names
        self.mlp.add_module("fc1", nn.Linear(dim, hidden))
        self.mlp.add_module("gelu", nn.GELU(approximate="tanh"))
        self.mlp.add_module("fc2", nn.Linear(hidden, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)  # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)

class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, -1)
        return self.linear(self.norm(x) * (1 + scale) + shift)

class DiT(nn.Module):
    """The transformer of DiT and SiT (Peebles & Xie 2023, arXiv 2212.09748): predicts noise or velocity.

    input_size, in_channels: images are (in_channels, input_size, input_size).
    class_dropout_prob: if positive, the null label num_classes exists. The caller drops labels.
    learn_sigma: 2*in_channels output channels; DiT uses both halves, SiT the first.
    second_time: MeanFlow's second time r. Its embedder, of r - t, puts out zero at first, so that a
        model with a SiT's weights begins as that SiT.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True, second_time=False):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide input_size {input_size}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes, self.has_null_label = num_classes, class_dropout_prob > 0
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size) if second_time else None
        self.y_embedder = LabelEmbedder(num_classes + self.has_null_label, hidden_size)
        self.pos_embed = nn.Parameter(position_embedding(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * self.out_channels)
        self.initialize()

    def initialize(self):
        """adaLN-Zero: every block starts as the identity, and the output as zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: convolutions count as linear
                nn.init.zeros_(module.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.r_embedder is not None:
            nn.init.normal_(self.r_embedder.mlp[0].weight, std=0.02)
            nn.init.zeros_(self.r_embedder.mlp[2].weight)

    def forward(self, x, t, y, r=None, blocks=()):
        """x (B, C, H, W), t (B,), y (B,) -> output (B, out_channels, H, W), list of activations.
        t: SiT's time, or DiT's step in 0..999. r (B,): a model's second time; by default it is t.
        blocks: the blocks, counted from 1, whose activations (B, T, D) are returned, in their order.
        """
        self.check_inputs(x, r, blocks)
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        if self.r_embedder is not None:
            r = t if r is None else r
            c = c + self.r_embedder(r - t)
        activations = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)  # (B, T, D)
            if number in blocks:
                activations.append(x)
        x = self.final_layer(x, c)  # (B, T, p*p*out_channels): the pixels of each patch
        p, side = self.patch_size, self.input_size // self.patch_size
        x = x.view(len(x), side, side, p, p, self.out_channels)  # row, column, then inside the patch
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, side * p, side * p)
        return x, activations

    def check_inputs(self, x, r, blocks):
        expected = (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != expected:
            raise ValueError(f"expected images {expected}, got {tuple(x.shape[1:])}")
        if r is not None and self.r_embedder is None:
            raise ValueError("the model has no second time for r: build it with second_time=True")
        if not set(blocks) <= set(range(1, len(self.blocks) + 1)):
            raise ValueError(f"blocks {list(blocks)}: expected numbers from 1 to {len(self.blocks)}")

SIZES = {"XS": (256, 8, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16),
         "XL": (1152, 28, 16)}  # XS is ours, for small experiments
MODELS = {}
for size, (width, depth, heads) in SIZES.items():
    for patch in (2, 4, 8):
        for family in ("SiT", "DiT"):
            MODELS[f"{family}-{size}/{patch}"] = dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)

def build_model(name, **overrides):
    """A DiT of one of the MODELS, with any of DiT's arguments overridden."""
    check_known(name, "model", MODELS)
    return DiT(**dict(MODELS[name], **overrides))

# ----------------------------------------
# Objectives: what to regress, and how to sample. All take the arguments that FlowMatching explains.

def mean_square(error):
    """Mean square of everything but the batch, in at least float32: (B, ...) -> (B,)."""
    return error.flatten(1).to(torch.promote_types(error.dtype, torch.float32)).square().mean(1)

def with_and_without_labels(model, x, t, y):
    """The model's outputs for labels y, and for the null label in their place."""
    if not model.has_null_label:
        raise ValueError("guidance needs the null label: set the model's class_dropout_prob above 0")
    null = torch.full_like(y, model.num_classes)
    out, _ = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    return out.to(x.dtype).chunk(2)

def guided(model, x, t, y, scale, in_interval, channels):
    """Classifier-free guidance (Ho & Salimans 2022): uncond + scale * (cond - uncond), if in_interval.
    t: one time, or step number, for all of x. Only the first `channels` are guided; None: as many as x has."""
    channels = x.shape[1] if channels is None else channels
    if not 1 <= channels <= x.shape[1]:
        raise ValueError(f"cfg_channels {channels}: expected a number from 1 to {x.shape[1]}")
    t = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    if scale == 1 or not in_interval:
        out, _ = model(x, t, y)
        return out.to(x.dtype)
    cond, uncond = with_and_without_labels(model, x, t, y)
    mixed = uncond + scale * (cond - uncond)
    return torch.cat([mixed[:, :channels], cond[:, channels:]], 1)

class FlowMatching:
    """SiT (Ma et al. 2024, arXiv 2401.08740): regress the velocity from noise to data."""
    methods = ("heun", "euler", "sde")

    def times(self, n, generator=None, device=None):
        """Times (n,), uniform in [0, 1), on the given device; default: the generator's."""
        return torch.rand(n, generator=generator, device=device or generator.device)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=()):
        """Mean squared error per sample (B,), and the activations after these blocks.
        x (B, C, H, W), y (B,): data and labels. t (B,), noise: drawn when not given. r: only MeanFlow's.
        """
        t = self.times(len(x), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        velocity = x - noise
        x_t = (noise + t.view(-1, 1, 1, 1) * velocity).to(x.dtype)
        out, activations = model(x_t, t, y, blocks=blocks)
        return mean_square(out[:, :x.shape[1]] - velocity), activations

    @torch.no_grad()
    def sample(self, model, noise, y, steps=250, method="heun", cfg=1.0, cfg_interval=(0, 1),
               cfg_channels=None, noise_fn=None):
        """Integrate from noise (B, C, H, W) with labels y (B,) to samples, in `steps` intervals.

        method: "heun" (the paper's), "euler", or "sde": Euler-Maruyama on SiT's reverse SDE with noise
            sqrt(2 (1 - t)) dW. Its last step is 0.04 long (if there are two) and adds none.
        cfg: scale of guidance for t in cfg_interval, on the first cfg_channels channels (default:
            all; the published DiT and SiT code guides 3 of 4). noise_fn(k) gives step k's noise.
        """
        check_known(method, "method", self.methods)
        low, high = sorted(cfg_interval)
        def velocity(x, t):
            return guided(model, x, t, y, cfg, low <= t <= high, cfg_channels)[:, :x.shape[1]]

        grid = [k / steps for k in range(steps + 1)]
        if method == "sde":
            grid = [0.96 * k / max(1, steps - 1) for k in range(steps)] + [1.0]
        x = noise
        for k in range(steps):
            t, dt = grid[k], grid[k + 1] - grid[k]
            v = velocity(x, t)
            if method == "heun":
                v = (v + velocity(x + dt * v, grid[k + 1])) / 2
            elif method == "sde":
                v = (1 + t) * v - x  # v + (1 - t) * score, with score = (t*v - x) / (1 - t)
            x = x + dt * v
            if method == "sde" and k < steps - 1:
                step_noise = torch.randn_like(x) if noise_fn is None else noise_fn(k)
                x = x + math.sqrt(2 * (1 - t) * dt) * step_noise
        return x

def chain_constants(abar, device):
    """Constants of n noising steps, (n, 1, 1, 1) each; abar (n,): the signal's variance after a step."""
    abar = abar.view(-1, 1, 1, 1)
    abar_before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    alpha = abar / abar_before
    beta = 1 - alpha
    posterior = beta * (1 - abar_before) / (1 - abar)  # variance of q(x_prev | x_t, x): Ho et al. 2020, eq. 7
    posterior[0] = posterior[1]  # rather than 0, whose log is infinite: as published
    constants = dict(signal_scale=abar.sqrt(), noise_scale=(1 - abar).sqrt(),
                     x_scale=alpha.rsqrt(), eps_scale=beta / (1 - abar).sqrt() / alpha.sqrt(),
                     log_posterior=posterior.log(), log_beta=beta.log())
    return {name: value.float().to(device) for name, value in constants.items()}

def reverse_step(chain, k, x_t, eps, v):
    """The model's eps and v at step k of a chain -> mean and log-variance of x one step before.
    Ho et al. 2020, eq. 11; Nichol & Dhariwal 2021, eq. 15: v = -1 gives log_posterior, v = 1 log_beta."""
    mean = chain["x_scale"][k] * x_t - chain["eps_scale"][k] * eps
    low, high = chain["log_posterior"][k], chain["log_beta"][k]
    return mean, low + (v + 1) / 2 * (high - low)

def normal_cdf(x):
    """The tanh approximation of the standard normal's distribution function."""
    return 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))

def discretized_log_likelihood(x, mean, log_std):
    """Log-probability of 8-bit levels x in [-1, 1] under a normal: bins of 2/255, the outer ones open."""
    lower = normal_cdf((x - mean - 1 / 255) * torch.exp(-log_std)).masked_fill(x < -0.999, 0)
    upper = normal_cdf((x - mean + 1 / 255) * torch.exp(-log_std)).masked_fill(x > 0.999, 1)
    return (upper - lower).clamp(min=1e-12).log()

def euler_in_sigma(x, eps, sigma, next_sigma):
    """Euler's step of d(x / sqrt(abar)) / d sigma = eps, where sigma = sqrt((1 - abar) / abar)."""
    scaled = x * math.hypot(1, sigma)  # x / sqrt(abar)
    return (scaled + (next_sigma - sigma) * eps) / math.hypot(1, next_sigma)

class GaussianDiffusion:
    """DiT: regress the noise of 1000 noising steps, and learn the variance of the reverse steps.

    Nichol & Dhariwal 2021, arXiv 2102.09672, as in the published DiT's create_diffusion().
    x_t = sqrt(abar_t) * x + sqrt(1 - abar_t) * noise, abar_t the product of 1 - beta over steps 0..t.
    Of the model's 2*C channels, the first half predicts the noise, the second half the variance.
    """
    methods = ("ddpm", "ddim", "heun")

    def __init__(self):
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")
        self.abar = torch.cumprod(1 - beta, 0)
        self.chains = {}  # the constants by device; a copy in every step would wait for the device

    def times(self, n, generator=None, device=None):
        """n step numbers (n,), uniform in 0..999."""
        return torch.randint(1000, (n,), generator=generator, device=device or generator.device)

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=()):
        """The noise's squared error plus the variational bound in bits per dimension, (B,), and the
        activations. t (B,) are step numbers. The bound trains the variance alone."""
        if x.device not in self.chains:
            self.chains[x.device] = chain_constants(self.abar, x.device)
        chain = self.chains[x.device]
        t = self.times(len(x), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        x_t = (chain["signal_scale"][t] * x + chain["noise_scale"][t] * noise).to(x.dtype)
        out, activations = model(x_t, t, y, blocks=blocks)
        out = out.to(torch.promote_types(x.dtype, torch.float32))
        eps, v = out.split(x.shape[1], 1)
        squared_error = mean_square(eps - noise)
        eps = eps.detach()
        mean, log_variance = reverse_step(chain, t, x_t, eps, v)
        mean_gap = chain["eps_scale"][t] * (eps - noise)  # to the mean of q(x_prev | x_t, x)
        log_ratio = log_variance - chain["log_posterior"][t]
        kl = 0.5 * (log_ratio - 1 + (-log_ratio).exp() + mean_gap.square() * (-log_variance).exp())
        nll = -discretized_log_likelihood(x, mean, 0.5 * log_variance)
        bound = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
        return squared_error + bound.flatten(1).mean(1) / math.log(2), activations

    def spaced(self, n, method):
        """The n step numbers that a sampler visits, ascending, as DiT's respace.py chooses them."""
        if not 2 <= n <= 1000:
            raise ValueError(f"{method} takes 2 to 1000 steps, got {n}")
        if method == "ddpm":
            positions = [0.0]  # evenly to 999, by summation: products would round to other steps
            while len(positions) < n:
                positions.append(positions[-1] + 999 / (n - 1))
            return [round(position) for position in positions]
        numbers = list(range(0, 1000, math.ceil(1000 / n)))
        if len(numbers) != n:
            raise ValueError(f"{method} takes every i-th of 1000 steps, and no i gives {n} steps")
        return numbers

    @torch.no_grad()
    def sample(self, model, noise, y, steps=250, method="ddpm", cfg=1.0, cfg_interval=(0, 1),
               cfg_channels=None, noise_fn=None):
        """From noise (B, C, H, W) with labels y (B,) to samples, by `steps` of the 1000 steps.

        method: "ddpm" draws from each step's learned normal distribution. "ddim" (Song et al. 2020,
            arXiv 2010.02502) is Euler's method on the ODE of `euler_in_sigma`, "heun" is Heun's,
            with a step of Euler's in the last interval.
        The variance is not guided. cfg_interval bounds t = 1 / (1 + sigma), the time at which SiT's
        path has the same signal-to-noise ratio.
        """
        check_known(method, "method", self.methods)
        low, high = sorted(cfg_interval)
        numbers = self.spaced(steps, method)
        abar = self.abar[numbers]
        chain = chain_constants(abar, noise.device)
        sigma = [0.0] + (1 / abar - 1).sqrt().tolist()  # step k leads from sigma[k + 1] to sigma[k]
        def predict(x, k):
            t = 1 / (1 + sigma[k + 1])
            out = guided(model, x, numbers[k], y, cfg, low <= t <= high, cfg_channels)
            return out.split(x.shape[1], 1)  # eps and v, of the noise and the variance

        x = noise
        for k in reversed(range(steps)):
            eps, v = predict(x, k)
            if method == "ddpm":
                x, log_variance = reverse_step(chain, k, x, eps, v)
                if k > 0:
                    step_noise = torch.randn_like(x) if noise_fn is None else noise_fn(steps - 1 - k)
                    x = x + torch.exp(0.5 * log_variance) * step_noise
                x = x.to(noise.dtype)
                continue
            if method == "heun" and k > 0:
                next_eps, _ = predict(euler_in_sigma(x, eps, sigma[k + 1], sigma[k]), k - 1)
                eps = (eps + next_eps) / 2
            x = euler_in_sigma(x, eps, sigma[k + 1], sigma[k])
        return x

class MeanFlow:
    """Regress the average velocity u(x_t, t, r) from time t to a later r: x_r = x_t + (r - t) * u.

    Geng et al. 2025, arXiv 2505.13447, whose time runs the other way, from data at 0 to noise at 1.
    every: one sample in `every` has r != t, the others are flow matching.
    omega, kappa, interval: guidance in training, of scale omega / (1 - kappa). In the interval of t, v
        becomes omega * v + kappa * u(y) + (1 - omega - kappa) * u(null) at r = t, if y is not null.
    """
    methods = ("average",)

    def __init__(self, every=4, omega=1.0, kappa=0.0, interval=(0, 1)):
        self.every = every
        self.omega, self.kappa, self.interval = omega, kappa, interval

    def moving(self, n, position=0):
        """The samples with r != t, a slice: those whose positions in the batch `every` divides.
        The n samples have consecutive positions from `position` on."""
        return slice(-position % self.every, n, self.every)

    def times(self, n, generator=None, device=None):
        """Times t <= r, (n,): the lesser and the greater of two logit-normal ones; r = t if not `moving`."""
        normal = torch.randn(2, n, generator=generator, device=device or generator.device)
        a, b = torch.sigmoid(0.4 - normal)
        t = torch.minimum(a, b)
        r = t.clone()
        r[self.moving(n)] = torch.maximum(a, b)[self.moving(n)]
        return t, r

    def loss(self, model, x, y, t=None, noise=None, r=None, blocks=(), moving=slice(None)):
        """Mean squared error per sample (B,), to be passed through `weighted`, and the activations.
        As FlowMatching.loss. If t is None, t and r (B,) are drawn; if only r is None, r = t.
        moving: index of the samples with r != t, which alone need the derivative (default: all).
        Forward-mode differentiation fails in DistributedDataParallel: give the model inside it.
        """
        if t is None:
            t, r = self.times(len(x), device=x.device)
            moving = self.moving(len(x))
        r = t if r is None else r
        noise = torch.randn_like(x) if noise is None else noise
        velocity = x - noise
        x_t = (noise + t.view(-1, 1, 1, 1) * velocity).to(x.dtype)
        with torch.no_grad():
            v = self.guide(model, x_t, y, t, velocity)
            slope = torch.zeros_like(v)  # du/dt; where r = t, it plays no part
            slope[moving] = self.derivative(model, x_t[moving], y[moving], t[moving], r[moving], v[moving])
            target = v + (r - t).view(-1, 1, 1, 1) * slope  # the MeanFlow identity, eq. 6
        out, activations = model(x_t, t, y, r, blocks=blocks)  # again, now with gradients
        return mean_square(out[:, :x.shape[1]] - target), activations

    def guide(self, model, x_t, y, t, v):
        """The velocity v, guided as omega, kappa and interval say."""
        if self.omega == 1 and self.kappa == 0:
            return v
        cond, uncond = with_and_without_labels(model, x_t, t, y)  # at r = t
        out = self.kappa * cond + (1 - self.omega - self.kappa) * uncond
        mixed = self.omega * v + out[:, :v.shape[1]]
        low, high = sorted(self.interval)
        applies = (low <= t) & (t <= high) & (y != model.num_classes)
        return torch.where(applies.view(-1, 1, 1, 1), mixed, v)

    def derivative(self, model, x, y, t, r, v):
        """du/dt of the model along the flow: dx/dt = v, dt/dt = 1, and r is held fixed."""
        def predict(x, t):
            out, _ = model(x, t, y, r)
            return out[:, :v.shape[1]]
        # forward-mode differentiation works neither in fused attention nor in compiled code
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            _, slope = torch.func.jvp(predict, (x, t), (v.to(x.dtype), torch.ones_like(t)))
        # else the next forward pass would use the weights that autocast cast here, without gradients
        torch.clear_autocast_cache()
        return slope

    def weighted(self, error, size):
        """What to minimise: error * size, a sample's sum, over itself + 0.01 held fixed (the paper's p = 1)."""
        total = size * error
        return total / (total.detach() + 0.01)

    @torch.no_grad()
    def sample(self, model, noise, y, steps=1, method="average", cfg=1.0, cfg_interval=None,
               cfg_channels=None, noise_fn=None):
        """From noise (B, C, H, W) with labels y (B,) to samples, in `steps` equal intervals. A cfg
        other than 1 is a ValueError; the last three arguments have no effect."""
        check_known(method, "method", self.methods)
        if cfg != 1:
            raise ValueError(f"cfg {cfg}: MeanFlow is guided in training, by omega and kappa")
        x = noise
        for k in range(steps):
            t = torch.full((len(x),), k / steps, dtype=torch.float32, device=x.device)
            r = torch.full_like(t, (k + 1) / steps)
            u, _ = model(x, t, y, r)
            x = x + u[:, :x.shape[1]].to(x.dtype) / steps
        return x
