"""Sample images from a checkpoint of one's own or a published DiT or SiT file.

    python sample.py --ckpt out/ckpt.pt --out samples
    torchrun --nproc_per_node=8 sample.py --ckpt out/ckpt.pt --num-samples 50000 --out samples.npz
    python sample.py --ckpt SiT-XL-2-256x256.pt --model SiT-XL/2 --cfg 4 --vae ema --classes 207,360,387,974 --n 8

In this file: the helpers that the three command lines share (errors, ranks, progress, files, weights), Stable
Diffusion's VAE, and sampling. Sample i depends on --seed and i alone, whatever the batch size and the number of ranks.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from dispersive import MODELS, FlowMatching, GaussianDiffusion, MeanFlow, build_model

PATIENCE = datetime.timedelta(hours=12)  # of ranks for each other, as when one saves; torchrun sees to dead ranks
OBJECTIVES = {"flow": FlowMatching, "diffusion": GaussianDiffusion, "meanflow": MeanFlow}

# ---------------------------------------------------------------------------------------------------------------------
# Shared by the command lines


class UserError(ValueError):
    """Something the user can mend, said in one line."""


def first_line(error):
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch.load prints in colours
    return (text.splitlines() or [type(error).__name__])[0][:200]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose help keeps the examples' line breaks."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def command(main):
    """Decorator of a `main(argv=None)`: bad input and failing files end in one line on stderr and exit code 2."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        except (UserError, OSError) as error:
            line, code = f"{main.__module__.replace('__main__', Path(sys.argv[0]).stem)}: error: {error}", 2
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(5 + rank)  # torchrun stops every rank when one exits: the lowest rank in trouble speaks
        print(" ".join(line.split()), file=sys.stderr, flush=True)
        sys.exit(code)
    return wrapped


def start(device=None):
    """Pick CUDA, else MPS, else CPU, and join torchrun's process group -> (rank, number of ranks, device)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: no such device (cpu, cuda or mps)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine")
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        if local_world > torch.cuda.device_count():
            raise UserError(f"--nproc_per_node {local_world}: this machine has {torch.cuda.device_count()} GPUs")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type == "cpu" and local_world > 1:  # torchrun gives each rank one thread
        torch.set_num_threads(max(1, cpu_cores() // local_world))
    if "RANK" not in os.environ:
        return 0, 1, device
    if not dist.is_initialized():
        gpu = device.type == "cuda"
        # torchrun keeps one store for all its attempts: a restarted rank would read where the dead ones had listened
        # (PyTorch issue 135712). Nodes count attempts each for itself: for several, see --max-restarts in the README
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("GROUP_WORLD_SIZE") == "1" else None
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None, timeout=PATIENCE,
                                rank=rank, world_size=world, store=dist.PrefixStore(attempt or "0", store))
    return dist.get_rank(), dist.get_world_size(), device


def default_dtype(device):
    """bf16 where the hardware multiplies it, else fp32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def compile_blocks(net, wanted, device):
    """torch.compile every block by itself, by default on GPUs -> whether it was done.

    One compilation serves all blocks, and DistributedDataParallel exchanges gradients while backward goes on.
    """
    compiled = device.type == "cuda" if wanted is None else wanted
    if compiled:
        torch._dynamo.config.optimize_ddp = False  # it would cut each block where a bucket of gradients ends
        for block in net.blocks:
            block.compile(dynamic=False)
    return compiled


