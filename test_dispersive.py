"""Tests, in the order of the files. Each compares with a slow and obvious version, a closed form, or published numbers.

Numbers marked "golden" were computed by the published implementations on the weights and inputs that `fill`, `rn` and
`ru` reproduce.
"""
import argparse
import copy
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from PIL import Image

import fid
import sample
import train
from dispersive import (KINDS, MODELS, DiT, FlowMatching, GaussianDiffusion, MeanFlow, build_model,
                        contrastive_loss, dispersive_floor, dispersive_loss, effective_rank, mean_distance, repa_loss,
                        repa_projector)
from sample import UserError

torch.set_num_threads(1)  # the work is small, and threads that wait for each other crawl on a busy machine
HERE = Path(__file__).parent
GOLDEN = HERE.parent / "shared" / "golden"


def rn(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def ru(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).uniform(size=shape).astype(np.float32))


def fill(module, prefix=""):
    """Weights that depend on the parameter's name alone, as the golden numbers were computed with."""
    for name, tensor in module.state_dict().items():
        if name == "pos_embed" or not tensor.is_floating_point():
            continue
        random = np.random.RandomState(zlib.crc32((prefix + name).encode()))
        a = random.standard_normal(tuple(tensor.shape)).astype(np.float32)
        if name.endswith("running_var"):
            a = np.abs(a) + 0.5
        elif name.endswith("bn.weight"):
            a = 1 + 0.1 * a
        elif a.ndim > 1:
            a = a / np.float32(math.sqrt(np.prod(a.shape[1:])))
        else:
            a = a * 0.1
        tensor.copy_(torch.from_numpy(a))
    return module


def close(value, reference, tolerance):
    """Largest deviation relative to the largest reference value."""
    value, reference = (torch.as_tensor(v, dtype=torch.float64) for v in (value, reference))
    error = (value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# dispersive.py: losses


def pair_distance(a, b, kind):
    return -a @ b / (a.norm() * b.norm()) if kind == "cosine" else ((a - b) ** 2).mean()


def slow_dispersive(z, kind, tau=0.5, margin=1.0):
    """The definition, pair by pair in float64."""
    z = z.double().reshape(len(z), -1)
    if kind == "covariance":
        return slow_covariance(z, z)[1]
    pairs = torch.stack([pair_distance(a, b, kind) for a in z for b in z])
    if kind == "hinge":
        return (margin - pairs).clamp(min=0).square().mean()
    return (-pairs / tau).exp().mean().log()


def slow_contrastive(z, z_pos, kind, tau=0.5, margin=1.0):
    z, z_pos = (v.double().reshape(len(v), -1) for v in (z, z_pos))
    if kind == "covariance":
        on, off = slow_covariance(z, z_pos)
        return on + 0.7 * off
    total = 0
    for i, a in enumerate(z):
        pairs = torch.stack([pair_distance(a, b, kind) for b in z_pos])
        if kind == "hinge":
            total = total + pairs[i] ** 2 + (margin - pairs).clamp(min=0).square().mean()
        else:
            total = total + pairs[i] / tau + (-pairs / tau).exp().sum().log()
    return total / len(z)


def slow_covariance(a, b):
    """Mean over the diagonal of (1 - C)^2, and off the diagonal of C^2, by the dim x dim matrix."""
    def standard(v):
        std = v.std(0, unbiased=False)
        return torch.where(std > 1e-12, (v - v.mean(0)) / std.clamp(min=1e-12), torch.zeros_like(v))
    c = standard(a).T @ standard(b) / len(a)
    off = ~torch.eye(len(c), dtype=torch.bool)
    return (1 - c.diagonal()).square().mean(), c[off].square().mean()


def value_and_gradient(function, *inputs):
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    value = function(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


CASES = {"spread 1": lambda z: z, "spread 0.1": lambda z: 0.1 * z, "collapsed": lambda z: 1e-3 * z,
         "saturated": lambda z: 2.5 * z, "offset": lambda z: z + 1000 * rn(8, *z.shape[1:]).sign()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_dispersive_loss_is_the_pairwise_loop(kind, case):
    z = CASES[case](rn(1, 12, 5, 7))
    value, (gradient,) = value_and_gradient(lambda v: dispersive_loss(v, kind), z)
    reference, (slow_gradient,) = value_and_gradient(lambda v: slow_dispersive(v, kind), z)
    close(value, reference, 1e-5)
    if not (kind == "cosine" and case == "offset"):
        close(gradient, slow_gradient, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_contrastive_loss_is_the_pairwise_loop(kind, case):
    z, z_pos = CASES[case](rn(1, 12, 5, 7)), CASES[case](rn(1, 12, 5, 7) + 0.3 * rn(2, 12, 5, 7))
    value, gradients = value_and_gradient(lambda a, b: contrastive_loss(a, b, kind, cov_weight=0.7), z, z_pos)
    reference, slow_gradients = value_and_gradient(lambda a, b: slow_contrastive(a, b, kind), z, z_pos)
    close(value, reference, 1e-5)
    if not (kind == "cosine" and case == "offset"):
        close(torch.cat(gradients), torch.cat(slow_gradients), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_at_full_activation_size(kind):
    """B = 256, 256 x 768, in value and gradient against float64; a Gram matrix is exact enough there."""
    z = rn(3, 256, 256 * 768)

    def inside_autocast(v):  # the loss stays in float32 all the same
        with torch.autocast("cpu", torch.bfloat16):
            return dispersive_loss(v.view(256, 256, 768), kind)

    def reference(v):
        v = v.double()
        if kind == "covariance":
            v = (v - v.mean(0)) / v.std(0, unbiased=False)
            return ((v @ v.T).square().sum() / 256 ** 2 - v.shape[1]) / (v.shape[1] * (v.shape[1] - 1))
        gram = v @ v.T
        norm = gram.diagonal()
        l2, cosine = (norm[:, None] + norm - 2 * gram) / v.shape[1], gram / (norm[:, None] * norm).sqrt()
        d = -cosine if kind == "cosine" else l2
        return (1 - d).clamp(min=0).square().mean() if kind == "hinge" else (-d / 0.5).exp().mean().log()

    z = 0.6 * z  # so that pairs lie within the hinge's margin
    value, (gradient,) = value_and_gradient(inside_autocast, z)
    expected, (slow_gradient,) = value_and_gradient(reference, z)
    close(value, expected, 1e-5)
    close(gradient, slow_gradient, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    z, z_pos = (rn(seed, 5, 3, 2).double().requires_grad_() for seed in (4, 5))
    assert torch.autograd.gradcheck(lambda v: dispersive_loss(v, kind), z)
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, b, kind), (z, z_pos))
    assert dispersive_loss(z, kind).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_consecutive_samples_averaged(kind):
    z, z_pos = rn(6, 12, 9), rn(7, 12, 9)
    parts = [dispersive_loss(part, kind) for part in z.split(4)]
    close(dispersive_loss(z, kind, group=4), sum(parts) / 3, 1e-6)
    parts = [contrastive_loss(*pair, kind) for pair in zip(z.split(4), z_pos.split(4))]
    close(contrastive_loss(z, z_pos, kind, group=4), sum(parts) / 3, 1e-6)
    close(mean_distance(z, group=4), sum(mean_distance(part) for part in z.split(4)) / 3, 1e-6)


def test_low_precision_is_promoted_and_shapes_are_flattened():
    for dtype in (torch.bfloat16, torch.float16):
        z = rn(8, 8, 4, 3, 2).to(dtype)
        close(dispersive_loss(z), dispersive_loss(z.float().flatten(1)), 1e-7)
        assert dispersive_loss(z).dtype == torch.float32
    close(dispersive_loss(rn(8, 8)), slow_dispersive(rn(8, 8, 1), "infonce"), 1e-5)
    strided = rn(8, 8, 6, 4).transpose(1, 2)
    close(dispersive_loss(strided), dispersive_loss(strided.contiguous()), 1e-6)


def test_constant_features_have_no_correlation_and_no_nan():
    z = torch.cat([rn(9, 9, 5), torch.full((9, 3), 0.1)], 1)
    assert z.mean(0)[5] != z[0, 5]  # float32 misses the mean of a constant
    value, (gradient,) = value_and_gradient(lambda v: dispersive_loss(v, "covariance"), z)
    close(value, slow_dispersive(torch.cat([z[:, :5], torch.zeros(9, 3)], 1), "covariance"), 1e-5)
    assert gradient.isfinite().all() and (gradient[:, 5:] == 0).all()
    same = torch.ones(4, 6)
    for kind in KINDS:
        value, (gradient,) = value_and_gradient(lambda v: dispersive_loss(v, kind), same)
        assert value.isfinite() and gradient.isfinite().all()
    assert dispersive_loss(same) == 0


def test_authors_dispersive_loss():
    """Golden: the authors' PyTorch code, tau = 1, on inputs of three scales."""
    for seed, scale, golden in ((10, 0.1, -0.01663364), (11, 0.5, -0.42340022), (12, 1.0, -1.40683627)):
        close(dispersive_loss(rn(seed, 8, 16, 24) * scale, tau=1.0), golden, 2e-6)


def test_floors_are_reached_and_not_passed():
    n = 16
    far, simplex = 100 * torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64) - 1 / n
    close(dispersive_loss(far), dispersive_floor("infonce", n), 1e-12)
    close(dispersive_floor("infonce", 32), -3.4657359, 1e-7)
    close(dispersive_loss(simplex, "cosine", tau=0.3), dispersive_floor("cosine", n, tau=0.3), 1e-12)
    close(dispersive_loss(far, "hinge", margin=1.5), dispersive_floor("hinge", n, margin=1.5), 1e-12)
    close(dispersive_loss(rn(13, n, 20000), "covariance"), dispersive_floor("covariance", n), 1e-2)


def test_mean_distance_is_the_mean_over_pairs():
    z = rn(14, 7, 3, 5) + 50
    pairs = [pair_distance(a, b, "l2") for i, a in enumerate(z.double()) for j, b in enumerate(z.double()) if i != j]
    close(mean_distance(z), sum(pairs) / len(pairs), 1e-5)


def test_effective_rank_counts_directions():
    z = rn(15, 8, 3, 5)
    spectrum = np.linalg.svd((z - z.mean(0)).flatten(1).double().numpy(), compute_uv=False) ** 2
    p = spectrum[spectrum > 1e-9] / spectrum.sum()
    close(effective_rank(z + 50), math.exp(-(p * np.log(p)).sum()), 1e-4)
    close(effective_rank(torch.cat([z[:4], 3 * z[:1] + torch.arange(4.).view(4, 1, 1) * z[1]]), group=4),
          (effective_rank(z[:4]) + 1) / 2, 1e-4)  # the second group lies on a line
    close(effective_rank(torch.eye(16)), 15, 1e-5)
    assert effective_rank(torch.ones(4, 6)) == 1


def test_loss_errors():
    with pytest.raises(ValueError, match="at least 2"):
        dispersive_loss(rn(1, 1, 8))
    with pytest.raises(ValueError, match="at least 2"):
        dispersive_loss(rn(1, 8, 8), group=1)
    with pytest.raises(ValueError, match="groups of 3"):
        dispersive_loss(rn(1, 8, 8), group=3)
    with pytest.raises(ValueError, match="infonce, cosine, hinge, covariance"):
        dispersive_loss(rn(1, 8, 8), "l2")
    with pytest.raises(ValueError, match="differ in shape"):
        contrastive_loss(rn(1, 8, 8), rn(1, 8, 7))


def test_loss_section_stands_alone():
    """What stands above the transformer runs with math and torch only."""
    source = (HERE / "dispersive.py").read_text().split("# Transformer")[0].split("# Losses.")[1]
    names = {"math": math, "torch": torch}
    exec("#" + source.rsplit("# ---", 1)[0], names)
    for kind in KINDS:
        close(names["dispersive_loss"](rn(1, 8, 8), kind), dispersive_loss(rn(1, 8, 8), kind), 0)


def test_the_loss_to_paste_from_the_readme_is_the_loss():
    names = {}
    exec(re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S).group(1), names)
    close(names["dispersive_loss"](rn(1, 8, 3, 5)), dispersive_loss(rn(1, 8, 3, 5)), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# dispersive.py: transformer and objectives


def test_parameter_counts_of_the_published_shapes():
    """Golden counts."""
    counts = {"XL/2": 675129632, "XL/4": 675074432, "XL/8": 675683072, "L/2": 458102816, "L/4": 458053760,
              "L/8": 458594816, "B/2": 130512416, "B/4": 130475648, "B/8": 130881536, "S/2": 32963360, "S/4": 32945024,
              "S/8": 33148160}
    for name, count in counts.items():
        for family in ("SiT", "DiT"):
            with torch.device("meta"):
                model = build_model(f"{family}-{name}")
            assert sum(p.numel() for p in model.parameters()) == count
    with pytest.raises(ValueError, match="SiT-M/2"):
        build_model("SiT-M/2")


@pytest.fixture(scope="module")
def golden_sit():
    return fill(build_model("SiT-S/2", num_classes=10)).eval()


GOLDEN_SIT = {
    "out": [-0.6491057, -0.003471851, 1.045748, 0.975122, 0.1084242, -0.9454051, -0.7054862, 0.3594444, 0.03205636,
            -0.546802, 1.728984, -0.1839832],
    "loss": [3.268901, 3.151128, 3.140131],
    "ode_heun2": [-0.8416493, -0.5420452, 1.907666, 1.103138, -0.5571678, -0.1735705, -1.213986, 1.075168],
}


@torch.no_grad()
def test_forward_loss_and_heun_equal_the_published_code(golden_sit):
    """Golden: SiT-S/2; a few values of each output here, all of them where the reference file is at hand."""
    out = golden_sit(rn(1, 3, 4, 32, 32), ru(2, 3), torch.tensor([0, 7, 10]))[:, :4]
    loss, _ = FlowMatching().loss(golden_sit, rn(3, 3, 4, 32, 32), torch.tensor([0, 7, 10]), ru(2, 3),
                                  rn(4, 3, 4, 32, 32))
    heun = FlowMatching().sample(golden_sit, rn(5, 2, 4, 32, 32), torch.tensor([1, 2]), steps=5)
    close(out.flatten()[::1111], GOLDEN_SIT["out"], 1e-5)
    close(loss, GOLDEN_SIT["loss"], 1e-5)
    close(heun.flatten()[::1111], GOLDEN_SIT["ode_heun2"], 1e-5)
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "sit.npz")
        close(out, golden["out"], 1e-5)
        close(heun, golden["ode_heun2"], 1e-5)


def random_model(**overrides):
    """A small float64 model whose every weight matters (a fresh one is the identity)."""
    sizes = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=4)
    return fill(DiT(**{**sizes, **overrides})).double().eval()


def test_attention_and_block_are_their_formulas():
    model = random_model()
    block, x, c = model.blocks[0], rn(1, 2, 5, 32).double(), rn(2, 2, 32).double()

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attention(v):
        out = torch.zeros_like(v)
        for b in range(2):
            qkv = v[b] @ block.attn.qkv.weight.T + block.attn.qkv.bias
            for h in range(2):
                q, k, w = (qkv[:, i * 32 + h * 16:i * 32 + (h + 1) * 16] for i in range(3))
                out[b, :, h * 16:(h + 1) * 16] = torch.softmax(q @ k.T / 4, -1) @ w
        return out @ block.attn.proj.weight.T + block.attn.proj.bias

    def mlp(v):
        v = v @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        v = 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3)))
        return v @ block.mlp.fc2.weight.T + block.mlp.fc2.bias

    adaln = block.adaLN_modulation[1]
    m = (c * torch.sigmoid(c)) @ adaln.weight.T + adaln.bias
    m = m.view(2, 6, 1, 32)
    y = x + m[:, 2] * attention(norm(x) * (1 + m[:, 1]) + m[:, 0])
    y = y + m[:, 5] * mlp(norm(y) * (1 + m[:, 4]) + m[:, 3])
    close(block(x, c).detach(), y.detach(), 1e-12)


def test_activations_are_those_after_the_named_blocks():
    model, seen = random_model(), []
    x, t, y = rn(1, 2, 3, 8, 8).double(), ru(2, 2).double(), torch.tensor([0, 4])
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    out, activations = model(x, t, y, blocks=(3, 1))
    assert [a.shape for a in activations] == [(2, 16, 32)] * 2
    assert torch.equal(activations[0], seen[0]) and torch.equal(activations[1], seen[2])
    assert torch.equal(out, model(x, t, y))
    with pytest.raises(ValueError, match="from 1 to 3"):
        model(x, t, y, blocks=(0,))


def test_a_fresh_model_is_zero_and_every_block_the_identity():
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=4)
    out, (first, last) = model(rn(1, 2, 4, 8, 8), ru(2, 2), torch.tensor([0, 4]), blocks=(1, 2))
    assert (out == 0).all() and torch.equal(first, last)
    assert out.shape == (2, 8, 8, 8)


def test_bad_sizes_are_errors():
    with pytest.raises(ValueError, match="patch_size 3"):
        DiT(input_size=32, patch_size=3)
    assert DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, class_dropout_prob=0, num_classes=4
               ).y_embedder.embedding_table.weight.shape == (4, 32)


class Gaussian(torch.nn.Module):
    """The exact velocity field of data ~ Normal(mu_y, s^2): its flow and its SDE have closed forms."""
    num_classes, s = 2, 0.5

    def mean(self, y):
        return torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)[y].view(-1, 1, 1, 1)

    def forward(self, x, t, y):
        self.calls = getattr(self, "calls", 0) + len(x)
        t, mu = t.view(-1, 1, 1, 1), self.mean(y)
        variance = t ** 2 * self.s ** 2 + (1 - t) ** 2
        return mu + (t * self.s ** 2 - (1 - t)) / variance * (x - t * mu)


@pytest.mark.parametrize("method, order", [("heun", 2), ("euler", 1)])
def test_order_of_convergence(method, order):
    """The flow of a Gaussian maps noise n to mu + s*n."""
    model, noise, y = Gaussian(), rn(1, 4, 1, 2, 2).double(), torch.tensor([0, 1, 0, 1])
    exact = model.mean(y) + model.s * noise
    errors = [(FlowMatching().sample(model, noise, y, steps, method) - exact).abs().max() for steps in (20, 40, 80)]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(coarse / fine / 2 ** order - 1) < 0.1


def test_sde_samples_the_same_distribution():
    model, y = Gaussian(), torch.ones(20000, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    draws = []

    def noise_fn(k):
        draws.append(k)
        return torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.float64)

    x = FlowMatching().sample(model, noise_fn(-1), y, steps=100, method="sde", noise_fn=noise_fn)
    assert draws == list(range(-1, 99))  # no noise in the last step
    assert abs(x.mean() - 2.0) < 0.02 and abs(x.std() - 0.5) < 0.02


def test_sde_step_is_the_published_formula():
    """drift v + w*score with w = 1-t and score = (t*v - x)/(1-t), noise sqrt(2w dt), to 0.96, then a step of 0.04."""
    model, x, y = Gaussian(), rn(1, 2, 1, 2, 2).double(), torch.tensor([0, 1])
    noises = {k: rn(20 + k, 2, 1, 2, 2).double() for k in range(2)}
    result = FlowMatching().sample(model, x, y, steps=3, method="sde", noise_fn=noises.__getitem__)
    for k, (t, dt) in enumerate([(0.0, 0.48), (0.48, 0.48), (0.96, 0.04)]):
        v = model(x, torch.full((2,), t, dtype=torch.float64), y)
        x = x + dt * (v + (1 - t) * (t * v - x) / (1 - t))
        if k < 2:
            x = x + math.sqrt(2 * (1 - t) * dt) * noises[k]
    close(result, x, 1e-12)


def test_guidance_scale_interval_and_channels():
    model, noise, y = random_model(), rn(1, 2, 3, 8, 8).double(), torch.tensor([0, 1])

    def field(x, t, channels, scale):
        t = torch.full((2,), t, dtype=torch.float64)
        cond, uncond = model(x, t, y)[:, :3], model(x, t, torch.tensor([4, 4]))[:, :3]
        return torch.cat([uncond + scale * (cond - uncond), cond], 1)[:, [*range(channels), *range(3 + channels, 6)]]

    with torch.no_grad():
        for channels in (None, 2):
            x = FlowMatching().sample(model, noise, y, 2, "euler", 3.0, (0.2, 0.7), channels)
            step = noise + 0.5 * field(noise, 0.0, channels or 3, 1.0)  # t = 0 lies outside the interval
            close(x, step + 0.5 * field(step, 0.5, channels or 3, 3.0), 1e-12)
    gaussian = Gaussian()
    FlowMatching().sample(gaussian, rn(1, 2, 1, 2, 2).double(), y, 4, "euler", cfg=2.0, cfg_interval=(0.5, 0.8))
    assert gaussian.calls == 2 * (4 + 2)  # the unconditional half runs at t = 0.5 and 0.75 only
    with pytest.raises(ValueError, match="heun, euler, sde"):
        FlowMatching().sample(model, noise, y, method="rk4")


def test_flow_matching_loss_is_its_formula():
    model, x, noise, y, t = random_model(), rn(1, 2, 3, 8, 8), rn(2, 2, 3, 8, 8), torch.tensor([0, 4]), ru(3, 2)
    x, noise, t = x.double(), noise.double(), t.double()
    loss, activations = FlowMatching().loss(model, x, y, t, noise, blocks=(2,))
    w = t.view(2, 1, 1, 1)
    out = model(w * x + (1 - w) * noise, t, y)[:, :3]
    close(loss.detach(), ((out - (x - noise)) ** 2).mean((1, 2, 3)).detach(), 1e-12)
    assert len(activations) == 1
    t = FlowMatching().times(10000, torch.Generator().manual_seed(0))
    assert abs(t.mean() - 0.5) < 0.02 and t.min() >= 0 and t.max() < 1


@pytest.fixture(scope="module")
def golden_dit():
    return fill(build_model("DiT-S/4", num_classes=10)).eval()


GOLDEN_DIT = {  # by sample
    "out": [[-1.004304, -1.253021, 2.241493, -0.2466072, 0.7236568, -2.282217, 0.1864561, 1.143],
            [-0.9504329, -0.8432694, 0.725911, 0.9091185, -1.06761, -0.7397046, -0.09116036, -1.451336],
            [-1.301937, -0.1905879, 0.525243, 0.8334168, 0.1091399, -1.408858, -0.7006797, 0.9117367]],
    "mse": [[2.185664], [2.075458], [2.148793], [2.158874]],
    "vb": [[3.068321], [1.492162], [0.01708921], [0.0317829]],
    "mean": [[-0.07121047, -0.6616288, 0.08601939, 0.8464932], [0.6905113, 1.016016, 0.1653869, 1.76401],
             [0.1674054, -1.635692, 1.143011, -1.15453], [-2.345612, -0.2062639, -0.008869943, -0.6877363]],
}


@torch.no_grad()
def test_diffusion_equals_the_published_code(golden_dit):
    """Golden: DiT-S/4; a few values of each output here, all of them where the reference file is at hand."""
    y, t = torch.tensor([0, 7, 10, 3]), torch.tensor([0, 1, 500, 999])
    x, noise, diffusion = rn(22, 4, 4, 32, 32), rn(23, 4, 4, 32, 32), GaussianDiffusion()
    abar = diffusion.abar[t].view(4, 1, 1, 1)
    x_t = (abar.sqrt() * x + (1 - abar).sqrt() * noise).float()
    eps, v = golden_dit(x_t, t, y).chunk(2, 1)
    result = {"out": golden_dit(rn(21, 3, 4, 32, 32), torch.tensor([0, 500, 999]), y[:3]),
              "mse": (eps - noise).square().mean((1, 2, 3)), "mean": diffusion.posterior(eps, v, x_t, t)[0]}
    result["vb"] = diffusion.loss(golden_dit, x, y, t, noise)[0] - result["mse"]
    for name, value in result.items():
        for value, golden in zip(value, GOLDEN_DIT[name]):  # sample by sample: small ones count as much as large ones
            close(value.flatten()[::1111], golden, 2e-5)
    if GOLDEN.exists():
        golden = np.load(GOLDEN / "dit.npz")
        for name, value in result.items():
            for i in range(len(value)):
                close(value[i], golden[name][i], 2e-5)


