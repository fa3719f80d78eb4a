"""How fast is wan-infer beside diffusers, with the same random weights, steps and noise in one process?

    python benchmarks/wan_pipeline.py --size mini --rounds 5 --output wan.json
    python benchmarks/wan_pipeline.py --size 1.3B --device cuda --dtype bfloat16 --rounds 3

Three things are timed: one forward of the transformer, the decoding of one video by the VAE, and a whole run from noise
to frames with guidance, on diffusers' noise levels. Rounds alternate between the two, so that a busy moment of the
machine hits both; medians, their ratio and the largest difference of the two outputs are printed. Then the memory that
decoding takes beyond weights and latents is measured for several lengths, in a process of its own for each: ours hands
out frames as they come, as the pipeline writes them.

The weights are what each would hold after loading: ours float32 where `keeps_float32` says so, diffusers' where its
model says so, the rest in --dtype; the VAE is float32 in both. With bfloat16 the outputs differ accordingly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_infer.checkpoints.names import TRANSFORMER, vae_names
from wan_infer.config import TRANSFORMERS, TransformerConfig, VaeConfig
from wan_infer.pipeline import WanPipeline
from wan_infer.samplers import draw_noise
from wan_infer.transformer import WanTransformer
from wan_infer.vae import WanVae

SIDES = ("ours", "diffusers")
SHIFT, GUIDANCE, PROMPT_ROWS = 5.0, 5.0, 40


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the video that it makes."""

    transformer: TransformerConfig
    vae: VaeConfig
    width: int
    height: int
    frames: int
    lengths: tuple[int, ...]  # of the videos whose decoding is measured for memory

    def latents(self, frames: int) -> tuple[int, ...]:
        """The shape of the latents of one video of so many frames."""
        space, pace = self.vae.spatial_stride, self.vae.temporal_stride
        return self.vae.z_dim, 1 + (frames - 1) // pace, self.height // space, self.width // space


_SMALL = TransformerConfig(dim=512, ffn_dim=2048, num_heads=8, num_layers=6, text_dim=512)
_FULL = Size(
    transformer=TRANSFORMERS["t2v-1.3B"], vae=VaeConfig(), width=832, height=480, frames=81, lengths=(5, 21, 81)
)
SIZES = {
    "mini": Size(transformer=_SMALL, vae=VaeConfig(base_dim=32), width=96, height=96, frames=9, lengths=(5, 9, 17, 33)),
    # Ten times the tokens: the text, where diffusers computes again what stays, weighs as little as in real videos.
    "small": Size(transformer=_SMALL, vae=VaeConfig(base_dim=32), width=320, height=192, frames=17, lengths=(5, 17)),
    "1.3B": _FULL,
    "14B": replace(_FULL, transformer=TRANSFORMERS["t2v-14B"]),
}


