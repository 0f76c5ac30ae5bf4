"""A toy model for the workers of a batch: pictures of a few pixels, no weights, no torch.

Processes, pipes, files and manifest around it are real. The prompt says what happens: ``die`` kills
the process, ``hang`` takes for ever, ``fail`` and ``bug`` raise, ``slow`` takes a moment, ``big``
says that memory does not suffice for more than two, ``huge`` for any unless the decoder works in
tiles; everything else is drawn in the colour of its
seed. Every call is noted in a log: process id and prompts.
"""

import os
import signal
import time
from functools import partial
from types import SimpleNamespace

from PIL import Image

from accel.errors import BadModel, BadOutput
from accel.report import Report
from app import metadata
from app.models import Model
from app.session import Outcome

STEPS = 4
FINGERPRINT = metadata.Fingerprint(
    model="toy", versions={"toy": "1"}, device="cpu", processor="toy", threads=1, dtype="float32"
)


class Toy:
    """A session on no model.

    Args:
        source: What was asked for.
        log: Gets a line for every call.
    """

    def __init__(self, source, log):
        vae = SimpleNamespace(use_tiling=False)
        vae.enable_tiling = lambda: setattr(vae, "use_tiling", True)
        device = SimpleNamespace(type="cpu")
        pipe = SimpleNamespace(components={"vae": vae}, vae=vae, device=device)
        self.model = Model(source, pipe, {}, "toy")
        self._log = log

    def together(self, requests, plan, watch=None, *, memory=False):
        with self._log.open("a") as file:
            file.write(f"{os.getpid()} {'|'.join(one.prompt for one in requests)}\n")
        for request in requests:
            _act(request.prompt, len(requests), self.model.pipe.vae.use_tiling)
        report = Report("Toy", [], steps=STEPS, calls=STEPS, rows=STEPS * len(requests))
        report.samples = len(requests)
        call = {"num_inference_steps": STEPS, "width": 4, "height": 4}
        return [
            Outcome([picture(one.seed)], False, call, 0.01, report, len(requests), place)
            for place, one in enumerate(requests)
        ]

    def bare_together(self, requests):
        return self.together(requests, None)


def picture(seed):
    """What a row looks like."""
    return Image.new("RGB", (4, 4), tuple(seed >> shift & 255 for shift in (0, 8, 16)))


def _act(prompt, together, tiled):
    match prompt.split(" ")[0]:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(1e6)
        case "fail":
            raise BadOutput("The run holds NaN: try another dtype.")
        case "bug":
            raise RuntimeError("a bug of ours")
        case "slow":
            time.sleep(0.05)
        case "big" if together > 2:
            raise MemoryError
        case "huge" if not tiled:
            raise MemoryError


def opened(source, log):
    """Load a source: ``bad`` cannot be."""
    if source.model == "bad":
        raise BadModel("bad/weights.safetensors is truncated: download it again.")
    metadata.fingerprint = lambda model: FINGERPRINT
    return Toy(source, log)


def opener(log):
    """What loads the toy, in workers."""
    return partial(opened, log=log)
