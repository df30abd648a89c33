"""Doorbells on real sockets."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcray.transport.doorbell import Doorbell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make_doorbell() -> Iterator[Callable[[], Doorbell]]:
    made: list[Doorbell] = []

    def make() -> Doorbell:
        made.append(Doorbell())
        return made[-1]

    yield make
    for doorbell in made:
        doorbell.close()


def is_readable(doorbell: Doorbell) -> bool:
    return bool(select.select([doorbell.fd], [], [], 0)[0])


def open_fds() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_a_ring_makes_the_peer_readable_until_it_is_drained(make_doorbell: Callable[[], Doorbell]) -> None:
    ours, peer = make_doorbell(), make_doorbell()
    ours.ring(peer.name)
    assert is_readable(peer)
    assert peer.drain() == []
    assert not is_readable(peer)
    assert peer.drain() == []


def test_ringing_a_peer_whose_queue_is_full_does_nothing(make_doorbell: Callable[[], Doorbell]) -> None:
    ours, peer = make_doorbell(), make_doorbell()
    for _ in range(2000):
        ours.ring(peer.name)
    assert is_readable(peer)


def test_ringing_a_peer_that_is_gone_does_nothing(make_doorbell: Callable[[], Doorbell]) -> None:
    gone = Doorbell()
    gone.close()
    make_doorbell().ring(gone.name)


def test_a_descriptor_is_handed_over_with_its_payload(make_doorbell: Callable[[], Doorbell]) -> None:
    ours, peer = make_doorbell(), make_doorbell()
    reader, writer = os.pipe()
    ours.send_fd(peer.name, b"the pipe", writer)
    os.close(writer)
    [(payload, fd)] = peer.drain()
    assert payload == b"the pipe"
    assert not os.get_inheritable(fd)
    os.write(fd, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(fd)
    os.close(reader)


def test_descriptors_between_rings_are_all_found(make_doorbell: Callable[[], Doorbell]) -> None:
    ours, peer = make_doorbell(), make_doorbell()
    payloads = []
    for index in range(3):
        ours.ring(peer.name)
        ours.send_fd(peer.name, str(index).encode(), 0)
    while is_readable(peer):
        for payload, fd in peer.drain():
            payloads.append(payload)
            os.close(fd)
    assert payloads == [b"0", b"1", b"2"]


def test_a_full_queue_refuses_a_descriptor(make_doorbell: Callable[[], Doorbell]) -> None:
    ours, peer = make_doorbell(), make_doorbell()

    def fill() -> None:
        for _ in range(2000):
            ours.send_fd(peer.name, b"x", 0)

    with pytest.raises(BlockingIOError):
        fill()
    while is_readable(peer):
        for _, fd in peer.drain():
            os.close(fd)


def test_a_descriptor_for_a_peer_that_is_gone_is_an_error(make_doorbell: Callable[[], Doorbell]) -> None:
    gone = Doorbell()
    gone.close()
    with pytest.raises(ConnectionRefusedError):
        make_doorbell().send_fd(gone.name, b"x", 0)


@pytest.mark.parametrize("payload", [b"", bytes(4097)])
def test_a_payload_that_the_peer_could_not_read_is_refused(
    make_doorbell: Callable[[], Doorbell], payload: bytes
) -> None:
    ours = make_doorbell()
    with pytest.raises(ValueError, match="1 to 4096 bytes"):
        ours.send_fd(ours.name, payload, 0)


def test_a_descriptor_without_a_payload_or_with_company_is_dropped(
    make_doorbell: Callable[[], Doorbell],
) -> None:
    peer = make_doorbell()
    before = open_fds()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect(peer.name)
        socket.send_fds(stranger, [b"two"], [0, 1])
        socket.send_fds(stranger, [b"\0"], [0])
        assert [payload for payload, fd in peer.drain() if os.close(fd) is None] == [b"\0"]
        socket.send_fds(stranger, [b""], [0])
        assert peer.drain() == []
    assert open_fds() == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_neither_hand_over_a_descriptor_nor_leak_one(
    make_doorbell: Callable[[], Doorbell],
) -> None:
    peer = make_doorbell()
    before = open_fds()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.connect(peer.name)
            socket.send_fds(stranger, [b"mine"], [0])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert is_readable(peer)
    assert peer.drain() == []
    assert open_fds() == before


def test_a_doorbell_is_no_file_and_no_two_have_the_same_name(make_doorbell: Callable[[], Doorbell]) -> None:
    names = {make_doorbell().name for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith(f"\0hpcray-{os.getuid()}-".encode()) for name in names)
    listed = Path("/proc/net/unix").read_text(encoding="ascii", errors="replace")
    assert f"@hpcray-{os.getuid()}-" in listed


def test_a_doorbell_is_not_inherited(make_doorbell: Callable[[], Doorbell]) -> None:
    assert not os.get_inheritable(make_doorbell().fd)
