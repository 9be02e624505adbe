"""FID, sFID, Inception Score, precision and recall of images, as ADM's TensorFlow evaluator computes them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node 8 fid.py samples/ reference/ --save reference.npz

In this file: the Inception network, the metrics on arrays, reading images and statistics, and the command line.
"""
import contextlib
import json
import math
import os
import sys
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import backends, nn

from sample import (Parser, Progress, UserError, atomic, command, cpu_cores, fetch, first_line, list_images, load_file,
                    load_weights, number, read_image, start)

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
PAIRS = {"mu": "sigma", "mu_s": "sigma_s"}  # ADM's names of mean and covariance, of pool and of spatial features
SPLIT = 5000  # images in one split of the Inception Score
MOST_NEIGHBOURS = 100_000  # precision and recall, quadratic in the images, are not attempted beyond

# ---------------------------------------------------------------------------------------------------------------------
# The network


@contextlib.contextmanager
def full_float32(device):
    """Without autocast and without TF32 or bfloat16 inside float32 convolutions and products."""
    knobs = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for knob, precision in zip(knobs, before):
            knob.fp32_precision = precision


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W): output i reads from i * H / size, without half-pixel centres."""
    x = x.contiguous()
    for dim in (2, 3):
        source = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = source.long()
        weight = (source - low).view(-1, *[1] * (3 - dim))
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        x = torch.lerp(x.index_select(dim, low).float(), x.index_select(dim, high).float(), weight)
    return x


class Conv(nn.Module):
    """Convolution, batch norm with its running statistics, ReLU."""

    def __init__(self, channels, out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)
        self.folded = None

    def forward(self, x):
        conv, bn = self.conv, self.bn
        # the batch norm is folded into the convolution on first use, and again after any tensor was changed or moved
        tensors = (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self.folded is None or self.folded[0] != state:
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            # on a CPU, a channels-last weight puts all activations into that layout, which is 1.4 times as fast
            layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
            weight = (conv.weight * scale[:, None, None, None]).contiguous(memory_format=layout)
            self.folded = state, weight, bn.bias - bn.running_mean * scale
        return F.relu_(F.conv2d(x, *self.folded[1:], conv.stride, conv.padding))


class Mixed(nn.Module):
    """An Inception block: branches side by side, their outputs concatenated.

    `branches` maps the end of a branch's name to its convolutions (out, kernel height, width); a list is two of them on
    the same input. "_pool" begins with the pooling. Where that has stride 2, so has every branch's last convolution.
    """

    def __init__(self, channels, pool, branches):
        super().__init__()
        self.branches = []
        for name, steps in branches.items():
            chain, width = [[pool]] if name == "_pool" else [], channels
            for i, step in enumerate(steps, 1):
                reduces = pool.stride == 2 and i == len(steps)
                number = f"_{i}" if len(steps) > 1 else ""
                chain.append([])
                for letter, (out, h, w) in zip("ab", step) if isinstance(step, list) else [("", step)]:
                    conv = Conv(width, out, (h, w), *((2, 0) if reduces else (1, (h // 2, w // 2))))
                    self.add_module(f"branch{name}{number}{letter}", conv)
                    chain[-1].append(conv)
                width = out
            self.branches.append(chain)

    def forward(self, x):
        outputs = []
        for chain in self.branches:
            out = [x]
            for layers in chain:  # two layers side by side only ever end a branch
                out = [layer(out[0]) for layer in layers]
            outputs += out
        return torch.cat(outputs, 1)


def mixed(size, channels, inner=None, pool=None):
    """The blocks that repeat, by the size of their maps; `inner` is the width that varies."""
    branches = {
        35: {"1x1": [(64, 1, 1)], "5x5": [(48, 1, 1), (64, 5, 5)],
             "3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)], "_pool": [(inner, 1, 1)]},
        17: {"1x1": [(192, 1, 1)], "7x7": [(inner, 1, 1), (inner, 1, 7), (192, 7, 1)],
             "7x7dbl": [(inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)],
             "_pool": [(192, 1, 1)]},
        8: {"1x1": [(320, 1, 1)], "3x3": [(384, 1, 1), [(384, 1, 3), (384, 3, 1)]],
            "3x3dbl": [(448, 1, 1), (384, 3, 3), [(384, 1, 3), (384, 3, 1)]], "_pool": [(192, 1, 1)]}}
    return Mixed(channels, pool or nn.AvgPool2d(3, 1, 1, count_include_pad=False), branches[size])


class Inception(nn.Module):
    """The Inception-v3 of FID (TensorFlow's graph of 2015-12-05), with the keys of pytorch-fid's port of its weights.

    `weights`: None is an untrained network, "random" one of a fixed seed, else the path of a weights file (UserError if
    it is unreadable or does not fit). `forward` takes uint8 images (B, 3, H, W) of any size and returns, as ADM's
    evaluator (guided-diffusion, evaluations/evaluator.py) reads them from the graph, always in float32:
      pool     (B, 2048)  pool_3, for FID, precision and recall
      spatial  (B, 2023)  7 channels of Mixed_6d.branch1x1, 17 x 17 x 7 flattened in that order, for sFID
      logits   (B, 1008)  without their bias, for the Inception Score
    """

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.pool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.pool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = mixed(35, 192, 32)
        self.Mixed_5c = mixed(35, 256, 64)
        self.Mixed_5d = mixed(35, 288, 64)
        self.Mixed_6a = Mixed(288, nn.MaxPool2d(3, 2), {
            "3x3": [(384, 3, 3)], "3x3dbl": [(64, 1, 1), (96, 3, 3), (96, 3, 3)], "_pool": []})
        self.Mixed_6b = mixed(17, 768, 128)
        self.Mixed_6c = mixed(17, 768, 160)
        self.Mixed_6d = mixed(17, 768, 160)
        self.Mixed_6e = mixed(17, 768, 192)
        self.Mixed_7a = Mixed(768, nn.MaxPool2d(3, 2), {
            "3x3": [(192, 1, 1), (320, 3, 3)],
            "7x7x3": [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)], "_pool": []})
        self.Mixed_7b = mixed(8, 1280)
        self.Mixed_7c = mixed(8, 2048, pool=nn.MaxPool2d(3, 1, 1))  # a slip in the graph that FID is defined by
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)
        if weights == "random":
            generator = torch.Generator().manual_seed(0)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.kaiming_normal_(parameter, generator=generator)
            nn.init.zeros_(self.fc.bias)
        elif weights is not None:
            counters = {name: t for name, t in self.state_dict().items() if name.endswith("num_batches_tracked")}
            load_weights(self, {**counters, **load_file(weights)}, weights)  # a file may lack the counters

    @torch.inference_mode()
    def forward(self, x):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected uint8 images (B, 3, H, W), not {x.dtype} {tuple(x.shape)}")
        *layers, fc = self.children()
        with full_float32(x.device):
            x = ((resize_tf1(x) - 128) / 128).to(fc.weight.dtype)
            for layer in layers:
                x = layer(x)
                if layer is self.Mixed_6d:  # whose first channels are branch1x1's
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            pool = x.mean((2, 3))
            return pool, spatial, pool @ fc.weight.T


# ---------------------------------------------------------------------------------------------------------------------
# The metrics


def square_root(sigma):
    """R with R R^T = sigma and as many columns as the numerical rank: LAPACK's pivoted Cholesky factorisation, which
    stops at pivots below D * eps * the largest variance."""
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the squared distance of two Gaussians, in float64.

    mu: (D,), sigma: (D, D), symmetric, of any rank; UserError, a ValueError, for other shapes. With sigma = R R^T, the
    root's trace is the sum of the singular values of R1^T R2, roots of symmetric eigenvalues; 0 for equal arguments.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not 2 * mu1.shape == sigma1.shape == sigma2.shape:
        raise UserError(f"statistics do not fit together: {mu1.shape} {sigma1.shape}, {mu2.shape} {sigma2.shape}")
    product = square_root(sigma1).T @ square_root(sigma2)
    if product.shape[0] < product.shape[1]:
        product = product.T
    squares = np.linalg.eigvalsh(product.T @ product)  # pivoting has graded it: the small ones keep their digits
    root_trace = np.sqrt(squares.clip(min=0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
    return float(max(distance, 0.0))  # in this order, which lets a NaN through


def add_moments(sums, x):
    """Add features x (B, D) to the float64 sums (1 + D, 1 + D) of [1, x]^T [1, x]: the count, the sum, the products."""
    x = F.pad(x.to(sums.device).double(), (1, 0), value=1.0)
    sums.addmm_(x.T, x)


def mean_and_covariance(sums):
    """Sums of `add_moments` -> mean (D,) and unbiased covariance (D, D), float64 NumPy arrays."""
    sums = sums.cpu().numpy()
    count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    return mean, (sums[1:, 1:] - count * np.outer(mean, mean)) / (count - 1)


def add_scores(sums, logits, first, split):
    """Add logits (B, C) of images first, first + 1, ... to every split's float64 sums (2 + C) of 1, p log p and p."""
    log_p = logits.to(sums.device).double().log_softmax(1)
    p = log_p.exp()
    rows = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], 1)
    sums.index_add_(0, torch.arange(first, first + len(p), device=sums.device) // split, rows)


def score_mean_and_spread(sums):
    count, p_log_p, p = sums.cpu().split([1, 1, sums.shape[1] - 2], 1)
    scores = (p_log_p[:, 0] / count[:, 0] - torch.special.xlogy(p / count, p / count).sum(1)).exp()
    return scores.mean().item(), scores.std(unbiased=False).item()


def inception_score(logits, split=SPLIT):
    """Inception Score of logits (N, C) -> (mean, spread) of exp(mean KL(p(y|x) | p(y))) over consecutive splits of
    `split` images, a short last one counting equally (ADM's evaluator); the spread is their standard deviation."""
    logits = torch.as_tensor(logits)
    sums = torch.zeros(math.ceil(len(logits) / split), 2 + logits.shape[1], dtype=torch.float64)
    add_scores(sums, logits, 0, split)
    return score_mean_and_spread(sums)


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of features (N, D) and (M, D), arrays
    or tensors on one device -> (precision, recall): the share of fake points no farther from some real point than that
    one is from its k-th neighbour in its own set, itself not counted; and the same with the sets exchanged.

    Computed in the features' precision but at least float32 (ADM's evaluator: float16), by blocks of at most 2^25
    distances; ties within rounding count as inside. ValueError if the widths differ or a set has no k-th neighbour.
    """
    real, fake = (torch.as_tensor(features) for features in (real, fake))
    real, fake = (features.to(torch.promote_types(features.dtype, torch.float32)) for features in (real, fake))
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) <= k:
        raise ValueError(f"expected more than {k} rows of equal width, not {tuple(real.shape)}, {tuple(fake.shape)}")
    real, fake = real - real.mean(0), fake - real.mean(0)  # a common offset would cost the distances digits
    rows = max(1, 2**25 // max(len(real), len(fake)))

    def squared_distances(x, y, slack=0.0):
        norms = x.square().sum(1)[:, None] + y.square().sum(1)
        return torch.addmm(norms * (1 - slack), x, y.T, alpha=-2)

    def radii(x):
        blocks = []
        for i in range(0, len(x), rows):
            distances = squared_distances(x[i:i + rows], x)
            distances.diagonal(i).fill_(math.inf)
            blocks.append(distances.topk(k, largest=False).values[:, -1])
        return torch.cat(blocks)

    with full_float32(real.device):
        real_radii, fake_radii = radii(real), radii(fake)
        slack = 32 * torch.finfo(real.dtype).eps
        precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
        for i in range(0, len(fake), rows):
            distances = squared_distances(fake[i:i + rows], real, slack)
            precise += (distances <= real_radii).any(1).sum().item()
            recalled |= (distances <= fake_radii[i:i + rows, None]).any(0)
    return precise / len(fake), recalled.double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Images and statistics


@contextlib.contextmanager
def open_array(path, name):
    """Open an array of an .npz archive, nothing unpickled -> (file at its data, shape, dtype, order). UserError for
    damage met here or in the block, and for a header that claims another size than the archive holds."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            major, _ = np.lib.format.read_magic(file)
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(file)
            held = archive.getinfo(f"{name}.npy").file_size - file.tell()
            # zip's compression makes at most 1032 bytes of one
            if dtype.hasobject or not math.prod(shape) * dtype.itemsize == held <= 1032 * os.path.getsize(path):
                raise UserError(f"{path}: {name} claims to be {dtype} {shape} but holds {held:,} bytes")
            yield file, shape, dtype, "F" if fortran else "C"
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise whatever the damage causes
        raise UserError(f"{path}: {name} cannot be read ({first_line(error)})") from None


