"""The table of rules, in the order in which their findings are told."""

from __future__ import annotations

from ascend_envcheck.findings import EVERY_DEVICE, NPU
from ascend_envcheck.rules import cann, host, npu, torch_stack
from ascend_envcheck.rules.rule import Rule

_NPU = (NPU,)

RULES: tuple[Rule, ...] = (
    Rule("PY-VER", "Python is 3.10 or newer, and one that torch_npu supports", host.python_version, EVERY_DEVICE),
    Rule("IMPORT-TORCH", "torch imports", torch_stack.torch_import, EVERY_DEVICE, needs_import=True),
    Rule("TORCH-ACCEL", "torch.accelerator is there, and shows the NPU", torch_stack.accelerator, EVERY_DEVICE, True),
    Rule("TORCHVISION", "torchvision was built for this torch", torch_stack.torchvision, EVERY_DEVICE),
    Rule("MM-PACKAGES", "transformers and megatron-core are installed", host.packages, EVERY_DEVICE),
    Rule("MM-PSUTIL", "psutil is installed beside megatron-core", host.psutil, EVERY_DEVICE),
    Rule("DEV-NODES", "an NPU is here, and this user may open it", npu.device_nodes, _NPU),
    Rule("NPU-SMI", "the NPU driver answers", npu.npu_smi, _NPU),
    Rule("CANN-HOME", "one CANN toolkit is here", cann.home, _NPU),
    Rule("CANN-SOURCED", "CANN's set_env.sh was sourced", cann.sourced, _NPU),
    Rule("NNAL-LIB", "NNAL is installed and sourced: libatb.so is found", cann.nnal_library, _NPU, needs_import=True),
    Rule("TORCH-NPU", "torch and torch_npu are of one release", torch_stack.torch_npu_pair, _NPU),
    Rule("TORCH-CANN", "torch_npu was made for this CANN", torch_stack.torch_cann, _NPU),
    Rule("IMPORT-TORCH-NPU", "torch_npu is there and imports", torch_stack.torch_npu_import, _NPU, needs_import=True),
)
"""Every rule; the ids are stable."""
