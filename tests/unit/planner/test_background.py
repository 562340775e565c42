"""The planner's process and the source that talks to it, without any training."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.planner import process as process_module
from megatron_pipeweaver.planner.background import BackgroundConfig, BackgroundSource, _NoPlanError
from megatron_pipeweaver.planner.child import RestartPolicy, start_child
from megatron_pipeweaver.planner.messages import Hurry, Launch, PlanRequest, Ready, pack, unpack
from megatron_pipeweaver.planner.process import OUT_OF_MEMORY, PlanningDesk, usable_cores
from megatron_pipeweaver.planner.source import InProcessSource, PlanCounters
from tests.unit.planner.examples import batch_of, make_settings, ran

MS = 1_000_000
PATIENT = BackgroundConfig(
    wait_ns=30_000 * MS, restarts=RestartPolicy(most=1, backoff_ns=0), details=True
)
REPO = Path(__file__).parents[3]


@pytest.fixture
def sources():
    made = []

    def make(settings=None, config=PATIENT, **more):
        made.append(BackgroundSource(settings or make_settings(), config, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def patched(code):
    main = "import sys, time, megatron_pipeweaver.planner.process as p\n"
    return (sys.executable, "-P", "-c", f"{main}{code}\nsys.exit(p.main(sys.argv[1:]))")


def is_alive(process):
    """Whether `process` runs; one that ended and was not reaped yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


# --- plans ---------------------------------------------------------------------------------------


def test_it_plans_what_a_planner_in_this_process_plans(sources):
    source = sources()
    inside = InProcessSource(make_settings().make())
    for batch, forward_only in [(batch_of(3, 0, 5), False), (batch_of(1), True)]:
        source.request(batch, forward_only=forward_only)
        found = source.collect(batch, forward_only=forward_only)
        expected = inside.collect(batch, forward_only=forward_only)
        assert found.received.plan.fingerprint == expected.planned().plan.fingerprint
        assert found.planned().schedule == expected.planned().schedule
        assert found.planned().problem == expected.planned().problem
        assert found.planned().baselines == expected.planned().baselines
    assert source.counters == PlanCounters(planned=2) == inside.counters
    assert source.layout == inside.layout


def test_nothing_starts_before_it_is_needed(sources):
    source = sources()
    assert source.process is None
    source.close()
    source.request(batch_of(1), forward_only=False)
    assert source.process is None, "a closed source starts nothing"


def test_a_batch_that_comes_again_is_not_planned_again(sources):
    source = sources()
    first = source.collect(batch_of(1, 2), forward_only=False)
    process = source.process
    os.kill(process, signal.SIGSTOP)
    source.request(batch_of(1, 2), forward_only=False)
    again = source.collect(batch_of(1, 2), forward_only=False)
    os.kill(process, signal.SIGCONT)
    assert again is first
    source.collect(batch_of(2, 1), forward_only=False)
    source.collect(batch_of(1, 2), forward_only=True)
    assert source.counters == PlanCounters(planned=4, cached=1)


def test_a_request_that_a_later_one_overtook_is_answered_all_the_same(sources):
    source = sources()
    source.collect(batch_of(1), forward_only=False)
    for images in range(2, 6):
        source.request(batch_of(images), forward_only=False)
    for images in (2, 5, 3, 4):
        source.collect(batch_of(images), forward_only=False)
    assert source.counters.planned == 5
    assert source.counters.static == 0


def test_without_the_details_there_is_only_the_plan(sources):
    source = sources(config=BackgroundConfig(wait_ns=30_000 * MS))
    answer = source.collect(batch_of(1), forward_only=False)
    assert answer.planned() is None
    assert answer.received is not None


def test_what_does_not_fit_is_told_as_by_any_planner(sources):
    source = sources(make_settings(capacity=1))
    with pytest.raises(InfeasibleError, match="rank 0"):
        source.collect(batch_of(2), forward_only=False)
    assert source.process is not None, "the planner is well"


def test_searches_end_when_training_is_going_to_ask(sources):
    clock = iter(range(0, 10**18, 100 * MS))
    source = sources(make_settings(time_budget_ns=10_000 * MS), clock=lambda: next(clock))
    assert source._budget_ns(ahead=True) == 10_000 * MS
    assert source._budget_ns(ahead=False) == 10_000 * MS
    source.request(batch_of(1), forward_only=False)
    source.collect(batch_of(1), forward_only=False)
    assert 0 < source._budget_ns(ahead=True) < 1_000 * MS


