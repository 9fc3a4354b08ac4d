"""Tests of the readers of screens."""