class Side:
    """One of the two sets, from a folder or an .npz archive: `count` images (0: none) of `size` (height, width), and
    `statistics` under ADM's names, each mean with its covariance."""

    def __init__(self, path):
        self.path, self.paths, self.count, self.statistics, names = path, [], 0, {}, []
        if os.path.isdir(path):
            self.paths = list_images(path)
            self.count, self.size = len(self.paths), read_image(self.paths[0]).size[::-1]
        else:
            try:
                names = sorted(name.removesuffix(".npy") for name in zipfile.ZipFile(path).namelist())
            except Exception:  # as above
                raise UserError(f"{path}: there is no folder and no whole .npz archive of this name") from None
        if "arr_0" in names:
            with open_array(path, "arr_0") as (_, shape, dtype, order):
                if dtype != np.uint8 or order != "C" or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
                    raise UserError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 images (N, H, W, 3) in C order")
            self.count, self.size = shape[0], shape[1:3]
        for mu, sigma in PAIRS.items():
            if mu in names and sigma in names:
                self.statistics |= {mu: self.read_statistic(mu, 1), sigma: self.read_statistic(sigma, 2)}
        if self.count < 2 and not self.statistics:
            raise UserError(f"{path}: holds neither two images nor mu and sigma, but {', '.join(names) or 'one image'}")

    def read_statistic(self, name, dimensions):
        with open_array(self.path, name) as (file, shape, dtype, order):
            fits = dtype.kind == "f" and len(shape) == dimensions and 0 < min(shape) <= max(shape) <= 4096
            array = np.frombuffer(file.read() if fits else b"", dtype)
        if not fits or not np.isfinite(array).all():
            raise UserError(f"{self.path}: {name}, {dtype} {shape}, should be {dimensions}-D floats with no NaN or inf")
        return array.reshape(shape, order=order)

    def read_folder(self, ranges):
        """Yield the images first ... last - 1 of each range, uint8 (B, H, W, 3)."""
        for first, last in ranges:
            images = [read_image(path) for path in self.paths[first:last]]
            for path, image in zip(self.paths[first:last], images):
                if image.size[::-1] != self.size:
                    raise UserError(f"{path}: {image.size} pixels, but {self.size[::-1]} in {self.paths[0]}")
            yield np.stack(images)

    def read_archive(self, ranges):
        with open_array(self.path, "arr_0") as (file, *_):
            begin, size = file.tell(), 3 * math.prod(self.size)
            for first, last in ranges:
                file.seek(begin + first * size)
                yield np.ndarray((last - first, *self.size, 3), np.uint8, bytearray(file.read((last - first) * size)))


