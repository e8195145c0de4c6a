from __future__ import annotations

import pytest

from router.candidates import Candidate
from router.demand import Demand
from router.kv_poll import parse_metrics, parse_ranks
from router.room import Committed, KvRoom, RankKv, expected_rooms, has_room, place, with_room
from router.types import Api, GenerationRequest
from tests.router.conftest import Stack, StartStack
from tests.router.running import wait_for


def rank(number: int, free: int, requests: int | None = 0, blocks: int = 100) -> RankKv:
    return RankKv(number, blocks, free, 16, requests)


IDLE = (rank(0, 100), rank(1, 100))
# ranks, committed, expected rooms in tokens
GROWTH = {
    "idle": (IDLE, Committed(), [1600, 1600]),
    "nothing of ours": ((rank(0, 40, 3), rank(1, 100, 0)), Committed(), [640, 1600]),
    # 2 requests of 320 + 160 tokens, of which 320 + 0 each are written: 320 are to come, by halves.
    "growing": ((rank(0, 80, 1), rank(1, 80, 1)), Committed(2, 640, 320), [1280 - 160, 1280 - 160]),
    "grows where it lives": ((rank(0, 80, 1), rank(1, 100, 0)), Committed(1, 320, 160), [1280 - 160, 1600]),
    "not there yet": (IDLE, Committed(2, 640, 320), [1600 - 480, 1600 - 480]),
    # 10 requests share a prompt of 800 tokens, and use it once: 160 tokens each are to come, not 800 more.
    "shared prefix": ((rank(0, 50, 10),), Committed(10, 8000, 320), [800 - 320]),
    # Half of the requests there are somebody else's, and so is half of what is used.
    "another router's": ((rank(0, 60, 2),), Committed(1, 320, 160), [960 - 160]),
    "used by nobody that lives": ((rank(0, 40, 0),), Committed(1, 320, 160), [640 - 480]),
    "finished growing": ((rank(0, 70, 1),), Committed(1, 320, 160), [1120]),
    "no count of requests": ((rank(0, 80, None),), Committed(1, 320, 160), [1280 - 160]),
    "more than there is": ((rank(0, 10, 1),), Committed(1, 1440, 800), [160 - 800]),
}


@pytest.mark.parametrize("name", GROWTH)
def test_what_a_rank_has_to_spare(name: str) -> None:
    ranks, committed, expected = GROWTH[name]
    assert expected_rooms(ranks, committed) == expected


def test_sequences_are_placed_where_there_is_most_room() -> None:
    rooms = [100, 300, 200]
    assert place(rooms, 150, 3) == (1, 2, 1)
    assert rooms == [100, 0, 50]


@pytest.mark.parametrize(
    ("engines", "num_tokens", "num_sequences", "expected"),
    [
        ([], 1, 1, False),
        ([[100, 200]], 200, 1, True),
        ([[100, 200]], 201, 1, False),
        ([[100, 100]], 150, 1, False),  # enough together, but a request lives on one rank
        ([[100, 100], [50, 150]], 150, 1, True),
        ([[-50]], 1, 1, False),
        ([None], 10**9, 1, True),
        ([[100, 200]], 100, 3, True),
        ([[100, 200]], 100, 4, False),
        ([[190, 190]], 100, 3, False),
    ],
)
def test_has_room(engines: list[list[int] | None], num_tokens: int, num_sequences: int, expected: bool) -> None:
    assert has_room(engines, num_tokens, num_sequences) is expected


def test_only_engines_with_room_are_left_or_else_the_one_with_the_most() -> None:
    of = [Candidate(i, "u", 0, 0, 0, 0, rooms) for i, rooms in enumerate([(100, 40), (90, 90), (-5, 300), None])]
    assert [c.position for c in with_room(of, 100, 1)] == [0, 2, 3]
    assert [c.position for c in with_room(of[:3], 301, 1)] == [2]
    assert [c.position for c in with_room(of[:2], 301, 1)] == [0]


def test_room_is_taken_and_given_back_between_polls() -> None:
    kv = KvRoom()
    unplaced = kv.take(100, 60, 1)
    assert unplaced == ()
    kv.tell((rank(0, 100, 0), rank(1, 60, 4)))
    kv.give_back(unplaced, 100, 60, 1)
    assert kv.committed == Committed()
    kv.tell((rank(0, 100, 0), rank(1, 60, 0)))
    placed = kv.take(300, 21, 2)  # 321 tokens are 21 blocks of 16
    assert kv.rooms == [1600 - 2 * 336, 960]
    kv.give_back(placed, 300, 21, 2)
    assert kv.rooms == [1600, 960]
    late = kv.take(300, 21, 1)
    kv.tell((rank(0, 10, 0, blocks=10),))  # it came back with fewer and smaller ranks
    kv.give_back(late, 300, 21, 1)
    assert kv.committed == Committed()


