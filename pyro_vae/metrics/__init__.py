"""Measurements of what a model has learned."""

from pyro_vae.metrics.active_units import active_units

__all__ = ["active_units"]