def slow_diffusion_loss(out, x, noise, t):
    """Mean squared error + bound in bits per dimension of one sample, from the textbook formulas, in float64."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    abars = [math.prod(1 - b for b in betas[:i + 1]) for i in range(t + 1)]
    abar, beta, before = abars[t], betas[t], abars[t - 1] if t else 1.0
    x_t = math.sqrt(abar) * x + math.sqrt(1 - abar) * noise
    eps, v = out.detach()[:3], out[3:]

    def mean(start):
        return (math.sqrt(before) * beta * start + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - abar)

    variance = beta * (1 - before) / (1 - abar) if t else None
    small = math.log(variance) if t else math.log(betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1])))
    log_var = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * small
    guess = mean((x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar))
    if t:
        p, q = (torch.distributions.Normal(m, s) for m, s in ((guess, (log_var / 2).exp()), (mean(x), variance ** 0.5)))
        bound = torch.distributions.kl_divergence(q, p)
    else:
        def cdf(z):
            return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) / 2
        std = (log_var / 2).exp()
        upper, lower = cdf((x + 1 / 255 - guess) / std), cdf((x - 1 / 255 - guess) / std)
        upper, lower = torch.where(x > 0.999, 1.0, upper), torch.where(x < -0.999, 0.0, lower)
        bound = -(upper - lower).clamp(min=1e-12).log()
    return ((out[:3] - noise) ** 2).mean() + bound.mean() / math.log(2), guess


def test_diffusion_loss_and_its_gradient_are_the_textbook_formulas():
    x, noise, y = rn(1, 5, 3, 8, 8).double().clamp(-1, 1), rn(2, 5, 3, 8, 8).double(), torch.zeros(5, dtype=torch.long)
    t = torch.tensor([0, 1, 2, 500, 999])
    out = torch.cat([0.9 * noise + 0.1 * rn(3, 5, 3, 8, 8), 0.5 * rn(4, 5, 3, 8, 8)], 1).requires_grad_()
    loss, _ = GaussianDiffusion().loss(lambda x_t, t, y: out, x, y, t, noise)
    slow = torch.stack([slow_diffusion_loss(out[i], x[i], noise[i], int(t[i]))[0] for i in range(5)])
    for value, reference in zip(loss, slow):
        close(value.detach(), reference.detach(), 1e-9)
    gradient, reference = (torch.autograd.grad(v.sum(), out)[0] for v in (loss, slow))
    for half in (slice(3), slice(3, 6)):  # the noise learns from the squared error alone, the variance from the bound
        close(gradient[:, half], reference[:, half], 1e-8)


def test_diffusion_times_and_spacing():
    diffusion = GaussianDiffusion()
    t = diffusion.times(50000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 5
    assert diffusion.spaced(10, "ddpm") == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert diffusion.spaced(21, "ddpm")[:6] == [0, 50, 100, 150, 200, 250]
    for n in (2, 21, 250, 999, 1000):
        position, steps = 0.0, []
        for _ in range(n):
            steps.append(round(position))
            position += 999 / (n - 1)
        assert diffusion.spaced(n, "ddpm") == steps and len(set(steps)) == n and (steps[0], steps[-1]) == (0, 999)
    assert diffusion.spaced(250, "ddim") == list(range(0, 1000, 4)) == diffusion.spaced(250, "heun")
    assert diffusion.spaced(7, "ddim") == list(range(0, 1000, 143))  # 143 to 166 all give 7
    assert diffusion.spaced(1000, "ddim") == diffusion.spaced(1000, "ddpm") == list(range(1000))
    with pytest.raises(ValueError, match="ddim: take 63 or 67"):
        diffusion.spaced(65, "ddim")
    for n in (0, 1, 1001):
        with pytest.raises(ValueError, match="2 to 1000"):
            diffusion.spaced(n, "ddpm")
        with pytest.raises(ValueError, match="no stride"):
            diffusion.spaced(n, "heun")


class GaussianNoise(torch.nn.Module):
    """The exact noise prediction at integer steps for data ~ Normal(mu_y, s^2), and v = 0.3 for the variance."""
    num_classes, s, v = 2, 0.5, 0.3
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def mean(self, y):
        return torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)[y].view(-1, 1, 1, 1)

    def forward(self, x, t, y):
        self.calls = getattr(self, "calls", 0) + len(x)
        assert (t == t.round()).all()
        abar, mu = self.abar[t.long()].view(-1, 1, 1, 1), self.mean(y)
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mu) / (abar * self.s ** 2 + 1 - abar)
        return torch.cat([eps, torch.full_like(x, self.v)], 1)


def flow_of_a_gaussian(model, noise, y, last_euler):
    """Where the probability-flow ODE takes noise at step 999: (x - mu) / sqrt(s^2 + sigma^2) is constant."""
    sigma = (1 / model.abar - 1).sqrt()
    start = noise * (1 + sigma[-1] ** 2).sqrt() - model.mean(y)
    if not last_euler:
        return model.mean(y) + start * model.s / (model.s ** 2 + sigma[-1] ** 2).sqrt()
    end = start * ((model.s ** 2 + sigma[0] ** 2) / (model.s ** 2 + sigma[-1] ** 2)).sqrt()
    return model.mean(y) + end * (1 - sigma[0] ** 2 / (model.s ** 2 + sigma[0] ** 2))


@pytest.mark.parametrize("method, order", [("ddim", 1), ("heun", 2)])
def test_deterministic_diffusion_samplers_converge_to_the_flow(method, order):
    """Steps 0, i, 2i, ... up to 999 for i = 27, 9, 3, so that all start at the same noise level."""
    model, noise, y = GaussianNoise(), rn(1, 4, 1, 2, 2).double(), torch.tensor([0, 1, 0, 1])
    exact = flow_of_a_gaussian(model, noise, y, last_euler=True)
    errors = []
    for steps in (38, 112, 334):
        assert GaussianDiffusion().spaced(steps, method)[-1] == 999
        errors.append((GaussianDiffusion().sample(model, noise, y, steps, method) - exact).abs().max())
    assert errors[-1] < (0.05 if order == 1 else 2e-3)
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log(coarse / fine, 3) - order) < 0.35, errors
    close(exact, flow_of_a_gaussian(model, noise, y, last_euler=False), 1e-3)


def test_ddim_steps_are_the_published_formula():
    model, x, y, abar = GaussianNoise(), rn(1, 3, 1, 2, 2).double(), torch.tensor([0, 1, 2]), GaussianNoise.abar
    result = GaussianDiffusion().sample(model, x, y, 5, "ddim")
    for now, then in zip([800, 600, 400, 200, 0], [600, 400, 200, 0, None]):
        a, b = abar[now], abar[then] if then is not None else 1
        eps = model(x, torch.full((3,), float(now)), y)[:, :1]
        x = b ** 0.5 * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b) ** 0.5 * eps
    close(result, x, 1e-10)


def test_heun_steps_are_the_trapezoidal_rule_in_sigma():
    model, noise, y, abar = GaussianNoise(), rn(1, 3, 1, 2, 2).double(), torch.tensor([0, 1, 2]), GaussianNoise.abar
    sigma = (1 / abar - 1).sqrt()

    def slope(z, step):
        return model(z * abar[step].sqrt(), torch.full((3,), float(step)), y)[:, :1]

    z = noise / abar[800].sqrt()
    for now, then in ((800, 600), (600, 400), (400, 200), (200, 0)):
        d = slope(z, now)
        z = z + (sigma[then] - sigma[now]) * (d + slope(z + (sigma[then] - sigma[now]) * d, then)) / 2
    close(GaussianDiffusion().sample(model, noise, y, 5, "heun"), z - sigma[0] * slope(z, 0), 1e-10)


def test_ddpm_steps_are_the_published_formula():
    """The posterior of the respaced betas, with its log-variance 65% of the way to log beta; no noise at the end."""
    model, x, y, noises = GaussianNoise(), rn(1, 3, 1, 2, 2).double(), torch.tensor([0, 1, 2]), []

    def noise_fn(k):
        assert k == len(noises)
        noises.append(rn(20 + k, 3, 1, 2, 2).double())
        return noises[-1]

    result = GaussianDiffusion().sample(model, x, y, 4, "ddpm", noise_fn=noise_fn)
    steps = [0, 333, 666, 999]
    abar = [1.0] + [float(model.abar[s]) for s in steps]
    for k in (4, 3, 2, 1):
        beta = 1 - abar[k] / abar[k - 1]
        variance = beta * (1 - abar[k - 1]) / (1 - abar[k])
        eps = model(x, torch.full((3,), float(steps[k - 1])), y)[:, :1]
        start = (x - math.sqrt(1 - abar[k]) * eps) / math.sqrt(abar[k])
        x = (math.sqrt(abar[k - 1]) * beta * start + math.sqrt(1 - beta) * (1 - abar[k - 1]) * x) / (1 - abar[k])
        if k > 1:
            x = x + math.exp(0.5 * (0.65 * math.log(beta) + 0.35 * math.log(variance))) * noises[4 - k]
    assert len(noises) == 3
    close(result, x, 1e-10)


def test_ddpm_samples_the_distribution():
    model, y = GaussianNoise(), torch.ones(20000, dtype=torch.long)
    torch.manual_seed(0)
    x = GaussianDiffusion().sample(model, torch.randn(20000, 1, 1, 1, dtype=torch.float64), y, steps=250)
    assert abs(x.mean() - 2.0) < 0.02 and abs(x.std() - 0.5) < 0.02


@torch.no_grad()
def test_diffusion_guidance_is_of_the_noise_alone():
    """One DDPM step from 999 to 0 and one DDIM step by hand: the variance stays conditional, channels may too."""
    model, noise, y = random_model(), rn(1, 2, 3, 8, 8).double(), torch.tensor([0, 1])
    step_noise, diffusion = rn(2, 2, 3, 8, 8).double(), GaussianDiffusion()

    def out(x, step, channels, scale):
        t = torch.full((2,), float(step), dtype=torch.float64)
        cond, uncond = model(x, t, y), model(x, t, torch.tensor([4, 4]))
        return torch.cat([(uncond + scale * (cond - uncond))[:, :channels], cond[:, channels:]], 1).chunk(2, 1)

    for channels in (None, 2):
        x, log_variance = diffusion.posterior(*out(noise, 999, channels or 3, 3.0), noise, [1], [0, 999])
        x = x + (log_variance / 2).exp() * step_noise
        expected, _ = diffusion.posterior(*out(x, 0, channels or 3, 1.0), x, [0], [0, 999])
        # step 999 lies at SiT's time 0.006, step 0 at 0.99
        result = diffusion.sample(model, noise, y, 2, "ddpm", 3.0, (0, 0.5), channels, lambda k: step_noise)
        close(result, expected, 1e-12)
    model = GaussianNoise()
    sigma = (1 / model.abar - 1).sqrt()
    inside = sum(0.3 <= 1 / (1 + sigma[step]) <= 0.8 for step in range(0, 1000, 100))
    diffusion.sample(model, rn(1, 2, 1, 2, 2).double(), y, 10, "ddim", cfg=2.0, cfg_interval=(0.3, 0.8))
    assert 0 < inside < 10 and model.calls == 2 * (10 + inside)
    with pytest.raises(ValueError, match="ddpm, ddim, heun"):
        diffusion.sample(model, noise, y, method="euler")


def test_a_sit_with_a_second_time_computes_what_it_did():
    sit, x, t, y = random_model(), rn(1, 2, 3, 8, 8).double(), ru(2, 2).double(), torch.tensor([0, 4])
    sizes = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=4)
    both = DiT(**sizes, second_time=True).double()
    missing, unexpected = both.load_state_dict(sit.state_dict(), strict=False)
    names = {f"r_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(missing) == names and not unexpected
    for r in (None, t, t + 0.5):
        assert torch.equal(both(x, t, y, r), sit(x, t, y))
    out, activations = both(x, t, y, t, blocks=(2,))
    assert torch.equal(activations[0], sit(x, t, y, blocks=(2,))[1][0])
    both(x, t, y, t + 0.5).sum().backward()
    assert both.r_embedder.mlp[2].weight.grad.abs().min() > 0  # zero, but not stuck there
    fill(both)
    assert torch.equal(both(x, t, y), both(x, t, y, t))  # r = t where no r is given
    assert (both(x, t, y, t) - both(x, t, y, t + 0.5)).abs().max() > 0.01
    with pytest.raises(ValueError, match="second_time=True"):
        sit(x, t, y, t)


def test_second_time_is_embedded_as_its_difference():
    model, x, y = random_model(second_time=True), rn(1, 2, 3, 8, 8).double(), torch.tensor([0, 4])
    t, r = torch.tensor([0.1, 0.4]).double(), torch.tensor([0.6, 0.4]).double()
    swapped = random_model(second_time=True)
    swapped.t_embedder, swapped.r_embedder = model.r_embedder, model.t_embedder
    close(model(x, t, y, r).detach(), swapped(x, r - t, y, r).detach(), 1e-12)  # r - (r - t) = t


def test_mean_flow_times():
    """r = t in 75% of the batch, by position; a and b are sigmoids of Normal(-0.4, 1), in the paper's time."""
    t, r = MeanFlow().times(40000, torch.Generator().manual_seed(0))
    moves = torch.arange(40000) % 4 == 0
    assert torch.equal(r > t, moves) and torch.equal(r == t, ~moves)
    logit = torch.special.logit(1 - t)
    a, b = torch.randn(2, 200000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.4
    assert abs(logit.mean() - torch.maximum(a, b).mean()) < 0.02
    assert abs(torch.special.logit(1 - r[moves]).mean() - torch.minimum(a, b).mean()) < 0.04
    pair = torch.cat([logit[moves], torch.special.logit(1 - r[moves])])
    assert abs(pair.mean() + 0.4) < 0.03 and abs(pair.std() - 1) < 0.03
    t, r = MeanFlow(every=1).times(100, torch.Generator().manual_seed(0))
    assert (r > t).all() and t.min() >= 0 and r.max() <= 1


class MeanGaussian(Gaussian):
    """The exact average velocity of data ~ Normal(mu_y, s^2): its flow maps x - t*mu in proportion to its std."""

    def forward(self, x, t, y, r=None):
        t, r, mu = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1), self.mean(y)
        var_t, var_r = (w ** 2 * self.s ** 2 + (1 - w) ** 2 for w in (t, r))
        # (sqrt(var_r) - sqrt(var_t)) / (r - t), without 0/0 at r = t
        slope = ((r + t) * self.s ** 2 - (2 - r - t)) / (var_t.sqrt() + var_r.sqrt())
        return mu + slope / var_t.sqrt() * (x - t * mu)


def on_the_path(model, x_t, t, y):
    """Data and noise whose line goes through x_t with the marginal velocity."""
    w = t.view(-1, 1, 1, 1)
    v = Gaussian.forward(model, x_t, t, y)
    return x_t + (1 - w) * v, x_t - w * v


def test_average_velocity_of_a_gaussian_in_closed_form():
    """It satisfies the identity to rounding; it samples exactly in one step, and in several; a wrong one does not."""
    model, x_t, y = MeanGaussian(), rn(1, 8, 1, 4, 4).double(), torch.tensor([0, 1] * 4)
    t, r = MeanFlow(every=1).times(8, torch.Generator().manual_seed(0))
    t, r = t.double(), r.double()
    x, noise = on_the_path(model, x_t, t, y)
    objective = MeanFlow(every=1)
    loss, activations = objective.loss(model, x, y, t, noise, r)
    assert activations == [] and objective.squared_error.max() < 1e-24 and loss.max() < 1e-20
    exact = model.mean(y) + model.s * noise
    for steps in (1, 2, 5):
        close(objective.sample(model, noise, y, steps), exact, 1e-12)

    def wrong(x, t, y, r):  # constant in x, but not in t: u = (r - t) * 0 + t
        return torch.ones_like(x) * t.view(-1, 1, 1, 1)

    wrong.forward = wrong
    loss, _ = objective.loss(wrong, x, y, t, noise, r)
    v = (x - noise)
    w, gap = t.view(-1, 1, 1, 1), (r - t).view(-1, 1, 1, 1)
    error = ((w - (v + gap)) ** 2).flatten(1)  # du/dt = 1
    close(objective.squared_error, error.mean(1), 1e-12)
    close(loss, error.sum(1) / (error.sum(1) + 0.01), 1e-12)


def test_average_velocity_of_a_point():
    """All paths end at c, straight: u = (c - x_t) / (1 - t) for any r, on any pair of data and noise."""
    c = rn(1, 1, 3, 4, 4)

    def point(x, t, y, r):
        return (c - x) / (1 - t.view(-1, 1, 1, 1))

    point.forward = point
    objective, noise, y = MeanFlow(), rn(2, 6, 3, 4, 4), torch.zeros(6, dtype=torch.long)
    torch.manual_seed(0)
    objective.loss(point, c.expand(6, -1, -1, -1), y)  # draws t, r and noise itself
    assert objective.squared_error.max() < 1e-10
    for steps in (1, 3):
        close(objective.sample(point, noise, y, steps), c.expand(6, -1, -1, -1), 1e-6)


def test_mean_flow_with_r_equal_to_t_is_flow_matching():
    model, x, noise, y = random_model(second_time=True), rn(1, 4, 3, 8, 8), rn(2, 4, 3, 8, 8), torch.arange(4)
    x, noise, t = x.double(), noise.double(), ru(3, 4).double()
    flow, (z,) = FlowMatching().loss(model, x, y, t, noise, blocks=(2,))
    for objective in (MeanFlow(), MeanFlow(every=1)):
        for r in (None, t):
            loss, (activation,) = objective.loss(model, x, y, t, noise, r, blocks=(2,))
            close(objective.squared_error, flow.detach(), 1e-12)
            close(loss.detach(), (192 * flow / (192 * flow + 0.01)).detach(), 1e-12)
            assert torch.equal(activation, z)
    gradient, reference = (torch.autograd.grad(v.sum(), model.final_layer.linear.weight)[0]
                           for v in (loss, 192 * flow / (192 * flow.detach() + 0.01)))
    close(gradient, reference, 1e-12)  # the weight is a constant, and the target too


def test_mean_flow_target_is_the_directional_derivative():
    """Against central differences along (x_t, t) -> (x_t + h*v, t + h), r fixed; only samples that move have one."""
    model, x, noise, y = random_model(second_time=True), rn(1, 8, 3, 8, 8), rn(2, 8, 3, 8, 8), torch.arange(8) % 5
    x, noise, v = x.double(), noise.double(), (x - noise).double()
    t, r = (w.double() for w in MeanFlow().times(8, torch.Generator().manual_seed(0)))
    w, h = t.view(-1, 1, 1, 1), 1e-5
    x_t = w * x + (1 - w) * noise
    with torch.no_grad():
        up, down = (model(x_t + s * v, t + s, y, r)[:, :3] for s in (h, -h))
        target = v + (r - t).view(-1, 1, 1, 1) * (up - down) / (2 * h)
    reference = ((model(x_t, t, y, r)[:, :3] - target) ** 2).mean((1, 2, 3))
    objective = MeanFlow()
    loss, _ = objective.loss(model, x, y, t, noise, r)
    close(objective.squared_error, reference.detach(), 1e-7)
    assert not objective.squared_error.requires_grad
    gradient, slow_gradient = (torch.autograd.grad(value.sum(), model.blocks[0].mlp.fc1.weight)[0]
                               for value in (loss, reference / (reference.detach() + 0.01 / 192)))
    close(gradient, slow_gradient, 1e-7)  # none flows through the target
    reference = reference.detach()
    assert ((reference - FlowMatching().loss(lambda *a: model(*a, r), x, y, t, noise)[0])[::4].abs() > 1e-3).all()
    # any slice of a batch holds at most a quarter of such samples, rounded up, wherever they stand in it
    for part in (slice(3), slice(1, 4), slice(2, 8), slice(7, 8)):
        objective.loss(model, x[part], y[part], t[part], noise[part], r[part])
        close(objective.squared_error, reference[part], 1e-7)
    objective.loss(model, x[::4], y[::4], t[::4], noise[::4], r[::4])  # but not these two
    assert objective.squared_error.isnan().sum() == 1


def test_mean_flow_guidance():
    """The guided velocity takes v's place in target and tangent, inside the interval and for labelled samples."""
    model, y = random_model(second_time=True), torch.tensor([0, 1, 4, 2])  # 4: no label
    x, noise = rn(1, 4, 3, 8, 8).double(), rn(2, 4, 3, 8, 8).double()
    t, r = torch.tensor([[0.2, 0.5, 0.5, 0.9], [0.6, 0.5, 0.8, 1.0]], dtype=torch.float64)
    w = t.view(-1, 1, 1, 1)
    x_t, v = w * x + (1 - w) * noise, x - noise
    with torch.no_grad():
        cond, uncond = model(x_t, t, y, t)[:, :3], model(x_t, t, torch.full((4,), 4), t)[:, :3]
        v = torch.where(torch.tensor([True, True, False, False]).view(-1, 1, 1, 1),  # the last is outside the interval
                        1.5 * v + 0.4 * cond - 0.9 * uncond, v)
        up, down = (model(x_t + s * v, t + s, y, r)[:, :3] for s in (1e-5, -1e-5))
        target = v + (r - t).view(-1, 1, 1, 1) * (up - down) / 2e-5
        reference = ((model(x_t, t, y, r)[:, :3] - target) ** 2).mean((1, 2, 3))
    objective = MeanFlow(every=1, omega=1.5, kappa=0.4, interval=(0.2, 0.8))
    objective.loss(model, x, y, t, noise, r)
    close(objective.squared_error, reference, 1e-7)
    with pytest.raises(ValueError, match="guided in training"):
        objective.sample(model, noise, y, cfg=2.0)
    with pytest.raises(ValueError, match="average"):
        objective.sample(model, noise, y, method="heun")


@torch.no_grad()
def test_mean_flow_sampling_steps():
    model, noise, y = random_model(second_time=True), rn(1, 2, 3, 8, 8).double(), torch.tensor([0, 4])
    zero, half, one = (torch.full((2,), w).double() for w in (0.0, 0.5, 1.0))
    close(MeanFlow().sample(model, noise, y), noise + model(noise, zero, y, one)[:, :3], 1e-12)
    x = noise + 0.5 * model(noise, zero, y, half)[:, :3]
    close(MeanFlow().sample(model, noise, y, 2), x + 0.5 * model(x, half, y, one)[:, :3], 1e-12)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Wrapped(torch.nn.Module):
    """Like DistributedDataParallel: holds the network as `module`, and forward-mode AD fails in it."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **options):
        self.calls += 1
        return self.module(NoForwardMode.apply(args[0].requires_grad_()), *args[1:], **options)


def test_mean_flow_through_a_wrapped_model():
    """The derivative goes round the wrapper, and what is trained through it, in a single call."""
    model, x, y = random_model(second_time=True).float(), rn(1, 4, 3, 8, 8), torch.arange(4)
    noise, (t, r) = rn(2, 4, 3, 8, 8), MeanFlow().times(4, torch.Generator().manual_seed(0))
    wrapped = Wrapped(model)
    for options in ({}, dict(omega=1.5)):
        wrapped.calls = 0
        loss, (z,) = MeanFlow(**options).loss(wrapped, x, y, t, noise, r, blocks=(1,))
        assert torch.equal(loss, MeanFlow(**options).loss(model, x, y, t, noise, r)[0]) and wrapped.calls == 1


@pytest.mark.parametrize("guidance", [{}, dict(omega=1.5, kappa=0.5)])
def test_mean_flow_under_bf16_autocast(guidance):
    """Close to float32, and every weight gets its gradient although the target casts the same weights under no_grad."""
    model, x, y = random_model(second_time=True).float(), rn(1, 8, 3, 8, 8), torch.arange(8) % 5
    noise, (t, r) = rn(2, 8, 3, 8, 8), MeanFlow().times(8, torch.Generator().manual_seed(0))
    results = []
    for enabled in (False, True):
        objective = MeanFlow(**guidance)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, (z,) = objective.loss(model, x, y, t, noise, r, blocks=(2,))
        (loss.mean() + 0.5 * dispersive_loss(z)).backward()
        assert loss.dtype == objective.squared_error.dtype == torch.float32
        results.append((objective.squared_error, {name: p.grad for name, p in model.named_parameters()
                                                  if name != "pos_embed"}))
    (error, gradients), (rounded, rounded_gradients) = results
    close(rounded, error, 0.03)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(gradient is not None for gradient in rounded_gradients.values())
    close(*(torch.cat([g[name].flatten() for name in gradients]) for g in (rounded_gradients, gradients)), 0.05)


def test_diffusion_under_bf16_autocast():
    model, x, y = random_model().float(), rn(1, 4, 3, 8, 8), torch.arange(4)
    noise, t = rn(2, 4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    diffusion = GaussianDiffusion()
    exact, _ = diffusion.loss(model, x, y, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        loss, (z,) = diffusion.loss(model, x, y, t, noise, blocks=(2,))
        sample = diffusion.sample(model, noise, y, 2, "ddpm")
    assert loss.dtype == sample.dtype == torch.float32 and z.shape == (4, 16, 32)
    close(loss.detach(), exact.detach(), 0.03)


@pytest.mark.parametrize("objective", [FlowMatching(), GaussianDiffusion(), MeanFlow()])
def test_what_is_not_given_is_drawn(objective):
    model, x, y = random_model(second_time=True).float(), rn(1, 4, 3, 8, 8), torch.arange(4)
    for noise in (None, rn(2, 4, 3, 8, 8)):  # given the noise, it is the times that differ
        losses = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(objective.loss(model, x, y, noise=noise)[0].detach())
        assert losses[0].shape == (4,) and torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_repa_loss_is_the_loop_over_tokens():
    h, target = rn(1, 3, 5, 7), rn(2, 3, 5, 7)
    cosines = [h[b, t] @ target[b, t] / (h[b, t].norm() * target[b, t].norm()) for b in range(3) for t in range(5)]
    close(repa_loss(h, target), -sum(cosines) / 15, 1e-6)
    close(repa_loss(3 * h, h), -1.0, 1e-6)
    close(repa_loss(h.bfloat16(), target.half()), repa_loss(h.bfloat16().float(), target.half().float()), 1e-7)
    assert repa_loss(h.double(), target).dtype == torch.float64
    assert torch.autograd.gradcheck(repa_loss, (h.double().requires_grad_(), target.double()))
    with pytest.raises(ValueError, match="differ in shape"):
        repa_loss(h, target[:, :1])


def test_repa_projector():
    projector = repa_projector(6, 4)
    shapes = [tuple(p.shape) for p in projector.parameters()]
    assert shapes == [(2048, 6), (2048,), (2048, 2048), (2048,), (4, 2048), (4,)]
    x = rn(1, 2, 3, 6)
    h = x
    for i in (0, 2, 4):
        h = h @ projector[i].weight.T + projector[i].bias
        h = h * torch.sigmoid(h) if i < 4 else h
    close(projector(x).detach(), h.detach(), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# train.py and sample.py

TINY = ["--model", "SiT-XS/8", "--batch", "32", "--lr", "1e-3", "--ema", "0.9", "--log-every", "1", "--dtype", "fp32",
        "--ckpt-every", "1000", "--sample-every", "1000"]


def run(script, *args, ranks=1):
    """Run a command line in a process of its own, under torchrun when there are several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*launcher, str(HERE / script), *map(str, args)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def fails(main, capsys, *args):
    """The one line that a bad command line prints; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [(entry["loss"], entry["disp"]) for entry in log_of(out) if "loss" in entry]


def weights(out, which="model"):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)[which]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of class folders with a few small images of several formats, and its cache."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        folder = root / "images" / "cat dog".split()[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        array = rng.integers(0, 256, (18 + i % 5, 20, 3), dtype=np.uint8)
        Image.fromarray(array).convert("L" if i == 5 else "RGB").save(folder / f"{i:02d}.{'png' if i % 3 else 'jpg'}")
    (root / "images" / "cat" / "notes.txt").write_text("no image")
    train.main(["--images", str(root / "images"), "--data", str(root / "cache"), "--vae", "none", "--size", "16",
                "--cache-only"])
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Six steps on those images, by one process."""
    out = tmp_path_factory.mktemp("runs") / "one"
    train.main(["--data", str(photos / "cache"), "--steps", "6", *TINY, "--out", str(out)])
    return out


