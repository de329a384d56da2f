import logging

import pytest

from tests.tiny import config_of, write_pool


@pytest.fixture
def pool(tmp_path):
    """The tiny pool as files; runs go beside it."""
    (tmp_path / "pool").mkdir()
    return write_pool(tmp_path / "pool")


@pytest.fixture
def config(pool, tmp_path):
    """A function that makes a configuration of the tiny pool, sections merged in by keyword."""

    def make(model=(), data=(), trainer=(), run=()):
        plain = config_of(pool)
        for key, more in {"model": model, "data": data, "trainer": trainer, "run": run}.items():
            plain[key] = {**plain[key], **dict(more)}
        plain["run"]["root"] = str(tmp_path / "runs")
        return plain

    return make


@pytest.fixture(autouse=True)
def quiet_logger():
    """The library's logger as it was, whatever a command did to it."""
    log = logging.getLogger("adamerge")
    handlers, level = list(log.handlers), log.level
    yield
    log.handlers, log.level = handlers, level
