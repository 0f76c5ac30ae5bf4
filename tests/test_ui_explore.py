"""Sweeps: every combination, checked before anything is admitted; the plot shows what there is."""

import re
from types import SimpleNamespace

import gradio as gr
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pages import HOSTILE, Memory, Reader, drawn, job, request, result, same_shape, speedup

from accel.errors import BadInput, BadModel, PlanError
from accel.plan import Plan, build, methods
from app.serve.jobs import ENDED, STOCK, Busy, Spec
from app.ui import explore, grid, records, scatter, sweep
from app.ui.sweep import Axis, Mark

BALANCED = Plan.preset("balanced").to_dict()
REQUEST = {"model": "scenes-flux", "prompt": "a circle", "seed": 7}
THRESHOLD, WARMUP = "cache.EasyCache.threshold", "cache.EasyCache.warmup"
THRESHOLDS = st.lists(st.floats(0, 10), min_size=1, max_size=6, unique=True)
WARMUPS = st.lists(st.integers(2, 50), min_size=1, max_size=6, unique=True)
KNOBS = sweep.knobs(methods())


# knobs and values


def test_every_number_choice_and_switch_is_a_knob():
    for name, kind in methods().items():
        for field, info in kind.model_fields.items():
            plain = info.annotation in (bool, int, float) or "Literal" in str(info.annotation)[:14]
            assert (f"{name}.{field}" in KNOBS) == plain


@pytest.mark.parametrize("knob", KNOBS)
def test_suggested_values_are_taken_and_can_be_typed(knob):
    name, _, field = knob.rpartition(".")
    values = sweep.suggested(knob)
    assert len(set(map(str, values))) == len(values)
    for value in values:
        build(name, {field: value})
    typed = sweep.values(sweep.written(values))
    assert [build(name, {field: value}) for value in typed] == [
        build(name, {field: value}) for value in values
    ]


def test_most_knobs_have_values_to_begin_with():
    """Not those that a method takes only beside another choice."""
    assert sum(len(sweep.suggested(knob)) > 1 for knob in KNOBS) > 0.9 * len(KNOBS)


@given(
    st.lists(
        st.integers()
        | st.booleans()
        | st.floats(allow_nan=False)
        | st.from_regex(r"[a-z]{2,8}", fullmatch=True).filter(
            lambda word: word not in ("true", "false", "inf", "nan")
        ),
        min_size=1,
        max_size=6,
    ).filter(lambda found: len({isinstance(one, str) for one in found}) == 1)
)
def test_what_is_written_is_read_again(found):
    again = sweep.values(sweep.written(found))
    assert list(again) == found and [type(one) for one in again] == [type(one) for one in found]


@given(st.text(max_size=40))
def test_any_text_is_some_values(text):
    assert isinstance(sweep.values(text), tuple)


def test_an_axis_needs_values_and_each_once():
    for values in ((), (1, 1), (0.1, 0.2, 0.1)):
        with pytest.raises(BadInput, match="EasyCache"):
            Axis(THRESHOLD, values)


# points


@given(THRESHOLDS, WARMUPS)
def test_a_grid_has_every_combination_once_and_every_plan_is_valid(thresholds, warmups):
    axes = [Axis(THRESHOLD, tuple(thresholds)), Axis(WARMUP, tuple(warmups))]
    found = sweep.points(BALANCED, axes)
    assert len(found) == len(thresholds) * len(warmups)
    expected = [(threshold, warmup) for threshold in thresholds for warmup in warmups]
    fields = [point.plan["cache"]["EasyCache"] for point in found]
    assert [(one["threshold"], one["warmup"]) for one in fields] == expected
    rest = {key: value for key, value in BALANCED["cache"]["EasyCache"].items()}
    for point in found:
        assert Plan.from_dict(point.plan).to_dict() == point.plan
        others = {**point.plan["cache"]["EasyCache"], "threshold": rest["threshold"]}
        assert {**others, "warmup": rest["warmup"]}.items() >= rest.items()
    assert len({point.title for point in found}) == len(found)
    assert Plan.preset("balanced").to_dict() == BALANCED, "the plan that is swept was changed"


@given(THRESHOLDS)
def test_a_method_that_is_not_in_the_plan_is_added(thresholds):
    found = sweep.points(STOCK, [Axis(THRESHOLD, tuple(thresholds))])
    for point, threshold in zip(found, thresholds, strict=True):
        assert point.plan == Plan(build("cache.EasyCache", {"threshold": threshold})).to_dict()


