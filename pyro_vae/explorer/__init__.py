"""One page that runs a decoder in a browser: no server, no network."""

from pyro_vae.explorer.page import Content, Rows, page
from pyro_vae.explorer.program import CannotRun, Program, trace

__all__ = ["CannotRun", "Content", "Program", "Rows", "page", "trace"]
