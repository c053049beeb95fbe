"""A policy as a value: what it takes, what it refuses, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from inside import context_of
from pydantic import ValidationError

from am_memory import AMMemoryError, Experiments, Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidPolicy
from am_memory.session.saving import snapshot
from am_memory.solver import OMP, HighestAttention

POLICY = MemoryPolicy(trigger_tokens=1000, keep_ratio=0.1, keep_recent=0)

# Bad policies


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trigger_tokens", 0),
        ("trigger_tokens", -5),
        ("trigger_tokens", 1.5),
        ("compact_fraction", 0.0),
        ("compact_fraction", 1.1),
        ("keep_ratio", 0.0),
        ("keep_ratio", 1.01),
        ("max_compact_tokens", 0),
        ("pinned", -1),
        ("pinned", "everything"),
        ("keep_recent", -1),
        ("reference_queries", ()),
        ("reference_queries", ("telepathy",)),
        ("self_study_tokens", 0),
        ("key_selection", "random"),
        ("key_selection", 7),
        ("key_selection", {"name": "omp", "picks_per_stop": 3}),
        ("key_selection", {"name": "omp", "picks_per_step": 0}),
        ("key_selection", {"name": "omp", "picks_per_step": "many"}),
        ("key_selection", {"name": "newest"}),
        ("key_selection", {}),
        ("head_budget", "lottery"),
        ("head_budget", "curves.txt"),
        ("experiments", "many"),
        ("ridge", -1.0),
        ("chunk_tokens", 0),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidPolicy) as raised:
        MemoryPolicy(**{name: value})
    assert name in str(raised.value)
    assert repr(value) in str(raised.value) or str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fit", "all"), ("recompaction", "never"), ("on_policy", "now"), ("summary_tokens", 0), ("min_slots", 0)],
)
def test_a_wrong_value_of_an_experiment_is_named(name: str, value: object) -> None:
    """Also where the experiments are read from a file."""
    with pytest.raises(InvalidPolicy, match=f"^{name} {value!r}: "):
        Experiments(**{name: value})
    with pytest.raises(InvalidPolicy, match=f"^{name} {value!r}: "):
        MemoryPolicy(experiments={name: value})


@pytest.mark.parametrize("name", sorted(Experiments.model_fields))
def test_an_experiment_among_the_policys_fields_is_refused_with_its_place(name: str) -> None:
    with pytest.raises(
        InvalidPolicy, match=rf"^{name} is a field of Experiments: give experiments=Experiments\({name}="
    ):
        MemoryPolicy(**{name: 1})


def test_a_field_of_two_types_is_named_once() -> None:
    """pydantic's own names of the two types stood in the message: "pinned.literal['sinks',...]"."""
    with pytest.raises(InvalidPolicy) as raised:
        MemoryPolicy(pinned="everything", trigger_tokens=0)
    assert str(raised.value) == (
        "trigger_tokens 0: Input should be greater than 0; "
        "pinned 'everything': Input should be 'sinks', 'system' or 'first_message', "
        "or: Input should be a valid integer, unable to parse string as an integer"
    )


def test_an_experiment_that_there_is_not_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidPolicy, match=r"there is no fitt \(did you mean fit\?\)$"):
        Experiments(fitt="nothing")
    with pytest.raises(InvalidPolicy, match=r"there is no fitt \(did you mean fit\?\)$"):
        MemoryPolicy.model_validate_json('{"experiments": {"fitt": "nothing"}}')


def test_a_policy_shows_what_differs_from_the_defaults() -> None:
    policy = MemoryPolicy(trigger_tokens=8192, keep_ratio=0.2, experiments=Experiments(fit="nothing"))
    assert str(policy) == repr(policy) == "MemoryPolicy(keep_ratio=0.2, experiments=Experiments(fit='nothing'))"
    assert str(MemoryPolicy()) == "MemoryPolicy()"


