"""Put a function around one method of one object, and take it off again in any order.

Only the *instance* is changed: the chain sits in ``owner.__dict__[name]`` in front of the method
that the instance or its class had before. Several functions around the same method share one
chain, so that any of them can leave first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from accel.errors import BrokenAttachment

Around = Callable[..., Any]
"""``around(inner, *args, **kwargs)``: calls ``inner(*args, **kwargs)``, or does not."""


class Chain:
    """Stands in for ``owner.name`` and runs the links around it, the last one put on outermost."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner = owner
        self.name = name
        self.shadowed: tuple[Any, ...] = (vars(owner)[name],) if name in vars(owner) else ()
        self.original: Callable[..., Any] = getattr(owner, name)
        self.links: list[Around] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the links around the method."""
        return self._call(len(self.links), args, kwargs)

    def _call(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if depth == 0:
            return self.original(*args, **kwargs)
        around = self.links[depth - 1]
        return around(lambda *a, **k: self._call(depth - 1, a, k), *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Lets ``inspect.signature`` see the method's own signature (pipelines look at it)."""
        return self.original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the owner is unwrapped: it gets the plain method, bound to the copy."""
        copied = memo.get(id(self.owner))
        if copied is None or self.shadowed:
            return self.original
        return getattr(type(copied), self.name).__get__(copied)


def wrap(owner: Any, name: str, around: Around) -> Callable[[], None]:
    """Put ``around`` around the method ``name`` of ``owner``.

    Args:
        owner: Any object with a ``__dict__``.
        name: The method's name.
        around: Called as ``around(inner, *args, **kwargs)``.

    Returns:
        The undo. Links can be undone in any order; the last one restores the attribute.

    Raises:
        BrokenAttachment: From the undo, if something else replaced ``owner.name`` in the meantime
            and holds on to our chain where it cannot be spliced out. The link is off all the same.
    """
    chain = vars(owner).get(name)
    if not isinstance(chain, Chain):
        chain = Chain(owner, name)
        object.__setattr__(owner, name, chain)
    links = chain.links
    links.append(around)

    def undo() -> None:
        links.remove(around)
        if not links:
            _restore(chain)

    return undo


def _restore(chain: Chain) -> None:
    """Put back what ``chain`` stood in for."""
    owner, name = chain.owner, chain.name
    if vars(owner).get(name) is chain:
        if chain.shadowed:
            object.__setattr__(owner, name, chain.shadowed[0])
        else:
            object.__delattr__(owner, name)
        return
    if not _splice(owner, chain):
        raise BrokenAttachment(
            f"{type(owner).__name__}.{name} was replaced by another library while a plan was "
            "attached. The plan is off, but that library's hook still goes through an empty "
            "wrapper of ours: remove its hook before the plan is detached."
        )


def in_place(owner: Any, name: str) -> bool:
    """Whether a call of ``owner.name`` still comes through a chain of ours.

    It does where the chain is the attribute, or where accelerate or diffusers put a hook above it.
    """
    if isinstance(vars(owner).get(name), Chain):
        return True
    return name == "forward" and any(
        isinstance(getattr(holder, slot), Chain) for holder, slot in _hooks_above(owner)
    )


def _splice(owner: Any, chain: Chain) -> bool:
    """Cut an empty chain out of the hooks that accelerate or diffusers put above it."""
    for holder, slot in _hooks_above(owner):
        if getattr(holder, slot) is chain:
            setattr(holder, slot, chain.original)
            return True
    return False


def _hooks_above(owner: Any) -> Iterator[tuple[Any, str]]:
    """Where the hooks of accelerate and diffusers keep the ``forward`` that was there before."""
    if "_old_forward" in vars(owner):  # accelerate's add_hook_to_module
        yield owner, "_old_forward"
    for reference in getattr(vars(owner).get("_diffusers_hook"), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"
