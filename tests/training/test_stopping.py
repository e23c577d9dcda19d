"""Signals: at once where nothing is lost, noted while something could be."""

from __future__ import annotations

import os
import signal
import time

import pytest

from refinedet.training import stopping
from refinedet.training.stopping import SignalGuard, TrainingStopped, either


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.2)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 128 + signal.SIGUSR1)]
)
def test_codes(name: str, code: int) -> None:
    before = signal.getsignal(getattr(signal, name))
    with SignalGuard(), pytest.raises(TrainingStopped) as caught:
        send(getattr(signal, name))
    assert caught.value.code == code
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_signal_waits_for_a_save_but_not_for_an_evaluation() -> None:
    with SignalGuard() as signals, signals.held():
        assert not signals()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals()
        with pytest.raises(TrainingStopped), signals.at_once():
            pytest.fail("it was asked to stop before")
    with SignalGuard() as signals, signals.held():
        with pytest.raises(TrainingStopped), signals.at_once():
            send(signal.SIGUSR1)
        send(signal.SIGTERM)  # held again


def test_a_second_ctrl_c_stops_at_once_but_its_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with SignalGuard() as signals, signals.held():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what the terminal has sent to all
        monkeypatch.setattr(stopping, "_ECHO", -1.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with SignalGuard() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not signals()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_either() -> None:
    assert not either(lambda: False, None)()
    assert either(lambda: False, lambda: True)()
    assert either(lambda: True, None)()
