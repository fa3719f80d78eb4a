"""Which stage of the pipeline has which part of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm_finetune.errors import CheckpointError

if TYPE_CHECKING:
    from mm_convert import Layout


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Layers of each stage, in the order in which data runs: stage ``s`` is virtual stage ``s // pp_size`` of pipeline
    rank ``s % pp_size``.

    Pictures come in at stage 0. The stage with the last vision layer makes them tokens of the language model, which
    begins there or on the stage behind; a stage before may have vision layers alone.

    Attributes:
        llm: layers of the language model.
        vit: layers of the vision tower.
        pp_size: pipeline ranks.
        vit_tp_size: how many tensor-parallel ranks share a layer of the tower; 1: each has the whole of it.
    """

    llm: tuple[int, ...]
    vit: tuple[int, ...]
    pp_size: int
    vit_tp_size: int

    @classmethod
    def of(cls, layout: Layout) -> Stages:
        """Of a checkpoint's layout.

        Raises:
            CheckpointError: data could not run through these stages.
        """
        stages = cls(
            llm=sum(layout.llm_pp_layers, ()),
            vit=sum(layout.vit_pp_layers, ()),
            pp_size=layout.pp_size,
            vit_tp_size=layout.tp("vit"),
        )
        ldt = ["its ends stand on pipeline rank 0 (LDT)"] if layout.ldt else []
        if faults := ldt or stages._faults(layout.tp_size):
            raise CheckpointError(
                f"{layout} can't be trained: {'; '.join(faults)}. Legal are for example llm_pp_layers [[12,16]] with"
                " vit_pp_layers [[32,0]], or [[0,12,16]] with [[32,0,0]] or [[16,16,0]]"
            )
        return stages

    @property
    def merger(self) -> int:
        """The stage of the last vision layer."""
        return max(stage for stage, count in enumerate(self.vit) if count)

    @property
    def embedding(self) -> int:
        """The first stage with language layers."""
        return next(stage for stage, count in enumerate(self.llm) if count)

    @property
    def embedding_rank(self) -> int:
        """The pipeline rank of :attr:`embedding`."""
        return self.embedding % self.pp_size

    def tied_faults(self) -> list[str]:
        """What Megatron can't do with one weight for embedding and output layer."""
        virtual = len(self.llm) > self.pp_size
        if virtual and self.embedding and (self.embedding >= self.pp_size - 1):
            return [
                "the model's output layer is its embedding, and with virtual stages the language model must then begin"
                f" before stage {self.pp_size - 1}, not on {self.embedding}"
            ]
        return []

    def _faults(self, tp_size: int) -> list[str]:
        if len(self.vit) != len(self.llm):
            return ["vit_pp_layers is shorter than llm_pp_layers, and each stage would have the tower once more"]
        faults = []
        if not any(self.vit) or not self.vit[0]:
            return ["the first stage must have vision layers"]
        if 0 in self.vit[: self.merger]:
            faults.append("a stage without vision layers stands between stages that have some")
        if 0 in self.llm[self.embedding :]:
            faults.append("a stage without language layers stands behind the first one that has some")
        if self.embedding not in (self.merger, self.merger + 1):
            faults.append(
                "the language model must begin on the last stage with vision layers or the one behind it,"
                f" {self.merger} or {self.merger + 1}, not on stage {self.embedding}"
            )
        if self.vit_tp_size not in (1, tp_size):
            faults.append(f"vit_tp_size {self.vit_tp_size} must be tp_size {tp_size} or 1")
        return faults