def test_a_search_is_not_late_when_training_asks_before_its_time_is_up(sources):
    hour = make_settings(time_budget_ns=3_600_000 * MS, max_rounds=None)
    source = sources(hour)
    source.request(batch_of(3, 0, 5), forward_only=False)
    answer = source.collect(batch_of(3, 0, 5), forward_only=False)
    assert source.counters == PlanCounters(planned=1), "the best so far, and no static plan"
    static = source._static_answer(batch_of(3, 0, 5), forward_only=False).planned()
    assert answer.planned().schedule.makespan_ns <= static.schedule.makespan_ns


def test_what_training_waits_for_does_not_queue_behind_what_it_does_not_need_yet(sources):
    source = sources(make_settings(time_budget_ns=3_600_000 * MS, max_rounds=None))
    source.request(batch_of(1), forward_only=False)
    sent, send = [], source._send

    def watched(letter):
        sent.append(unpack(letter if isinstance(letter, bytes) else letter())[0])
        send(letter)

    source._send = watched
    source._config = replace(PATIENT, wait_ns=0)
    with pytest.raises(_NoPlanError, match="no plan within"):
        source._searched(batch_of(2), forward_only=False)
    assert [type(one) for one in sent] == [Hurry, PlanRequest, Hurry]
    assert [one.number for one in sent] == [1, 2, 2]


# --- learning ------------------------------------------------------------------------------------


def wait_for_errors(source, count):
    assert wait_until(lambda: source._receive(0) or len(source.errors_permille) == count)


def test_measured_times_correct_the_next_plans(sources):
    source = sources()
    for count, images in enumerate((1, 2, 3, 4, 1, 2, 3, 4), start=1):
        batch = batch_of(images, 0, images)
        answer = source.collect(batch, forward_only=False)
        source.observe(
            batch,
            forward_only=False,
            ran=ran(answer, lambda op: 500_000 * (1 + len(op.module))),
        )
        wait_for_errors(source, count)
    errors = source.errors_permille
    assert errors[-1] < errors[0] / 3
    assert errors[-1] < 100


def test_what_was_learnt_outlives_the_process(sources):
    source = sources()
    batch = batch_of(2)
    answer = source.collect(batch, forward_only=False)
    for _ in range(20):
        source.observe(batch, forward_only=False, ran=ran(answer, lambda op: 30_000_000))
    wait_for_errors(source, 20)
    os.kill(source.process, signal.SIGKILL)
    assert wait_until(lambda: not source._receive(0) and source.process is None)
    after = source.collect(batch_of(2, 2), forward_only=False)
    assert source.counters.restarted == 1
    assert after.received.plan.plan.makespan_ns > 3 * answer.planned().schedule.makespan_ns


# --- faults --------------------------------------------------------------------------------------


def test_a_planner_that_dies_each_time_is_given_up(sources):
    source = sources(command=patched("p.PlanningDesk.answer = lambda *_: sys.exit(3)"))
    for _ in range(5):
        assert source.collect(batch_of(1), forward_only=False).planned().origin == "static"
    assert source.counters == PlanCounters(static=5, failed=2, restarted=1)
    assert source.process is None


def test_a_planner_that_died_is_started_again_after_a_while(sources):
    now = [0]
    source = sources(
        config=BackgroundConfig(
            wait_ns=10**18, restarts=RestartPolicy(most=3, backoff_ns=1_000), cached_plans=0
        ),
        clock=lambda: now[0],
    )
    source.start()
    os.kill(source.process, signal.SIGKILL)
    assert source.collect(batch_of(1), forward_only=False).received is None
    now[0] += 999
    assert source.collect(batch_of(1), forward_only=False).received is None
    now[0] += 1
    assert source.collect(batch_of(1), forward_only=False).received is not None
    assert source.counters == PlanCounters(planned=1, static=2, failed=1, restarted=1)


def test_each_restart_waits_twice_as_long():
    policy = RestartPolicy(most=3, backoff_ns=5)
    assert [policy.delay_ns(failures) for failures in range(1, 5)] == [5, 10, 20, None]
    with pytest.raises(ConfigError, match="most=-1"):
        RestartPolicy(most=-1)
    with pytest.raises(ConfigError, match="wait_ns=-1"):
        BackgroundConfig(wait_ns=-1)


