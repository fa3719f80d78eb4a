"""Small computations on the accelerators, in a child process and only when asked for."""

from __future__ import annotations

from typing import Mapping

from ascend_envcheck.snapshot import CommandFacts

# With four arguments it is one rank of the all-reduce, started by the child that has two.
_CHILD = """
import os, subprocess, sys, tempfile
sys.path[:] = [entry for entry in sys.path if entry]
import torch
import importlib.util
if importlib.util.find_spec("torch_npu") is not None:
    import torch_npu
device, count = sys.argv[1], int(sys.argv[2])
def done(step):
    print("done: " + step, flush=True)
def check(right, words):
    if not right:
        sys.exit(words)
def compute():
    ones = torch.ones(2, 2, device=device)
    check((ones @ ones).cpu().tolist() == [[2.0, 2.0], [2.0, 2.0]], "the product of two 2 x 2 matrices is wrong")
    done("2 x 2 matrix product")
    video = torch.ones(1, 4, 3, 8, 8, device=device, dtype=torch.float16)
    kernel = torch.ones(4, 4, 3, 3, 3, device=device, dtype=torch.float16)
    centre = torch.nn.functional.conv3d(video, kernel, padding=1)[0, 0, 1, 4, 4].item()
    check(centre == 4 * 27, "a 3-D convolution in fp16 gives %s, not 108" % centre)
    done("3-D convolution in fp16")
def reduce(rank, meeting):
    if device != "cpu":
        getattr(torch, device).set_device(rank)
    backend = {"npu": "hccl", "cuda": "nccl"}.get(device, "gloo")
    torch.distributed.init_process_group(backend, init_method="file://" + meeting, rank=rank, world_size=count)
    one = torch.ones(1, device=device)
    torch.distributed.all_reduce(one)
    torch.distributed.destroy_process_group()
    check(one.item() == count, "an all-reduce over %d gives %s" % (count, one.item()))
if len(sys.argv) > 3:
    reduce(int(sys.argv[3]), sys.argv[4])
else:
    compute()
    if count > 1:
        with tempfile.TemporaryDirectory() as folder:
            start = [sys.executable, "-c", os.environ["ENVCHECK_SMOKE"], device, str(count)]
            ranks = [subprocess.Popen([*start, str(rank), folder + "/meeting"]) for rank in range(count)]
            failed = [rank for rank, child in enumerate(ranks) if child.wait()]
        check(not failed, "the all-reduce failed on rank " + ", ".join(map(str, failed)))
        done("all-reduce over %d" % count)
"""


def smoke(environ: Mapping[str, str], device: str, count: int, seconds: float) -> CommandFacts:
    """A matrix product, a 3-D convolution in fp16 and, over several accelerators, an all-reduce; what came of it."""
    import sys

    from ascend_envcheck.probes.command import last_line, run
    from ascend_envcheck.snapshot import FAILED

    argv = [sys.executable, "-c", _CHILD, device, str(count)]
    outcome, detail, out, err = run(argv, {**environ, "ENVCHECK_SMOKE": _CHILD}, seconds=seconds)
    reason = last_line(err) if outcome == FAILED else ""
    steps = "\n".join(line for line in out.splitlines() if line.startswith("done: "))
    return CommandFacts(outcome, reason or detail, steps)