def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(InvalidPolicy, match=r"keep_ratio 2: .*; .*keep_recent -1: ") as raised:
        MemoryPolicy(keep_ratio=2, keep_recent=-1)
    assert isinstance(raised.value, AMMemoryError)


# A policy as a value


def test_a_policy_is_frozen() -> None:
    with pytest.raises((ValidationError, FrozenInstanceError)):
        POLICY.keep_ratio = 0.5


@pytest.mark.parametrize(
    "policy",
    [
        MemoryPolicy(),
        MemoryPolicy(trigger_tokens=1.0, pinned=12, reference_queries=("repeat", "live"), max_compact_tokens=77),
        MemoryPolicy(
            key_selection="omp", head_budget="uniform", experiments=Experiments(recompaction="refit", fit="values")
        ),
        MemoryPolicy(key_selection="omp_fast", pinned="first_message"),
        MemoryPolicy(head_budget=Path("folder") / "curves.json"),
        MemoryPolicy(reference_queries=("repeat", "self_study"), self_study_tokens=200),
        MemoryPolicy(key_selection=OMP(picks_per_step=3, first_steps=((300, 1, 1), (1500, 2, 2)))),
        MemoryPolicy(key_selection=replace(OMP.fast(), relative_mass=True)),
    ],
    ids=["default", "numbers", "omp", "omp_fast", "calibrated", "self_study", "omp_3", "omp_fast_relative"],
)
def test_a_policy_survives_json(policy: MemoryPolicy) -> None:
    back = MemoryPolicy.model_validate_json(policy.model_dump_json())
    assert back == policy
    assert type(back.trigger_tokens) is type(policy.trigger_tokens)
    assert MemoryPolicy(**policy.model_dump(mode="json")) == policy


def test_json_with_unknown_fields_is_refused() -> None:
    with pytest.raises(InvalidPolicy, match="no_such_field"):
        MemoryPolicy.model_validate_json('{"no_such_field": 1}')


@pytest.mark.parametrize(
    ("name", "selection"),
    [("highest_attention", HighestAttention()), ("omp", OMP()), ("omp_fast", OMP.fast())],
)
def test_a_key_selection_goes_by_its_name_or_is_given(name: str, selection: object) -> None:
    assert MemoryPolicy(key_selection=name).key_selection == selection
    assert MemoryPolicy(key_selection=selection) == MemoryPolicy(key_selection=name)


@dataclass(frozen=True)
class Newest:
    """As CONTRIBUTING shows one, with a parameter and something that does not tell it from others."""

    name: str = "newest"
    spared: int = 0
    seen: list[object] = field(default_factory=list, compare=False)

    def __call__(self, block: object, scores: object, num_slots: object) -> None: ...


class Plain:
    """Neither a dataclass nor frozen."""

    name = "plain"

    def __init__(self, share: object) -> None:
        self.share = share

    def __call__(self, block: object, scores: object, num_slots: object) -> None: ...


@pytest.mark.parametrize("selection", [Newest(), Plain(0.5)], ids=["dataclass", "object"])
def test_a_key_selection_of_ones_own_is_taken(selection: object) -> None:
    policy = MemoryPolicy(key_selection=selection)
    assert policy.key_selection is selection
    assert policy.with_changes(keep_ratio=0.3).key_selection is selection
    assert MemoryPolicy(**dict(policy)) == policy


