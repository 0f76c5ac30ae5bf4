"""What the server admits: the limits hold for every request, plan and upload, however made."""

import errno
import io
import json
import os
import random
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import Base
from saved import picture
from tiny import PIPELINES

from accel import Plan
from accel.errors import AccelError, BadInput, NotWritten
from accel.plan import methods
from app.call import SIDES, arguments, extent, picture_size, read_picture
from app.modes import pipeline_for
from app.request import Request
from app.serve import uploads
from app.serve.jobs import Spec
from app.serve.limits import BUNDLED, Limits, check, check_path, check_plan
from app.serve.service import Service
from app.serve.supervisor import Room

LIMITS = Limits(
    side=512,
    pixels=512 * 512 * 4,
    frames=8,
    steps=50,
    work=512 * 512 * 60,
    prompt=40,
    upload_bytes=20_000,
    lora_bytes=40_000,
)
FUNCTION = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def sized(limit):
    return st.one_of(st.none(), st.integers(1, 2 * limit))


@given(
    width=sized(512),
    height=sized(512),
    frames=sized(8),
    steps=sized(50),
    prompt=st.text(max_size=80),
    own=st.fixed_dictionaries(
        {},
        optional={
            "width": st.integers(1, 600),
            "height": st.integers(1, 600),
            "num_frames": st.integers(1, 12),
            "num_inference_steps": st.integers(1, 60),
        },
    ),
)
def test_a_request_is_admitted_exactly_within_the_limits(width, height, frames, steps, prompt, own):
    request = Request(width=width, height=height, frames=frames, steps=steps, prompt=prompt)
    wide, high = width or own.get("width", 1024), height or own.get("height", 1024)
    long = frames or own.get("num_frames", 1)
    work = wide * high * long * (steps or own.get("num_inference_steps", 50))
    within = (
        wide <= 512
        and high <= 512
        and long <= 8
        and wide * high * long <= LIMITS.pixels
        and (steps or own.get("num_inference_steps", 50)) <= 50
        and work <= LIMITS.work
        and len(prompt) <= 40
    )
    if within:
        check(request, LIMITS, own, Path("/nowhere"))
    else:
        with pytest.raises(BadInput, match="admits at most"):
            check(request, LIMITS, own, Path("/nowhere"))


@cache
def from_a_picture(name):
    """The pipeline of a tiny model that continues a picture."""
    return pipeline_for(PIPELINES[name].build(), Request(image=Path("start.png")))


@FUNCTION
@given(
    drawn=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    turned=st.booleans(),
    model=st.sampled_from(["sd15", "flux_cfg"]),
    asked=st.fixed_dictionaries({}, optional={side: st.sampled_from([32, 64]) for side in SIDES}),
    stated=st.booleans(),
)
def test_a_start_picture_counts_as_large_as_it_makes_the_run(
    tmp_path, drawn, turned, model, asked, stated
):
    """A run of the pipeline that takes it is never larger than what was counted."""
    path = tmp_path / "start.png"
    exif = Image.Exif()
    exif[Base.Orientation] = 6 if turned else 1
    Image.new("RGB", drawn).save(path, exif=exif)
    own = {"height": 32, "width": 32} if stated else {}
    request = Request(prompt="fox", image=path, **asked)
    counted = extent(request, own)
    assert picture_size(path) == read_picture(path).size
    call = arguments(from_a_picture(model), request, own)
    picture = call["image"]
    width, height = (call.get(side, getattr(picture, side)) for side in ("width", "height"))
    assert width <= counted.width and height <= counted.height
    if not stated:
        found = picture_size(path)
        assert counted.width == asked.get("width", found[0])
        assert counted.height == asked.get("height", found[1])


def test_a_clip_from_a_picture_counts_as_the_model_makes_it(tmp_path):
    path = picture(tmp_path / "start.png")
    own = {"width": 16, "height": 8, "num_frames": 9, "num_inference_steps": 30}
    found = extent(Request(image=path), own)
    assert (found.width, found.height, found.frames, found.steps) == (16, 8, 9, 30)
    assert found.pixels == 16 * 8 * 9


