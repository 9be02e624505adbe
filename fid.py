"""FID, sFID, Inception Score, precision and recall of images, as ADM's TensorFlow evaluator computes them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python fid.py samples.npz my_images --size 256
    torchrun --nproc_per_node=8 fid.py samples reference --save reference.npz
"""
import functools
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
from torch import nn

from sample import (Parser, Progress, UserError, atomic, center_crop, fetch, list_images, load_file, load_weights,
                    number, one_line_errors, open_array, read_image, run, start)

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
PAIRS = ("mu", "sigma"), ("mu_s", "sigma_s")  # ADM's names of mean and covariance, of pool and of spatial features
MOST_NEIGHBOURS = 100_000  # largest set for precision and recall, whose cost is quadratic
NEEDS = {"FID": "images or mu and sigma on both sides", "sFID": "images or mu_s and sigma_s on both sides",
         "IS": "images as samples", "IS spread": "images as samples",
         **dict.fromkeys(["precision", "recall"], f"4 to {MOST_NEIGHBOURS:,} images on both sides")}

# ----------------------------------------
# The network


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W): output i reads from i * H / size, without half-pixel centres."""
    for dim in (2, 3):
        source = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = (source - low).view(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low).float(), x.index_select(dim, high).float(), weight)
    return x


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. With stride 1 the map keeps its size, unless `padded` is False."""

    def __init__(self, channels, out, height, width, stride=1, padded=True):
        super().__init__()
        padding = (height // 2, width // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


MEAN_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
HALVE = nn.MaxPool2d(3, stride=2)
# The convolutions of each kind of block: (name, input, out, kernel height, kernel width[, stride]). The input is the
# block's "x", its "pool", or an earlier convolution; None is the width in which blocks of a kind differ.
BLOCKS = {
    "35 x 35": [
        ("1x1", "x", 64, 1, 1), ("5x5_1", "x", 48, 1, 1), ("5x5_2", "5x5_1", 64, 5, 5), ("3x3dbl_1", "x", 64, 1, 1),
        ("3x3dbl_2", "3x3dbl_1", 96, 3, 3), ("3x3dbl_3", "3x3dbl_2", 96, 3, 3), ("_pool", "pool", None, 1, 1)],
    "35 to 17": [
        ("3x3", "x", 384, 3, 3, 2), ("3x3dbl_1", "x", 64, 1, 1), ("3x3dbl_2", "3x3dbl_1", 96, 3, 3),
        ("3x3dbl_3", "3x3dbl_2", 96, 3, 3, 2)],
    "17 x 17": [
        ("1x1", "x", 192, 1, 1), ("7x7_1", "x", None, 1, 1), ("7x7_2", "7x7_1", None, 1, 7),
        ("7x7_3", "7x7_2", 192, 7, 1), ("7x7dbl_1", "x", None, 1, 1), ("7x7dbl_2", "7x7dbl_1", None, 7, 1),
        ("7x7dbl_3", "7x7dbl_2", None, 1, 7), ("7x7dbl_4", "7x7dbl_3", None, 7, 1),
        ("7x7dbl_5", "7x7dbl_4", 192, 1, 7), ("_pool", "pool", 192, 1, 1)],
    "17 to 8": [
        ("3x3_1", "x", 192, 1, 1), ("3x3_2", "3x3_1", 320, 3, 3, 2), ("7x7x3_1", "x", 192, 1, 1),
        ("7x7x3_2", "7x7x3_1", 192, 1, 7), ("7x7x3_3", "7x7x3_2", 192, 7, 1), ("7x7x3_4", "7x7x3_3", 192, 3, 3, 2)],
    "8 x 8": [
        ("1x1", "x", 320, 1, 1), ("3x3_1", "x", 384, 1, 1), ("3x3_2a", "3x3_1", 384, 1, 3),
        ("3x3_2b", "3x3_1", 384, 3, 1), ("3x3dbl_1", "x", 448, 1, 1), ("3x3dbl_2", "3x3dbl_1", 384, 3, 3),
        ("3x3dbl_3a", "3x3dbl_2", 384, 1, 3), ("3x3dbl_3b", "3x3dbl_2", 384, 3, 1), ("_pool", "pool", 192, 1, 1)]}


class Mixed(nn.Module):
    """An Inception block. Its output is the concatenation of whatever is no convolution's input, the pool last."""

    def __init__(self, kind, channels, pool=MEAN_POOL, width=None):
        super().__init__()
        self.pool, self.layers, widths = pool, BLOCKS[kind], {"x": channels, "pool": channels}
        for name, source, out, *kernel in self.layers:
            widths[name] = out or width
            self.add_module(f"branch{name}", Conv(widths[source], widths[name], *kernel))
        names, sources = zip(*[layer[:2] for layer in self.layers])
        self.outputs = [name for name in (*names, "pool") if name not in sources]

    def forward(self, x):
        maps = {"x": x, "pool": self.pool(x)}
        for name, source, *_ in self.layers:
            maps[name] = getattr(self, f"branch{name}")(maps[source])
        return torch.cat([maps[name] for name in self.outputs], 1)


class Inception(nn.Module):
    """The Inception-v3 of FID (TensorFlow's graph of 2015-12-05), with the keys of pytorch-fid's port of its weights.

    `weights`: None is an untrained network, "random" one of a fixed seed, else the path of a weights file (UserError if
    it is unreadable or does not fit). `forward` takes uint8 images (B, 3, H, W) of any size and returns, in float32,
    what ADM's evaluator (guided-diffusion, evaluations/evaluator.py) reads from the graph:
      pool     (B, 2048)  pool_3, for FID, precision and recall
      spatial  (B, 2023)  7 channels of Mixed_6d.branch1x1, 17 x 17 x 7 flattened in that order, for sFID
      logits   (B, 1008)  without their bias, for the Inception Score
    """

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 3, padded=False)
        self.Mixed_5b = Mixed("35 x 35", 192, width=32)
        self.Mixed_5c = Mixed("35 x 35", 256, width=64)
        self.Mixed_5d = Mixed("35 x 35", 288, width=64)
        self.Mixed_6a = Mixed("35 to 17", 288, HALVE)
        self.Mixed_6b = Mixed("17 x 17", 768, width=128)
        self.Mixed_6c = Mixed("17 x 17", 768, width=160)
        self.Mixed_6d = Mixed("17 x 17", 768, width=160)
        self.Mixed_6e = Mixed("17 x 17", 768, width=192)
        self.Mixed_7a = Mixed("17 to 8", 768, HALVE)
        self.Mixed_7b = Mixed("8 x 8", 1280)
        self.Mixed_7c = Mixed("8 x 8", 2048, nn.MaxPool2d(3, stride=1, padding=1))  # not the mean: FID's graph is so
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)
        if weights == "random":
            generator = torch.Generator().manual_seed(0)
            for weight in [parameter for parameter in self.parameters() if parameter.ndim > 1]:
                nn.init.kaiming_normal_(weight, generator=generator)
            nn.init.zeros_(self.fc.bias)
        elif weights is not None:
            # files may lack the batch norms' counters, which play no part here
            counters = {name: t for name, t in self.state_dict().items() if name.endswith("num_batches_tracked")}
            load_weights(self, {**counters, **load_file(weights)}, weights)

    @torch.inference_mode()
    def forward(self, x):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected uint8 images (B, 3, H, W), not {x.dtype} {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = (resize_tf1(x) - 128) / 128
            if x.device.type == "cpu":
                x = x.contiguous(memory_format=torch.channels_last)  # 1.4 times as fast on CPUs
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # branch1x1 has the first 192 channels
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
            pool = x.mean((2, 3))
            return pool, spatial, pool @ self.fc.weight.T


# ----------------------------------------
# The metrics


def square_root(sigma):
    """R with R R^T = sigma and as many columns as the numerical rank (LAPACK's pivoted Cholesky factorisation)."""
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    return np.tril(factor)[np.argsort(pivots), :rank]


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the squared distance of two Gaussians, in float64.

    mu: (D,), sigma: (D, D), symmetric, of any rank; UserError, a ValueError, for other shapes. 0 for equal arguments.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not 2 * mu1.shape == sigma1.shape == sigma2.shape:
        raise UserError(f"statistics do not fit together: {mu1.shape} {sigma1.shape}, {mu2.shape} {sigma2.shape}")
    # With sigma = R R^T, the eigenvalues of sigma1 sigma2 are the squares of the singular values of R1^T R2. So the
    # trace of its root is the sum of those singular values: the nuclear norm.
    trace_of_root = np.linalg.norm(square_root(sigma1).T @ square_root(sigma2), "nuc")
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return float(np.maximum(distance, 0))


def add_moments(sums, x):
    """Add features x (B, D) to the float64 sums (1 + D, 1 + D) of [1, x]^T [1, x]: the count, the sum, the products."""
    x = F.pad(x.to(sums.device).double(), (1, 0), value=1.0)
    sums.addmm_(x.T, x)


def mean_and_covariance(sums):
    """Sums of `add_moments` -> mean (D,) and unbiased covariance (D, D), float64 NumPy arrays."""
    sums = sums.cpu().numpy()
    count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    return mean, (sums[1:, 1:] - count * np.outer(mean, mean)) / (count - 1)


def inception_score(logits, split=5000):
    """Inception Score of logits (N, C) -> (mean, spread) of exp(mean KL(p(y|x) | p(y))) over consecutive splits of
    `split` images, a short last one counting equally (ADM's evaluator); the spread is their standard deviation."""
    entropy, scores = torch.special.entr, []
    for part in torch.as_tensor(logits).cpu().split(split):
        p = part.double().softmax(1)
        divergence = entropy(p.mean(0)).sum() - entropy(p).sum(1).mean()  # mean KL
        scores.append(divergence.exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) of features (N, D) and (M, D), arrays
    or tensors on one device -> (precision, recall): the share of fake points no farther from some real point than that
    one is from its k-th neighbour in its own set, itself not counted; and the same with the sets exchanged.

    Computed in the features' precision but at least float32 (ADM's evaluator: float16), by blocks of at most 2^25
    distances; ties within rounding count as inside. ValueError if the widths differ or a set has no k-th neighbour.
    """
    real, fake = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in map(torch.as_tensor, (real, fake)))
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) <= k:
        raise ValueError(f"expected more than {k} rows of equal width, not {tuple(real.shape)}, {tuple(fake.shape)}")
    real, fake = real - real.mean(0), fake - real.mean(0)  # a common offset would cost the distances digits
    rows = max(1, 2**25 // max(len(real), len(fake)))

    def squared_distances(x, y, slack=0.0):
        """From some rows of x at a time to all of y; with slack, ties within rounding are below the radii."""
        for part in x.split(rows):
            squares = part.square().sum(1)[:, None] + y.square().sum(1)
            yield torch.addmm((1 - slack) * squares, part, y.T, alpha=-2)

    def squared_radii(x):  # the nearest of the k + 1 points is the point itself
        return torch.cat([block.topk(k + 1, largest=False).values[:, -1] for block in squared_distances(x, x)])

    real_radii, fake_radii = squared_radii(real), squared_radii(fake)
    blocks = squared_distances(fake, real, slack=32 * torch.finfo(real.dtype).eps)
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for block, radii in zip(blocks, fake_radii.split(rows)):
        precise += (block <= real_radii).any(1).sum().item()
        recalled |= (block <= radii[:, None]).any(0)
    return precise / len(fake), recalled.sum().item() / len(real)


# ----------------------------------------
# Images and statistics. A side is a Folder, Pixels or an Archive: `count` images (perhaps 0) of `size` (width, height),
# of which `read(first, last)` gives some as uint8 (B, 3, height, width), and `statistics`, arrays under ADM's names.


class Folder:
    """A folder of image files, cropped to `crop` x `crop` as in training, or else of one size."""

    def __init__(self, path, crop):
        self.path, self.statistics, self.crop, self.size = path, {}, crop, None
        self.files = list_images(path)
        self.count, self.size = len(self.files), self.image(self.files[0]).size

    def image(self, file):
        image = center_crop(read_image(file), self.crop) if self.crop else read_image(file)
        if self.size not in (None, image.size):
            raise UserError(f"{file}: {image.size} pixels, but {self.size} in {self.files[0]} (--size N crops all)")
        return image

    def read(self, first, last):
        return np.stack([self.image(file) for file in self.files[first:last]]).transpose(0, 3, 1, 2)


class Pixels:
    """A --data folder of train.py that holds pixels; rows with label -1 are left out."""

    def __init__(self, path):
        self.path, self.statistics = path, {}
        pixels, labels = open_array(f"{path}/latents.npy"), open_array(f"{path}/labels.npy")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or labels.shape != pixels.shape[:1]:
            raise UserError(f"{path}: latents.npy holds {pixels.dtype} {pixels.shape}, not pixels, uint8 (N, 3, H, W), "
                            "or labels.npy is of another length")
        self.rows = np.flatnonzero(labels >= 0)
        self.count, self.size = len(self.rows), (pixels.shape[3], pixels.shape[2])

    def read(self, first, last):
        return open_array(f"{self.path}/latents.npy")[self.rows[first:last]]


class Archive:
    """An .npz file with images arr_0 (uint8, NHWC), with statistics, or with both; nothing is unpickled. The images are
    read in order, since np.load cannot memory-map an archive and would hold all of arr_0."""

    def __init__(self, path):
        self.path, self.count, self.size, self.file = path, 0, None, None
        with one_line_errors(path, "folder or .npz archive"), np.lib.npyio.NpzFile(path) as archive:
            names = [name for pair in PAIRS if {*pair} <= {*archive.files} for name in pair]
            self.statistics = {name: np.asarray_chkfinite(archive[name], np.float64) for name in names}
            if "arr_0" in archive.files:
                self.open_images().close()

    def open_images(self):
        """Open arr_0 at its first image, and note how many images of which size there are."""
        file = zipfile.ZipFile(self.path).open("arr_0.npy")
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3) in C order")
        self.count, self.size = shape[0], (shape[2], shape[1])
        return file

    def read(self, first, last):
        shape = (last - first, self.size[1], self.size[0], 3)
        with one_line_errors(self.path, "folder or .npz archive"):
            if self.file is None:  # at this rank's first batch
                self.file = self.open_images()
                self.file.seek(first * math.prod(shape[1:]), os.SEEK_CUR)
            content = bytearray(self.file.read(math.prod(shape)))
            return np.frombuffer(content, np.uint8).reshape(shape).transpose(0, 3, 1, 2)


def open_side(path, crop):
    if os.path.exists(f"{path}/latents.npy"):
        return Pixels(path)
    return Folder(path, crop) if os.path.isdir(path) else Archive(path)


def read_batch(side, batch):
    """Runs in the DataLoader's workers. A UserError is returned: raised, the loader would wrap it in a traceback."""
    try:
        return torch.from_numpy(side.read(*batch))
    except UserError as error:
        return error


