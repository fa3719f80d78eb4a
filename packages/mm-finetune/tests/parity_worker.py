"""Started by torchrun: compares megatron-core with transformers over several layouts, prints one JSON line each.

Reference: transformers' model, one process, plain AdamW. It runs on every rank; it is tiny.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm_finetune.config import OptimizationConfig, ParallelConfig
from mm_finetune.data import Batch, EncodedSample, collate
from mm_finetune.engine.device import mcore_on
from mm_finetune.engine.model import QwenVL
from mm_finetune.engine.parallel import Ranks, model_parallel, processes, transformer_config
from mm_finetune.engine.step import Trainer
from mm_finetune.engine.weights import Checkpoint
from mm_finetune.images import ImageInputs
from mm_finetune.mini.model import model_config
from mm_finetune.mini.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE
from mm_finetune.rope import mrope_positions

FIRST_SPECIAL = VOCAB_SIZE - len(SPECIAL_TOKENS)
IDS = {token: FIRST_SPECIAL + number for number, token in enumerate(SPECIAL_TOKENS)}
IMAGE, VISION_START, VISION_END = (IDS[f"<|{name}|>"] for name in ("image_pad", "vision_start", "vision_end"))
STEPS, GLOBAL_BATCH, MICRO_BATCH = 10, 8, 2
# Decay and rate are large, so that a wrong parameter group or a wrong norm shows in the curve.
OPTIMIZATION = OptimizationConfig(
    steps=STEPS, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, lr=1e-3, weight_decay=1.0, clip_grad=1.0
)


class Vocabulary:
    """All that the configuration of qwen2_5_vl-mini asks of its tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        return IDS


def hf_model(*, tied: bool, seed: int = 0) -> Any:
    """qwen2_5_vl-mini."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = model_config(Vocabulary())
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sample(seed: int) -> EncodedSample:
    """Two pictures of different grids or none, another length for each sample, loss on a random part."""
    generator = torch.Generator().manual_seed(seed)
    # No special tokens: transformers gives the padding token no gradient, and text does not contain it.
    text = torch.randint(0, FIRST_SPECIAL, (14 + seed % 5,), generator=generator).tolist()
    grids = torch.tensor([[1, 4, 8], [1, 4, 4]] if seed % 3 else []).view(-1, 3)
    counts = (grids.prod(-1) // 4).tolist()
    blocks = [[VISION_START, *[IMAGE] * count, VISION_END] for count in counts]
    ids = text[:2] + [t for b in blocks[:1] for t in b] + text[2:6] + [t for b in blocks[1:] for t in b] + text[6:]
    pixels = torch.randn(int(grids.prod(-1).sum()), 1176, generator=generator)
    labels = torch.tensor(ids)
    labels[(torch.rand(len(ids), generator=generator) < 0.4) | (labels >= FIRST_SPECIAL)] = -100
    return EncodedSample(
        input_ids=torch.tensor(ids),
        labels=labels,
        positions=mrope_positions(ids, grids, image_token_id=IMAGE),
        images=ImageInputs(pixel_values=pixels, image_grid_thw=grids, token_counts=tuple(counts)) if counts else None,
    )


def batches(step: int) -> list[Batch]:
    """The global batch, the same for every layout."""
    samples = [sample(step * GLOBAL_BATCH + i) for i in range(GLOBAL_BATCH)]
    return [collate(samples[i : i + MICRO_BATCH]) for i in range(0, GLOBAL_BATCH, MICRO_BATCH)]


def reference_logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids,
        pixel_values=batch.pixel_values, image_grid_thw=batch.image_grid_thw,
    ).logits  # fmt: skip
    return logits


def reference_loss(model: Any, global_batch: list[Batch]) -> Tensor:
    total, tokens = torch.zeros(()), torch.zeros(())
    for batch in global_batch:
        logits = reference_logits(model, batch).float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        total = total + (losses * batch.loss_mask.flatten()).sum()
        tokens = tokens + batch.loss_mask.sum()
    return total / tokens


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value of the tensor."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def grads_by_hf_name(model: QwenVL, checkpoint: Checkpoint, ranks: Ranks) -> dict[str, Tensor]:
    """Every gradient of every rank, joined under the Hugging Face names (on rank 0; {} elsewhere)."""
    file = f"{checkpoint.layout.rank_dir(ranks.tp_rank, ranks.pp_rank)}/model_optim_rng.pt"
    mine = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(gathered, (file, mine))
    held = dict(reversed(gathered))
    canonical = {checkpoint.converter.family.canonical(ref.name): ref for ref in checkpoint.hf.tensors}
    joined = {}
    for name, ref in canonical.items():
        if name.startswith("visual."):
            first = checkpoint.layout.rank_dir(0, 0) + "/model_optim_rng.pt"
            joined[name] = held[first][name]
        else:
            pieces = [
                held[s.source.file][s.source.name].narrow(s.dim, s.source_start, s.length)
                for s in checkpoint.plan.writes[ref]
            ]
            joined[name] = torch.cat(pieces, checkpoint.plan.writes[ref][0].dim)
    return joined


def our_logits(trainer: Trainer, batch: Batch, ranks: Ranks) -> Tensor:
    """Logits of one micro-batch through the pipeline, joined over tensor-parallel ranks, told to everyone."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: Any, model: Any) -> Any:
        return model(next(iterator), logits=True), lambda out, non_loss_data=False: out

    data = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter([batch]), model=trainer.wrapped, num_microbatches=1,
        seq_length=batch.input_ids.shape[1], micro_batch_size=batch.input_ids.shape[0], forward_only=True,
        collect_non_loss_data=True,
    )  # fmt: skip
    gathered: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(
        gathered, (ranks.tp_rank, data[0].detach()) if ranks.last_stage and ranks.dp_rank == 0 else None
    )
    return torch.cat([part for _, part in sorted((g for g in gathered if g), key=lambda g: g[0])], dim=-1)


