"""Sample images from a checkpoint of one's own or a published DiT/SiT file, on one process or under torchrun.

In this file: the helpers that all three command lines share (errors, ranks, progress, files, weights), and sampling.
"""
import argparse
import contextlib
import functools
import json
import math
import os
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
from PIL import Image

from dispersive import MODELS, FlowMatching, build_model

# ---------------------------------------------------------------------------------------------------------------------
# Shared by the command lines


class UserError(Exception):
    """Something the user can mend, said in one line."""


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
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # torchrun stops every rank when the first one exits: let rank 0 speak
        else:
            print(" ".join(line.split()), file=sys.stderr, flush=True)
        sys.exit(code)
    return wrapped


def start(device=None):
    """Pick CUDA, else MPS, else CPU, and join torchrun's process group -> (rank, number of ranks, device)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device)
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif device.type == "cpu" and local_world > 1:  # torchrun gives each rank one thread
        torch.set_num_threads(max(1, cpu_cores() // local_world))
    if "RANK" not in os.environ:
        return 0, 1, device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return dist.get_rank(), dist.get_world_size(), device


def default_dtype(device):
    """bf16 where the hardware multiplies it, else fp32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


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
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def fetch(url, flag, sha256=None):
    """Path of a published file in torch's hub cache; downloaded once per node, its SHA-256 (or a prefix) checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
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
    """The object in a torch file, on the CPU and memory-mapped; a pickle that would run code is refused, not run."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises whatever the damage causes
        raise UserError(f"{path}: not a readable weights file ({str(error).splitlines()[0][:200]})") from None


def load_weights(module, state, path, assign=False):
    """Load a state dict into a module; UserError names the first tensor that is missing, unexpected or misshapen."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want, have = (tuple(d[name].shape) if name in d else "nothing" for d in (expected, state))
        if want != have:
            raise UserError(f"{path}: {name} is {have} where {want} is expected")
    module.load_state_dict(state, assign=assign)


def open_data(path):
    """A memory-mapped .npy array that is never unpickled; UserError when it is missing, damaged or of objects."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy array ({error})") from None


def list_images(folder):
    """Every image below a folder, sorted, by the file extensions that Pillow knows; hidden files are passed over."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    known = Image.registered_extensions()
    return sorted(Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names
                  if not name.startswith(".") and Path(name).suffix.lower() in known)


def read_image(path):
    """An image file as RGB; UserError when it is damaged, no image, or a decompression bomb."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever the damage causes
        raise UserError(f"{path}: not a readable image ({error})") from None