@pytest.mark.parametrize(("limit", "most"), [("pixels", "frames: "), ("work", "steps: ")])
def test_a_start_picture_does_not_get_round_a_limit(tmp_path, limit, most):
    path = tmp_path / "start.png"
    Image.new("RGB", (64, 64)).save(path)
    request = Request(prompt="fox", image=path, steps=2)
    least = 64 * 64 * (2 if limit == "work" else 1)
    check(request, replace(LIMITS, **{limit: least}), {}, tmp_path)
    with pytest.raises(BadInput, match=f"{most}{least}, .*admits at most {least - 1}"):
        check(request, replace(LIMITS, **{limit: least - 1}), {}, tmp_path)


@pytest.mark.parametrize("model", BUNDLED)
def test_the_room_on_the_disk_is_that_for_the_size_that_is_made(tmp_path, model):
    from app.serve import catalogue

    own, room = catalogue.call(model), Room(least=5, pixel=2)
    pixels = own["width"] * own["height"] * own.get("num_frames", 1)
    assert room.needed(Request(model=model)) == 5 + 2 * pixels
    assert room.needed(Request(model=model, width=8, height=8, frames=1)) == 5 + 2 * 64
    for gone in (Request(model=str(tmp_path / "gone")), Request(image=tmp_path / "gone.png")):
        assert room.needed(gone) == 5


@pytest.mark.parametrize(
    "model", ["", "scenes-flux/", "../scenes-flux", "/", "other/model", "oracle"]
)
def test_models_that_are_not_offered_are_not_touched(model):
    for request in (Request(model=model), Request(controlnet=model)):
        with pytest.raises(BadInput, match="not offered"):
            check(request, LIMITS, {}, Path("/nowhere"))


@pytest.mark.parametrize("field", ["revision", "variant"])
def test_other_weights_of_an_offered_model_are_refused(field):
    with pytest.raises(BadInput, match="command line"):
        check(Request(**{field: "main"}), LIMITS, {}, Path("/nowhere"))


@FUNCTION
@given(text=st.text())
@example("/etc/passwd")
@example("../outside.png")
@example("inside/../../outside.png")
@example("link.png")
@example("inside.png\0")
@example("x" * 5000)
def test_files_are_read_from_the_owner_s_folder_alone(tmp_path, text):
    inside = tmp_path / "inside"
    inside.mkdir(exist_ok=True)
    picture(inside / "inside.png")
    picture(tmp_path / "outside.png")
    link = inside / "link.png"
    if not link.is_symlink():
        link.symlink_to(tmp_path / "outside.png")
    for path in (Path(text), inside / text):
        try:
            check_path("image", path, (inside,))
        except BadInput:
            continue
        assert path.resolve().parent == inside.resolve()
    check_path("image", inside / "inside.png", (inside,))
    check_path("image", inside / "inside.png", (tmp_path / "elsewhere", inside))
    with pytest.raises(BadInput, match="none of your uploads"):
        check_path("image", link, (inside,))


def test_every_path_of_a_plan_is_one_of_an_upload(tmp_path):
    with_paths = {
        name: [
            field for field, about in kind.model_fields.items() if "Path" in str(about.annotation)
        ]
        for name, kind in methods().items()
    }
    found = {name: names for name, names in with_paths.items() if names}
    assert found, "no method refers to a file: this test looks at nothing"
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"secret")
    for name, names in found.items():
        for field in names:
            plan = Plan(methods()[name].model_construct(**{field: secret}))
            with pytest.raises(BadInput, match=f"{name}.{field}: secret.safetensors is none"):
                check_plan(plan, LIMITS, tmp_path / "uploads")
            check_plan(plan, replace(LIMITS, roots=(tmp_path,)), tmp_path / "uploads")


