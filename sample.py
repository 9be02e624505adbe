"""Sample images from a checkpoint of train.py, or from a published DiT or SiT file.

    python sample.py --ckpt out/ckpt.pt --out samples
    torchrun --nproc_per_node=8 sample.py --ckpt out/ckpt.pt --num-samples 50000 --out samples.npz
    python sample.py --ckpt SiT-XL-2-256.pt --model SiT-XL/2 --cfg 4 --classes 207,360,387,974 --n 8

Sample i depends on --seed and i alone, not on --batch or the ranks. An interrupted run continues.
In this file: sampling, the VAE of Stable Diffusion, and what the three command lines share.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

from dispersive import MODELS, FlowMatching, GaussianDiffusion, MeanFlow, build_model

OBJECTIVES = {"flow": FlowMatching, "diffusion": GaussianDiffusion, "meanflow": MeanFlow}
DEFAULT_OBJECTIVE = {"SiT": "flow", "DiT": "diffusion"}  # by the first letters of a model's name

# ----------------------------------------
# Sampling

def default_dtype(device):
    """bf16 where the hardware multiplies it, else fp32."""
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"

def compile_blocks(net, wanted, device):
    """torch.compile each block by itself, so that one compilation serves all; None: on GPUs."""
    if wanted or (wanted is None and device.type == "cuda"):
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks in pieces
        for block in net.blocks:
            block.compile(dynamic=False)

def load_model(path, name=None):
    """Checkpoint file -> (network with the EMA weights on the CPU, config of its training).
    A file of train.py holds the config; of a published file, `name` says what it holds."""
    checkpoint = load_file(path)
    config = checkpoint.get("config")
    if (config is None) == (name is None):  # exactly one of them has to say which model it is
        raise UserError(f"{path}: say with --model what a published file holds, such as SiT-XL/2, and of no other file")
    if config is None:
        config = dict(model=name, objective=DEFAULT_OBJECTIVE[name[:3]], vae="ema", label_dropout=0.1)
    state = weights_in(checkpoint)
    with one_line_errors(path, "DiT or SiT"), torch.device("meta"):
        channels, patch_size = state["x_embedder.proj.weight"].shape[1:3]
        side = patch_size * math.isqrt(state["pos_embed"].shape[1])
        num_classes = len(state["y_embedder.embedding_table.weight"])
        if config["label_dropout"] > 0:
            num_classes -= 1  # the last label is the null label
        net = build_model(config["model"], input_size=side, in_channels=channels, num_classes=num_classes,
                          class_dropout_prob=config["label_dropout"], second_time=config["objective"] == "meanflow")
    load_weights(net, state, path, assign=True)
    return net.float().eval().requires_grad_(False), config

def generate(net, objective, shape, labels, indices, seed, device, dtype, decode=None, **options):
    """Samples `indices` with labels (B,) -> list of Pillow images; options go to objective.sample.
    Each sample has a noise generator of its own, and so depends on (seed, index) alone."""
    generators = [np.random.default_rng([seed, index]) for index in indices]
    def noise(step=None):  # the step plays no part: every generator goes on from where it was
        draws = [generator.standard_normal(shape, np.float32) for generator in generators]
        return torch.from_numpy(np.stack(draws)).to(device)  # (B, *shape)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        x = objective.sample(net, noise(), labels.to(device), noise_fn=noise, **options)
        if decode is not None:
            x = decode(x)  # latents -> images in [-1, 1]
    pixels = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)  # DiT's rule, which truncates
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]

def save_grid(images, path, columns=8):
    """Write Pillow images of one size as one PNG, row by row; small ones are enlarged."""
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    with atomic(path) as file:
        ImageOps.scale(grid, max(1, 64 // height), Image.NEAREST).save(file, "PNG")

def parse_flags(argv):
    parser = Parser(prog="sample.py", description=__doc__)
    flag = parser.add_argument
    flag("--ckpt", required=True, metavar="FILE", help="of train.py, or a published DiT or SiT file")
    flag("--model", choices=MODELS, metavar="NAME", help="of a published file, such as SiT-XL/2")
    flag("--n", "--num-samples", type=number(int, 1), default=64, help="(64); not --n under torchrun")
    flag("--steps", type=number(int, 1), help="sampling intervals (250; MeanFlow: 1)")
    flag("--method", help="SiT: heun, euler, sde; DiT: ddpm, ddim, heun; default: the first")
    flag("--cfg", type=number(float, 0), default=1.0, help="guidance scale; 1: none (1)")
    flag("--cfg-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0), help="guided times; 0 is noise (0 1)")
    flag("--cfg-channels", type=number(int, 1), help="guide the first channels only; published: 3")
    flag("--classes", help="numbers of the classes to sample, such as 207,360; default: all")
    flag("--labels", choices=["balanced", "random"], default="balanced", help="in turn (balanced) or random, like ADM")
    flag("--seed", type=number(int, 0), default=0)
    flag("--batch", type=number(int, 1), default=64, help="images at a time on each rank (64)")
    flag("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the hardware multiplies it")
    flag("--compile", action=argparse.BooleanOptionalAction, help="default: on GPUs")
    flag("--vae", help="ema, mse (stabilityai's sd-vae-ft-*), a file or a folder; default: as in training")
    flag("--out", default="samples.npz", help=".npz (arr_0: images, arr_1: labels) or a folder")
    return parser.parse_args(argv)

def choose_labels(args, net, config):
    """Labels (n,) of the samples; label i depends on --seed and i alone."""
    known = [str(label) for label in range(net.num_classes)]
    chosen = args.classes.split(",") if args.classes else known
    if not set(chosen) <= set(known):
        raise UserError(f"--classes {args.classes}: expected numbers from 0 to {len(known) - 1}")
    classes = [int(label) for label in chosen]
    if config["label_dropout"] == 1:  # without labels, the model has learned the null label alone
        classes = [net.num_classes]
    if args.labels == "balanced":
        return np.resize(classes, args.n)
    generators = [np.random.default_rng([args.seed, i, 1]) for i in range(args.n)]  # the noise's have no 1
    return np.array([generator.choice(classes) for generator in generators])

def refuse_existing(*paths):
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already: move it away, or choose another --out")

def write_result(files, labels, folder, out, grid):
    """Turn the folder with these image files into `out`, an archive or a folder; draw the grid."""
    shown = [read_image(file) for file in files[:64]]
    if out.suffix == ".npz":  # as ADM's; in memory, 50,000 images of 256 pixels are 10 GB
        pixels = np.empty((len(files), *np.shape(shown[0])), np.uint8)  # (N, H, W, 3)
        for i, file in enumerate(files):
            pixels[i] = read_image(file)
        with atomic(folder / "archive.npz") as file:
            np.savez(file, arr_0=pixels, arr_1=labels)
    refuse_existing(out, grid)
    save_grid(shown, grid)  # before `out`: a run killed here goes on once the grid is moved away
    if out.suffix == ".npz":
        os.rename(folder / "archive.npz", out)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        for path in set(folder.iterdir()) - set(files):  # the lock, and images of a larger --n
            path.unlink()
        os.rename(folder, out)

def main(argv=None):
    args = parse_flags(argv)
    out = Path(args.out)
    grid = Path(str(out).removesuffix(".npz") + ".png")
    refuse_existing(out, grid)
    rank, world, device = start()
    net, config = load_model(args.ckpt, args.model)
    objective = OBJECTIVES[config["objective"]]()
    shape = (net.in_channels, net.input_size, net.input_size)
    options = {}
    for name in ("steps", "method", "cfg", "cfg_interval", "cfg_channels"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    try:  # without images: what the sampler cannot do is found before any work
        objective.sample(net, torch.empty((0,) + shape), torch.empty(0).long(), **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    labels = torch.from_numpy(choose_labels(args, net, config))
    dtype = args.dtype or default_dtype(device)
    net.to(device)
    decode = vae = nn.Identity()  # for a model of pixels
    if net.in_channels == 4:
        vae = VAE(args.vae or config["vae"]).to(device)
        decode = vae.decode

    # Every image is a file in a folder whose name stands for all that an image depends on.
    # So an interrupted run continues, and images that were made differently never mix.
    made_of = dict(options, seed=args.seed, classes=args.classes, labels=args.labels, dtype=dtype,
                   objective=config["objective"], shape=shape, weights=fingerprint(net, vae))
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    folder = Path(f"{out}.{digest[:8]}.part")
    files = [folder / f"{i:06d}.png" for i in range(args.n)]
    if rank == 0:
        locked = lock(folder)  # until main returns
    barrier()

    if dtype == "bf16":
        net.blocks.bfloat16()  # once, instead of by autocast in every call
    compile_blocks(net, args.compile, device)
    todo = [i for i in range(rank, args.n, world) if not files[i].exists()]
    progress = Progress("sampling", len(todo) * world, quiet=rank > 0)
    for begin in range(0, len(todo), args.batch):
        indices = todo[begin:begin + args.batch]
        images = generate(net, objective, shape, labels[indices], indices, args.seed, device, dtype, decode, **options)
        for i, image in zip(indices, images):
            with atomic(files[i]) as file:
                image.save(file, "PNG", compress_level=1)
        progress.update(len(indices) * world)
    barrier()
    if rank == 0:
        write_result(files, labels, folder, out, grid)
        print(f"wrote {out} and {grid}")

# ----------------------------------------
# The VAE of Stable Diffusion; its tensors have the names of diffusers, so that published files fit

LATENT_SCALE = 0.18215  # gives latents about unit variance
SLICE_PIXELS = 2 ** 20  # encoded or decoded at once: 16 images of 256 pixels, about 4 GB in float32
VAE_SHA256 = {"mse": "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", "ema": None}  # unknown
group_norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)
conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1)

class Resnet(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.norm2 = group_norm(cin), group_norm(cout)
        self.conv1, self.conv2 = conv3x3(cin, cout), conv3x3(cout, cout)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h

class Middle(nn.Module):
    """Two resnets, and between them attention of all pixels to each other."""

    def __init__(self, channels):
        super().__init__()
        attention = nn.ModuleDict({"group_norm": group_norm(channels)})
        for name in ("to_q", "to_k", "to_v"):
            attention[name] = nn.Linear(channels, channels)
        attention["to_out"] = nn.Sequential(nn.Linear(channels, channels))
        self.attentions = nn.Sequential(attention)
        self.resnets = nn.Sequential(Resnet(channels, channels), Resnet(channels, channels))

    def forward(self, x):
        x = self.resnets[0](x)
        attention = self.attentions[0]
        h = attention.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, one head, H*W, C)
        h = F.scaled_dot_product_attention(attention.to_q(h), attention.to_k(h), attention.to_v(h))
        x = x + attention.to_out(h).transpose(2, 3).reshape(x.shape)
        return self.resnets[1](x)

def stage(cin, cout, depth, change=None):
    """`depth` resnets at one resolution, then half of it (zeros at right and below) or twice."""
    layers = OrderedDict(resnets=nn.Sequential(Resnet(cin, cout)))
    for _ in range(depth - 1):
        layers["resnets"].append(Resnet(cout, cout))
    if change == "half":
        half = OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(cout, cout, 3, stride=2))
        layers["downsamplers"] = nn.Sequential(nn.Sequential(half))
    if change == "twice":
        twice = OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=conv3x3(cout, cout))
        layers["upsamplers"] = nn.Sequential(nn.Sequential(twice))
    return nn.Sequential(layers)

class VAE(nn.Module):
    """Stable Diffusion's autoencoder of images (B, 3, H, W) in [-1, 1] to latents (B, 4, H/8, W/8) and back.
    weights: None for an untrained one; "ema" or "mse" for stabilityai's sd-vae-ft-ema or -mse, downloaded
    once; else a file, or a folder of diffusers. UserError for what cannot be had or read or does not fit.
    Matches diffusers' autoencoder_kl.py in float32, or in bf16 under autocast; float16 would overflow."""

    def __init__(self, weights=None):
        super().__init__()
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=conv3x3(3, 128),
            down_blocks=nn.Sequential(stage(128, 128, 2, "half"), stage(128, 256, 2, "half"),
                                      stage(256, 512, 2, "half"), stage(512, 512, 2)),
            mid_block=Middle(512), conv_norm_out=group_norm(512), silu=nn.SiLU(), conv_out=conv3x3(512, 8)))
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=conv3x3(4, 512), mid_block=Middle(512),
            up_blocks=nn.Sequential(stage(512, 512, 3, "twice"), stage(512, 512, 3, "twice"),
                                    stage(512, 256, 3, "twice"), stage(256, 128, 3)),
            conv_norm_out=group_norm(128), silu=nn.SiLU(), conv_out=conv3x3(128, 3)))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)
        self.requires_grad_(False)
        if weights is not None:
            path = vae_file(weights)
            state = load_file(path)
            # older files name the attention's layers otherwise, which are 1x1 convolutions there
            for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
                state = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in state.items()}
            for name in state:
                if ".attentions." in name:
                    state[name] = state[name].squeeze()
            load_weights(self, state, path)

    def encode(self, x):
        """Images -> (mean, std) of the posterior, times 0.18215; in float32, as they are kept."""
        slices = x.split(max(1, SLICE_PIXELS // x[0, 0].numel()))
        with torch.autocast(x.device.type, enabled=False):
            moments = [self.quant_conv(self.encoder(images)) for images in slices]
        mean, log_variance = torch.cat(moments).chunk(2, dim=1)
        return LATENT_SCALE * mean, LATENT_SCALE * torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, z):
        """Latents, scaled as `encode` does, -> images, which may exceed [-1, 1] a little."""
        images = []
        for latents in (z / LATENT_SCALE).split(max(1, SLICE_PIXELS // (64 * z[0, 0].numel()))):
            h = self.decoder[:-3](self.post_quant_conv(latents))  # all but norm, SiLU and conv_out
            with torch.autocast(z.device.type, enabled=False):  # bf16 pixels are off by 0.25 of 255
                images.append(self.decoder[-3:](h.float()))
        return torch.cat(images)

def vae_file(weights):
    """Path of the file that holds a VAE's weights; `weights` as in VAE."""
    file = "diffusion_pytorch_model"
    if weights in VAE_SHA256:
        name = f"sd-vae-ft-{weights}"
        url = f"https://huggingface.co/stabilityai/{name}/resolve/main/{file}.safetensors"
        return fetch(url, "--vae", VAE_SHA256[weights], name=f"{name}.safetensors")
    for name in ("", f"{file}.safetensors", f"vae/{file}.safetensors", f"{file}.bin", f"vae/{file}.bin"):
        path = Path(weights, name)  # the file itself, or in the folder of a VAE or of a pipeline
        if path.is_file():
            return path
    raise UserError(f"{weights}: No such file, nor a folder with {file}.bin: name the VAE with --vae FILE")

# ----------------------------------------
# What the three command lines share: errors, processes, progress, and files

class UserError(ValueError):
    """Something the user can mend, said in one line."""

class UnreadableFile(UserError):
    """A file that is damaged, or of another kind than expected."""

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose help keeps the examples' line breaks."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(message)

def number(kind, low, high=math.inf):
    """argparse type: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            highest = "" if high == math.inf else f" to {high}"
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} from {low}{highest}, got {text!r}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message about text that is no number
    return parse

def run(main, argv=None):
    """Call main(argv); a UserError becomes one line on stderr and exit code 2."""
    rank = int(os.environ.get("RANK", 0))
    try:
        main(argv)
        barrier()  # the other ranks may still need this one
    except (UserError, KeyboardInterrupt, RuntimeError) as error:
        if rank > 0 or (isinstance(error, RuntimeError) and "RANK" in os.environ):
            # Once another rank has said why and exited, torchrun's SIGTERM is to end this one.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # train.py may have taken it
            time.sleep(10 if isinstance(error, RuntimeError) else 5 + rank)
        if isinstance(error, RuntimeError):
            raise
        message = " ".join(str(error).split()) or "interrupted"
        print(f"{Path(main.__code__.co_filename).stem}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 130)
    if dist.is_initialized():
        dist.destroy_process_group()

def start(device=None):
    """Pick CUDA, else MPS, else CPU; join torchrun's group -> (rank, number of ranks, device)."""
    alone = "RANK" not in os.environ
    gpu = device is None and torch.cuda.is_available()
    if gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if torch.device(device).index >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: this machine has only {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    elif device is None and alone and torch.backends.mps.is_available():
        device = "mps"  # only alone, since MPS cannot exchange tensors
    device = torch.device(device or "cpu")
    if alone:
        return 0, 1, device
    store, rank, world = next(dist.rendezvous("env://"))  # has a timeout of its own
    # torchrun keeps one store for all attempts, and a restarted rank would read where dead ones
    # listened (PyTorch issue 135712). Nodes count attempts separately: this works on one node.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
                            device_id=device if gpu else None, timeout=timedelta(hours=12))  # while one rank writes
    return rank, world, device

def barrier():
    if dist.is_initialized():
        dist.barrier()

class Progress:
    """Count images: a line that refreshes itself on a terminal, one every 20 seconds in a log."""

    def __init__(self, what, total, quiet=False):
        self.what, self.total, self.quiet, self.done = what, total, quiet, 0
        self.begin = self.shown = time.time()

    def update(self, n):
        self.done = min(self.total, self.done + n)
        finished = self.done == self.total
        live = sys.stderr.isatty()
        now = time.time()
        if self.quiet or (not finished and now - self.shown < (0.2 if live else 20)):
            return
        self.shown = now
        rate = self.done / max(now - self.begin, 1e-9)
        left = timedelta(seconds=int((self.total - self.done) / rate))
        line = f"{self.what}: {self.done:,}/{self.total:,} images, {rate:,.1f}/s, {left} left"
        end = "" if live and not finished else "\n"
        print(f"\r{line:<79}" if live else line, end=end, file=sys.stderr, flush=True)

@contextlib.contextmanager
def one_line_errors(path, what=None):
    """An error of the file system becomes a UserError that names this path.
    Where a file of the kind `what` is read, whatever its decoder raises makes an UnreadableFile."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides an OSError
        if getattr(cause, "errno", None):  # decoders raise OSErrors, too, but without a number
            raise UserError(f"{path}: {cause.strerror}") from None
        if what is None:
            raise
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__  # the first sentence
        raise UnreadableFile(f"{path}: not a readable {what} ({reason})") from None

@contextlib.contextmanager
def atomic(path):
    """Open a file that replaces `path`, flushed to disk, when the block ends without an error."""
    beside = Path(f"{path}.tmp")
    try:
        with one_line_errors(path):
            beside.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

def lock(folder):
    """Make a folder if need be; lock it until the returned file is closed or this process ends."""
    with one_line_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder}: another process is writing there") from None
        return file

def fetch(url, flag, sha256=None, name=None):
    """Path of a file in torch's hub cache, downloaded once per node. sha256 may be a prefix."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rsplit("/", 1)[-1])
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"downloading {url} to {path}", file=sys.stderr)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise UserError(f"cannot download {url} ({error}): put the file at {path}, or name it with {flag} FILE")
    barrier()
    return path

def load_file(path):
    """The dict in a torch or .safetensors file, on the CPU; UserError for damage and pickled code.
    Rank 0 compares checksums, which .safetensors files and those before torch 1.6 do not have."""
    with one_line_errors(path, "weights file"):
        if Path(path).suffix == ".safetensors":
            return load_safetensors(path)
        zipped = zipfile.is_zipfile(path)
        if zipped and os.environ.get("RANK", "0") == "0":
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold one
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        for name, tensor in weights_in(state).items():
            if not isinstance(name, str) or not torch.is_tensor(tensor):
                raise ValueError("it holds no state dict")
        return state

def load_safetensors(path):
    """{name: tensor}. The format: the header's length (8 bytes, little-endian), the header (JSON,
    {name: {dtype, shape, data_offsets}}), and the tensors' bytes, in which the offsets count."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = memoryview(bytearray(file.read()))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        header[name] = torch.frombuffer(data[begin:end], dtype=dtypes[entry["dtype"]]).reshape(entry["shape"])
    return header

def weights_in(checkpoint):
    """A checkpoint's EMA, or a published file's state dict, bare or under "ema" or "model"."""
    return checkpoint.get("ema", checkpoint.get("model", checkpoint))

def load_weights(module, state, path, assign=False):
    """Load a state dict; UserError names a tensor that is missing, unexpected or misshapen."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        have, need = found.get(name, "nothing"), wanted.get(name, "nothing")
        if have != need:
            raise UserError(f"{path}: {name} is {have} where {need} is expected")
    module.load_state_dict(state, assign=assign)

def fingerprint(*modules):
    """Hex SHA-256 of the modules' tensors: the same for the same weights from another file."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

def read_json(path):
    """The dict in a JSON file."""
    with one_line_errors(path, "description"):
        return dict(json.loads(Path(path).read_text()))

def open_array(path):
    """A .npy file, memory-mapped and never unpickled."""
    with one_line_errors(path, "array"):
        return np.lib.format.open_memmap(path, mode="r")

def list_images(folder):
    """Sorted paths of the images below a folder, by extension, without hidden ones. Follows links once."""
    def unreadable(error):
        raise UserError(f"{error.filename}: {error.strerror}")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths, seen = [], set()
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()  # os.walk goes no deeper here
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in files:
            if name[0] != "." and Path(name).suffix.lower() in known:
                paths.append(Path(root, name))
    if not paths:
        raise UserError(f"{folder}: no image files in this folder")
    return sorted(paths, key=str)

def read_image(path):
    """One image file as RGB; UnreadableFile for what is damaged, no image or a decompression bomb.
    As in ADM, transparency and a rotation noted in EXIF are ignored. Floats have no known range."""
    with one_line_errors(path, "image"), Image.open(path) as image:
        if image.mode == "F":
            raise ValueError("its pixels are floats")
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
            grey = np.round(np.asarray(image) / 257).clip(0, 255)
            image = Image.fromarray(grey.astype(np.uint8))
        return image.convert("RGB")

def center_crop(image, size):
    """ADM's crop: halve (box filter) while twice the size or more, bicubic to size, the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

if __name__ == "__main__":
    run(main)
