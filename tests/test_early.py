"""Warnings from before a run has its log reach it."""

import logging

import pytest

from csd3d.early import kept_warnings

logger = logging.getLogger("csd3d")


def test_warnings_are_kept_for_the_log_and_told_at_once_after_an_error(caplog):
    with kept_warnings() as kept:
        logger.warning("cut off %r", "blue")
    assert kept == ["cut off 'blue'"]
    assert not caplog.records
    with pytest.raises(ZeroDivisionError), kept_warnings():
        print(logger.warning("slow"), 1 / 0)
    logger.warning("later")
    assert [record.getMessage() for record in caplog.records] == ["slow", "later"]