@given(THRESHOLDS, WARMUPS, st.integers(-50, 1), st.data())
def test_an_invalid_value_anywhere_is_refused_by_name(thresholds, warmups, wrong, data):
    place = data.draw(st.integers(0, len(warmups)))
    warmups.insert(place, wrong)
    axes = [Axis(THRESHOLD, tuple(thresholds)), Axis(WARMUP, tuple(warmups))]
    with pytest.raises(PlanError, match=rf"warmup = {wrong}"):
        sweep.points(BALANCED, axes)


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ([], "not 0"),
        ([Axis(THRESHOLD, (0.1,))] * 2, "twice"),
        ([Axis(THRESHOLD, (0.1,)), Axis(WARMUP, (2,)), Axis("cache.FORA.interval", (2,))], "not 3"),
        ([Axis(THRESHOLD, tuple(range(7))), Axis(WARMUP, tuple(range(2, 9)))], "49 pictures"),
        ([Axis("cache.EasyCash.threshold", (0.1,))], "EasyCache"),
        ([Axis("cache.EasyCache.thresold", (0.1,))], "thresold"),
        ([Axis(THRESHOLD, ("much",))], "much"),
    ],
)
def test_what_is_no_sweep_is_refused_and_named(axes, named):
    with pytest.raises((BadInput, PlanError), match=named):
        sweep.points(BALANCED, axes)


# admission


def base(**changes):
    return Spec(request={**REQUEST, **changes}, plan=BALANCED, title="balanced")


@given(THRESHOLDS, WARMUPS)
def test_a_sweep_is_one_group_stock_first_and_of_one_seed(thresholds, warmups):
    service = Memory()
    axes = [Axis(THRESHOLD, tuple(thresholds)), Axis(WARMUP, tuple(warmups))]
    spec = base()
    del spec.request["seed"]
    jobs = explore.submitted(service, "local", spec, axes, "stock")
    assert [id for _, ids in service.groups for id in ids] == [one.id for one in jobs]
    assert len(jobs) == 1 + len(thresholds) * len(warmups)
    assert jobs[0].spec.plan == STOCK and jobs[0].spec.against is None
    assert all(one.spec.against == jobs[0].id for one in jobs[1:])
    assert len({one.spec.request["seed"] for one in jobs}) == 1
    assert len({one.group for one in jobs}) == 1 and jobs[0].group


@given(THRESHOLDS, st.integers(-50, 1))
def test_nothing_is_admitted_of_a_sweep_with_an_invalid_plan(thresholds, wrong):
    service = Memory()
    axes = [Axis(THRESHOLD, tuple(thresholds)), Axis(WARMUP, (2, wrong))]
    with pytest.raises(PlanError):
        explore.submitted(service, "local", base(), axes, "stock")
    assert not service.jobs and not service.groups


@given(st.integers(min_value=2))
def test_a_long_value_makes_a_title_that_a_job_can_keep(warmup):
    point = sweep.points(BALANCED, [Axis(WARMUP, (10**300 + warmup,))])
    stock, spec = sweep.runs(REQUEST, point, "stock")
    assert stock.title == "stock" and len(spec.title) <= sweep.TITLE


# marks


def ended(id, title, **changes):
    return job(id, "done", Spec(request=REQUEST, title=title), result=result(**changes))


def test_a_mark_takes_the_measured_speed_and_says_where_it_is_from_one_run_alone():
    jobs = [
        ended("s", "stock", seconds=60.0),
        ended("a", "one", seconds=2.0, quality={"ssim": 0.9, "psnr": 31.0}),
        ended(
            "b", "two", seconds=2.0, quality={"ssim": 1.0, "psnr": "equal"}, speedup=speedup(2.5)
        ),
        ended("c", "three", quality={"ssim": "the sizes differ"}),
        ended("d", "four", partial=True),
        job("e", "queued"),
        ended("f", "six", quality={"ssim": 0.9}, speedup=speedup(2.5, 2.5, 2.5)),
    ]
    stock, one, two, three, four, five, six = sweep.marks(jobs)
    assert (six.ratio, six.measured) == (2.5, False)
    assert (stock.title, stock.ratio, stock.ssim) == ("", 1.0, 1.0)
    assert one.ratio is None and not one.plotted, "the stock run was the first after loading"
    assert (two.ratio, two.measured, two.psnr) == (2.5, True, float("inf"))
    assert three.ssim is None and not three.plotted
    assert four.seconds is None and five.seconds is None


