"""FID, sFID, Inception Score, precision and recall, as ADM's TensorFlow evaluator computes them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python fid.py samples.npz my_images --size 256
    torchrun --nproc_per_node=8 fid.py samples reference --save reference.npz
"""
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
from torch import nn

from sample import (Parser, Progress, UserError, atomic, center_crop, fetch, list_images, load_file,
                    load_weights, number, one_line_errors, open_array, read_image, run, start)

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
STATISTICS = {"FID": ("mu", "sigma"), "sFID": ("mu_s", "sigma_s")}  # ADM's names of mean, covariance
NEEDS = {  # the metrics, in the order of printing, and what they are computed from
    "FID": "images or mu and sigma on both sides",
    "sFID": "images or mu_s and sigma_s on both sides",
    "IS": "images as samples", "IS spread": "images as samples",
    "precision": "4 to 100,000 images on both sides", "recall": "4 to 100,000 images on both sides"}

# ----------------------------------------
# The network

def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W): pixel i is read at i * H / size."""
    for _ in range(2):
        x = x.mT  # the height is last in the first round, the width in the second
        source = torch.arange(size, device=x.device) * (x.shape[-1] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[-1] - 1)
        x = torch.lerp(x[..., low].float(), x[..., high].float(), source - low)
    return x

class Conv(nn.Module):
    """Convolution, batch norm, ReLU. With stride 1 the map keeps its size (if padded)."""

    def __init__(self, channels, out, height, width, stride=1, padded=True):
        super().__init__()
        padding = (height // 2, width // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return self.bn(self.conv(x)).relu_()

MEAN_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
HALVE = nn.MaxPool2d(3, stride=2)
# The kinds of blocks, their branches, and the convolutions of each: (end of the name, channels out,
# kernel height, kernel width). None is a width in which blocks of a kind differ. The branch
# "_pool" begins with a pool. Where a branch forks, "a" and "b" read the same map.
BLOCKS = {
    "35 x 35": {
        "1x1": [("", 64, 1, 1)],
        "5x5": [("_1", 48, 1, 1), ("_2", 64, 5, 5)],
        "3x3dbl": [("_1", 64, 1, 1), ("_2", 96, 3, 3), ("_3", 96, 3, 3)],
        "_pool": [("", None, 1, 1)]},
    "35 to 17": {
        "3x3": [("", 384, 3, 3)],
        "3x3dbl": [("_1", 64, 1, 1), ("_2", 96, 3, 3), ("_3", 96, 3, 3)],
        "_pool": []},
    "17 x 17": {
        "1x1": [("", 192, 1, 1)],
        "7x7": [("_1", None, 1, 1), ("_2", None, 1, 7), ("_3", 192, 7, 1)],
        "7x7dbl": [("_1", None, 1, 1), ("_2", None, 7, 1), ("_3", None, 1, 7), ("_4", None, 7, 1), ("_5", 192, 1, 7)],
        "_pool": [("", 192, 1, 1)]},
    "17 to 8": {
        "3x3": [("_1", 192, 1, 1), ("_2", 320, 3, 3)],
        "7x7x3": [("_1", 192, 1, 1), ("_2", 192, 1, 7), ("_3", 192, 7, 1), ("_4", 192, 3, 3)],
        "_pool": []},
    "8 x 8": {
        "1x1": [("", 320, 1, 1)],
        "3x3": [("_1", 384, 1, 1), ("_2a", 384, 1, 3), ("_2b", 384, 3, 1)],
        "3x3dbl": [("_1", 448, 1, 1), ("_2", 384, 3, 3), ("_3a", 384, 1, 3), ("_3b", 384, 3, 1)],
        "_pool": [("", 192, 1, 1)]}}

class Mixed(nn.Module):
    """An Inception block: the branches of BLOCKS[kind], whose outputs are concatenated.
    If its pool halves the map, so does the last convolution of each branch."""

    def __init__(self, kind, channels, width=None, pool=MEAN_POOL):
        super().__init__()
        self.pool = pool
        self.branches = {}
        for branch, layers in BLOCKS[kind].items():
            self.branches[branch] = {}
            inputs = channels
            for name, outputs, kernel_height, kernel_width in layers:
                outputs = outputs or width
                stride = 2 if pool is HALVE and name == layers[-1][0] else 1
                conv = Conv(inputs, outputs, kernel_height, kernel_width, stride)
                self.add_module(f"branch{branch}{name}", conv)
                self.branches[branch][name] = conv
                inputs = outputs

    def forward(self, x):
        outputs = []
        for branch, convs in self.branches.items():
            h = self.pool(x) if branch == "_pool" else x
            for name, conv in convs.items():
                if name.endswith("a"):
                    outputs.append(conv(h))  # "b" reads the same h
                else:
                    h = conv(h)
            outputs.append(h)
        return torch.cat(outputs, dim=1)

class Inception(nn.Module):
    """FID's Inception-v3 (TensorFlow's graph of 2015-12-05), with the keys of pytorch-fid's port.

    weights: None is an untrained network, "random" one of a fixed seed, else a file's path (with a
    UserError if it does not fit). `forward` takes uint8 images (B, 3, H, W) of any size and returns
    what ADM's evaluator (evaluations/evaluator.py of guided-diffusion) reads, in float32:
      pool     (B, 2048)  pool_3, for FID, precision and recall
      spatial  (B, 2023)  7 channels of Mixed_6d.branch1x1, flattened as 17 x 17 x 7, for sFID
      logits   (B, 1008)  without their bias, for the Inception Score
    """

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 3)
        self.pool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 3, padded=False)
        self.pool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = Mixed("35 x 35", 192, width=32)
        self.Mixed_5c = Mixed("35 x 35", 256, width=64)
        self.Mixed_5d = Mixed("35 x 35", 288, width=64)
        self.Mixed_6a = Mixed("35 to 17", 288, pool=HALVE)
        self.Mixed_6b = Mixed("17 x 17", 768, width=128)
        self.Mixed_6c = Mixed("17 x 17", 768, width=160)
        self.Mixed_6d = Mixed("17 x 17", 768, width=160)
        self.Mixed_6e = Mixed("17 x 17", 768, width=192)
        self.Mixed_7a = Mixed("17 to 8", 768, pool=HALVE)
        self.Mixed_7b = Mixed("8 x 8", 1280)
        self.Mixed_7c = Mixed("8 x 8", 2048, pool=nn.MaxPool2d(3, stride=1, padding=1))  # FID takes the largest
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)
        if weights == "random":
            generator = torch.Generator().manual_seed(0)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.kaiming_normal_(parameter, generator=generator)
            nn.init.zeros_(self.fc.bias)
        elif weights is not None:
            state = load_file(weights)
            for name, tensor in self.state_dict().items():
                if name.endswith("num_batches_tracked"):  # files may lack it, and it plays no part
                    state.setdefault(name, tensor)
            load_weights(self, state, weights)

    @torch.inference_mode()
    def forward(self, x):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected uint8 images (B, 3, H, W), not {x.dtype} {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = (resize_tf1(x) - 128) / 128
            if x.device.type == "cpu":
                x = x.contiguous(memory_format=torch.channels_last)  # 1.4 times as fast on CPUs
            for layer in list(self.children())[:-1]:  # in the order above, without fc
                x = layer(x)
                if layer is self.Mixed_6d:
                    spatial = x[:, :7]  # (B, 7, 17, 17); branch1x1 has the first 192 channels
            pool = x.mean((2, 3))  # (B, 2048)
            return pool, spatial.permute(0, 2, 3, 1).flatten(1), pool @ self.fc.weight.T

# ----------------------------------------
# The metrics

def square_root(sigma):
    """R (D, rank) with R R^T = sigma, by LAPACK's pivoted Cholesky factorisation."""
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    return np.tril(factor)[np.argsort(pivots), :rank]

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared distance of Gaussians, |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).
    mu (D,); sigma (D, D), symmetric, of any rank. UserError, a ValueError, for other shapes."""
    mu1, sigma1 = np.asarray(mu1, np.float64), np.asarray(sigma1, np.float64)
    mu2, sigma2 = np.asarray(mu2, np.float64), np.asarray(sigma2, np.float64)
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not 2 * mu1.shape == sigma1.shape == sigma2.shape:
        raise UserError(f"statistics do not fit together: {mu1.shape} {sigma1.shape}, {mu2.shape} {sigma2.shape}")
    # With sigma = R R^T, the eigenvalues of sigma1 sigma2 are the squares of the singular values of
    # R1^T R2. So the trace of its root is the sum of those singular values: the nuclear norm.
    trace_of_root = np.linalg.norm(square_root(sigma1).T @ square_root(sigma2), "nuc")
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return float(np.maximum(distance, 0))

def add_moments(sums, x):
    """Add features x (B, D) to the float64 sums (1 + D, 1 + D) of [1, x]^T [1, x]."""
    x = nn.functional.pad(x.to(sums.device).double(), (1, 0), value=1.0)
    sums.addmm_(x.T, x)

def mean_and_covariance(sums):
    """Sums of `add_moments` -> mean (D,) and unbiased covariance (D, D), float64 NumPy arrays."""
    sums = sums.cpu().numpy()
    count = sums[0, 0]
    mean = sums[0, 1:] / count
    return mean, (sums[1:, 1:] - count * np.outer(mean, mean)) / (count - 1)

def inception_score(logits, split=5000):
    """Inception Score of logits (N, C): mean and standard deviation of exp(mean KL(p(y|x) | p(y)))
    over consecutive splits of `split` images, a short last one counting equally (as in ADM)."""
    scores = []
    for some in torch.as_tensor(logits).cpu().split(split):
        p = some.double().softmax(1)
        mean_kl = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()  # entr: -p log p
        scores.append(mean_kl.exp().item())
    return float(np.mean(scores)), float(np.std(scores))

def squared_distances(x, y, slack=0.0):
    """|x - y|^2 (N, M) of points x (N, D) and y (M, D), less slack * (|x|^2 + |y|^2)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm((1 - slack) * squares, x, y.T, alpha=-2)