@torch.inference_mode()
def measure(side, network, batch_size, rank, world):
    """Run a side's images through the network, split over the ranks -> statistics (as the sides' own), pool features
    (N, 2048; none for more than MOST_NEIGHBOURS images) and logits (N, 1008)."""
    device = network.fc.weight.device
    exact = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}  # MPS has no float64
    pool_sums, spatial_sums = torch.zeros(2049, 2049, **exact), torch.zeros(2024, 2024, **exact)
    pools = torch.zeros(side.count if side.count <= MOST_NEIGHBOURS else 0, 2048, device=device)
    logits = torch.zeros(side.count, 1008, device=device)
    # a rank takes whole batches, so that they are the same for any number of ranks
    batches = [(first, min(first + batch_size, side.count)) for first in range(0, side.count, batch_size)]
    batches = batches[rank * len(batches) // world:(rank + 1) * len(batches) // world]
    # image files are decoded on every core; an archive has to be read in order
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # of this job
    cores = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(1, min(cores, len(batches))) if isinstance(side, Folder) else 1
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=functools.partial(read_batch, side),
                                         num_workers=workers)
    progress = Progress(side.path, side.count, quiet=rank > 0)
    for (first, last), images in zip(batches, loader):
        if isinstance(images, UserError):
            raise images
        pool, spatial, logits[first:last] = network(images.to(device))
        add_moments(pool_sums, pool)
        add_moments(spatial_sums, spatial)
        if len(pools):
            pools[first:last] = pool
        progress.update((last - first) * world)

    if world > 1:
        for tensor in (pool_sums, spatial_sums, pools, logits):
            dist.all_reduce(tensor)
    values = *mean_and_covariance(pool_sums), *mean_and_covariance(spatial_sums)
    return dict(zip(["mu", "sigma", "mu_s", "sigma_s"], values)), pools, logits


