"""Names of models, and names that must differ."""

from __future__ import annotations

from cellhpc.names import model_name, told_apart


def test_a_model_is_named_by_its_network_and_where_it_starts() -> None:
    assert model_name({"network": "ResNet50", "initialisation": "xavier", "seeds": [0]}) == "ResNet50, xavier"


def test_names_that_are_there_already_get_the_next_free_number() -> None:
    assert told_apart(["a", "b", "a-2", "a", "A", "a"]) == ["a", "b", "a-2", "a-3", "A-4", "a-5"]
    assert told_apart([]) == []
