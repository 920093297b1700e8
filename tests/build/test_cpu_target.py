"""Targets for processors, and the levels that they stand for."""

from __future__ import annotations

import platform

import pytest

from mlcawq.build.cpu_target import (
    cpu_target,
    cpu_variants,
    features_of,
    level_target,
    native_target,
    variant_of,
    without_tiles,
)
from mlcawq.build.targets import resolve_target, target_device
from mlcawq.engine.cpu_library import LEVEL_VARIABLE
from mlcawq.engine.processor import Processor, this_processor
from mlcawq.errors import UserError
from tir_kernels.levels import FEATURES, LEVELS, Level, architecture_named, levels_of

HERE = architecture_named(platform.machine())
has_levels = pytest.mark.skipif(not levels_of(HERE), reason="an architecture without levels")


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_level_asks_for_all_that_its_code_may_use(level: Level) -> None:
    assert sorted(features_of(level_target(level))) == sorted(level.features)


@pytest.mark.parametrize("architecture", FEATURES)
def test_every_level_has_what_the_first_one_has(architecture: str) -> None:
    levels = levels_of(architecture)
    assert len(levels) > 1
    for level in levels[1:]:
        assert set(levels[0].features) < set(level.features)


@has_levels
def test_one_library_for_all_levels() -> None:
    variants = cpu_variants("cpu")
    assert [variant.name for variant in variants] == [level.name for level in levels_of(HERE)]
    target = resolve_target("cpu")
    assert target_device(target) == "cpu"
    assert str(target) == str(level_target(this_processor().levels[-1]))


def test_native_is_this_machine() -> None:
    (variant,) = cpu_variants("cpu:native")
    assert variant.name == "native"
    assert variant.target.attrs["mcpu"]
    processor = this_processor()
    if processor.features is not None:
        assert set(variant.features) == processor.features


@pytest.mark.skipif(HERE != "x86_64", reason="features of x86")
def test_features_that_the_machine_hides_are_switched_off() -> None:
    # As a hypervisor does; and it shows models that lack what is there.
    features = frozenset({"sse3", "ssse3", "sse4.1", "sse4.2", "avx", "avx2", "amx-tile"})
    target = native_target(Processor("x86_64", features))
    assert set(features_of(target)) == features
    believed = native_target(Processor("x86_64", None))
    assert "mattr" not in believed.attrs


@pytest.mark.skipif(HERE != "x86_64", reason="features of x86")
@pytest.mark.parametrize("name", ["amx", "avx512"])
def test_tiles_can_be_left_out(name: str) -> None:
    target = resolve_target(f"cpu:{name}")
    rest = {feature for feature in features_of(target) if not feature.startswith("amx-")}
    assert set(features_of(without_tiles(target))) == rest


@has_levels
def test_one_level() -> None:
    level = levels_of(HERE)[0]
    (variant,) = cpu_variants(f"cpu:{level.name}")
    assert (variant.name, variant.features) == (level.name, level.features)
    assert str(resolve_target(f"cpu:{level.name}")) == str(level_target(level))


@has_levels
def test_the_level_that_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = this_processor().levels[0]
    monkeypatch.setenv(LEVEL_VARIABLE, lowest.name)
    assert str(cpu_target()) == str(level_target(lowest))


@has_levels
def test_targets_that_were_made_elsewhere() -> None:
    level = levels_of(HERE)[-1]
    assert variant_of(level_target(level)).name == level.name
    other = variant_of(without_tiles(native_target()))
    assert other.name == "custom"
    assert other.features == features_of(other.target)


def test_levels_that_are_refused() -> None:
    with pytest.raises(UserError, match=r"cpu:fast is not known\n.*cpu:native"):
        cpu_target("cpu:fast")
    foreign = next(level for level in LEVELS if level.architecture != HERE)
    with pytest.raises(UserError, match="another architecture"):
        cpu_target(f"cpu:{foreign.name}")
