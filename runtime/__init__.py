"""What the inserted nodes call: pure functions of tensors, and the state that a schedule needs."""

from toma_fx.runtime import ops as ops