@pytest.mark.parametrize(("language", "says"), [("en", "does not count"), ("de", "zählt nicht")])
@pytest.mark.parametrize("found", [None, speedup()])
def test_why_a_speed_is_missing_is_said_when_a_sweep_has_ended(found, language, says):
    jobs = [
        ended("s", "stock", seconds=60.0),
        ended("a", "one", quality={"ssim": 0.9}, speedup=found),
    ]
    view = explore.view(Memory(), jobs, language)
    assert (says in view.status) == (found is None)
    assert "×" not in view.table and "30.0" not in view.table
    still = explore.view(Memory(), [*jobs, job("q", "queued")], language)
    assert says not in still.status
    assert says not in explore.view(Memory(), [job("s", "failed"), jobs[1]], language).status


def test_without_a_stock_run_no_speed_is_made_up():
    jobs = [job("s", "failed"), ended("a", "one", quality={"ssim": 0.9})]
    stock, one = sweep.marks(jobs)
    assert one.ratio is None and not one.plotted and not stock.plotted
    assert sweep.marks([]) == []


MARKS = st.lists(
    st.builds(
        Mark,
        st.just("id"),
        st.sampled_from(["", "one", HOSTILE]),
        st.sampled_from(["done", "running"]),
        st.floats(0.1, 100),
        st.none() | st.floats(0.01, 100),
        st.booleans(),
        st.none() | st.floats(-1, 1),
        st.none(),
    ),
    max_size=12,
)


@given(MARKS)
def test_the_front_is_what_nothing_beats(marks):
    known = [mark for mark in marks if mark.plotted]
    front = sweep.best(marks)
    assert bool(front) == bool(known)
    for mark in known:
        better = [
            one
            for one in known
            if one.ratio >= mark.ratio
            and one.ssim >= mark.ssim
            and (one.ratio, one.ssim) != (mark.ratio, mark.ssim)
        ]
        assert (mark in front) == (not better)


# the plot


@given(MARKS)
def test_every_known_mark_is_a_button_inside_of_the_plot(marks):
    html = scatter.draw(marks)
    known = [str(index) for index, mark in enumerate(marks) if mark.plotted]
    if not known:
        assert html == ""
        return
    shown = Reader(html)
    assert shown.values("data-index") == known
    assert shown.values("tabindex") == ["0"] * len(known)
    assert shown.values("role").count("button") == len(known)
    for x, y in zip(shown.values("cx"), shown.values("cy"), strict=True):
        assert scatter.LEFT <= float(x) <= scatter.WIDTH - scatter.RIGHT
        assert scatter.TOP <= float(y) <= scatter.HEIGHT - scatter.BOTTOM


@given(MARKS)
def test_the_plot_puts_faster_to_the_right_and_nearer_up(marks):
    known = [mark for mark in marks if mark.plotted]
    assume(len(known) > 1)
    shown = Reader(scatter.draw(marks))
    xs, ys = ([float(v) for v in shown.values(name)] for name in ("cx", "cy"))
    for i, one in enumerate(known):
        for j, other in enumerate(known):
            assert one.ratio <= other.ratio or xs[i] >= xs[j]
            assert one.ssim <= other.ssim or ys[i] <= ys[j]


@given(st.text(min_size=1) | st.just(HOSTILE))
def test_a_title_never_becomes_markup_in_plot_or_table(title):
    def mark(title):
        return [Mark("a", title, "done", 1.0, 2.0, True, 0.9, 30.0)]

    shown = same_shape(scatter.draw(mark(title)), scatter.draw(mark("plain")))
    assert any(title in value for value in shown.values("aria-label"))
    table = explore.table(mark(title), "en")
    assert title in same_shape(table, explore.table(mark("plain"), "en")).text


@given(st.floats(1e-6, 1e6))
def test_steps_of_an_axis_are_round_and_not_too_many(rough):
    step = scatter.round_step(rough)
    assert rough * (1 - 1e-6) <= step <= 2.6 * rough
    assert f"{step:e}"[0] in "125" and float(f"{step:e}".split("e")[0]) in (1, 2, 5)


@given(st.floats(-100, 100), st.floats(0.02, 100))
def test_ticks_lie_inside_of_the_axis(low, width):
    scale = scatter.Scale(low, low + width, 0, 100)
    assert 2 <= len(scale.ticks) <= 7
    assert all(-1e-3 <= scale(tick) <= 100 + 1e-3 for tick in scale.ticks)


# the page


def page(service):
    model = SimpleNamespace(value="scenes-flux")
    generate = SimpleNamespace(
        fields={"model": model}, spec=lambda owner, form: base(**(form[0] if form else {}))
    )
    return explore.Events(service, generate)


def started(service, **typed):
    values = {"first": THRESHOLD, "values": "0.1, 0.2", "second": "", "others": "", **typed}
    return list(page(service).start(*values.values(), request()))[-1][1]


