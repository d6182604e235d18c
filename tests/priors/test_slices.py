"""Slices of volumes that are read when they are needed."""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

from priors import PriorError
from priors.level import image_level
from priors.plain_images import PlainImages
from priors.slices import STAY, LazySlices, SliceList, Slices
from tests.priors.training_images import disks, rng


@dataclass
class Stored:
    """A volume whose reads are counted; ``broken`` ones cannot be read."""

    images: torch.Tensor
    name: str = "volume"
    whole: bool = True
    broken: bool = False
    known: torch.Tensor | None = None
    reads: list = field(default_factory=list)

    @property
    def num_slices(self):
        return len(self.images)

    @property
    def slice_bytes(self):
        return self.images[0].numel() * self.images.element_size()

    def read(self, start, stop):
        self.reads.append((start, stop))
        if self.broken:
            raise ValueError(f"{self.name} is damaged")
        return self.images[start:stop]

    def energies(self):
        return self.known


def constant(*values, size=(4, 5)):
    return torch.stack([torch.full(size, float(value)) for value in values])


def drawn(slices, count=200, seed=0):
    generator = rng(seed)
    return [slices.pick(generator) for _ in range(count)]


def test_a_list_and_volumes_in_memory_are_drawn_from_alike():
    images = constant(1, 2, 3, 4, 5)
    lazy = LazySlices([Stored(images[:2]), Stored(images[2:])])
    eager = SliceList(list(images))
    assert isinstance(lazy, Slices)
    assert len(lazy) == len(eager) == 5
    for one, other in zip(drawn(lazy), drawn(eager), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(PriorError, match="there is no image to train on"):
        SliceList([])


def test_volumes_are_read_once_and_slices_one_by_one_where_that_is_cheaper():
    whole, apart = Stored(constant(1, 2, 3)), Stored(constant(4, 5, 6), whole=False)
    slices = LazySlices([whole, apart])
    assert whole.reads == apart.reads == []
    drawn(slices)
    assert whole.reads == [(0, 3)]
    assert sorted(apart.reads) == [(0, 1), (1, 2), (2, 3)]
    slices.forget()
    drawn(slices)
    assert whole.reads == [(0, 3), (0, 3)]


def test_slices_are_brought_to_the_level_and_empty_ones_left_out():
    images = disks()
    volume = torch.cat([torch.zeros(1, *images.shape[1:]), images, 0.01 * images[:1]])
    for slices in (
        LazySlices([Stored(volume)], level=0.3),
        LazySlices([Stored(volume, whole=False, known=volume.square().sum((1, 2)))], level=0.3),
    ):
        found = {round(float(image.sum()), 3) for image in drawn(slices)}
        assert len(found) == len(images)
        for image in drawn(slices, 10):
            assert float(image_level(image)) == pytest.approx(0.3, rel=1e-5)
    # Without the others' energies, only what is all zero is known to be empty.
    slices = LazySlices([Stored(volume, whole=False)], level=0.3)
    assert len({round(float(image.sum()), 3) for image in drawn(slices)}) == len(images)
    with pytest.raises(PriorError, match="every slice that was drawn is empty or unreadable"):
        LazySlices([Stored(torch.zeros(2, 4, 4))], level=0.3).pick(rng())


def test_stacks_are_neighbours_at_one_common_level():
    images = disks(4) * torch.tensor([1.0, 2.0, 1.0, 3.0])[:, None, None]
    slices = LazySlices([Stored(images)], stack=3, level=0.3)
    assert len(slices) == 2
    for stack in drawn(slices, 20):
        assert stack.shape == (3, *images.shape[1:])
        ratios = [stack / images[start : start + 3] for start in (0, 1)]
        spread = [float((r[torch.isfinite(r)].max() / r[torch.isfinite(r)].min()).log()) for r in ratios]
        assert min(spread) < 1e-4  # one factor for all slices
        levels = image_level(stack) ** 2
        weights = stack.double().square().sum((1, 2))
        assert math.sqrt(float((levels * weights).sum() / weights.sum())) == pytest.approx(0.3, rel=1e-4)
    assert len(LazySlices([Stored(images), Stored(images[:2])], stack=3)) == 2
    with pytest.raises(PriorError, match="no volume of at least 5 slices"):
        LazySlices([Stored(images)], stack=5)


def test_complex_slices_keep_their_phase():
    images = disks().to(torch.complex64) * 1j
    image = LazySlices([Stored(images)], level=0.3).pick(rng())
    assert image.dtype == torch.complex64
    assert float(image.real.abs().max()) == 0
    assert float(image_level(image)) == pytest.approx(0.3, rel=1e-5)


def test_what_cannot_be_read_is_passed_over_and_listed():
    good, bad = Stored(constant(1, 2), "good"), Stored(constant(3, 4), "bad", broken=True)
    nan = Stored(constant(math.nan), "nan")
    slices = LazySlices([good, bad, nan])
    images = drawn(slices, 50)
    assert {float(image.max()) for image in images} == {1.0, 2.0}
    assert slices.failed == {"bad": "bad is damaged", "nan": "nan holds values that are not finite"}
    assert len(bad.reads) == 1
    # It does not matter whether the damage is known yet: a resumed training is the same.
    again = drawn(slices, 50)
    for one, other in zip(images, again, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(PriorError, match="no image can be read: bad is damaged"):
        LazySlices([Stored(constant(3), "bad", broken=True)]).pick(rng())


def test_volumes_take_turns_where_memory_is_short():
    volumes = [Stored(constant(value, value), f"volume {value}") for value in range(10)]
    size = 2 * volumes[0].slice_bytes
    slices = LazySlices(volumes, memory=3.5 * size, seed=1)
    assert slices.held == 3
    assert slices.total_bytes == 10 * size

    def held(step):
        slices.seek(step)
        return {float(image.max()) for image in drawn(slices, 60, step)}

    pools = [held(step) for step in range(0, 10 * STAY, STAY)]
    assert all(len(pool) == 3 for pool in pools)
    assert all(len(one & other) == 2 for one, other in pairwise(pools))
    assert set.union(*pools) == set(map(float, range(10)))
    assert sum(len(volume.reads) for volume in volumes) == 10 + 2  # the first three, then one at a time
    # Resumed: the same volumes at the same step.
    fresh = LazySlices(volumes, memory=3.5 * size, seed=1)
    fresh.seek(4 * STAY + 7)
    assert {float(image.max()) for image in drawn(fresh, 60)} == pools[4]
    with pytest.raises(PriorError, match=r"volume 0 needs .* GiB of memory, more than"):
        LazySlices(volumes, memory=0.5 * size)


@dataclass
class Holed(Stored):
    """A volume read slice by slice, the second of which cannot be read."""

    whole: bool = False

    def read(self, start, stop):
        if start == 1:
            raise ValueError(f"{self.name} has a hole")
        return super().read(start, stop)


@pytest.mark.parametrize("held", [1, 2, 3])
def test_what_cannot_be_read_does_not_end_a_training_that_holds_few_volumes(held):
    broken = {0, 3, 4, 5}
    volumes = [Stored(constant(v, v), f"volume {v}", broken=v in broken) for v in range(8)]
    volumes.append(Holed(constant(8, 9), "volume 8"))
    memory = held * 2 * volumes[0].slice_bytes

    def draws_at(slices, step):
        slices.seek(step)
        return [float(image.max()) for image in drawn(slices, 2, step)]

    slices = LazySlices(volumes, memory=memory, seed=1)
    steps = range(0, 9 * STAY, 5)
    seen = [draws_at(slices, step) for step in steps]
    assert {value for values in seen for value in values} == {1.0, 2.0, 6.0, 7.0, 8.0}
    assert set(slices.failed) == {f"volume {v}" for v in (*broken, 8)}
    assert all(len(volumes[v].reads) == 1 for v in broken)
    assert all(len(volume.reads) < 6 for volume in volumes)  # what stands in for others stays, too
    # Resumed anywhere, with nothing known of the damage: the same images.
    for step, expected in zip(steps, seen, strict=True):
        assert draws_at(LazySlices(volumes, memory=memory, seed=1), step) == expected
    lost = [Stored(constant(v, v), f"volume {v}", broken=True) for v in range(3)]
    with pytest.raises(PriorError, match=r"no image can be read: volume [012] is damaged"):
        LazySlices(lost, memory=memory if held < 3 else 0.5 * memory).pick(rng())


# Plain images


def test_plain_patches_are_cut_out_and_mirrored():
    image = torch.arange(6 * 7.0).reshape(6, 7)
    expected = {
        tuple(piece.flatten().tolist())
        for top in range(3)
        for left in range(4)
        for piece in (image[top : top + 4, left : left + 4], image[top : top + 4, left : left + 4].flip(-1))
    }
    patches = PlainImages([image]).draw(600, 4, rng())
    assert {tuple(patch.flatten().tolist()) for patch in patches} == expected


def test_small_images_lie_in_a_patch_of_zeros():
    patches = PlainImages([torch.ones(2, 5)]).draw(50, 4, rng())
    assert patches.shape == (50, 4, 4)
    assert set(patches.sum((1, 2)).tolist()) == {8.0}
    assert {int(patch[:, 0].argmax()) for patch in patches} == {0, 1, 2}


def test_plain_images_of_both_channels():
    stack = torch.rand(3, 8, 8, generator=rng()) - 0.3
    assert PlainImages([stack]).draw(2, 8, rng()).shape == (2, 3, 8, 8)
    made = PlainImages([stack], "complex").draw(40, 8, rng())
    assert made.shape == (40, 3, 8, 8)
    torch.testing.assert_close(made.abs().sort().values.sum((1, 2, 3)), stack.abs().sum().expand(40))
    own = torch.polar(torch.ones(8, 8), torch.rand(8, 8, generator=rng()))
    turned = PlainImages([own], "complex").draw(20, 8, rng())
    for patch in turned:
        # Its own phase but for a constant, and perhaps mirrored.
        spread = [float((patch / mirror).angle().cos().std()) for mirror in (own, own.flip(-1))]
        assert min(spread) < 1e-5
    assert PlainImages([own]).draw(1, 8, rng()).dtype == torch.float32
    for channels in ("rgb", ""):
        with pytest.raises(PriorError, match="a prior's channels are 'complex' or 'real'"):
            PlainImages([stack], channels)