# ----------------------------------------
# The command line


def main(argv=None):
    parser = Parser(prog="fid.py", description=__doc__)
    parser.add_argument("samples", help="folder of images, --data folder of pixels, or .npz with images arr_0 (uint8, "
                        "NHWC), statistics mu, sigma, mu_s, sigma_s, or both")
    parser.add_argument("reference", help="likewise; its statistics serve FID and sFID, its images all else")
    parser.add_argument("--size", type=number(int, 1), metavar="N", help="crop folders of images as training does")
    parser.add_argument("--weights", metavar="FILE", help="of Inception (default: downloaded); 'random' for a trial")
    parser.add_argument("--save", metavar="FILE", help="keep the reference's statistics in this new .npz for next time")
    parser.add_argument("--batch", type=number(int, 1), default=64, help="images a forward pass and rank (64)")
    parser.add_argument("--device", choices=["cpu"], help="compute there even if there is a GPU")
    args = parser.parse_args(argv)
    rank, world, device = start(args.device)
    if args.save and rank == 0:
        with one_line_errors(f"--save {args.save}"):  # before the work: is it a new file in a place that can be written?
            open(args.save, "xb").close()
            os.remove(args.save)
    samples, reference = sides = [open_side(path, args.size) for path in (args.samples, args.reference)]
    for side in sides:
        if side.count == 1 or not (side.count or side.statistics):
            raise UserError(f"{side.path}: expected two images or more, or statistics, found {side.count} images")
    if rank == 0 and samples.count and reference.count and samples.size != reference.size:
        print(f"warning: images of {samples.size} pixels are compared with images of {reference.size}", file=sys.stderr)
    weights, pools, logits = None, {}, {}
    for side in [side for side in sides if side.count]:
        if rank == 0 and side.count < 50_000 and len(side.statistics) < 4:
            print(f"warning: {side.path}: with only {side.count:,} images, FID and sFID are too high", file=sys.stderr)
        if weights is None:
            weights = args.weights or fetch(URL, "--weights", "6726825d")
            network = Inception(weights).to(device)
        measured, pools[side], logits[side] = measure(side, network, args.batch, rank, world)
        side.statistics = measured | side.statistics
    if rank:
        return

    results = dict.fromkeys(NEEDS)
    for name, pair in zip(["FID", "sFID"], PAIRS):
        if all(pair[0] in side.statistics for side in sides):
            results[name] = frechet_distance(*(side.statistics[key] for side in sides for key in pair))
    if samples.count:
        results["IS"], results["IS spread"] = inception_score(logits[samples])
    if all(3 < side.count <= MOST_NEIGHBOURS for side in sides):
        results["precision"], results["recall"] = precision_recall(pools[reference], pools[samples])
    if weights == "random":
        print("NOT an FID: the weights are random, so such numbers compare only with each other")
    for name, value in results.items():
        print(f"{name:<9}", f"n/a: needs {NEEDS[name]}" if value is None else f"{value:10.4f}")
    print(json.dumps({**results, "weights": weights and os.path.basename(weights)}), flush=True)
    if args.save:
        if os.path.exists(args.save):  # by now another run may have made it
            raise UserError(f"--save {args.save}: File exists")
        with atomic(args.save) as file:
            np.savez(file, **reference.statistics)


if __name__ == "__main__":
    run(main)