def test_all_limits_are_positive_and_the_defaults_let_the_bundled_models_be():
    for field in fields(Limits):
        value = getattr(Limits(), field.name)
        assert not isinstance(value, int) or value > 0
    from app.serve import catalogue

    for model in BUNDLED:
        check(Request(model=model), Limits(), catalogue.call(model), Path("/nowhere"))


# Whatever is submitted

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(), st.integers(), max_size=2),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from([field.name for field in fields(Request)]), st.text())


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    made = Service(tmp_path_factory.mktemp("limits"))
    yield made
    made.close()


@settings(max_examples=300)
@given(
    request=st.dictionaries(KEYS, VALUES, max_size=4),
    plan=st.one_of(st.just({"plan": 1}), st.dictionaries(st.text(), VALUES, max_size=2)),
    kind=st.sampled_from(["generate", "compare", "measure"]),
)
@example({"prompt": "\ud800"}, {"plan": 1}, "generate")
@example({"seed": 2**63}, {"plan": 1}, "generate")
@example({"guidance": float("nan")}, {"plan": 1}, "generate")
@example({}, {"\ud800": {}}, "generate")
def test_anything_is_admitted_or_refused_in_words(service, request, plan, kind):
    spec = Spec(kind=kind, request=request, plan=plan)
    try:
        [job] = service.submit("fuzz", [spec])
    except AccelError as error:
        assert str(error)
    else:
        asked = job.spec.request
        assert asked["seed"] >= 0 and asked["model"] in BUNDLED
        assert Spec.model_validate_json(job.spec.model_dump_json()) == job.spec
        service.cancel("fuzz", job.id)


@settings(max_examples=100)
@given(st.text(), st.text())
def test_asking_for_anything_gives_an_answer_in_words(service, owner, id):
    for act in (
        lambda: service.job(owner, id),
        lambda: service.file(owner, id, id),
        lambda: service.figures(id),
        lambda: service.fits(id),
        lambda: service.measure(owner, id),
    ):
        with pytest.raises(AccelError):
            act()
    assert service.history(owner, search=id) == []


# Uploads


def encoded(kind, **more):
    held = io.BytesIO()
    Image.new("RGB", (16, 8), "teal").save(held, kind, **more)
    return held.getvalue()


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")])
def test_pictures_are_kept_as_they_are_under_a_name_of_ours(tmp_path, kind, suffix):
    data = encoded(kind)
    path = uploads.keep(tmp_path / "up", "../../evil.sh", data, LIMITS)
    assert path.parent == tmp_path / "up" and path.suffix == suffix and "evil" not in path.name
    assert path.read_bytes() == data
    (tmp_path / "given").write_bytes(data)
    assert uploads.keep(tmp_path / "up", "x", tmp_path / "given", LIMITS) == path


def weights(header=None, body=b"\0" * 8):
    text = json.dumps(header or {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    return len(text).to_bytes(8, "little") + text.encode() + body


def tensor(size):
    """Weights of so many bytes, header aside."""
    about = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    return weights({"w": about}, bytes(size))


def test_safetensors_are_kept_if_they_are_whole(tmp_path):
    path = uploads.keep(tmp_path, "style.safetensors", weights(), LIMITS)
    assert path.suffix == ".safetensors" and path.read_bytes() == weights()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95",  # a pickle
        b"PK\x03\x04",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        weights()[:-1],
        weights({"w": 5}),
        weights({"w": {"data_offsets": "ab"}}),
        weights([1, 2]),
        b"\xff" * 64,
        (2**25).to_bytes(8, "little") + b"[" * 400,
        (400).to_bytes(8, "little") + b"[" * 400 + b"0",
        encoded("PNG")[:50],
        encoded("JPEG")[:200],
    ],
)
def test_everything_else_is_refused_and_nothing_is_left(tmp_path, data):
    with pytest.raises(BadInput):
        uploads.keep(tmp_path / "up", "file", data, LIMITS)
    assert not list(tmp_path.rglob("*.*"))


