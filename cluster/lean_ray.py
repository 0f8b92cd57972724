"""Ray's start, for a run on one machine, without what such a run has no use for.

`ray.init` starts three programs beside Ray proper: one that brings logs to the driver, one that asks clouds for more
machines, and the dashboard's server, in a minimal form even without a dashboard. Each takes half a second of a
processor while the workers import torch, and stays. And it asks for its own node once a second, though that is there
after half of one. Without them two workers are up after 3.0 s instead of 5.1 (benchmarks/NOTES.md).

Ray has parameters for the first two, which `ray.init` does not pass on, and none for the rest: so names of Ray's are
replaced while it starts. A Ray that does not have them starts as it always does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import signature
from typing import Any

LONGEST = 30.0  # seconds that Ray gives its node to come up
GLANCE = 0.005  # seconds between two looks at whether it has
MONITORS = {"include_log_monitor": False, "no_monitor": True}


@contextmanager
def lean(ray: Any) -> Iterator[None]:
    "Have Ray start like that meanwhile."
    places = ray._private
    with (
        replaced(places.parameter, "RayParams", without_monitors),
        replaced(places.node.Node, "start_api_server", lambda start: no_api_server),
        replaced(places.services, "get_node", lambda get_node: partial(once_there, ray, get_node)),
    ):
        yield


@contextmanager
def replaced(place: Any, name: str, instead: Callable[[Any], Any]) -> Iterator[None]:
    "Have another thing by that name there meanwhile, made of the one that is there, if there is one."
    original = getattr(place, name, None)
    if original is not None:
        setattr(place, name, instead(original))
    try:
        yield
    finally:
        if original is not None:
            setattr(place, name, original)


def without_monitors(params: Callable[..., Any]) -> Callable[..., Any]:
    "`params`, told to have none, if it can be told."
    known = signature(params).parameters
    return partial(params, **{name: there for name, there in MONITORS.items() if name in known})


def no_api_server(node: Any, **_: Any) -> None:
    "What Ray's node has to know of the dashboard's server: it has no address."
    node._webui_url = ""


def once_there(ray: Any, get_node: Callable[[str, str], Any], address: str, node: str) -> Any:
    "`get_node`, asked as soon as the node is there."
    deadline = time.monotonic() + LONGEST
    with suppress(Exception):  # a Ray that can't be asked like this
        client = ray._raylet.GcsClient(address=address)
        while ray.NodeID.from_hex(node) not in client.get_all_node_info() and time.monotonic() < deadline:
            time.sleep(GLANCE)
    return get_node(address, node)
