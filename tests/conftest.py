import logging

import pytest

from tests.tiny import config_of, write_pool


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items):
    """Mark all cases of a test `slow` but those that `slow_unless` names: they repeat what these show.

    Raises:
        pytest.UsageError: A name that no case of the test has.
    """
    cases = {}
    for item in items:
        marker = item.get_closest_marker("slow_unless")
        if marker is not None:
            seen = cases.setdefault(item.nodeid.partition("[")[0], (set(marker.args), set()))[1]
            seen.add(item.callspec.id)
            if item.callspec.id not in marker.args:
                item.add_marker(pytest.mark.slow)
    for test, (named, seen) in cases.items():
        if len(seen) > 1 and not named <= seen:  # one case alone was asked for by its name
            raise pytest.UsageError(f"{test} has no case {', '.join(sorted(named - seen))}.")


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