def test_a_stopped_planner_is_late_then_replaced(sources):
    source = sources(
        config=BackgroundConfig(
            wait_ns=100 * MS, hang_ns=300 * MS, restarts=RestartPolicy(most=1, backoff_ns=0)
        )
    )
    source.start()
    stopped = source.process
    os.kill(stopped, signal.SIGSTOP)
    source.collect(batch_of(1), forward_only=False)
    assert source.counters.late == 1
    until = time.monotonic() + 20
    while source.process == stopped and time.monotonic() < until:
        source.request(batch_of(2), forward_only=False)
        time.sleep(0.05)
    assert source.process not in (None, stopped)
    assert not is_alive(stopped)
    assert source.counters.failed == 1


def test_a_plan_that_came_late_serves_the_same_batch_later(sources):
    slow = "p.PlanningDesk.answer = lambda *given: time.sleep(0.3) or answer(*given)"
    code = f"answer = p.PlanningDesk.answer\n{slow}"
    source = sources(config=BackgroundConfig(wait_ns=50 * MS), command=patched(code))
    assert source.collect(batch_of(1), forward_only=False).planned() is not None
    time.sleep(2)
    source.collect(batch_of(1), forward_only=False)
    assert source.counters == PlanCounters(planned=1, static=1, late=1)


def test_a_bug_in_one_batch_leaves_the_planner_alive(sources):
    code = "p.PlannerSettings.make = lambda *_: 1 / 0"
    source = sources(command=patched(code))
    assert source.collect(batch_of(1), forward_only=False).planned().origin == "static"
    assert source.counters == PlanCounters(static=1, failed=1)
    assert source.process is not None


# --- the process ---------------------------------------------------------------------------------


def test_it_says_that_memory_ran_out():
    child = start_child(patched("p.PlanningDesk.answer = lambda *_: bytearray(1 << 62)"))
    child.channel.send(pack(Launch(settings=make_settings())))
    assert isinstance(unpack(child.channel.receive(30))[0], Ready)
    child.channel.send(pack(Ready(process=1)))
    assert child.process.wait(30) == OUT_OF_MEMORY
    child.end()


def test_its_memory_can_be_bounded(sources):
    config = BackgroundConfig(
        wait_ns=30_000 * MS,
        memory_limit_bytes=1 << 20,
        restarts=RestartPolicy(most=0, backoff_ns=0),
    )
    source = sources(config=config)
    assert source.collect(batch_of(1), forward_only=False).received is None
    assert source.counters.failed == 1


def test_it_loads_neither_torch_nor_megatron_and_steps_back():
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, megatron_pipeweaver.planner.process as p;"
            "print({'torch', 'megatron', 'numpy'} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPO,
    )
    assert found.stdout == "set()\n"
    child = start_child()
    child.channel.send(pack(Launch(settings=make_settings())))
    child.channel.receive(30)
    assert os.getpriority(os.PRIO_PROCESS, child.process.pid) >= min(
        19, os.getpriority(os.PRIO_PROCESS, 0) + process_module.NICENESS
    )
    child.leave()
    assert child.process.returncode == 0, "it ends by itself when the channel closes"


def test_it_takes_at_most_half_of_the_cores():
    wide = make_settings(threads=10**6)
    half = max(1, usable_cores() // 2)
    assert wide.with_threads(usable_cores() // 2).search.threads == half
    assert make_settings(threads=1).with_threads(8).search.threads == 1
    assert PlanningDesk(settings=wide).settings.search.threads == 10**6


ORPHAN = """
import os, signal, sys, time
from megatron_pipeweaver.planner.background import BackgroundSource
from tests.unit.planner.examples import batch_of, make_settings, ran
source = BackgroundSource(make_settings(time_budget_ns=60_000_000_000, max_rounds=None))
source.request(batch_of(4, 0, 3, 4, 1), forward_only=False)
if not os.fork():
    time.sleep(60)  # a data loader, which keeps the channel open
    os._exit(0)
if sys.argv[1] != "starting":
    # It gets nicer once it has asked to end with its training.
    nice = lambda process: os.getpriority(os.PRIO_PROCESS, process)
    while nice(source.process) <= nice(0):
        time.sleep(0.01)
if sys.argv[1] == "stopped":
    os.kill(source.process, signal.SIGSTOP)
print(source.process, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("state", ["starting", "searching", "stopped"])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a stopped process")
def test_no_planner_outlives_its_training(state):
    training = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, state],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        process = int(training.stdout.readline())
        assert training.wait(20) == -signal.SIGKILL
        assert wait_until(lambda: not is_alive(process))
    finally:
        os.killpg(training.pid, signal.SIGKILL)
        training.stdout.close()
