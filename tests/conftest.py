"""Fixtures for every test."""

from __future__ import annotations

import uuid

import pytest


@pytest.fixture(autouse=True)
def plain_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a developer's shell sets must not change what a test sees, nor a test what is theirs."""
    shell = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "ONNXGEN_DEBUG")
    github = ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE")
    for name in (*shell, *github):
        monkeypatch.delenv(name, raising=False)
    user = tmp_path_factory.getbasetemp() / "user" / uuid.uuid4().hex  # made when it is needed
    monkeypatch.setenv("ONNXGEN_CONFIG", str(user / "config"))
    monkeypatch.setenv("ONNXGEN_CACHE", str(user / "cache"))
