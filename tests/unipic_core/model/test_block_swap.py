"""Block swap with copies whose order is recorded: what it computes, and that copies are asked for ahead."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.block_swap import BlockSwap, Copies, Pairs, swap_blocks
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.model.stored import StoredLinear, StoredOperations

SIZES = MMDiTConfig(
    num_layers=6, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), joint_attention_dim=24
)


class Recorded(Copies):
    """Simulated transfers, which a test can hold back."""

    def __init__(self) -> None:
        self.gate, self.copied = threading.Event(), 0
        self.gate.set()

    def copy(self, pairs: Pairs, used: Any) -> Any:
        assert self.gate.wait(10)
        super().copy(pairs, used)
        self.copied += 1


def network(blocks: int, copies: Copies | None = None) -> tuple[MMDiT, BlockSwap | None]:
    torch.manual_seed(0)
    made = MMDiT(SIZES, operations=StoredOperations, compute_dtype=torch.float32)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    swap = swap_blocks(made, blocks, copies or Recorded())
    return made.requires_grad_(False), swap


def example(seed: int = 0) -> tuple[PackedLatents, Tensor, TextCond]:
    g = torch.Generator().manual_seed(seed)
    shape = LatentShape(1, 3, 4)
    tokens = torch.randn(2, 12, 64, generator=g)
    return (
        PackedLatents(tokens, ((shape,),) * 2, 12),
        torch.tensor([0.3, 0.8]),
        TextCond(torch.randn(2, 5, 24, generator=g)),
    )


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_velocities_are_the_same_bits(blocks: int) -> None:
    whole, _ = network(0)
    swapped, swap = network(blocks)
    assert swap is not None
    for seed in range(3):
        assert torch.equal(whole(*example(seed)), swapped(*example(seed)))
    assert swap.waited == 1, "only the very first block is waited for, the others are asked for ahead"


def test_at_most_two_blocks_are_on_the_device() -> None:
    _, swap = network(4)
    assert swap is not None
    layers = [m for of_block in swap.blocks for m in of_block]
    places = [swap.stored(m, torch.device("cpu"))[0].data_ptr() for m in layers]
    assert len(set(places)) == 2 * len(swap.blocks[0])
    assert len(swap.rooms) == 2


@pytest.mark.parametrize("order", ["steps", "there and back", "back alone", "at random"])
def test_any_order_gives_the_right_weights(order: str) -> None:
    _, swap = network(5)
    assert swap is not None
    up = list(range(5))
    orders = {
        "steps": up * 4,
        "there and back": (up + up[::-1]) * 4,
        "back alone": up[::-1] * 4,
        "at random": torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(1)).tolist(),
    }
    for at, block in enumerate(orders[order]):
        for layer in swap.blocks[block]:
            returns = order == "there and back" and at % 10 < 5
            stored, _ = swap.stored(layer, torch.device("cpu"), returns)
            assert stored.data_ptr() != layer.weight.data_ptr()
            assert torch.equal(stored, layer.weight)
    if order in ("steps", "there and back"):
        assert swap.waited == 1


def test_the_next_block_is_copied_while_one_computes() -> None:
    """Entering a block starts the next one's copy and does not wait for it."""
    copies = Recorded()
    _, swap = network(3, copies)
    assert swap is not None
    cpu = torch.device("cpu")
    swap.stored(swap.blocks[0][0], cpu)
    swap.rooms[1].copying.result()  # the second block's, asked for ahead  # type: ignore[union-attr]
    assert copies.copied == 2
    copies.gate.clear()
    swap.stored(swap.blocks[1][0], cpu)  # returns though the third block's copy is held back
    assert copies.copied == 2
    copies.gate.set()
    swap.stored(swap.blocks[2][0], cpu)
    assert copies.copied >= 3


def test_weights_that_change_are_copied_again() -> None:
    made, swap = network(3)
    assert swap is not None
    before = made(*example())
    for layer in swap.blocks[2]:
        layer.store(layer.weight * 1.5)
    after = made(*example())
    assert not torch.equal(before, after)
    plain, _ = network(0)
    for block in plain.transformer_blocks[5:]:
        for m in block.modules():
            if isinstance(m, StoredLinear):
                m.store(m.weight * 1.5)
    assert torch.equal(after, plain(*example()))
    made.to("cpu")  # what leaves the device takes no room there
    assert not swap.rooms


def test_blocks_of_unequal_storage_are_copied_for_each_product() -> None:
    made, swap = network(3)
    assert swap is not None
    swap.blocks[1][0].store(swap.blocks[1][0].weight.bfloat16())
    assert not swap.serves(swap.blocks[0][0], torch.device("cpu"))
    assert made(*example()).isfinite().all()


def test_a_failed_copy_is_an_error_where_it_is_needed() -> None:
    class Broken(Copies):
        def copy(self, pairs: Pairs, used: Any) -> Any:
            raise RuntimeError("the bus is gone")

    made, _ = network(2, Broken())
    with pytest.raises(RuntimeError, match="the bus is gone"):
        made(*example())