def test_cache_holds_the_cropped_images_in_sorted_order(photos):
    latents = np.load(photos / "cache" / "latents.npy")
    labels = np.load(photos / "cache" / "labels.npy")
    files = sorted((photos / "images").glob("*/*.[jp]*"))
    assert json.loads((photos / "cache" / "meta.json").read_text())["classes"] == ["cat", "dog"]
    assert labels.tolist() == [0] * 24 + [1] * 24
    assert sorted(p.name for p in (photos / "cache").iterdir()) == ["labels.npy", "latents.npy", "meta.json"]
    for i in (0, 7, 30):
        image = train.center_crop(Image.open(files[i]).convert("RGB"), 16)
        assert np.array_equal(latents[i], np.asarray(image).transpose(2, 0, 1))


def test_center_crop_halves_by_box_then_bicubic_then_crops():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 91, 3), dtype=np.uint8))
    half = image.resize((45, 25), Image.BOX)
    small = half.resize((round(45 * 16 / 25), 16), Image.BICUBIC)
    left = (small.width - 16) // 2
    assert np.array_equal(train.center_crop(image, 16), np.asarray(small)[:, left:left + 16])


def test_unreadable_images_stop_the_run_or_are_left_out(photos, tmp_path, capsys):
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(folder / name / f"{i}.png")
    whole = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "1.png").write_bytes(whole[:len(whole) // 2])
    (folder / "b" / "2.png").write_text("not an image")
    command = ["--images", folder, "--data", tmp_path / "cache", "--vae", "none", "--size", "16", "--cache-only"]
    with pytest.raises(SystemExit) as stop:
        train.main([str(arg) for arg in command])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "a/1.png" in err and "b/2.png" in err and "--skip-bad" in err
    assert not (tmp_path / "cache" / "latents.npy").exists()
    train.main([str(arg) for arg in [*command, "--skip-bad"]])
    data = train.Data.open(tmp_path / "cache")
    assert len(data) == 4 and data.labels.tolist() == [0, -1, 0, 1, 1, -1]
    images, labels = data.read(np.arange(4), np.zeros(4, bool))
    assert images[:, 0, 0, 0].tolist() == [0, 80, 0, 40] and labels.tolist() == [0, 0, 1, 1]


def test_interrupted_caching_continues(photos, tmp_path, monkeypatch):
    command = ["--images", str(photos / "images"), "--data", str(tmp_path), "--vae", "none", "--size", "16",
               "--cache-only"]
    write, batches = train.Rows.write, []

    def stops_early(self, indices, rows):
        write(self, indices[:10], rows[:10])
        raise KeyboardInterrupt
    monkeypatch.setattr(train.Rows, "write", stops_early)
    with pytest.raises(SystemExit) as stop:
        train.main(command)
    assert stop.value.code == 130 and not (tmp_path / "latents.npy").exists()
    monkeypatch.setattr(train.Rows, "write", lambda self, i, rows: (batches.append(len(i)), write(self, i, rows)))
    train.main(command)
    assert sum(batches) == 38
    for name in ("latents.npy", "labels.npy", "meta.json"):
        assert (tmp_path / name).read_bytes() == (photos / "cache" / name).read_bytes()


def test_caching_on_two_ranks_gives_the_same_bytes(photos, tmp_path):
    done = run("train.py", "--images", photos / "images", "--data", tmp_path, "--vae", "none", "--size", 16,
               "--cache-only", ranks=2)
    assert done.returncode == 0, done.stderr
    for name in ("latents.npy", "labels.npy", "meta.json"):
        assert (tmp_path / name).read_bytes() == (photos / "cache" / name).read_bytes()


def test_a_cache_of_other_images_or_size_is_refused(photos, capsys):
    line = fails(train.main, capsys, "--images", photos / "images", "--data", photos / "cache", "--size", 8)
    assert "was begun with --size 16, not 8" in line


def test_every_epoch_reads_every_entry_once():
    n, batch = 10, 4
    entries = np.concatenate([train.batch_entries(3, step, batch, n) for step in range(10)])
    assert [sorted(part) for part in entries.reshape(4, 10)] == [list(range(10))] * 4
    assert entries[:10].tolist() != entries[10:20].tolist()
    assert sorted(train.batch_entries(3, 0, 30, n)) == sorted([*range(10)] * 3)


def test_data_reads_mirrors(photos):
    data = train.Data.open(photos / "cache")
    images, _ = data.read(np.array([3, 4]), np.array([True, False]))
    assert np.array_equal(images[0].numpy(), data.latents[3][..., ::-1]) and np.array_equal(images[1], data.latents[4])
    close(data.prepare(images, None).amax(), images.amax() / 127.5 - 1, 1e-6)


def test_latent_data_draws_from_the_posterior(tmp_path):
    moments = np.random.default_rng(0).normal(size=(6, 2, 8, 4, 4)).astype(np.float16)
    np.save(tmp_path / "latents.npy", moments)
    np.save(tmp_path / "labels.npy", np.arange(6) % 2)
    (tmp_path / "meta.json").write_text(json.dumps(dict(classes=["a", "b"], vae="ema")))
    data = train.Data.open(tmp_path)
    assert data.shape == (4, 4, 4)
    x, labels = data.read(np.array([5, 2]), np.array([False, True]))
    noise = rn(1, 2, 4, 4, 4)
    expected = np.stack([moments[5, 0], moments[2, 1]]).astype(np.float32)
    close(data.prepare(x, noise), torch.from_numpy(expected[:, :4]) + torch.from_numpy(expected[:, 4:]) * noise, 1e-6)
    assert labels.tolist() == [1, 0]


def test_two_ranks_and_accumulation_equal_one_process(photos, trained, tmp_path):
    base = ["--data", photos / "cache", "--steps", 6, *TINY]
    two = run("train.py", *base, "--out", tmp_path / "two", ranks=2)
    assert two.returncode == 0, two.stderr
    train.main([*map(str, base), "--micro", "16", "--out", str(tmp_path / "micro")])
    for other in ("two", "micro"):
        close(losses(tmp_path / other), losses(trained), 1e-5)
        for name, value in weights(tmp_path / other).items():
            assert (value - weights(trained)[name]).abs().max() <= 1e-4


def test_two_ranks_that_accumulate_latents_equal_one_process(tmp_path):
    """Posterior draws and flips, too, are slices of the global batch's."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "latents.npy", rng.normal(size=(40, 2, 8, 4, 4)).astype(np.float16))
    np.save(tmp_path / "labels.npy", np.arange(40) % 2)
    (tmp_path / "meta.json").write_text(json.dumps(dict(classes=["a", "b"], vae="vae.pt")))
    torch.save(sample.VAE().state_dict(), tmp_path / "vae.pt")
    base = ["--data", tmp_path, "--steps", 3, *TINY, "--model", "SiT-XS/4", "--disp-group", 4,
            "--vae", tmp_path / "vae.pt"]
    train.main([*map(str, base), "--out", str(tmp_path / "one")])
    two = run("train.py", *base, "--micro", 4, "--out", tmp_path / "two", ranks=2)
    assert two.returncode == 0, two.stderr
    close(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-5)
    for which in ("model", "ema"):
        for name, value in weights(tmp_path / "two", which).items():
            assert (value - weights(tmp_path / "one", which)[name]).abs().max() <= 1e-4


def test_resuming_equals_not_stopping(photos, trained, tmp_path):
    base = ["--data", str(photos / "cache"), *TINY, "--out", str(tmp_path / "run")]
    train.main([*base, "--steps", "2"])
    train.main([*base, "--steps", "6"])
    assert losses(tmp_path / "run") == losses(trained)
    for which in ("model", "ema"):
        for name, value in weights(tmp_path / "run", which).items():
            assert torch.equal(value, weights(trained, which)[name])


def test_training_step_is_the_recipe(photos, trained, tmp_path):
    """The first step, written out: data order, streams, loss, AdamW, and an EMA whose first decay is 1/10."""
    data = train.Data.open(photos / "cache")
    torch.manual_seed(0)
    net = build_model("SiT-XS/8", input_size=16, in_channels=3, num_classes=2)
    start_weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    flips = np.random.default_rng([0, 0, zlib.crc32(b"flip")]).random(32) < 0.5
    images, labels = data.read(train.batch_entries(0, 0, 32, len(data)), flips)
    x = images.float() / 127.5 - 1

    def generator(purpose):
        return train.stream(0, 0, purpose, torch.device("cpu"))
    y = torch.where(torch.rand(32, generator=generator("label")) < 0.1, 2, labels)
    t, noise = torch.rand(32, generator=generator("time")), torch.randn(x.shape, generator=generator("noise"))
    x_t = t.view(-1, 1, 1, 1) * x + (1 - t.view(-1, 1, 1, 1)) * noise
    out, (z,) = net(x_t, t, y, blocks=(2,))
    regression = ((out[:, :3] - (x - noise)) ** 2).mean()
    dispersion = (slow_dispersive(z[:16], "infonce") + slow_dispersive(z[16:], "infonce")) / 2
    (regression + 0.5 * dispersion).backward()
    torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0).step()
    train.main(["--data", str(photos / "cache"), "--steps", "1", *TINY, "--out", str(tmp_path)])
    close(losses(tmp_path)[0], (regression.item(), dispersion.item()), 1e-5)
    assert losses(tmp_path)[0] == losses(trained)[0]
    for name, p in net.named_parameters():
        assert (weights(tmp_path)[name] - p.detach()).abs().max() < 1e-4  # of steps of 1e-3
        assert (weights(tmp_path, "ema")[name] - (0.1 * start_weights[name] + 0.9 * p.detach())).abs().max() < 1e-4


def test_without_dispersion_nothing_is_captured(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "dispersive_loss", None)
    captured = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, *args, blocks=(): (captured.append(len(blocks)),
                                                                        forward(self, *args, blocks=blocks))[1])
    train.main(["--data", str(photos / "cache"), "--steps", "2", *TINY, "--disp", "none", "--out", str(tmp_path)])
    assert captured[:2] == [0, 0]
    assert "disp" not in log_of(tmp_path)[0]


def test_gradient_clipping(photos, trained, tmp_path):
    """A gradient of norm 1e-9 lies below Adam's epsilon of 1e-8, so that the first step is short."""
    train.main(["--data", str(photos / "cache"), "--steps", "1", *TINY, "--grad-clip", "1e-9", "--out", str(tmp_path)])
    torch.manual_seed(0)
    net = build_model("SiT-XS/8", input_size=16, in_channels=3, num_classes=2)
    for name, value in weights(tmp_path).items():
        assert (value - net.state_dict()[name]).abs().max() < 0.2e-3
    assert losses(tmp_path)[0] == losses(trained)[0]


def test_kinds_and_all_blocks(photos, tmp_path):
    base = ["--data", str(photos / "cache"), "--steps", "1", *TINY, "--disp", "hinge"]
    train.main([*base, "--disp-blocks", "all", "--out", str(tmp_path / "all")])
    for block in range(1, 9):
        train.main([*base, "--disp-blocks", str(block), "--out", str(tmp_path / str(block))])
    each = [log_of(tmp_path / str(block))[0]["disp"] for block in range(1, 9)]
    entry, spread = log_of(tmp_path / "all")
    close(entry["disp"], np.mean(each), 1e-5)
    assert entry["floor"] == 1 / 16 and len(spread["block_distance"]) == 8


def test_bf16_compile_and_epochs(photos, trained, tmp_path, monkeypatch):
    """Compiling renames no weight, bf16 moves the loss a little, and epochs count passes over the data."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend="aot_eager"))
    base = ["--data", str(photos / "cache"), *TINY, "--dtype", "bf16", "--compile", "--out", str(tmp_path)]
    train.main([*base, "--epochs", "3"])  # 3 x 48 images in batches of 32
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 3, 4, 4]
    assert weights(tmp_path).keys() == weights(trained).keys()
    assert 1e-7 < abs(losses(tmp_path)[1][0] / losses(trained)[1][0] - 1) < 1e-2


def test_a_diverged_run_stops_and_keeps_its_checkpoint(photos, tmp_path, capsys):
    base = ["--data", str(photos / "cache"), *TINY, "--out", str(tmp_path)]
    train.main([*base, "--steps", "1"])
    before = (tmp_path / "ckpt.pt").read_bytes()
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["model"]["final_layer.linear.bias"].fill_(math.nan)
    torch.save(checkpoint, tmp_path / "sick.pt")
    capsys.readouterr()
    line = fails(train.main, capsys, *base, "--steps", 3, "--resume", tmp_path / "sick.pt")
    assert "step 2: not finite: regression loss, gradient; no update" in line and "--lr" in line
    assert (tmp_path / "old1" / "ckpt.pt").read_bytes() == before and not (tmp_path / "ckpt.pt").exists()


def test_a_torn_log_does_not_prevent_resuming(photos, tmp_path):
    base = ["--data", str(photos / "cache"), *TINY, "--out", str(tmp_path)]
    train.main([*base, "--steps", "1"])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    train.main([*base, "--steps", "2", "--resume", str(tmp_path / "ckpt.pt")])
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 1, 2, 2]


def test_demo_data_is_deterministic_and_balanced():
    (images, labels, names), (again, _, _) = train.demo_data(40), train.demo_data(40)
    assert np.array_equal(images, again) and images.dtype == np.uint8 and images.shape[1] == 3
    assert np.bincount(labels).tolist() == [4] * 10 and len(names) == 10
    assert len({image.tobytes() for image in images}) == 40


def test_demo_loss_falls_and_leaves_a_picture(tmp_path, capsys):
    train.main(["--steps", "30", "--batch", "32", "--log-every", "10", "--out", str(tmp_path)])
    curve = [entry["loss"] for entry in log_of(tmp_path) if "loss" in entry]
    assert curve[-1] < 0.95 * curve[0]
    picture = Image.open(tmp_path / "samples" / "0000030.png")
    assert picture.mode == "RGB" and picture.width / picture.height == 8 / 10
    assert f"python sample.py --ckpt {tmp_path}/ckpt.pt" in capsys.readouterr().out


def test_resuming_with_another_config_is_refused(photos, trained, capsys):
    base = ["--data", photos / "cache", *TINY, "--out", trained]
    before = (trained / "ckpt.pt").read_bytes()
    for flag, value in (("--lr", "2e-3"), ("--seed", 1), ("--disp", "hinge"), ("--model", "SiT-XS/4"), ("--batch", 48)):
        line = fails(train.main, capsys, *base, "--steps", 8, flag, value)
        assert f"ckpt.pt was begun with {flag} " in line and f"not {value if flag != '--lr' else 0.002}: " in line
    assert (trained / "ckpt.pt").read_bytes() == before


def test_starting_afresh_keeps_the_old_run(photos, trained, tmp_path):
    base = ["--data", str(photos / "cache"), *TINY, "--out", str(tmp_path)]
    train.main([*base, "--steps", "1"])
    old = (tmp_path / "ckpt.pt").read_bytes()
    train.main([*base, "--steps", "1", "--seed", "5", "--resume", "none"])
    train.main([*base, "--steps", "1", "--seed", "6", "--resume", "none"])
    assert (tmp_path / "old1" / "ckpt.pt").read_bytes() == old != (tmp_path / "old2" / "ckpt.pt").read_bytes()
    assert len(losses(tmp_path)) == len(losses(tmp_path / "old1")) == 1
    assert (tmp_path / "old1" / "samples" / "0000001.png").exists()


@pytest.mark.parametrize("args, words", [
    (["--disp-blocks", "9"], "--disp-blocks 9: expected 'all' or numbers from 1 to 8"),
    (["--disp-blocks", "x"], "--disp-blocks x"),
    (["--model", "SiT-M/2"], "--model SiT-M/2: expected one of SiT-XS/2"),
    (["--lr", "fast"], "argument --lr: expected float of at least 0, got 'fast'"),
    (["--lr", "nan"], "argument --lr"),
    (["--batch", "0"], "argument --batch: expected int of at least 1, got '0'"),
    (["--batch", "40"], "the nearest that fit are --batch 32 --micro 32"),
    (["--micro", "12"], "the nearest that fit are --batch 32 --micro 16"),
    (["--batch", "256", "--micro", "100"], "the nearest that fit are --batch 256 --micro 128"),
    (["--disp-blocks", "\u00b2"], "--disp-blocks \u00b2: expected"),
    (["--seed", "9" * 20], "argument --seed: expected int from 0"),
    (["--cache-only"], "--cache-only needs --images FOLDER"),
    (["--disp", "l2"], "argument --disp: invalid choice: 'l2'"),
    (["--disp-tau", "0"], "argument --disp-tau"),
    (["--disp-margin", "-1"], "argument --disp-margin"),
    (["--disp-weight", "-1"], "argument --disp-weight"),
    (["--disp-group", "1"], "argument --disp-group: expected int of at least 2"),
    (["--ema", "1.5"], "argument --ema: expected float from 0 to 1"),
    (["--grad-clip", "-1"], "argument --grad-clip"),
    (["--epochs", "-3"], "argument --epochs"),
    (["--seed", "-1"], "argument --seed"),
    (["--dtype", "fp8"], "argument --dtype"),
    (["--data", "nowhere"], "--data nowhere: no latents.npy there"),
    (["--images", "nowhere"], "--images needs --data"),
    (["--images", "nowhere", "--data", "x"], "nowhere: no such folder"),
    (["--resume", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--stepz", "3"], "unrecognized arguments: --stepz"),
])
def test_bad_flags_of_training(args, words, tmp_path, capsys):
    assert words in fails(train.main, capsys, "--out", tmp_path / "out", *args)
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".lock"}


def test_errors_come_once_under_torchrun(tmp_path):
    done = run("train.py", "--batch", 33, "--out", tmp_path / "out", ranks=2)
    lines = [line for line in done.stderr.splitlines() if "--batch 33" in line]
    assert done.returncode != 0 and len(lines) == 1 and "2 rank(s)" in lines[0]
    assert "Traceback" not in done.stderr.split(lines[0])[0]


def test_to_uint8_truncates():
    assert sample.to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.0039, 1.0, 3.0])).tolist() == [0, 0, 128, 128, 255, 255]


def test_samples_depend_on_seed_and_index_alone(trained, tmp_path):
    base = ["--ckpt", trained / "ckpt.pt", "--n", 7, "--steps", 3, "--dtype", "fp32", "--seed", 3]
    sample.main([*map(str, base), "--out", str(tmp_path / "one.npz")])
    sample.main([*map(str, base), "--out", str(tmp_path / "few.npz"), "--batch", "2"])
    base[2] = "--num-samples"  # torchrun would take --n for its own
    two = run("sample.py", *base, "--out", tmp_path / "two.npz", "--batch", 3, ranks=2)
    base[2] = "--n"
    assert two.returncode == 0, two.stderr
    one = np.load(tmp_path / "one.npz")
    assert one["arr_0"].shape == (7, 16, 16, 3) and one["arr_0"].dtype == np.uint8
    assert one["arr_1"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    for other in ("few", "two"):
        pixels = np.load(tmp_path / f"{other}.npz")["arr_0"].astype(int)
        assert np.abs(pixels - one["arr_0"]).max() <= 1
    sample.main([*map(str, base), "--out", str(tmp_path / "pngs"), "--classes", "dog,0,dog"])
    files = sorted((tmp_path / "pngs").glob("*.png"))
    assert len(files) == 7 and Image.open(files[0]).size == (16, 16)
    names = "few.npz few.png one.npz one.png pngs pngs.png two.npz two.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == names.split()


def test_sampling_is_the_ema_models_flow(trained, tmp_path):
    """Sample 3 written out: its noise, label 1, two Heun intervals with the EMA weights, DiT's rounding."""
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--n", "4", "--steps", "2", "--dtype", "fp32", "--seed", "3",
                 "--out", str(tmp_path / "x.npz")])
    net = build_model("SiT-XS/8", input_size=16, in_channels=3, num_classes=2)
    net.load_state_dict(weights(trained, "ema"))
    x = torch.from_numpy(np.random.default_rng([3, 3]).standard_normal((3, 16, 16), np.float32))[None]
    with torch.no_grad():
        def v(x, t):
            return net(x, torch.full((1,), t), torch.tensor([1]))[:, :3]
        for t in (0.0, 0.5):
            k = v(x, t)
            x = x + 0.25 * (k + v(x + 0.5 * k, t + 0.5))
    expected = (127.5 * x[0] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy().astype(int)
    assert np.abs(np.load(tmp_path / "x.npz")["arr_0"][3] - expected).max() <= 1


def test_interrupted_sampling_continues_with_the_same_flags_only(trained, tmp_path, monkeypatch, capsys):
    base = ["--ckpt", str(trained / "ckpt.pt"), "--n", "6", "--steps", "2", "--batch", "2"]
    sample.main([*base, "--out", str(tmp_path / "whole.npz")])
    real, calls = sample.generate, []

    def generate(*args, **options):
        calls.append(args[4])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)
    monkeypatch.setattr(sample, "generate", generate)
    with pytest.raises(SystemExit):
        sample.main([*base, "--out", str(tmp_path / "x.npz")])
    capsys.readouterr()
    assert "begun with --seed 0, not 1" in fails(sample.main, capsys, *base, "--out", tmp_path / "x.npz", "--seed", 1)
    sample.main([*base, "--out", str(tmp_path / "x.npz")])
    assert [list(c) for c in calls] == [[0, 1], [2, 3], [2, 3], [4, 5]]
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_folder_with_other_images_is_refused(trained, tmp_path, capsys):
    base = ["--ckpt", trained / "ckpt.pt", "--steps", 1, "--out", tmp_path]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "000001.png")
    assert "holds other images, such as 000001.png" in fails(sample.main, capsys, *base, "--n", 3)
    (tmp_path / "000001.png").unlink()
    sample.main([*map(str, base), "--n", "3"])
    capsys.readouterr()
    assert "holds other images, such as 000002.png" in fails(sample.main, capsys, *base, "--n", 2)
    (tmp_path / "made_of.json").write_text("{")
    assert "made_of.json: not a readable description" in fails(sample.main, capsys, *base, "--n", 3)


