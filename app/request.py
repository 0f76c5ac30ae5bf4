"""What a user asks for, in one vocabulary: CLI options, batch rows, and the record in a file.

Plain dataclasses, so that ``accel --help`` reads them without importing pydantic or torch; pydantic
checks the values when a command runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le
from typer import Argument, Option

from app.calibrators import CALIBRATORS

Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal["text", "json"]
Preset = Literal["exact", "balanced", "fast", "fastest"]
T = TypeVar("T")

PICTURES = ("image", "last", "mask", "control")
FILES = (*PICTURES, "lora")
"""Fields of a request that hold a file."""
PICTURE, MODEL, PLAN, OUTPUT, SERVER = "Picture", "Model", "Plan", "Output", "Server"
ROWS, MACHINES = "Rows", "Machines"


@dataclass(frozen=True)
class Source:
    """Which model, and where it runs. A session serves one source."""

    model: Annotated[
        str,
        Option(
            help="bundled name, model folder, or hub id (safetensors only)", rich_help_panel=MODEL
        ),
    ] = "scenes-flux"
    controlnet: Annotated[
        str | None,
        Option(help="ControlNet: folder or hub id; needs --control", rich_help_panel=MODEL),
    ] = None
    variant: Annotated[
        str | None, Option(help="weights variant, such as fp16", rich_help_panel=MODEL)
    ] = None
    revision: Annotated[
        str | None, Option(help="branch, tag or commit of a hub model", rich_help_panel=MODEL)
    ] = None
    device: Annotated[
        str | None,
        Option(
            help="cpu, cuda, cuda:1 or mps; default: cuda where there is one, else cpu",
            rich_help_panel=MODEL,
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        Option(help="default: float32 on the CPU, else bfloat16", rich_help_panel=MODEL),
    ] = None


@dataclass(frozen=True)
class Drawing(Source):
    """What a call of a model draws. What is ``None`` is left to the model's own call arguments."""

    negative: Annotated[str | None, Option(help="negative prompt", rich_help_panel=PICTURE)] = None
    guidance: Annotated[
        float | None,
        Ge(0),
        Le(100),
        Option(help="guidance scale; 1 is none", rich_help_panel=PICTURE),
    ] = None
    height: Annotated[
        int | None, Ge(1), Le(16384), Option(help="pixels", rich_help_panel=PICTURE)
    ] = None
    width: Annotated[
        int | None, Ge(1), Le(16384), Option(help="pixels", rich_help_panel=PICTURE)
    ] = None


@dataclass(frozen=True)
class Clip(Drawing):
    """A `Drawing` that may have frames."""

    frames: Annotated[
        int | None, Ge(1), Le(1024), Option(help="frames of a clip", rich_help_panel=PICTURE)
    ] = None


@dataclass(frozen=True)
class Settings(Clip):
    """How a picture or clip is made."""

    seed: Annotated[
        int | None,
        Ge(0),
        Le(2**63 - 1),
        Option(help="noise; default: drawn, and recorded", rich_help_panel=PICTURE),
    ] = None
    steps: Annotated[
        int | None,
        Ge(1),
        Le(1000),
        Option(help="denoising steps", rich_help_panel=PICTURE),
    ] = None
    fps: Annotated[
        int, Ge(1), Le(120), Option(help="frames a second in the file", rich_help_panel=PICTURE)
    ] = 16
    image: Annotated[
        Path | None,
        Option(help="start from this picture (image-to-image or -video)", rich_help_panel=PICTURE),
    ] = None
    last: Annotated[
        Path | None,
        Option(help="end the clip with this picture (with loop.ViBiD)", rich_help_panel=PICTURE),
    ] = None
    mask: Annotated[
        Path | None, Option(help="inpaint where this is white", rich_help_panel=PICTURE)
    ] = None
    control: Annotated[
        Path | None, Option(help="picture for the ControlNet", rich_help_panel=PICTURE)
    ] = None
    strength: Annotated[
        float | None,
        Gt(0),
        Le(1),
        Option(help="how much of --image is redrawn, 0 to 1", rich_help_panel=PICTURE),
    ] = None
    lora: Annotated[
        Path | None, Option(help="LoRA weights (.safetensors)", rich_help_panel=MODEL)
    ] = None
    compile: Annotated[
        bool | None,
        Option(
            "--compile/--no-compile",
            help="compile the repeated blocks, or their modules under a cache of modules; the "
            "first run takes longer. Default: no",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True)
class Request(Settings):
    """One picture or clip: what it shows, and how it is made."""

    prompt: Annotated[str, Argument(help="what to draw")] = ""

    @property
    def source(self) -> Source:
        """The model and where it runs, without the picture."""
        return Source(
            self.model, self.controlnet, self.variant, self.revision, self.device, self.dtype
        )

    @property
    def pictures(self) -> dict[str, Path]:
        """The pictures that go in, by option."""
        return {option: path for option, path in self.files.items() if option in PICTURES}

    @property
    def files(self) -> dict[str, Path]:
        """All files that go in, by option."""
        named = {option: getattr(self, option) for option in FILES}
        return {option: path for option, path in named.items() if path is not None}

    def seeded(self) -> Request:
        """The request with its seed drawn where none was given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON types."""
        plain = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }
        return {name: value for name, value in plain.items() if value is not None}


