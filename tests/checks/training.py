"""Training, a moving average of the weights, gradient checkpointing."""

from typing import Any, ClassVar

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from tests.checks.base import Base, cast, parameters


class Training(Base):
    """Gradients of a merged model; its parameters are those of the untouched one."""

    checkpointed: ClassVar[set[str]]
    """Names of the classes that can be checkpointed."""

    def backward(self, model: Any) -> Tensor:
        """A backward pass of a loss; returns the loss."""
        output = model(**cast(self.inputs(), model.dtype), return_dict=False)[0]
        target = torch.ones_like(output)
        loss = nn.functional.mse_loss(output, target)
        loss.backward()
        return loss.detach()

    def test_training(self) -> None:
        untouched = self.untouched()
        model = self.merged(untouched).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss = self.backward(model)
        for name, parameter in untouched.named_parameters():  # which are the merged model's
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        optimizer.zero_grad()
        assert self.backward(model) < loss

    def test_moving_average(self) -> None:
        model = self.merged().train()
        average = EMAModel(model.parameters(), decay=0.5, model_config=model.config)
        before = parameters(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(2):
            self.backward(model)
            optimizer.step()
            average.step(model.parameters())
        now, target = parameters(model), self.merged()
        average.copy_to(target.parameters())
        for name, parameter in target.named_parameters():
            assert not torch.equal(parameter, before[name])
            assert not torch.equal(parameter, now[name])

    def test_checkpointing_is_turned_on_and_off(self) -> None:
        model = self.merged()
        able = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        assert {type(m).__name__ for m in able} == self.checkpointed
        assert not model.is_gradient_checkpointing
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
        assert all(m.gradient_checkpointing for m in able)
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing
        assert not any(m.gradient_checkpointing for m in able)

    def test_checkpointed_gradients_are_the_plain_ones(self) -> None:
        plain = self.merged(self.untouched().double())
        self.backward(plain)
        late = self.merged(self.untouched().double())
        late.enable_gradient_checkpointing()
        early = self.untouched().double()
        early.enable_gradient_checkpointing()
        for model in (late, self.merged(early)):
            assert model.is_gradient_checkpointing
            self.backward(model.train())
            for (name, p), expected in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                assert p.grad is not None, name
                torch.testing.assert_close(p.grad, expected.grad, msg=name)

    @pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
    def test_mixed_precision(self) -> None:
        model = self.merged().train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.backward(model)
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())
