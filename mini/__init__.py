"""The small real world: pool, evaluation sets, target tasks and the base weights shipped here."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "base"
"""Folder of the base weights: llama/, clip/ and projector.safetensors."""
