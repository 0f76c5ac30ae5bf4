"""Put a function around one method of one object, and take it off again in any order.

Only the *instance* is changed: the chain sits in ``owner.__dict__[name]`` in front of the method
that the instance or its class had before. Several functions around the same method share one
chain, so that any of them can leave first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from accel.errors import BrokenAttachment

Around = Callable[..., Any]
"""``around(inner, *args, **kwargs)``: calls ``inner(*args, **kwargs)``, or does not."""


REHOOKING = (
    "maybe_free_model_hooks",
    "enable_model_cpu_offload",
    "remove_all_hooks",
    "load_lora_weights",
    "unload_lora_weights",
)
"""Methods of a pipeline in which accelerate's hooks come off its networks, or go on."""


class Chain:
    """Stands in for ``owner.name`` and runs the links around it, the last one put on outermost."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner = owner
        self.name = name
        self.shadowed: tuple[Any, ...] = ()
        self.original: Callable[..., Any]
        self.links: list[Around] = []
        self.seat()

    def seat(self) -> None:
        """Stand in for what is there now."""
        own = vars(self.owner)
        self.shadowed = (own[self.name],) if self.name in own else ()
        self.original = getattr(self.owner, self.name)
        object.__setattr__(self.owner, self.name, self)

    def lift(self) -> None:
        """Put back what this stands in for."""
        if self.shadowed:
            object.__setattr__(self.owner, self.name, self.shadowed[0])
        else:
            object.__delattr__(self.owner, self.name)

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


def wrap(owner: Any, name: str, around: Around, *, innermost: bool = False) -> Callable[[], None]:
    """Put ``around`` around the method ``name`` of ``owner``.

    Args:
        owner: Any object with a ``__dict__``.
        name: The method's name.
        around: Called as ``around(inner, *args, **kwargs)``.
        innermost: Put it below the functions that are there, not above them.

    Returns:
        The undo. Links can be undone in any order; the last one restores the attribute.

    Raises:
        BrokenAttachment: From the undo, if something else replaced ``owner.name`` in the meantime
            and holds on to our chain where it cannot be spliced out. The link is off all the same.
    """
    chain = vars(owner).get(name)
    if not isinstance(chain, Chain):
        chain = Chain(owner, name)
    links = chain.links
    links.insert(0 if innermost else len(links), around)

    def undo() -> None:
        links.remove(around)
        if not links:
            _restore(chain)

    return undo


def _restore(chain: Chain) -> None:
    """Put back what ``chain`` stood in for."""
    owner, name = chain.owner, chain.name
    if vars(owner).get(name) is chain:
        chain.lift()
        return
    if not _splice(owner, chain):
        raise BrokenAttachment(
            f"{type(owner).__name__}.{name} was replaced by another library while a plan was "
            "attached. The plan is off, but that library's hook still goes through an empty "
            "wrapper of ours: remove its hook before the plan is detached."
        )


def traced(module: Any, compiled: bool = False) -> bool:
    """Whether a graph was put around a chain of ours, on a module or somewhere below it."""
    compiled = compiled or getattr(module, "_compiled_call_impl", None) is not None
    if compiled and isinstance(vars(module).get("forward"), Chain):
        return True
    return any(traced(child, compiled) for child in module.children())


@contextmanager
def aside(owner: Any, name: str) -> Iterator[None]:
    """Take our chain off while another library changes what is below, then put it on again.

    Libraries that assign ``owner.name`` anew would else throw it away. A chain that has a hook of
    another library above it stays where it is.
    """
    chain = vars(owner).get(name)
    if not isinstance(chain, Chain):
        yield
        return
    chain.lift()
    try:
        yield
    finally:
        chain.seat()


def is_plain(owner: Any, name: str) -> bool:
    """Whether ``owner.name`` is just the method of its class, written down on the instance."""
    return name in vars(owner) and vars(owner)[name] == getattr(type(owner), name).__get__(owner)


def guard(pipe: Any, modules: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """Keep our chains in place where accelerate or diffusers rearrange hooks in the midst of it.

    Accelerate's model offload hooks all networks anew at the end of each run; diffusers' group
    offloading removes the hooks that watched the order of its layers after the first pass. Both
    assign ``forward``. Yields the undos.
    """
    parts = [part for part in modules if "forward" in vars(part) or "_diffusers_hook" in vars(part)]

    def rehook(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(aside(part, "forward"))
            return inner(*args, **kwargs)

    for name in REHOOKING:
        if hasattr(pipe, name):
            yield wrap(pipe, name, rehook)
    for part in parts:
        registry = vars(part).get("_diffusers_hook")
        for name in ("register_hook", "remove_hook") if registry is not None else ():
            yield wrap(registry, name, partial(_beside, part))


def _beside(part: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with aside(part, "forward"):
        return inner(*args, **kwargs)


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
