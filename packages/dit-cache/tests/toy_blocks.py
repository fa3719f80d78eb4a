"""Tiny models with blocks in the forms in which they come, and the rule of the cache as a plain loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dit_cache.engine.moment import Streams

WIDTH = 8
Combine = Callable[[int, list[tuple[int, Tensor]]], Tensor]  # of a step and what is kept, with its steps


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mix(hidden) + hidden.mean(1, keepdim=True)  # type: ignore[no-any-return]


class Block(nn.Module):
    """hidden + attention · time, then + feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()
        self.ff = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn1(hidden_states) * time
        return hidden_states + self.ff(hidden_states.tanh())  # type: ignore[no-any-return]


class InPlaceBlock(Block):
    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        hidden_states += self.attn1(hidden_states).mul_(time)
        hidden_states += self.ff(hidden_states.tanh())
        return hidden_states


class TupleBlock(Block):
    def forward(self, hidden_states: Tensor, time: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (super().forward(hidden_states, time),)


class TextBlock(nn.Module):
    """Two streams, returned in the order in which they come."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.ff, self.text = Attention(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.attn1(torch.cat([hidden_states, encoder_hidden_states], 1)) * time
        length = hidden_states.shape[1]
        hidden_states = hidden_states + joint[:, :length]
        encoder_hidden_states = encoder_hidden_states + self.text(joint[:, length:].tanh())
        return hidden_states + self.ff(hidden_states.tanh()), encoder_hidden_states


class TextFirstBlock(TextBlock):
    """Takes the streams in one order, and returns them in the other; writes into both."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        hidden, encoder = super().forward(hidden_states, encoder_hidden_states, time)
        return encoder_hidden_states.copy_(encoder), hidden_states.copy_(hidden)


class Toy(nn.Module):
    """Embedding, blocks, head. Subclasses call their blocks in other ways."""

    block_class: type[nn.Module] = Block

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(self.block_class() for _ in range(depth))

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        streams = self.enter(latents)
        for index in range(len(self.blocks)):
            streams = self.between(index, self.block(index, streams, time))
        return self.leave(streams)

    def enter(self, latents: Tensor) -> Streams:
        return (self.embed(latents),)

    def block(self, index: int, streams: Streams, time: Tensor) -> Streams:
        return (self.blocks[index](streams[0], time),)

    def between(self, index: int, streams: Streams) -> Streams:
        return streams

    def leave(self, streams: Streams) -> Tensor:
        return self.head(streams[0].to(self.head.weight.dtype))  # type: ignore[no-any-return]


class InPlaceToy(Toy):
    block_class = InPlaceBlock


class TupleToy(Toy):
    block_class = TupleBlock

    def block(self, index: int, streams: Streams, time: Tensor) -> Streams:
        return self.blocks[index](*streams, time)  # type: ignore[no-any-return]


class KeywordToy(Toy):
    def block(self, index: int, streams: Streams, time: Tensor) -> Streams:
        return (self.blocks[index](time=time, hidden_states=streams[0]),)


class HintToy(Toy):
    """Adds something after every second block, and has a time of its own for every block."""

    def block(self, index: int, streams: Streams, time: Tensor) -> Streams:
        times = [time + n for n in range(len(self.blocks))]
        return (self.blocks[index](streams[0], times[index]),)

    def between(self, index: int, streams: Streams) -> Streams:
        return (streams[0] + index,) if index % 2 == 0 else streams


class WideningToy(Toy):
    """Enters in bfloat16, leaves in float32: what autocast does."""

    def enter(self, latents: Tensor) -> Streams:
        return (self.embed(latents).bfloat16(),)

    def block(self, index: int, streams: Streams, time: Tensor) -> Streams:
        hidden = streams[0]
        return (_widening(self.blocks[index], hidden, time),)


def _widening(block: nn.Module, hidden: Tensor, time: Tensor) -> Tensor:
    return block(hidden, time)  # type: ignore[no-any-return]


class WideningBlock(Block):
    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        return super().forward(hidden_states.float(), time)


WideningToy.block_class = WideningBlock


class TextToy(Toy):
    block_class = TextBlock

    def enter(self, latents: Tensor) -> Streams:
        hidden = self.embed(latents)
        return hidden, hidden[:, :3].clone() * 2

    def block(self, index: int, streams: Streams, time: Tensor) -> Streams:
        return self.blocks[index](*streams, time)  # type: ignore[no-any-return]

    def leave(self, streams: Streams) -> Tensor:
        return self.head(streams[0]) + streams[1].mean()  # type: ignore[no-any-return]


class TextFirstToy(TextToy):
    """What goes from block to block here is (hidden, text); what a block returns is (text, hidden)."""

    block_class = TextFirstBlock

    def block(self, index: int, streams: Streams, time: Tensor) -> Streams:
        hidden, encoder = streams
        encoder, hidden = self.blocks[index](encoder_hidden_states=encoder, hidden_states=hidden, time=time)
        return hidden, encoder


TOYS: tuple[type[Toy], ...] = (
    Toy, InPlaceToy, TupleToy, KeywordToy, HintToy, WideningToy, TextToy, TextFirstToy,
)  # fmt: skip


def make(kind: type[Toy] = Toy, depth: int = 5, seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return kind(depth).requires_grad_(False)


def inputs(steps: int, *, batch: int = 2, length: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Latents [B, S, 3] and a time for every step."""
    generator = torch.Generator().manual_seed(batch * length)
    start, way = (torch.randn(batch, length, 3, generator=generator) for _ in range(2))
    return [(start + way * n / steps, torch.tensor(1 - n / steps)) for n in range(steps)]


def reuse(step: int, kept: list[tuple[int, Tensor]]) -> Tensor:
    return kept[-1][1]


def line(step: int, kept: list[tuple[int, Tensor]]) -> Tensor:
    """The line through the last two values, over the steps."""
    if len(kept) == 1:
        return kept[-1][1]
    (i, before), (j, last) = kept[-2:]
    return last + (last - before) * (step - j) / (j - i)


def naive(
    model: Toy,
    calls: Sequence[tuple[Tensor, Tensor]],
    computed: Collection[int],
    between: tuple[int, int] | None = None,
    combine: Combine = reuse,
) -> list[Tensor]:
    """A generation with the change over blocks `between` cached: the rule, without any of the machinery."""
    first, end = between or (0, len(model.blocks))
    kept: list[list[tuple[int, Tensor]]] = [[] for _ in range(2)]
    outputs = []
    for step, (latents, time) in enumerate(calls):
        streams = model.enter(latents)
        for index in range(len(model.blocks)):
            inside = first <= index < end
            if index == first:
                before = tuple(stream.clone() for stream in streams)
            if step in computed or not inside:
                streams = model.block(index, streams, time)
            if index == end - 1 and step in computed:
                for changes, now, was in zip(kept, streams, before, strict=False):
                    changes.append((step, now - was))
            elif index == end - 1:
                streams = tuple(
                    was.to(changes[-1][1].dtype) + combine(step, changes)
                    for changes, was in zip(kept, before, strict=False)
                )
            if step in computed or not inside or index == end - 1:
                streams = model.between(index, streams)
        outputs.append(model.leave(streams))
    return outputs


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the calls of every module, by the last part of its name, however they come about."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counts.update([name])

    handles = [
        module.register_forward_hook(count(name.rpartition(".")[2])) for name, module in model.named_modules() if name
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