def noisy(sides):
    """A picture that cannot be made smaller: 3 bytes a pixel."""
    held = io.BytesIO()
    Image.frombytes("RGB", sides, random.Random(0).randbytes(3 * sides[0] * sides[1])).save(
        held, "PNG"
    )
    return held.getvalue()


FORMS = {
    "bytes": lambda path: path.read_bytes(),
    "path": Path,
    "file": lambda path: path.open("rb"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("data", "limit", "held"),
    [
        (noisy((80, 80)), None, ".png"),
        (noisy((90, 90)), 20_000, None),
        (tensor(30_000), None, ".safetensors"),
        (tensor(40_000), 40_000, None),
        (bytes(40_001), 40_000, None),
    ],
)
def test_weights_and_pictures_have_limits_of_their_own(tmp_path, form, data, limit, held):
    (tmp_path / "given").write_bytes(data)
    content = FORMS[form](tmp_path / "given")
    if limit is None:
        path = uploads.keep(tmp_path / "up", "file", content, LIMITS)
        assert path.suffix == held and path.read_bytes() == data
    else:
        with pytest.raises(BadInput, match=f"at most {limit} of such a file"):
            uploads.keep(tmp_path / "up", "file", content, LIMITS)
        assert not (tmp_path / "up").exists()
    if form == "file":
        content.close()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 5), max_size=10), st.integers(0, 600))
def test_the_uploads_of_one_owner_take_no_more_than_their_share(tmp_path_factory, sent, share):
    folder = tmp_path_factory.mktemp("up") / "ada"
    limits = replace(LIMITS, uploads_of_owner=share)
    held = {}
    for number in sent:
        data = weights({f"w{number}": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
        if number in held or sum(map(len, held.values())) + len(data) <= share:
            held[number] = data
            assert uploads.keep(folder, "a file", data, limits).read_bytes() == data
        else:
            with pytest.raises(BadInput, match="empty the trash"):
                uploads.keep(folder, "a file", data, limits)
    found = [path.read_bytes() for path in folder.iterdir()] if folder.is_dir() else []
    assert sorted(found) == sorted(held.values())


def test_a_file_that_comes_again_is_as_young_as_a_new_one(tmp_path):
    path = uploads.keep(tmp_path, "a", encoded("PNG"), LIMITS)
    os.utime(path, (0, 0))
    assert uploads.keep(tmp_path, "b", encoded("PNG"), LIMITS) == path
    uploads.remove(tmp_path, ())
    assert path.is_file()
    os.utime(path, (0, 0))
    uploads.remove(tmp_path, (path.name,))
    assert path.is_file()
    uploads.remove(tmp_path, ())
    assert not path.exists()


def test_a_full_disk_takes_no_upload_and_keeps_no_part(tmp_path, monkeypatch):
    def fsync(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(NotWritten, match="No space left"):
        uploads.keep(tmp_path / "up", "a", encoded("PNG"), LIMITS)
    assert not list((tmp_path / "up").iterdir())


def test_too_large_in_pixels_is_refused(tmp_path):
    with pytest.raises(BadInput, match="did not arrive"):
        uploads.keep(tmp_path, "gone.png", tmp_path / "gone", LIMITS)
    held = io.BytesIO()
    Image.new("1", (513, 8)).save(held, "PNG")
    with pytest.raises(BadInput, match=r"513x8 pixels.*at most 512 a side"):
        uploads.keep(tmp_path, "wide.png", held.getvalue(), LIMITS)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"", encoded("PNG"), encoded("JPEG"), encoded("WEBP"), weights()]),
    cut=st.integers(0, 400),
    more=st.binary(max_size=60),
    name=st.text(),
)
def test_no_upload_breaks_anything(tmp_path, start, cut, more, name):
    folder = tmp_path / "up"
    try:
        path = uploads.keep(folder, name, start[:cut] + more + start[cut + len(more) :], LIMITS)
    except BadInput as error:
        assert str(error)
    else:
        assert path.parent == folder and path.is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"up"}
    assert not list(tmp_path.rglob("*.part"))
