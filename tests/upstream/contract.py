"""How a contract test fails: with a sentence that says which part of a host has changed, and who relies on it."""

import inspect
from collections.abc import Callable
from importlib.metadata import version


def holds(condition: object, host: str, change: str, user: str) -> None:
    """Fail unless the condition is true.

    Args:
        condition: what we assume.
        host: the distribution.
        change: what is different if it is not true, a clause about the host.
        user: our module that relies on it.
    """
    assert condition, f"{host} {version(host)}: {change}, and {user} relies on it"


def takes(function: Callable, parameters: list[str], host: str, user: str) -> None:
    """Fail unless the function has parameters of these names in this order; there may be others."""
    found = [name for name in inspect.signature(function).parameters if name in parameters]
    name = f"{function.__module__}.{function.__qualname__}"
    holds(found == parameters, host, f"{name} takes {found} of the parameters {parameters}", user)


def says(function: Callable, phrases: list[str], host: str, user: str) -> None:
    """Fail unless the source of the function holds these phrases in this order."""
    source = " ".join(inspect.getsource(function).split())
    places = [source.find(phrase) for phrase in phrases]
    name = f"{function.__module__}.{function.__qualname__}"
    for phrase, place in zip(phrases, places, strict=True):
        holds(place >= 0, host, f"{name} no longer says {phrase!r}", user)
    holds(places == sorted(places), host, f"{name} no longer does {', '.join(phrases)} in this order", user)
