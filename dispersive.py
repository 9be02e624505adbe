"""Dispersive Loss and the diffusion transformers it was published on, in one file.

    losses        dispersive_loss, contrastive_loss: four kinds each      Wang & He 2025, arXiv 2506.09027
    transformer   DiT, the adaLN-Zero transformer of DiT and SiT          Peebles & Xie 2023, arXiv 2212.09748
    objectives    FlowMatching: SiT's linear path and velocity            Ma et al. 2024, arXiv 2401.08740

Time is SiT's everywhere: t = 0 is noise, t = 1 is data, x_t = t*x + (1-t)*noise, velocity v = x - noise.
Images and latents are (B, C, H, W); labels are (B,) int64, and label num_classes stands for "no label".
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Losses. This section stands alone: copy it as it is, it needs only `import math` and `import torch`.

KINDS = ("infonce", "cosine", "hinge", "covariance")


def dispersive_loss(z, kind="infonce", tau=0.5, margin=1.0, group=None):
    """Push the representations of a batch apart: a contrastive loss without positives (Wang & He 2025, table 1).

    z: activations (B, ...) of any floating dtype, flattened to (B, dim); computed in at least float32.
    kind, with D(a, b) = |a - b|^2 / dim, or -cos(a, b) for "cosine", and i = j included:
        "infonce", "cosine"   log mean_ij exp(-D(z_i, z_j) / tau)
        "hinge"               mean_ij max(0, margin - D(z_i, z_j))^2
        "covariance"          mean_{m != n} C_mn^2, C the correlation of features m and n over the batch
    group: compute it on every `group` consecutive samples and average (default: on the whole batch). What the loss
        sees is a hyper-parameter: the paper uses 16 samples.
    Returns a scalar to add to the training loss, times 0.5 in the paper. dispersive_floor gives its least value.
    Raises ValueError for fewer than two samples: there is nothing to push apart.
    """
    _check_kind(kind)
    z = _groups(z, group)
    if kind == "covariance":
        z = _standardize(z)
        return _mean_off_diagonal(_gram(z).square(), z.square().mean(-2)).mean()
    distance = _distances(z, kind)
    if kind == "hinge":
        return (margin - distance).relu().square().mean()
    return _log_mean_exp(-distance / tau).mean()


def contrastive_loss(z, z_pos, kind="infonce", tau=0.5, margin=1.0, cov_weight=1.0, group=None):
    """The contrastive counterparts of dispersive_loss: z_pos holds a second view of every sample of z (same table).

        "infonce", "cosine"   mean_i [D(z_i, z_pos_i) / tau + log sum_j exp(-D(z_i, z_pos_j) / tau)]
        "hinge"               mean_i [D(z_i, z_pos_i)^2 + mean_j max(0, margin - D(z_i, z_pos_j))^2]
        "covariance"          mean_m (1 - C_mm)^2 + cov_weight * mean_{m != n} C_mn^2, C the cross-correlation of the
                              views: Barlow Twins (Zbontar et al. 2021), with means where that paper has sums
    Everything else is as in dispersive_loss.
    """
    _check_kind(kind)
    if z.shape != z_pos.shape:
        raise ValueError(f"the two views differ in shape: {tuple(z.shape)} and {tuple(z_pos.shape)}")
    z, z_pos = _groups(z, group), _groups(z_pos, group)
    if kind == "covariance":
        z, z_pos = _standardize(z), _standardize(z_pos)
        diagonal = (z * z_pos).mean(-2)
        off_diagonal = _mean_off_diagonal(_gram(z) * _gram(z_pos), diagonal)
        return ((1 - diagonal).square().mean(-1) + cov_weight * off_diagonal).mean()
    n = z.shape[-2]
    distance = _distances(torch.cat([z, z_pos], -2), kind)[..., :n, n:]
    positive = distance.diagonal(dim1=-2, dim2=-1)
    if kind != "cosine":
        positive = (z - z_pos).square().mean(-1)  # the views may be too close for the Gram matrix to tell apart
    if kind == "hinge":
        return positive.square().mean() + (margin - distance).relu().square().mean()
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    negatives = (-distance / tau).masked_fill(itself, -math.inf).logsumexp(-1)
    return torch.nn.functional.softplus(negatives + positive / tau).mean()  # -log of the positive's softmax


def dispersive_floor(kind, n, tau=0.5, margin=1.0):
    """The least value of dispersive_loss on n samples: where a loss that "stopped at -log(n)" has arrived.

    For "covariance" it is the value of random features, which n samples can hardly beat when dim is much larger than n.
    """
    _check_kind(kind)
    return {"infonce": -math.log(n),
            "cosine": 1 / tau + math.log1p((n - 1) * math.exp(-n / (tau * (n - 1)))) - math.log(n),
            "hinge": margin ** 2 / n,
            "covariance": 1 / (n - 1)}[kind]


@torch.no_grad()
def mean_distance(z, group=None):
    """Mean over i != j of |z_i - z_j|^2 / dim, a scalar tensor: how far apart a batch is, whatever the loss."""
    return 2 * _groups(z, group).var(-2).mean()


def _check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")


def _groups(z, group):
    """(B, ...) -> (B/group, group, dim), in at least float32."""
    n = len(z) if group is None else group
    if n < 2:
        raise ValueError(f"dispersion compares samples: it needs at least 2 in a group, got {n}")
    if len(z) % n or not z.numel():
        raise ValueError(f"cannot split activations of shape {tuple(z.shape)} into groups of {n} samples")
    return z.reshape(len(z) // n, n, -1).to(torch.promote_types(z.dtype, torch.float32))


def _gram(z):
    """Inner products of all pairs of rows, (G, n, n), outside autocast, which would round them to 16 bits."""
    with torch.autocast(z.device.type, enabled=False):
        return z @ z.mT


def _distances(z, kind):
    """D of all pairs of rows, (G, n, n). That of a row to itself is a constant, and has no gradient to round."""
    itself = torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
    if kind == "cosine":
        return -_gram(torch.nn.functional.normalize(z, dim=-1)).masked_fill(itself, 1)
    z = z - z.mean(-2, keepdim=True).detach()  # changes no distance, but |a|^2 + |b|^2 - 2ab cancels far from 0
    gram = _gram(z)
    square = gram.diagonal(dim1=-2, dim2=-1)
    return ((square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * gram) / z.shape[-1]).masked_fill(itself, 0)


def _log_mean_exp(x):
    """log mean exp over the last two axes. Near x = 0 logsumexp loses the value's digits, but never the gradient's."""
    value = x.logsumexp((-2, -1)) - math.log(x.shape[-2] * x.shape[-1])
    near_zero = x.detach().expm1().mean((-2, -1)).log1p()
    return value + (torch.where(value.abs() < 1, near_zero, value) - value).detach()


def _standardize(z):
    """Features with zero mean and unit (population) variance over the group; a constant feature becomes zero."""
    z = z - z[..., :1, :].detach()  # makes a constant feature exactly zero
    z = z - z.mean(-2, keepdim=True)
    variance = z.square().mean(-2, keepdim=True)
    return z * torch.where(variance > 0, variance, math.inf).rsqrt()


def _mean_off_diagonal(gram_product, diagonal):
    """mean_{m != n} C_mn^2 for C = A^T B / n, (G,), without the dim x dim matrix: |A^T B|_F^2 = <A A^T, B B^T>."""
    n, dim = gram_product.shape[-1], diagonal.shape[-1]
    total = gram_product.sum((-2, -1)) / n ** 2
    return (total - diagonal.square().sum(-1)) / max(1, dim * (dim - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Transformer. Parameter names and initialisation are those of the published DiT and SiT, so that weights interchange.


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def layer_norm(dim):
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def adaln(dim, outputs):
    """The conditioning's shifts, scales and gates: (B, dim) -> (B, outputs*dim)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, outputs * dim))


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaptive layer norm: the condition shifts, scales and gates both residual branches."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = adaln(dim, 6)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = layer_norm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = adaln(dim, 2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoids of the times t (B,) -> (B, dim), cosines first."""
    freqs = torch.exp(-math.log(max_period) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float32, device=t.device))
    angles = t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def position_embedding(dim, side):
    """Fixed 2-D sinusoids for side x side tokens, (1, side*side, dim): first half columns, second half rows."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], -1).float()
    columns, rows = line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], -1).reshape(1, side * side, dim)


class DiT(nn.Module):
    """The transformer of DiT and SiT: predicts noise or velocity from a noisy image, a time and a label.

    input_size, in_channels: the image or latent is (in_channels, input_size, input_size); patch_size divides the size.
    class_dropout_prob: only whether it is positive matters here: then label num_classes (no label) has an embedding.
    learn_sigma: 2*in_channels output channels; DiT uses both halves, SiT the first.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"patch_size {patch_size} must divide input_size {input_size}, and num_heads {num_heads} "
                             f"and 4 must divide hidden_size {hidden_size}")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        # the one-entry dicts give the parameters their published names: x_embedder.proj.weight, ...
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)})
        self.t_embedder = self._time_embedder(hidden_size)
        self.y_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)})
        self.pos_embed = nn.Parameter(position_embedding(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** 2 * self.out_channels)
        self._initialize()

    @staticmethod
    def _time_embedder(dim):
        return nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})

    def _initialize(self):
        """adaLN-Zero: every block starts as the identity, and the output as zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the convolution is initialised as a matrix
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                             self.final_layer.linear]:
            nn.init.zeros_(layer.weight)

    def forward(self, x, t, y, blocks=()):
        """x (B, C, H, W), t (B,): SiT's time in [0, 1], or DiT's step in 0..999, y (B,) -> (B, out_channels, H, W).

        blocks: numbers of blocks, from 1. When any are named the result is (output, [activations (B, T, hidden_size)
        after each of those blocks, in ascending order]).
        """
        if any(not 1 <= number <= len(self.blocks) for number in blocks):
            raise ValueError(f"blocks {tuple(blocks)}: expected numbers from 1 to {len(self.blocks)}")
        x = self.x_embedder.proj(x)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder.mlp(timestep_embedding(t).to(x.dtype)) + self.y_embedder.embedding_table(y)
        activations = []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number in blocks:
                activations.append(x)
        x = self.final_layer(x, c)
        x = x.unflatten(-1, (self.patch_size, self.patch_size, self.out_channels)).unflatten(1, (side, side))
        x = torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)
        return (x, activations) if blocks else x


MODELS = {f"{family}-{size}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
          for family in ("SiT", "DiT")
          for size, width, depth, heads in (("XS", 256, 8, 4), ("S", 384, 12, 6), ("B", 768, 12, 12),
                                            ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
          for patch in (2, 4, 8)}


def build_model(name, **overrides):
    """A DiT of one of the MODELS: the published S, B, L and XL, and XS for small experiments.

    overrides: arguments of DiT, for instance in_channels=3. Under torch.device("meta") nothing is allocated.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return DiT(**{**MODELS[name], **overrides})


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: what to regress in training, and how to integrate it in sampling


