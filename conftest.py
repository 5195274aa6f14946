"""Lets the tests import the seven modules from the repository root."""