@pytest.mark.parametrize("args, words", [
    (["--n", "0"], "argument --n"),
    (["--classes", "2"], "--classes 2: expected numbers from 0 to 1 or names such as cat"),
    (["--classes", "cow"], "--classes cow"),
    (["--method", "rk4"], "--method rk4: expected one of heun, euler, sde for flow"),
    (["--cfg-interval", "0.5", "2"], "argument --cfg-interval: expected float from 0 to 1"),
    (["--cfg-interval", "0.8", "0.2"], "must not decrease"),
    (["--cfg-channels", "4"], "not exceed 3"),
    (["--ckpt", "nowhere.pt"], "nowhere.pt: no such file"),
])
def test_bad_flags_of_sampling(args, words, trained, tmp_path, capsys):
    base = ["--ckpt", trained / "ckpt.pt", "--out", tmp_path / "x.npz"]
    assert words in fails(sample.main, capsys, *base, *args)
    assert not list(tmp_path.iterdir())


def test_published_files_load_as_they_come(trained, tmp_path, capsys):
    """A bare state dict, or one under "ema", without config; either with or without the learned variance."""
    for learn_sigma in (True, False):
        net = fill(build_model("SiT-XS/8", input_size=16, in_channels=3, num_classes=5, learn_sigma=learn_sigma))
        for state in (net.state_dict(), dict(ema=net.state_dict(), model={}, args=argparse.Namespace(lr=1))):
            torch.save(state, tmp_path / "published.pt")
            loaded, config = sample.load_model(tmp_path / "published.pt", "SiT-XS/8")
            assert torch.equal(loaded(rn(1, 1, 3, 16, 16), ru(1, 1), torch.tensor([5])),
                               net(rn(1, 1, 3, 16, 16), ru(1, 1), torch.tensor([5])))
            assert config["num_classes"] == 5
    with pytest.raises(UserError, match="say with --model"):
        sample.load_model(tmp_path / "published.pt")
    with pytest.raises(UserError, match=r"blocks.0.adaLN_modulation.1.bias is \(1536,\) where \(2304,\) is expected"):
        sample.load_model(tmp_path / "published.pt", "SiT-S/8")


def test_training_starts_from_given_weights(photos, trained, tmp_path, capsys):
    base = ["--data", str(photos / "cache"), *TINY, "--steps", "1", "--lr", "0", "--disp", "none"]
    train.main([*base, "--init", str(trained / "ckpt.pt"), "--out", str(tmp_path / "own")])
    for which in ("model", "ema"):
        for name, value in weights(tmp_path / "own", which).items():
            assert torch.equal(value, weights(trained, "ema")[name])
    published = fill(build_model("SiT-XS/8", input_size=16, in_channels=3, num_classes=7)).state_dict()
    torch.save(published, tmp_path / "published.pt")  # of other classes: all but the label embedding is taken
    train.main([*base, "--init", str(tmp_path / "published.pt"), "--out", str(tmp_path / "other")])
    for name, value in weights(tmp_path / "other").items():
        assert torch.equal(value, published[name]) == (name != "y_embedder.embedding_table.weight")
    capsys.readouterr()
    base += ["--init", trained / "ckpt.pt", "--out", tmp_path / "x"]
    line = fails(train.main, capsys, *base, "--model", "SiT-XS/4")
    assert "final_layer.linear.bias is (384,) where (96,) is expected" in line


@pytest.mark.parametrize("objective, model", [("diffusion", "DiT-XS/8"), ("meanflow", "SiT-XS/8")])
def test_other_objectives_train_resume_and_sample(objective, model, photos, tmp_path, capsys):
    base = ["--data", photos / "cache", *TINY, "--model", model, "--disp-blocks", "2,4"]
    base += ["--objective", objective] * (objective == "meanflow")
    train.main([*map(str, base), "--steps", "3", "--out", str(tmp_path / "one")])
    train.main([*map(str, base), "--steps", "1", "--out", str(tmp_path / "again")])
    train.main([*map(str, base), "--steps", "3", "--out", str(tmp_path / "again")])
    two = run("train.py", *base, "--steps", 3, "--micro", 8, "--disp-group", 8, "--out", tmp_path / "two", ranks=2)
    train.main([*map(str, base), "--steps", "3", "--disp-group", "8", "--out", str(tmp_path / "eight")])
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "one") == losses(tmp_path / "again")
    close(losses(tmp_path / "two"), losses(tmp_path / "eight"), 1e-5)
    base = ["--ckpt", tmp_path / "one" / "ckpt.pt", "--n", 2, "--out", tmp_path / "x.npz", "--dtype", "fp32"]
    capsys.readouterr()
    refused = {"diffusion": (["--steps", 1001], "ddpm takes 2 to 1000"),
               "meanflow": (["--cfg", 2], "guided in training")}
    flags, words = refused[objective]
    assert words in fails(sample.main, capsys, *base, *flags)
    sample.main([*map(str, base), "--steps", "4"])
    net = build_model(model, input_size=16, in_channels=3, num_classes=2, second_time=objective == "meanflow")
    net.load_state_dict(weights(tmp_path / "one", "ema"))
    noise = np.stack([np.random.default_rng([0, i]).standard_normal((3, 16, 16), np.float32) for i in range(2)])
    if objective == "meanflow":  # ddpm's step noise comes from the samples' own generators
        x = MeanFlow().sample(net, torch.from_numpy(noise), torch.tensor([0, 1]), steps=4)
        pixels = np.load(tmp_path / "x.npz")["arr_0"].transpose(0, 3, 1, 2).astype(int)
        assert np.abs(pixels - sample.to_uint8(x).numpy()).max() <= 1


def test_mean_flow_starts_from_a_sit(photos, trained, tmp_path):
    train.main(["--data", str(photos / "cache"), "--steps", "1", *TINY, "--objective", "meanflow", "--lr", "0",
                "--init", str(trained / "ckpt.pt"), "--out", str(tmp_path)])
    for name, value in weights(trained, "ema").items():
        assert torch.equal(weights(tmp_path)[name], value)
    assert (weights(tmp_path)["r_embedder.mlp.2.weight"] == 0).all()


def first_inputs(photos, suffix="", batch=32):
    """Images, labels and draws of the first training step, taken from the streams one by one."""
    data = train.Data.open(photos / "cache")
    flips = np.random.default_rng([0, 0, zlib.crc32(b"flip")]).random(batch) < 0.5
    images, labels = data.read(train.batch_entries(0, 0, batch, len(data)), flips)

    def generator(purpose):
        return train.stream(0, 0, purpose + suffix, torch.device("cpu"))
    dropped = torch.rand(batch, generator=generator("label")) < 0.1
    return (images.float() / 127.5 - 1, torch.where(dropped, 2, labels), torch.rand(batch, generator=generator("time")),
            torch.randn(images.shape, generator=generator("noise")))


def fresh_net():
    torch.manual_seed(0)
    return build_model("SiT-XS/8", input_size=16, in_channels=3, num_classes=2)


@pytest.mark.parametrize("kind", KINDS)
def test_contrastive_baselines_contrast_two_views(kind, photos, trained, tmp_path):
    """The first step's loss, written out: the second view has its own time and noise, or nearly the first one's."""
    net, (x, y, t, noise), (_, _, t2, noise2) = fresh_net(), first_inputs(photos), first_inputs(photos, "2")
    shift = torch.rand(32, generator=train.stream(0, 0, "time2", torch.device("cpu")))
    views = {"independent": (t2, noise2), "dependent": ((t + 0.005 * (2 * shift - 1)).clamp(0, 1), noise)}
    assert 0 < (views["dependent"][0] - t).abs().max() <= 0.005
    for name, (t2, noise2) in views.items():
        z, z_pos = (net(s.view(-1, 1, 1, 1) * x + (1 - s.view(-1, 1, 1, 1)) * n, s, y, blocks=(3,))[1][0]
                    for s, n in ((t, noise), (t2, noise2)))
        train.main(["--data", str(photos / "cache"), "--steps", "1", *TINY, "--contrastive", name, "--disp", kind,
                    "--disp-blocks", "3", "--disp-group", "8", "--out", str(tmp_path / name)])
        loss, contrast = losses(tmp_path / name)[0]
        close(contrast, contrastive_loss(z, z_pos, kind, group=8).item(), 1e-4)
        assert loss == losses(trained)[0][0]  # the second view carries no regression loss


def test_the_second_view_of_a_diffusion_model_is_within_five_steps(photos, tmp_path, monkeypatch):
    seen = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y, r=None, blocks=():
                        (seen.append((t, r)), forward(self, x, t, y, r, blocks))[1])
    base = ["--data", str(photos / "cache"), *TINY, "--steps", "1", "--contrastive", "dependent"]
    train.main([*base, "--model", "DiT-XS/8", "--out", str(tmp_path / "diffusion")])
    first, second = seen[0][0].chunk(2)
    shift = 2 * torch.rand(32, generator=train.stream(0, 0, "time2", torch.device("cpu"))) - 1
    assert torch.equal(second, (first + 4.995 * shift).round().long().clamp(0, 999)) and first.dtype == torch.int64
    seen.clear()
    train.main([*base, "--objective", "meanflow", "--out", str(tmp_path / "meanflow")])
    t, r = next((t, r) for t, r in seen if len(t) == 64)
    assert (r[32:] == t[32:]).all() and (r[:32] != t[:32]).sum() == 8
    assert math.isfinite(losses(tmp_path / "meanflow")[0][0])


def test_repa_aligns_block_eight_with_the_features(photos, trained, tmp_path, capsys):
    """The first step's loss, written out, for features with those of mirror images, and without."""
    features = np.random.default_rng(0).normal(size=(48, 2, 4, 6)).astype(np.float16)
    np.save(tmp_path / "both.npy", features)
    np.save(tmp_path / "plain.npy", features[:, 0])
    entries = train.batch_entries(0, 0, 32, 48)
    flips = np.random.default_rng([0, 0, zlib.crc32(b"flip")]).random(32) < 0.5
    x, y, t, noise = first_inputs(photos)
    unflipped = torch.where(torch.from_numpy(flips).view(-1, 1, 1, 1), x.flip(-1), x)
    base = ["--data", photos / "cache", *TINY, "--repa-block", "8", "--disp", "none"]
    for name, images, target in (("both", x, features[entries, flips.astype(int)]),
                                 ("plain", unflipped, features[entries, 0])):
        train.main([*map(str, base), "--steps", "1", "--repa", str(tmp_path / f"{name}.npy"),
                    "--out", str(tmp_path / name)])
        assert ("without flips" in capsys.readouterr().out) == (name == "plain")
        net = fresh_net()
        projector = repa_projector(256, 6)  # drawn after the network
        _, (h,) = net(t.view(-1, 1, 1, 1) * images + (1 - t.view(-1, 1, 1, 1)) * noise, t, y, blocks=(8,))
        close(log_of(tmp_path / name)[0]["repa"], repa_loss(projector(h), torch.from_numpy(target)).item(), 1e-4)
    assert losses_and_repa(tmp_path / "both")[0][0] == losses(trained)[0][0]
    checkpoint = torch.load(tmp_path / "both" / "ckpt.pt", weights_only=True)
    assert checkpoint["ema"].keys() == checkpoint["model"].keys() == net.state_dict().keys()
    assert [value.shape for value in checkpoint["projector"].values()] == [v.shape for v in projector.parameters()]
    moved = [not torch.equal(checkpoint["projector"][name], value) for name, value in projector.state_dict().items()]
    assert all(moved)
    base += ["--out", tmp_path / "both", "--steps", 2, "--repa"]
    train.main([*map(str, base), str(shutil.copy(tmp_path / "both.npy", tmp_path / "moved.npy"))])
    assert "was begun with --repa features (48, 2, 4, 6)" in fails(train.main, capsys, *base, tmp_path / "plain.npy")
    for shape, dtype in (((48, 5, 6), "f2"), ((47, 4, 6), "f2"), ((48, 3, 4, 6), "f2"), ((48, 4, 6), "i4"),
                         ((48,), "f4"), ((48, 4, 0), "f4")):
        np.save(tmp_path / "bad.npy", np.zeros(shape, dtype))
        line = fails(train.main, capsys, *base, tmp_path / "bad.npy")
        assert f"bad.npy: is {np.dtype(dtype)} {shape}, where floats (48, 4, D) or (48, 2, 4, D)" in line
    line = fails(train.main, capsys, *base, tmp_path / "both.npy", "--repa-block", 9)
    assert "--repa-block 9: expected a number from 1 to 8" in line


def losses_and_repa(out):
    return [(entry["loss"], entry["repa"]) for entry in log_of(out) if "loss" in entry]


def test_everything_at_once_on_two_ranks_equals_one_process(photos, tmp_path):
    """Contrastive views, alignment, held-out loss and snapshots, in two accumulated passes on each of two ranks."""
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(48, 2, 4, 6)).astype(np.float32))
    base = ["--data", photos / "cache", "--val", photos / "cache", *TINY, "--repa", tmp_path / "features.npy",
            "--contrastive", "independent", "--disp-group", 8, "--disp-blocks", "2,4", "--grad-clip", 1,
            "--snapshot-every", 2]
    two = run("train.py", *base, "--steps", 4, "--micro", 8, "--out", tmp_path / "two", ranks=2)
    train.main([*map(str, base), "--steps", "2", "--out", str(tmp_path / "one")])
    train.main([*map(str, base), "--steps", "4", "--out", str(tmp_path / "one")])
    train.main([*map(str, base), "--steps", "4", "--out", str(tmp_path / "whole")])
    assert two.returncode == 0, two.stderr
    names = ["loss", "disp", "repa", "distance"]
    curves = [[[entry[name] for name in names] for entry in log_of(tmp_path / out) if "loss" in entry]
              for out in ("one", "whole", "two")]
    assert len(curves[0]) == 4 and curves[0] == curves[1]
    close(curves[2], curves[1], 1e-4)
    for which in ("model", "projector"):
        for name, value in weights(tmp_path / "one", which).items():
            assert torch.equal(value, weights(tmp_path / "whole", which)[name])
    snapshot = torch.load(tmp_path / "one" / "snapshots" / "0000004.pt", weights_only=True)
    for name, value in weights(tmp_path / "one", "ema").items():
        assert torch.equal(snapshot["ema"][name], value)
    sample.main(["--ckpt", str(tmp_path / "one" / "snapshots" / "0000002.pt"), "--n", "2", "--steps", "1",
                 "--out", str(tmp_path / "x.npz")])


def test_held_out_loss_is_the_emas_under_draws_of_its_own(photos, tmp_path, capsys):
    base = ["--data", photos / "cache", *TINY, "--out", tmp_path / "out", "--lr", "1e-2"]
    train.main([*map(str, base), "--val", str(photos / "cache"), "--steps", "4", "--ckpt-every", "2"])
    net = fresh_net()
    net.load_state_dict(weights(tmp_path / "out", "ema"))
    data, cpu = train.Data.open(photos / "cache"), torch.device("cpu")
    x = data.prepare(torch.from_numpy(np.array(data.latents)), None)
    draw = functools.partial(train.stream, 0, 0, device=cpu)
    with torch.no_grad():
        loss, _ = FlowMatching().loss(net, x, torch.from_numpy(data.labels), FlowMatching().times(48, draw("val time")),
                                      torch.randn(x.shape, generator=draw("val noise")))
    lines = [entry for entry in log_of(tmp_path / "out") if "val" in entry]
    assert [entry["step"] for entry in lines] == [2, 4]
    close(lines[1]["val"], loss.mean().item(), 1e-5)
    other = tmp_path / "other"
    shutil.copytree(photos / "cache", other)
    (other / "meta.json").write_text(json.dumps(dict(classes=["cat", "cow"], vae="none")))
    line = fails(train.main, capsys, *base, "--val", other)
    assert f"--val {other}: its shape or classes differ" in line


GOLDEN_TRAIN = {0: 2.59821773, 1: 2.51078415, 9: 2.09170985, 24: 1.76760042, 49: 1.32502353}


def test_fifty_training_steps_of_the_authors_code():
    """Golden: losses of the authors' own training (last block, tau 1, weight 0.25, AdamW)."""
    net = fill(DiT(input_size=16, hidden_size=128, depth=4, num_heads=4, num_classes=10))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0.0)
    losses = []
    for s in range(50):
        y = torch.from_numpy(np.random.RandomState(4000 + s).randint(0, 11, 32))
        loss, (z,) = FlowMatching().loss(net, rn(1000 + s, 32, 4, 16, 16), y, ru(3000 + s, 32),
                                         rn(2000 + s, 32, 4, 16, 16), blocks=[4])
        total = loss.mean() + 0.25 * dispersive_loss(z, tau=1.0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    for s, golden in GOLDEN_TRAIN.items():
        close(losses[s], golden, 2e-6)
    if GOLDEN.exists():
        close(losses, np.load(GOLDEN / "train.npz")["loss"], 2e-6)


def test_a_model_without_labels_is_trained_validated_and_sampled_with_the_null_label(photos, tmp_path, monkeypatch):
    seen, inner = [], DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda net, x, t, y, *rest, **named: seen.append(y) or inner(
        net, x, t, y, *rest, **named))
    train.main([*map(str, ["--data", photos / "cache", *TINY, "--out", tmp_path / "out", "--steps", "2", "--val",
                           photos / "cache", "--label-dropout", "1"])])
    sample.main(["--ckpt", str(tmp_path / "out" / "ckpt.pt"), "--n", "4", "--steps", "1", "--out",
                 str(tmp_path / "images")])
    assert len(seen) > 50 and all((y == 2).all() for y in seen)


def test_guidance_of_mean_flow_reaches_the_objective(photos, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train, "MeanFlow", lambda **kwargs: (made.append(kwargs), MeanFlow(**kwargs))[1])
    base = ["--data", str(photos / "cache"), *TINY, "--steps", "1", "--objective", "meanflow", "--meanflow-omega",
            "0.5", "--meanflow-kappa", "0.4", "--meanflow-interval", "0.25", "1", "--out", str(tmp_path)]
    train.main(base)
    assert made == [dict(omega=0.5, kappa=0.4, interval=(0.25, 1.0))]


def commands_of_the_readme(section):
    """The command lines of a README section, $T written out; continuation lines joined."""
    text = (HERE / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    shorthand = re.search(r'^T="(.*)"$', text, re.M)[1]
    return [line.replace("$T", shorthand) for line in re.findall(r"`(\$T.*?)`", text)]


@pytest.fixture
def narrow_models(monkeypatch):
    """The published shapes with their depths, but a width that is soon trained."""
    for name, sizes in MODELS.items():
        monkeypatch.setitem(MODELS, name, {**sizes, "hidden_size": 16, "num_heads": 2})


def test_every_command_of_the_paper_row_by_row_runs(narrow_models, tmp_path, monkeypatch):
    """As printed, in a folder that holds what they name: small images, features, a checkpoint to start from."""
    rng = np.random.default_rng(0)
    for folder in ("data/imagenet256", "data/imagenet256-val"):
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / "latents.npy", rng.integers(0, 256, (64, 3, 8, 8), dtype=np.uint8))
        np.save(tmp_path / folder / "labels.npy", np.arange(64) % 4)
        (tmp_path / folder / "meta.json").write_text(json.dumps(dict(classes=list("abcd"), vae="none")))
    np.save(tmp_path / "dinov2.npy", rng.normal(size=(64, 2, 16, 6)).astype(np.float16))
    monkeypatch.chdir(tmp_path)
    commands = commands_of_the_readme("The paper, row by row")
    assert len(commands) > 20 and len({out_of(command) for command in commands}) == len(commands)
    for command in commands:
        flags = command.split("train.py ")[1].split()
        train.main([*flags, "--steps", "1", "--batch", "32", "--dtype", "fp32", "--log-every", "1", "--no-compile"])
        log = log_of(out_of(command))
        entry, spread = next(line for line in log if "loss" in line), log[-1]
        assert math.isfinite(entry["loss"]) and len(spread["block_distance"]) >= 12
        assert any("val" in line for line in log) == ("--val" in command)
        assert ("repa" in entry) == ("--repa " in command)


def out_of(command):
    return re.search(r"--out (\S+)", command)[1]


def test_damaged_and_malicious_checkpoints(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))
    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("evil.pt", "text.pt"):
        with pytest.raises(UserError, match="not a readable weights file"):
            sample.load_file(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError):
        with sample.atomic(tmp_path / "x") as file:
            file.write(b"new")
            1 / 0
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_failed_download_names_file_url_and_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = tmp_path / "weights.pth"
    source.write_bytes(b"weights")
    digest = "9aac8298b48ec8ac19a9c1ab6a7eb4f0a5ec2ba9b9a5a4d0f77b5d0d1b6a5e3c"
    with pytest.raises(UserError, match="--weights FILE"):
        sample.fetch(source.as_uri(), "--weights", digest)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    path = sample.fetch(source.as_uri(), "--weights", hashlib.sha256(b"weights").hexdigest())
    source.unlink()
    assert sample.fetch(source.as_uri(), "--weights") == path and path.read_bytes() == b"weights"


# ---------------------------------------------------------------------------------------------------------------------
# Nothing lost: runs that are killed, stopped, damaged, or short of disk

FORK = multiprocessing.get_context("forkserver")  # a server that has imported all this forks a run in milliseconds
FORK.set_forkserver_preload(["test_dispersive", "torch._dynamo"])
NANO = [*TINY, "--model", "SiT-nano/8"]
SHAPES = {"SiT-nano/8": dict(hidden_size=32, depth=2, num_heads=2, patch_size=8)}


def child(args, log, environment, fault):
    os.environ.update(environment)
    MODELS.update(SHAPES)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if fault:
        fault()
    train.main(args)


def launch(log, *args, fault=None, **environment):
    """Start train.py in a process of its own, after `fault` has been called there."""
    process = FORK.Process(target=child, args=([*map(str, args)], log, environment, fault))
    process.start()
    return process