def share_inside(points, centres, k):
    """The share of points no farther from some centre than its k-th neighbour among the centres."""
    rows = max(1, 2**25 // max(len(points), len(centres)))  # so by blocks of 2^25 distances
    radii = []
    for some in centres.split(rows):
        nearest = squared_distances(some, centres).topk(k + 1, largest=False).values
        radii.append(nearest[:, -1])  # the first of the k + 1 is the centre itself
    radii = torch.cat(radii)  # squared, (M,)
    slack = 32 * torch.finfo(points.dtype).eps  # puts ties within rounding below the radii
    inside = 0
    for some in points.split(rows):
        distances = squared_distances(some, centres, slack)  # (rows, M)
        inside += (distances <= radii).any(1).sum().item()
    return inside / len(points)

def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), as a pair.

    real (N, D), fake (M, D): features, arrays or tensors on one device. Precision is the share of
    fake points no farther from some real point than that one is from its k-th real neighbour, not
    counting itself; recall is the same with the sets exchanged. Ties within rounding count. Computed
    in at least float32 (ADM: float16). ValueError if widths differ or a set has no k-th neighbour.
    """
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:] or min(len(real), len(fake)) <= k:
        raise ValueError(f"expected more than {k} rows of equal width, not {tuple(real.shape)}, {tuple(fake.shape)}")
    centre = real.float().mean(0)  # a common offset would cost the distances digits
    real, fake = real - centre, fake - centre  # float32 or float64
    return share_inside(fake, real, k), share_inside(real, fake, k)

# ----------------------------------------
# Images and statistics. A side is a Folder, Pixels or an Archive. It has `count` images (perhaps 0)
# of `size` (width, height), of which `read(first, last)` gives some as uint8 (B, 3, height, width);
# and `statistics`, a dict of arrays under ADM's names.

class Folder:
    """A folder of image files, cropped to `crop` x `crop` as in training, or else of one size."""

    def __init__(self, path, crop):
        self.path, self.crop, self.statistics = path, crop, {}
        self.files = list_images(path)
        self.count = len(self.files)
        self.size = self.image(self.files[0]).size

    def image(self, file):
        image = read_image(file)
        return center_crop(image, self.crop) if self.crop else image

    def read(self, first, last):
        images = []
        for file in self.files[first:last]:
            image = self.image(file)
            if image.size != self.size:
                raise UserError(f"{file}: {image.size} pixels, but {self.size} in {self.files[0]} (--size N crops all)")
            images.append(np.asarray(image))
        return np.stack(images).transpose(0, 3, 1, 2)

class Pixels:
    """A --data folder of train.py that holds pixels; rows with label -1 are left out."""

    def __init__(self, path):
        self.path, self.statistics = path, {}
        self.pixels = pixels = open_array(f"{path}/latents.npy")
        labels = open_array(f"{path}/labels.npy")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or labels.shape != pixels.shape[:1]:
            raise UserError(f"{path}: latents.npy holds {pixels.dtype} {pixels.shape}, not pixels, "
                            "uint8 (N, 3, H, W), or labels.npy is of another length")
        self.rows = np.flatnonzero(labels >= 0)
        self.count, self.size = len(self.rows), (pixels.shape[3], pixels.shape[2])

    def read(self, first, last):
        return self.pixels[self.rows[first:last]]

class Archive:
    """An .npz file with images arr_0 (uint8, NHWC), with statistics, or with both; never unpickled.
    The images are read in order, since np.load would hold all of arr_0 in memory."""

    def __init__(self, path):
        self.path, self.statistics, self.count, self.size = path, {}, 0, None
        with one_line_errors(path, "folder or .npz archive"), np.lib.npyio.NpzFile(path) as archive:
            for mu, sigma in STATISTICS.values():
                if mu in archive and sigma in archive:
                    self.statistics[mu] = np.asarray_chkfinite(archive[mu], np.float64)
                    self.statistics[sigma] = np.asarray_chkfinite(archive[sigma], np.float64)
            if "arr_0" in archive:
                self.file = archive.zip.open("arr_0.npy")
                np.lib.format.read_magic(self.file)
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self.file)
                if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
                    raise ValueError(f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3) in C order")
                self.begin = self.file.tell()  # of the first image
                self.count, self.size = shape[0], (shape[2], shape[1])

    def read(self, first, last):
        width, height = self.size
        with one_line_errors(self.path, "folder or .npz archive"):
            self.file.seek(self.begin + first * height * width * 3)
            content = bytearray(self.file.read((last - first) * height * width * 3))
            return np.frombuffer(content, np.uint8).reshape(last - first, height, width, 3).transpose(0, 3, 1, 2)

def open_side(path, crop):
    if os.path.exists(f"{path}/latents.npy"):
        return Pixels(path)
    return Folder(path, crop) if os.path.isdir(path) else Archive(path)

def read_ahead(side, batches):
    """Yield side.read(first, last) of every batch in order, while threads read the next ones."""
    threads = 16 if isinstance(side, Folder) else 1  # an archive has to be read in order
    with ThreadPoolExecutor(threads) as pool:
        coming = []
        for first, last in batches:
            coming.append(pool.submit(side.read, first, last))
            if len(coming) > threads:
                yield coming.pop(0).result()
        for future in coming:
            yield future.result()

@torch.inference_mode()
def measure(side, network, batch_size, rank, world, keep_pool, keep_logits):
    """Run a side's images through the network, split over the ranks -> statistics by ADM's names,
    pool features (N, 2048) and logits (N, 1008), without rows where they are not to be kept."""
    device = network.fc.weight.device
    sums_device = "cpu" if device.type == "mps" else device  # MPS has no float64
    pool_sums = torch.zeros(2049, 2049, dtype=torch.float64, device=sums_device)
    spatial_sums = torch.zeros(2024, 2024, dtype=torch.float64, device=sums_device)
    pools = torch.zeros(side.count if keep_pool else 0, 2048, device=device)
    logits = torch.zeros(side.count if keep_logits else 0, 1008, device=device)
    # a rank takes whole batches, so that they are the same for any number of ranks
    batches = [(first, min(first + batch_size, side.count)) for first in range(0, side.count, batch_size)]
    batches = batches[rank * len(batches) // world:(rank + 1) * len(batches) // world]
    progress = Progress(side.path, side.count, quiet=rank > 0)
    for (first, last), images in zip(batches, read_ahead(side, batches)):
        pool, spatial, logit = network(torch.from_numpy(images).to(device))
        add_moments(pool_sums, pool)
        add_moments(spatial_sums, spatial)
        if keep_pool:
            pools[first:last] = pool
        if keep_logits:
            logits[first:last] = logit
        progress.update((last - first) * world)
    if world > 1:
        for tensor in (pool_sums, spatial_sums, pools, logits):
            dist.all_reduce(tensor)
    mu, sigma = mean_and_covariance(pool_sums)
    mu_s, sigma_s = mean_and_covariance(spatial_sums)
    return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s), pools, logits

# ----------------------------------------
# The command line

def parse_flags(argv):
    parser = Parser(prog="fid.py", description=__doc__)
    flag = parser.add_argument
    flag("samples", help="folder of images, --data folder of pixels, or .npz with images arr_0 (uint8, "
         "NHWC), statistics mu, sigma, mu_s, sigma_s, or both")
    flag("reference", help="likewise; its statistics serve FID and sFID, its images all else")
    flag("--size", type=number(int, 1), metavar="N", help="crop folders of images as training does")
    flag("--weights", metavar="FILE", help="of Inception (default: downloaded); 'random' for a trial")
    flag("--save", metavar="FILE", help="keep the reference's statistics in this new .npz for next time")
    flag("--batch", type=number(int, 1), default=64, help="images a forward pass and rank (64)")
    flag("--device", choices=["cpu"], help="compute there even if there is a GPU")
    return parser.parse_args(argv)

def main(argv=None):
    args = parse_flags(argv)
    rank, world, device = start(args.device)
    if args.save and rank == 0:
        with one_line_errors(f"--save {args.save}"):  # before the work: can a new file be made there?
            open(args.save, "xb").close()
            os.remove(args.save)
    samples, reference = open_side(args.samples, args.size), open_side(args.reference, args.size)
    for side in (samples, reference):
        if side.count == 1 or not (side.count or side.statistics):
            raise UserError(f"{side.path}: expected two images or more, or statistics, found {side.count} images")
        if rank == 0 and 0 < side.count < 50_000 and len(side.statistics) < 4:
            print(f"warning: {side.path}: with only {side.count:,} images, FID and sFID are too high", file=sys.stderr)
    if rank == 0 and samples.count and reference.count and samples.size != reference.size:
        print(f"warning: images of {samples.size} pixels are compared with images of {reference.size}", file=sys.stderr)
    comparable = all(3 < side.count <= 100_000 for side in (samples, reference))  # the cost of precision is quadratic
    weights = None
    if samples.count or reference.count:
        weights = args.weights or fetch(URL, "--weights", "6726825d")
        network = Inception(weights).to(device)
    for side in (samples, reference):
        if side.count:
            measured, side.pools, side.logits = measure(
                side, network, args.batch, rank, world, keep_pool=comparable, keep_logits=side is samples)
            side.statistics = measured | side.statistics  # those of a file win
    if rank > 0:
        return

    results = dict.fromkeys(NEEDS)  # None: it cannot be computed
    for name, (mu, sigma) in STATISTICS.items():
        if mu in samples.statistics and mu in reference.statistics:
            results[name] = frechet_distance(samples.statistics[mu], samples.statistics[sigma],
                                             reference.statistics[mu], reference.statistics[sigma])
    if samples.count:
        results["IS"], results["IS spread"] = inception_score(samples.logits)
    if comparable:
        results["precision"], results["recall"] = precision_recall(reference.pools, samples.pools)
    if weights == "random":
        print("NOT an FID: the weights are random, so such numbers compare only with each other")
    for name, value in results.items():
        text = f"n/a: needs {NEEDS[name]}" if value is None else f"{value:10.4f}"
        print(f"{name:<9} {text}")
    results["weights"] = weights and os.path.basename(weights)
    print(json.dumps(results), flush=True)
    if args.save:
        if os.path.exists(args.save):  # by now another run may have made it
            raise UserError(f"--save {args.save}: File exists")
        with atomic(args.save) as file:
            np.savez(file, **reference.statistics)

if __name__ == "__main__":
    run(main)
