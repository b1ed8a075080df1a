"""Work in threads that end with the request."""

import asyncio
import json
import threading

import pytest

from saejax.errors import UserError
from saejax.serving.jobs import THREAD, Jobs


def threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


async def read(jobs, work, most=None):
    """The lines of some work, or the first of them."""
    lines, found = jobs.lines(work), []
    async for line in lines:
        found.append(json.loads(line))
        if len(found) == most:
            break
    await lines.aclose()
    return found


async def gone():
    """Waits until no thread is left."""
    while threads():
        await asyncio.sleep(0.01)


def raising(error):
    def work(job):
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "last"),
    [
        (lambda job: dict(a=1), dict(result=dict(a=1))),
        (raising(UserError("two\n lines")), dict(error="two lines")),
        (raising(KeyError("x")), dict(error="This is a bug of saejax (KeyError); the server's terminal has more.")),
        (lambda job: float("nan"), dict(error="This is a bug of saejax (ValueError); the server's terminal has more.")),
    ],
)
def test_the_last_line_says_how_it_ended(work, last, capsys):
    async def run():
        (line,) = await read(Jobs(), work)
        await gone()
        return line

    assert asyncio.run(run()) == last
    assert ("Traceback" in capsys.readouterr().err) == ("bug" in str(last))


def test_progress_is_told_in_few_lines():
    def work(job):
        job.say("Begins")
        for done in range(10_001):
            job.progress(done, 10_000)
        return 3

    first, *lines, last = asyncio.run(read(Jobs(), work))
    assert first == dict(say="Begins") and last == dict(result=3) and len(lines) == 201
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines) and lines[-1]["done"] == 10_000


def endless(job):
    while True:
        job.progress(threading.get_ident() % 7, 7)


def test_a_reader_who_leaves_stops_the_work_and_what_waits_goes_on():
    """One that waits can leave, too, and is never begun."""
    begun = []

    async def run():
        jobs = Jobs()
        lines = jobs.lines(endless)
        await anext(lines)
        assert await read(jobs, begun.append, most=1) == [dict(say="Waiting for other work")]
        waiting = jobs.lines(lambda job: "second")
        assert json.loads(await anext(waiting)) == dict(say="Waiting for other work")
        answer = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0.1)
        assert not answer.done()  # one at a time
        await lines.aclose()
        assert json.loads(await answer) == dict(result="second")
        await gone()

    asyncio.run(run())
    assert not begun


def test_a_server_that_ends_stops_all_and_starts_nothing():
    async def run():
        jobs = Jobs()
        task = asyncio.create_task(read(jobs, endless))
        while not threads():
            await asyncio.sleep(0.01)
        jobs.stop()
        assert (await task)[-1] == dict(error="The work was stopped.")
        jobs.close()
        assert not threads()
        return await read(jobs, endless)

    assert asyncio.run(run())[-1] == dict(error="The work was stopped.")