def test_selections_with_other_parameters_are_written_differently() -> None:
    """`OMP(picks_per_step=3)` was written as `OMP()` was, so that two policies shared what was read under one."""
    selections = [
        OMP(),
        OMP(picks_per_step=3),
        OMP.fast(),
        OMP(name="omp_fast"),
        HighestAttention(),
        Newest(),
        Newest(spared=2),
        Plain(0.5),
        Plain([1, 2]),
    ]
    written = [MemoryPolicy(key_selection=each).model_dump(mode="json")["key_selection"] for each in selections]
    assert len({json.dumps(each) for each in written}) == len(selections)
    assert written[:2] == ["omp", {"name": "omp", "picks_per_step": 3}]
    assert written[6] == {"name": "newest", "spared": 2}
    assert (
        MemoryPolicy(key_selection=Newest(seen=[torch.ones(2)])).model_dump_json()
        == MemoryPolicy(key_selection=Newest()).model_dump_json()
    )


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Plain(torch.ones(2)), "'plain' cannot be written to a file: .*Tensor.*; make it a dataclass"),
        (Newest(name="omp"), "'omp' is the name of a built-in selection: give yours another name"),
        (Newest(name=7), "name is 7; it must be a str"),
    ],
    ids=["tensor", "taken", "number"],
)
def test_a_key_selection_that_cannot_be_told_from_others_is_refused(selection: object, words: str) -> None:
    with pytest.raises(InvalidPolicy, match=words):
        MemoryPolicy(key_selection=selection)


def test_a_saved_selection_of_ones_own_asks_for_the_object() -> None:
    saved = MemoryPolicy(key_selection=Newest(spared=2)).model_dump_json()
    with pytest.raises(InvalidPolicy, match="newest.*is not built in: pass the object itself"):
        MemoryPolicy.model_validate_json(saved)


COPIES: dict[str, Callable[[MemoryPolicy], MemoryPolicy]] = {
    "all fields": lambda policy: MemoryPolicy(**dict(policy)),
    "a dump": lambda policy: MemoryPolicy(**policy.model_dump()),
    "a file": lambda policy: MemoryPolicy.model_validate_json(policy.model_dump_json()),
    "changes": lambda policy: policy.with_changes(trigger_tokens=1000),
    "a copy": lambda policy: policy.model_copy(update={"trigger_tokens": 1000}),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_was_never_said_stays_unsaid_in_any_copy(name: str) -> None:
    """A copy of all fields said 512 tokens at once, on a GPU too."""
    copy = COPIES[name](MemoryPolicy(keep_ratio=0.3))
    assert copy.chunk_tokens is None
    assert copy.keep_ratio == 0.3


def test_a_memory_writes_the_policy_that_it_was_given(engine: TransformersEngine) -> None:
    """On every device: it said 2,048 tokens on a GPU, and a conversation was not found again on a CPU."""
    memory = Memory(engine, MemoryPolicy(trigger_tokens=1000))
    written = MemoryPolicy(trigger_tokens=1000).model_dump(mode="json")
    assert memory.policy.model_dump(mode="json") == written
    assert snapshot(memory.session()).policy == written
    assert context_of(memory.session()).chunk_tokens == engine.chunk_tokens == 512
    session = memory.session(policy=MemoryPolicy(trigger_tokens=1000, chunk_tokens=64))
    assert context_of(session).chunk_tokens == 64


def test_changes_are_checked_and_leave_the_rest() -> None:
    policy = POLICY.with_changes(keep_ratio=0.5)
    assert (policy.keep_ratio, policy.trigger_tokens) == (0.5, POLICY.trigger_tokens)
    assert policy.model_fields_set == POLICY.model_fields_set | {"keep_ratio"}
    with pytest.raises(InvalidPolicy, match="keep_ratio 2"):
        POLICY.with_changes(keep_ratio=2)
    with pytest.raises(InvalidPolicy, match="keep_ration"):
        POLICY.with_changes(keep_ration=0.5)


def test_a_field_that_there_is_not_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidPolicy, match=r"there is no triger_tokens \(did you mean trigger_tokens\?\)$"):
        MemoryPolicy(triger_tokens=1000)
    with pytest.raises(InvalidPolicy, match="keep_ratio 2: Input should be less.*; there is no xyz$"):
        MemoryPolicy(xyz=1, keep_ratio=2)


def test_a_change_of_any_name_is_refused_as_a_field() -> None:
    """A policy file with the field "self" ended the command line with a TypeError."""
    with pytest.raises(InvalidPolicy, match="self"):
        MemoryPolicy().with_changes(**{"self": 1})
