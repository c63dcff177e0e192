"""Patterns with placeholders, over paths that a source root may have."""

from __future__ import annotations

import random
import time

import pytest

from casparian_flow.contract import path_values, routing_glob
from casparian_flow.db.routing import compile_pattern
from casparian_flow.path_patterns import placeholders

DAILY = "{region}/sales_{day:%Y-%m-%d}.csv"


@pytest.mark.parametrize(
    ("patterns", "path", "values"),
    [
        ([DAILY], "eu/sales_2026-01-02.csv", {"region": "eu", "day": "2026-01-02"}),
        ([DAILY], "EU/SALES_2026-01-02.CSV", {"region": "EU", "day": "2026-01-02"}),
        ([DAILY], "a/eu/sales_2026-01-02.csv", {}),
        ([DAILY], "eu/sales_2026-1-2.csv", {}),
        (["sales_*.csv", DAILY], "eu/sales_2026-01-02.csv", {"region": "eu", "day": "2026-01-02"}),
        (["sales_*.csv"], "sales_1.csv", {}),
        (["data_{n}.csv"], "deep/down/data_x_y.csv", {"n": "x_y"}),
        (["data_{n}.csv"], "mydata_x.csv", {}),
        (["{a}_{b}.csv"], "x_y_z.csv", {"a": "x", "b": "y_z"}),
        (["**/{y:%Y}/*.csv"], "a/b/2024/x.csv", {"y": "2024"}),
        (["**/{y:%Y}/*.csv"], "2024/x.csv", {"y": "2024"}),
        (["in/**/{f}.csv"], "in/a/b/c.csv", {"f": "c"}),
        (["[a-c]?[!x]_{n}.csv"], "b1y_7.csv", {"n": "7"}),
        (["[a-c]?[!x]_{n}.csv"], "b1x_7.csv", {}),
        (["{stra\u00dfe}.csv"], "Gro\u00dfe Gasse.csv", {"stra\u00dfe": "Gro\u00dfe Gasse"}),
    ],
)
def test_a_path_gives_its_values(patterns: list[str], path: str, values: dict[str, str]) -> None:
    assert path_values(patterns, path) == values


def test_a_path_that_gives_values_is_routed() -> None:
    assert routing_glob(DAILY) == "*/sales_*.csv"
    seed = 13
    print("seed", seed)
    chance = random.Random(seed)
    patterns = ["{a}/x_{d:%Y%m}.csv", "**/{a}.c?v", "x{a}y*.csv", "[xy]{a}/**/z.csv"]
    found = 0
    for _ in range(4_000):
        pattern = chance.choice(patterns)
        path = "".join(chance.choice("xyz/_2026.csv") for _ in range(chance.randint(3, 14)))
        path = path.strip("/") + chance.choice(["", "/z.csv", ".csv", "/x_202601.csv"])
        if {".", "..", ""} & set(path.split("/")):
            continue
        if path_values([pattern], path):
            found += 1
            assert compile_pattern(routing_glob(pattern)).fullmatch(path), (pattern, path)
    assert found > 100


def test_a_path_that_is_routed_gives_its_value_or_the_pattern_is_refused(seed: int) -> None:
    chance = random.Random(seed)
    found = 0
    for _ in range(10_000):
        around = ["".join(chance.choices("a-]![:^\\\\/*?", k=chance.randint(0, 5))) for _ in "12"]
        inside = "".join(chance.choices(["a", "-", "]", "!", "[:digit:]", "\\]", "/"], k=3))
        pattern = f"{around[0]}x[{inside}]{{n}}{around[1]}.csv"
        try:
            placeholders(pattern)
        except ValueError:
            continue
        routed = compile_pattern(pattern.replace("{n}", "?*").lstrip("/"))
        for _ in range(20):
            path = "".join(chance.choices("a-]![:1/", k=chance.randint(0, 4)))
            path = f"{path}x{chance.choice('a-]!1')}n{chance.choice(['', 'a', '/a'])}.csv"
            if "" not in path.split("/") and routed.fullmatch(path):
                found += 1
                assert path_values([pattern.lstrip("/")], path), (pattern, path)
    assert found > 20


def test_a_hostile_pattern_takes_no_long_time() -> None:
    pattern = "{a}" + "*_" * 40 + "x{b}.csv"
    pattern = pattern.replace("}*", "}_*")
    placeholders(pattern)
    start = time.process_time()
    assert path_values([pattern], "_" * 4000 + ".csv") == {}
    assert time.process_time() - start < 5
