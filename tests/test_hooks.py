"""Chains around a method: one instance only, any order of leaving, invisible to `inspect`."""

import copy
import inspect
from itertools import permutations

import pytest

from accel import errors, hooks


class Box:
    """Something with a method."""

    def __init__(self, size=1):
        self.size = size

    def grow(self, by=1, *, twice=False):
        """Grow."""
        self.size += by * (2 if twice else 1)
        return self.size


def plus(number):
    return lambda inner, *args, **kwargs: inner(*args, **kwargs) + number


def times(number):
    return lambda inner, *args, **kwargs: inner(*args, **kwargs) * number


def test_the_last_link_is_outermost():
    box = Box()
    hooks.wrap(box, "grow", plus(10))
    hooks.wrap(box, "grow", times(2))
    assert box.grow() == (2 + 10) * 2
    assert box.grow(2, twice=True) == (6 + 10) * 2


def test_a_link_may_go_below_those_that_are_there():
    box = Box()
    hooks.wrap(box, "grow", times(2))
    undo = hooks.wrap(box, "grow", plus(10), innermost=True)
    assert box.grow() == (2 + 10) * 2
    undo()
    assert box.grow() == 3 * 2


def test_a_link_may_change_arguments_or_not_call_at_all():
    box = Box()
    hooks.wrap(box, "grow", lambda inner, by=1, **kwargs: inner(by + 1, **kwargs))
    assert box.grow() == 3
    hooks.wrap(box, "grow", lambda inner, *args, **kwargs: -1)
    assert box.grow() == -1
    assert box.size == 3


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_links_leave_in_any_order(order):
    box = Box()
    before = dict(vars(box))
    links = [plus(10), times(2), plus(100)]
    undos = [hooks.wrap(box, "grow", link) for link in links]
    left = dict(enumerate(links))
    for index in order:
        undos[index]()
        del left[index]
        expected = box.size + 1
        for link in left.values():
            expected = link(lambda value=expected: value)
        assert box.grow() == expected
    assert vars(box).keys() == before.keys()
    assert box.grow.__func__ is Box.grow


def test_equal_links_are_told_apart():
    """One function put on twice is two links."""
    box, link = Box(), plus(10)
    first = hooks.wrap(box, "grow", link)
    second = hooks.wrap(box, "grow", link)
    assert box.grow() == 22
    first()
    assert box.grow() == 13
    second()
    assert "grow" not in vars(box)


def test_other_instances_and_the_class_are_left_alone():
    box, other = Box(), Box()
    before = dict(vars(Box))
    hooks.wrap(box, "grow", times(100))
    assert other.grow() == 2
    assert dict(vars(Box)) == before


def test_an_attribute_of_the_instance_comes_back():
    box = Box()
    own = box.grow = lambda by=1: 42
    undo = hooks.wrap(box, "grow", plus(1))
    assert box.grow() == 43
    undo()
    assert vars(box)["grow"] is own


def test_the_signature_shows_through():
    box = Box()
    hooks.wrap(box, "grow", lambda inner, *args, **kwargs: inner(*args, **kwargs))
    assert inspect.signature(box.grow) == inspect.signature(Box().grow)


def test_an_exception_passes_and_breaks_nothing():
    box = Box()

    def raising(inner, *args, **kwargs):
        raise KeyError("no")

    undo = hooks.wrap(box, "grow", raising)
    with pytest.raises(KeyError):
        box.grow()
    undo()
    assert box.grow() == 2


def test_a_deep_copy_is_unwrapped():
    box = Box()
    hooks.wrap(box, "grow", times(100))
    twin = copy.deepcopy(box)
    assert twin.grow() == 2
    assert (box.size, twin.size) == (1, 2)


def test_a_replaced_attribute_is_left_and_said():
    box = Box()
    undo = hooks.wrap(box, "grow", times(100))
    box.grow = lambda: 7
    with pytest.raises(errors.BrokenAttachment, match=r"Box\.grow was replaced"):
        undo()
    assert box.grow() == 7
