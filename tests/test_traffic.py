from __future__ import annotations

from pathlib import Path

import pytest

from cellhpc.errors import UserError
from cellhpc.traffic import Sizes, averaged_bytes, count, ring_bytes
from tests import small
from tests.ranks_at_work import start_ranks

MOBILENET = "MobileNet(alpha=0.25)"


WANTED = [("ResNet50", 64, 3), (MOBILENET, 32, 3)]
CLASSES = 3


@pytest.fixture(scope="module")
def plain() -> list[Sizes]:
    """Both networks, all of which learns."""
    found = count(WANTED, CLASSES, small.SETTINGS)
    assert found is not None
    return found


def test_a_ring_sends_each_byte_about_twice() -> None:
    assert [ring_bytes(1000, ranks) for ranks in (1, 2, 4)] == [0, 1000, 1500]
    assert ring_bytes(1000, 10**6) == pytest.approx(2000)


def test_what_is_averaged_is_what_two_ranks_have_in_their_graphs(tmp_path: Path, plain: list[Sizes]) -> None:
    pytest.importorskip("horovod")
    variants = [
        small.SETTINGS.model_copy(update=update)
        for update in ({"batch_norm": "synchronised"}, {"compression": "fp16", "trained": "head_first"})
    ]
    texts = [settings.model_dump_json() for settings in variants]
    first, second = start_ranks("traffic_program.py", 2, tmp_path, MOBILENET, *texts)
    assert first == second == [
        {part: averaged_bytes(plain[1], settings, part, 2) for part in graphs}
        for settings, graphs in zip(variants, (["all"], ["head", "all"]), strict=True)
    ]  # fmt: skip


def test_numbers_that_learn_are_those_of_keras_applications(plain: list[Sizes]) -> None:
    without = count(WANTED, CLASSES, small.SETTINGS.model_copy(update={"batch_norm": "frozen"}))
    assert without is not None
    # 25,583,592 trainable of ResNet50 with its head of 1000, as Keras lists it, less that head
    assert plain[0].all == 25_583_592 - 2049 * 1000 + plain[0].head
    assert plain[0].head == 2049 * CLASSES
    for one, other in zip(plain, without, strict=True):
        assert one.all - other.all == 2 * one.normalised  # scales and shifts
        assert one.head == other.head


def test_a_network_that_can_not_be_built_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"keras.applications.MobileNet with input .*nonsense"):
        count([("MobileNet(nonsense=1)", 32, 3)], 3, small.SETTINGS)


def test_sizes_name_what_they_are() -> None:
    sizes = Sizes(head=10, all=100, normalised=8)
    assert averaged_bytes(sizes, small.SETTINGS, "all", 2) == 412
    assert averaged_bytes(sizes, small.SETTINGS.model_copy(update={"compression": "fp16"}), "head", 2) == 32
