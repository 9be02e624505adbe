"""Sample images from a checkpoint of one's own or a published DiT/SiT file, on one process or under torchrun.

In this file: the helpers that all three command lines share (errors, ranks, progress, files, weights), and sampling.
"""
import argparse
import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

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
    """Pick the device (CUDA, else MPS, else CPU) and join torchrun's process group -> (rank, number of ranks, device)."""
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


def cpu_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def clock(seconds):
    """"1:02:03" or "2:03"."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Count work done: one self-refreshing line on a terminal, a plain line every 20 seconds in a log; `quiet` for ranks > 0."""

    def __init__(self, what, total, unit="images", quiet=False):
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.done, self.begin, self.live = 0, time.time(), sys.stderr.isatty()
        self.shown = self.begin

    def update(self, n):
        self.done += n
        now, last = time.time(), self.done >= self.total
        if self.quiet or not (last or now - self.shown > (0.2 if self.live else 20)):
            return
        self.shown = now
        rate = self.done / max(now - self.begin, 1e-9)
        left = "done in " + clock(now - self.begin) if last else clock((self.total - self.done) / rate) + " left"
        line = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {left}"
        print(f"\r{line:<79}" if self.live else line, end="" if self.live and not last else "\n", file=sys.stderr, flush=True)


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
    """Path of a published weights file in torch's hub cache, downloaded once per node, its SHA-256 (or a prefix) checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", file=sys.stderr)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise UserError(f"cannot download {url} ({error}): put the file at {path}, or name it with {flag} FILE") from None
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


def load_weights(module, state, path):
    """Copy a state dict into a module; UserError names the first tensor that is missing, unexpected or of another shape."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want, have = (tuple(d[name].shape) if name in d else "nothing" for d in (expected, state))
        if want != have:
            raise UserError(f"{path}: {name} is {have} where {want} is expected")
    module.load_state_dict(state)
