"""Runs scheduled steps on the device."""
