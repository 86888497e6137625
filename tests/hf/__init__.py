"""Tests of lvtp.hf; a package, so that its conftest and helpers do not shadow those of `tests`."""
