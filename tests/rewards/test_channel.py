import socket
import struct
import threading
import time

import pytest

from deltarl.rewards.channel import Channel


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_arrive_whole_and_in_order(ends):
    here, there = map(Channel, ends)
    sent = [b"", b"x", bytes(range(256)) * 10_000, b"last"]
    sender = threading.Thread(target=lambda: [here.send(message) for message in sent])
    sender.start()
    assert [there.receive(20) for _ in sent] == sent
    sender.join()


def test_a_message_of_which_a_part_came_is_waited_for_no_longer(ends):
    channel = Channel(ends[0])
    ends[1].sendall(struct.pack("!Q", 10) + b"12345")
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    ends[1].sendall(b"67890")
    assert channel.receive(0.0) == b"1234567890"


def test_what_came_before_the_call_is_seen_without_waiting(ends):
    here, there = map(Channel, ends)
    here.send(b"early")
    time.sleep(0.01)
    assert there.receive(0.0) == b"early"


def test_an_end_that_is_not_read_blocks_no_longer_than_asked(ends):
    with pytest.raises(TimeoutError):
        Channel(ends[0]).send(bytes(10_000_000), 0.05)


def test_a_closed_end_is_the_end_of_the_stream(ends):
    here, there = map(Channel, ends)
    copy = ends[0].dup()
    here.send(b"last")
    here.close()
    assert there.receive(5) == b"last"
    with pytest.raises(EOFError):
        there.receive(5)
    with pytest.raises(OSError):
        there.send(b"x" * 10)
    there.close()
    copy.close()


def test_what_is_no_message_is_refused(ends):
    channel = Channel(ends[0], longest=100)
    ends[1].sendall(b"not a message at all")
    with pytest.raises(ConnectionError, match="limit 100"):
        channel.receive(5)
