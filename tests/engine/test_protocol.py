"""The wire: everything we send comes back, everything else is refused."""

from __future__ import annotations

import types
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casparian_flow import protocol
from casparian_flow.config import GuestSettings
from casparian_flow.errors import ProtocolError

MESSAGES = typing.get_args(protocol.AnyMessage)


def values(kind: object) -> st.SearchStrategy[object]:
    """Any value of a message's field."""
    simple = {
        str: st.text(),
        int: st.integers(-(2**63), 2**63 - 1),
        bytes: st.binary(),
        bool: st.booleans(),
        float: st.floats(allow_nan=False),
        protocol.Outcome: st.sampled_from(protocol.Outcome),
        protocol.State: st.sampled_from(protocol.State),
        GuestSettings: st.builds(GuestSettings, recycle_jobs=st.integers(1, 2**63 - 1)),
    }
    if kind in simple:
        return simple[kind]
    if typing.get_origin(kind) is list:
        return st.lists(values(typing.get_args(kind)[0]), max_size=3)
    if typing.get_origin(kind) is tuple:
        return st.tuples(*map(values, typing.get_args(kind)))
    if typing.get_origin(kind) is dict:
        return st.dictionaries(*map(values, typing.get_args(kind)), max_size=3)
    if isinstance(kind, types.UnionType):
        return st.none() | values(typing.get_args(kind)[0])
    return records(kind)


def records(kind: typing.Any) -> st.SearchStrategy[typing.Any]:
    fields = {f.encode_name: values(f.type) for f in msgspec.structs.fields(kind)}
    return st.builds(kind, **fields)


@given(message=st.one_of([records(kind) for kind in MESSAGES]))
@pytest.mark.slow
def test_round_trip(message: protocol.AnyMessage) -> None:
    assert protocol.decode(protocol.encode(message)) == message


@given(frames=st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_is_refused_and_nothing_else_happens(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode(frames)


@given(message=st.one_of([records(kind) for kind in MESSAGES]), cut=st.integers(0, 50))
def test_a_cut_message_is_refused(message: protocol.AnyMessage, cut: int) -> None:
    version, body = protocol.encode(message)
    with pytest.raises(ProtocolError):
        protocol.decode([version, body[: max(0, len(body) - 1 - cut)]])


def test_another_version_is_refused() -> None:
    _, body = protocol.encode(protocol.Heartbeat(sent=1.0))
    with pytest.raises(ProtocolError):
        protocol.decode([b"CF0", body])


def test_every_message_is_in_the_union() -> None:
    declared = {
        kind
        for kind in vars(protocol).values()
        if isinstance(kind, type) and issubclass(kind, protocol.Message)
    } - {protocol.Message}
    assert declared == set(MESSAGES)