class Rows:
    """An array on disk that ranks fill row by row, and that an interrupted run continues.

    It grows as PATH.part, with PATH.part.map (a byte a row: 0 to do, 1 done) and PATH.part.json (what it is made of;
    a continuation with other values is refused); `finish` turns it into PATH.
    """

    def __init__(self, path, shape, dtype, made_of, rank, world):
        self.path, self.part = Path(path), Path(f"{path}.part")
        self.notes = [Path(f"{self.part}.map"), Path(f"{self.part}.json")]
        if rank == 0:
            self._create(shape, dtype, json.loads(json.dumps(made_of)))
        barrier()
        self.rows = np.lib.format.open_memmap(self.part, mode="r+")
        self.map = np.memmap(self.notes[0], np.uint8, "r+")
        self.done = int((self.map == 1).sum())
        self.todo = np.array_split(np.flatnonzero(self.map != 1), world)[rank]
        barrier()  # nobody writes before everybody has read the map

    def _create(self, shape, dtype, made_of):
        if self.notes[1].exists():
            before = json.loads(self.notes[1].read_text())
            differ = [name for name in made_of if made_of[name] != before.get(name)]
            if differ:
                raise UserError(f"{self.part} was begun with {differ[0]} {before.get(differ[0])}, not "
                                f"{made_of[differ[0]]}: finish it so, or delete it")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(self.part, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash on some later write
            with open(self.part, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.part.stat().st_size)
        self.notes[0].write_bytes(bytes(shape[0]))
        with atomic(self.notes[1]) as file:  # last: its presence says that the other two are complete
            file.write(json.dumps(made_of).encode())

    def write(self, indices, rows):
        self.rows[indices] = rows
        self.map[indices] = 1

    def finish(self, keep=True):
        """On rank 0, once every rank is done: rename to PATH, or delete it all when what it holds has moved on."""
        self.rows.flush()
        if keep:
            os.replace(self.part, self.path)
        for leftover in [*self.notes, self.part]:
            leftover.unlink(missing_ok=True)


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


class SampleNoise:
    """The noise of samples `indices`: each has a generator of its own, so it depends on (seed, index) alone."""

    def __init__(self, seed, indices, shape, device):
        self.generators = [np.random.default_rng([seed, index]) for index in indices]
        self.shape, self.device = shape, device

    def __call__(self, step=None):
        noise = np.stack([g.standard_normal(self.shape, np.float32) for g in self.generators])
        return torch.from_numpy(noise).to(self.device)


def generate(net, objective, shape, labels, indices, seed, device, dtype, decode=None, **options):
    """Samples `indices` with these labels (B,) -> uint8 (B, 3, H, W) on the CPU; options go to objective.sample."""
    noise = SampleNoise(seed, indices, shape, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        x = objective.sample(net, noise(), labels.to(device), noise_fn=noise, **options)
    return to_uint8(x if decode is None else decode(x)).cpu()


def load_model(path, name=None):
    """Checkpoint file -> (model with the EMA weights on the CPU, its config).

    Takes a checkpoint of train.py, whose config names the model, and a published DiT or SiT file (a bare state dict, or
    one under "ema" or "model"), for which `name` says which of the MODELS it is; its sizes are read off the tensors.
    """
    checkpoint = load_file(path)
    state, config = checkpoint, dict(model=name, classes=None, vae=None)
    if isinstance(checkpoint, dict):
        state = checkpoint.get("ema", checkpoint.get("model", checkpoint))
        config = checkpoint.get("config", config)
    name = config["model"]
    if name is None:
        raise UserError(f"{path}: holds no config; say with --model which model it is, for instance SiT-XL/2")
    if name not in MODELS:
        raise UserError(f"--model {name}: expected one of {', '.join(MODELS)}")
    try:
        patch, channels = MODELS[name]["patch_size"], state["x_embedder.proj.weight"].shape[1]
        sizes = dict(input_size=patch * math.isqrt(state["pos_embed"].shape[1]), in_channels=channels,
                     num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                     learn_sigma=len(state["final_layer.linear.bias"]) == 2 * channels * patch ** 2)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: not the weights of a DiT or SiT") from None
    with torch.device("meta"):
        net = build_model(name, **sizes)
    load_weights(net, state, path, assign=True)
    return net.float().eval().requires_grad_(False), dict(config, **sizes)


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


def write_npz(path, array_file, labels):
    """An ADM-style archive: arr_0, copied from a .npy file without being read into memory, and arr_1, the labels."""
    with atomic(path) as file, zipfile.ZipFile(file, "w") as archive:
        entries = [zipfile.ZipInfo(name) for name in ("arr_0.npy", "arr_1.npy")]
        with open(array_file, "rb") as array, archive.open(entries[0], "w", force_zip64=True) as entry:
            shutil.copyfileobj(array, entry, 1 << 20)
        with archive.open(entries[1], "w") as entry:
            np.lib.format.write_array(entry, labels, allow_pickle=False)


def parse(argv):
    p = Parser(prog="sample.py", description=__doc__)
    p.add_argument("--ckpt", required=True, metavar="FILE", help="of train.py, or a published DiT or SiT file")
    p.add_argument("--model", help="which model a published file holds, for instance SiT-XL/2")
    p.add_argument("--n", type=number(int, 1), default=64, help="number of images (64); 50000 for an FID")
    p.add_argument("--steps", type=number(int, 1), default=250, help="sampling intervals (250)")
    p.add_argument("--method", default="heun", choices=FlowMatching.methods, help="(heun)")
    p.add_argument("--cfg", type=number(float, 0), default=1.0, help="guidance scale; 1: none (1)")
    p.add_argument("--cfg-interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
                   help="times in which guidance acts; 0 is noise, 1 is data (0 1)")
    p.add_argument("--cfg-channels", type=number(int, 1), help="guide only the first channels; 3 in the published code")
    p.add_argument("--classes", help="labels to go through, such as 207,360 or names; default: all")
    p.add_argument("--seed", type=number(int, 0), default=0)
    p.add_argument("--batch", type=number(int, 1), default=64, help="images at a time on each rank (64)")
    p.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 where the hardware multiplies it")
    p.add_argument("--out", default="samples.npz", help="an .npz (arr_0 images, arr_1 labels) or a folder for PNGs")
    return p.parse_args(argv)


@command
def main(argv=None):
    args = parse(argv)
    rank, world, device = start()
    net, config = load_model(args.ckpt, args.model)
    classes = parse_classes(args.classes, config)
    labels = np.resize(classes, args.n)
    net, objective, dtype = net.to(device), FlowMatching(), args.dtype or default_dtype(device)
    shape = (config["in_channels"], config["input_size"], config["input_size"])
    out = Path(args.out)
    archive = out if out.suffix == ".npz" else out / "samples.npz"
    options = dict(steps=args.steps, method=args.method, cfg=args.cfg, cfg_interval=args.cfg_interval,
                   cfg_channels=args.cfg_channels)
    made_of = dict(options, n=args.n, seed=args.seed, classes=classes, dtype=dtype,
                   ckpt=zlib.crc32(net.final_layer.linear.weight.cpu().numpy().tobytes()))
    size = config["input_size"]
    rows = Rows(archive, (args.n, size, size, 3), np.uint8, made_of, rank, world)
    progress = Progress("sampling", len(rows.todo) * world, quiet=rank > 0)
    for start_at in range(0, len(rows.todo), args.batch):
        chunk = rows.todo[start_at:start_at + args.batch]
        images = generate(net, objective, shape, torch.from_numpy(labels[chunk]), chunk.tolist(), args.seed, device,
                          dtype, **options)
        rows.write(chunk, images.permute(0, 2, 3, 1).numpy())
        progress.update(len(chunk) * world)
    barrier()
    if out.suffix != ".npz":
        for i in range(rank, args.n, world):
            with atomic(out / f"{i:06d}.png") as file:
                Image.fromarray(rows.rows[i]).save(file, "PNG")
        barrier()
    if rank == 0:
        kinds = len(classes)
        first = np.arange(min(args.n, 80 if kinds > 10 else 8 * kinds))
        if kinds <= 10 and len(first) == 8 * kinds:
            first = first.reshape(8, kinds).T.ravel()  # one class a row
        grid = out.with_suffix(".png") if out.suffix == ".npz" else out.with_name(out.name + ".png")
        save_grid(rows.rows[first].transpose(0, 3, 1, 2), grid, columns=8)
        if out.suffix == ".npz":
            write_npz(out, rows.part, labels)
        rows.finish(keep=False)
        print(f"wrote {out} and {grid}")


if __name__ == "__main__":
    main()