class Batches(torch.utils.data.IterableDataset):
    """A side's images by batches for a DataLoader, whose workers take turns."""

    def __init__(self, side, ranges):
        self.side, self.ranges = side, ranges

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        read = self.side.read_folder if self.side.paths else self.side.read_archive
        try:
            yield from read(self.ranges[worker.id::worker.num_workers])
        except UserError as error:
            yield error  # as a value: raised, the loader would wrap it in a traceback


@torch.inference_mode()
def measure(side, network, batch, rank, world, keep_features):
    """Run a side's images through the network, split over the ranks -> statistics as in `Side`, (mean, spread) of the
    Inception Score, pool features (N, 2048) if they are to be kept."""
    device = network.fc.weight.device
    exact = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}  # MPS has no float64
    moments = {mu: torch.zeros(1 + width, 1 + width, **exact) for mu, width in (("mu", 2048), ("mu_s", 2023))}
    scores = torch.zeros(math.ceil(side.count / SPLIT), 2 + 1008, **exact)
    kept = torch.zeros(side.count if keep_features else 0, 2048, device=device)

    firsts = range(0, side.count, batch)  # ranks take whole batches: the batches are the same for any number of ranks
    firsts = firsts[rank * len(firsts) // world:(rank + 1) * len(firsts) // world]
    ranges = [(first, min(first + batch, side.count)) for first in firsts]
    # image files are decoded on every core; an archive is read from front to back, so by one worker
    workers = min(cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(ranges)) if side.paths else 1
    loader = torch.utils.data.DataLoader(Batches(side, ranges), batch_size=None, num_workers=max(1, workers),
                                         pin_memory=device.type == "cuda")
    progress = Progress(f"{side.path}, rank 0 of {world}" if world > 1 else side.path,
                        sum(last - first for first, last in ranges), quiet=rank > 0)
    for (first, last), images in zip(ranges, loader):
        if isinstance(images, UserError):
            raise images
        pool, spatial, logits = network(images.to(device, non_blocking=True).permute(0, 3, 1, 2))
        add_moments(moments["mu"], pool)
        add_moments(moments["mu_s"], spatial)
        add_scores(scores, logits, first, SPLIT)
        if keep_features:
            kept[first:last] = pool
        progress.update(last - first)

    if world > 1:
        for tensor in (*moments.values(), scores, kept):
            dist.all_reduce(tensor)
    statistics = {}
    for mu, sigma in PAIRS.items():
        statistics[mu], statistics[sigma] = mean_and_covariance(moments[mu])
    return statistics, score_mean_and_spread(scores), kept


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@command
def main(argv=None):
    parser = Parser(prog="fid.py", description=__doc__)
    parser.add_argument("samples", help="folder of images of one size (nested, any format), or .npz with images arr_0 "
                        "(uint8, NHWC), with statistics mu, sigma, mu_s, sigma_s, or with both")
    parser.add_argument("reference", help="likewise; statistics it holds serve FID and sFID, its images all else")
    parser.add_argument("--weights", metavar="FILE", help="Inception weights (default: torch's hub cache, else a "
                        "download); 'random': a network of a fixed seed, to try the pipeline")
    parser.add_argument("--save", metavar="FILE", help="keep the reference's statistics in this .npz for next time")
    parser.add_argument("--batch", type=number(int, 1), default=64, help="images a forward pass and rank (default 64)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args(argv)
    if args.save and not os.path.isdir(os.path.dirname(args.save) or "."):
        raise UserError(f"--save {args.save}: there is no such folder")
    rank, world, device = start(args.device)
    samples, reference = sides = Side(args.samples), Side(args.reference)

    neighbours = all(3 < side.count <= MOST_NEIGHBOURS for side in sides)
    network, scores, features = None, {}, {}
    for side in sides:
        lacks = not PAIRS.keys() <= side.statistics.keys()
        if not side.count or side is reference and not (lacks or neighbours):
            continue
        network = network or Inception(args.weights or fetch(URL, "--weights", "6726825d")).to(device)
        statistics, scores[side], features[side] = measure(side, network, args.batch, rank, world, neighbours)
        if lacks and side.count < 50_000 and not rank:
            print(f"warning: {side.path} has {side.count:,} images: FID and sFID come out too high with fewer than the "
                  "usual 50,000, far too high with fewer than the 2,048 dimensions, and compare only at equal numbers",
                  file=sys.stderr)
        side.statistics = statistics | side.statistics
    if rank:
        return

    results = {}
    for name, mu in (("FID", "mu"), ("sFID", "mu_s")):
        lacking = [side.path for side in sides if mu not in side.statistics]
        results[name] = (f"{lacking[0]} holds neither images nor {mu} and {PAIRS[mu]}" if lacking else frechet_distance(
            *(side.statistics[key] for side in sides for key in (mu, PAIRS[mu]))))
    if args.save:
        with atomic(args.save) as file:
            np.savez(file, **reference.statistics)
    results["IS"], results["IS spread"] = scores.get(samples, 2 * [f"{samples.path} holds no images"])
    results["precision"], results["recall"] = (
        precision_recall(features[reference], features[samples]) if neighbours else
        2 * [f"both sides need 4 to {MOST_NEIGHBOURS:,} images, they have {samples.count:,} and {reference.count:,}"])
    if network and args.weights == "random":
        print("NOT an FID: the network's weights are random, so these numbers only compare such runs with each other")
    for name, value in results.items():
        print(f"{name:<9} {value:10.4f}" if isinstance(value, float) else f"{name:<9}        n/a: {value}")
    print(json.dumps({name: value if isinstance(value, float) else None for name, value in results.items()}))


if __name__ == "__main__":
    main()
