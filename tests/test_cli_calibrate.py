"""`accel calibrate`: what it measures, and that the plan which it writes is used."""

import json
import math
from pathlib import Path

import pydantic
import pytest
import torch
from saved import Folders, done, run
from test_caches import Wiretap
from tiny import PIPELINES

from accel import Guard, Plan, asset, cache, errors
from accel.cache.calibration import (
    Sizes,
    calibrate_magcache,
    calibrate_teacache,
    fit,
    threshold_of_half,
)
from accel.cache.indicators import SignalChange, polynomial, relative_l1
from accel.calibration import Calibrated
from accel.guard.file import Basis
from app import plans
from app.calibrators import CALIBRATORS, Entry

ADAPTIVE = {name: CALIBRATORS[name].load() for name in ("teacache", "magcache", "table")}
"""Those of methods with a threshold, at blocks (see test_caches_custom for lists of steps)."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def calls(name, count, steps):
    """Arguments of some calls of a tiny pipeline, as the app makes them."""
    from tiny import PROMPTS, Ask

    for number in range(count):
        ask = Ask([PROMPTS[number]], [number], guidance=True)
        yield {
            **PIPELINES[name].inputs(ask),
            "num_inference_steps": steps,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(number),
        }


# The numbers.


def test_a_polynomial_is_found_again():
    truth = (40.0, -12.0, 3.0, 0.5, 0.01)
    xs = torch.linspace(0.02, 0.4, 30)
    pairs = [(x.item(), polynomial(truth, x.double()).item()) for x in xs]
    found, error = fit(pairs)
    assert found == pytest.approx(truth, rel=1e-4)
    assert error < 1e-7


def test_few_pairs_give_a_polynomial_of_a_lower_degree():
    assert fit([(0.1, 0.3)])[0] == pytest.approx((0, 0, 0, 0, 0.3))
    assert fit([(0.1, 0.2), (0.2, 0.4)])[0] == pytest.approx((0, 0, 0, 2, 0), abs=1e-9)
    assert fit([(0.1, 0.2), (0.1, 0.4)])[0] == pytest.approx((0, 0, 0, 0, 0.3))
    assert fit([(0.0, 0.2)] * 3)[0] == pytest.approx((0, 0, 0, 0, 0.2))


def test_the_usual_threshold_computes_half():
    assert threshold_of_half([[0.1] * 11]) == pytest.approx(0.11)
    assert threshold_of_half([[0.1] * 11, [0.3] * 11]) == pytest.approx(0.32)
    assert threshold_of_half([[0.0] * 4]) == 0.0  # nothing changes: off, and the plan says so


def test_a_calibrated_teacache_computes_about_half(bench):
    pipe = bench.pipe("flux_cfg")
    method = calibrate_teacache(pipe, calls("flux_cfg", 2, 12), {}).method
    with Plan(method).attach(pipe) as run:
        bench.call("flux_cfg", steps=12)
    states = [s for _, branch, _, s in run.report.to_dict()["events"][method.name] if "u" in branch]
    assert 4 <= states.count("computed") <= 9


@pytest.mark.parametrize("name", ["flux_cfg", "wan21"])
def test_the_curve_is_that_of_the_stock_residuals(bench, name):
    """γ of step i: the mean over the tokens of ‖R_i‖/‖R_{i−1}‖, averaged in the logarithm."""
    pipe, steps, count = bench.pipe(name), 4, 2
    with Wiretap(pipe) as tap:
        found = calibrate_magcache(pipe, calls(name, count, steps), {}).method
    cond = [call for index, call in enumerate(tap.calls) if index % 2 == 0]
    last = len(cond[0]) - 1
    expected = [1.0]
    for step in range(1, steps):
        logs = []
        for sample in range(count):
            new, old = (cond[sample * steps + k] for k in (step, step - 1))
            sizes = [(one[last][1] - one[0][0]).norm(dim=-1) for one in (new, old)]
            logs.append(math.log((sizes[0] / sizes[1]).mean()))
        expected.append(math.exp(sum(logs) / count))
    assert found.curve == pytest.approx(expected, rel=1e-3)


def test_teacache_is_fitted_to_what_the_network_does(bench):
    """Pairs by hand – the signal of the cache, the answers of the network – give the same fit."""
    pipe, steps = bench.pipe("flux_cfg"), 8
    norm, outputs, signals = pipe.transformer.transformer_blocks[0].norm1, [], []
    handles = [
        norm.register_forward_hook(lambda m, a, returned: signals.append(returned[0][0].clone())),
        pipe.transformer.register_forward_hook(
            lambda m, a, returned: outputs.append(returned[0][0].clone())
        ),
    ]
    found = calibrate_teacache(pipe, calls("flux_cfg", 1, steps), {"threshold": 0.3}).method
    for handle in handles:
        handle.remove()
    change = SignalChange()
    xs = [change.measure(signal) for signal in signals[::4]]  # ours and the block's; cond, uncond
    assert len(signals) == 4 * steps
    ys = [relative_l1(new, old) for old, new in zip(outputs[::2], outputs[2::2], strict=False)]
    pairs = [(x.item(), y.item()) for x, y in zip(xs[1:], ys, strict=True)]
    for x, y in pairs:
        at = torch.tensor(x, dtype=torch.float64)
        mine = polynomial(found.coefficients, at).item()
        assert mine == pytest.approx(polynomial(fit(pairs)[0], at).item(), rel=1e-2, abs=1e-3)
        assert y > 0
    assert found.threshold == 0.3


@pytest.mark.parametrize("calibrate", ADAPTIVE.values(), ids=ADAPTIVE)
@pytest.mark.parametrize("name", ["sd3", "wan22", "zimage"])
def test_a_calibration_changes_nothing_and_its_method_acts(bench, same, name, calibrate):
    pipe = bench.pipe(name)
    found = calibrate(pipe, calls(name, 1, 6), {"threshold": 1e6})
    assert same(bench.call(name, steps=4), bench.stock(name, steps=4))
    plan = Plan(found.method)
    assert Plan.from_toml(plan.to_toml()) == plan
    with plan.attach(pipe) as run:
        bench.call(name, steps=8)  # another number of steps than was calibrated
    assert run.report.verdicts[found.method.name].state == "ACTIVE"


def test_a_recorder_runs_the_stock_pipeline(bench, same):
    recorder = Sizes()
    run = Plan(recorder).attach(bench.pipe("flux_cfg"))
    output = bench.call("flux_cfg", steps=4)
    run.detach()
    assert same(output, bench.stock("flux_cfg", steps=4))
    assert len(recorder.curve) == 4


@pytest.mark.parametrize("calibrate", ADAPTIVE.values(), ids=ADAPTIVE)
def test_what_cannot_be_calibrated_is_refused(bench, calibrate):
    with pytest.raises(errors.BadInput, match="at least one prompt"):
        calibrate(bench.pipe("flux"), [], {})
    if calibrate in (calibrate_teacache, calibrate_magcache):  # a table takes UNets too
        with pytest.raises(errors.UnsupportedModel, match="no list of transformer blocks"):
            calibrate(bench.pipe("sd15"), calls("sd15", 1, 2), {})
    with pytest.raises(errors.BadInput, match="2 steps or more"):
        calibrate(bench.pipe("flux"), calls("flux", 1, 1), {})
    pipe = bench.pipe("flux")
    weight = pipe.transformer.x_embedder.weight
    kept = weight.data.clone()
    weight.data.fill_(math.nan)
    with pytest.raises(errors.BadOutput, match="nothing to calibrate"):
        calibrate(pipe, calls("flux", 1, 3), {})
    weight.data.copy_(kept)


# The command.


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_plan_is_written_and_used(models: Folders, method: str) -> None:
    Path("prompts.txt").write_text("a red fox\n\n two boats \nan old tower\n")
    folder = models("flux_cfg")
    result = done(
        "calibrate", method, "--model", folder, "--prompts", "prompts.txt", "--count", 2,
        "--steps", 5, "--threshold", 1e6, "--out", "plan.toml",
    )  # fmt: skip
    assert result.stdout.splitlines() == ["plan.toml"]
    assert "2 prompts" in result.stderr
    text = Path("plan.toml").read_text()
    assert text.startswith(f"# accel calibrate {method}: ")
    (made,) = Plan.from_toml(text).methods
    numbers = {"magcache": "curve", "teacache": "coefficients", "table": "steps"}[method]
    assert len(getattr(made, numbers)) == 5
    if method != "table":  # which has its threshold in its numbers
        assert made.threshold == 1e6
    made_picture = done(
        "generate", "a fox", "--model", folder, "--seed", 1, "--steps", 7, "--plan", "plan.toml",
        "--out", "fox.png",
    )  # fmt: skip
    assert "ACTIVE" in made_picture.stderr and "INACTIVE" not in made_picture.stderr


def test_a_list_of_steps_is_written_and_used(models: Folders) -> None:
    folder = models("flux_cfg")
    done(
        "calibrate", "steps", "--model", folder, "--count", 1, "--steps", 7, "--out", "plan.toml"
    )  # fmt: skip
    (made,) = Plan.from_toml(Path("plan.toml").read_text()).methods
    assert (made.total, len(made.steps)) == (7, 4)
    picture = done(
        "generate", "a fox", "--model", folder, "--seed", 1, "--steps", 7, "--plan", "plan.toml",
        "--out", "fox.png",
    )  # fmt: skip
    assert "ACTIVE" in picture.stderr and "INACTIVE" not in picture.stderr
    refused = run("calibrate", "steps", "--model", folder, "--count", 1, "--threshold", 0.1)
    assert refused.exit_code == 2
    assert "has no threshold" in refused.stderr


@pytest.mark.parametrize(("budget", "computed"), [("5", 5), ("0.4", 3), ("7", 7)])
def test_a_list_of_steps_is_as_long_as_asked(models: Folders, budget: str, computed: int) -> None:
    """Steps, or a share of them, rounded up; fields of the method go along."""
    done(
        "calibrate", "steps", "--model", models("flux_cfg"), "--count", 1, "--steps", 7,
        "--set", f"budget={budget}", "--set", "last=true", "--out", f"{budget}.toml",
    )  # fmt: skip
    (made,) = Plan.from_toml(Path(f"{budget}.toml").read_text()).methods
    assert (made.total, len(made.steps), made.last) == (7, computed, True)


@pytest.mark.parametrize("budget", ["0", "-1", "2.5", "1", "8"])
def test_a_budget_that_is_not_to_be_met(models: Folders, budget: str) -> None:
    """The first three before the work; one is too few with the last one, eight are too many."""
    refused = run(
        "calibrate", "steps", "--model", models("flux_cfg"), "--count", 1, "--steps", 7,
        "--set", f"budget={budget}", "--set", "last=true",
    )  # fmt: skip
    assert refused.exit_code == 2
    assert ("takes no budget" if budget in ("0", "-1", "2.5") else "No list of") in refused.stderr


class Filed(cache.FORA):
    """A method with a file."""

    numbers: Path | None = None


class Options(pydantic.BaseModel, extra="forbid"):
    interval: int = pydantic.Field(default=3, ge=2)
    method: str = "plain"


ASKED = ("height", "width", "true_cfg_scale", "negative_prompt", "num_inference_steps")
"""Of the arguments of calls, those that the file keeps."""


def calibrate_file(pipe, calls, options):
    asked = [{name: call.get(name) for name in ASKED} for call in calls]
    method = Filed(interval=options["interval"])
    return Calibrated(method, options["method"], {"numbers": json.dumps(asked).encode()})


@pytest.fixture
def _filed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = "test_cli_calibrate:"
    entry = Entry(here + "calibrate_file", here + "Options", {"numbers": "-n.bin"})
    monkeypatch.setitem(CALIBRATORS, "file", entry)
    monkeypatch.setattr("accel.plan.method_class", lambda name: Filed)


@pytest.mark.usefixtures("_filed")
def test_a_file_is_written_beside_the_plan_and_found_from_there(models: Folders) -> None:
    Path("plans").mkdir()
    result = done(
        "calibrate", "file", "--model", models("flux_cfg"), "--count", 2, "--out", "plans/a.toml",
        "--set", "interval=4", "--method", "fancy", "--steps", 7,
        "--height", 32, "--width", 48, "--guidance", 2.5, "--negative", "rain",
    )  # fmt: skip
    assert result.stdout.splitlines() == ["plans/a.toml", "plans/a-n.bin"]
    assert "fancy" in result.stderr
    drawn = dict(zip(ASKED, (32, 48, 2.5, "rain", 7), strict=True))
    assert json.loads(Path("plans/a-n.bin").read_bytes()) == [drawn, drawn]
    (written,) = Plan.from_toml(Path("plans/a.toml").read_text())
    assert (written.numbers, written.interval) == (Path("a-n.bin"), 4)
    (found,) = plans.read(Path("plans/a.toml"))
    assert found == written.model_copy(update={"numbers": Path("plans/a-n.bin")})


@pytest.mark.usefixtures("_filed")
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("--set", "interval"), "write NAME=VALUE"),
        (("--set", "interval=1"), "file takes no interval = 1"),
        (("--set", "pace=1"), "file takes no pace = 1"),
        (("--threshold", "1"), "file takes no threshold = 1.0"),
        (("--out", "there.toml"), "there-n.bin is there already"),
    ],
)
def test_options_and_files_are_checked_before_the_work(typed: tuple[str, ...], told: str) -> None:
    Path("there-n.bin").write_bytes(b"")
    result = run("calibrate", "file", "--model", "none", *typed)
    assert result.exit_code == 2
    assert told in result.stderr


def test_every_calibrator_is_there() -> None:
    for entry in CALIBRATORS.values():
        assert callable(entry.load())
        entry.checked({})


def test_the_same_seed_gives_the_same_numbers(models: Folders) -> None:
    written = []
    for out in ("a.toml", "b.toml"):
        done(
            "calibrate", "magcache", "--model", models("flux_cfg"), "--count", 1, "--steps", 3,
            "--out", out,
        )  # fmt: skip
        written.append(Path(out).read_text())
    assert written[0] == written[1]


def test_json_and_the_default_name(models: Folders) -> None:
    result = done(
        "calibrate", "teacache", "--model", models("flux_cfg"), "--count", 1, "--steps", 3,
        "--format", "json",
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert found["files"] == ["teacache-flux-cfg.toml"]
    assert Plan.from_dict(found["plan"]) == Plan.from_toml(Path(found["files"][0]).read_text())
    assert found["prompts"] == 1 and "pairs of steps" in found["note"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ((), "choose one of teacache, magcache"),
        (("warpcache",), "choose one of teacache, magcache"),
        (("teacache", "--prompts", "none.txt"), "none.txt cannot be read"),
        (("teacache", "--prompts", "empty.txt"), "has 0 prompts, --count asks for 4"),
        (("teacache", "--prompts", "bytes.txt"), "it is no UTF-8 text"),
        (("teacache", "--steps", 1), "steps"),
        (("teacache", "--count", 0), "count"),
        (("teacache", "--threshold", -1), "threshold"),
        (("teacache", "--out", "empty.txt"), "is there already"),
        (("teacache", "--model", "none/of/this"), "--model none/of/this"),
    ],
)
def test_what_cannot_be_done_is_said(typed: tuple[object, ...], told: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\xff")
    before = sorted(Path().iterdir())
    result = run("calibrate", *typed)
    assert result.exit_code == 2
    assert told in result.stderr
    assert sorted(Path().iterdir()) == before


def test_a_unet_is_refused_by_name(models: Folders) -> None:
    result = run("calibrate", "teacache", "--model", models("sd15"), "--count", 1, "--steps", 2)
    assert result.exit_code == 2 and "UNet2DConditionModel has no list" in result.stderr
    assert not list(Path().glob("*.toml"))


def test_the_bundled_model_with_the_bundled_captions() -> None:
    try:
        asset("models/scenes-flux")
    except errors.BadInput:
        pytest.skip("scenes-flux does not ship yet")
    done("calibrate", "magcache", "--count", 1, "--steps", 3)
    (made,) = Plan.from_toml(Path("magcache-scenes-flux.toml").read_text()).methods
    assert isinstance(made, cache.MagCache)
    assert len(made.curve) == 3 and made.curve[0] == 1.0


def test_a_guard_is_written_and_used(models: Folders) -> None:
    Path("prompts.txt").write_text("\n".join(f"{number} red foxes" for number in range(19)))
    Path("bold.toml").write_text("[cache.EasyCache]\nthreshold = 1e6\nwarmup = 2\n")
    folder = models("flux_cfg")
    result = done(
        "calibrate", "guard", "--model", folder, "--prompts", "prompts.txt", "--count", 19,
        "--steps", 5, "--set", "plan=bold.toml", "--set", "budgets=[1.0, 9.0]",
        "--set", "max_error=9.0", "--out", "guarded.toml",
    )  # fmt: skip
    assert result.stdout.splitlines() == ["guarded.toml", "guarded-guard.json"]
    plan = Plan.from_toml(Path("guarded.toml").read_text())
    assert [method.name for method in plan] == ["cache.EasyCache"]
    assert plan.guard == Guard(max_error=9.0, file=Path("guarded-guard.json"))
    assert Basis.model_validate_json(Path("guarded-guard.json").read_text()).captions == 19
    made = done(
        "generate", "a fox", "--model", folder, "--seed", 1, "--steps", 5,
        "--plan", "guarded.toml", "--set", "guard.check_every=4", "--out", "fox.png",
    )  # fmt: skip
    assert "ACTIVE" in made.stderr and "calibrated on 19" in made.stderr
    few = run("calibrate", "guard", "--model", folder, "--count", 18)
    assert few.exit_code == 2 and "rests on 19 prompts" in few.stderr
