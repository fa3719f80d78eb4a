"""MindIE SD imports on the stub and can be asked what it would do; no comparison with ours here."""

from __future__ import annotations

import pytest
import torch

from npu import peer


def test_what_it_does_without_its_kernels_runs_on_the_cpu() -> None:
    x, table = torch.randn(2, 5, 3, 8), torch.randn(5, 8)
    with peer.quiet() as mindiesd:
        results = (
            mindiesd.rotary_position_embedding(x, table, table, fused=False),
            mindiesd.attention_forward(x, x, x, fused=False),
            mindiesd.RMSNorm(8)(x, if_fused=False),
            mindiesd.fast_layernorm(torch.nn.LayerNorm(8), x, fused=False),
            mindiesd.get_activation_layer("gelu-tanh")(x),
        )
    assert all(result.shape == x.shape and result.isfinite().all() for result in results)


def test_its_selection_of_blocks_runs_on_the_cpu() -> None:
    x = torch.randn(1, 2, 4 * 16 * 16 + 128, 16)
    shape = (4, 16, 16)
    with peer.quiet():
        found = peer.selection().do_tensor_rearrange_pooling(x, x, x, 128, 128, shape, shape, "BNSD")
        q, *_, pooled = found
        back = peer.selection().do_tensor_inv_rearrange(q, 128, shape, shape, "BNSD")
    assert torch.equal(back, x)
    assert not torch.equal(q, x)
    assert torch.as_tensor(pooled).isfinite().all()


def test_its_errors_come_without_a_log_line(capfd: pytest.CaptureFixture[str]) -> None:
    with peer.quiet() as mindiesd, pytest.raises(Exception, match=r"MIE06E000001.*must be 4, but got 2") as raised:
        mindiesd.attention_forward(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), fused=False)
    assert type(raised.value).__name__ == "ParametersInvalid"
    assert capfd.readouterr() == ("", "")
