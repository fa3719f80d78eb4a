"""The cache inside a model: of the change of the residual stream over its blocks, or of the output of its attentions.

::

    with attach(transformer, policy, branches=("cond", "uncond")) as cache, cache.generation(sigmas):
        for step in range(steps):
            with cache.at(step, "cond"):
                transformer(...)
            ...
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache as once_only
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dit_cache.engine.cache import Cache
from dit_cache.engine.moment import Evidence, Streams
from dit_cache.engine.protocols import Guard, Policy, Predictor, Store
from dit_cache.engine.regions import Place, Stretch
from dit_cache.engine.sites import compiler
from dit_cache.engine.watched import Call, Shapes, Watched, device_of, shapes_of
from dit_cache.errors import CacheWarning, ConfigError, GenerationError, ModelExecError, ParametersInvalid

Signal = Callable[..., Tensor]

Self = TypeVar("Self", bound="BlockCache")


class BlockCache(Cache):
    """Keeps what blocks of a model do; `attach` makes it.

    Moments are said, or counted::

        with cache.generation(sigmas), cache.at(step, "cond"):  # said
            model(...)

        with cache.generation(sigmas):  # counted: every call is the next of `branches`, then the next step
            model(...)

    With `steps`, a generation begins with a call when none is going on, and ends after its last call. Without, the
    model computes as if nothing was attached. Counting takes it that every branch is called in every step: say the
    moments where guidance is left out in some.

    In a model compiled as a whole, say the moments: with a policy that looks at nothing, the decision then falls
    outside of the graph.
    """

    def __init__(
        self,
        watched: list[Watched],
        policy: Policy,
        *,
        branches: Sequence[str] = ("",),
        steps: int | Sequence[float] | None = None,
        signal: Signal | None = None,
        predictor: Predictor | None = None,
        store: Store | None = None,
        guards: Sequence[Guard] = (),
        group: ProcessGroup | None = None,
        measure: bool = False,
    ) -> None:
        probing = all(isinstance(place, Stretch) for each in watched for place in each.places)
        self.offers = frozenset(({"signal"} if signal else set()) | ({"probe"} if probing else set()))
        super().__init__(policy, predictor=predictor, store=store, guards=guards, group=group, measure=measure)
        if self.predictor.uses_latents:
            raise ConfigError(f"{type(self.predictor).__name__} uses the latents, which a BlockCache does not see")
        models = [each.model for each in watched]
        for kind, given in (("models", models), ("branches", list(branches))):
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"there are {len(given)} {kind}, {len(set(given))} different ones; give each once")
        self.branches = tuple(branches)
        self.steps = steps
        self.signal = signal
        self._watched = watched
        self._needs = policy.needs.union(*(guard.needs for guard in self.guards))
        self._call: Call | None = None
        self._implicit = False
        self._counted = 0
        self._shapes: dict[str, Shapes] = {}
        self._rest()
        for each in watched:
            each.check()
        for each in watched:
            each.install(partial(self._before, each), partial(self._after, each))

    def detach(self) -> None:
        """Take everything out of the models again, and drop what is kept; may be called twice.

        Raises:
            ConfigError: something else stepped in front of a block since.
        """
        for watched in self._watched:
            watched.remove()
        self._close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Drop what is kept, and end the generation: for counted ones that were left before their last step."""
        self._close()

    @contextmanager
    def at(self, step: int, branch: str = "", *, model: nn.Module | None = None) -> Iterator[None]:
        """Say which evaluation the call of the model in the body is.

        Args:
            step: from 0.
            branch: side of the guidance.
            model: which of several is called; needed only where they are compiled as a whole.

        Raises:
            GenerationError: no generation is going on, the step is not one of it, or the model is called twice.
            ModelExecError: the blocks were not run as expected.
            ParametersInvalid: `model` is none of those that the cache is attached to.
        """
        if self._call is not None:
            if self._call.explicit:
                raise GenerationError("a moment inside another one; call the model once in each")
            self._close()  # a counted call that never came back
        known = self._watched if model is None else [each for each in self._watched if each.model is model]
        if not known:
            raise ParametersInvalid("no cache is attached to this model; give one that it is attached to, or none")
        moment, side = self._moment(step, branch)
        call = self._call = Call(at=moment, side=side, explicit=True)
        try:
            if len(known) == 1 and not self._needs:
                self._decide_on(call, known[0], device_of(known[0].model))
                known[0].decided = True
            yield
        except BaseException:
            self._close()
            raise
        self._finish(call)

    def bytes_for(
        self,
        hidden_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        encoder_shape: Sequence[int] | None = None,
        branches: int | None = None,
    ) -> int:
        """Return the bytes that a generation will hold at its peak, exactly.

        While a step of "stack" or "range" is computed, one buffer of the size of its streams comes on top.

        Args:
            hidden_shape: of the hidden states, with the batch; of the output of an attention.
            dtype: of what is cached.
            encoder_shape: of the other stream, where blocks return two.
            branches: that are cached one by one; as many as were attached for when None.
        """
        shapes = [hidden_shape] if encoder_shape is None else [hidden_shape, encoder_shape]
        places = max(len(watched.places) for watched in self._watched)
        one = sum(self.store.nbytes(shape, dtype) for shape in shapes)
        return (len(self.branches) if branches is None else branches) * places * self.predictor.history * one

    # ---- generations -----------------------------------------------------------------------------------------------

    def _open(self, sigmas: Sequence[float] | int) -> None:
        super()._open(sigmas)
        self._rest()

    def _close(self) -> None:
        super()._close()
        self._rest()

    def _rest(self) -> None:
        self._call, self._implicit, self._counted = None, False, 0
        self._shapes.clear()
        for watched in self._watched:
            watched.reset()
            watched.idle = self._times is None and self.steps is None

    # ---- one call of a model: the hooks, which may be compiled with it ----------------------------------------------

    def _before(self, watched: Watched, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            if not watched.decided and not watched.idle:
                compiler.disable(self._begin)(watched, args, kwargs)
        else:
            for site in watched.sites:
                site.follow()
            if not watched.idle:
                self._begin(watched, args, kwargs)
        watched.ran = True

    def _after(self, watched: Watched, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if watched.decided or watched.idle:
            return
        if torch.compiler.is_compiling():
            compiler.disable(self._end)(result)
        else:
            self._end(result)

    # ---- and what they do ------------------------------------------------------------------------------------------

    def _begin(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._times is not None and threading.get_ident() != self._thread:
            raise GenerationError("the model is called by another thread than the one that began the generation")
        shapes = shapes_of(args, kwargs)
        call = self._call
        if call is None or not call.explicit:
            call = self._count(shapes)
        elif watched.ran or call.watched not in (None, watched):
            raise GenerationError("a model was called twice in one moment; write `with cache.at(...)` around each call")
        if call is None:
            return
        if self._shapes.setdefault(call.at.branch, shapes) != shapes:
            raise GenerationError(
                f"tensors of the shapes {list(shapes.values())} were given in branch {call.at.branch!r}, where this "
                f"generation had {list(self._shapes[call.at.branch].values())}: begin a generation for each shape"
            )
        if not watched.decided:
            self._prepare(call, watched, args, kwargs)

    def _count(self, shapes: Shapes) -> Call | None:
        """Return the call that follows on the last one, if calls are counted now."""
        if self._call is not None:  # it never came back: an interrupt is no `Exception`, and hooks do not hear of it
            self._close()
        branch = self.branches[self._counted % len(self.branches)]
        if self._implicit and self._shapes.get(branch, shapes) != shapes:
            warnings.warn(
                f"after {self._counted} calls of a generation the input became {list(shapes.values())}; "
                "a new generation begins",
                CacheWarning,
                stacklevel=2,
            )
            self._close()
            branch = self.branches[0]
        if self._times is None:
            if self.steps is None:
                return None
            self._open(self.steps)
            self._implicit = True
        moment, side = self._moment(None, branch)
        self._call = Call(at=moment, side=side, explicit=False)
        return self._call

    def _prepare(self, call: Call, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide, or have it decided where the cached blocks begin."""
        call.watched = watched
        if self.signal is not None:
            call.seen = Evidence(signal=once_only(partial(self.signal, watched.model, *args, **kwargs)))
        if "probe" not in self._needs:
            self._decide_on(call, watched, device_of(watched.model, (*args, *kwargs.values())))
            return
        for place in watched.places:
            place.live = True
            if isinstance(place, Stretch):
                place.decide = partial(self._decide_by_probe, call, watched)

    def _decide_by_probe(self, call: Call, watched: Watched, probed: Streams) -> None:
        latents = max(probed, key=Tensor.numel)  # of two streams, that of the text is the shorter
        call.seen = Evidence(signal=call.seen.signal, probe=lambda: latents)
        self._decide_on(call, watched, latents.device)

    def _decide_on(self, call: Call, watched: Watched, device: torch.device) -> None:
        call.watched = watched
        keys = {place.key for place in watched.places}
        for key in call.side.memories.keys() - keys:  # of another model, which is not called again in this generation
            del call.side.memories[key]
            call.side.policy = copy.deepcopy(self.policy)  # what it saw was that one
        memories = [self._memory(call.side, place.key) for place in watched.places]
        ready = all(len(memory) > 0 for memory in memories)
        call.decision = self._decide(call.at, call.side, call.seen, ready=ready, device=device)
        for place, memory in zip(watched.places, memories, strict=True):
            place.live = True
            place.keep = partial(self._keep, call)
            if not call.decision.compute:
                place.fill(partial(memory.predict, call.at))

    def _keep(self, call: Call, place: Place) -> None:
        value, place.value = place.value, None
        if value is None:
            return
        memory = self._memory(call.side, place.key)
        if self.measure and len(memory):
            call.errors.append(float(memory.error(call.at, value)))
        memory.put(call.at, value)
        if call.watched is not None and place is call.watched.places[-1]:
            self._tell(call.at, call.side, call.seen, value)

    def _end(self, result: Any) -> None:
        call = self._call
        if call is None or threading.get_ident() != self._thread:
            return  # this call was refused; the generation of another goes on
        if result is None:  # it raised
            self._close()
        elif not call.explicit:
            self._finish(call)

    def _finish(self, call: Call) -> None:
        """Keep what was computed, and write down what was done."""
        if self._call is not call:
            return  # the generation ended meanwhile
        watched, self._call = call.watched, None
        if watched is None or not watched.ran:  # a moment in which no model was called
            for each in self._watched:
                each.reset()
            return
        try:
            self._conclude(call, watched)
        except BaseException:
            self._close()
            raise
        watched.reset()
        self._counted += 1
        if self._implicit and self._counted == call.at.steps * len(self.branches):
            self._close()

    def _conclude(self, call: Call, watched: Watched) -> None:
        if call.decision is None or not all(place.done for place in watched.places):
            raise ModelExecError(
                f"the model {type(watched.model).__name__} did not run all of what is cached in it; a cache that is "
                "attached to blocks needs every one of them to be called in every call of the model"
            )
        if call.decision.compute:
            for place in watched.places:
                self._keep(call, place)
        realised = sum(call.errors) / len(call.errors) if call.errors else None
        self._note(call.at, call.side, call.decision, realised=realised)