def compare(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    from mm_convert import Converter, Layout

    tp, pp, tied = case["tp"], case["pp"], case["tied"]
    parallel = ParallelConfig(tp_size=tp, pp_size=pp)
    reference = hf_model(tied=tied)
    hf_dir, mm_dir = folder / "hf", folder / "mm"
    if dist.get_rank() == 0:
        reference.save_pretrained(hf_dir)
        layout = Layout(llm_pp_layers=[case["llm"]], vit_pp_layers=[[4] + [0] * (pp - 1)], tp_size=tp)  # type: ignore[arg-type]
        Converter.named("Qwen2_5_VLConverter").hf_to_mm(hf_dir, mm_dir, layout)
    dist.barrier()
    checkpoint = Checkpoint(mm_dir, hf_dir, parallel)
    with model_parallel(parallel) as ranks:
        settings = transformer_config(reference.config.text_config, parallel, tuple(case["llm"]))
        model = QwenVL(settings, reference.config, ranks)
        checkpoint.load(model, ranks)
        trainer = Trainer(model, OPTIMIZATION, ranks)
        marked = [p for p in model.parameters() if getattr(p, "tensor_model_parallel", False)]
        result: dict[str, Any] = case | {"dp": ranks.dp_size, "sharded": len(marked)}

        share = len(batches(0)) // ranks.dp_size
        mine = slice(ranks.dp_rank * share, (ranks.dp_rank + 1) * share)
        logits = our_logits(trainer, batches(0)[0], ranks)
        result["logits"] = relative(logits, reference_logits(reference, batches(0)[0]).detach())

        loss, tokens = trainer.accumulate(batches(0)[mine])
        result["tokens"] = tokens == sum(batch.tokens for batch in batches(0))
        expected = reference_loss(reference, batches(0))
        expected.backward()  # type: ignore[no-untyped-call]
        result["loss"] = abs(loss - float(expected.detach()))
        theirs = {checkpoint.converter.family.canonical(n): p.grad for n, p in reference.named_parameters()}
        ours = grads_by_hf_name(model, checkpoint, ranks)
        worst = max(theirs, key=lambda n: relative(ours[n], theirs[n]))
        result |= {"grad": relative(ours[worst], theirs[worst]), "grad_name": worst, "grads": len(theirs)}
        result |= curve(trainer, reference, mine)
        checkpoint.save(model, ranks, folder / "out", STEPS)
    if dist.get_rank() == 0:
        result["exported"] = export_difference(folder, reference)
    return result


def curve(trainer: Trainer, reference: Any, mine: slice) -> dict[str, float]:
    parameters = list(reference.parameters())
    decayed, kept = ([p for p in parameters if (p.dim() > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZATION.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=OPTIMIZATION.lr, betas=(OPTIMIZATION.adam_beta1, OPTIMIZATION.adam_beta2), eps=OPTIMIZATION.adam_eps,
    )  # fmt: skip
    worst_loss = worst_norm = 0.0
    first = last = 0.0
    for step in range(STEPS):
        ours = trainer.step(batches(step)[mine], OPTIMIZATION.lr)
        optimizer.zero_grad()
        loss = reference_loss(reference, batches(step))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZATION.clip_grad))
        optimizer.step()
        worst_loss = max(worst_loss, abs(ours.loss - float(loss.detach())))
        worst_norm = max(worst_norm, abs(ours.grad_norm - norm) / norm)
        first, last = first or float(loss.detach()), float(loss.detach())
    return {"curve": worst_loss, "norm": worst_norm, "first": first, "last": last}


def export_difference(folder: Path, reference: Any) -> float:
    """Save → mm_to_hf → transformers: largest relative difference to the reference's trained weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from mm_convert import Converter

    Converter.named("Qwen2_5_VLConverter").mm_to_hf(folder / "out", folder / "hf", folder / "tuned")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "tuned", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), info
    theirs = dict(reference.named_parameters())
    return max(relative(p, theirs[n]) for n, p in model.named_parameters())


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with processes() as device, mcore_on(device):
        for number, case in enumerate(cases):
            result = compare(case, folder / str(number))
            if dist.get_rank() == 0:
                sys.stdout.write("RESULT " + json.dumps(result) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