def launch_ranks(log, *args, fault=None):
    """The same as two ranks, without torchrun, so that each has an exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [launch(f"{log}{rank}", *args, fault=fault, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                   LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port) for rank in range(2)]


def ends(*processes):
    """Their exit codes; None for what had to be killed."""
    codes = []
    for process in processes:
        process.join(60)
        codes.append(process.exitcode)
        process.kill()
    return codes


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def logged(out, step):
    return lambda: (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= step


def curves(out):
    """The log without what the clock says."""
    return [{name: value for name, value in entry.items() if name not in ("seconds", "images_per_second")}
            for entry in log_of(out)]


def same_checkpoint(out, reference):
    """Weights, EMA, optimiser and config, to the bit."""
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (out, reference))
    return str(a["config"]) == str(b["config"]) and a["step"] == b["step"] and str(a["opt"]) == str(b["opt"]) and all(
        torch.equal(x, y) for which in ("model", "ema") for x, y in zip(a[which].values(), b[which].values())) and all(
        torch.equal(x[name], b["opt"]["state"][i][name]) for i, x in a["opt"]["state"].items() for name in x)


@pytest.fixture
def base(photos, monkeypatch):
    """The flags of a run so small that starting it is nearly all it does."""
    monkeypatch.setitem(MODELS, *SHAPES.copy().popitem())
    yield ["--data", str(photos / "cache"), *NANO]
    for process in multiprocessing.active_children():
        process.kill()


def test_killed_at_random_a_run_ends_in_the_same_bits(photos, trained, tmp_path):
    args = ["--data", photos / "cache", *TINY, "--steps", 6, "--ckpt-every", 1, "--out", tmp_path / "run"]
    random = np.random.default_rng()
    for attempt in range(3):
        process, new = launch(tmp_path / "log", *args), tmp_path / "run" / "ckpt.new.pt.tmp"
        wait_for(lambda: logged(tmp_path / "run", attempt + 1)() or not process.is_alive())
        if attempt % 2:
            wait_for(lambda: new.exists() or not process.is_alive())
        time.sleep(random.uniform(0, 0.3 if attempt % 2 else 1))
        process.kill()
        assert ends(process)[0] in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
    assert ends(launch(tmp_path / "log", *args)) == [0]
    assert same_checkpoint(tmp_path / "run", trained) and curves(tmp_path / "run") == curves(trained)


def killed_before_renaming_to(name):
    """kill -9 while the second checkpoint is written, or between its renames."""
    replace = os.replace

    def deadly(source, target):
        if Path(target).name == name and (Path(target).parent / "ckpt.prev.pt" if name == "ckpt.pt" else
                                          Path(target).parent / "ckpt.pt").exists():
            if name == "ckpt.new.pt":
                os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = deadly


def killed_before_the_picture():
    train.picture = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("fault, left", [
    (functools.partial(killed_before_renaming_to, "ckpt.new.pt"), {"ckpt.pt", "ckpt.new.pt.tmp"}),
    (functools.partial(killed_before_renaming_to, "ckpt.prev.pt"), {"ckpt.pt", "ckpt.new.pt"}),
    (functools.partial(killed_before_renaming_to, "ckpt.pt"), {"ckpt.prev.pt", "ckpt.new.pt"}),
    (killed_before_the_picture, {"ckpt.pt", "ckpt.prev.pt"}),
], ids=["half written", "before the first rename", "between the renames", "before the picture"])
def test_killed_at_the_worst_moments(fault, left, base, tmp_path):
    args = [*base, "--ckpt-every", "1", "--sample-every", "2", "--snapshot-every", "2"]
    train.main([*args, "--steps", "4", "--out", str(tmp_path / "whole")])
    args += ["--out", str(tmp_path / "run")]
    assert ends(launch(tmp_path / "log", *args, "--steps", 4, fault=fault)) == [-signal.SIGKILL]
    assert {path.name for path in (tmp_path / "run").glob("ckpt*")} == left
    train.main([*args, "--steps", "4"])
    assert same_checkpoint(tmp_path / "run", tmp_path / "whole")
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")
    assert {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")} == \
        {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")}


def killed_while_caching():
    multiprocessing.set_start_method("fork", force=True)  # loaders that the server forks would outlive the run
    write = train.Rows.write

    def deadly(self, indices, rows):
        write(self, indices[:10], rows[:10])
        os.kill(os.getpid(), signal.SIGKILL)
    train.Rows.write = deadly


def test_killed_while_caching(photos, tmp_path):
    args = ["--images", str(photos / "images"), "--data", str(tmp_path / "cache"), "--vae", "none", "--size", "16",
            "--cache-only"]
    assert ends(launch(tmp_path / "log", *args, fault=killed_while_caching)) == [-signal.SIGKILL]
    train.main(args)
    assert (tmp_path / "cache" / "latents.npy").read_bytes() == (photos / "cache" / "latents.npy").read_bytes()


def test_a_damaged_latest_gives_way_to_the_one_before(base, tmp_path, capsys):
    base += ["--sample-every", "2"]
    train.main([*base, "--ckpt-every", "2", "--steps", "4", "--out", str(tmp_path / "whole")])
    good = (tmp_path / "whole" / "ckpt.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (flipped, good[:len(good) // 2], b"", b"no archive"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        (tmp_path / "run" / "ckpt.pt").write_bytes(damaged)
        before = (tmp_path / "run" / "ckpt.prev.pt").read_bytes()
        capsys.readouterr()
        train.main([*base, "--steps", "4", "--out", str(tmp_path / "run")])
        out, err = capsys.readouterr()
        assert f"{tmp_path}/run/ckpt.pt: " in err and f"going on from {tmp_path}/run/ckpt.prev.pt" in err
        assert "continued from step 2" in out and len(err.splitlines()) == 1
        assert same_checkpoint(tmp_path / "run", tmp_path / "whole")
        assert curves(tmp_path / "run") == curves(tmp_path / "whole")
        assert (tmp_path / "run" / "ckpt.prev.pt").read_bytes() == before
        assert (tmp_path / "run" / "ckpt.aside.pt").read_bytes() == damaged
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        (tmp_path / "run" / name).write_bytes(flipped)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*base, "--steps", "4", "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2 and "ckpt.prev.pt: damaged (" in lines[1]
    assert all((tmp_path / "run" / name).read_bytes() == flipped for name in ("ckpt.pt", "ckpt.prev.pt"))


def test_a_bit_flipped_anywhere_is_seen(tmp_path):
    state = dict(model={"w": torch.arange(100.0)}, ema={}, opt={}, step=3, config=dict(lr=0.1))
    torch.save(state, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    missed = 0
    for at in range(0, len(good), 5):
        (tmp_path / "bad.pt").write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1:])
        try:
            found = train.read_checkpoint(tmp_path / "bad.pt")
        except UserError:
            continue
        assert str(found) == str(state)  # a flip in what the archive is padded with
        missed += 1
    assert missed < len(good) / 5 * 0.8


def test_what_is_written_is_read_before_it_replaces_anything(base, tmp_path, monkeypatch, capsys):
    args = [*base, "--out", str(tmp_path)]
    train.main([*args, "--steps", "1"])
    before, save = (tmp_path / "ckpt.pt").read_bytes(), torch.save

    def torn(state, file):
        save(state, file)
        file.seek(file.tell() // 2)
        file.write(b"\0\1\2\3" * 10)
    monkeypatch.setattr(torch, "save", torn)
    capsys.readouterr()
    assert "ckpt.new.pt: damaged (" in fails(train.main, capsys, *args, "--steps", 2)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not (tmp_path / "ckpt.prev.pt").exists()


def test_a_resumed_run_leaves_the_file_it_came_from(base, tmp_path, monkeypatch):
    """Else its replaced checkpoint would stay on the disk for as long as it runs, a fourth where three fit."""
    args = [*base, "--out", str(tmp_path)]
    train.main([*args, "--steps", "1"])
    maps, save = Path("/proc/self/maps"), train.save_checkpoint
    if not maps.exists():
        pytest.skip("needs /proc")
    mapped = []
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: (mapped.append(maps.read_text()), save(*args)))
    train.main([*args, "--steps", "2"])
    assert len(mapped) == 1 and str(tmp_path) not in mapped[0]


def test_snapshots_hold_the_ema(base, tmp_path):
    args = [*base, "--ckpt-every", "1"]
    train.main([*args, "--snapshot-every", "2", "--steps", "5", "--out", str(tmp_path / "run")])
    train.main([*args, "--steps", "2", "--out", str(tmp_path / "short")])
    assert sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir()) == ["0000002.pt", "0000004.pt"]
    snapshot = tmp_path / "run" / "snapshots" / "0000002.pt"
    state = torch.load(snapshot, weights_only=True)["ema"]
    assert all(torch.equal(state[name], value) for name, value in weights(tmp_path / "short", "ema").items())
    sample.main(["--ckpt", str(snapshot), "--n", "2", "--steps", "1", "--out", str(tmp_path / "samples")])
    sample.main(["--ckpt", str(tmp_path / "short" / "ckpt.pt"), "--n", "2", "--steps", "1", "--out",
                 str(tmp_path / "same")])
    assert (tmp_path / "samples" / "000001.png").read_bytes() == (tmp_path / "same" / "000001.png").read_bytes()


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(which, base, tmp_path, capsys):
    """A launcher may send the same signal again at once; the other run on this --out is refused meanwhile."""
    args = [*base, "--log-every", "1000", "--out", tmp_path / "run"]
    process = launch(tmp_path / "log", *args, "--steps", 10 ** 6, "--snapshot-every", 5)
    wait_for(lambda: (tmp_path / "run" / "snapshots").exists())
    assert "run: another process is writing there" in fails(train.main, capsys, *args, "--steps", 3)
    for _ in range(2):
        os.kill(process.pid, which)
        time.sleep(0.01)
    assert ends(process) == [128 + which]
    step = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"]
    assert f"{which.name}: saved at step {step:,}; " in (tmp_path / "log").read_text() and step >= 5
    train.main([*map(str, args), "--steps", str(step + 1)])
    train.main([*base, "--steps", str(step + 1), "--out", str(tmp_path / "whole")])
    assert same_checkpoint(tmp_path / "run", tmp_path / "whole")


def busy_outside_of_python():
    train.Trainer.step = lambda *args, **options: (print("busy", flush=True),
                                                   hashlib.pbkdf2_hmac("sha256", b"", b"", 10 ** 9))


def test_a_second_signal_exits_at_once(base, tmp_path):
    process = launch(tmp_path / "log", *base, "--steps", 3, "--out", tmp_path / "run", fault=busy_outside_of_python)
    wait_for(lambda: (tmp_path / "log").exists() and "busy" in (tmp_path / "log").read_text())
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.05)
    time.sleep(1.2)
    alive = process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(2)
    stopped = not process.is_alive()
    process.kill()
    assert alive and stopped and process.exitcode == 143 and not (tmp_path / "run" / "ckpt.pt").exists()


def test_the_thread_that_takes_signals_ends_with_the_training():
    """One left to the interpreter's end aborts the process now and then."""
    with train.Stop(1) as stop:
        assert stop.thread.is_alive() and stop.agreed() == 0
    assert not stop.thread.is_alive()


def test_a_signal_to_one_rank_stops_both(base, tmp_path):
    args = [*base, "--out", tmp_path / "run"]
    ranks = launch_ranks(tmp_path / "log", *args, "--steps", 10 ** 6)
    wait_for(logged(tmp_path / "run", 3))
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ends(*ranks) == [143, 143]
    step = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"]
    assert f"SIGTERM: saved at step {step}" in (tmp_path / "log0").read_text()
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [*range(1, step + 1)]


def rank_one_dies_once():
    """Under torchrun: rank 1 kills itself after step 3."""
    step = train.Trainer.step

    def deadly(self, number, *args, **options):
        if number == 3 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, *args, **options)
    train.Trainer.step = deadly


def test_torchrun_restarts_from_the_last_checkpoint_and_stops_on_ctrl_c(base, tmp_path):
    """--resume none: what torchrun starts again goes on all the same."""
    train.main([*base, "--steps", "1", "--out", str(tmp_path / "run")])
    (tmp_path / "run.py").write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport test_dispersive as test\n"
                                     "test.child(sys.argv[1:], sys.argv[-1] + '.log', {}, test.rank_one_dies_once)\n")
    args = [*base, "--ckpt-every", 2, "--resume", "none"]
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                "--max-restarts=1", tmp_path / "run.py", *map(str, args), "--steps", "1000000",
                                "--out", tmp_path / "run"], start_new_session=True, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: (tmp_path / "run" / "old1").exists() and logged(tmp_path / "run", 5)())
    finally:
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60)
    said, step = (tmp_path / "run.log").read_text(), torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"]
    assert said.count("continued from step 2") == 1 and said.count(f"SIGINT: saved at step {step}") == 1
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [*range(1, step + 1)]
    assert ends(*launch_ranks(tmp_path / "log", *args, "--steps", step, "--out", tmp_path / "whole")) == [0, 0]
    for name, value in weights(tmp_path / "whole").items():
        assert (value - weights(tmp_path / "run")[name]).abs().max() <= 1e-6


@pytest.mark.parametrize("flag", ["none", "FILE"])
def test_what_torchrun_restarts_goes_on(flag, base, tmp_path, monkeypatch, capsys):
    """Killed between the renames of a checkpoint, too."""
    train.main([*base, "--steps", "2", "--out", str(tmp_path / "other")])
    train.main([*base, "--steps", "2", "--out", str(tmp_path / "run")])
    os.replace(tmp_path / "run" / "ckpt.pt", tmp_path / "run" / "ckpt.prev.pt")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    args = [*base, "--steps", "3", "--out", str(tmp_path / "run"), "--resume",
            "none" if flag == "none" else str(tmp_path / "other" / "ckpt.pt")]
    train.main(args)
    assert "continued from step 2" in capsys.readouterr().out and not (tmp_path / "run" / "old1").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")  # which died before it set the old run aside
    train.main(args)
    assert losses(tmp_path / "run" / "old1") and (tmp_path / "run" / "old1" / "ckpt.pt").exists()


def sick(term, at, loss, *args, **options):
    """A loss whose call number `at` is not finite, or has such a gradient."""
    value = loss(*args, **options)
    sick.calls += 1
    if sick.calls != at:
        return value
    if term == "gradient":
        return value + args[0].sum().mul(0).sqrt()
    return (value[0] * math.nan, value[1]) if term == "loss" else value * math.nan


@pytest.mark.parametrize("term, said", [("disp", "dispersive loss, gradient"), ("gradient", "gradient"),
                                        ("loss", "regression loss, gradient")])
def test_a_loss_that_is_not_finite_ends_the_run(term, said, base, tmp_path, monkeypatch, capsys):
    """Its first bad step is found at the next line of the log; nothing is updated in between."""
    args = [*base, "--ckpt-every", "2", "--log-every", "5", "--out", str(tmp_path)]
    train.main([*args, "--steps", "2"])
    before = (tmp_path / "ckpt.pt").read_bytes()
    sick.calls = 0
    if term == "loss":
        monkeypatch.setattr(FlowMatching, "loss", functools.partial(sick, term, 1, FlowMatching().loss))
    else:
        monkeypatch.setattr(train, "dispersive_loss", functools.partial(sick, term, 1, dispersive_loss))
    check, held = train.Trainer.check, []
    monkeypatch.setattr(train.Trainer, "check", lambda self: (held.append(copy.deepcopy(self.state(2))), check(self)))
    capsys.readouterr()
    line = fails(train.main, capsys, *args, "--steps", 9, "--ckpt-every", 9)
    assert f"step 3: not finite: {said}; no update has been made since. Try a smaller --lr" in line
    assert sick.calls == 3 and len(held) == 1 and (tmp_path / "ckpt.pt").read_bytes() == before
    torch.save(held[0], tmp_path / "held.pt")
    saved, held = (torch.load(tmp_path / name, weights_only=True) for name in ("ckpt.pt", "held.pt"))
    assert all(torch.equal(held["model"][name], value) for name, value in saved["model"].items())
    assert all(torch.equal(held["opt"]["state"][i][name], value)
               for i, entry in saved["opt"]["state"].items() for name, value in entry.items())


def sick_rank_one():
    sick.calls = 0
    sample.time = mock.Mock(wraps=time, sleep=lambda seconds: None)  # rank 1 would leave the talking to rank 0
    if os.environ["RANK"] == "1":
        train.dispersive_loss = functools.partial(sick, "disp", 3, dispersive_loss)


def other_weights_on_rank_one():
    sample.time = mock.Mock(wraps=time, sleep=lambda seconds: None)
    step = train.Trainer.step

    def moved(self, number, *args, **options):
        values = step(self, number, *args, **options)
        if os.environ["RANK"] == "1" and number == 2:
            with torch.no_grad():
                self.weights[3][0] += 1e-6
        return values
    train.Trainer.step = moved


@pytest.mark.parametrize("fault, said", [
    (sick_rank_one, "step 3: not finite: dispersive loss, gradient; no update"),
    (other_weights_on_rank_one, "step 4: the ranks hold different weights"),
])
def test_what_is_wrong_on_one_rank_stops_both(fault, said, base, tmp_path):
    args = [*base, "--ckpt-every", 2, "--log-every", 2]
    ranks = launch_ranks(tmp_path / "log", *args, "--steps", 9, "--out", tmp_path / "run", fault=fault)
    assert ends(*ranks) == [2, 2]
    assert all(said in (tmp_path / f"log{rank}").read_text().splitlines()[-1] for rank in range(2))
    assert ends(*launch_ranks(tmp_path / "log", *args, "--steps", 2, "--out", tmp_path / "whole")) == [0, 0]
    assert same_checkpoint(tmp_path / "run", tmp_path / "whole")


def other_out_on_rank_one():
    sample.time = mock.Mock(wraps=time, sleep=lambda seconds: None)
    parse = train.parse

    def elsewhere(argv):
        args = parse(argv)
        args.out += os.environ["RANK"]
        return args
    train.parse = elsewhere


def test_ranks_that_do_not_share_the_folder_do_not_start(base, tmp_path):
    train.main([*base, "--steps", "1", "--out", str(tmp_path / "run0")])
    ranks = launch_ranks(tmp_path / "log", *base, "--steps", 2, "--out", tmp_path / "run", fault=other_out_on_rank_one)
    assert ends(*ranks) == [2, 2] and "an --out that they do not share" in (tmp_path / "log0").read_text()


def test_a_folder_that_cannot_be_written_or_is_too_small_is_found_before_training(base, tmp_path, monkeypatch, capsys):
    step = mock.Mock()
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", step)
        (tmp_path / "file").write_text("")
        assert f"{tmp_path}/file/out" in fails(train.main, capsys, *base, "--steps", 1, "--out", tmp_path / "file/out")
        patch.setattr(sample, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied", "x/.lock")),
                      raising=False)
        assert "Permission denied: 'x/.lock'" in fails(train.main, capsys, *base, "--steps", 1, "--out", tmp_path / "x")
    args = [*base, "--out", str(tmp_path / "run")]
    train.main([*args, "--steps", "1"])
    size, torn = (tmp_path / "run" / "ckpt.pt").stat().st_size, tmp_path / "run" / "ckpt.new.pt.tmp"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=free - size * torn.exists()))
    free = int(1.5 * size)  # beside the one that is there
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", step)
        line = fails(train.main, capsys, *args, "--steps", 2)
        assert f"--out {tmp_path / 'run'}: 0.0 GB are free there, and the checkpoints need" in line
    assert not step.called
    torn.write_text("what a kill left")
    free = int(2.1 * size)
    train.main([*args, "--steps", "2"])


def disk_full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_leaves_the_old_checkpoint_whole(base, tmp_path):
    args = [*base, "--ckpt-every", 2, "--out", tmp_path / "run"]
    train.main([*map(str, args), "--steps", "2"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("ckpt*")}
    assert ends(launch(tmp_path / "log", *args, "--steps", 4, fault=disk_full)) == [2]
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert "ckpt.new.pt: cannot be written (File too large); what was there before is whole" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("ckpt*")} == before
    train.main([*map(str, args), "--steps", "4"])
    train.main([*base, "--steps", "4", "--out", str(tmp_path / "whole")])
    assert same_checkpoint(tmp_path / "run", tmp_path / "whole")


def test_a_dead_process_locks_nobody_out(base, tmp_path):
    process = launch(tmp_path / "log", *base, "--steps", 10 ** 6, "--out", tmp_path / "run")
    wait_for(logged(tmp_path / "run", 1))
    process.kill()
    assert ends(process) == [-signal.SIGKILL] and (tmp_path / "run" / ".lock").exists()
    train.main([*base, "--steps", "1", "--out", str(tmp_path / "run")])


# ---------------------------------------------------------------------------------------------------------------------
# sample.py: the VAE and its weights files


@pytest.fixture(scope="module")
def vae():
    return fill(sample.VAE())


# The network once more, slowly: float64 NumPy on one image (C, H, W); `w` is a state dict, `at` a module's name in it.


def slow_conv(w, at, x, stride=1, pad=((1, 1), (1, 1))):
    weight = w[at + ".weight"]
    k = weight.shape[-1]
    x = np.pad(x, ((0, 0), *pad)) if k == 3 else x
    height, width = ((n - k) // stride + 1 for n in x.shape[1:])
    out = np.zeros((len(weight), height, width))
    for i in range(k):
        for j in range(k):
            out += np.tensordot(weight[:, :, i, j], x[:, i:i + stride * height:stride, j:j + stride * width:stride], 1)
    return out + w[at + ".bias"][:, None, None]


def slow_norm(w, at, x):
    groups = x.reshape(32, -1)
    groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-6)
    return groups.reshape(x.shape) * w[at + ".weight"][:, None, None] + w[at + ".bias"][:, None, None]


def silu(x):
    return x / (1 + np.exp(-x))


def slow_resnet(w, at, x):
    h = slow_conv(w, at + ".conv1", silu(slow_norm(w, at + ".norm1", x)))
    h = slow_conv(w, at + ".conv2", silu(slow_norm(w, at + ".norm2", h)))
    return h + (slow_conv(w, at + ".conv_shortcut", x) if at + ".conv_shortcut.weight" in w else x)


def slow_attention(w, at, x):
    def linear(name, tokens):
        return w[f"{at}.{name}.weight"] @ tokens + w[f"{at}.{name}.bias"][:, None]

    tokens = slow_norm(w, at + ".group_norm", x).reshape(len(x), -1)  # a column for every pixel
    q, k, v = (linear(name, tokens) for name in ("to_q", "to_k", "to_v"))
    scores = np.exp(q.T @ k / np.sqrt(len(x)))
    return x + linear("to_out.0", v @ (scores / scores.sum(1, keepdims=True)).T).reshape(x.shape)


def slow_down(w, at, x):
    return slow_conv(w, at + ".conv", x, stride=2, pad=((0, 1), (0, 1)))


def slow_up(w, at, x):
    return slow_conv(w, at + ".conv", x.repeat(2, axis=1).repeat(2, axis=2))


def slow_middle(w, at, x):
    x = slow_resnet(w, at + ".resnets.0", x)
    return slow_resnet(w, at + ".resnets.1", slow_attention(w, at + ".attentions.0", x))


def slow_moments(w, x):
    x = slow_conv(w, "encoder.conv_in", x)
    for i in range(4):
        for j in range(2):
            x = slow_resnet(w, f"encoder.down_blocks.{i}.resnets.{j}", x)
        if i < 3:
            x = slow_down(w, f"encoder.down_blocks.{i}.downsamplers.0", x)
    x = slow_middle(w, "encoder.mid_block", x)
    return slow_conv(w, "quant_conv", slow_conv(w, "encoder.conv_out", silu(slow_norm(w, "encoder.conv_norm_out", x))))


def slow_decode(w, z):
    x = slow_middle(w, "decoder.mid_block", slow_conv(w, "decoder.conv_in", slow_conv(w, "post_quant_conv", z)))
    for i in range(4):
        for j in range(3):
            x = slow_resnet(w, f"decoder.up_blocks.{i}.resnets.{j}", x)
        if i < 3:
            x = slow_up(w, f"decoder.up_blocks.{i}.upsamplers.0", x)
    return slow_conv(w, "decoder.conv_out", silu(slow_norm(w, "decoder.conv_norm_out", x)))


