"""Block swap: weights that stay in main memory, copied to the device one block ahead of the computation.

The device has room for two blocks: while one computes, a thread and a stream of their own fill the other room with the
next one. The order is that of the use, whatever it is: forward, recomputed backward, a sampler's steps. Copies have the
stored bits, so nothing that is computed depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .mmdit import MMDiT
from .stored import Stored, StoredLinear

Pairs = list[tuple[Tensor, Tensor]]
"""(destination, source) of each copy."""


class Copies:
    """Copies in the thread that asks for them; base of those beside the computation."""

    def used(self) -> Any:
        """Mark the computation so far, which may still read the destinations."""

    def copy(self, pairs: Pairs, used: Any) -> Any:
        """Copy, after the computation marked by `used`; returns a mark of the copies' end."""
        for destination, source in pairs:
            destination.copy_(source)

    def wait(self, copied: Any) -> None:
        """Let the computation from here on follow the copies."""


class StreamCopies(Copies):
    """Copies to a CUDA device on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def used(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, pairs: Pairs, used: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(used)
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(copied)


class Room:
    """Memory on the device for the weights of one block. holds: index of the block, None while empty."""

    def __init__(self, layers: Sequence[StoredLinear], device: torch.device) -> None:
        self.stored: list[Stored] = [
            (torch.empty_like(m.weight, device=device), None if m.scale is None else m.scale.to(device, copy=True))
            for m in layers
        ]
        self.holds: int | None = None
        self.copying: Future[Any] | None = None


class BlockSwap:
    """Weights of some blocks of a network, on the device where and when they are used.

    blocks: layers of each swapped block, of equal shapes and storage dtypes, in the order of the forward pass. copies:
    by default `StreamCopies` to the CUDA device that asks. waited: number of blocks that were not asked for ahead.
    """

    def __init__(self, blocks: Sequence[Sequence[StoredLinear]], copies: Copies | None = None) -> None:
        self.blocks = [list(layers) for layers in blocks]
        self.place = {id(m): (i, j) for i, layers in enumerate(self.blocks) for j, m in enumerate(layers)}
        self.copies = copies
        self.rooms: list[Room] = []
        self.device: torch.device | None = None
        self.current: int | None = None
        self.upwards = True
        self.waited = 0
        self.uniform: bool | None = None
        self._thread = ThreadPoolExecutor(1, "block swap")

    def serves(self, layer: StoredLinear, device: torch.device) -> bool:
        """True if a layer's weights come through here; else they are copied for each product."""
        if not layer.weight.is_cpu or not (self.copies is not None or device.type == "cuda"):
            return False
        if self.uniform is None:
            self.uniform = len({tuple(map(layout, layers)) for layers in self.blocks}) == 1
        return self.uniform

    @torch.compiler.disable
    def stored(self, layer: StoredLinear, device: torch.device, returns: bool = False) -> Stored:
        """Weight and scale of a layer on the device, valid until another block is asked for.

        returns: a backward pass will follow, which starts with the last block.
        """
        block, index = self.place[id(layer)]
        if self.device != device:
            self._open(device)
        if block != self.current:
            self._enter(block, returns)
        return self._room_of(block).stored[index]

    def release(self) -> None:
        """Free the device's memory, as before the weights change or the network leaves the device."""
        for room in self.rooms:
            if room.copying is not None:
                room.copying.result()
        if self.rooms and self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the other stream may still write into the rooms
        self.rooms, self.device, self.current, self.uniform = [], None, None, None

    def _open(self, device: torch.device) -> None:
        self.release()
        if self.copies is None or isinstance(self.copies, StreamCopies):
            self.copies = StreamCopies(device)
        with torch.inference_mode(False), torch.no_grad():
            self.rooms = [Room(self.blocks[0], device) for _ in range(min(2, len(self.blocks)))]
        self.device = device

    def _enter(self, block: int, returns: bool) -> None:
        """Make a block the current one: wait for its copy and start that of the next one."""
        before, last = self.current, len(self.blocks) - 1
        wraps = before == last and block == 0 and last > 1
        self.upwards = wraps or before is None or block > before
        if all(room.holds != block for room in self.rooms):
            self.waited += 1
            self._start(block)
        self.current = block
        room = self._room_of(block)
        if room.copying is not None:
            copied = room.copying.result()
            room.copying = None
            assert self.copies is not None  # set by `_open`
            self.copies.wait(copied)
        self._start(self._next(block, returns))

    def _next(self, block: int, returns: bool) -> int:
        """The block that will be asked for after this one."""
        last = len(self.blocks) - 1
        if self.upwards and block == last:
            return last - 1 if returns else 0
        return block + 1 if self.upwards or block == 0 else block - 1

    def _start(self, block: int) -> None:
        """Copy a block into the room of a block that is not current, unless it is there."""
        if not 0 <= block < len(self.blocks) or any(room.holds == block for room in self.rooms):
            return
        assert self.copies is not None  # set by `_open`
        room = next(room for room in self.rooms if room.holds is None or room.holds != self.current)
        if room.copying is not None:  # of a block that was not asked for after all
            room.copying.result()
        pairs: Pairs = []
        for (weight, scale), layer in zip(room.stored, self.blocks[block], strict=True):
            pairs.append((weight, layer.weight.detach()))
            if scale is not None and layer.scale is not None:
                pairs.append((scale, layer.scale))
        room.holds = block
        room.copying = self._thread.submit(self._copy, pairs, self.copies.used())

    def _copy(self, pairs: Pairs, used: Any) -> Any:
        assert self.copies is not None  # set by `_open`
        with torch.no_grad():
            return self.copies.copy(pairs, used)

    def _room_of(self, block: int) -> Room:
        return next(room for room in self.rooms if room.holds == block)


def layout(layer: StoredLinear) -> tuple[object, ...]:
    """What two layers must share to use the same room."""
    scale = None if layer.scale is None else layer.scale.shape
    return layer.weight.shape, layer.weight.dtype, scale


def swap_blocks(network: MMDiT, blocks: int, copies: Copies | None = None) -> BlockSwap | None:
    """Let the matrices of the last `blocks` blocks stay in main memory. copies: as of BlockSwap."""
    behind = network.transformer_blocks[len(network.transformer_blocks) - blocks :]
    layers = [[m for m in block.modules() if isinstance(m, StoredLinear)] for block in behind]
    if not layers:
        return None
    swap = BlockSwap(layers, copies)
    for layer in (m for of_block in layers for m in of_block):
        layer.on_device, layer.swap = False, swap
    return swap
