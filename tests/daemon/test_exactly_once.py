"""Whatever happens in whatever order: every request is answered exactly once, and nothing is left over."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.daemon.world import DEADLINES, REF, VAE, World
from xditd.daemon.residency import Keep
from xditd.daemon.scheduling import POLICIES
from xditd.daemon.states import GROUP_ALIVE, GROUP_LOADED
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import XditError

LIVING = ("starting", "leaving", *sorted(GROUP_LOADED))
"""States of a group that has processes."""

OTHER = m.ModelRef(kind="diffusion_models", name="other.safetensors")


class Daemon(RuleBasedStateMachine):
    """Clients ask, cancel and die; ranks answer, raise, sleep, hang and die; memory is short; the clock runs.

    Of the four models in it, two fit into the memory at once, the one with replicas with one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            restart_limit=4,
            restart_backoff=3.0,
            places=3,
            queue=12,
            memory_total=20,
            keep=Keep(
                usual=300.0,
                of={"vae/ae.safetensors": 0.0},
                awake_of={"diffusion_models/flux.safetensors": 3.0},
            ),
            host_free=50,
            patience=4.0,
        )
        self.requests: list[int] = []

    def runs(self) -> list:
        return list(self.world.core.runs.values())

    def groups(self, *states: str) -> list:
        return [g for g in self.world.core.fleet.groups.values() if g.state in states]

    @rule(
        peer=st.sampled_from([b"a", b"b"]),
        ref=st.sampled_from([REF, VAE, OTHER]),
        how=st.sampled_from([{"devices": ("cpu:0",)}, {"replicas": 2}, {}]),
        scheduling=st.sampled_from(POLICIES),
        priority=st.integers(-2, 2),
    )
    def open(self, peer, ref, how, scheduling, priority):
        try:
            run = self.world.open(peer=peer, ref=ref, scheduling=scheduling, priority=priority, **how)
        except XditError as error:
            expected = ("model_failed", "queue_full", "draining")
            if error.code not in expected:
                raise
            return
        self.requests.append(run.reopen)

    @precondition(lambda self: not self.world.core.draining)
    @rule(ref=st.sampled_from([REF, OTHER]), replicas=st.sampled_from([1, 2]))
    def load(self, ref, replicas):
        self.requests.append(self.world.load(ref=ref, replicas=replicas))

    @rule(nbytes=st.sampled_from([0, 4]))
    def free_memory(self, nbytes):
        in_use = [g for g in self.groups("ready") if self.world.core.uses(g)]
        self.world.core.fleet.free_memory(nbytes, self.world.devices, self.world.now)
        assert all(group.state == "ready" for group in in_use)

    @rule()
    def drain(self):
        self.world.core.draining = True

    @rule(others=st.sampled_from([0, 0, 8]))
    def another_program_comes_or_goes(self, others):
        self.world.memory_others = others

    @precondition(lambda self: self.groups("starting"))
    @rule(data=st.data())
    def become_ready(self, data):
        self.world.ready(data.draw(st.sampled_from(self.groups("starting"))))

    @precondition(lambda self: self.groups("dozing", "waking"))
    @rule(data=st.data())
    def ranks_rest(self, data):
        group = data.draw(st.sampled_from(self.groups("dozing", "waking")))
        self.world.rest(group, asleep=group.state == "dozing")

    @rule(free=st.sampled_from([0, 50]))
    def the_host_has_room_for_sleepers_or_not(self, free):
        self.world.host_free = free

    @precondition(lambda self: any(run.asked is None and run.announced for run in self.runs()))
    @rule(data=st.data(), whole=st.booleans())
    def ask(self, data, whole):
        run = data.draw(st.sampled_from([r for r in self.runs() if r.asked is None and r.announced]))
        self.requests.append(self.world.sample(run) if whole else self.world.denoise(run))

    @precondition(lambda self: any(group.turn for group in self.groups("ready", "leaving")))
    @rule(data=st.data())
    def finish_turn(self, data):
        self.world.finish_turn(
            data.draw(st.sampled_from([g for g in self.groups("ready", "leaving") if g.turn]))
        )

    @precondition(lambda self: self.runs())
    @rule(data=st.data())
    def cancel(self, data):
        self.world.core.stop(data.draw(st.sampled_from(self.runs())), "cancelled", self.world.now)

    @rule(peer=st.sampled_from([b"a", b"b"]))
    def client_dies(self, peer):
        self.world.core.client_gone(peer, (1,), self.world.now)

    @precondition(lambda self: self.groups(*LIVING))
    @rule(data=st.data(), rank=st.integers(0, 1))
    def rank_dies(self, data, rank):
        group = data.draw(st.sampled_from(self.groups(*LIVING)))
        self.world.die(group, rank % len(group.ranks))

    @precondition(lambda self: any(group.turn for group in self.groups("ready")))
    @rule(data=st.data(), alive=st.booleans())
    def rank_raises(self, data, alive):
        group = data.draw(st.sampled_from([g for g in self.groups("ready") if g.turn]))
        alive = alive and len(group.ranks) == 1
        report = o.RankFailed(
            rank=0, order=group.turn, code="rank_failed", message="m", traceback="", alive=alive
        )
        self.world.core.rank_failed(group, report, self.world.now)
        if not alive:
            self.world.leave(group)

    @precondition(lambda self: any(run.group for run in self.runs()))
    @rule(
        data=st.data(),
        rank=st.integers(0, 1),
        code=st.sampled_from(["model_not_visible", "out_of_memory", "rank_lost"]),
    )
    def rank_raises_at_what_a_run_brought(self, data, rank, code):
        run = data.draw(st.sampled_from([run for run in self.runs() if run.group]))
        group = self.world.group(run)
        report = o.RankFailed(
            rank=rank % len(group.ranks),
            order=None,
            run=run.id,
            code=code,
            message="m",
            traceback="",
            alive=False,
        )
        self.world.core.rank_failed(group, report, self.world.now)

    @precondition(lambda self: self.groups("leaving"))
    @rule(data=st.data())
    def ranks_leave(self, data):
        leaving = [g for g in self.groups("leaving") if not g.turn]
        if leaving:
            self.world.leave(data.draw(st.sampled_from(leaving)))

    @precondition(lambda self: self.groups(*GROUP_ALIVE))
    @rule(data=st.data(), force=st.booleans())
    def unload(self, data, force):
        group = data.draw(st.sampled_from(self.groups(*GROUP_ALIVE)))
        try:
            self.world.core.unload([group], force, self.world.now)
        except XditError as error:
            if error.code != "group_busy":
                raise

    @rule(seconds=st.sampled_from([0.1, 5.0, DEADLINES.turn + 1, DEADLINES.load + 1]))
    def time_passes(self, seconds):
        self.world.pass_time(seconds)
        for group in self.groups("failed"):  # SIGKILL does its work
            self.world.leave(group)

    @invariant()
    def nobody_is_answered_twice(self):
        for request in self.requests:
            final = [r for r in self.world.of(request) if r.__struct_config__.tag not in m.EVENTS]
            assert len(final) <= 1, final

    @invariant()
    def memory_is_never_promised_twice(self):
        world = self.world
        held = world.core.fleet.residency.resident(world.core.fleet.groups.values(), "cpu:0")
        assert held <= world.memory_total

    @invariant()
    def no_group_has_more_runs_than_places_or_a_run_that_is_not_its_own(self):
        for group in self.world.core.fleet.groups.values():
            runs = self.world.core.runs.on(group)
            assert len(runs) <= self.world.places
            assert all(group.key in run.keys for run in runs)

    @invariant()
    def nothing_waits_for_what_is_there(self):
        """A queued run has a group on its way, or all those that serve are full or kept for others."""
        core = self.world.core
        for run in self.runs():
            if run.state == "queued":
                mine = [g for g in core.fleet.groups.values() if g.key in run.keys]
                assert mine, f"run {run.id} waits for nothing"
                assert all(
                    g.state != "ready"
                    or g.name in core.fleet.held
                    or core.runs.count_on(g) >= self.world.places
                    for g in mine
                )

    @invariant()
    def a_run_has_a_place_on_groups_that_are_awake_alone(self):
        for run in self.runs():
            assert not run.group or self.world.group(run).state in ("ready", "leaving")

    @invariant()
    def the_roster_and_the_line_know_who_is_where(self):
        runs = self.world.core.runs
        assert {run.id for run in runs.queued} == {run.id for run in self.runs() if run.state == "queued"}
        for group in self.world.core.fleet.groups.values():
            assert {r.id for r in runs.on(group)} == {r.id for r in self.runs() if r.group == group.name}
        assert runs.clients() == {run.peer for run in self.runs()}

    @invariant()
    def no_device_stands_idle_while_a_run_could_have_it(self):
        assert self.world.core.turns.next() is None

    @invariant()
    def devices_are_busy_only_with_turns_under_way(self):
        core = self.world.core
        busy = [d for g in core.fleet.groups.values() if g.turn for d in g.devices]
        assert len(busy) == len(set(busy)), "two turns on one device"
        assert set(busy) == core.turns.busy
        assert len(core.turns.under_way) == sum(g.turn is not None for g in core.fleet.groups.values())

    def teardown(self):
        """In the end everything is answered and gone."""
        world = self.world
        world.core.close(world.now)
        for group in list(world.core.fleet.groups.values()):
            if group.turn is not None:
                world.finish_turn(group)
            if group.state in ("leaving", "failed"):
                world.leave(group)
        assert world.core.runs == {}
        assert all(group.state == "gone" for group in world.core.fleet.groups.values())
        assert world.core.turns.busy == set()
        assert not any(queue.waiting or queue.under_way for queue in world.core.turns.queues.values())
        for request in self.requests:
            world.end_of(request)


Daemon.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestExactlyOnce = Daemon.TestCase