def test_a_request_must_leave_a_share_of_its_rank_to_spare() -> None:
    kv = KvRoom()
    assert not kv.spares(1, 0.25), "who does not tell is not believed"
    kv.tell((rank(0, 60), rank(1, 40, blocks=50)))  # 960 of 1600 tokens, 640 of 800
    assert kv.spares(560, 0.25) and not kv.spares(561, 0.25)
    assert kv.spares(240, 0.5) and not kv.spares(241, 0.5), "the smaller rank has the larger share"
    assert kv.spares(960, 0.0) and not kv.spares(961, 0.0)


METRICS = """# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="400",some_dict="{}",sliding_window="None"} 1.0
"""


def test_an_engine_of_one_rank_tells_in_its_metrics() -> None:
    assert parse_metrics(METRICS) == [RankKv(0, 400, 300, 32, 3)]
    assert parse_metrics("") == []
    assert parse_metrics(METRICS.replace('"400"', '"None"')) == []


def status(rank: int, free: int) -> dict[str, int]:
    return {"rank": rank, "num_blocks": 100, "num_free_blocks": free, "num_requests": 0, "block_size": 16}


def test_tensor_parallel_workers_of_a_rank_count_once() -> None:
    told = {"ranks": [status(0, 7), status(0, 7), status(1, 8)]}
    assert [(r.rank, r.num_free_blocks) for r in parse_ranks(told)] == [(0, 7), (1, 8)]


def rooms(stack: Stack) -> list[list[int] | None]:
    return [engine.load.kv.rooms for engine in stack.router.state.pool.engines[len(stack.prefill) :]]


def test_a_request_goes_where_a_rank_can_hold_it(start_stack: StartStack) -> None:
    stack = start_stack(1, 2, kv_poll_interval=0.05)
    stack.decode[0].ranks = [status(0, 20), status(1, 20)]  # 640 tokens together, 320 on each
    stack.decode[1].ranks = [status(0, 5), status(1, 30)]
    wait_for(lambda: rooms(stack) == [[320, 320], [80, 480]])
    for _ in range(4):
        assert stack.router.complete(prompt=[1] * 300, max_tokens=100).status == 200
    assert [len(engine.seen) for engine in stack.decode] == [0, 4]
    assert stack.router.complete(prompt=[1] * 300, max_tokens=1000).status == 200  # nobody can: most room wins
    assert [len(engine.seen) for engine in stack.decode] == [0, 5]
    assert stack.router.complete(prompt=[1] * 100, max_tokens=100).status == 200
    assert [len(engine.seen) for engine in stack.decode] == [1, 5]


def test_the_pool_says_whether_a_request_has_to_wait(start_stack: StartStack) -> None:
    stack = start_stack(1, 1, kv_poll_interval=0.05)
    pool = stack.router.state.pool

    def wanted(num_tokens: int) -> GenerationRequest:
        request = GenerationRequest("id", Api.COMPLETIONS, {}, "tiny", True, 1, None)
        request.demand.num_prompt_tokens = num_tokens
        return request

    assert pool.has_room(wanted(10**9)), "the engine does not tell"
    stack.decode[0].ranks = [status(0, 20), status(1, 30)]
    wait_for(lambda: rooms(stack) == [[320, 480]])
    assert pool.has_room(wanted(10**9)), "it has nothing to do, and will not have more room later"
    with pool.engines[1].occupied(Demand(100, 60)):
        wait_for(lambda: rooms(stack) == [[320 - 80, 480 - 80]])  # expected on either rank
        assert pool.has_room(wanted(400))
        assert not pool.has_room(wanted(401))
    stack.decode[0].kill()
    wait_for(lambda: not pool.engines[1].is_up)
    assert pool.has_room(wanted(1)), "there is nothing to wait for: the request gets its 503"


def test_an_engine_too_busy_to_tell_keeps_what_was_known(
    start_stack: StartStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack = start_stack(1, 1, kv_poll_interval=0.05, health_check_timeout=0.3)
    stack.decode[0].ranks = [status(0, 20)]
    wait_for(lambda: rooms(stack) == [[320]])
    stack.decode[0].ranks_delay = 1.0
    wait_for(lambda: "did not say" in caplog.text)
    assert rooms(stack) == [[320]]


def test_free_kv_by_rank_is_shown(start_stack: StartStack) -> None:
    stack = start_stack(1, 2, kv_poll_interval=0.05)
    first, second = stack.decode
    first.ranks, second.metrics_text = [status(0, 20), status(1, 30)], METRICS
    wait_for(lambda: rooms(stack) == [[320, 480], [9600]])
    assert stack.router.metric("tknp_engine_kv_blocks", engine=first.name, rank="1") == 100
    assert stack.router.metric("tknp_engine_kv_blocks_free", engine=first.name, rank="1") == 30
    assert stack.router.metric("tknp_engine_kv_room_tokens", engine=second.name, rank="0") == 9600
    _, told, _ = stack.router.call("GET", "/ready").json()["engines"]
    shown = {"rank": 1, "num_blocks": 100, "num_free_blocks": 30, "block_size": 16, "room_tokens": 480}
    assert told["kv_ranks"][1] == shown
    first.ranks, first.metrics_text = None, ""
    wait_for(lambda: rooms(stack)[0] is None)
    assert "does not tell" in stack.router.call("GET", "/ready").json()["engines"][1]["kv_unknown"]
