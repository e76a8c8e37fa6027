"""Functions that the inserted nodes call: pure tensor functions, and the state of a schedule."""

from toma_fx.runtime import ops as ops