def test_a_sweep_is_shown_as_it_comes(monkeypatch):
    service = Memory()
    ids = started(service)
    watching = page(service).watch(ids, request())
    results, pictures, plot, _, status, stop = next(watching)
    assert results["visible"] and Reader(pictures).values("data-index") == []
    assert plot == "" and stop["interactive"]
    assert "0 of 3" in status
    near = {"ssim": 0.9, "psnr": 30.0}
    pauses = iter(
        [lambda: None]
        + [
            (lambda id=id: service.end(id, result=result(quality=near, speedup=speedup())))
            for id in ids
        ]
    )
    monkeypatch.setattr(explore.time, "sleep", lambda _: next(pauses)())
    views = [view for view in watching if view is not explore.UNCHANGED]
    shown = [Reader(view[1]).values("data-index") for view in views]
    assert shown == [["0"], ["0", "1"], ["0", "1", "2"]], "pictures as they come, in order"
    assert not views[-1][5]["interactive"]
    assert Reader(views[-1][2]).values("data-index") == ["0", "1", "2"]
    sources = Reader(views[-1][1]).values("src")
    assert sources == [f"api/v1/jobs/{id}/files/picture" for id in ids]


@given(THRESHOLDS, WARMUPS | st.none(), st.data())
def test_the_grid_has_its_knobs_as_axes_whatever_is_missing(thresholds, warmups, data):
    chosen = {THRESHOLD: thresholds, **({WARMUP: warmups} if warmups else {})}
    axes = [Axis(knob, tuple(values)) for knob, values in chosen.items()]
    service = Memory()
    jobs = explore.submitted(service, "local", base(), axes, "stock")
    for one in jobs:
        left = data.draw(st.none() | st.just(result()))
        service.end(one.id, data.draw(st.sampled_from(ENDED)), result=left)
    service.missing = {(id, "picture") for id in data.draw(st.sets(st.sampled_from([*"0123"])))}
    view = explore.view(service, service.jobs, "en")
    shown = [one for one in service.jobs if records.role(service, one)]
    assert Reader(view.grid).values("data-index") == [one.id for one in shown]
    heads = re.findall(r'<th scope="(col|row)">(.*?)</th>', view.grid)
    columns = [text for scope, text in heads if scope == "col"][1:]
    rows = [text for scope, text in heads if scope == "row"]
    thresholds = [f"EasyCache.threshold = {value}" for value in thresholds]
    warmups = warmups and [f"EasyCache.warmup = {value}" for value in warmups]
    assert (columns, rows) == ((warmups, thresholds) if warmups else (thresholds, ["Pictures"]))
    body = view.grid.partition("<tbody>")[2]
    cells = re.findall(r"<td>(.*?)</td>", body)
    numbers = [int(re.search(r"(?:<span>|>)(\d+)", cell)[1]) for cell in cells]
    assert numbers == list(range(1, len(jobs))), "a place each, in order"
    gone = [one for one in service.jobs if one.result and one not in shown]
    assert view.grid.count("its file is gone") == len(gone)


def test_a_clip_in_the_grid_is_a_clip():
    clip = sweep.Mark("a", "", "done", 1.0, 1.0, True, 1.0)
    assert "<video" in grid.draw([grid.Shot(clip, "api/v1/jobs/a/files/picture", film=True)])
    assert grid.draw([]) == ""


@given(st.text(min_size=1) | st.just(HOSTILE))
def test_no_text_of_a_sweep_becomes_markup(text):
    def shown(text):
        title = f"{THRESHOLD} = {text}"
        marks = [Mark("s", "", "done", 1.0, 1.0, True, 1.0), Mark("a", title, "done", 1.0, 2.0)]
        return grid.draw([grid.Shot(mark, f"files/{text}") for mark in marks])

    assert text in same_shape(shown(text), shown("plain")).text


@given(THRESHOLDS, WARMUPS)
def test_the_knobs_of_a_point_are_read_from_its_title(thresholds, warmups):
    axes = [Axis(THRESHOLD, tuple(thresholds)), Axis(WARMUP, tuple(warmups))]
    for point in sweep.points(BALANCED, axes):
        fields = point.plan["cache"]["EasyCache"]
        assert sweep.settings(point.title) == {
            THRESHOLD: str(fields["threshold"]),
            WARMUP: str(fields["warmup"]),
        }
    assert sweep.settings("") == sweep.settings("stock") == {}


@pytest.mark.parametrize("state", ["queued", "running", *ENDED])
def test_a_sweep_that_stands_still_says_why(state):
    service = Memory()
    service.paused = "The disk is full: free some space."
    html = explore.view(service, [job("a", state)], "en").status
    assert ("The disk is full" in html) == (state not in ENDED)


