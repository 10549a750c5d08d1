# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages of notify_dev, at either end."""

from __future__ import annotations

import random

import pytest

from colo_xdp.colo_proxy.notify import (
    MAX_MESSAGE,
    OF_FRAMEWORK,
    NotifyDecoder,
    NotifyError,
    NotifyMessage,
    encode_message,
)
from colo_xdp.colo_proxy.packet_stream import OversizedPacketError, TruncatedPacketError

OF_PROXY = frozenset(NotifyMessage) - OF_FRAMEWORK


def test_the_bytes_are_those_that_qemu_reads() -> None:
    assert encode_message(NotifyMessage.CHECKPOINT) == b"\0\0\0\x0fCOLO_CHECKPOINT"
    assert encode_message(NotifyMessage.CHECKPOINT, vnet_hdr=True) == (
        b"\0\0\0\x0f\0\0\0\0COLO_CHECKPOINT"
    )
    assert encode_message(NotifyMessage.DO_CHECKPOINT, vnet_hdr=True) == b"\0\0\0\rDO_CHECKPOINT"


@pytest.mark.parametrize("vnet_hdr", [False, True])
@pytest.mark.parametrize("at_proxy", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_is_read_in_any_pieces(seed: int, at_proxy: bool, vnet_hdr: bool) -> None:
    rnd = random.Random(seed)
    said = rnd.choices(sorted(OF_FRAMEWORK if at_proxy else OF_PROXY), k=rnd.randrange(1, 20))
    data = b"".join(encode_message(m, vnet_hdr=vnet_hdr) for m in said)
    decoder, heard = NotifyDecoder(at_proxy=at_proxy, vnet_hdr=vnet_hdr), []
    while data:
        n = rnd.randrange(1, 40)
        decoder.receive(data[:n])
        data = data[n:]
        while (message := decoder.next_message()) is not None:
            heard.append(message)
    decoder.end()
    assert heard == said


def test_an_unknown_message_is_named_and_skipped() -> None:
    decoder = NotifyDecoder(at_proxy=True)
    for text in (b"COLO_CHECKPOINT\0", b"colo_checkpoint", b"\xff\xfe"):
        decoder.receive(len(text).to_bytes(4, "big") + text)
        with pytest.raises(NotifyError, match="unknown message"):
            decoder.next_message()
    decoder.receive(encode_message(NotifyMessage.INIT))
    assert decoder.next_message() is NotifyMessage.INIT


@pytest.mark.parametrize("message", list(NotifyMessage))
def test_each_message_comes_from_one_end(message: NotifyMessage) -> None:
    decoder = NotifyDecoder(at_proxy=message not in OF_FRAMEWORK)
    decoder.receive(encode_message(message))
    with pytest.raises(NotifyError, match="wrong end"):
        decoder.next_message()


def test_a_stream_that_is_none_of_this_ends() -> None:
    decoder = NotifyDecoder(at_proxy=True)
    decoder.receive((MAX_MESSAGE + 1).to_bytes(4, "big"))
    with pytest.raises(OversizedPacketError):
        decoder.next_message()
    cut = NotifyDecoder(at_proxy=False)
    cut.receive(encode_message(NotifyMessage.DO_CHECKPOINT)[:-1])
    assert cut.next_message() is None
    with pytest.raises(TruncatedPacketError):
        cut.end()
