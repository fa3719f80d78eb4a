"""Versions as they are really written, and text that is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_envcheck.versions import cann_version, pairs, pin_allows, release, series, torch_pin


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.7.1", (2, 7, 1)),
        ("2.7.1+cpu", (2, 7, 1)),
        ("2.6", (2, 6, 0)),
        ("2.10.0.post4", (2, 10, 0)),
        ("2.13.0a0+git1234", (2, 13, 0)),
        (" v3.11.2", (3, 11, 2)),
        ("", None),
        ("2", None),
        ("torch", None),
    ],
)
def test_release(text: str, expected: tuple[int, int, int] | None) -> None:
    assert release(text) == expected


def test_series() -> None:
    assert [series(text) for text in ("26.0.1", "8.2.RC1", "9.1.0", "x")] == ["26.0", "8.2", "9.1", None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.2.RC1", "8.2.RC1"),
        ("8.2.rc1", "8.2.RC1"),
        ("8.2.RC1.B150", "8.2.RC1"),
        ("8.5.0", "8.5.0"),
        ("cann-8.5.0", "8.5.0"),
        ("9.0.0-beta.1", "9.0.0.beta1"),
        ("8.0.0.beta1", "8.0.0.beta1"),
        ("8.3.RC1.alpha001", "8.3.RC1.alpha001"),
        ("7.0.0", "7.0.0"),
        ("latest", None),
        ("", None),
    ],
)
def test_cann_version(text: str, expected: str | None) -> None:
    assert cann_version(text) == expected


@given(st.integers(0, 999), st.integers(0, 999), st.integers(1, 999))
def test_a_cann_version_is_its_own_spelling(major: int, minor: int, third: int) -> None:
    for text in (f"{major}.{minor}.{third}", f"{major}.{minor}.RC{third}", f"{major}.{minor}.RC{third}.alpha{third}"):
        assert cann_version(text) == text
        assert cann_version(f"/usr/local/Ascend/cann-{text}") == text


def test_pairs_read_both_kinds_of_file() -> None:
    text = (
        "Version=8.2.0.0.201\r\nversion_dir = 8.2.RC1\n# a=b\nAscend-cann-atb : 8.2.RC1\nVersion=later\n\n=x\nplain\n"
    )
    assert pairs(text) == {"version": "8.2.0.0.201", "version_dir": "8.2.RC1", "ascend-cann-atb": "8.2.RC1"}


def test_pairs_keep_what_stands_after_the_first_sign() -> None:
    assert pairs("compatible_version_fw=[7.0.0,8.9.9]\npath=/a:b=c") == {
        "compatible_version_fw": "[7.0.0,8.9.9]",
        "path": "/a:b=c",
    }


@given(st.text())
def test_no_text_is_too_odd(text: str) -> None:
    for key, value in pairs(text).items():
        assert key
        assert "\n" not in key + value
    assert series(text) is None or release(text) is not None
    cann_version(text)
    torch_pin(text)
    pin_allows(text, text)


@pytest.mark.parametrize(
    ("requirement", "pin"),
    [
        ("torch==2.7.1", "2.7.1"),
        ("torch (==2.13.0)", "2.13.0"),
        ("torch==2.7.1+cpu ; platform_machine == 'x86_64'", "2.7.1+cpu"),
        ("torch>=2.0", None),
        ("torchaudio==2.7.1", None),
        ("numpy", None),
    ],
)
def test_torch_pin(requirement: str, pin: str | None) -> None:
    assert torch_pin(requirement) == pin


def test_pin_allows() -> None:
    assert pin_allows("2.7.1", "2.7.1+cpu")
    assert pin_allows("2.7.1+cpu", "2.7.1")
    assert not pin_allows("2.7.1", "2.7.0")
    assert pin_allows("2.13.*", "2.13.0+cpu")
    assert not pin_allows("2.1.*", "2.13.0")
    assert not pin_allows("odd", "odd")
