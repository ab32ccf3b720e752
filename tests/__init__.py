"""Tests of Coppice, one folder per package."""