def main() -> int:
    """Measure, print tables, write JSON; the exit code is 2 when something is missing or fails."""
    arguments = _parse()
    if arguments.point is not None:
        side, frames = arguments.point
        print(decode_memory(side, int(frames), arguments))
        return 0
    try:
        seconds, differences = measure(arguments)
        memory = {} if arguments.no_memory else measure_memory(arguments)
        print_memory(memory)
        if arguments.output is not None:
            write_json(arguments, seconds, differences, memory)
    except (OSError, subprocess.CalledProcessError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


# ---- the two sides --------------------------------------------------------------------------------------------------


def transformers(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> tuple[WanTransformer, Any]:
    """Return ours with random weights and diffusers' with the same; they share what both hold in one dtype."""
    peer_class = _diffusers().WanTransformer3DModel
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 copy of 14B would not fit
    try:
        with device:
            ours = WanTransformer(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in ours.named_parameters():
        if ours.keeps_float32(name):
            parameter.data = parameter.data.float()
    with torch.device("meta"):
        theirs = peer_class(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    exact = tuple(peer_class._keep_in_fp32_modules)
    weights = {}
    for name, tensor in ours.state_dict().items():
        (target,) = TRANSFORMER.to_diffusers(name)
        weights[target] = tensor.float() if any(part in target.split(".") for part in exact) else tensor.to(dtype)
    theirs.load_state_dict(weights, assign=True)
    theirs.rope = type(theirs.rope)(config.head_dim, config.patch_size, 1024).to(device)  # its tables are no weights
    return ours, theirs.eval().requires_grad_(False)


def vaes(config: VaeConfig, device: torch.device) -> tuple[WanVae, Any]:
    """Return ours with random weights and diffusers' with the same tensors, in float32."""
    torch.manual_seed(0)
    with device:
        ours = WanVae(config).eval().requires_grad_(False)
        theirs = _diffusers().AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.dim_mult),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
            latents_mean=list(config.latents_mean),
            latents_std=list(config.latents_std),
        )
    names = vae_names(len(config.dim_mult), config.num_res_blocks)
    theirs.load_state_dict({names.to_diffusers(n)[0]: tensor for n, tensor in ours.state_dict().items()}, assign=True)
    return ours, theirs.eval().requires_grad_(False)


def _diffusers() -> Any:
    """The peer, without its types; imported after the arguments were read."""
    import diffusers

    return diffusers


def peer_latents(latents: Tensor, config: VaeConfig) -> Tensor:
    """Return what diffusers' VAE takes: latents that are not normalised."""
    values = (config.latents_mean, config.latents_std)
    mean, std = torch.tensor(values, dtype=torch.float32, device=latents.device)[..., None, None, None]
    plain: Tensor = latents * std + mean
    return plain


# ---- time -----------------------------------------------------------------------------------------------------------

Seconds = dict[str, dict[str, list[float]]]


def measure(arguments: argparse.Namespace) -> tuple[Seconds, dict[str, float]]:
    """Seconds of every round of each part and side, and how far the outputs are apart."""
    size, device, dtype = arguments.model, arguments.device, arguments.dtype
    transformer, vae = transformers(size.transformer, device, dtype), vaes(size.vae, device)
    noise = draw_noise((1, *size.latents(size.frames)), 0).to(device)
    prompts = [draw_noise((1, PROMPT_ROWS, size.transformer.text_dim), seed).to(device, dtype) for seed in (1, 2)]
    parts = {
        "transformer forward": forwards(*transformer, noise, prompts[0], dtype),
        "VAE decode": decodes(*vae, noise),
        "whole": runs(transformer, vae, size, noise, prompts, arguments.steps),
    }
    print(f"{'':22} {'ours':>10} {'diffusers':>10} {'faster':>8} {'difference':>11}")
    seconds, differences = {}, {}
    with torch.inference_mode():
        for part, (ours, theirs) in parts.items():
            differences[part] = (ours().float() - theirs().float()).abs().max().item()  # warms both up as well
            seconds[part] = alternate(dict(zip(SIDES, (ours, theirs), strict=True)), arguments.rounds)
            print_times(part, seconds[part], differences[part])
    return seconds, differences


def alternate(calls: Mapping[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            result = call()
            if result.device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - started)
            del result
    return seconds


Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def forwards(ours: WanTransformer, theirs: Any, noise: Tensor, prompt: Tensor, dtype: torch.dtype) -> Pair:
    """One forward, the keys and values of the text being ours to keep between steps."""
    timestep = torch.tensor([500], device=noise.device)
    with torch.inference_mode():
        context = ours.prepare_text(prompt)
    text, latents = padded(prompt, ours.config.text_len), noise.to(dtype)
    return (
        lambda: ours(noise, timestep, context),
        lambda: theirs(latents, timestep, text, return_dict=False)[0],
    )


def decodes(ours: WanVae, theirs: Any, latents: Tensor) -> Pair:
    """A whole video, held as one tensor by both."""
    plain = peer_latents(latents, ours.config)
    return lambda: ours.decode(latents), lambda: theirs.decode(plain, return_dict=False)[0]


def runs(
    transformer: tuple[WanTransformer, Any],
    vae: tuple[WanVae, Any],
    size: Size,
    noise: Tensor,
    prompts: Sequence[Tensor],
    steps: int,
) -> Pair:
    """Noise to frames in [-1, 1], with guidance."""
    library = _diffusers()
    pipeline = WanPipeline(config=size.transformer, transformer=transformer[0], vae=vae[0], device=noise.device)
    scheduler = library.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=SHIFT
    )
    peer = library.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae[1], scheduler=scheduler, transformer=transformer[1]
    )
    peer.set_progress_bar_config(disable=True)
    wanted, avoided = (padded(prompt, size.transformer.text_len) for prompt in prompts)

    def ours() -> Tensor:
        return pipeline(
            prompt_embeds=prompts[0],
            negative_prompt_embeds=prompts[1],
            size=(size.width, size.height),
            frames=size.frames,
            steps=steps,
            guidance=GUIDANCE,
            shift=SHIFT,
            sigma_grid="diffusers",
            latents=noise,
        ).video()

    def theirs() -> Tensor:
        made = peer(
            prompt_embeds=wanted,
            negative_prompt_embeds=avoided,
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=noise,
            output_type="pt",
        )
        frames: Tensor = made.frames.transpose(1, 2) * 2 - 1
        return frames

    return ours, theirs


def padded(prompt: Tensor, rows: int) -> Tensor:
    """Return the prompt with zeros up to the rows that the model attends, as diffusers wants it."""
    return torch.nn.functional.pad(prompt, (0, 0, 0, rows - prompt.shape[1]))


# ---- memory ---------------------------------------------------------------------------------------------------------


def measure_memory(arguments: argparse.Namespace) -> dict[str, dict[int, int]]:
    """Bytes that decoding takes beyond weights and latents, for each side and number of frames."""
    options = {"--size": arguments.size, "--device": arguments.device, "--threads": arguments.threads}
    line = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    # glibc would keep the memory of freed tensors for itself, and the peak be partly an accident.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}

    def point(side: str, frames: int) -> int:
        words = [*line, "--point", side, str(frames)]
        return int(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)

    return {side: {frames: point(side, frames) for frames in arguments.model.lengths} for side in SIDES}


def decode_memory(side: str, frames: int, arguments: argparse.Namespace) -> int:
    """Decode one video in this process; return the bytes of its peak above where it started."""
    size, device = arguments.model, arguments.device
    ours, theirs = vaes(size.vae, device)
    latents = draw_noise((1, *size.latents(frames)), 0).to(device)
    with torch.inference_mode():
        plain = peer_latents(latents, size.vae)
        before = _memory_now(device)
        if side == "ours":
            for chunk in ours.decode_stream(latents):
                del chunk
        else:
            theirs.decode(plain)
        return _memory_peak(device) - before


def _memory_now(device: torch.device) -> int:
    """Bytes in use; the peak starts here."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return int(torch.accelerator.memory_allocated(device))
    with suppress(OSError):  # Linux resets the peak; elsewhere that of the start counts, which is little
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_peak(device: torch.device) -> int:
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    with suppress(OSError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- what is said ---------------------------------------------------------------------------------------------------


def print_times(part: str, seconds: Mapping[str, Sequence[float]], difference: float) -> None:
    """A line for one part: the medians, their ratio, and how far the outputs are apart."""
    ours, theirs = (statistics.median(seconds[side]) for side in SIDES)
    row = f"{part:22} {ours:8.3f} s {theirs:8.3f} s {theirs / ours:7.2f}x {difference:11.1e}"
    print(row, flush=True)  # the next part may take minutes


def print_memory(memory: Mapping[str, Mapping[int, int]]) -> None:
    """A line for each side: mebibytes by the number of frames."""
    for side, points in memory.items():
        amounts = ", ".join(f"{bytes_ / 2**20:.0f} MiB for {frames} frames" for frames, bytes_ in points.items())
        print(f"peak of VAE decode, {side}: {amounts}")


def write_json(
    arguments: argparse.Namespace,
    seconds: Seconds,
    differences: Mapping[str, float],
    memory: Mapping[str, Mapping[int, int]],
) -> None:
    """Write every single time, the differences, the memory, and what they were taken on."""
    device: torch.device = arguments.device
    on_cpu = device.type == "cpu"
    name = platform.processor() if on_cpu else torch.get_device_module(device).get_device_name(device)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count(), "device": name}
    keys = ("size", "steps", "rounds", "threads")
    settings = {key: getattr(arguments, key) for key in keys} | {"dtype": str(arguments.dtype)}
    record = {"machine": machine, "settings": settings, "seconds": seconds, "differences": differences}
    text = json.dumps(record | {"decode_peak_bytes": memory}, indent=2)
    Path(arguments.output).write_text(text + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mini", help="(default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the transformer (default: as wan-infer)")
    parser.add_argument("--steps", type=_positive, default=4, help="of the whole run (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--no_memory", action="store_true", help="time only")
    parser.add_argument("--output", type=Path, help="where the single times go, as JSON (default: nowhere)")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)  # one measurement of memory, in its own process
    arguments = parser.parse_args()
    arguments.model = SIZES[arguments.size]
    usual = "float32" if arguments.device.type == "cpu" else "bfloat16"
    arguments.dtype = getattr(torch, arguments.dtype or usual)
    torch.set_num_threads(arguments.threads)
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on is expected")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