def per_sample(error):
    """Mean over everything but the batch, in at least float32: (B, ...) -> (B,)."""
    return error.flatten(1).mean(1)


def expand(t, x):
    """(B,) -> (B, 1, 1, 1), to be broadcast against x."""
    return t.view(-1, *[1] * (x.ndim - 1))


def guided(model, x, t, y, cfg, channels):
    """The model's output at one time t, its first `channels` channels under classifier-free guidance of scale cfg.

    uncond + cfg * (cond - uncond), both halves in one batch; the other channels are the conditional ones.
    """
    t = torch.full((len(x),), t, device=x.device, dtype=x.dtype)
    if cfg == 1:
        return model(x, t, y).to(x.dtype)
    no_label = torch.full_like(y, model.num_classes)
    cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, no_label])).to(x.dtype).chunk(2)
    return torch.cat([uncond[:, :channels].lerp(cond[:, :channels], cfg), cond[:, channels:]], 1)


class FlowMatching:
    """SiT: regress the velocity x - noise on the line x_t = t*x + (1-t)*noise, and integrate it from noise to data."""

    methods = ("heun", "euler", "sde")

    def times(self, n, generator):
        """n training times, uniform in [0, 1), on the generator's device."""
        return torch.rand(n, generator=generator, device=generator.device)

    def loss(self, model, x, y, t=None, noise=None, blocks=()):
        """Mean squared error per sample (B,), and the activations after the named blocks.

        x (B, C, H, W) data, y (B,) labels; t (B,) and noise, like x, are drawn when not given.
        """
        t = torch.rand(len(x), device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        x_t = torch.lerp(noise, x, expand(t, x))
        out, activations = model(x_t, t, y, blocks=blocks) if blocks else (model(x_t, t, y), [])
        return per_sample((out[:, :x.shape[1]] - (x - noise)).square()), activations

    @torch.no_grad()
    def sample(self, model, noise, y, steps=250, method="heun", cfg=1.0, cfg_interval=(0, 1), cfg_channels=None,
               noise_fn=None):
        """Integrate from noise (B, C, H, W) with labels y (B,) to samples, in `steps` intervals.

        method: "heun" (the paper's: two evaluations an interval), "euler", or "sde": Euler-Maruyama on SiT's reverse
            SDE with diffusion 1 - t, the last interval 0.04 long and without noise; noise_fn(k) gives step k's noise.
        cfg: guidance scale, applied where cfg_interval[0] <= t <= cfg_interval[1], on the first cfg_channels channels
            (default: all; the published DiT and SiT code guides 3 of 4).
        """
        if method not in self.methods:
            raise ValueError(f"unknown method {method!r}: expected one of {', '.join(self.methods)}")
        channels = noise.shape[1]

        def velocity(x, t):
            scale = cfg if cfg_interval[0] <= t <= cfg_interval[1] else 1.0
            return guided(model, x, t, y, scale, cfg_channels or channels)[:, :channels]

        if method == "sde":
            times = [0.96 * k / max(1, steps - 1) for k in range(steps)] + [1.0]
        else:
            times = [k / steps for k in range(steps + 1)]
        x = noise
        for k, (t, t_next) in enumerate(zip(times, times[1:])):
            dt = t_next - t
            v = velocity(x, t)
            if method == "heun":
                v = (v + velocity(x + dt * v, t_next)) / 2
            elif method == "sde":
                v = (1 + t) * v - x  # velocity + diffusion * score, where score = (t*v - x) / (1-t)
            x = x + dt * v
            if method == "sde" and k < steps - 1:
                step_noise = torch.randn_like(x) if noise_fn is None else noise_fn(k)
                x = x + math.sqrt(2 * (1 - t) * dt) * step_noise
        return x