def float64(module, prefix=""):
    return {prefix + name: tensor.double().numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("module, slow, channels", [
    (sample.Resnet(32, 64), slow_resnet, 32), (sample.Resnet(64, 64), slow_resnet, 64),
    (sample.PixelAttention(64), slow_attention, 64), (sample.Resample(32, up=False), slow_down, 32),
    (sample.Resample(32, up=True), slow_up, 32)])
@pytest.mark.parametrize("scale", [1, 1e-3])  # the small input shows the epsilon of the norms
def test_vae_layers_equal_a_slow_float64_formulation(module, slow, channels, scale):
    module = fill(module.requires_grad_(False).double(), "block.")
    x = scale * rn(50, 2, channels, 6, 10).double()
    expected = np.stack([slow(float64(module, "block."), "block", image) for image in x.numpy()])
    np.testing.assert_allclose(module(x).numpy(), expected, rtol=0, atol=1e-12)


def test_vae_block_runs_its_resnets_and_then_changes_resolution():
    x = rn(51, 1, 32, 6, 10)
    for options, layer, shape in (({"down": True}, "downsamplers.0", (1, 64, 3, 5)),
                                  ({"up": True}, "upsamplers.0", (1, 64, 12, 20)), ({}, None, (1, 64, 6, 10))):
        block = fill(sample.Stage(32, 64, 3, **options).requires_grad_(False))
        h = block.resnets[2](block.resnets[1](block.resnets[0](x)))
        expected = block.get_submodule(layer)(h) if layer else h
        assert torch.equal(block(x), expected) and block(x).shape == shape


def test_vae_names_and_shapes_are_the_published_ones(vae):
    shapes = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert len(shapes) == 248 and sum(tensor.numel() for tensor in vae.state_dict().values()) == 83_653_863
    digest = hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()
    assert digest == "6286db08f9cfd63c3269bc33f220dd77e9ab46cd1173bb5f3f71ef61a92db085"
    norms = [module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) == 52 and all(norm.num_groups == 32 and norm.eps == 1e-6 for norm in norms)
    if GOLDEN.exists():
        assert shapes == json.loads((GOLDEN / "vae_keys.json").read_text())


def unscaled(mean, std):
    """The moments (mean and log-variance) that `encode` made mean and std of."""
    return torch.cat([mean / 0.18215, 2 * torch.log(std / 0.18215)], dim=1)[0]


def test_vae_moments_equal_those_of_diffusers(vae):
    moments = unscaled(*vae.encode(rn(41, 1, 3, 64, 64).clamp(-1, 1)))
    # diffusers' AutoencoderKL on these weights and this image, at two places of the latent
    torch.testing.assert_close(moments[:, 2, 5], torch.tensor([
        0.120131940, 0.195904762, -0.122031748, 0.136251375, 0.132280618, -0.327936649, 0.101699010, -0.167610466]),
        rtol=0, atol=1e-4)
    torch.testing.assert_close(moments[:, 7, 0], torch.tensor([
        0.017716117, 0.173112303, -0.048999283, 0.120796382, 0.116384804, -0.351656705, 0.186544120, -0.150850683]),
        rtol=0, atol=1e-4)
    if GOLDEN.exists():
        np.testing.assert_allclose(moments, np.load(GOLDEN / "vae.npz")["moments"][0], rtol=0, atol=1e-4)


def test_vae_equals_a_slow_float64_formulation(vae):
    weights, x, z = float64(vae), rn(42, 1, 3, 32, 48).clamp(-1, 1), rn(43, 1, 4, 4, 6)
    np.testing.assert_allclose(unscaled(*vae.encode(x)), slow_moments(weights, x[0].double().numpy()), atol=1e-5)
    expected = slow_decode(weights, z[0].double().numpy() / 0.18215)
    assert expected.std() > 0.05
    np.testing.assert_allclose(vae.decode(z)[0], expected, rtol=0, atol=1e-5)


def test_vae_clamps_the_log_variance_as_diffusers_does(vae):
    bias = vae.quant_conv.bias.clone()
    vae.quant_conv.bias.copy_(torch.tensor([0, 0, 0, 0, 1000, 1000, -1000, -1000.]))
    _, std = vae.encode(rn(44, 1, 3, 16, 16))
    vae.quant_conv.bias.copy_(bias)
    expected = 0.18215 * torch.exp(torch.tensor([10, 10, -15, -15.]))
    torch.testing.assert_close(std, expected[None, :, None, None].expand(1, 4, 2, 2), rtol=1e-5, atol=0)


def test_vae_shapes_up_to_512_pixels():
    with torch.device("meta"):
        vae = sample.VAE()
        for size in (64, 256, 512):
            mean, std = vae.encode(torch.empty(6, 3, size, size))
            assert mean.shape == std.shape == (6, 4, size // 8, size // 8)
            assert vae.decode(mean).shape == (6, 3, size, size)


def test_vae_slices_give_what_the_whole_batch_gives(vae, monkeypatch):
    x, z, rows = rn(45, 5, 3, 16, 24), rn(46, 5, 4, 2, 3), []
    whole = *vae.encode(x), vae.decode(z)
    monkeypatch.setattr("sample.SLICE_PIXELS", 2 * 16 * 24 + 1)  # two images
    hooks = [coder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
             for coder in (vae.encoder.conv_in, vae.decoder.conv_in)]
    for sliced, expected in zip((*vae.encode(x), vae.decode(z)), whole):
        torch.testing.assert_close(sliced, expected, rtol=0, atol=1e-5)
    assert rows == [2, 2, 1] * 2
    monkeypatch.setattr("sample.SLICE_PIXELS", 1)
    assert vae.decode(z[:2]).shape == (2, 3, 16, 24) and rows[6:] == [1, 1]
    for hook in hooks:
        hook.remove()


def test_vae_under_autocast_keeps_latents_and_pixels_in_float32(vae):
    x, z = rn(47, 1, 3, 32, 32), rn(48, 1, 4, 4, 4)
    mean, image = vae.encode(x)[0], vae.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(x)[0], mean)
        lower = vae.decode(z)
    error = (lower - image).std() / image.std()
    assert lower.dtype == torch.float32 and 1e-4 < error < 0.02  # bf16 within, float32 at the end
    assert len(lower.unique()) > 0.9 * lower.numel()


def test_vae_is_frozen_but_passes_gradients_to_its_input(vae):
    assert not any(p.requires_grad for p in vae.parameters())
    z = rn(49, 1, 4, 2, 2).requires_grad_()
    vae.decode(z).square().sum().backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0


def safetensors(entries, data):
    """A file's bytes: `entries` a dict, or the header itself."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def write_safetensors(path, state):
    codes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}
    entries, data = {"__metadata__": {"format": "pt"}}, []
    for name, tensor in state.items():
        data.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        end = sum(map(len, data))
        entries[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [end - len(data[-1]), end]}
    path.write_bytes(safetensors(entries, b"".join(data)))


def older(state):
    """A state dict in the spelling of older files: other names, 1x1 convolutions."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".attentions.0.{new}." in name:
                name = name.replace(new, old)
                if name.endswith("weight"):
                    tensor = tensor[:, :, None] if old == "proj_attn" else tensor[:, :, None, None]
        renamed[name] = tensor
    return renamed


def test_vae_loads_both_file_formats_and_both_spellings(vae, tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in vae.state_dict().items()}
    old = older(state)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old and len(old) == 248
    torch.save(old, tmp_path / "old.bin")
    write_safetensors(tmp_path / "new.safetensors", state)
    for path in sorted(tmp_path.iterdir()):
        loaded = sample.VAE(path).state_dict()
        path.unlink()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name].float()) for name in state)


def test_vae_file_that_does_not_fit_says_which_tensor(tmp_path):
    with torch.device("meta"):
        state = sample.VAE().state_dict()
    name = "encoder.mid_block.attentions.0.to_k.weight"
    for change, message in (({name: torch.zeros(512, 256)}, f"{name} is (512, 256) where (512, 512) is expected"),
                            ({"more": torch.zeros(1)}, "more is (1,) where nothing is expected"),
                            ({"state_dict": {}}, "not a state dict")):
        path = tmp_path / "vae.pt"
        torch.save({key: torch.zeros(1).expand(value.shape) for key, value in state.items()} | change, path)
        with pytest.raises(UserError) as error:
            sample.VAE(path)
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_published_vaes_are_fetched_once_under_names_of_their_own(tmp_path, monkeypatch):
    calls = []

    def download(url, path, sha256, progress):
        calls.append((url, sha256))
        write_safetensors(Path(path), {"a": torch.zeros(1)})

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for kind in ("ema", "mse", "mse"):
        with pytest.raises(UserError, match="a is .1,. where nothing is expected"):  # read and compared
            sample.VAE(kind)
    url = "https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/diffusion_pytorch_model.safetensors"
    assert calls == [(url.format("ema"), None), (
        url.format("mse"), "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815")]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_published_vae_without_a_network_is_one_clear_line(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError) as error:
        sample.VAE("ema")
    message = str(error.value)
    assert "sd-vae-ft-ema.safetensors" in message and "--vae FILE" in message and "\n" not in message


def test_safetensors_equal_torch_files(tmp_path):
    state = {"f32": rn(1, 3, 5), "f64": rn(2, 4).double(), "f16": rn(3, 2, 2, 2).half(), "bf16": rn(4, 7).bfloat16(),
             "i64": torch.arange(6).reshape(2, 3), "u8": torch.arange(5, dtype=torch.uint8), "none": torch.zeros(0, 3),
             "scalar": torch.tensor(2.5), "bool": torch.tensor([True, False])}
    torch.save(state, tmp_path / "a.bin")
    write_safetensors(tmp_path / "a.safetensors", state)
    for loaded in (sample.load_file(tmp_path / "a.safetensors"), sample.load_file(str(tmp_path / "a.bin"))):
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_safetensors_of_any_header_length_and_order(tmp_path):
    path = tmp_path / "a.safetensors"
    entries = {"late": {"dtype": "F64", "shape": [2], "data_offsets": [4, 20]},
               "early": {"data_offsets": [0, 4], "shape": [1, 1], "dtype": "F32"}}
    data = np.float32(3).tobytes() + np.array([1.5, -2]).tobytes()
    for spaces in range(8):  # tensors at any alignment
        path.write_bytes(safetensors(json.dumps(entries).encode() + b" " * spaces, data))
        loaded = sample.load_safetensors(path)
        assert loaded["early"].tolist() == [[3]] and loaded["late"].tolist() == [1.5, -2]
    before = path.read_bytes()
    loaded["late"].zero_()
    assert path.read_bytes() == before  # the mapping is private
    path.write_bytes(safetensors({}, b""))
    assert sample.load_safetensors(path) == {}


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes):
    return {"a": F32 | changes}


MALFORMED = [
    # headers that are cut, too long, or no JSON object
    b"", b"\x02\0\0\0", b"\xff" * 8 + b"{}", (2**40).to_bytes(8, "little") + b"{}",
    (6).to_bytes(8, "little") + b"{}", safetensors(entry(), b"12345678")[:20], safetensors(b"", b""),
    safetensors(b"[]", b""), safetensors(b"{", b""), safetensors(b"{} x", b""), safetensors(b'{"\xff": 1}', b""),
    safetensors("{}".encode("utf-16-le"), b""), safetensors(b'{"a":' * 100_000, b""),
    safetensors(b'{"a":' + b"[" * 100_000, b""), safetensors(b'{"a": ' + b"9" * 5000 + b"}", b""),
    # entries without a valid dtype, shape and data_offsets
    *(safetensors(entries, b"12345678") for entries in (
        {"a": 1}, {"a": {"dtype": "F32", "shape": [2]}}, {"line\nbreak": 1}, {"\0" * 300: 1},
        entry(dtype="F31"), entry(dtype=["F32"]), entry(shape=2), entry(shape=[-2]), entry(shape=[-1, -2]),
        entry(shape=[2.0]), entry(shape=[True, 2]), entry(shape=["2"]), entry(shape=[2**70, 0]),
        entry(data_offsets=[-8, 0]), entry(data_offsets=[0]), entry(data_offsets=[0, 8, 16]),
        entry(data_offsets=[0, 2**63]), entry(data_offsets=[0.0, 8.0]), entry(data_offsets="08"))),
    # sizes that contradict each other or the file
    safetensors(entry(shape=[3]), b"12345678"), safetensors(entry(shape=[2**62, 2**62]), b"12345678"),
    safetensors(entry(data_offsets=[0, 4]), b"1234"),
    safetensors(entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), b""),
    safetensors(entry(data_offsets=[8, 0]), b"12345678"), safetensors(entry(), b"1234567"),
    safetensors(entry(data_offsets=[1, 9]), b"123456789"), safetensors(entry() | {"b": F32}, b"12345678"),
    safetensors(entry() | {"b": F32 | {"data_offsets": [4, 12]}}, b"123456789abc"),
    safetensors(entry() | {"b": F32 | {"data_offsets": [12, 20]}}, b"1234567890" * 2),
    safetensors(entry(), b"123456789")]


def test_malformed_safetensors_are_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    for content in MALFORMED:
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            sample.load_file(path)
        message = str(error.value)
        assert message.startswith(f"{path}: not a valid .safetensors file (")
        assert "\n" not in message and len(message) < len(str(path)) + 300