@dataclass(frozen=True)
class Choice:
    """Which methods: a plan file, a preset or a goal, and changes to it."""

    plan: Annotated[
        Path | None,
        Option(help="plan file (`accel methods --toml` prints one)", rich_help_panel=PLAN),
    ] = None
    preset: Annotated[Preset | None, Option(help="plan by name", rich_help_panel=PLAN)] = None
    goal: Annotated[
        list[str],
        Option(
            metavar="MEASURE>=VALUE",
            help="the fastest plan in --tuned that was proven to hold this; repeatable",
            rich_help_panel=PLAN,
        ),
    ] = field(default_factory=list)
    tuned: Annotated[
        Path | None,
        Option(help="folder of plans that `accel tune` wrote for the model", rich_help_panel=PLAN),
    ] = None
    changes: Annotated[
        list[str],
        Option(
            "--set",
            metavar="METHOD.FIELD=VALUE",
            help="add or change a method, e.g. cache.EasyCache.threshold=0.05; repeatable",
            rich_help_panel=PLAN,
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """Where the result goes."""

    out: Annotated[
        Path | None, Option(help="default: named after prompt and seed", rich_help_panel=OUTPUT)
    ] = None
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace what is there", rich_help_panel=OUTPUT)
    ] = False


@dataclass(frozen=True)
class Together:
    """How many processes make one picture."""

    devices: Annotated[
        int,
        Option(
            min=1,
            help="devices that make one picture together, a process each; the plan says how they "
            "share the work (parallel.…)",
            rich_help_panel=PLAN,
        ),
    ] = 1


@dataclass(frozen=True)
class Batch:
    """A job of many rows: where they come from, where they go, who makes them."""

    input: Annotated[
        str,
        Argument(
            help=".txt (a prompt a line), .csv, .jsonl or .yaml of rows; - reads lines or JSON "
            "objects from stdin"
        ),
    ] = ""
    out: Annotated[
        str,
        Option(
            help="folder, or an address that fsspec knows, such as s3://bucket/folder",
            rich_help_panel=OUTPUT,
        ),
    ] = ""
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="check all rows, say what would be done", rich_help_panel=OUTPUT),
    ] = False
    measure: Annotated[
        bool,
        Option(
            "--measure",
            help="with --dry-run: load the models and time them, for the time it will take",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    resume: Annotated[
        bool | None,
        Option(
            "--resume/--no-resume",
            help="go on with what an earlier run left, or refuse its folder. Default: go on",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    overwrite: Annotated[
        bool, Option("--overwrite", help="make all rows again", rich_help_panel=OUTPUT)
    ] = False
    requeue: Annotated[
        bool,
        Option(
            "--requeue",
            help="try rows again that were set aside because they ended their process",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    name: Annotated[
        str,
        Option(
            help="file names: {index} {id} {slug} {seed} {model} {width} {height} {steps} {frames}",
            rich_help_panel=OUTPUT,
        ),
    ] = "{index:05d}_{slug}_{seed}"
    on_error: Annotated[
        Literal["continue", "stop"],
        Option(help="what to do when a row fails", rich_help_panel=ROWS),
    ] = "continue"
    retries: Annotated[
        int,
        Ge(0),
        Le(100),
        Option(help="how often a row is tried again that ended its process", rich_help_panel=ROWS),
    ] = 2
    timeout: Annotated[
        float | None,
        Gt(0),
        Option(help="seconds that a row may take; default: no limit", rich_help_panel=ROWS),
    ] = None
    seeds: Annotated[
        Literal["random", "fixed", "increment"],
        Option(
            help="of rows without a seed: random (from --seed and the row's id), fixed (--seed), "
            "increment (--seed, and one more for each row)",
            rich_help_panel=ROWS,
        ),
    ] = "random"
    together: Annotated[
        str,
        Option(
            "--batch",
            help="rows in one call of the pipeline: a number, or auto (what measures fastest)",
            rich_help_panel=ROWS,
        ),
    ] = "auto"
    shard: Annotated[
        str | None,
        Option(
            metavar="I/N",
            help="make only the I-th of N parts, from 1: for arrays of Slurm or Kubernetes",
            rich_help_panel=ROWS,
        ),
    ] = None
    workers: Annotated[
        int | None,
        Ge(1),
        Le(1024),
        Option(
            help="processes; default: one a GPU, or one on the CPU (ray: one a GPU of the cluster)",
            rich_help_panel=MACHINES,
        ),
    ] = None
    devices: Annotated[
        int,
        Ge(1),
        Le(1024),
        Option(
            help="devices that make one row together, where its plan shares it out (parallel.…)",
            rich_help_panel=MACHINES,
        ),
    ] = 1
    threads: Annotated[
        int | None,
        Ge(1),
        Le(1024),
        Option(
            help="threads of a process on a CPU, on which its bits depend; default: all cores "
            "over all processes (ray: one)",
            rich_help_panel=MACHINES,
        ),
    ] = None
    engine: Annotated[
        Literal["local", "ray"],
        Option(
            help="processes of this machine, or actors of a Ray cluster (of the extra 'cluster')",
            rich_help_panel=MACHINES,
        ),
    ] = "local"
    address: Annotated[
        str | None,
        Option(
            help="of the Ray cluster, or auto for the one that this machine belongs to; default: a "
            "new one on this machine",
            rich_help_panel=MACHINES,
        ),
    ] = None


@dataclass(frozen=True)
class Sharing:
    """For how many devices it is said which way of sharing one picture out pays, and where."""

    devices: Annotated[
        str,
        Option(
            metavar="N or N-M",
            help="devices that could make one picture together; with --cluster a range too, such "
            "as 2-64: doubled from the first to the last",
            rich_help_panel=OUTPUT,
        ),
    ] = "1"
    cluster: Annotated[
        str | None,
        Option(
            help="predict for these devices rather than for this machine: a name (a100-nvlink, "
            "a100-pcie, h100-nvlink, a5000-pcie, 4090-pcie), or a TOML or JSON file",
            rich_help_panel=OUTPUT,
        ),
    ] = None


@dataclass(frozen=True)
class Like:
    """A file to reproduce."""

    like: Annotated[
        Path | None,
        Option(
            help="reproduce this file; other options change what it says", rich_help_panel=PICTURE
        ),
    ] = None


@dataclass(frozen=True)
class Editing:
    """A picture, what it is to show, and where."""

    original: Annotated[
        Path, Argument(metavar="ORIGINAL", help="a picture of `accel generate`, with its record")
    ]
    prompt: Annotated[str, Argument(help="what it is to show")]
    mask: Annotated[
        Path | None,
        Option(
            help="picture of the original's size, white where it changes", rich_help_panel=PICTURE
        ),
    ] = None
    region: Annotated[
        str | None,
        Option(
            metavar="X,Y,W,H",
            help="instead of --mask: left, top, width, height; shares of the sides up to 1, else "
            "pixels",
            rich_help_panel=PICTURE,
        ),
    ] = None
    dense: Annotated[
        bool,
        Option(
            "--compare", help="time a run that computes everything, too", rich_help_panel=OUTPUT
        ),
    ] = False


@dataclass(frozen=True)
class Repeats:
    """How often a comparison runs."""

    repeats: Annotated[
        int, Ge(1), Le(1000), Option(help="timed runs of each side", rich_help_panel=OUTPUT)
    ] = 3
    warmup: Annotated[
        int,
        Ge(1),
        Le(100),
        Option(help="runs of each side that are not timed", rich_help_panel=OUTPUT),
    ] = 1


@dataclass(frozen=True)
class Listing:
    """Which methods are shown, and how."""

    name: Annotated[str | None, Argument(help="one method, such as cache.EasyCache")] = None
    toml: Annotated[
        bool, Option("--toml", help="as a plan file to start from", rich_help_panel=OUTPUT)
    ] = False


@dataclass(frozen=True)
class Measuring:
    """What is measured on the spot, and for how many steps it is asked."""

    sparse: Annotated[
        bool,
        Option(
            "--sparse",
            help="measure from which resolution and length on sparse attention pays",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    steps: Annotated[
        int | None,
        Ge(1),
        Le(1000),
        Option(
            help="denoising steps that are meant; default: the model's own", rich_help_panel=PICTURE
        ),
    ] = None


@dataclass(frozen=True)
class Calibration(Clip):
    """What a method's numbers are measured from."""

    what: Annotated[
        str, Argument(metavar="NAME", help=f"what to calibrate: {', '.join(CALIBRATORS)}")
    ] = ""
    prompts: Annotated[
        Path | None,
        Option(
            help="text file, a prompt a line; default: the bundled captions",
            rich_help_panel=PICTURE,
        ),
    ] = None
    count: Annotated[
        int, Ge(1), Le(1000), Option(help="prompts that are run", rich_help_panel=PICTURE)
    ] = 4
    steps: Annotated[
        int | None, Ge(2), Le(1000), Option(help="denoising steps", rich_help_panel=PICTURE)
    ] = None
    seed: Annotated[
        int,
        Ge(0),
        Le(2**32),
        Option(help="noise of the first prompt; the others count on", rich_help_panel=PICTURE),
    ] = 0
    threshold: Annotated[
        float | None,
        Ge(0),
        Option(help="of the method in the plan; default: the calibrator's", rich_help_panel=PLAN),
    ] = None
    method: Annotated[
        str | None,
        Option(help="how, for what is calibrated in more than one way", rich_help_panel=PLAN),
    ] = None
    changes: Annotated[
        list[str],
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="another option of the calibrator, or field of the method; repeatable",
            rich_help_panel=PLAN,
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class Proving(Clip):
    """What a plan is to hold, and the prompts that show it."""

    target: Annotated[
        list[str],
        Option(
            metavar="MEASURE>=VALUE",
            help="what is to be held: ssim>=, psnr>=, perceptual<= (lpips<=), accuracy>=, "
            "speedup>=, seconds<=; repeatable",
            rich_help_panel=PLAN,
        ),
    ] = field(default_factory=list)
    prompts: Annotated[
        Path | None,
        Option(
            help="text file, a prompt a line; default: captions of the scenes",
            rich_help_panel=PICTURE,
        ),
    ] = None
    held_out: Annotated[
        int,
        Ge(1),
        Le(10000),
        Option(
            "--held-out",
            help="prompts on which the plan is proven, beside those that it was tuned on; of 20, "
            "one may miss the target",
            rich_help_panel=PICTURE,
        ),
    ] = 20
    steps: Annotated[
        int | None,
        Ge(2),
        Le(1000),
        Option(help="denoising steps of the stock run", rich_help_panel=PICTURE),
    ] = None


@dataclass(frozen=True)
class Tuning(Proving):
    """What a plan is searched on."""

    budget: Annotated[
        str, Option(help="time in all, such as 90s, 10m or 2h", rich_help_panel=PLAN)
    ] = "10m"
    trials: Annotated[
        Path | None,
        Option(
            help="folder of trials to go on from, also of other targets; default: beside the plan",
            rich_help_panel=PLAN,
        ),
    ] = None
    captions: Annotated[
        int, Ge(1), Le(10000), Option(help="prompts of the search", rich_help_panel=PICTURE)
    ] = 8
    choice: Annotated[
        int,
        Ge(1),
        Le(10000),
        Option(
            help="further prompts, which choose among what the search found; of 20, all must hold "
            "the target",
            rich_help_panel=PICTURE,
        ),
    ] = 20


@dataclass(frozen=True)
class Streaming(Drawing):
    """A clip that is drawn anew, frame after frame."""

    clip: Annotated[Path, Argument(metavar="IN", help="the clip to draw anew")] = Path()
    result: Annotated[
        Path, Argument(metavar="OUT", help="where it goes (.mp4); its record lies beside")
    ] = Path()
    prompt: Annotated[str, Option(help="what to draw", rich_help_panel=PICTURE)] = ""
    seed: Annotated[
        int | None,
        Ge(0),
        Le(2**63 - 1),
        Option(help="noise; default: drawn, and recorded", rich_help_panel=PICTURE),
    ] = None
    strength: Annotated[
        float, Gt(0), Le(1), Option(help="how much is redrawn, 0 to 1", rich_help_panel=PICTURE)
    ] = 0.5
    levels: Annotated[
        int,
        Ge(1),
        Le(1000),
        Option(
            help="noise levels of a frame, spread over the evaluations of --steps and --strength",
            rich_help_panel=PICTURE,
        ),
    ] = 4
    steps: Annotated[
        int | None,
        Ge(1),
        Le(1000),
        Option(help="denoising steps of the schedule", rich_help_panel=PICTURE),
    ] = None
    residual: Annotated[
        Literal["none", "self", "onetime"] | None,
        Option(help="residual guidance: --set loop.RCFG.negative=…", rich_help_panel=PICTURE),
    ] = None
    overwrite: Annotated[
        bool, Option("--overwrite", help="replace what is there", rich_help_panel=OUTPUT)
    ] = False


@dataclass(frozen=True)
class Serving:
    """Where the app listens, who may use it, and what it may run."""

    host: Annotated[
        str,
        Option(
            help="address to listen on; others than loopback need --auth", rich_help_panel=SERVER
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Ge(0), Le(65535), Option(help="0 takes a free one", rich_help_panel=SERVER)
    ] = 7860
    out: Annotated[
        Path,
        Option(help="folder of the results, the queue and the uploads", rich_help_panel=OUTPUT),
    ] = Path("outputs")
    model: Annotated[
        list[str],
        Option(
            help="a model that may be used beside the bundled ones: folder or hub id; repeatable",
            rich_help_panel=MODEL,
        ),
    ] = field(default_factory=list)
    device: Annotated[
        list[str],
        Option(
            help="cpu, cuda, cuda:1 or mps, one worker each; repeatable. Default: cuda where there "
            "is one, else cpu",
            rich_help_panel=MODEL,
        ),
    ] = field(default_factory=list)
    tuned: Annotated[
        Path | None,
        Option(
            help="folder of plans that `accel tune` wrote: those for the chosen model are goals; "
            "read when the server starts",
            rich_help_panel=PLAN,
        ),
    ] = None
    auth: Annotated[
        Path | None,
        Option(help="file of the users, from --add-user; asks for a login", rich_help_panel=SERVER),
    ] = None
    add_user: Annotated[
        str | None,
        Option(
            help="write a user to the file of --auth, and start nothing", rich_help_panel=SERVER
        ),
    ] = None
    share: Annotated[
        bool,
        Option("--share", help="a public address through Gradio's tunnel", rich_help_panel=SERVER),
    ] = False
    public: Annotated[
        bool,
        Option(
            "--public",
            help="no login, though others can reach it: everybody may run models and see results",
            rich_help_panel=SERVER,
        ),
    ] = False
    root_path: Annotated[
        str,
        Option(
            help="address or path under which a proxy on this machine serves it, such as "
            "https://example.org/accel",
            rich_help_panel=SERVER,
        ),
    ] = ""
    allow_host: Annotated[
        list[str],
        Option(
            help="a name of this machine that browsers may use; repeatable. Addresses in numbers "
            "and localhost always do",
            rich_help_panel=SERVER,
        ),
    ] = field(default_factory=list)
    open: Annotated[
        bool | None,
        Option(
            "--open/--no-open", help="show it in a browser; default: no", rich_help_panel=SERVER
        ),
    ] = None


@dataclass(frozen=True)
class Printing:
    """How the terminal is written to."""

    format: Annotated[
        Format, Option(help="what stdout gets: paths, or JSON", rich_help_panel=OUTPUT)
    ] = "text"


def make(kind: type[T], values: Mapping[str, Any], where: str = "--") -> T:
    """An instance of one of these classes from values that were not checked yet.

    Args:
        kind: The class.
        values: By field; the fields of other classes are left aside.
        where: What stands before a field's name in an error.

    Raises:
        BadInput: Names the first value that is of a wrong type or out of its range.
    """
    from pydantic import ValidationError

    from accel.errors import BadInput

    known = {name: values[name] for name in kind.__dataclass_fields__ if name in values}  # type: ignore[attr-defined]
    try:
        made: T = _checker(kind).validate_python(known)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadInput(f"{where}{name} {first['input']!r}: {first['msg']}.") from error
    for name in ("prompt", "negative"):
        _check_text(f"{where}{name}", known.get(name))
    return made


@cache
def _checker(kind: type) -> Any:
    """What checks the values of a class; made once, because a batch checks thousands."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _check_text(name: str, text: Any) -> None:
    from accel.errors import BadInput

    if not isinstance(text, str):
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{name}: {text!r} is no Unicode text; type it in UTF-8.") from error
    if "\0" in text:
        raise BadInput(f"{name}: {text!r} has a zero character; leave it out.")