def number(kind, low, high=math.inf):
    """argparse type: an int or a float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == math.inf:
            limits = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} {limits}, got {text!r}")
        return value
    return parse


def cpu_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def clock(seconds):
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Count work done: a line that refreshes itself on a terminal, a plain line every 20 seconds in a log."""

    def __init__(self, what, total, unit="images", quiet=False):
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.done, self.begin, self.live = 0, time.time(), sys.stderr.isatty()
        self.shown = self.begin

    def update(self, n):
        self.done = min(self.total, self.done + n)
        now, last = time.time(), self.done >= self.total
        if self.quiet or not (last or now - self.shown > (0.2 if self.live else 20)):
            return
        self.shown = now
        rate = self.done / max(now - self.begin, 1e-9)
        left = "done in " + clock(now - self.begin) if last else clock((self.total - self.done) / rate) + " left"
        line = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {left}"
        end = "" if self.live and not last else "\n"
        print(f"\r{line:<79}" if self.live else line, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def atomic(path):
    """Open a temporary file that replaces `path`, flushed to disk, when the block ends without an error."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        disk = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the disk's error
        if isinstance(disk, OSError):
            raise UserError(f"{path}: cannot be written ({disk.strerror}); what was there before is whole") from None
        raise


def lock(folder):
    """Keep other processes out of a folder until this one ends, however it ends, or the returned file is closed."""
    file = open(Path(folder) / ".lock", "w")
    try:
        import fcntl  # not on Windows
    except ImportError:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is writing there") from None
    return file


def fetch(url, flag, sha256=None, name=None):
    """Path of a published file in torch's hub cache; downloaded once per node, its SHA-256 (or a prefix) checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[-1])
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise UserError(f"cannot download {url} ({error}): put the file at {path}, "
                            f"or name it with {flag} FILE") from None
    barrier()
    return path


def load_file(path):
    """The dict in a torch or .safetensors file, on the CPU, memory-mapped; a pickle that would run code is refused."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path)
    try:
        zipped = zipfile.is_zipfile(path)  # files from before torch 1.6 are no zip archives and cannot be mapped
        if zipped and sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()) > os.path.getsize(path):
            raise ValueError("its records are compressed, which torch's are not")
        # the published training code keeps its flags in a Namespace; torch.load warns of what it then refuses
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not a dict of tensors")
        json.dumps(state.get("config"))  # of plain values, which can be compared
    except pickle.UnpicklingError:  # torch's message tells how to run it nevertheless
        raise UserError(f"{path}: not a readable weights file (its pickle is damaged or would run code)") from None
    except Exception as error:  # torch.load raises whatever the damage causes
        raise UserError(f"{path}: not a readable weights file ({first_line(error)})") from None
    check_state(weights_in(state), path)
    return state


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                      "BOOL": torch.bool}


def load_safetensors(path):
    """{name: tensor} of a .safetensors file, memory-mapped; UserError where it breaks huggingface/safetensors' format.

    The format: the header's length (8 bytes, little-endian), the header (JSON, {name: {dtype, shape, data_offsets}}),
    and the tensors' bytes, which the offsets must divide without gap or overlap.
    """
    size, tensors, done = os.path.getsize(path), {}, 0
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"{length:,} bytes of header in a file of {size:,} bytes")
            entries = json.loads(file.read(length).decode())
        entries.pop("__metadata__", None)
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]]
            if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
                raise ValueError(f"{name!r:.100} has sizes that are no natural numbers")
            if begin != done or end > len(data) or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name!r:.100} leaves a gap, overlaps, ends after the file or is unlike its shape")
            aligned = (8 + length + begin) % dtype.itemsize == 0
            tensors[name] = (data[begin:end] if aligned else data[begin:end].clone()).view(dtype).reshape(shape)
            done = end
        if done != len(data):
            raise ValueError(f"its last {len(data) - done:,} bytes belong to no tensor")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:  # whatever a wrong header causes
        raise UserError(f"{path}: not a valid .safetensors file ({error!r:.200})") from None
    return tensors


def weights_in(checkpoint):
    """The EMA of a checkpoint of train.py; the state dict of a published file, bare or under "ema" or "model"."""
    return checkpoint.get("ema", checkpoint.get("model", checkpoint))


def check_state(state, path):
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
            and not value.is_nested and not value.is_meta for name, value in state.items()):
        raise UserError(f"{path}: not a state dict, which maps names to dense tensors")


def load_weights(module, state, path, assign=False):
    """Load a state dict into a module; UserError names the first tensor that is missing, unexpected or misshapen."""
    def kind(tensor):
        return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")

    check_state(state, path)
    expected = module.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want, have = (kind(d[name]) if name in d else "nothing" for d in (expected, state))
        if want != have:
            raise UserError(f"{path}: {name} is {have} where {want} is expected")
    module.load_state_dict(state, assign=assign)


def read_json(path):
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable description ({first_line(error)})") from None


def refuse_other(begun, before, now):
    """UserError, naming the flag, when what was begun with the values `before` would be continued with others."""
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{begun} was begun with {flag} {before[name]}, not {value}: keep to that, or name another "
                            f"place")


def list_images(folder):
    """Sorted paths of the images in a folder and below, by Pillow's file extensions; hidden ones are left out."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in known]
    if not paths:
        raise UserError(f"{folder}: no image files in this folder" if os.path.isdir(folder) else
                        f"{folder}: no such folder")
    return sorted(paths, key=str)


def read_image(path, size=None):
    """One image file as RGB; UserError when it is damaged, no image, a decompression bomb, or not of this size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = file.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever the damage causes
        raise UserError(f"{path}: not a readable image ({first_line(error)})") from None
    if size not in (None, image.size):
        raise UserError(f"{path}: {image.size} pixels, where {size} are expected")
    return image


# ---------------------------------------------------------------------------------------------------------------------
# The VAE of Stable Diffusion. Its tensors are named as in diffusers' AutoencoderKL, so that the published files fit.

LATENT_SCALE = 0.18215  # gives latents about unit variance
SLICE_PIXELS = 2 ** 20  # encoded or decoded at once: 16 images of 256 pixels or 4 of 512, about 4 GB in float32
VAE_SHA256 = {"ema": None,  # not known here: the names and shapes of its tensors are the check
              "mse": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"}


def conv(cin, cout, kernel=3, **options):
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **options)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.norm2 = norm(cin), norm(cout)
        self.conv1, self.conv2 = conv(cin, cout), conv(cout, cout)
        self.conv_shortcut = conv(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class PixelAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.group_norm = norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, one head, H*W, C)
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.transpose(2, 3).reshape(x.shape)


class Resample(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        # downwards, zeros on the right and below only
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """`depth` resnets at one resolution, then perhaps a change of it."""

    def __init__(self, cin, cout, depth, down=False, up=False):
        super().__init__()
        self.resnets = nn.Sequential(*(Resnet(cin if i == 0 else cout, cout) for i in range(depth)))
        self.downsamplers = nn.Sequential(*[Resample(cout, up=False)] * down)
        self.upsamplers = nn.Sequential(*[Resample(cout, up=True)] * up)

    def forward(self, x):
        return self.upsamplers(self.downsamplers(self.resnets(x)))


def coder(cin, width, stages, last, cout):
    """Either half of the autoencoder; VAE runs the parts in the order that is the half's own."""
    middle = nn.ModuleDict({"attentions": nn.ModuleList([PixelAttention(512)]),
                            "resnets": nn.ModuleList([Resnet(512, 512), Resnet(512, 512)])})
    return nn.ModuleDict({"conv_in": conv(cin, width), **stages, "mid_block": middle,
                          "conv_norm_out": norm(last), "conv_out": conv(last, cout)})


def middle(block, x):
    return block.resnets[1](block.attentions[0](block.resnets[0](x)))


def full_precision(x):
    """A context without autocast, whatever surrounds it."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


class VAE(nn.Module):
    """Stable Diffusion's autoencoder between images (B, 3, H, W) in [-1, 1] and latents (B, 4, H/8, W/8), frozen.

    weights: None leaves it untrained; "ema" and "mse" are stabilityai's sd-vae-ft-ema and -mse, downloaded once; else
    the path of a .safetensors, .bin, .pt or .pth file. UserError for a file that cannot be had or read or does not fit.

    Matches diffusers' AutoencoderKL (models/autoencoders/autoencoder_kl.py), in float32 unless the caller's autocast
    says bf16. Not float16: VAEs of this family overflow it, which is why diffusers has `force_upcast`.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.encoder = coder(3, 128, {"down_blocks": nn.Sequential(
            Stage(128, 128, 2, down=True), Stage(128, 256, 2, down=True), Stage(256, 512, 2, down=True),
            Stage(512, 512, 2))}, 512, 8)
        self.decoder = coder(4, 512, {"up_blocks": nn.Sequential(
            Stage(512, 512, 3, up=True), Stage(512, 512, 3, up=True), Stage(512, 256, 3, up=True),
            Stage(256, 128, 3))}, 128, 3)
        self.quant_conv, self.post_quant_conv = conv(8, 8, 1), conv(4, 4, 1)
        self.requires_grad_(False)
        if weights in VAE_SHA256:
            repository = f"https://huggingface.co/stabilityai/sd-vae-ft-{weights}"
            weights = fetch(f"{repository}/resolve/main/diffusion_pytorch_model.safetensors", "--vae",
                            VAE_SHA256[weights], name=f"sd-vae-ft-{weights}.safetensors")
        if weights is not None:
            load_weights(self, rename_attention(load_file(weights)), weights)

    def encode(self, x):
        """Images -> (mean, std) of the posterior, times 0.18215; never in bf16, since latents are made to be kept."""
        moments = torch.cat([self._moments(part) for part in x.split(max(1, SLICE_PIXELS // x[0, 0].numel()))])
        mean, log_variance = moments.chunk(2, dim=1)
        return LATENT_SCALE * mean, LATENT_SCALE * torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, z):
        """Latents, scaled as `encode` does, -> images, which may over- and undershoot [-1, 1] a little."""
        parts = (z / LATENT_SCALE).split(max(1, SLICE_PIXELS // (64 * z[0, 0].numel())))
        return torch.cat([self._image(part) for part in parts])

    def _moments(self, x):
        half = self.encoder
        with full_precision(x):
            x = middle(half.mid_block, half.down_blocks(half.conv_in(x)))
            return self.quant_conv(half.conv_out(F.silu(half.conv_norm_out(x))))

    def _image(self, z):
        half = self.decoder
        x = half.up_blocks(middle(half.mid_block, half.conv_in(self.post_quant_conv(z))))
        with full_precision(x):  # rounded to bf16, a pixel would be off by up to a quarter of an 8-bit step
            return half.conv_out(F.silu(half.conv_norm_out(x.to(half.conv_out.weight.dtype))))


def rename_attention(state):
    """A VAE's state dict with the attention of older files (query, key, ...; 1x1 convolutions) turned into today's."""
    spellings = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for name, tensor in state.items():
        if ".attentions." in str(name):
            *parents, layer, kind = name.split(".")
            name = ".".join([*parents, spellings.get(layer, layer), kind])
            tensor = tensor.flatten(1) if getattr(tensor, "ndim", 0) > 2 else tensor
        renamed[name] = tensor
    return renamed


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def to_uint8(x):
    """[-1, 1] -> 0..255 by DiT's rule, which truncates."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns):
    """Write uint8 images (n, 3, H, W) as one PNG, row by row; small ones are enlarged."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    grid = np.zeros((rows * columns, 3, height, width), np.uint8)
    grid[:n] = images
    grid = grid.reshape(rows, columns, 3, height, width).transpose(0, 3, 1, 4, 2)
    image = Image.fromarray(grid.reshape(rows * height, columns * width, 3))
    zoom = max(1, 64 // height)
    with atomic(path) as file:
        image.resize((image.width * zoom, image.height * zoom), Image.NEAREST).save(file, "PNG")


def generate(net, objective, shape, labels, indices, seed, device, dtype, decode=None, **options):
    """Samples `indices` with these labels (B,) -> uint8 (B, 3, H, W) on the CPU; options go to objective.sample.

    Each sample has a noise generator of its own, so that it depends on (seed, index) alone.
    """
    generators = [np.random.default_rng([seed, index]) for index in indices]

    def noise(step=None):
        draws = torch.from_numpy(np.stack([generator.standard_normal(shape, np.float32) for generator in generators]))
        return draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        x = objective.sample(net, noise(), labels.to(device), noise_fn=noise, **options)
        return to_uint8(x if decode is None else decode(x)).cpu()


def default_objective(model):
    return "flow" if model.startswith("SiT") else "diffusion"


def load_model(path, name=None):
    """Checkpoint file -> (model with the EMA weights on the CPU, its config).

    Takes a checkpoint of train.py, whose config names the model, and a published DiT or SiT file (a bare state dict, or
    one under "ema" or "model"), for which `name` says which of the MODELS it is; its sizes are read off the tensors.
    """
    checkpoint = load_file(path)
    state = weights_in(checkpoint)
    config = {"model": name, "classes": None, "vae": None}
    if isinstance(checkpoint.get("config"), dict):
        config |= checkpoint["config"]
    name = config["model"]
    if name is None:
        raise UserError(f"{path}: holds no config; say with --model which model it is, for instance SiT-XL/2")
    if name not in [*MODELS]:
        raise UserError(f"{path}: --model {name!r:.80}: expected one of {', '.join(MODELS)}")
    try:
        patch, channels = MODELS[name]["patch_size"], state["x_embedder.proj.weight"].shape[1]
        sizes = dict(input_size=patch * math.isqrt(state["pos_embed"].shape[1]), in_channels=channels,
                     num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                     learn_sigma=len(state["final_layer.linear.bias"]) == 2 * channels * patch ** 2,
                     second_time="r_embedder.mlp.0.weight" in state)
        if min(sizes["input_size"], channels, sizes["num_classes"]) < 1:
            raise IndexError
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path}: not the weights of a DiT or SiT") from None
    config = {"objective": default_objective(name), **config}
    objective, classes = config["objective"], config["classes"]
    fits = {key: config.get(key, size) == size for key, size in sizes.items()} | dict(
        objective=objective in [*OBJECTIVES] and sizes["second_time"] >= (objective == "meanflow")
        and sizes["learn_sigma"] >= (objective == "diffusion"),
        classes=classes is None or isinstance(classes, list) and len(classes) == sizes["num_classes"]
        and all(isinstance(kind, str) for kind in classes), vae=isinstance(config["vae"], str | None))
    for key in fits:
        if not fits[key]:
            raise UserError(f"{path}: {key} {config[key]!r:.80} does not fit its tensors")
    with torch.device("meta"):
        net = build_model(name, **sizes)
    load_weights(net, state, path, assign=True)
    return net.float().eval().requires_grad_(False), config | sizes


def parse_classes(text, config):
    """--classes -> labels: numbers, or names where the checkpoint knows them; default all."""
    count, names = config["num_classes"], config["classes"] or []
    if text is None:
        return list(range(count))
    labels = [names.index(part) if part in names else int(part) if part.isdecimal() else -1 for part in text.split(",")]
    if not all(0 <= label < count for label in labels):
        raise UserError(f"--classes {text}: expected numbers from 0 to {count - 1}"
                        + (f" or names such as {names[0]}" if names else "") + ", separated by commas")
    return labels


def write_npz(path, files, size, labels):
    """An ADM-style archive of image files: arr_0 (N, H, W, 3) uint8, streamed image by image, and arr_1, the labels."""
    header = dict(descr="|u1", fortran_order=False, shape=(len(files), *size, 3))
    entries = [zipfile.ZipInfo(name) for name in ("arr_0.npy", "arr_1.npy")]
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(entries[0], "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for image in files:
                entry.write(read_image(image, size).tobytes())
        with archive.open(entries[1], "w") as entry:
            np.lib.format.write_array(entry, labels, allow_pickle=False)


def parse(argv):
    p = Parser(prog="sample.py", description=__doc__)
    p.add_argument("--ckpt", required=True, metavar="FILE", help="of train.py, or a published DiT or SiT file")
    p.add_argument("--model", help="which model a published file holds, for instance SiT-XL/2")
    p.add_argument("--n", "--num-samples", type=number(int, 1), default=64, help="number of images (64); 50000 for FID")
    p.add_argument("--steps", type=number(int, 1), help="sampling intervals (250; MeanFlow: 1)")
    p.add_argument("--method", help="SiT: heun, euler, sde; DiT: ddpm, ddim, heun; default: the first")
    p.add_argument("--cfg", type=number(float, 0), default=1.0, help="guidance scale; 1: none (1)")
    p.add_argument("--cfg-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
                   help="times in which guidance acts; 0 is noise, 1 is data (0 1)")
    p.add_argument("--cfg-channels", type=number(int, 1), help="guide only the first channels; 3 in the published code")
    p.add_argument("--classes", help="labels to go through, such as 207,360 or names; default: all")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--batch", type=number(int, 1), default=64, help="images at a time on each rank (64)")
    p.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the hardware multiplies it")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    p.add_argument("--vae", help="ema or mse (stabilityai's sd-vae-ft-*; the hash of mse alone is known and checked), "
                   "or a file; default: what the training data was made with, else ema")
    p.add_argument("--out", default="samples.npz", help="an .npz (arr_0 images, arr_1 labels) or a folder for PNGs")
    return p.parse_args(argv)


@command
def main(argv=None):
    args = parse(argv)
    rank, world, device = start()
    net, config = load_model(args.ckpt, args.model)
    net, objective, dtype = net.to(device), OBJECTIVES[config["objective"]](), args.dtype or default_dtype(device)
    if dtype == "bf16":
        net.blocks.bfloat16()  # once, instead of by autocast in every call
    compile_blocks(net, args.compile, device)
    shape = (config["in_channels"], config["input_size"], config["input_size"])
    vae = args.vae or config["vae"] or "ema"
    decode = VAE(vae).to(device).decode if shape[0] == 4 else None
    if args.cfg_interval[0] > args.cfg_interval[1] or args.cfg_channels and args.cfg_channels > shape[0]:
        raise UserError(f"--cfg-interval {args.cfg_interval} must not decrease, and --cfg-channels {args.cfg_channels} "
                        f"not exceed {shape[0]}")
    classes = parse_classes(args.classes, config)
    labels = np.resize(classes, args.n)
    if config.get("label_dropout") == 1:  # trained without labels
        labels = np.full(args.n, config["num_classes"])
    method = args.method or objective.methods[0]
    steps = args.steps or (1 if config["objective"] == "meanflow" else 250)
    if method not in objective.methods:
        raise UserError(f"--method {method}: expected one of {', '.join(objective.methods)} for {config['objective']}")
    if config["objective"] == "meanflow" and args.cfg != 1:
        raise UserError(f"--cfg {args.cfg:g}: MeanFlow is guided in training, not in sampling")
    if config["objective"] == "diffusion":
        try:
            objective.spaced(steps, method)
        except ValueError as error:
            raise UserError(f"--steps {steps}: {error}") from None
    options = dict(steps=steps, method=method, cfg=args.cfg, cfg_interval=args.cfg_interval,
                   cfg_channels=args.cfg_channels)

    # every image becomes a file of its own, so that an interrupted run continues; an archive is made of the files
    out = Path(args.out)
    folder = Path(f"{out}.part") if out.suffix == ".npz" else out
    weights = zlib.crc32(net.final_layer.linear.weight.cpu().numpy().tobytes())
    made_of = dict(options, seed=args.seed, classes=classes, dtype=dtype, ckpt=weights, vae=vae if decode else "none")
    files = [folder / f"{i:06d}.png" for i in range(args.n)]
    note = folder / "made_of.json"
    if note.exists():
        refuse_other(folder, read_json(note), made_of)
    others = set(folder.glob("*.png")) - set(files if note.exists() else [])
    if others:
        raise UserError(f"--out {folder}: holds other images, such as {min(others).name}: name another place")
    todo = [i for i, file in enumerate(files) if not file.exists()]
    barrier()  # nobody writes before everybody has looked
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(note) as file:
            file.write(json.dumps(made_of).encode())
    barrier()
    progress, todo = Progress("sampling", len(todo), quiet=rank > 0), todo[rank::world]
    for begin in range(0, len(todo), args.batch):
        indices = todo[begin:begin + args.batch]
        images = generate(net, objective, shape, torch.from_numpy(labels[indices]), indices, args.seed, device, dtype,
                          decode, **options)
        for i, image in zip(indices, images.permute(0, 2, 3, 1).numpy()):
            with atomic(files[i]) as file:
                Image.fromarray(image).save(file, "PNG", compress_level=1)
        progress.update(len(indices) * world)
    barrier()
    if rank == 0:
        kinds, columns, shown = len(classes), 8, range(min(args.n, 64))
        if kinds <= min(10, args.n):  # one class a row
            columns = min(8, args.n // kinds)
            shown = [row + kinds * column for row in range(kinds) for column in range(columns)]
        grid = out.with_suffix(".png") if out.suffix == ".npz" else out.with_name(out.name + ".png")
        size = 2 * (shape[-1] * (8 if decode else 1),)
        save_grid(np.stack([read_image(files[i], size) for i in shown]).transpose(0, 3, 1, 2), grid, columns)
        if out.suffix == ".npz":
            write_npz(out, files, size, labels)
            shutil.rmtree(folder)
        print(f"wrote {out} and {grid}")
    barrier()


if __name__ == "__main__":
    main()
