from collections.abc import Callable

class RawProblem:
    ranks: int
    microbatches: int
    capacity: list[int]
    pass_microbatch: list[int]
    pass_module: list[int]
    pass_sub: list[int]
    pass_stages: list[int]
    pass_latency: list[int]
    pass_frozen: list[int]
    producer_begin: list[int]
    producers: list[int]
    strategy_begin: list[int]
    forward: list[int]
    backward: list[int]
    weight: list[int]
    memory: list[int]
    def __init__(self) -> None: ...

class Policy:
    key: list[int]
    level: list[int]
    load: list[int]
    release: list[int]
    load_limit: int
    split: bool
    alternate: bool
    adaptive: bool
    in_order: bool
    patience: int
    hold: int
    def __init__(self) -> None: ...

class Timetable:
    @property
    def makespan(self) -> int: ...
    @property
    def order(self) -> list[list[int]]: ...
    @property
    def start(self) -> list[int]: ...
    @property
    def end(self) -> list[int]: ...
    @property
    def level(self) -> list[int]: ...
    @property
    def split(self) -> bool: ...

class Bounds:
    @property
    def critical_path(self) -> int: ...
    @property
    def jackson(self) -> list[int]: ...
    @property
    def time_memory(self) -> list[int]: ...

class KnapsackChoice:
    @property
    def feasible(self) -> bool: ...
    @property
    def chosen(self) -> list[int]: ...
    @property
    def latency(self) -> int: ...
    @property
    def bound(self) -> int: ...

def choose_candidates(
    begin: list[int],
    until: list[int],
    candidate_begin: list[int],
    latency: list[int],
    memory: list[int],
    capacity: int,
    gap: float,
    rounds: int,
) -> KnapsackChoice: ...

class Stop:
    def __init__(self) -> None: ...
    def request(self) -> None: ...
    @property
    def requested(self) -> bool: ...

class SearchOptions:
    budget_ns: int
    threads: int
    seed: int
    max_rounds: int
    split: bool
    in_order: bool
    choose_memory: bool
    exploration: int
    tree_alpha: float
    tree_beta: float
    alternate: bool
    grouped: bool
    stop: Stop | None
    def __init__(self) -> None: ...

class SearchOutcome:
    @property
    def best(self) -> Timetable: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def found_ns(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def thread(self) -> int: ...

class Core:
    def __init__(self, raw: RawProblem, in_order: bool) -> None: ...
    def shortage(self) -> tuple[int, int, int, bool] | None: ...
    def bounds(self) -> Bounds: ...
    def decode(self, policy: Policy) -> Timetable: ...
    def retime(self, order: list[list[int]], level: list[int], split: bool) -> Timetable: ...
    def search(
        self,
        options: SearchOptions,
        start: Timetable,
        listener: Callable[[int, int, int, int], None] | None,
    ) -> SearchOutcome: ...
    def refill(self, table: Timetable, keep: bool) -> Timetable: ...
    def improve(self, table: Timetable, moves: int, seed: int, warmth: float) -> Timetable: ...
    def latest(self, table: Timetable) -> list[int]: ...
    def peak_memory(self, table: Timetable) -> list[int]: ...
    @property
    def level_begin(self) -> list[int]: ...
    @property
    def strategy(self) -> list[int]: ...
    @property
    def pair_begin(self) -> list[int]: ...