@pytest.mark.parametrize("ids", [None, [], ["gone"]])
def test_nothing_to_watch_shows_nothing(ids):
    (view,) = page(Memory()).watch(ids, request())
    assert view is explore.UNCHANGED or view == explore._updates(explore.NOTHING)


def test_stop_ends_what_has_not_ended_and_keeps_the_rest():
    service = Memory()
    ids = started(service)
    service.end(ids[0], result=result())
    page(service).stop(ids, request())
    assert [service.job("local", id).state for id in ids] == ["done", "stopped", "stopped"]
    (jobs,) = explore.follow(service, "local", ids)
    assert all(one.state in ENDED for one in jobs)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_point_gives_its_settings_to_generate(index):
    service = Memory()
    ids = started(service)
    found = page(service).load(ids, SimpleNamespace(index=index), request())
    spec = Spec(**found)
    assert spec == service.jobs[index].spec.model_copy(update={"against": None})


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ({"first": ""}, "not 0"),
        ({"first": None, "second": None}, "not 0"),
        ({"values": ""}, "no values"),
        ({"values": None}, "no values"),
        ({"second": THRESHOLD, "others": "1"}, "twice"),
        ({"values": "-1"}, "threshold"),
        ({"values": HOSTILE}, "threshold"),
    ],
)
def test_what_cannot_be_swept_is_told_and_nothing_is_admitted(typed, named):
    service = Memory()
    with pytest.raises(gr.Error) as error:
        started(service, **typed)
    assert named in error.value.message and "<script" not in error.value.message
    assert not service.jobs


def test_a_refused_sweep_leaves_nothing():
    service = Memory()
    service.refusals = [Busy("The queue is full: try again in 5 s.", 5.0)]
    with pytest.raises(gr.Error, match="try again"):
        started(service)
    assert not service.jobs


def test_that_a_sweep_is_checked_is_said_before_it_is_admitted():
    service = Memory()
    steps = page(service).start(THRESHOLD, "0.1", "", "", request())
    status, ids = next(steps)
    assert "Checking" in status and not service.jobs and "value" not in ids
    assert next(steps)[1] == [one.id for one in service.jobs]


def test_errors_of_runs_are_told_once():
    jobs = [job(str(i), "failed", error="It is so: do this.") for i in range(3)]
    html = explore.view(Memory(), jobs, "en").status
    assert html.count("It is so") == 1


def test_only_knobs_of_methods_that_fit_are_offered():
    service = Memory(unfit={"cache.EasyCache": "It has no denoiser."})
    first, second = page(service).offer("scenes-flux", request())
    assert not [knob for knob in first["choices"] if knob.startswith("cache.EasyCache.")]
    assert set(second["choices"][1:]) == set(first["choices"]) < set(KNOBS)
    with pytest.raises(gr.Error, match="not offered"):
        page(service).offer("another", request())


def test_a_model_that_is_not_here_yet_is_offered_every_knob():
    service = Memory()
    service.broken = BadModel("it is not here yet: make a picture with it.")
    first, second = page(service).offer("scenes-flux", request())
    assert first["choices"] == KNOBS == second["choices"][1:]


def whole(found):
    """Draws the page; its tab, and all of its events in order."""
    model = gr.Dropdown(["scenes-flux"], value="scenes-flux")
    generate = SimpleNamespace(fields={"model": model}, inputs=[model], spec=None)
    with gr.Tab("explore") as opened:
        explore.tab(Memory(), generate, gr.State(None), opened)
    found += [opened, *gr.context.Context.root_block.fns.values()]


def test_what_fits_is_found_out_only_when_the_page_is_chosen():
    found = []
    drawn(lambda: whole(found))
    opened, *functions = found
    (offering,) = (fn for fn in functions if fn.name == "offer")
    assert offering.targets == [(opened._id, "select")]


def test_the_sweep_before_is_no_longer_watched_when_another_begins():
    """Gradio does one after the other: what is cancelled later would be the new sweep's."""
    found = []
    drawn(lambda: whole(found))
    _, *functions = found
    names = [fn.name for fn in functions]
    cancelling = [index for index, fn in enumerate(functions) if fn.cancels]
    assert cancelling and max(cancelling) < names.index("start")
    assert functions[cancelling[0]].targets == functions[names.index("start")].targets


def test_the_page_has_what_browser_tests_look_for():
    assert {"explore-run", "explore-grid", "explore-plot"} <= drawn(lambda: whole([]))