def test_torch_files_of_every_age_are_read_and_others_refused(tmp_path):
    path = tmp_path / "a.pth"
    for zipped in (True, False):  # torch before 1.6 wrote no zip archives; some published files are that old
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
        assert sample.load_file(path)["a"].tolist() == [1, 1, 1]
    torch.save([torch.ones(3)], path)
    whole = path.read_bytes()
    for content in (whole, b"", b"not a file of torch's", whole[:len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            sample.load_file(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        sample.load_file(tmp_path / "absent.safetensors")


def test_latent_chain_from_images_to_pixels(photos, vae, tmp_path, monkeypatch, capsys):
    """Cache through a VAE, train, sample, decode: the latents are the VAE's, and the samples its decoder's."""
    monkeypatch.chdir(tmp_path)
    torch.save(vae.state_dict(), "vae.pt")
    command = ["--images", str(photos / "images"), "--data", "cache", "--vae", "vae.pt", "--size", "32"]
    train.main([*command, "--steps", "1", *TINY, "--model", "SiT-XS/2", "--out", "out", "--micro", "16"])
    latents = np.load("cache/latents.npy")
    assert latents.shape == (48, 2, 8, 4, 4) and latents.dtype == np.float16
    file = sorted((photos / "images").glob("*/*.[jp]*"))[30]
    pixels = np.array(train.center_crop(Image.open(file).convert("RGB"), 32))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    for view, image in enumerate((x, x.flip(-1))):
        close(latents[30, view].astype(np.float32), torch.cat(vae.encode(image), 1)[0], 1e-3)
    assert Image.open("out/samples/0000001.png").size == (8 * 64, 2 * 64)  # enlarged twice
    sample.main(["--ckpt", "out/ckpt.pt", "--n", "2", "--steps", "1", "--dtype", "fp32", "--out", "x.npz"])
    assert np.load("x.npz")["arr_0"].shape == (2, 32, 32, 3)
    capsys.readouterr()
    line = fails(train.main, capsys, "--images", photos / "images", "--data", "other", "--vae", "vae.pt", "--size", 60)
    assert line == "train: error: --size 60: the VAE needs a multiple of 8"


# ---------------------------------------------------------------------------------------------------------------------
# fid.py


@pytest.fixture(scope="module")
def inception():
    return fill(fid.Inception())


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two sets of 14 and 9 smooth images, 24 high and 20 wide: nested folders of several formats, and archives."""
    root = tmp_path_factory.mktemp("sides")
    for name, count in (("a", 14), ("b", 9)):
        noise = np.random.RandomState(count).randint(0, 256, (count, 5, 4, 3)).astype(np.uint8)
        images = np.stack([np.asarray(Image.fromarray(image).resize((20, 24), Image.BICUBIC)) for image in noise])
        np.savez(root / f"{name}.npz", images)
        for i, image in enumerate(images):
            path = root / name / f"{i % 3}" / f"{i:03d}{('.png', '.BMP', '.webp')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, **({"lossless": True} if i % 3 == 2 else {}))
        (root / name / ".hidden.png").write_text("no image")
        (root / name / "notes.txt").write_text("no image")
    return root


inception_of = functools.cache(fid.Inception)


def run_fid(*args):
    """Run main in this process, its networks made once."""
    with mock.patch.object(fid, "Inception", inception_of):
        fid.main(["--weights", "random", "--device", "cpu", "--batch", "4", *map(str, args)])


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


GOLDEN_FEATURES = {  # of golden/inception.npz (the published network, reproducible weights): part of the first image's
    "pool32": (slice(1, None, 400), [0.18013462, 0, 0.108957, 0.01511516, 0.08196568, 0]),
    "spatial32": (slice(0, None, 400), [0.14335807, 0, 0, 0.01928014, 0, 0.03683205]),
    "logits_unbiased32": (slice(0, None, 200),
                          [0.08772594, 0.27910304, -0.04730734, -0.00238647, -0.09473391, -0.224189])}


def golden_images():
    return torch.from_numpy(np.random.RandomState(31).randint(0, 256, (4, 3, 32, 32)).astype(np.uint8))


def test_inception_matches_the_published_network(inception):
    outputs = dict(zip(("pool32", "spatial32", "logits_unbiased32"), inception(golden_images())))
    for name, (part, expected) in GOLDEN_FEATURES.items():
        np.testing.assert_allclose(outputs[name][0, part], expected, rtol=1e-4, atol=1e-6)
    if not GOLDEN.exists():
        pytest.skip("the whole vectors are not here; the numbers above passed")
    with np.load(GOLDEN / "inception.npz") as golden:
        for name, output in outputs.items():
            assert output.shape == golden[name].shape
            assert np.abs(output.numpy() - golden[name]).max() < 1e-5 * np.abs(golden[name]).max()


def test_inception_keys(inception):
    shapes = {name: list(tensor.shape) for name, tensor in inception.state_dict().items()}
    assert len(shapes) == 566 and sum(map(math.prod, shapes.values())) == 23_885_486
    if GOLDEN.exists():
        assert shapes == json.loads((GOLDEN / "inception_keys.json").read_text())


def resize_slowly(image, size):
    """TF1's ResizeBilinear (align_corners and half_pixel_centers false), pixel by pixel in float64."""
    height, width = image.shape
    out = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize("height, width", [(32, 32), (7, 50), (299, 299), (64, 400), (1, 2)])
def test_resize_is_tensorflow_1(height, width):
    image = np.random.RandomState(0).randint(0, 256, (1, 1, height, width)).astype(np.uint8)
    resized = fid.resize_tf1(torch.from_numpy(image))[0, 0].numpy()
    np.testing.assert_allclose(resized, resize_slowly(image[0, 0].astype(float), 299), atol=0.02)
    if height == width == 299:
        assert np.array_equal(resized, image[0, 0])


def test_inception_accepts_any_size_and_layout(inception):
    images = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (2, 30, 41, 3)).astype(np.uint8))
    from_nhwc = inception(images.permute(0, 3, 1, 2))
    assert [tuple(output.shape) for output in from_nhwc] == [(2, 2048), (2, 2023), (2, 1008)]
    for a, b in zip(from_nhwc, inception(images.permute(0, 3, 1, 2).contiguous())):
        assert torch.equal(a, b)
    for bad in (images.permute(0, 3, 1, 2).float(), images):
        with pytest.raises(ValueError, match="expected uint8"):
            inception(bad)


def test_loaded_weights_take_effect_after_a_forward(inception, tmp_path):
    state = {name: tensor for name, tensor in inception.state_dict().items() if "num_batches" not in name}
    images, expected = golden_images()[:1], inception(golden_images()[:1])
    for legacy in (True, False):  # the published file has PyTorch's format from before 1.6
        torch.save(state, tmp_path / "inception.pth", _use_new_zipfile_serialization=not legacy)
        for a, b in zip(fid.Inception(tmp_path / "inception.pth")(images), expected):
            assert torch.equal(a, b)
    network = fid.Inception()
    assert not torch.allclose(network(images)[0], expected[0], rtol=0.1)
    network.load_state_dict(inception.state_dict())
    assert torch.equal(network(images)[0], expected[0])
    network.Mixed_7c.branch1x1.bn.running_mean.add_(1)
    assert not torch.equal(network(images)[0], expected[0])
    torch.save({**state, "fc.bias": torch.zeros(3)}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match=r"fc.bias is \(3,\) where \(1008,\) is expected"):
        fid.Inception(tmp_path / "inception.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        sample.load_file(tmp_path / "list.pth")


def test_random_inception_is_reproducible_and_draws_nothing_global():
    torch.manual_seed(1)
    first = inception_of("random").state_dict()
    torch.manual_seed(2)
    second = fid.Inception("random").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    pool, spatial, logits = inception_of("random")(golden_images())
    assert all(0.01 < x.std() < 10 and (x[0] - x[1]).abs().max() > 0 for x in (pool, spatial, logits))


def test_inception_is_in_full_precision_whatever_the_caller_does(inception):
    seen = []
    hook = inception.Mixed_6d.register_forward_pre_hook(lambda *_: seen.append(
        (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)))
    before, expected = torch.backends.cuda.matmul.fp32_precision, inception(golden_images()[:1])
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = inception(golden_images()[:1])
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        hook.remove()
    assert seen == 2 * [("ieee", "ieee")]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(outputs, expected))


def gaussian(seed, n, count, scale=1.0):
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((count, n)) @ rng.standard_normal((n, n))
    return scale * x.mean(0), scale**2 * np.cov(x, rowvar=False)


@pytest.mark.parametrize("count1, count2", [(500, 500), (500, 11), (11, 500), (11, 17)])
def test_frechet_distance_is_the_matrix_root_one(count1, count2):
    (mu1, sigma1), (mu2, sigma2) = gaussian(0, 24, count1), gaussian(5, 24, count2)
    root1 = scipy.linalg.sqrtm(sigma1 + 0j)
    root = scipy.linalg.sqrtm(root1 @ sigma2 @ root1 + 1e-13 * np.eye(24))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root).real
    assert fid.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)
    assert fid.frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_in_closed_form():
    a, b = np.random.RandomState(0).rand(2, 30) * np.logspace(0, -9, 30)  # eigenvalues over nine decades
    turn = np.linalg.qr(np.random.RandomState(1).standard_normal((30, 30)))[0]
    distance = fid.frechet_distance(np.zeros(30), turn * a @ turn.T, np.ones(30), turn * b @ turn.T)
    assert distance == pytest.approx(30 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)
    assert fid.frechet_distance([0.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(9 + 1)
    zero = np.zeros((3, 3))
    assert fid.frechet_distance(np.zeros(3), zero, np.ones(3), zero) == 3
    assert fid.frechet_distance(np.zeros(3), zero, np.zeros(3), np.eye(3)) == pytest.approx(3)
    assert np.isnan(fid.frechet_distance(np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("count", [2, 10, 40, 1000])
@pytest.mark.parametrize("decades", [0, 4, 8])
def test_frechet_distance_of_identical_sets_is_zero(count, decades):
    x = np.random.RandomState(count).standard_normal((count, 40)) * np.logspace(0, -decades, 40) * 30
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) < 1e-9 * np.trace(sigma)


def test_frechet_distance_refuses_other_shapes():
    with pytest.raises(ValueError, match="do not fit together"):
        fid.frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="do not fit together"):
        fid.frechet_distance(np.zeros(3), np.eye(4), np.zeros(3), np.eye(3))


def test_streamed_moments_are_the_whole_ones():
    x = np.random.RandomState(0).standard_normal((101, 13)) * 0.1 + 50  # an offset 500 times the spread
    sums = torch.zeros(14, 14, dtype=torch.float64)
    for part in np.split(x, [1, 8, 64, 100]):
        fid.add_moments(sums, torch.from_numpy(part))
    mean, covariance = fid.mean_and_covariance(sums)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-9)


def score_slowly(logits, split):
    scores = []
    for i in range(0, len(logits), split):
        p = np.exp(logits[i:i + split] - logits[i:i + split].max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        marginal = p.mean(0)
        divergence = sum(p[j, c] * math.log(p[j, c] / marginal[c]) for j, c in np.ndindex(p.shape) if p[j, c] > 0)
        scores.append(math.exp(divergence / len(p)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("count, split", [(40, 10), (43, 10), (7, 10), (10, 1)])
def test_inception_score(count, split):
    logits = np.random.RandomState(count).standard_normal((count, 12)) * 3 + 1000  # the offset overflows a plain exp
    assert fid.inception_score(logits, split) == pytest.approx(score_slowly(logits, split), rel=1e-9, abs=1e-12)
    sums = torch.zeros(math.ceil(count / split), 14, dtype=torch.float64)
    for first in range(0, count, 3):
        fid.add_scores(sums, torch.from_numpy(logits[first:first + 3]), first, split)
    assert fid.score_mean_and_spread(sums) == pytest.approx(fid.inception_score(logits, split), rel=1e-12, abs=1e-12)


def test_inception_score_limits():
    sure = np.eye(10) * 1e4
    assert fid.inception_score(sure) == pytest.approx((10, 0))  # as many as there are classes
    assert fid.inception_score(sure[:1].repeat(5, 0)) == pytest.approx((1, 0))  # classes of probability 0
    assert fid.inception_score(np.ones((10, 10))) == pytest.approx((1, 0))
    assert fid.inception_score(np.concatenate([sure, np.ones((2, 10))]), split=10) == pytest.approx((5.5, 4.5))


def inside_slowly(points, centres, k):
    """Share of the points inside the ball of any centre up to its k-th neighbour among the centres."""
    count = 0
    for point in points:
        for i, centre in enumerate(centres):
            radius = sorted(((centre - other) ** 2).sum() for j, other in enumerate(centres) if j != i)[k - 1]
            if ((point - centre) ** 2).sum() <= radius:
                count += 1
                break
    return count / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_precision_and_recall(k, dtype):
    rng = np.random.RandomState(k)
    real, fake = rng.standard_normal((40, 5)), 0.9 * rng.standard_normal((31, 5)) + 1.1
    expected = inside_slowly(fake, real, k), inside_slowly(real, fake, k)
    assert 0.2 < min(expected) and max(expected) < 1 and expected[0] != expected[1]
    assert fid.precision_recall(real.astype(dtype), fake.astype(dtype), k) == expected
    offset = 300  # its square swamps the distances in float32
    assert fid.precision_recall((real + offset).astype(dtype), (fake + offset).astype(dtype), k) == expected


def test_precision_and_recall_by_blocks():
    rng = np.random.RandomState(0)
    real, fake = rng.standard_normal((7000, 3)), rng.standard_normal((6001, 3)) * 2  # two blocks of 4,793 rows at most
    radii = [np.partition(scipy.spatial.distance.cdist(x, x, "sqeuclidean"), 3)[:, 3] for x in (real, fake)]
    distances = scipy.spatial.distance.cdist(fake, real, "sqeuclidean")
    expected = (distances <= radii[0]).any(1).mean(), (distances <= radii[1][:, None]).any(0).mean()
    assert fid.precision_recall(real, fake) == expected


def test_precision_and_recall_at_the_limits():
    x = np.random.RandomState(0).standard_normal((20, 4)).astype(np.float32)
    assert fid.precision_recall(x, x) == (1, 1)
    assert fid.precision_recall(x, x + 100) == (0, 0)
    assert fid.precision_recall(np.repeat(x, 5, 0), np.repeat(x, 5, 0)) == (1, 1)  # every radius is zero
    assert fid.precision_recall(np.repeat(x, 5, 0), x + 1e-2) == (0, 1)
    assert fid.precision_recall(np.ones((9, 4)) * 0.1, np.ones((7, 4)) * 0.1) == (1, 1)  # constant images
    copies = np.random.RandomState(1).rand(60, 2048).astype(np.float32)
    assert fid.precision_recall(np.repeat(copies, 5, 0), np.repeat(copies[7:], 4, 0)) == (1, 53 / 60)
    rng = np.random.RandomState(0)
    real, fake = rng.randint(0, 3, (90, 9)), rng.randint(0, 3, (70, 9))  # many ties, broken by rounding after the shift
    expected = inside_slowly(fake, real, 3), inside_slowly(real, fake, 3)
    assert min(expected) < 1
    for dtype in (np.float32, np.float64):
        assert fid.precision_recall((real + 0.1).astype(dtype), (fake + 0.1).astype(dtype)) == expected
    grid = np.stack(np.meshgrid(range(4), range(4)), -1).reshape(-1, 2) + 0.1
    assert fid.precision_recall(grid, grid + [0, 1], k=1) == (1, 1)  # all ties: every distance is a radius
    with pytest.raises(ValueError, match="more than 3 rows"):
        fid.precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="equal width"):
        fid.precision_recall(x, x[:, :3])


def test_command_line_on_folders_archives_and_statistics(sides, tmp_path, capsys):
    run_fid(sides / "a", sides / "b", "--save", tmp_path / "stats.npz")
    captured = capsys.readouterr()
    folders = json.loads(captured.out.splitlines()[-1])
    assert "NOT an FID" in captured.out and "14 images" in captured.err and "compare only at equal" in captured.err
    assert list(folders) == ["FID", "sFID", "IS", "IS spread", "precision", "recall"]
    with np.load(sides / "a.npz") as a, np.load(sides / "b.npz") as b:  # by the library, in one piece
        order = [np.argsort([i % 3 for i in range(len(x))], kind="stable") for x in (a["arr_0"], b["arr_0"])]
        images = [torch.from_numpy(x["arr_0"][i]).permute(0, 3, 1, 2) for x, i in zip((a, b), order)]
    (pool1, spatial1, logits), (pool2, spatial2, _) = map(inception_of("random"), images)
    pools, spatials = [x.double().numpy() for x in (pool1, pool2)], [x.double().numpy() for x in (spatial1, spatial2)]
    statistics = [(x.mean(0), np.cov(x, rowvar=False)) for x in (*pools, *spatials)]
    assert folders["FID"] == pytest.approx(fid.frechet_distance(*statistics[0], *statistics[1]), rel=1e-5)
    assert folders["sFID"] == pytest.approx(fid.frechet_distance(*statistics[2], *statistics[3]), rel=1e-5)
    assert folders["IS"] == pytest.approx(fid.inception_score(logits.double().numpy())[0], rel=1e-6)
    assert (folders["precision"], folders["recall"]) == fid.precision_recall(pools[1], pools[0])

    run_fid(sides / "a.npz", tmp_path / "stats.npz")
    captured = capsys.readouterr()
    saved = json.loads(captured.out.splitlines()[-1])
    assert all(saved[name] == pytest.approx(folders[name], rel=1e-5) for name in ("FID", "sFID", "IS"))
    assert saved["precision"] is None and "precision        n/a: both sides need 4" in captured.out

    # archives like ADM's: statistics win over images for FID, a missing pair is computed, images serve the rest
    with np.load(tmp_path / "stats.npz") as stats, np.load(sides / "b.npz") as b:
        np.savez_compressed(tmp_path / "both.npz", arr_0=b["arr_0"], mu=stats["mu"] + 1, sigma=stats["sigma"])
        np.savez(tmp_path / "mu.npz", mu=stats["mu"], sigma=stats["sigma"])
    run_fid(sides / "a.npz", tmp_path / "both.npz")
    both = last_line(capsys)
    assert both["FID"] > 1000 and both["sFID"] == pytest.approx(folders["sFID"], rel=1e-5)
    assert both["precision"] == folders["precision"]
    run_fid(tmp_path / "mu.npz", tmp_path / "both.npz")
    captured = capsys.readouterr()
    only = json.loads(captured.out.splitlines()[-1])
    assert only["FID"] == pytest.approx(2048, rel=1e-9) and only["sFID"] is only["IS"] is only["recall"] is None
    assert re.search(r"sFID +n/a: .*mu.npz holds neither images nor mu_s and sigma_s", captured.out)
    assert re.search(r"IS +n/a: .*mu.npz holds no images", captured.out)


def test_two_ranks_give_the_result_of_one(sides, capsys):
    run_fid(sides / "a", sides / "b.npz")
    one = last_line(capsys)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--weights", "random", "--device", "cpu", "--batch", "4"]
    done = subprocess.run([*launch, fid.__file__, sides / "a", sides / "b.npz", *flags], timeout=300,
                          capture_output=True, text=True, cwd=Path(fid.__file__).parent)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    assert two == pytest.approx(one, rel=1e-6)
    assert done.stdout.count("NOT an FID") == 1


def failing(capsys, *args):
    """The one line on stderr with which the command refuses its input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_fid(*args)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "images" not in line or "error:" in line]  # no progress
    assert stopped.value.code == 2 and len(lines) == 1 and not captured.out, captured.err
    return lines[0]


def archive_of(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def npy_header(shape, descr="|u1", order=False):
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_bad_archives_are_one_line_each(sides, tmp_path, capsys):
    good, bad = sides / "b.npz", tmp_path / "bad.npz"
    pixels = bytes(2 * 4 * 4 * 3)
    whole = good.read_bytes()

    def refuses(expected):
        line = failing(capsys, bad, good)
        assert re.search(expected, line) and str(bad) in line

    refuses("there is no folder and no whole .npz")
    bad.write_bytes(whole[:len(whole) // 2])
    refuses("there is no folder and no whole .npz")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255  # met by the reader: the checksum is wrong
    bad.write_bytes(damaged)
    refuses("arr_0 cannot be read .*CRC")
    for shape in ((10**12, 256, 256, 3), (3, 4, 4, 3), (1, 4, 4, 3)):
        archive_of(bad, arr_0=npy_header(shape) + pixels)
        refuses("claims to be uint8 .* but holds 96 bytes")
    archive_of(bad, arr_0=b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((" + pixels)
    refuses("arr_0 cannot be read")
    for array in (np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8),
                  np.zeros((0, 4, 4, 3), np.uint8), np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))):
        np.savez(bad, array)
        refuses("arr_0 is .* expected uint8 images")
    np.savez(bad, np.array([print, 1], dtype=object))  # never unpickled
    refuses("arr_0 claims to be object")
    np.savez(bad, np.zeros((1, 4, 4, 3), np.uint8))
    refuses("neither two images nor mu and sigma")
    np.savez(bad, images=np.zeros((2, 4, 4, 3), np.uint8))
    refuses("neither two images nor mu and sigma, but images")
    nan = np.full(5, np.nan)
    for mu, sigma in ((nan, np.eye(5)), (np.zeros(5), nan * np.eye(5)), (np.zeros((1, 5)), np.eye(5)),
                      (np.zeros(5, int), np.eye(5)), (np.zeros(5), np.zeros(5))):
        np.savez(bad, mu=mu, sigma=sigma)
        refuses(r"should be [12]-D floats")
    archive_of(bad, mu=npy_header((10**9,), "<f8"), sigma=npy_header((10**9, 10**9), "<f8"))
    refuses("mu claims to be float64")
    np.savez(bad, mu=np.zeros(5), sigma=np.eye(5))
    assert "statistics do not fit together: (5,) (5, 5), (2048,)" in failing(capsys, bad, good)
    np.savez(bad, mu=np.zeros(5), sigma=np.eye(4))
    assert "statistics do not fit together: (5,) (4, 4)" in failing(capsys, bad, bad)


def test_bad_folders_and_flags_are_one_line_each(sides, tmp_path, capsys):
    good, folder = sides / "b.npz", tmp_path / "folder"
    folder.mkdir()
    assert "no image files" in failing(capsys, folder, good)
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(folder / name)
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 5, 3)).astype(np.uint8)).save(folder / "c.png")
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:90])
    assert re.search(r"folder/c.png: not a readable image", failing(capsys, folder, good))
    (folder / "c.png").write_text("words")
    assert re.search(r"folder/c.png: not a readable image \(cannot identify", failing(capsys, folder, good))
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(folder / "c.png")
    assert re.search(r"c.png: \(6, 5\) pixels, but \(5, 6\) in .*a.png", failing(capsys, folder, good))
    assert "--batch" in failing(capsys, good, good, "--batch", "0")
    assert "no such device" in failing(capsys, good, good, "--device", "abacus")
    assert "no such file" in failing(capsys, good, good, "--weights", tmp_path / "none.pth")


def test_missing_weights_without_a_network(sides, tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit):
        fid.main([str(sides / "a"), str(sides / "b"), "--device", "cpu"])
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("cannot download https://", "no route to host", str(tmp_path / "checkpoints" / "pt_inc"), "--weights"):
        assert part in line


def test_images_of_any_format(tmp_path):
    array = np.random.RandomState(0).randint(0, 256, (6, 5, 4)).astype(np.uint8)
    rgba = Image.fromarray(array, "RGBA")
    for name, image in (("rgba.png", rgba), ("gray.png", rgba.convert("L")), ("palette.gif", rgba.convert("P")),
                        ("sub/cmyk.jpg", rgba.convert("RGB").convert("CMYK")), ("sub/plain.tiff", rgba.convert("RGB"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.png").write_text("")
    paths = sample.list_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in paths] == sorted(
        ["gray.png", "palette.gif", "rgba.png", os.path.join("sub", "cmyk.jpg"), os.path.join("sub", "plain.tiff")])
    assert all(sample.read_image(path).mode == "RGB" and sample.read_image(path).size == (5, 6) for path in paths)
    assert np.array_equal(np.asarray(sample.read_image(tmp_path / "rgba.png")), array[..., :3])


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(UserError, match="bomb.png: not a readable image .*decompression bomb"):
        sample.read_image(tmp_path / "bomb.png")


# ---------------------------------------------------------------------------------------------------------------------
# Malformed inputs, made from valid ones: each is refused in one line, with exit code 2, and nothing is written

SMALL = "--model SiT-XS/8 --batch 32 --dtype fp32 --disp none --out out "
COMMANDS = {  # in a folder with the files of `valid`
    "train": (train, SMALL + "--data pixels --steps 1"),
    "train on latents": (train, SMALL + "--data moments --steps 1"),
    "resume": (train, SMALL + "--data pixels --steps 4 --resume ckpt.pt"),
    "start from": (train, SMALL + "--data pixels --steps 1 --init ckpt.pt"),
    "cache": (train, "--images images --data out --vae none --size 16 --cache-only"),
    "cache on": (train, "--images images --data begun --vae none --size 16 --cache-only"),
    "cache by": (train, "--images images --data out --vae vae.pt --size 16 --cache-only"),
    "sample": (sample, "--ckpt ckpt.pt --n 4 --steps 1 --dtype fp32 --out out.npz"),
    "sample on": (sample, "--ckpt ckpt.pt --n 4 --steps 1 --dtype fp32 --out made.npz"),
    "sample published": (sample, "--ckpt bare.safetensors --model SiT-XS/8 --n 2 --steps 1 --dtype fp32 --out out"),
    "decode": (sample, "--ckpt latent.pt --n 2 --steps 1 --dtype fp32 --out out.npz"),
    "compare": (fid, "a.npz b.npz --weights random --device cpu --save out.npz"),
    "compare folders": (fid, "images/cat b.npz --weights random --device cpu --save out.npz"),
    "compare statistics": (fid, "mu.npz nu.npz --device cpu --save out.npz"),
    "compare by": (fid, "a.npz b.npz --weights inception.pt --device cpu --save out.npz")}


def written(save, *args, **options):
    """The bytes that `save(file, ...)` writes."""
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


def saved(value, **options):
    return written(lambda file: torch.save(value, file, **options))


def shrink(monkeypatch):
    """A small model, and networks made without the work of initialising them."""
    monkeypatch.setitem(train.MODELS, "SiT-XS/8", dict(hidden_size=16, depth=2, num_heads=2, patch_size=8))
    for layer in (torch.nn.Linear, torch.nn.modules.conv._ConvNd):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    monkeypatch.setattr(sample.VAE, "decode", lambda self, z: z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))
    inception = fid.Inception
    monkeypatch.setattr(fid, "Inception", lambda w=None: inception_of(w) if w == "random" else inception(w))


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder of small inputs of every kind."""
    root = tmp_path_factory.mktemp("valid")
    rng, labels = np.random.default_rng(0), np.arange(16) % 2
    for name, latents, vae in (("pixels", rng.integers(0, 256, (16, 3, 16, 16), np.uint8), "none"),
                               ("moments", rng.normal(size=(16, 2, 8, 8, 8)).astype(np.float16), "vae.pt")):
        (root / name).mkdir()
        np.save(root / name / "latents.npy", latents)
        np.save(root / name / "labels.npy", labels)
        (root / name / "meta.json").write_text(json.dumps(dict(classes=["cat", "dog"], vae=vae)))
    for path in [f"images/{name}/{suffix}.{suffix}" for name in ("cat", "dog") for suffix in ("jpg", "png", "tif")]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(root / path)
    for name in ("mu", "nu"):
        x = rng.normal(size=(9, 5))
        np.savez(root / f"{name}.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
        np.savez(root / f"{'ab'[name == 'nu']}.npz", rng.integers(0, 256, (4, 8, 8, 3), np.uint8))
    with torch.device("meta"):
        networks = {"vae.pt": sample.VAE(), "inception.pt": fid.Inception()}
    for name, network in networks.items():  # large, but not on disk
        torch.save({name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    for name, tensor in network.state_dict().items()}, root / name)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(root)
        for name, channels in (("ckpt.pt", 3), ("latent.pt", 4)):
            config = dict(model="SiT-XS/8", objective="flow", input_size=16, in_channels=channels, num_classes=2,
                          classes=["cat", "dog"], vae="none" if channels == 3 else "vae.pt")
            net = build_model("SiT-XS/8", input_size=16, in_channels=channels, num_classes=2)
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
            net(rn(1, 2, channels, 16, 16), ru(1, 2), torch.tensor([0, 1])).sum().backward()
            optimizer.step()
            torch.save(dict(model=net.state_dict(), ema=net.state_dict(), opt=optimizer.state_dict(), step=3,
                            config=config), name)
        write_safetensors(Path("bare.safetensors"), torch.load("ckpt.pt")["ema"])
        # output that was begun, to go on with
        patch.setattr(sample, "write_npz", mock.Mock(side_effect=KeyboardInterrupt))
        patch.setattr(train.Rows, "write", mock.Mock(side_effect=KeyboardInterrupt))
        for command in ("sample on", "cache on"):
            script, flags = COMMANDS[command]
            with pytest.raises(SystemExit):
                script.main(flags.split())
        Path("made.npz.part/000003.png").unlink()
        Path("made.png").unlink()
    return root


def files(folder):
    return {path.relative_to(folder): path.read_bytes() if path.stat().st_size < 10**7 else path.stat().st_mtime_ns
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_valid_inputs_are_accepted(command, valid, tmp_path, monkeypatch):
    shrink(monkeypatch)
    shutil.copytree(valid, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    script, flags = COMMANDS[command]
    before = files(tmp_path)
    script.main(flags.split())
    assert {path.suffix for path in files(tmp_path).keys() - before.keys()} & {".pt", ".npz", ".npy", ".png"}


# A change is the new bytes, or a function of the old ones; None deletes; (bytes, size) is a sparse file of that size.


def cut(*places):
    return {f"cut at {place}": lambda whole, place=place: whole[:place] for place in places}


def flip(*places):
    return {f"byte {place} flipped": lambda whole, place=place: b"".join(
        (whole[:place], bytes([whole[place] ^ 255]), whole[place:][1:])) for place in places}


def instead(*contents):
    return {f"{content!r:.60}": content if content is None else content.encode("latin1") for content in contents}


def npy(shape=(16, 3, 16, 16), descr="|u1", order=False, size=12288):
    """A header, whatever it says, over so many bytes."""
    return {f"{descr} {shape} {order}"[:60]: npy_header(shape, descr, order) + bytes(size)}


def npy_text(text):
    return {f"header {text:.30}": b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + bytes(12288)}


def arrays(**changes):
    return {name: lambda whole, change=change: written(np.save, change(np.load(io.BytesIO(whole))))
            for name, change in changes.items()}


def archives(**changes):
    return {name: lambda whole, change=change: written(np.savez, **change(dict(np.load(io.BytesIO(whole)))))
            for name, change in changes.items()}


def zipped(method=zipfile.ZIP_STORED, **members):
    def save(file):
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
    return written(save)


def put(at, *values):
    """Each of these values at a place in a checkpoint, the keys on the way separated by "/"."""
    return {f"{at} {' '.join(repr(value).split()):.50}": lambda whole, value=value: altered(whole, at, lambda _: value)
            for value in values}


def without(*places):
    return {f"no {at}": lambda whole, at=at: altered(whole, at, None) for at in places}


def altered(whole, at, change):
    state = parent = torch.load(io.BytesIO(whole))
    *way, last = [int(key) if key.isdecimal() else key for key in at.split("/")]
    for key in way:
        parent = parent[key]
    if change:
        parent[last] = change(parent.get(last))
    else:
        del parent[last]
    return saved(state)


class Runs:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def pickles(*kinds):
    objects = np.array([Runs()] * 16, object)
    return {f"evil {kind}": lambda _, kind=kind: {
        "pickle": lambda: pickle.dumps(Runs()), "text pickle": lambda: pickle.dumps(Runs(), 0),
        "npy": lambda: written(np.save, objects), "npz": lambda: written(np.savez, arr_0=objects, mu=objects),
        "torch": lambda: saved(dict(ema=Runs())), "old torch": lambda: saved(
            dict(ema=Runs()), _use_new_zipfile_serialization=False)}[kind]() for kind in kinds}


def test_a_malicious_file_would_leave_its_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, load in (("pickle", pickle.load), ("text pickle", pickle.load),
                       ("npy", functools.partial(np.load, allow_pickle=True)),
                       ("npz", lambda file: np.load(file, allow_pickle=True)["mu"]),
                       ("torch", functools.partial(torch.load, weights_only=False)),
                       ("old torch", functools.partial(torch.load, weights_only=False))):
        change, = pickles(kind).values()
        load(io.BytesIO(change(b"")))
        Path("owned").unlink()


def png(width, height):
    """A small file that claims any size."""
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\2\0\0\0") + chunk(
        b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def lying(count):
    """An archive of `count` images by the array's header and the archive's directory, but of four by its bytes."""
    whole = zipped(arr_0=npy_header((count, 8, 8, 3)) + bytes(768))
    real, claimed = (size.to_bytes(4, "little") for size in (768 + 128, count * 192 + 128))
    return whole.replace(real + real, real + claimed)


def torchscript(_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written(lambda file: torch.jit.save(torch.jit.script(torch.nn.Identity()), file))


def bomb(whole):
    """A checkpoint's records, and one that is small on disk alone."""
    file = io.BytesIO(whole)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/bomb", bytes(10**7))
    return file.getvalue()


NOT_TEXT, DEEP = ["", "{", "text", "\xff\xfe{\0", "\0" * 200], "[" * 100_000
BIAS, TABLE = "final_layer.linear.bias", "y_embedder.embedding_table.weight"
TENSORS = {  # at a place where 384 floats are expected
    f"{BIAS} {name}": lambda whole, make=make: altered(whole, f"ema/{BIAS}", lambda _: make(torch.ones(384)))
    for name, make in dict(
        short=lambda x: x[1:], long=lambda x: torch.ones(385), flat=lambda x: x[None], scalar=lambda x: x[0],
        empty=lambda x: x[:0], complex=lambda x: x * 1j, integer=lambda x: x.long(), bool=lambda x: x > 0,
        nowhere=lambda x: x.to("meta"), sparse=lambda x: x.to_sparse(), none=lambda x: None, list=lambda x: x.tolist(),
        number=lambda x: 1.0, nested=lambda x: {"data": x}).items()}
WEIGHTS = {**TENSORS, **put("ema", None, 3, "text", [], [ONES := torch.ones(3)], ONES, {}, {1: ONES}, {"a": {}}),
           **put("ema/more", ONES, "text"), **put("ema/5", ONES), **without(f"ema/{BIAS}", "ema/pos_embed"),
           **put("ema/pos_embed", torch.zeros(1, 0, 16), torch.zeros(1, 5, 16), torch.zeros(4, 16), torch.zeros(0)),
           **put("ema/x_embedder.proj.weight", torch.zeros(16, 0, 8, 8), torch.zeros(16), torch.tensor(1.0))}
TABLES = put(f"ema/{TABLE}", torch.zeros(3, 8), torch.zeros(3), torch.tensor(1.0))
NO_WEIGHTS = {**cut(0, 1, 4, 30, 1000, -1000, -1), **flip(0, 2), **instead(*NOT_TEXT),
              **pickles("torch", "old torch", "pickle", "text pickle", "npy", "npz"), "torchscript": torchscript,
              "archive": zipped(a=b"text"), "list": lambda _: saved([ONES]), "tensor": lambda _: saved(ONES),
              "text in torch": lambda _: saved("text"), "list, old": lambda _: saved(
                  [ONES], _use_new_zipfile_serialization=False)}
CONFIGS = {**put("config", 5, [], "text", {"model": "SiT-M/2"}, {"model": ONES}),
           **put("config/model", "SiT-XS/4", "DiT-S/8", "", None, 3, ["SiT-XS/8"], ONES),
           **put("config/input_size", 32, "16", None), **put("config/in_channels", 4),
           **put("config/num_classes", 5, -1, "2")}

MALFORMED_INPUTS = [  # (commands, file, its changes); the error's line names the file, or says the given words
    ("train", "pixels/latents.npy", {
        **cut(0, 5, 6, 7, 8, 9, 10, 60, 127, 128, 129, 500, -1), **flip(0, 5, *range(6, 12), *range(12, 128, 16)),
        **instead(*NOT_TEXT), **pickles("pickle", "text pickle", "npy", "npz", "torch"),
        **npy((-16, 3, 16, 16)), **npy((-16, -3, 16, 16)), **npy((10**12, 3, 16, 16)), **npy((2**63, 3, 16, 16)),
        **npy((2**200, 3, 16, 16)), **npy((17, 3, 16, 16)), **npy((15, 3, 16, 16)), **npy((16, 768)), **npy(()),
        **npy((16, 3, 256)), **npy((16, 3, 8, 32)), **npy((16, 1, 3, 16, 16)), **npy((48, 1, 16, 16)),
        **npy((0, 3, 16, 16)), **npy((16, 3, 0, 0), size=0), **npy((16, 0, 16, 16), size=0),
        **npy((16.0, 3, 16, 16)), **npy("16"), **npy(None), **npy([16, 3, 16, 16]), **npy(((16,), 3, 16, 16)),
        **npy(descr="|O"), **npy(descr="<f2"), **npy(descr=">f2"), **npy(descr="|i1"), **npy(descr="|b1"),
        **npy(descr="|S1"), **npy(descr="<U1"), **npy(descr="|V1"), **npy(descr="|u0"), **npy(descr="nonsense"),
        **npy(descr=""), **npy(descr=7), **npy(descr=[("a", "|u1")]), **npy(descr=[("a", "|O")]), **npy(order="yes"),
        **npy_text("{}"), **npy_text("{'descr': '|u1', 'shape': (16,)}"), **npy_text("("), **npy_text("(" * 9000),
        **npy_text("x" * 20_000), **npy_text("__import__('pathlib').Path('owned').touch()"), **npy_text("a\n b\nc"),
        "with more": lambda whole: whole + b"\0",
        **arrays(floats=np.float32, four_channels=lambda a: a.repeat(2, 1)[:, :4], one_channel=lambda a: a[:, :1])}),
    ("train", "pixels/latents.npy", instead(None), "pixels: no latents.npy there"),
    ("train", "pixels/latents.npy", {
        "sparse": (npy_header((10**9, 3, 16, 16)), 10**9 * 768 + 128),
        **arrays(more=lambda a: a.repeat(2, 0), fewer=lambda a: a[1:])}, "pixels/labels.npy"),
    ("train", "pixels/labels.npy", {
        **cut(0, 8, 100, 128, -8, -1), **flip(3, 9, 30), **instead(None, *NOT_TEXT), **pickles("pickle", "npy", "npz"),
        **npy((16,), "|O", size=128), **npy((-16,), "<i8", size=128), **npy((10**13,), "<i8", size=128),
        "with more": lambda whole: whole + bytes(8),
        "sparse": (npy_header((10**11,), "<i8"), 8 * 10**11 + 128),
        **arrays(out_of_range=lambda a: a + 1, negative=lambda a: a - 2, huge=lambda a: a.astype("u8") + (2**64 - 2),
                 none_left=lambda a: a * 0 - 1, floats=lambda a: a / 1, complex=lambda a: a * 1j, bools=lambda a: a > 0,
                 text=lambda a: a.astype(str), dates=lambda a: a.astype("M8[s]"), column=lambda a: a[:, None],
                 one_hot=lambda a: np.eye(2, dtype=int)[a], fewer=lambda a: a[:-1], more=lambda a: np.resize(a, 17),
                 scalar=lambda a: a[0], records=lambda a: np.zeros(16, [("a", int)]))}),
    ("train", "pixels/meta.json", instead(
        None, *NOT_TEXT, "[]", "null", "3", '"text"', "[[1, 2]]", "[[[], 2]]", "{}", '{"classes": ["cat", "dog"]}',
        '{"vae": "none"}', '{"classes": 2, "vae": "none"}', '{"classes": {"cat": 0, "dog": 1}, "vae": "none"}', DEEP,
        '{"classes": null, "vae": "none"}', '{"classes": [], "vae": "none"}', '{"classes": ["cat"], "vae": null}',
        '{"classes": ["cat", "dog"], "vae": "none"', "9" * 5000, '{"a":' * 100_000)),
    ("train", "pixels/meta.json", instead('{"classes": ["cat", "dog"], "vae": "mse"}'), "latents.npy: .* meta.json"),
    ("train", "pixels/meta.json", instead('{"classes": ["cat"], "vae": "none"}'), "pixels/labels.npy"),
    ("train on latents", "moments/latents.npy", {
        **cut(128, 1000, -2), **pickles("npy"), **npy((16, 2, 8, 8, 8), "<f4", size=65536),
        **arrays(one_view=lambda a: a[:, :1], rank=lambda a: a[:, 0], oblong=lambda a: a[..., 1:],
                 odd=lambda a: a[:, :, 1:], means_alone=lambda a: a[:, :, :4], bytes=lambda a: a.astype(np.uint8),
                 doubles=lambda a: a.astype(float), integers=lambda a: a.view(np.int16))}),
    ("train on latents", "moments/meta.json", instead('{"classes": ["cat", "dog"], "vae": "none"}'),
     "latents.npy: .* meta.json"),
    ("train on latents", "vae.pt", {**cut(0, 3000), **pickles("torch"), **instead(None)}),
    ("sample, resume, start from", "ckpt.pt", NO_WEIGHTS),
    ("sample", "ckpt.pt", {"compressed": bomb}, "ckpt.pt: .* compressed"),
    ("sample, start from", "ckpt.pt", WEIGHTS),
    ("sample", "ckpt.pt", {
        **CONFIGS, **TABLES, **put(f"ema/{TABLE}", torch.zeros(0, 16), torch.zeros(1, 16)), **without("config/model"),
        "bare": lambda whole: saved(torch.load(io.BytesIO(whole))["ema"]),
        **put("config/objective", "rectified", None, 3, "meanflow", ["flow"]), **put("config/vae", 3, ["ema"]),
        **put("config/classes", 5, "cat", ["cat"], ["cat", "dog", "cow"], {"cat": 0, "dog": 1}, [0, 1], [ONES, ONES])}),
    ("resume", "ckpt.pt", {
        **{f"model {name}": change for name, change in put("model", None, [], {}, ONES, {1: ONES}).items()},
        **put(f"model/{BIAS}", None, torch.ones(383), torch.ones(384).to_sparse()), **put("ema", None, [], {}),
        **put(f"ema/{BIAS}", None, torch.ones(383), torch.ones(384, device="meta")), **put("config", 5, None, []),
        **put("config/model", "SiT-XS/4", ["SiT-XS/8"], ONES), **put("config/objective", "diffusion", "meanflow", 3),
        **put("config/num_classes", 5, ONES), **put("config/input_size", 32), **put("config/classes", ["cat"], "cat"),
        **put("config/data", "16 of 3x16x16 (00000000)"), **put("config/lr", 1.0, "fast", ONES),
        **without("model", "ema", "opt", "step", "config", f"model/{BIAS}", "ema/pos_embed")}),
    ("resume", "ckpt.pt", {  # for train.py's load_checkpoint and its loading of the optimiser
        **put("step", "3", -1, 1.5, None, True, [3], ONES),
        **put("opt", None, [], {}, "text", ONES, {"state": {}, "param_groups": []}),
        **without("opt/state", "opt/param_groups", "opt/state/1", "opt/state/3/exp_avg", "opt/state/3/step"),
        **put("opt/state", None, [], {}, {0: ONES}), **put("opt/state/3", None, {}, ONES),
        **put("opt/state/3/exp_avg", None, ONES, 1.0, torch.tensor(1.0), torch.ones(3, 3, device="meta")),
        **put("opt/state/3/exp_avg_sq", ONES, "text"), **put("opt/state/3/step", "text", ONES, None),
        **put("opt/param_groups", None, [], {}, [{}]), **put("opt/param_groups/0/params", [], [0], None),
        **without("opt/param_groups/0/params")}),
    ("start from", "ckpt.pt", TABLES),  # for train.py's initialize
    ("decode", "vae.pt", {
        **cut(0, 3000, -1), **instead(None, *NOT_TEXT), **pickles("torch", "old torch", "pickle", "npz"),
        **without("quant_conv.bias"), **put("quant_conv.bias", ONES, None, {}), **put("more", ONES),
        **put("encoder.mid_block.attentions.0.to_k.weight", ONES, torch.zeros(512, 512, 1, 2)),
        "list": lambda _: saved([ONES]), "empty": lambda _: saved({})}),
    ("cache by", "vae.pt", {**cut(500), **pickles("torch"), **put("decoder.conv_in.bias", ONES)}),
    ("sample published", "bare.safetensors", {
        **{f"header {i}": content for i, content in enumerate(MALFORMED)}, **cut(0, 7, 8, 100, -1), **flip(0, 5, 7, 8),
        "empty": safetensors({}, b""), "other names": safetensors(entry(), bytes(8)),
        **pickles("torch", "pickle"), **instead(None)}),
    ("compare by", "inception.pt", {
        **cut(0, 3000, -1), **instead(None, "text"), **pickles("torch", "old torch", "npz"), **without("fc.bias"),
        **put("fc.bias", ONES, None), **put("more", ONES), "list": lambda _: saved([ONES])}),
    ("compare", "a.npz", {
        **cut(0, 3, 22, 100, -100, -22, -1), **flip(0, 30, 60, 200, 500, -50, -30, -22, -6),
        **instead(None, *NOT_TEXT), **pickles("npz", "npy", "pickle", "torch"), "empty": zipped(),
        **{f"array {name}": zipped(arr_0=content) for name, content in {
            **npy((4, 8, 8, 3), size=767), **npy((4, 8, 8, 3), size=769), **npy((10**12, 256, 256, 3)),
            **npy((2**64, 8, 8, 3)), **npy((4, -8, -8, 3), size=768), **npy((-4, -8, 8, 3), size=768),
            **npy((4, 8, 8, 3), "|O", size=768), **npy((4, 8, 8, 3), "<f4", size=3072), **npy((4, 8, 24), size=768),
            **npy((4, 3, 8, 8), size=768), **npy((0, 8, 8, 3), size=0), **npy((4, 0, 8, 3), size=0),
            **npy((1, 8, 8, 3), size=192), **npy((4, 8, 8, 3), order=True, size=768), **npy((), size=1),
            **npy(None), **npy("4"), **npy((4.0, 8, 8, 3), size=768), **npy((4, 8, 8, 3), 5, size=768),
            **npy_text("{}"), **npy_text("(" * 9000), **npy_text("a\n b\nc"), **instead("", "text")}.items()},
        "claims 5": lying(5),
        **archives(no_images=lambda a: {"images": a["arr_0"]}, half=lambda a: {"mu": np.zeros(5)})}),
    ("compare", "a.npz", {"claims 2 * 10**7": lying(2 * 10**7)}, "a.npz: arr_0 claims to be"),
    ("compare statistics", "mu.npz", {
        **cut(100, -1), **pickles("npz"), **flip(200), **{
            f"array {name}": zipped(mu=npy_header((5,), "<f8") + bytes(40), sigma=content) for name, content in {
                **npy((5, 5), "<f8", size=100), **npy((5, 5), "|O", size=200), **npy((10**9, 10**9), "<f8"),
                **npy((5, 5), "<c16", size=400), **npy((-5, -5), "<f8", size=200)}.items()},
        "bomb": lambda _: zipped(zipfile.ZIP_DEFLATED, mu=npy_header((5,), "<f8") + bytes(40),
                                 sigma=npy_header((5000, 5000), "<f8") + bytes(5000 * 5000 * 8)),
        **archives(nan=lambda a: a | {"mu": a["mu"] * np.nan}, infinite=lambda a: a | {"sigma": a["sigma"] + np.inf},
                   integers=lambda a: a | {"mu": a["mu"].astype(int)}, flat=lambda a: a | {"sigma": a["sigma"].ravel()},
                   row=lambda a: a | {"mu": a["mu"][None]}, empty=lambda a: dict(mu=a["mu"][:0], sigma=np.eye(0)),
                   alone=lambda a: {"mu": a["mu"]})}),
    ("compare statistics", "mu.npz", archives(
        wide=lambda a: a | {"mu": np.zeros(6)}, narrow=lambda a: a | {"sigma": np.eye(4)},
        oblong=lambda a: a | {"sigma": a["sigma"][1:]}), "statistics do not fit together"),
    *(("cache, compare folders", f"images/cat/{suffix}.{suffix}", {
        **{f"cut at {at}": lambda whole, at=at: whole[:int(at * len(whole))] for at in (0, 0.05, 0.2, 0.6, 0.9)},
        **instead(*NOT_TEXT[1:]), **pickles("pickle", "npy"),
        "bomb": written(Image.new("RGB", (300, 300)).save, kind)})
      for suffix, kind in (("jpg", "JPEG"), ("png", "PNG"), ("tif", "TIFF"))),
    ("cache", "images/dog/png.png", {
        **flip(0, 12, 19, 29, 45, 60), "claims 10**5 x 10**5": png(10**5, 10**5), "claims 100 x 100": png(100, 100),
        "no size": png(0, 0), "a JPEG, cut": written(Image.new("RGB", (20, 20)).save, "JPEG")[:300]}),
    ("cache on", "begun/latents.npy.part", {
        **cut(0, 60, 128, -1), **instead(None, "text"), **pickles("npy", "pickle"),
        **arrays(fewer=lambda a: a[1:], floats=np.float32, larger=lambda a: a.repeat(2, 2).repeat(2, 3))}),
    ("cache on", "begun/latents.npy.part.map", {**cut(0, 5, -1), **instead(None)}, "begun/latents.npy.part(: .*|.)map"),
    ("cache on", "begun/latents.npy.part.json", instead(*NOT_TEXT, "[]", DEEP)),
    ("cache on", "begun/latents.npy.part.json", instead(
        '{"size": 32}', '{"size": "16"}', '{"size": null}', '{"vae": ["none"]}'), "latents.npy.part was begun with"),
    ("sample on", "made.npz.part/made_of.json", instead(*NOT_TEXT, "[]", DEEP)),
    ("sample on", "made.npz.part/made_of.json", instead(
        '{"seed": 1}', '{"steps": "1"}', '{"classes": {"0": 1}}'), "made.npz.part was begun with"),
    ("sample on", "made.npz.part/000001.png", {
        **cut(0, 20, 60, -30), **instead("text"), "bomb": png(10**5, 10**5),
        "other size": written(Image.new("RGB", (8, 8)).save, "PNG")})]

BAD_FLAGS = {
    "train": ["--size 7", "--size 1e3", "--lr inf", "--epochs nan", "--micro 0", "--log-every 0", "--ckpt-every -1",
              "--seed 1.5", "--resume nowhere.pt", "--init nowhere.pt", "--objective sde", "--model SiT-XS",
              "--model ../x", "--data a.npz", "--disp hinge --disp-blocks 0", "--disp hinge --disp-blocks 1,,2",
              "--disp-group 3 --disp cosine"],
    "cache": ["--images a.npz", "--images pixels", "--size 0", "--data a.npz", "--vae nowhere.pt"],
    "sample": ["--ckpt images", "--ckpt a.npz", "--n -1", "--n 1e3", "--steps 0", "--batch 0", "--cfg -1", "--cfg nan",
               "--cfg-channels 0", "--cfg-interval 1", "--classes ,", "--classes 0,1,", "--classes -1", "--classes 1.0",
               "--method ddpm", "--seed -1", "--dtype fp16", "--out ckpt.pt", "--nope"],
    "compare": ["--batch 1.5", "--device tpu", "--weights images", "--save nowhere/x.npz", "--nope"]}
MALFORMED_CASES = [
    pytest.param(command, file, change, words[0] if words else re.escape(file), id=f"{command}-{file}-{name}")
    for commands, file, changes, *words in MALFORMED_INPUTS for command in commands.split(", ")
    for name, change in changes.items()] + [
    pytest.param(command, None, flags, "|".join(map(re.escape, flags.split())), id=f"{command}-{flags}")
    for command in BAD_FLAGS for flags in BAD_FLAGS[command]]
REAL = ["train-pixels/latents.npy-cut at 500", "train-pixels/labels.npy-out_of_range", "train---seed 1.5",
        "train on latents-moments/latents.npy-evil npy", "cache-images/dog/png.png-claims 10**5 x 10**5",
        "sample-ckpt.pt-evil torch", "sample-ckpt.pt-config/objective 'rectified'",
        "sample published-bare.safetensors-header 3", "compare-a.npz-array |u1 (1000000000000, 256, 256, 3) False",
        "compare folders-images/cat/jpg.jpg-cut at 0.6"]


def damage(valid, folder, file, change):
    """The command line's further arguments, in a folder with the valid inputs, one of them changed."""
    shutil.copytree(valid, folder, copy_function=os.link, dirs_exist_ok=True)
    if file is None:
        return change.split()
    if callable(change):
        change = change((folder / file).read_bytes())
    (folder / file).unlink()
    if change is not None:
        content, size = change if isinstance(change, tuple) else (change, len(change))
        (folder / file).write_bytes(content)
        os.truncate(folder / file, size)
    return []


def check_refused(script, words, code, out, err, folder, before):
    lines = [line for line in err.splitlines() if not re.match(r"(caching|sampling): [\d,/]+ images", line)]
    assert code == 2 and len(lines) == 1 and re.match(rf"{script.__name__}: error: .", lines[0]), err
    assert re.search(words, lines[0]) and len(lines[0]) < 600 and lines[0].isprintable(), lines[0]
    assert "wrote" not in out
    after = files(folder)
    assert {path: after.get(path) for path in before} == before  # the inputs are untouched, and nothing was run
    made = {path for path in after.keys() - before.keys() if ".part" not in str(path) and path.name != ".lock"}
    assert not made, made


@pytest.mark.parametrize("command, file, change, words", MALFORMED_CASES)
def test_malformed_input(command, file, change, words, valid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, flags = COMMANDS[command]
    flags = [*flags.split(), *damage(valid, tmp_path, file, change)]
    before = files(tmp_path)
    shrink(monkeypatch)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(SystemExit) as stop, warnings.catch_warnings(record=True) as noise:
        script.main(flags)
    assert not noise, noise[0]
    check_refused(script, words, stop.value.code, *capsys.readouterr(), tmp_path, before)


def test_malformed_inputs_of_real_commands(valid, tmp_path):
    cases = {case.id: case.values for case in MALFORMED_CASES}
    assert len(cases) == len(MALFORMED_CASES) >= 200

    def refused(name):
        command, file, change, words = cases[name]
        script, flags = COMMANDS[command]
        folder = tmp_path / str(REAL.index(name))
        flags = [*flags.split(), *damage(valid, folder, file, change)]
        before = files(folder)
        done = subprocess.run([sys.executable, script.__file__, *flags], cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        check_refused(script, words, done.returncode, done.stdout, done.stderr, folder, before)

    with ThreadPoolExecutor(sample.cpu_cores()) as pool:
        list(pool.map(refused, REAL))


# ---------------------------------------------------------------------------------------------------------------------
# Speed: what is computed how often. How fast it is depends on the machine: train.py --bench


def random_latents(n=64, size=8):
    latents = np.random.default_rng(0).random((n, 2, 8, size, size), np.float32).astype(np.float16)
    return train.Data("random latents", latents, np.arange(n) % 10, list(map(str, range(10))), "ema")


def small_trainer(*flags):
    args = train.parse(["--bench", "1", "--model", "SiT-XS/4", "--batch", "8", "--disp-group", "4", *flags])
    data = random_latents()
    trainer = train.Trainer(args, data, 0, 1, torch.device("cpu"))
    return trainer, list(train.batches(data, 0, 3, 8, trainer.mine, 0, trainer.device))


def count_compilations(monkeypatch):
    """Compile without generating code; the length of the list returned is the number of compilations."""
    from torch._dynamo.backends.debugging import aot_eager
    torch._dynamo.reset()
    compiled, compile_module = [], torch.nn.Module.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend=backend))
    return compiled


def test_the_bench_prints_every_row_and_writes_nothing(tmp_path, capsys):
    train.main(["--bench", "1", "--model", "SiT-XS/8", "--batch", "4", "--disp-group", "2", "--dtype", "fp32",
                "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    table = {row[1].strip(): [cell.strip() for cell in row[2:-1]]
             for row in (line.split("|") for line in printed.splitlines() if line.startswith("|"))}
    assert [*table] == ["dispersion", "---", "images/s", "FLOP/s, of a matmul's", "dispersion's share", "step, ms",
                        "- data", "- draws", "- forward", "- dispersion", "- backward", "- optimiser", "- EMA"]
    assert table["dispersion"] == ["none", "infonce, block 2", "infonce, all"]
    numbers = {label: [float(cell.strip("%").replace(",", "")) for cell in cells] for label, cells in table.items()
               if label not in ("dispersion", "---")}
    phases = np.sum([cells for label, cells in numbers.items() if label.startswith("- ")], 0)
    assert np.allclose(phases, numbers["step, ms"], atol=0.1)
    assert np.allclose(numbers["images/s"], 4000 / phases, rtol=0.02) and numbers["dispersion's share"][0] == 0
    assert re.search(r"GFLOP an image .*; matmul .* TFLOP/s; .* peak memory \d", printed)
    assert not (tmp_path / "out").exists()


def test_gradients_of_the_gram_matrix_are_differentiable_too():
    z = rn(1, 4, 6).double().requires_grad_()
    for kind in KINDS:
        assert torch.autograd.gradgradcheck(lambda z: dispersive_loss(z, kind, 0.7, 1.3), z)
        assert torch.autograd.gradgradcheck(lambda z: contrastive_loss(z[:2], z[2:], kind, 0.7, 1.3), z)


def test_attention_in_bf16_on_a_cpu_is_attention():
    q, k, v = rn(1, 3, 2, 4, 9, 16).bfloat16()
    attention = build_model("SiT-XS/8").blocks[0].attn.bfloat16()
    x = rn(2, 2, 9, 256).bfloat16()
    close(attention(x).float().detach(), attention.float()(x.float()).detach(), 0.02)


def test_guidance_is_one_call_of_twice_the_batch_in_buffers_made_once():
    class Recorder(Gaussian):
        def forward(self, x, t, y):
            calls.append((len(x), float(t[0]), t.data_ptr()))
            assert len(x) == len(y) == len(t) and (t == t[0]).all()
            assert len(x) == 2 or (x[:2] == x[2:]).all() and y.tolist() == [0, 1, 2, 2]
            return super().forward(x, t, y)

        def mean(self, y):
            return torch.tensor([-1.0, 2.0, 0.5, 0.0])[y].view(-1, 1, 1, 1)

    calls, noise = [], rn(1, 2, 1, 2, 2)
    kept = noise.clone()
    FlowMatching().sample(Recorder(), noise, torch.tensor([0, 1]), 4, "heun", cfg=2.0, cfg_interval=(0.5, 0.8))
    assert [call[:2] for call in calls] == [(2, 0), (2, 0.25), (2, 0.25), (4, 0.5), (4, 0.5), (4, 0.75), (4, 0.75),
                                            (2, 1)]
    assert len({call[2] for call in calls}) == 1 and torch.equal(noise, kept)


def test_weights_rounded_once_sample_what_autocast_samples():
    net = fill(build_model("SiT-XS/8", input_size=16, num_classes=10)).eval().requires_grad_(False)
    options = dict(shape=(4, 16, 16), labels=torch.arange(3), indices=range(3), seed=0, device=torch.device("cpu"),
                   dtype="bf16", decode=lambda z: z[:, :3] / 4, steps=3, cfg=2.0)
    expected = sample.generate(net, FlowMatching(), **options)
    net.blocks.bfloat16()
    assert torch.equal(sample.generate(net, FlowMatching(), **options), expected) and expected.float().std() > 10


def test_sampling_compiled_is_sampling(trained, tmp_path, monkeypatch):
    compiled = count_compilations(monkeypatch)
    for name, flag in (("a", "--no-compile"), ("b", "--compile")):
        sample.main(["--ckpt", str(trained / "ckpt.pt"), "--n", "3", "--batch", "2", "--steps", "2", "--cfg", "2",
                     "--cfg-interval", "0.3", "1", "--dtype", "fp32", "--out", str(tmp_path / f"{name}.npz"), flag])
        assert bool(compiled) == (name == "b")
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "ab")
    assert abs(a - b).max() <= 1 and len(compiled) <= 3  # one batch, twice it, any other


@pytest.mark.parametrize("flags", [("--disp-blocks", "all", "--micro", "4"), ("--objective", "meanflow")])
def test_one_compilation_serves_all_blocks(flags, monkeypatch):
    compiled = count_compilations(monkeypatch)
    values = []
    for flag in ("--no-compile", "--compile"):
        trainer, steps = small_trainer(*flags, "--dtype", "fp32", flag)
        values.append(torch.stack([trainer.step(*step) for step in steps[:2]]))
    assert len(trainer.net.blocks) == 8 and len(compiled) == 1
    close(values[1], values[0], 1e-5)
    for _ in range(2):
        trainer.validate(*steps[0][1:3])
    assert len(compiled) == 2  # without gradients
    trainer.objective.sample(trainer.ema, rn(1, 2, 4, 8, 8), torch.arange(2), steps=1)
    assert len(compiled) == 2


class NoWaiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a value, and shapes that depend on values."""
    waits = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        assert function.overloadpacket not in self.waits and not masks, f"{function} waits for the device"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("flags", [
    ("--disp-blocks", "all", "--micro", "4", "--grad-clip", "1"), ("--objective", "diffusion", "--disp", "hinge"),
    ("--contrastive", "independent", "--disp", "covariance"), ("--contrastive", "dependent", "--disp", "cosine"),
    ("--objective", "meanflow", "--meanflow-omega", "1.5", "--meanflow-kappa", "0.3")])
def test_a_training_step_never_waits_for_the_device(flags, monkeypatch):
    def wait(tensor, *args):
        raise AssertionError("waits for the device")
    trainer, steps = small_trainer(*flags)
    trainer.step(*steps[0])
    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    with NoWaiting():
        values = trainer.step(*steps[1], with_distance=True)
        for reading in (trainer.check, values[0].item, lambda: values[values > 0]):
            with pytest.raises(AssertionError, match="waits"):
                reading()


def test_full_size_latents_open_at_once_and_are_read_from_the_page_cache(tmp_path):
    """ImageNet's shape, 42 GB, in a sparse file."""
    n = 1281167
    np.lib.format.open_memmap(tmp_path / "latents.npy", "w+", np.float16, (n, 2, 8, 32, 32))
    np.save(tmp_path / "labels.npy", np.arange(n) % 1000)
    (tmp_path / "meta.json").write_text(json.dumps(dict(classes=list(map(str, range(1000))), vae="ema")))
    begin = time.process_time()
    data = train.Data.open(tmp_path)
    assert time.process_time() - begin < 1

    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured on Linux only")
    for step, images, labels in train.batches(data, 0, 24, 64, slice(0, 64), 0, torch.device("cpu")):
        assert images.shape == (64, 8, 32, 32)
        if step == 4:  # the epoch's permutation has been drawn
            before = anonymous()
    assert anonymous() - before < 8  # MB; these batches are 20


def test_help_and_bad_flags_take_little_more_than_importing_torch():
    def seconds(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, cwd=HERE)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    torch_alone = seconds("-c", "import torch")
    for command in (("train.py", "--help"), ("sample.py",), ("fid.py", "--help")):
        assert seconds(*command) < torch_alone + 1
